"""Drop the output channels of a variance where the process uses only those of the prediction."""

import re
from typing import Any

Shapes = dict[str, tuple[int, ...]]  # by path
LAST = re.compile(r"^final/(.*/)?(kernel|bias)$")  # paths of the layer whose last dimension ends in output channels


def twice(stored: Shapes, wanted: Shapes) -> set[str]:
    """The paths of last layers that have twice the output channels that are wanted, and differ in nothing else."""
    both = (path for path in stored.keys() & wanted.keys() if LAST.match(path) and stored[path])
    return {path for path in both if stored[path] == (*wanted[path][:-1], 2 * wanted[path][-1])}


def unused(stored: Shapes, wanted: Shapes) -> set[str]:
    """The paths that differ, where they differ by twice the output channels alone; else none."""
    differing = {path for path in stored | wanted if stored.get(path) != wanted.get(path)}
    found = twice(stored, wanted)
    return found if found == differing else set()


def first_half(array: Any, channels: int) -> Any:
    """[..., positions x 2 channels] -> [..., positions x channels]: the first half of the channels at each position."""
    lead = array.shape[:-1]
    return array.reshape(*lead, -1, 2 * channels)[..., :channels].reshape(*lead, -1)


def said(name: str, channels: int) -> str:
    return f"{name} has {2 * channels} output channels; the last {channels}, of a variance, are not used and left out"
