"""DiffiT checkpoints of NVlabs/DiffiT: `diffit_256.safetensors`, `diffit_512.safetensors`."""

import math
import re
from collections.abc import Mapping
from typing import Any

import flax.linen as nn
import numpy as np

from diffjax.errors import UserError
from diffjax.models import create
from diffjax.models.layers import sincos_positions
from diffjax.ops.windows import relative_positions
from diffjax.weights import mapping

# d width, h heads, k per-head width, f mlp width, m offsets between tokens, c channels, o output channels, p patch,
# v label rows, w time features
TABLE: mapping.Table = (
    ("x_embedder.proj.weight", "patch_embed/kernel", "d c p1 p2 -> (p1 p2 c) d"),
    ("x_embedder.proj.bias", "patch_embed/bias", "d -> d"),
    ("t_embedder.mlp.0.weight", "time_embed/fc1/kernel", "d w -> w d"),
    ("t_embedder.mlp.0.bias", "time_embed/fc1/bias", "d -> d"),
    ("t_embedder.mlp.2.weight", "time_embed/fc2/kernel", "d2 d -> d d2"),
    ("t_embedder.mlp.2.bias", "time_embed/fc2/bias", "d -> d"),
    ("y_embedder.embedding_table.weight", "label_embed/embedding", "v d -> v d"),
    ("blocks.{l}.attn.relative_position_bias_table", "blocks/attention/relative_bias", "m h -> m h"),
    ("blocks.{l}.attn.qkv.weight", "blocks/attention/qkv/kernel", "(three h k) d -> d h three k"),
    ("blocks.{l}.attn.qkv.bias", "blocks/attention/qkv/bias", "(three h k) -> h three k"),
    ("blocks.{l}.attn.qkv_temb.weight", "blocks/attention/qkv_time/kernel", "(three h k) d -> d h three k"),
    ("blocks.{l}.attn.qkv_temb.bias", "blocks/attention/qkv_time/bias", "(three h k) -> h three k"),
    ("blocks.{l}.attn.proj.weight", "blocks/attention/out/kernel", "d (h k) -> h k d"),
    ("blocks.{l}.attn.proj.bias", "blocks/attention/out/bias", "d -> d"),
    ("blocks.{l}.mlp.fc1.weight", "blocks/mlp/fc1/kernel", "f d -> d f"),
    ("blocks.{l}.mlp.fc1.bias", "blocks/mlp/fc1/bias", "f -> f"),
    ("blocks.{l}.mlp.fc2.weight", "blocks/mlp/fc2/kernel", "d f -> f d"),
    ("blocks.{l}.mlp.fc2.bias", "blocks/mlp/fc2/bias", "d -> d"),
    ("final_layer.linear.weight", "final/kernel", "(p1 p2 o) d -> d (p1 p2 o)"),
    ("final_layer.linear.bias", "final/bias", "(p1 p2 o) -> (p1 p2 o)"),
)
CONSTANTS = {"three": 3, "w": 256}

# what the files hold beside the parameters, and we compute
POSITIONS = "pos_embed"
INDEX = "blocks.{}.attn.relative_position_index"

# the reference's constructor arguments
ARGUMENTS = (
    "input_size",
    "patch_size",
    "in_channels",
    "hidden_size",
    "depth",
    "num_heads",
    "mlp_ratio",
    "class_dropout_prob",
    "num_classes",
    "learn_sigma",
)


def from_reference(state_dict: Mapping[str, Any], **config: Any) -> tuple[nn.Module, dict[str, Any]]:
    """The module and its parameters; `config` as in `diffjax.weights.from_reference`.

    The shapes tell everything but whether the last label is the null class (default: yes; `class_dropout_prob` = 0 or
    `num_classes` say otherwise).
    """
    mapping.check_names("diffit", config, ARGUMENTS)
    computed = re.compile(f"{POSITIONS}|{re.escape(INDEX).replace(re.escape('{}'), '[0-9]+')}")
    weights = {key: value for key, value in state_dict.items() if not computed.fullmatch(key)}
    sizes = mapping.infer(TABLE, weights, CONSTANTS)
    mapping.check(TABLE, sizes, weights, "diffit")
    module = create("DiffiT", **_arguments(sizes, config))
    params = mapping.to_params(TABLE, _sizes(module), weights, "diffit")
    _check_computed(state_dict.keys() - weights.keys(), state_dict, module)
    return module, params


