"""U-DiT checkpoints of YuchuanTian/U-DiT, in the unfused form used for training.

Its evaluation mode adds the 3 x 3 and 1 x 1 kernels and the identity into the stored 5 x 5 kernel, and again whenever
it is entered: weights saved after that no longer hold the model. `check_unfused` refuses them where it can tell.
"""

import math
import re
from collections.abc import Mapping
from typing import Any

import flax.linen as nn
import numpy as np

from diffjax.errors import UserError
from diffjax.models import create
from diffjax.models.udit import SIZES, STAGES, WIDTHS
from diffjax.weights import mapping

# d width of the first level, h heads, k per-head width and e half of it, both of the first level, a side of the
# depthwise kernel of attention, c channels, q output channels, u = d / 2, v label rows, z time features. The stages
# have Lx blocks; the hidden channels Fx are halved in the form with two linear maps for one.
NAMES = ("encoder_level_1", "encoder_level_2", "latent", "decoder_level_2", "decoder_level_1")
BLOCKS = ("La", "Lb", "Lc", "Ld", "Le")
HIDDEN = {"single": "Fa", "double": "Fb", "quadruple": "Fc"}
CONSTANTS = {"one": 1, "two": 2, "three": 3, "five": 5, "six": 6, "j": 2, "z": 256}
CONSTANTS |= {"single": 1, "double": 2, "quadruple": 4}
LEVELS = {CONSTANTS[level]: level for level in HIDDEN}

