"""The 2015 Inception-v3 in three public forms.

The port of mseitzer/pytorch-fid, `pt_inception-2015-12-05-6726825d.pth`; the graph of TensorFlow that it was made from,
`classify_image_graph_def.pb`; the nested table of matthias-wright/jax-fid, `inception_v3_weights_fid.pickle`.
"""

from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

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
    return create("Inception"), mapping.to_params(_table(weights), SIZES, weights, "inception")


def to_reference(module: nn.Module, params: Mapping[str, Any]) -> dict[str, np.ndarray]:
    """The port's state_dict."""
    return mapping.to_state_dict(TABLE, SIZES, params)


def _table(weights: Mapping[str, Any]) -> mapping.Table:
    """That of the form whose names the weights have."""
    if any("/" in key for key in weights):
        return GRAPH
    return NESTED if any(key.endswith(".kernel") for key in weights) else TABLE


class _Placed(NamedTuple):
    """A convolution of the network.

    Attributes:
        name: in the port, with "." between block and layer.
        node: in the graph.
        inner: channels that it takes.
    """

    name: str
    node: str
    layer: Convolution
    inner: int


def _convolutions() -> Iterator[_Placed]:
    """In the order in which they run."""
    width = 3
    for number, layer in enumerate((*STEM, *MIDDLE)):
        yield _Placed(layer.name, _numbered("conv", number), layer, width)
        width = layer.features
    for number, (block, branches) in enumerate(BLOCKS.items()):
        outputs = towers = 0
        for branch in branches:
            place, inner = _numbered("mixed", number), width
            if branch.pool or branch.fork or len(branch.layers) > 1:  # a single convolution stands in no tower
                place, towers = f"{place}/{_numbered('tower', towers)}", towers + 1
            for index, layer in enumerate(branch.layers):
                yield _Placed(f"{block}.{layer.name}", f"{place}/{_numbered('conv', index)}", layer, inner)
                inner = layer.features
            for index, layer in enumerate(branch.fork):
                yield _Placed(f"{block}.{layer.name}", f"{place}/mixed/{_numbered('conv', index)}", layer, inner)
            outputs += sum(layer.features for layer in branch.fork) or inner
        width = outputs


def _numbered(name: str, number: int) -> str:
    """TensorFlow's names of things of one kind: conv, conv_1, ..."""
    return f"{name}_{number}" if number else name


def _ours(placed: _Placed) -> str:
    return placed.name.replace(".", "/")


def _rows() -> Rows:
    """Of the port."""
    for placed in _convolutions():
        outer, (rows, columns) = axis_of(placed.layer.features), map(axis_of, placed.layer.taps)
        taps = f"{rows}3 {columns}4"
        yield from kernel(f"{placed.name}.conv", f"{_ours(placed)}/conv", axis_of(placed.inner), outer, taps)
        yield from batch_norm(f"{placed.name}.bn", _ours(placed), outer)
    yield "fc.weight", "classifier/kernel", "outputs features -> features outputs"
    yield "fc.bias", "classifier_bias", "outputs -> outputs"


def _same_layout(name: Callable[[_Placed], str], leaves: tuple[str, ...], classifier: tuple[str, str]) -> Rows:
    """Of a form whose arrays lie as ours do.

    Args:
        name: that of a convolution.
        leaves: what follows it for the kernel, scale, bias, mean and variance.
        classifier: the names of its weights and of its bias.
    """
    for placed in _convolutions():
        outer, (rows, columns) = axis_of(placed.layer.features), map(axis_of, placed.layer.taps)
        axes = f"{rows}3 {columns}4 {axis_of(placed.inner)}2 {outer}"
        for leaf, ours in zip(leaves, ("conv/kernel", "scale", "bias", "mean", "variance")):
            pattern = axes if ours == "conv/kernel" else outer
            yield name(placed) + leaf, f"{_ours(placed)}/{ours}", f"{pattern} -> {pattern}"
    yield classifier[0], "classifier/kernel", "features outputs -> features outputs"
    yield classifier[1], "classifier_bias", "outputs -> outputs"


STATISTICS = ("gamma", "beta", "moving_mean", "moving_variance")
TABLE = tuple(_rows())
GRAPH = tuple(
    _same_layout(
        lambda placed: placed.node,
        ("/conv2d_params", *(f"/batchnorm/{leaf}" for leaf in STATISTICS)),
        ("softmax/weights", "softmax/biases"),
    )
)
NESTED = tuple(
    _same_layout(
        lambda placed: placed.name,
        (".conv.kernel", ".bn.scale", ".bn.bias", ".bn.mean", ".bn.var"),
        ("fc.kernel", "fc.bias"),
    )
)
SIZES = {"outputs": OUTPUTS, "features": FEATURES} | {
    axis_of(size): size for _, _, layer, inner in _convolutions() for size in (inner, layer.features, *layer.taps)
}
