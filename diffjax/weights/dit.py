"""DiT checkpoints of facebookresearch/DiT (and its key names wherever they were reused)."""

import math
from collections.abc import Mapping
from typing import Any

import flax.linen as nn
import numpy as np

from diffjax.errors import UserError
from diffjax.models import create
from diffjax.models.dit import SIZES
from diffjax.models.layers import sincos_positions
from diffjax.weights import mapping

# d width, h heads, k per-head width, f mlp width, c channels, o output channels, p patch, v label rows, w time features
EMBEDDINGS: mapping.Table = (
    ("x_embedder.proj.weight", "patch_embed/kernel", "d c p1 p2 -> (p1 p2 c) d"),
    ("x_embedder.proj.bias", "patch_embed/bias", "d -> d"),
    ("t_embedder.mlp.0.weight", "time_embed/fc1/kernel", "d w -> w d"),
    ("t_embedder.mlp.0.bias", "time_embed/fc1/bias", "d -> d"),
    ("t_embedder.mlp.2.weight", "time_embed/fc2/kernel", "d2 d -> d d2"),
    ("t_embedder.mlp.2.bias", "time_embed/fc2/bias", "d -> d"),
    ("y_embedder.embedding_table.weight", "label_embed/embedding", "v d -> v d"),
)
TRANSFORMER: mapping.Table = (
    ("blocks.{l}.attn.qkv.weight", "blocks/attention/qkv/kernel", "(three h k) d -> d h three k"),
    ("blocks.{l}.attn.qkv.bias", "blocks/attention/qkv/bias", "(three h k) -> h three k"),
    ("blocks.{l}.attn.proj.weight", "blocks/attention/out/kernel", "d (h k) -> h k d"),
    ("blocks.{l}.attn.proj.bias", "blocks/attention/out/bias", "d -> d"),
    ("blocks.{l}.mlp.fc1.weight", "blocks/mlp/fc1/kernel", "f d -> d f"),
    ("blocks.{l}.mlp.fc1.bias", "blocks/mlp/fc1/bias", "f -> f"),
    ("blocks.{l}.mlp.fc2.weight", "blocks/mlp/fc2/kernel", "d f -> f d"),
    ("blocks.{l}.mlp.fc2.bias", "blocks/mlp/fc2/bias", "d -> d"),
)
TABLE: mapping.Table = (
    *EMBEDDINGS,
    *TRANSFORMER,
    ("blocks.{l}.adaLN_modulation.1.weight", "blocks/modulation/kernel", "(six d2) d -> d (six d2)"),
    ("blocks.{l}.adaLN_modulation.1.bias", "blocks/modulation/bias", "(six d) -> (six d)"),
    ("final_layer.adaLN_modulation.1.weight", "final/modulation/kernel", "(two d2) d -> d (two d2)"),
    ("final_layer.adaLN_modulation.1.bias", "final/modulation/bias", "(two d) -> (two d)"),
    ("final_layer.linear.weight", "final/linear/kernel", "(p1 p2 o) d -> d (p1 p2 o)"),
    ("final_layer.linear.bias", "final/linear/bias", "(p1 p2 o) -> (p1 p2 o)"),
)
SIZED = True  # files hold a table of positions
CONSTANTS = {"two": 2, "three": 3, "six": 6, "w": 256}

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

    The heads of a width cannot be read off the shapes: they are looked up by (depth, width) among the published
    sizes, or must be given as `num_heads`.
    """
    mapping.check_names("dit", config, ARGUMENTS)
    weights = {key: value for key, value in state_dict.items() if key != "pos_embed"}
    sizes = mapping.infer(TABLE, weights, CONSTANTS)
    mapping.check(TABLE, sizes, weights, "dit")
    module = create("DiT", **_arguments(sizes, config))
    params = mapping.to_params(TABLE, _sizes(module), weights, "dit")
    _check_positions(state_dict.get("pos_embed"), module, config.get("input_size"))
    return module, params


def to_reference(module: nn.Module, params: Mapping[str, Any]) -> dict[str, np.ndarray]:
    """The reference's state_dict, without what `fixed` gives."""
    return mapping.to_state_dict(TABLE, _sizes(module), params)