# One of the two layers of a block: W stands for its width, F for its hidden channels, H for half of them, K and k for
# the features of a head, theirs and ours.
LAYER = (
    ("adaLN_modulation{j1}.1.weight", "modulation/kernel", "(six W) (W2) -> (W2) (six W)"),
    ("adaLN_modulation{j1}.1.bias", "modulation/bias", "(six W) -> (six W)"),
    ("attn{j1}.logit_scale", "attention/logit_scale", "h one one2 -> (h one one2)"),
    ("attn{j1}.downsampler.layer.weight", "attention/downsample/kernel", "(W) one a a2 -> a a2 one (W)"),
    ("attn{j1}.downsampler.layer.bias", "attention/downsample/bias", "(W) -> (W)"),
    ("attn{j1}.to_qkv.weight", "attention/qkv/kernel", "(three h K) (W) -> (W) h three (k)"),
    ("attn{j1}.to_qkv.bias", "attention/qkv/bias", "(three h K) -> h three (k)"),
    ("attn{j1}.to_out.weight", "attention/out/kernel", "(W) (h K) one one2 -> (h one one2) (k) (W)"),
    ("attn{j1}.to_out.bias", "attention/out/bias", "(W) -> (W)"),
    ("mlp{j1}.fc1.weight", "mlp/fc1/kernel", "(F) (W) one one2 -> (W one one2) (F)"),
    ("mlp{j1}.fc1.bias", "mlp/fc1/bias", "(F) -> (F)"),
    ("mlp{j1}.fc2.weight", "mlp/fc2/kernel", "(W) (F) one one2 -> (F one one2) (W)"),
    ("mlp{j1}.fc2.bias", "mlp/fc2/bias", "(W) -> (W)"),
    ("mlp{j1}.project_in.0.weight", "mlp/in_0/kernel", "(H) (W) one one2 -> (W one one2) (H)"),
    ("mlp{j1}.project_in.0.bias", "mlp/in_0/bias", "(H) -> (H)"),
    ("mlp{j1}.project_in.1.weight", "mlp/in_1/kernel", "(F) (H2) one one2 -> (H2 one one2) (F)"),
    ("mlp{j1}.project_in.1.bias", "mlp/in_1/bias", "(F) -> (F)"),
    ("mlp{j1}.dwconv.0.weight", "mlp/kernel_5", "(F) one five five2 -> five five2 one (F)"),
    ("mlp{j1}.dwconv.0.bias", "mlp/bias_5", "(F) -> (F)"),
    ("mlp{j1}.dwconv.1.weight", "mlp/kernel_3", "(F) one three three2 -> three three2 one (F)"),
    ("mlp{j1}.dwconv.1.bias", "mlp/bias_3", "(F) -> (F)"),
    ("mlp{j1}.dwconv.2.weight", "mlp/kernel_1", "(F) one one2 one3 -> one2 one3 one (F)"),
    ("mlp{j1}.dwconv.2.bias", "mlp/bias_1", "(F) -> (F)"),
    ("mlp{j1}.project_out.0.weight", "mlp/out_0/kernel", "(H2) (F) one one2 -> (F one one2) (H2)"),
    ("mlp{j1}.project_out.0.bias", "mlp/out_0/bias", "(H) -> (H)"),
    ("mlp{j1}.project_out.1.weight", "mlp/out_1/kernel", "(W) (H) one one2 -> (H one one2) (W)"),
    ("mlp{j1}.project_out.1.bias", "mlp/out_1/bias", "(W) -> (W)"),
)
EMBEDDERS = (
    ("t_embedder_{}.mlp.0.weight", "time_embed_{}/fc1/kernel", "(W) z -> z (W)"),
    ("t_embedder_{}.mlp.0.bias", "time_embed_{}/fc1/bias", "(W) -> (W)"),
    ("t_embedder_{}.mlp.2.weight", "time_embed_{}/fc2/kernel", "(W) (W2) -> (W2) (W)"),
    ("t_embedder_{}.mlp.2.bias", "time_embed_{}/fc2/bias", "(W) -> (W)"),
    ("y_embedder_{}.embedding_table.weight", "label_embed_{}/embedding", "v (W) -> v (W)"),
)
# The last dimension of a `grow` kernel is reordered so that the channels of a pixel lie together.
BETWEEN: mapping.Table = (
    ("x_embedder.proj.weight", "image_embed/kernel", "d c three three2 -> three three2 c d"),
    ("x_embedder.proj.bias", "image_embed/bias", "d -> d"),
    ("down1_2.body.0.weight", "shrink_1/conv/kernel", "u d three three2 -> three three2 d u"),
    ("down2_3.body.0.weight", "shrink_2/conv/kernel", "d (two d2) three three2 -> three three2 (two d2) d"),
    (
        "up3_2.body.0.weight",
        "grow_2/conv/kernel",
        "(double d two two2) (quadruple d2) three three2 -> three three2 (quadruple d2) (two two2 double d)",
    ),
    (
        "up2_1.body.0.weight",
        "grow_1/conv/kernel",
        "(d two two2) (double d2) three three2 -> three three2 (double d2) (two two2 d)",
    ),
    (
        "reduce_chan_level2.weight",
        "reduce_2/kernel",
        "(double d) (quadruple d2) one one2 -> (quadruple d2 one one2) (double d)",
    ),
    ("reduce_chan_level2.bias", "reduce_2/bias", "(double d) -> (double d)"),
    ("reduce_chan_level1.weight", "reduce_1/kernel", "(two d) (two2 d2) one one2 -> (two2 d2 one one2) (two d)"),
    ("reduce_chan_level1.bias", "reduce_1/bias", "(two d) -> (two d)"),
    ("output.weight", "output/kernel", "(two d) (two2 d2) three three2 -> three three2 (two2 d2) (two d)"),
    ("output.bias", "output/bias", "(two d) -> (two d)"),
    ("final_layer.adaLN_modulation.1.weight", "final/modulation/kernel", "(two W) (W2) -> (W2) (two W)"),
    ("final_layer.adaLN_modulation.1.bias", "final/modulation/bias", "(two W) -> (two W)"),
    ("final_layer.out_proj.weight", "final/conv/kernel", "q (two d) three three2 -> three three2 (two d) q"),
    ("final_layer.out_proj.bias", "final/conv/bias", "q -> q"),
)

# Parts that not every model has, and what their keys contain.
OPTIONAL = {
    "labels": ("y_embedder_",),
    "cosine": (".logit_scale",),
    "downsampler": (".downsampler.",),
    "basic": (".fc",),
    "rep": (".project_", ".dwconv."),
}

# the reference's constructor arguments
ARGUMENTS = (
    "input_size",
    "down_factor",
    "in_channels",
    "hidden_size",
    "depth",
    "num_heads",
    "mlp_ratio",
    "num_classes",
    "downsampler",
    "learn_sigma",
    "rep",
    "ffn_type",
    "attn_type",
    "posemb_type",
    "down_shortcut",
    "class_dropout_prob",
)
POSITIONS = {"rope2d": "rope", None: "none"}


