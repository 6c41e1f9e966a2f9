"""The 2015 Inception-v3 in the public port of mseitzer/pytorch-fid, `pt_inception-2015-12-05-6726825d.pth`."""

from collections.abc import Iterator, Mapping
from typing import Any

import flax.linen as nn
import numpy as np

from diffjax.frozen import create
from diffjax.frozen.inception import BLOCKS, FEATURES, MIDDLE, OUTPUTS, STEM, Convolution
from diffjax.weights import mapping
from diffjax.weights.convolutions import Rows, axis_of, batch_norm, kernel, without_counters


def from_reference(state_dict: Mapping[str, Any], **config: Any) -> tuple[nn.Module, dict[str, Any]]:
    """The module and its parameters; there are no arguments. `module.clone(inputs=...)` feeds it otherwise."""
    mapping.check_names("inception", config, ())
    weights = without_counters(state_dict)
    return create("Inception"), mapping.to_params(TABLE, SIZES, weights, "inception")


def to_reference(module: nn.Module, params: Mapping[str, Any]) -> dict[str, np.ndarray]:
    """The port's state_dict."""
    return mapping.to_state_dict(TABLE, SIZES, params)


def _convolutions() -> Iterator[tuple[str, Convolution, int]]:
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


def _rows() -> Rows:
    for name, layer, inner in _convolutions():
        ours = name.replace(".", "/")
        outer, (rows, columns) = axis_of(layer.features), map(axis_of, layer.taps)
        yield from kernel(f"{name}.conv", f"{ours}/conv", axis_of(inner), outer, f"{rows}3 {columns}4")
        yield from batch_norm(f"{name}.bn", ours, outer)
    yield "fc.weight", "classifier/kernel", "outputs features -> features outputs"
    yield "fc.bias", "classifier_bias", "outputs -> outputs"


TABLE = tuple(_rows())
SIZES = {"outputs": OUTPUTS, "features": FEATURES} | {
    axis_of(size): size for _, layer, inner in _convolutions() for size in (inner, layer.features, *layer.taps)
}
