"""DiGIT checkpoints of DAMO-NLP-SG/DiGIT: the decoder of a fairseq model, in its two stages.

A file also holds what other models are made of: the image encoder, the centroids, the decoder to pixels. They are
passed over here by their names.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import flax.linen as nn
import numpy as np

from diffjax.errors import UserError
from diffjax.models import create
from diffjax.models.digit import FIRST_POSITION, SIZES
from diffjax.ops.vocabulary import END, MASK, PAD, SPECIALS
from diffjax.weights import mapping

# d width, h heads, k per-head width, f mlp width, e rows of the embedding, v columns of the logits, p rows of positions
LAYER: mapping.Table = (
    ("self_attn.q_proj.weight", "attention/query/kernel", "(h k) d -> d h k"),
    ("self_attn.q_proj.bias", "attention/query/bias", "(h k) -> h k"),
    ("self_attn.k_proj.weight", "attention/key/kernel", "(h k) d -> d h k"),
    ("self_attn.k_proj.bias", "attention/key/bias", "(h k) -> h k"),
    ("self_attn.v_proj.weight", "attention/value/kernel", "(h k) d -> d h k"),
    ("self_attn.v_proj.bias", "attention/value/bias", "(h k) -> h k"),
    ("self_attn.out_proj.weight", "attention/out/kernel", "d (h k) -> h k d"),
    ("self_attn.out_proj.bias", "attention/out/bias", "d -> d"),
    ("self_attn_layer_norm.weight", "attention_norm/scale", "d -> d"),
    ("self_attn_layer_norm.bias", "attention_norm/bias", "d -> d"),
    ("fc1.weight", "mlp/fc1/kernel", "f d -> d f"),
    ("fc1.bias", "mlp/fc1/bias", "f -> f"),
    ("fc2.weight", "mlp/fc2/kernel", "d f -> f d"),
    ("fc2.bias", "mlp/fc2/bias", "d -> d"),
    ("final_layer_norm.weight", "mlp_norm/scale", "d -> d"),
    ("final_layer_norm.bias", "mlp_norm/bias", "d -> d"),
)
TABLE: mapping.Table = (
    ("decoder.embed_tokens.weight", "token_embed", "e d -> e d"),
    ("decoder.embed_positions.weight", "positions", "p d -> p d"),
    *((f"decoder.layers.{{l}}.{theirs}", f"blocks/{ours}", pattern) for theirs, ours, pattern in LAYER),
    ("decoder.output_projection.weight", "output/kernel", "v d -> d v"),
)
SOURCE: mapping.Table = (("decoder.embed_positions_1.weight", "source_positions", "p d -> p d"),)
FINAL_NORM: mapping.Table = (
    ("decoder.layer_norm.weight", "final_norm/scale", "d -> d"),
    ("decoder.layer_norm.bias", "final_norm/bias", "d -> d"),
)

# Other networks in the file, and fairseq's mark of the layout of its decoders.
PASSED_OVER = ("pretrained_encoder.", "centroids", "centroid_norm", "vqgan.", "decoder.version")
VERSION = np.array([3.0], np.float32)

# What a configuration says that is the same in every model, and what it says that is not of the decoder.
FIXED = {
    "nspecial": SPECIALS,
    "specials": {"bos": 0, "pad": PAD, "eos": END, "unk": MASK, "n": 4},
    "activation": "gelu(erf)",
    "layer_norm_eps": 1e-5,
    "embed_scale": "sqrt(embed_dim)",
}
ELSEWHERE = (
    "dino",
    "source_len",
    "target_len",
    "greedy",
    "steps",
    "choice_temperature",
    "temp",
    "masked_after_step",
    "grad_names",
    "note",
    "logits_image_note",
    "tokens_note",
)
ARGUMENTS = (
    "K",
    "max_target_positions",
    "normalize_before",
    "decoder_layers",
    "decoder_embed_dim",
    "decoder_ffn_embed_dim",
    "decoder_attention_heads",
)
OF_STAGE1 = ("class_conditional", "num_classes")
OF_STAGE2 = ("V", "target_dict_len", "embed_rows")


@dataclass(frozen=True)
class Family:
    """One use of the decoder, which the weights do not identify.

    Attributes:
        name: in `diffjax.weights.FAMILIES`.
        source: a second stage. causal: see `diffjax.models.digit.DiGIT`.
    """

    name: str
    source: bool
    causal: bool

    def from_reference(self, state_dict: Mapping[str, Any], **config: Any) -> tuple[nn.Module, dict[str, Any]]:
        """The module and its parameters; `config` as in `diffjax.weights.from_reference`.

        The position of the norms is inferred from the presence of a final one. The shapes do not tell the heads of a
        width: they are those of the published size of that depth and width, or given as `decoder_attention_heads`.
        With `num_classes` one row of labels more than that is the null class.
        """
        own = OF_STAGE2 if self.source else OF_STAGE1
        mapping.check_names(self.name, config, (*ARGUMENTS, *own, *FIXED, *ELSEWHERE))
        weights = {key: value for key, value in state_dict.items() if not key.startswith(PASSED_OVER)}
        table = _table(self.source, any(key.startswith("decoder.layer_norm.") for key in weights))
        sizes = mapping.infer(table, weights, {})
        mapping.check(table, sizes, weights, self.name)
        module = create("DiGIT", **self._arguments(sizes, table[-1] == FINAL_NORM[-1], config))
        return module, mapping.to_params(table, _sizes(module), weights, self.name)

    def to_reference(self, module: nn.Module, params: Mapping[str, Any]) -> dict[str, np.ndarray]:
        """The decoder's part of the reference's state_dict."""
        model: Any = module
        return mapping.to_state_dict(_table(model.source_vocabulary > 0, model.norm == "pre"), _sizes(model), params)

    def fixed(self, module: nn.Module, size: int) -> dict[str, np.ndarray]:
        """Fairseq's mark of the layout, the same for every size."""
        return {"decoder.version": VERSION}

    def _arguments(self, sizes: mapping.Sizes, pre_norm: bool, config: dict[str, Any]) -> dict[str, Any]:
        """Constructor arguments of our module out of the sizes; what `config` gives must agree with them."""
        depth, width, hidden, rows, columns = (sizes[axis] for axis in "ldfev")
        vocabulary, more = columns - SPECIALS, rows - columns
        source = more - SPECIALS if self.source else 0
        if vocabulary < 1 or more < 0 or (self.source and source < 1):
            raise UserError(f"{self.name}: embed_tokens has {rows} rows, output_projection {columns}: these do not fit")
        null = not self.source and config.get("num_classes", more) == more - 1 > 0
        inferred = {
            "K": source if self.source else vocabulary,
            "max_target_positions": sizes["p"] - FIRST_POSITION,
            "normalize_before": pre_norm,
            "decoder_layers": depth,
            "decoder_embed_dim": width,
            "decoder_ffn_embed_dim": hidden,
        }
        if self.source:
            inferred |= {"V": vocabulary, "target_dict_len": columns, "embed_rows": rows}
        else:
            inferred |= {"class_conditional": more > 0, "num_classes": more - null}
        mapping.check_agreement(self.name, inferred, config)
        for name, value in FIXED.items():
            if config.get(name, value) != value:
                raise UserError(f"{self.name}: {name} = {config[name]} is not supported; valid: {value}")
        return {
            "vocabulary": vocabulary,
            "depth": depth,
            "width": width,
            "heads": self._heads(depth, width, config),
            "mlp_ratio": mapping.ratio(hidden, width),
            "source_vocabulary": source,
            "num_classes": 0 if self.source else more - null,
            "null_class": null,
            "length": sizes["p"] - FIRST_POSITION,
            "norm": "pre" if pre_norm else "post",
            "causal": self.causal,
        }

    def _heads(self, depth: int, width: int, config: dict[str, Any]) -> int:
        published = {(d, w): heads for d, w, heads, _ in SIZES.values()}
        heads = config.get("decoder_attention_heads", published.get((depth, width)))
        if heads is None:
            raise UserError(
                f"{self.name}: depth {depth}, width {width} is no published size; give decoder_attention_heads=N "
                "(convert: --arguments=decoder_attention_heads=N)"
            )
        return heads


STAGE1 = Family("digit_stage1", source=False, causal=True)
STAGE2_AR = Family("digit_stage2_ar", source=True, causal=True)
STAGE2_NAR = Family("digit_stage2_nar", source=True, causal=False)


def _table(source: bool, pre_norm: bool) -> mapping.Table:
    return (*TABLE, *(SOURCE if source else ()), *(FINAL_NORM if pre_norm else ()))


def _sizes(module: Any) -> dict[str, int]:
    """The sizes of the table's axes for a module of ours."""
    more = SPECIALS + module.source_vocabulary if module.source_vocabulary else module.num_classes + module.null_class
    return {
        "l": module.depth,
        "d": module.width,
        "h": module.heads,
        "k": module.width // module.heads,
        "f": int(module.width * module.mlp_ratio),
        "e": SPECIALS + module.vocabulary + more,
        "v": SPECIALS + module.vocabulary,
        "p": FIRST_POSITION + module.length,
    }
