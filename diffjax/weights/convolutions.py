"""Rows of tables (see `mapping`) of convolutional networks."""

from collections.abc import Iterator

CONSTANTS = {"one": 1, "three": 3}
KERNEL3, KERNEL1 = "three three2", "one one2"

Rows = Iterator[tuple[str, str, str]]


def axis(level: int) -> str:
    """The table's name for the width of a level: wa, wb, ..."""
    return f"w{chr(ord('a') + level)}"


def kernel(theirs: str, ours: str, inner: str, outer: str, taps: str = KERNEL3) -> Rows:
    """A convolution without bias from `inner` to `outer` channels, of 3 x 3 or 1 x 1 taps."""
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