def from_reference(state_dict: Mapping[str, Any], **config: Any) -> tuple[nn.Module, dict[str, Any]]:
    """The module and its parameters; `config` as in `diffjax.weights.from_reference`.

    What the shapes do not tell: `down_factor` (default 2), `down_shortcut` (default 1), `posemb_type` (default as
    published: "rope2d" with cosine attention, None with the other), `class_dropout_prob` (default 0.1) and, without
    cosine attention, `num_heads` (default: that of the published width). `input_size` plays no part.

    Raises:
        UserError: also for weights that went through the reference's evaluation mode.
    """
    mapping.check_names("udit", config, ARGUMENTS)
    config = {name: list(value) if isinstance(value, tuple) else value for name, value in config.items()}
    weights = _with_new_names(state_dict)
    present = {part for part, pieces in OPTIONAL.items() if any(piece in key for key in weights for piece in pieces)}
    positions = config.get("posemb_type", "rope2d" if "cosine" in present else None)
    if positions not in POSITIONS:
        raise UserError(f"udit: posemb_type = {positions!r} is not supported; valid: 'rope2d', None")
    table = _table(present | {POSITIONS[positions]})
    sizes = mapping.infer(table, weights, CONSTANTS)
    mapping.check(table, sizes, weights, "udit")
    module = create("U-DiT", positions=POSITIONS[positions], **_arguments(sizes, present, config))
    params = mapping.to_params(table, _sizes(module), weights, "udit")
    check_unfused(weights)
    return module, params


def to_reference(module: nn.Module, params: Mapping[str, Any]) -> dict[str, np.ndarray]:
    """The reference's state_dict. UserError for the fused form, which it never stores."""
    return mapping.to_state_dict(_table(_present(module)), _sizes(module), params)


def check_unfused(weights: Mapping[str, Any]) -> None:
    """Raise UserError when every 5 x 5 kernel seems to hold the sum T = K3 + K1 + 1 once or more.

    Only centres are looked at. A kernel of the trained form has there values that are small, or close to K3's (the
    branches get the same gradients, so Adam moves them alike). Weights are refused if one of these is met at least
    twice as closely after T has been taken off one, two or three times. That misses averages that a short run of the
    reference contaminated in part, and random kernels as large as T.
    """
    fives = [key for key in weights if re.search(r"mlp[12]\.dwconv\.0\.weight$", key)]
    if not fives:
        return
    five, three, one = (
        np.concatenate([_centre(weights[key.replace("dwconv.0", f"dwconv.{i}")]) for key in fives]) for i in range(3)
    )

    def distance(times: int) -> float:
        rest = five - times * (three + one + 1)
        return math.sqrt(min(np.mean(rest**2), np.mean((rest - three) ** 2)))

    times = min((1, 2, 3), key=distance)
    if 2 * distance(times) < distance(0):
        raise UserError(
            f"udit: the 5 x 5 kernels (such as {fives[0]}) already hold the 3 x 3 and 1 x 1 kernels and the identity, "
            f"{times} time{'s' * (times > 1)}: these weights were saved after the reference's eval(), which adds them "
            "in place; give weights saved before"
        )


