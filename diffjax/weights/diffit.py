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
from diffjax.weights.dit import ARGUMENTS, EMBEDDINGS, TRANSFORMER, arguments, axes

# The axes of DiT's rows, and m offsets between tokens.
TABLE: mapping.Table = (
    *EMBEDDINGS,
    *TRANSFORMER,
    ("blocks.{l}.attn.relative_position_bias_table", "blocks/attention/relative_bias", "m h -> m h"),
    ("blocks.{l}.attn.qkv_temb.weight", "blocks/attention/qkv_time/kernel", "(three h k) d -> d h three k"),
    ("blocks.{l}.attn.qkv_temb.bias", "blocks/attention/qkv_time/bias", "(three h k) -> h three k"),
    ("final_layer.linear.weight", "final/kernel", "(p1 p2 o) d -> d (p1 p2 o)"),
    ("final_layer.linear.bias", "final/bias", "(p1 p2 o) -> (p1 p2 o)"),
)
CONSTANTS = {"three": 3, "w": 256}

# what the files hold beside the parameters, and we compute
POSITIONS = "pos_embed"
INDEX = "blocks.{}.attn.relative_position_index"


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
    return CONSTANTS | axes(module) | {"m": (2 * module.window - 1) ** 2}


def _arguments(sizes: mapping.Sizes, config: dict[str, Any]) -> dict[str, Any]:
    window, heads = _window(sizes["m"]), sizes["h"]
    inferred = {"input_size": sizes["p"] * window, "num_heads": heads}
    return arguments("diffit", sizes, config, inferred) | {"heads": heads, "window": window}


def _window(offsets: int) -> int:
    """Tokens along a side of a square in which there are so many different offsets."""
    across = math.isqrt(offsets)
    if across**2 != offsets or across % 2 == 0:
        raise UserError(
            f"diffit: relative_position_bias_table has {offsets} rows, expected (2 n - 1)^2 for n x n patches"
        )
    return (across + 1) // 2


def _check_computed(keys: Any, state_dict: Mapping[str, Any], module: Any) -> None:
    """Check that stored fixed tables equal the computed ones."""
    computed = _computed(module)
    for key in sorted(keys):
        if key not in computed:
            raise UserError(
                f"these are not the weights of a diffit model: unexpected key {key} at depth {module.depth}"
            )
        stored, expected = np.asarray(state_dict[key]), computed[key]
        if stored.shape != expected.shape:
            raise UserError(f"diffit: {key} is {stored.shape}, expected {expected.shape}")
        mapping.check_fixed("diffit", key, stored, expected, exact=key != POSITIONS)
