"""Rows of tables (see `mapping`) of convolutional networks."""

from collections.abc import Iterator, Mapping
from typing import Any

CONSTANTS = {"one": 1, "three": 3}
KERNEL3, KERNEL1 = "three three2", "one one2"

Rows = Iterator[tuple[str, str, str]]


def axis(level: int) -> str:
    """The table's name for the width of a level: wa, wb, ..."""
    return f"w{chr(ord('a') + level)}"


def kernel(theirs: str, ours: str, inner: str, outer: str, taps: str = KERNEL3) -> Rows:
    """A convolution without bias from `inner` to `outer` channels; taps: the axes of its rows and columns."""
    yield f"{theirs}.weight", f"{ours}/kernel", f"{outer} {inner}2 {taps} -> {taps} {inner}2 {outer}"


def conv(theirs: str, ours: str, inner: str, outer: str, taps: str = KERNEL3) -> Rows:
    yield from kernel(theirs, ours, inner, outer, taps)
    yield f"{theirs}.bias", f"{ours}/bias", f"{outer} -> {outer}"


def linear(theirs: str, ours: str, width: str) -> Rows:
    """A linear map of `width` channels with bias."""
    yield f"{theirs}.weight", f"{ours}/kernel", f"{width}2 {width} -> {width} {width}2"
    yield f"{theirs}.bias", f"{ours}/bias", f"{width} -> {width}"


def norm(theirs: str, ours: str, width: str) -> Rows:
    yield f"{theirs}.weight", f"{ours}/scale", f"{width} -> {width}"
    yield f"{theirs}.bias", f"{ours}/bias", f"{width} -> {width}"


def batch_norm(theirs: str, ours: str, width: str) -> Rows:
    """A normalisation with the statistics of its training."""
    for key, leaf in (("weight", "scale"), ("bias", "bias"), ("running_mean", "mean"), ("running_var", "variance")):
        yield f"{theirs}.{key}", f"{ours}/{leaf}", f"{width} -> {width}"


def without_counters(state_dict: Mapping[str, Any]) -> dict[str, Any]:
    """The weights without what normalisations count in training, which not every file has."""
    return {key: value for key, value in state_dict.items() if not key.endswith("num_batches_tracked")}


def axis_of(size: int) -> str:
    """The name of axes of a fixed size: 192 -> n192x; the x keeps its digits from those that number axes."""
    return f"n{size}x"