def _centre(kernel: Any) -> np.ndarray:
    """[f, 1, k, k] -> float64 [f]."""
    kernel = np.asarray(kernel, np.float64)
    return kernel[:, 0, kernel.shape[2] // 2, kernel.shape[3] // 2]


def _with_new_names(state_dict: Mapping[str, Any]) -> dict[str, Any]:
    """Older files call the depthwise convolution of attention "before_attn"."""
    return {key.replace(".before_attn.", ".downsampler.layer."): value for key, value in state_dict.items()}


def _table(present: set[str]) -> mapping.Table:
    """The rows of a model that has these of the optional parts, and of "rope"."""
    rows = [(key, path, _pattern(pattern, "double", present)) for key, path, pattern in BETWEEN]
    for number, level in enumerate(HIDDEN, 1):
        rows += [(k.format(number), p.format(number), _pattern(text, level, present)) for k, p, text in EMBEDDERS]
    for theirs, ours, blocks, width in zip(NAMES, STAGES, BLOCKS, WIDTHS):
        rows += [
            (f"{theirs}.{{{blocks}}}.{key}", f"{ours}/{path}", _pattern(text, LEVELS[width], present))
            for key, path, text in LAYER
        ]
    absent = [piece for part, pieces in OPTIONAL.items() if part not in present for piece in pieces]
    return [row for row in rows if not any(piece in row[0] for piece in absent)]


def _pattern(pattern: str, level: str, present: set[str]) -> str:
    """A row's pattern with the axes of a level in place of W, F, H, K and k."""
    half = HIDDEN[level]
    axes = {
        "W": f"{level} d",
        "W2": f"{level}2 d2",
        "F": half if "basic" in present else f"two {half}",
        "H": half,
        "H2": f"{half}2",
        # the pairs that rotate are neighbours there and lie in the two halves here
        "K": f"{level}3 e two" if "rope" in present else f"{level}3 k",
        "k": f"two {level}3 e" if "rope" in present else f"{level}3 k",
    }
    return re.sub(r"\w+", lambda word: axes.get(word[0], word[0]), pattern)


def _present(module: Any) -> set[str]:
    if module.ffn == "single":
        raise UserError("udit: the reference stores no fused weights; give those before `fuse`")
    parts = {
        "labels": module.num_classes > 0,
        "cosine": module.similarity == "cosine",
        "downsampler": module.down_kernel > 0,
        "rope": module.positions == "rope",
    }
    return {name for name, has in parts.items() if has} | {module.ffn}


def _sizes(module: Any) -> dict[str, int]:
    """The sizes of the table's axes for a module of ours."""
    halved = 2 if module.ffn == "rep" else 1
    hidden = {HIDDEN[name]: int(width * module.width * module.mlp_ratio) // halved for width, name in LEVELS.items()}
    return (
        CONSTANTS
        | hidden
        | dict(zip(BLOCKS, module.depth))
        | {
            "d": module.width,
            "u": module.width // 2,
            "h": module.heads,
            "k": module.width // module.heads,
            "e": module.width // module.heads // 2,
            "a": module.down_kernel,
            "c": module.channels,
            "q": module.channels * (1 + module.learn_sigma),
            "v": module.num_classes + module.null_class,
        }
    )


def _arguments(sizes: mapping.Sizes, present: set[str], config: dict[str, Any]) -> dict[str, Any]:
    """Constructor arguments of our module out of the sizes; what `config` gives must agree with them."""
    inferred: dict[str, Any] = {
        "in_channels": sizes["c"],
        "hidden_size": sizes["d"],
        "depth": [sizes[blocks] for blocks in BLOCKS],
        "learn_sigma": sizes["q"] == 2 * sizes["c"],
        "ffn_type": "rep" if "rep" in present else "basic",
        "attn_type": "v2" if "cosine" in present else None,
    }
    null = "labels" not in present or mapping.has_null(sizes["v"], config)
    inferred["num_classes"] = sizes["v"] - null if "labels" in present else 0
    if "labels" in present and inferred["num_classes"] < 1:
        raise UserError(f"udit: a label table of {sizes['v']} rows has no class beside the null class")
    if "rep" in present:
        inferred["rep"] = 1
    if "cosine" in present:
        inferred["num_heads"] = sizes["h"]
    if "downsampler" in present:
        inferred["downsampler"] = f"dwconv{sizes['a']}"
    ratio = _mlp_ratio(sizes, present, config)
    mapping.check_agreement("udit", inferred | {"mlp_ratio": ratio}, config)
    factor = config.get("down_factor", 2)
    return {
        "width": sizes["d"],
        "heads": inferred.get("num_heads") or _heads(sizes["d"], config),
        "depth": tuple(inferred["depth"]),
        "mlp_ratio": ratio,
        "channels": sizes["c"],
        "num_classes": inferred["num_classes"],
        "null_class": null,
        "learn_sigma": inferred["learn_sigma"],
        "similarity": "cosine" if "cosine" in present else "dot",
        "down_factor": tuple(factor) if isinstance(factor, list) else factor,
        "down_kernel": sizes["a"] if "downsampler" in present else 0,
        "down_shortcut": bool(config.get("down_shortcut", True)),
        "ffn": inferred["ffn_type"],
        "label_drop": config.get("class_dropout_prob", 0.1),
    }


def _mlp_ratio(sizes: mapping.Sizes, present: set[str], config: dict[str, Any]) -> float:
    """The ratio given, if the widest level has that many hidden channels; else their quotient."""
    width = 4 * sizes["d"]
    hidden = sizes["Fc"] * (2 if "rep" in present else 1)
    given = config.get("mlp_ratio")
    if given and int(width * given) == hidden:
        return given
    return mapping.ratio(hidden, width)


def _heads(width: int, config: dict[str, Any]) -> int:
    published = {width: heads for width, heads, _ in SIZES.values()}
    heads = config.get("num_heads", published.get(width))
    if heads is None:
        raise UserError(
            f"udit: width {width} is no published size; give num_heads=N (convert: --arguments=num_heads=N)"
        )
    return heads
