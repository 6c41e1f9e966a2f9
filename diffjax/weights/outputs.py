"""Output channels of a backbone: the prediction, and after it those of a variance, which not every process uses."""

import re
from typing import Any

LAST = re.compile(r"^final/(.*/)?(kernel|bias)$")  # paths of the layer whose last dimension ends in output channels


def unused(stored: dict[str, tuple[int, ...]], wanted: dict[str, tuple[int, ...]]) -> set[str]:
    """The paths that differ, where they differ in the output channels alone and have twice as many; else none."""
    differing = {path for path in stored | wanted if stored.get(path) != wanted.get(path)}
    twice = {
        path
        for path in differing & stored.keys() & wanted.keys()
        if LAST.match(path) and stored[path] == (*wanted[path][:-1], 2 * wanted[path][-1])
    }
    return twice if twice == differing else set()


def first_half(array: Any, channels: int) -> Any:
    """An array [..., places x 2 channels] -> [..., places x channels], the first half of the channels of each place."""
    lead = array.shape[:-1]
    return array.reshape(*lead, -1, 2 * channels)[..., :channels].reshape(*lead, -1)


def said(name: str, channels: int) -> str:
    return f"{name} has {2 * channels} output channels; the last {channels}, of a variance, are not used and left out"
