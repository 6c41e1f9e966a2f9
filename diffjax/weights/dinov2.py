"""DINOv2 checkpoints of facebookresearch/dinov2, and the encoder inside checkpoints of DiGIT.

`dinov2_vits14_reg4_pretrain.pth`, `..._vitb14_...`, `..._vitl14_...`, `..._vitg14_...`, with registers; without them
`dinov2_vits14_pretrain.pth` and so on.
"""

import math
from collections.abc import Mapping
from typing import Any

import flax.linen as nn
import numpy as np

from diffjax.errors import UserError
from diffjax.frozen import create
from diffjax.frozen.dinov2 import EPSILON, OFFSET, SIZES
from diffjax.weights import mapping

# d width, h heads, k per-head width, f mlp width, c channels, p patch, n rows of positions, r registers
TABLE: mapping.Table = (
    ("cls_token", "cls_token", "one one2 d -> (one one2) d"),
    ("mask_token", "mask_token", "one d -> (one d)"),
    ("pos_embed", "positions", "one n d -> (one n) d"),
    ("patch_embed.proj.weight", "patch_embed/kernel", "d c p1 p2 -> (p1 p2 c) d"),
    ("patch_embed.proj.bias", "patch_embed/bias", "d -> d"),
    ("blocks.{l}.norm1.weight", "blocks/attention_norm/scale", "d -> d"),
    ("blocks.{l}.norm1.bias", "blocks/attention_norm/bias", "d -> d"),
    ("blocks.{l}.attn.qkv.weight", "blocks/attention/qkv/kernel", "(three h k) d -> d h three k"),
    ("blocks.{l}.attn.qkv.bias", "blocks/attention/qkv/bias", "(three h k) -> h three k"),
    ("blocks.{l}.attn.proj.weight", "blocks/attention/out/kernel", "d (h k) -> h k d"),
    ("blocks.{l}.attn.proj.bias", "blocks/attention/out/bias", "d -> d"),
    ("blocks.{l}.ls1.gamma", "blocks/attention_scale", "d -> d"),
    ("blocks.{l}.norm2.weight", "blocks/mlp_norm/scale", "d -> d"),
    ("blocks.{l}.norm2.bias", "blocks/mlp_norm/bias", "d -> d"),
    ("blocks.{l}.ls2.gamma", "blocks/mlp_scale", "d -> d"),
    ("norm.weight", "norm/scale", "d -> d"),
    ("norm.bias", "norm/bias", "d -> d"),
)
REGISTERS: mapping.Table = (("register_tokens", "registers", "one r d -> (one r) d"),)
MLP: mapping.Table = (
    ("blocks.{l}.mlp.fc1.weight", "blocks/mlp/fc1/kernel", "f d -> d f"),
    ("blocks.{l}.mlp.fc1.bias", "blocks/mlp/fc1/bias", "f -> f"),
    ("blocks.{l}.mlp.fc2.weight", "blocks/mlp/fc2/kernel", "d f -> f d"),
    ("blocks.{l}.mlp.fc2.bias", "blocks/mlp/fc2/bias", "d -> d"),
)
GATED: mapping.Table = (
    ("blocks.{l}.mlp.w12.weight", "blocks/mlp/fc1/kernel", "(two f) d -> d (two f)"),
    ("blocks.{l}.mlp.w12.bias", "blocks/mlp/fc1/bias", "(two f) -> (two f)"),
    ("blocks.{l}.mlp.w3.weight", "blocks/mlp/fc2/kernel", "d f -> f d"),
    ("blocks.{l}.mlp.w3.bias", "blocks/mlp/fc2/bias", "d -> d"),
)
CONSTANTS = {"one": 1, "two": 2, "three": 3, "c": 3}

PREFIX = "pretrained_encoder."  # in a checkpoint of DiGIT, beside
OTHERS = ("decoder.", "centroids", "centroid_norm", "vqgan.")