def fixed(module: Any, size: int) -> dict[str, np.ndarray]:
    """The reference's table of positions [1, tokens, width] for inputs of `size`."""
    side, rest = divmod(size, module.patch)
    if rest:
        raise UserError(f"dit: inputs of side {size}; valid: multiples of the patch, {module.patch}")
    return {"pos_embed": sincos_positions(side, side, module.width)[None]}


def _sizes(module: Any) -> dict[str, int]:
    """The sizes of the table's axes for a module of ours."""
    return CONSTANTS | axes(module)


def axes(module: Any) -> dict[str, int]:
    """The sizes of the axes of EMBEDDINGS, TRANSFORMER and the last linear map for a module of ours."""
    return {
        "l": module.depth,
        "d": module.width,
        "h": module.heads,
        "k": module.width // module.heads,
        "f": int(module.width * module.mlp_ratio),
        "p": module.patch,
        "c": module.channels,
        "o": module.channels * (1 + module.learn_sigma),
        "v": module.num_classes + module.null_class,
    }


def _arguments(sizes: mapping.Sizes, config: dict[str, Any]) -> dict[str, Any]:
    return arguments("dit", sizes, config, {}) | {"heads": _heads(sizes["l"], sizes["d"], config)}


def arguments(family: str, sizes: mapping.Sizes, config: dict[str, Any], inferred: dict[str, Any]) -> dict[str, Any]:
    """Constructor arguments of our module, all but the heads, out of the sizes; `config` must agree with them.

    inferred: further reference arguments, inferred from the sizes.
    """
    depth, width, hidden, rows = (sizes[axis] for axis in "ldfv")
    null = mapping.has_null(rows, config)
    shape = {"patch_size": sizes["p"], "in_channels": sizes["c"], "hidden_size": width, "depth": depth}
    inferred = inferred | shape | {"learn_sigma": sizes["o"] == 2 * sizes["c"], "num_classes": rows - null}
    if not (ratio := config.get("mlp_ratio")) or int(width * ratio) != hidden:
        inferred["mlp_ratio"] = ratio = mapping.ratio(hidden, width)
    mapping.check_agreement(family, inferred, config)
    if rows == null:
        raise UserError(f"{family}: a label table of {rows} rows has no class beside the null class")
    return {
        "patch": sizes["p"],
        "depth": depth,
        "width": width,
        "mlp_ratio": ratio,
        "channels": sizes["c"],
        "num_classes": rows - null,
        "null_class": null,
        "learn_sigma": inferred["learn_sigma"],
    }


def _heads(depth: int, width: int, config: dict[str, Any]) -> int:
    published = {(d, w): heads for d, w, heads in SIZES.values()}
    heads = config.get("num_heads", published.get((depth, width)))
    if heads is None:
        raise UserError(
            f"dit: depth {depth}, width {width} is no published size; give num_heads=N "
            "(convert: --arguments=num_heads=N)"
        )
    return heads


def _check_positions(stored: Any, module: Any, input_size: int | None) -> None:
    """Our positions are computed, the reference's stored: they must be the same table (and of the size given)."""
    if stored is None:
        return
    stored = np.asarray(stored)
    tokens = stored.shape[1] if stored.ndim == 3 else 0
    side = math.isqrt(tokens) if input_size is None else input_size // module.patch
    if stored.shape != (1, side**2, module.width) or side == 0:
        raise UserError(
            f"dit: pos_embed is {stored.shape}, expected (1, (input_size / patch_size)^2, {module.width})"
            + (f" = (1, {side**2}, {module.width})" if input_size else "")
        )
    mapping.check_fixed("dit", "pos_embed", stored[0], sincos_positions(side, side, module.width))
