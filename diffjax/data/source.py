"""A data set as the pipeline sees it: random access to its examples, what training sees of them, and an identity."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple, Protocol

import numpy as np

from diffjax import contracts
from diffjax.contracts import Condition, Device

LISTED = 10  # classes, in a line


class RandomAccess(Protocol):
    """Examples by number; picklable, since worker processes receive a copy.

    {"image": array, "label": integer, tokens [n] or vector [k]}, where there are auxiliary arrays also "aux": by name.
    """

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> dict[str, Any]: ...


class Preparation(NamedTuple):
    """How stored values become what training sees: functions of arrays of any library that follows the array API.

    Attributes:
        draw: (values [b, ...], mirrored bool [b], device) -> float32 [b, h, w, c], or tokens int32 [b, codebooks, n].
        separate: (drawn, conditions) -> (x, conditions), where a part of what is drawn conditions the rest.
        aux: of auxiliary arrays by name, (stored [b, ...], mirrored bool [b]) -> [b, ...].
    """

    draw: Callable[[Any, Any, Device], Any]
    separate: Callable[[Any, Any], tuple[Any, Any]] | None = None
    aux: tuple[tuple[str, Callable[[Any, Any], Any]], ...] = ()


def pixels(images: Any, mirrored: Any, device: Device) -> Any:
    """Images uint8 [b, h, w, c], left-right mirrored where `mirrored` bool [b], as float32 in [-1, 1]."""
    return device.divide(mirror(images, mirrored).astype(np.float32), 127.5) - np.float32(1)


class OnHost:
    """`contracts.Device` of numpy arrays of which nothing is drawn."""

    def normal(self, shape: tuple[int, ...]) -> np.ndarray:
        raise TypeError("nothing is drawn on the host")

    def divide(self, x: np.ndarray, by: float) -> np.ndarray:
        return x / np.float32(by)


def scaled(images: np.ndarray) -> np.ndarray:
    """Images uint8 [b, h, w, c] as float32 in [-1, 1], on the host."""
    return pixels(images, np.zeros(len(images), bool), OnHost())


def mirror(maps: Any, mirrored: Any) -> Any:
    """Maps [b, h, w, ...] of any dtype, left-right mirrored where `mirrored` bool [b]."""
    where = mirrored.reshape(-1, *(1,) * (maps.ndim - 1))
    return maps.__array_namespace__().where(where, maps[:, :, ::-1], maps)


def as_stored(array: Any, mirrored: Any) -> Any:
    """Auxiliary arrays that have no left and right."""
    return array


@dataclass(frozen=True)
class Source:
    """A data set.

    Attributes:
        size: side of the square image, latent or grid of tokens.
        num_classes: 0: unlabelled, every label is 0.
        fingerprint: json-able identity: another data set, split or file list has another one.
        draw: see `Preparation`.
        views: whether the examples hold both views, [2, ...], or the one that there is, [1, ...], of their values.
        given: what the examples are conditioned on, where that is not their label.
        aux: names of the auxiliary arrays of the examples, with functions as in `Preparation`.
        separate: see `Preparation`.
        classes: the names of the classes by label, where they have any.
        note: what of the files was left out, in words; "" for nothing.
        place: where the data lie; "" for embedded ones.
        draws: how random values of the examples are drawn; "" where none are.
    """

    name: str
    examples: RandomAccess = field(repr=False)
    size: int
    channels: int
    num_classes: int
    fingerprint: dict[str, Any]
    draw: Callable[[Any, Any, Device], Any] = pixels
    views: bool = False
    given: Condition | None = None
    aux: Mapping[str, Callable[[Any, Any], Any]] = field(default_factory=dict)
    separate: Callable[[Any, Any], tuple[Any, Any]] | None = None
    classes: tuple[str, ...] = ()
    note: str = ""
    place: str = ""
    draws: str = ""

    def describe(self) -> str:
        """A description of the data found: "1,500 images of digits, 10 classes: 0, 1, 2, ..., 9"."""
        classes = f"{self.num_classes:,} classes" if self.num_classes else "no classes"
        left_out = f"; left out: {self.note}" if self.note else ""
        return f"{len(self.examples):,} {self.kind} of {self.name}, {classes}{self.names()}{left_out}"

    @property
    def preparation(self) -> Preparation:
        return Preparation(self.draw, self.separate, tuple(self.aux.items()))

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
