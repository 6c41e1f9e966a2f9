"""DiS checkpoints of feizc/DiS."""

import math
from collections.abc import Mapping
from typing import Any

import flax.linen as nn
import numpy as np

from diffjax.errors import UserError
from diffjax.models import create
from diffjax.weights import mapping

# d width, e channels of the mixer, n states, r rank of the step sizes, q = r + 2 n, w taps of the convolution,
# l blocks on either side of the middle one, m tokens, c channels, o output channels, p patch, v label rows
DIRECTION = (
    ("conv1d{}.weight", "conv_kernel", "e one w -> w (one e)"),
    ("conv1d{}.bias", "conv_bias", "e -> e"),
    ("x_proj{}.weight", "x_proj/kernel", "q e -> e q"),
    ("dt_proj{}.weight", "dt_proj/kernel", "e r -> r e"),
    ("dt_proj{}.bias", "dt_bias", "e -> e"),
    ("A{}_log", "A_log", "e n -> e n"),
    ("D{}", "D", "e -> e"),
)
BLOCK = (
    ("norm.weight", "norm/scale", "d -> d"),
    ("norm.bias", "norm/bias", "d -> d"),
    ("mixer.in_proj.weight", "mixer/in_proj", "(two e) d -> two d e"),
    *((f"mixer.{theirs.format('')}", f"mixer/forward/{ours}", pattern) for theirs, ours, pattern in DIRECTION),
    *((f"mixer.{theirs.format('_b')}", f"mixer/backward/{ours}", pattern) for theirs, ours, pattern in DIRECTION),
    ("mixer.out_proj.weight", "mixer/out_proj/kernel", "d e -> e d"),
)
TABLE: mapping.Table = (
    ("pos_embed", "positions", "one m d -> one m d"),
    ("patch_embed.proj.weight", "patch_embed/kernel", "d c p1 p2 -> (p1 p2 c) d"),
    ("patch_embed.proj.bias", "patch_embed/bias", "d -> d"),
    ("time_embed.0.weight", "time_embed/fc1/kernel", "(four d2) d -> d (four d2)"),
    ("time_embed.0.bias", "time_embed/fc1/bias", "(four d) -> (four d)"),
    ("time_embed.2.weight", "time_embed/fc2/kernel", "d2 (four d) -> (four d) d2"),
    ("time_embed.2.bias", "time_embed/fc2/bias", "d -> d"),
    ("label_emb.embedding_table.weight", "label_embed/embedding", "v d -> v d"),
    *((f"in_blocks.{{l}}.{theirs}", f"in_blocks/{ours}", pattern) for theirs, ours, pattern in BLOCK),
    *((f"mid_block.{theirs}", f"mid_block/{ours}", pattern) for theirs, ours, pattern in BLOCK),
    *((f"out_blocks.{{l}}.{theirs}", f"out_blocks/{ours}", pattern) for theirs, ours, pattern in BLOCK),
    ("out_blocks.{l}.skip_linear.weight", "out_blocks/skip/kernel", "d (two d2) -> (two d2) d"),
    ("out_blocks.{l}.skip_linear.bias", "out_blocks/skip/bias", "d -> d"),
    ("norm_f.weight", "norm/scale", "d -> d"),
    ("norm_f.bias", "norm/bias", "d -> d"),
    ("final_layer.adaLN_modulation.1.weight", "final/modulation/kernel", "(two d2) d -> d (two d2)"),
    ("final_layer.adaLN_modulation.1.bias", "final/modulation/bias", "(two d) -> (two d)"),
    ("final_layer.linear.weight", "final/linear/kernel", "(p1 p2 o) d -> d (p1 p2 o)"),
    ("final_layer.linear.bias", "final/linear/bias", "(p1 p2 o) -> (p1 p2 o)"),
)
CONSTANTS = {"one": 1, "two": 2, "four": 4}

# Parts that not every model has, and what their keys contain.
OPTIONAL = {
    "labels": ("label_emb.", "adaLN_modulation."),
    "time_mlp": ("time_embed.",),
    "layer_norm": ("norm.bias", "norm_f.bias"),
    "sides": ("in_blocks.", "out_blocks."),
    "skips": ("skip_linear.",),
}

# the reference's constructor arguments; the last three are the same in every model of the table
ARGUMENTS = (
    "img_size",
    "patch_size",
    "channels",
    "embed_dim",
    "depth",
    "num_classes",
    "class_dropout_prob",
    "learn_sigma",
    "mlp_time_embed",
    "ssm_cfg",
    "drop_path_rate",
    "rms_norm",
    "skip",
    "fused_add_norm",
    "norm_epsilon",
    "residual_in_fp32",
    "bimamba_type",
)
FIXED = {"norm_epsilon": 1e-5, "residual_in_fp32": True, "bimamba_type": "v2"}
MIXER_ARGUMENTS = ("d_state", "d_conv", "expand", "dt_rank")