# What a configuration says that is the same in every model, and what it says that is not of the network.
FIXED = {"interpolate_antialias": False, "interpolate_offset": OFFSET, "layer_norm_eps": EPSILON}
ELSEWHERE = ("layer", "normalisation", "notes")
ARGUMENTS = ("patch_size", "embed_dim", "depth", "num_heads", "num_register_tokens", "mlp_ratio", "pos_embed_tokens")


def from_reference(state_dict: Mapping[str, Any], **config: Any) -> tuple[nn.Module, dict[str, Any]]:
    """The module and its parameters; `config` as in `diffjax.weights.from_reference`.

    The heads of a width cannot be read off the shapes: they are those of the published size of that depth and width,
    or must be given as `num_heads`.
    """
    mapping.check_names("dinov2", config, (*ARGUMENTS, *FIXED, *ELSEWHERE))
    weights = mapping.part(state_dict, PREFIX, OTHERS)
    gated = any(".mlp.w12." in key for key in weights)
    table = _table(gated, "register_tokens" in weights)
    sizes = mapping.infer(table, weights, CONSTANTS)
    mapping.check(table, sizes, weights, "dinov2")
    module = create("DINOv2", **_arguments(sizes, gated, config))
    return module, mapping.to_params(table, _sizes(module), weights, "dinov2")


def to_reference(module: nn.Module, params: Mapping[str, Any]) -> dict[str, np.ndarray]:
    """The reference's state_dict."""
    model: Any = module
    return mapping.to_state_dict(_table(model.gated, model.registers > 0), _sizes(model), params)


def _table(gated: bool, registers: bool) -> mapping.Table:
    return (*TABLE, *(REGISTERS if registers else ()), *(GATED if gated else MLP))


def _sizes(module: Any) -> dict[str, int]:
    """The sizes of the table's axes for a module of ours."""
    return CONSTANTS | {
        "l": module.depth,
        "d": module.width,
        "h": module.heads,
        "k": module.width // module.heads,
        "f": module.hidden,
        "p": module.patch,
        "r": module.registers,
        "n": 1 + module.grid**2,
    }


def _arguments(sizes: mapping.Sizes, gated: bool, config: dict[str, Any]) -> dict[str, Any]:
    """Constructor arguments of our module out of the sizes; what `config` gives must agree with them."""
    depth, width, hidden, rows = (sizes[axis] for axis in "ldfn")
    inferred: dict[str, float] = {
        "patch_size": sizes["p"],
        "embed_dim": width,
        "depth": depth,
        "num_register_tokens": sizes.get("r", 0),
        "pos_embed_tokens": rows,
    }
    if _hidden(width, config.get("mlp_ratio", 4), gated) != hidden:
        inferred["mlp_ratio"] = hidden * (1.5 if gated else 1) / width
    mapping.check_agreement("dinov2", inferred, config)
    for name, value in FIXED.items():
        if config.get(name, value) != value:
            raise UserError(f"dinov2: {name} = {config[name]} is not supported; valid: {value}")
    grid = math.isqrt(rows - 1)
    if 1 + grid**2 != rows or not grid:
        raise UserError(f"dinov2: pos_embed has {rows} rows; valid: one and a square, such as 1370 = 1 + 37 x 37")
    return {
        "depth": depth,
        "width": width,
        "heads": _heads(depth, width, config),
        "hidden": hidden,
        "gated": gated,
        "patch": sizes["p"],
        "registers": sizes.get("r", 0),
        "grid": grid,
    }


def _hidden(width: int, ratio: float, gated: bool) -> int:
    """The width that the reference gives a feed-forward network: gated, two thirds of it, in multiples of 8."""
    hidden = int(width * ratio)
    return (int(hidden * 2 / 3) + 7) // 8 * 8 if gated else hidden


def _heads(depth: int, width: int, config: dict[str, Any]) -> int:
    published = {(size["depth"], size["width"]): size["heads"] for size in SIZES.values()}
    heads = config.get("num_heads", published.get((depth, width)))
    if heads is None:
        raise UserError(
            f"dinov2: depth {depth}, width {width} is no published size; give num_heads=N "
            "(convert: --arguments=num_heads=N)"
        )
    return heads