def to_reference(module: nn.Module, params: Mapping[str, Any]) -> dict[str, np.ndarray]:
    """The reference's state_dict, with its table of positions and, int64, those of relative positions."""
    return mapping.to_state_dict(TABLE, _sizes(module), params) | _computed(module)


def _computed(module: Any) -> dict[str, np.ndarray]:
    index = relative_positions(module.window).astype(np.int64)
    positions = sincos_positions(module.window, module.window, module.width)
    return {POSITIONS: positions[None]} | {INDEX.format(block): index for block in range(module.depth)}


def _sizes(module: Any) -> dict[str, int]:
    """The sizes of the table's axes for a module of ours."""
    return CONSTANTS | {
        "l": module.depth,
        "d": module.width,
        "h": module.heads,
        "k": module.width // module.heads,
        "m": (2 * module.window - 1) ** 2,
        "f": int(module.width * module.mlp_ratio),
        "p": module.patch,
        "c": module.channels,
        "o": module.channels * (1 + module.learn_sigma),
        "v": module.num_classes + module.null_class,
    }


def _arguments(sizes: mapping.Sizes, config: dict[str, Any]) -> dict[str, Any]:
    """Constructor arguments of our module out of the sizes; what `config` gives must agree with them."""
    depth, width, heads, hidden, rows = (sizes[axis] for axis in "ldhfv")
    window = _window(sizes["m"])
    told: dict[str, Any] = {"patch_size": sizes["p"], "in_channels": sizes["c"], "hidden_size": width, "depth": depth}
    told |= {"input_size": sizes["p"] * window, "num_heads": heads, "learn_sigma": sizes["o"] == 2 * sizes["c"]}
    told["num_classes"] = rows - mapping.has_null(rows, config)
    if not (ratio := config.get("mlp_ratio")) or int(width * ratio) != hidden:
        told["mlp_ratio"] = mapping.ratio(hidden, width)
    mapping.check_agreement("diffit", told, config)
    if told["num_classes"] < 1:
        raise UserError(f"diffit: a label table of {rows} rows has no class beside the null class")
    return {
        "patch": sizes["p"],
        "depth": depth,
        "width": width,
        "heads": heads,
        "window": window,
        "mlp_ratio": told.get("mlp_ratio", ratio),
        "channels": sizes["c"],
        "num_classes": told["num_classes"],
        "null_class": mapping.has_null(rows, config),
        "learn_sigma": told["learn_sigma"],
    }


def _window(offsets: int) -> int:
    """Tokens along a side of a square in which there are so many different offsets."""
    across = math.isqrt(offsets)
    if across**2 != offsets or across % 2 == 0:
        raise UserError(
            f"diffit: relative_position_bias_table has {offsets} rows, expected (2 n - 1)^2 for n x n patches"
        )
    return (across + 1) // 2


def _check_computed(keys: Any, state_dict: Mapping[str, Any], module: Any) -> None:
    """What we compute and the file stores must be the same."""
    computed = _computed(module)
    for key in sorted(keys):
        if key not in computed:
            raise UserError(
                f"these are not the weights of a diffit model: unexpected key {key} at depth {module.depth}"
            )
        stored, expected = np.asarray(state_dict[key], np.float64), computed[key]
        if stored.shape != expected.shape:
            raise UserError(f"diffit: {key} is {stored.shape}, expected {expected.shape}")
        difference = np.abs(stored - expected).max()
        if not difference <= (1e-5 if key == POSITIONS else 0):
            raise UserError(
                f"diffit: {key} differs from the fixed table by up to {difference:.3g}; "
                "only checkpoints with that table are read"
            )
