"""The VQGAN checkpoint of LTH14/mage, `vqgan_jax_strongaug.ckpt`, and the same inside checkpoints of DiGIT."""

import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import flax.linen as nn
import numpy as np

from diffjax.errors import UserError
from diffjax.frozen import create
from diffjax.weights import mapping

# w width, wa .. widths of the levels, z features, v entries of the codebook, c channels
CONSTANTS = {"one": 1, "three": 3, "c": 3}
KERNEL3, KERNEL1 = "three three2", "one one2"

PREFIX = "vqgan."  # in a checkpoint of DiGIT, beside
OTHERS = ("decoder.", "centroids", "centroid_norm", "pretrained_encoder.")

# the reference's constructor arguments, and those of its two halves
ARGUMENTS = ("ddconfig", "n_embed", "embed_dim", "note")
HALVES = (
    "double_z",
    "z_channels",
    "resolution",
    "in_channels",
    "out_ch",
    "ch",
    "ch_mult",
    "num_res_blocks",
    "attn_resolutions",
    "dropout",
)


def from_reference(state_dict: Mapping[str, Any], **config: Any) -> tuple[nn.Module, dict[str, Any]]:
    """The module and its parameters; `config` as in `diffjax.weights.from_reference`.

    The shapes tell everything. Of `ddconfig`, `resolution`, `attn_resolutions` and `dropout` play no part: the network
    takes images of any size, has no attention, and is not trained.
    """
    halves = config.get("ddconfig", {})
    mapping.check_names("vqgan", config, ARGUMENTS)
    mapping.check_names("vqgan ddconfig", halves, HALVES)
    weights = mapping.part(state_dict, PREFIX, OTHERS)
    levels, depth = _count(weights, r"encoder\.down\.(\d+)\."), _count(weights, r"encoder\.down\.0\.block\.(\d+)\.")
    sizes = mapping.infer(_table(levels, depth, {}), weights, CONSTANTS)
    table = _table(levels, depth, sizes)
    mapping.check(table, sizes, weights, "vqgan")
    widths = [sizes[_axis(level)] for level in range(levels)]
    if any(width % sizes["w"] for width in widths):
        raise UserError(f"vqgan: levels are {widths} channels wide; valid: multiples of the first map's {sizes['w']}")
    multipliers = [width // sizes["w"] for width in widths]
    told = {"z_channels": sizes["z"], "in_channels": 3, "out_ch": 3, "ch": sizes["w"], "ch_mult": multipliers}
    told |= {"num_res_blocks": depth, "double_z": False}
    given = halves | ({"ch_mult": list(halves["ch_mult"])} if "ch_mult" in halves else {})
    mapping.check_agreement("vqgan", told, given)
    mapping.check_agreement("vqgan", {"n_embed": sizes["v"], "embed_dim": sizes["z"]}, config)
    module = create(
        "VQGAN",
        vocabulary=sizes["v"],
        features=sizes["z"],
        width=sizes["w"],
        multipliers=tuple(multipliers),
        depth=depth,
    )
    return module, mapping.to_params(table, sizes, weights, "vqgan")


def to_reference(module: nn.Module, params: Mapping[str, Any]) -> dict[str, np.ndarray]:
    """The reference's state_dict."""
    model: Any = module
    sizes = _sizes(model)
    return mapping.to_state_dict(_table(len(model.widths), model.depth, sizes), sizes, params)


def _count(weights: Mapping[str, Any], pattern: str) -> int:
    """How many numbers the keys have at a place; of none, one, whose keys are then missing."""
    return len({match[1] for key in weights if (match := re.match(pattern, key))}) or 1


def _axis(level: int) -> str:
    """The table's name for the width of a level."""
    return f"w{chr(ord('a') + level)}"


def _sizes(module: Any) -> dict[str, int]:
    """The sizes of the table's axes for a module of ours."""
    widths = {_axis(level): width for level, width in enumerate(module.widths)}
    return CONSTANTS | widths | {"w": module.width, "z": module.features, "v": module.vocabulary}


def _table(levels: int, depth: int, sizes: mapping.Sizes) -> mapping.Table:
    """The rows of a network of these sizes; without sizes no row is of a shortcut, which would tell nothing new."""
    names = [_axis(level) for level in range(levels)]
    return (
        ("quantize.embedding.weight", "codebook", "v z -> v z"),
        ("encoder.conv_in.weight", "encoder/conv_in/kernel", _conv("c", "w")),
        *_half("encoder", "down", names, ["w", *names], depth, sizes),
        *_end("encoder", names[-1], "z", KERNEL1),
        ("decoder.conv_in.weight", "decoder/conv_in/kernel", _conv("z", names[-1])),
        ("decoder.conv_in.bias", "decoder/conv_in/bias", f"{names[-1]} -> {names[-1]}"),
        *_half("decoder", "up", names, [*names[1:], names[-1]], depth, sizes),
        *_end("decoder", names[0], "c", KERNEL3),
    )


def _half(
    half: str, levels: str, names: Sequence[str], before: Sequence[str], depth: int, sizes: mapping.Sizes
) -> Iterator[tuple[str, str, str]]:
    """The blocks of the encoder or decoder; names, before: the axes of its levels' maps, and of those they take."""
    for block in (1, 2):
        yield from _block(f"{half}.mid.block_{block}", f"{half}/middle_{block}", names[-1], names[-1], False)
    for level, name in enumerate(names):
        theirs, ours = f"{half}.{levels}.{level}", f"{half}/level_{level}"
        for block in range(depth):
            inner = before[level] if block == 0 else name
            changed = sizes.get(inner) != sizes.get(name)
            yield from _block(f"{theirs}.block.{block}", f"{ours}_block_{block}", inner, name, changed)
        if half == "decoder" and level:
            yield f"{theirs}.upsample.conv.weight", f"{ours}_up/kernel", _conv(name, name)
            yield f"{theirs}.upsample.conv.bias", f"{ours}_up/bias", f"{name} -> {name}"


def _block(theirs: str, ours: str, inner: str, outer: str, changed: bool) -> Iterator[tuple[str, str, str]]:
    for number, width in ((1, inner), (2, outer)):
        yield from _norm(f"{theirs}.norm{number}", f"{ours}/norm{number}", width)
        yield f"{theirs}.conv{number}.weight", f"{ours}/conv{number}/kernel", _conv(width, outer)
    if changed:
        yield f"{theirs}.nin_shortcut.weight", f"{ours}/shortcut/kernel", _conv(outer, outer, KERNEL1)


def _end(half: str, inner: str, outer: str, kernel: str) -> Iterator[tuple[str, str, str]]:
    yield from _norm(f"{half}.norm_out", f"{half}/norm_out", inner)
    yield f"{half}.conv_out.weight", f"{half}/conv_out/kernel", _conv(inner, outer, kernel)
    yield f"{half}.conv_out.bias", f"{half}/conv_out/bias", f"{outer} -> {outer}"


def _norm(theirs: str, ours: str, width: str) -> Iterator[tuple[str, str, str]]:
    yield f"{theirs}.weight", f"{ours}/scale", f"{width} -> {width}"
    yield f"{theirs}.bias", f"{ours}/bias", f"{width} -> {width}"


def _conv(inner: str, outer: str, kernel: str = KERNEL3) -> str:
    """The pattern of a convolution's kernel from `inner` to `outer` channels."""
    return f"{outer} {inner}2 {kernel} -> {kernel} {inner}2 {outer}"
