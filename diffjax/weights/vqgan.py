"""The VQGAN checkpoint of LTH14/mage, `vqgan_jax_strongaug.ckpt`, and the same inside checkpoints of DiGIT."""

import re
from collections.abc import Mapping, Sequence
from typing import Any

import flax.linen as nn
import numpy as np

from diffjax.errors import UserError
from diffjax.frozen import create
from diffjax.weights import convolutions, mapping
from diffjax.weights.convolutions import KERNEL1, KERNEL3, Rows, axis, conv, kernel, norm

# w width, wa .. widths of the levels, z features, v entries of the codebook, c channels
CONSTANTS = convolutions.CONSTANTS | {"c": 3}

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
    widths = [sizes[axis(level)] for level in range(levels)]
    if any(width % sizes["w"] for width in widths):
        raise UserError(f"vqgan: levels are {widths} channels wide; valid: multiples of the first map's {sizes['w']}")
    multipliers = [width // sizes["w"] for width in widths]
    inferred = {"z_channels": sizes["z"], "in_channels": 3, "out_ch": 3, "ch": sizes["w"], "ch_mult": multipliers}
    inferred |= {"num_res_blocks": depth, "double_z": False}
    given = halves | ({"ch_mult": list(halves["ch_mult"])} if "ch_mult" in halves else {})
    mapping.check_agreement("vqgan", inferred, given)
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
    """How many indices the keys have at a position; 1 where there are no keys, which are then reported as missing."""
    return len({match[1] for key in weights if (match := re.match(pattern, key))}) or 1


def _sizes(module: Any) -> dict[str, int]:
    """The sizes of the table's axes for a module of ours."""
    widths = {axis(level): width for level, width in enumerate(module.widths)}
    return CONSTANTS | widths | {"w": module.width, "z": module.features, "v": module.vocabulary}


def _table(levels: int, depth: int, sizes: mapping.Sizes) -> mapping.Table:
    """The rows of a network of these sizes; without sizes no row is of a shortcut, which would tell nothing new."""
    names = [axis(level) for level in range(levels)]
    return (
        ("quantize.embedding.weight", "codebook", "v z -> v z"),
        *kernel("encoder.conv_in", "encoder/conv_in", "c", "w"),
        *_half("encoder", "down", names, ["w", *names], depth, sizes),
        *_end("encoder", names[-1], "z", KERNEL1),
        *conv("decoder.conv_in", "decoder/conv_in", "z", names[-1]),
        *_half("decoder", "up", names, [*names[1:], names[-1]], depth, sizes),
        *_end("decoder", names[0], "c", KERNEL3),
    )


def _half(
    half: str, levels: str, names: Sequence[str], before: Sequence[str], depth: int, sizes: mapping.Sizes
) -> Rows:
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
            yield from conv(f"{theirs}.upsample.conv", f"{ours}_up", name, name)


def _block(theirs: str, ours: str, inner: str, outer: str, changed: bool) -> Rows:
    for number, width in ((1, inner), (2, outer)):
        yield from norm(f"{theirs}.norm{number}", f"{ours}/norm{number}", width)
        yield from kernel(f"{theirs}.conv{number}", f"{ours}/conv{number}", width, outer)
    if changed:
        yield from kernel(f"{theirs}.nin_shortcut", f"{ours}/shortcut", outer, outer, KERNEL1)


def _end(half: str, inner: str, outer: str, taps: str) -> Rows:
    yield from norm(f"{half}.norm_out", f"{half}/norm_out", inner)
    yield from conv(f"{half}.conv_out", f"{half}/conv_out", inner, outer, taps)
