"""A data set as the pipeline sees it: random access to its examples, what training sees of them, and an identity."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np

from diffjax import contracts
from diffjax.contracts import Condition

LISTED = 10  # classes, in a line


class RandomAccess(Protocol):
    """Examples by number; picklable, since worker processes receive a copy.

    {"image": array, "label": integer, tokens [n] or vector [k]}, where there are auxiliary arrays also "aux": by name.
    """

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> dict[str, Any]: ...


def pixels(images: np.ndarray, mirrored: np.ndarray, positions: np.ndarray, seed: int) -> np.ndarray:
    """Images uint8 [b, h, w, c], left-right mirrored where `mirrored` bool [b], as float32 in [-1, 1].

    Nothing else is random here, so `positions` and `seed` have no effect.
    """
    flipped = np.where(mirrored[:, None, None, None], images[:, :, ::-1], images)
    return flipped.astype(np.float32) / np.float32(127.5) - np.float32(1)


def mirror(images: np.ndarray, mirrored: np.ndarray) -> np.ndarray:
    """Maps [b, h, w, ...] of any dtype, left-right mirrored where `mirrored` bool [b]."""
    return np.where(mirrored.reshape(-1, *(1,) * (images.ndim - 1)), images[:, :, ::-1], images)


def as_stored(array: np.ndarray, mirrored: np.ndarray) -> np.ndarray:
    """Auxiliary arrays that have no left and right."""
    return array


@dataclass(frozen=True)
class Source:
    """A data set.

    Attributes:
        size: side of the square image, latent or grid of tokens.
        num_classes: 0: unlabelled, every label is 0.
        fingerprint: json-able identity: another data set, split or file list has another one.
        draw: (stored [b, ...], mirrored bool [b], stream positions int64 [b], seed) -> what training sees: float32
            [b, h, w, c], or tokens int32 [b, codebooks, n].
        given: what the examples are conditioned on, where that is not their label.
        aux: auxiliary arrays of the examples by name, each with its (stored [b, ...], mirrored bool [b]) -> [b, ...].
        separate: (drawn, conditions) -> (x, conditions), where a part of what is drawn conditions the rest.
        classes: the names of the classes by label, where they have any.
        note: what of the files was left out, in words; "" for nothing.
        place: where the data lie; "" for embedded ones.
    """

    name: str
    examples: RandomAccess = field(repr=False)
    size: int
    channels: int
    num_classes: int
    fingerprint: dict[str, Any]
    draw: Callable[[np.ndarray, np.ndarray, np.ndarray, int], np.ndarray] = pixels
    given: Condition | None = None
    aux: Mapping[str, Callable[[np.ndarray, np.ndarray], np.ndarray]] = field(default_factory=dict)
    separate: Callable[[np.ndarray, np.ndarray], tuple[np.ndarray, np.ndarray]] | None = None
    classes: tuple[str, ...] = ()
    note: str = ""
    place: str = ""

    def describe(self) -> str:
        """A description of the data found: "1,500 images of digits, 10 classes: 0, 1, 2, ..., 9"."""
        classes = f"{self.num_classes:,} classes" if self.num_classes else "no classes"
        left_out = f"; left out: {self.note}" if self.note else ""
        return f"{len(self.examples):,} {self.kind} of {self.name}, {classes}{self.names()}{left_out}"

    @property
    def kind(self) -> str:
        """What the examples are, in a word."""
        return "images" if self.draw is pixels else "examples"

    def names(self) -> str:
        """ ": cat, dog", the names of the classes, of many the first and the last; "" where they have none."""
        names = list(self.classes)
        if len(names) > LISTED:
            names = [*names[: LISTED - 1], "...", names[-1]]
        return f": {', '.join(names)}" if names else ""

    @property
    def condition(self) -> Condition | None:
        return self.given or contracts.labels(self.num_classes)
