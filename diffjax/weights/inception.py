"""The 2015 Inception-v3 in the public port of mseitzer/pytorch-fid, `pt_inception-2015-12-05-6726825d.pth`."""

from collections.abc import Iterator, Mapping
from typing import Any

import flax.linen as nn
import numpy as np

from diffjax.frozen import create
from diffjax.frozen.inception import BLOCKS, FEATURES, MIDDLE, OUTPUTS, STEM, Layer
from diffjax.weights import mapping
from diffjax.weights.convolutions import axis_of, batch_norm, without_counters


def from_reference(state_dict: Mapping[str, Any], **config: Any) -> tuple[nn.Module, dict[str, Any]]:
    """The module and its parameters; config: `inputs` of `frozen.inception.Inception`."""
    mapping.check_names("inception", config, ("inputs",))
    weights = without_counters(state_dict)
    return create("Inception", **config), mapping.to_params(TABLE, SIZES, weights, "inception")


def to_reference(module: nn.Module, params: Mapping[str, Any]) -> dict[str, np.ndarray]:
    """The port's state_dict."""
    return mapping.to_state_dict(TABLE, SIZES, params)


def _convolutions() -> Iterator[tuple[str, Layer, int]]:
    """(name in the port, convolution, channels that it takes), in the order in which they run."""
    width = 3
    for layer in (*STEM, *MIDDLE):
        yield layer.name, layer, width
        width = layer.features
    for block, branches in BLOCKS.items():
        outputs = 0
        for branch in branches:
            inner = width
            for layer in branch.layers:
                yield f"{block}.{layer.name}", layer, inner
                inner = layer.features
            for layer in branch.fork:
                yield f"{block}.{layer.name}", layer, inner
            outputs += sum(layer.features for layer in branch.fork) or inner
        width = outputs


def _rows() -> Iterator[tuple[str, str, str]]:
    for name, layer, inner in _convolutions():
        ours = name.replace(".", "/")
        outer, (rows, columns) = axis_of(layer.features), map(axis_of, layer.taps)
        pattern = f"{outer} {axis_of(inner)}2 {rows}3 {columns}4 -> {rows}3 {columns}4 {axis_of(inner)}2 {outer}"
        yield f"{name}.conv.weight", f"{ours}/conv/kernel", pattern
        yield from batch_norm(f"{name}.bn", ours, outer)
    yield "fc.weight", "kernel", "outputs features -> features outputs"
    yield "fc.bias", "bias", "outputs -> outputs"


TABLE = tuple(_rows())
SIZES = {"outputs": OUTPUTS, "features": FEATURES} | {
    axis_of(size): size for _, layer, inner in _convolutions() for size in (inner, layer.features, *layer.taps)
}