def from_reference(state_dict: Mapping[str, Any], **config: Any) -> tuple[nn.Module, dict[str, Any]]:
    """The module and its parameters; `config` as in `diffjax.weights.from_reference`.

    The shapes do not tell whether `depth` is even (default) or odd, which matters to drop path alone, `drop_path_rate`
    (default: the published 0.1), whether the last label is the null class (default: yes; `class_dropout_prob` = 0 or
    `num_classes` say otherwise), and `skip` of a model of one block.
    """
    mapping.check_names("dis", config, ARGUMENTS)
    mapping.check_names("dis: ssm_cfg", config.get("ssm_cfg") or {}, MIXER_ARGUMENTS)
    present = {name for name, parts in OPTIONAL.items() if any(part in key for key in state_dict for part in parts)}
    table = _table(present)
    sizes = mapping.infer(table, state_dict, CONSTANTS)
    mapping.check(table, sizes, state_dict, "dis")
    module = create("DiS", **_arguments(sizes, present, config))
    return module, mapping.to_params(table, _sizes(module, sizes["m"]), state_dict, "dis")


def to_reference(module: nn.Module, params: Mapping[str, Any]) -> dict[str, np.ndarray]:
    """The reference's state_dict."""
    return mapping.to_state_dict(_table(_present(module)), _sizes(module, params["positions"].shape[1]), params)


def _table(present: set[str]) -> mapping.Table:
    """The rows of a model that has these of the optional parts."""
    absent = [part for name, parts in OPTIONAL.items() if name not in present for part in parts]
    return [row for row in TABLE if not any(part in row[0] for part in absent)]


def _present(module: Any) -> set[str]:
    parts = {
        "labels": module.num_classes > 0,
        "time_mlp": module.time_mlp,
        "layer_norm": module.norm == "layer",
        "sides": module.depth > 1,
        "skips": module.depth > 1 and module.skip == "concat",
    }
    return {name for name, has in parts.items() if has}


def _sizes(module: Any, tokens: int) -> dict[str, int]:
    """The sizes of the table's axes for a module of ours."""
    rank = math.ceil(module.width / 16)
    return CONSTANTS | {
        "d": module.width,
        "e": module.expand * module.width,
        "n": module.d_state,
        "r": rank,
        "q": rank + 2 * module.d_state,
        "w": module.d_conv,
        "l": module.depth // 2,
        "m": tokens,
        "c": module.channels,
        "o": module.channels * (1 + module.learn_sigma),
        "p": module.patch,
        "v": module.num_classes + module.null_class,
    }


def _arguments(sizes: mapping.Sizes, present: set[str], config: dict[str, Any]) -> dict[str, Any]:
    """Constructor arguments of our module out of the sizes; what `config` gives must agree with them."""
    side = _side(sizes["m"], 1 + ("labels" in present))
    mixer = {"d_state": sizes["n"], "d_conv": sizes["w"], "expand": sizes["e"] // sizes["d"]}
    inferred: dict[str, Any] = {
        "img_size": sizes["p"] * side,
        "patch_size": sizes["p"],
        "channels": sizes["c"],
        "embed_dim": sizes["d"],
        "depth": _depth(sizes.get("l", 0), config),
        "num_classes": _num_classes(sizes, config) if "labels" in present else -1,
        "learn_sigma": sizes["o"] == 2 * sizes["c"],
        "mlp_time_embed": "time_mlp" in present,
        "rms_norm": "layer_norm" not in present,
    }
    if "sides" in present:
        inferred["skip"] = "skips" in present
    given = config | {"num_classes": max(config["num_classes"], -1) or -1} if "num_classes" in config else config
    mapping.check_agreement("dis", inferred, given)
    given_mixer = {name: value for name, value in (config.get("ssm_cfg") or {}).items() if value != "auto"}
    mapping.check_agreement("dis: ssm_cfg", mixer | {"dt_rank": sizes["r"]}, given_mixer)
    if wrong := [name for name, value in FIXED.items() if config.get(name, value) != value]:
        raise UserError(f"dis: {wrong[0]} = {config[wrong[0]]} is not supported; valid: {FIXED[wrong[0]]}")
    return mixer | {
        "patch": sizes["p"],
        "depth": inferred["depth"],
        "width": sizes["d"],
        "channels": sizes["c"],
        "num_classes": max(inferred["num_classes"], 0),
        "null_class": "labels" not in present or mapping.has_null(sizes["v"], config),
        "learn_sigma": inferred["learn_sigma"],
        "skip": "concat" if inferred.get("skip", config.get("skip", True)) else "none",
        "norm": "rms" if inferred["rms_norm"] else "layer",
        "time_mlp": inferred["mlp_time_embed"],
        "drop_path": config.get("drop_path_rate", 0.1),
    }


def _side(tokens: int, extra: int) -> int:
    """Patches along a side of the image, of `tokens` among which `extra` are no patches."""
    side = math.isqrt(max(tokens - extra, 0))
    if not side or side**2 != tokens - extra:
        raise UserError(f"dis: pos_embed has {tokens} tokens, expected {extra} and those of a square of patches")
    return side


def _depth(side: int, config: dict[str, Any]) -> int:
    """The depth given, if it has that many blocks on either side; else the even one, or 1."""
    depth = config.get("depth", 0)
    return depth if depth > 0 and depth // 2 == side else 2 * side or 1


def _num_classes(sizes: mapping.Sizes, config: dict[str, Any]) -> int:
    num_classes = sizes["v"] - mapping.has_null(sizes["v"], config)
    if num_classes < 1:
        raise UserError(f"dis: a label table of {sizes['v']} rows has no class beside the null class")
    return num_classes
