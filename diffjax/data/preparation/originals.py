"""The originals of a data set: its images as published, read one by one from the files that a user placed."""

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Self

import numpy as np

from diffjax.data.preparation.containers import Container
from diffjax.errors import UserError

HASHED = 2**33  # bytes of the files of a source; more are known by size, and by names and sizes of their images


@dataclass(frozen=True)
class Originals:
    """The images of one split, in the order of their records.

    Attributes:
        names: of the images, by which messages name them.
        labels: int32 [n]; zeros where there are no classes.
        load: number of an image -> its file, or the pixels uint8 [h, w, 3] where there are no such files.
        files: what they were read from: name, bytes and sha256 of each archive.
        index_sha256: of names, sizes and labels of all images.
        classes: the names of the classes by label.
        note: what is to be said of them, in words; "" for nothing.
        close: closes the files that `load` reads; a `with` statement calls it.
    """

    names: Sequence[str] = field(repr=False)
    labels: np.ndarray = field(repr=False)
    load: Callable[[int], bytes | np.ndarray] = field(repr=False)
    files: list[dict[str, Any]]
    index_sha256: str
    classes: tuple[str, ...] = field(default=(), repr=False)
    note: str = ""
    close: Callable[[], None] = field(default=lambda: None, repr=False)

    def __len__(self) -> int:
        return len(self.names)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def index_sha256(names: Sequence[str], labels: np.ndarray, sizes: Sequence[int] | None = None) -> str:
    """The sha256 of a line per image: its name, its size, its label.

    Sizes are the bytes of the images, or, of rows of parquet, those of all images of the row group.
    """
    digest = hashlib.sha256()
    for i, name in enumerate(names):
        size = "" if sizes is None else sizes[i]
        digest.update(f"{name}\t{size}\t{labels[i]}\n".encode("utf-8", "surrogateescape"))
    return digest.hexdigest()


def of_container(
    container: Container,
    names: Sequence[str],
    labels: np.ndarray | None = None,
    classes: Sequence[str] = (),
) -> Originals:
    """Images of a container by their names there."""
    labels = np.zeros(len(names), np.int32) if labels is None else labels
    return Originals(
        names,
        labels,
        lambda i: container.read(names[i]),
        describe(container.archives),
        index_sha256(names, labels, [container.sizes[name] for name in names]),
        tuple(classes),
        close=container.close,
    )


def describe(paths: Sequence[Path]) -> list[dict[str, Any]]:
    """Name, size and hashes of each archive; None for hashes where all are too large to be read for them."""
    sizes = [path.stat().st_size for path in paths]
    small = sum(sizes) <= HASHED
    return [
        {"name": path.name, "bytes": size} | (_hashes(path) if small else {"sha256": None, "md5": None})
        for path, size in zip(paths, sizes)
    ]


def _hashes(path: Path) -> dict[str, Any]:
    sha256, md5 = hashlib.sha256(), hashlib.md5(usedforsecurity=False)
    with path.open("rb") as file:
        while piece := file.read(2**20):
            sha256.update(piece)
            md5.update(piece)
    return {"sha256": sha256.hexdigest(), "md5": md5.hexdigest()}


def find(path: Path, names: Sequence[str], what: str, beside: bool = False) -> Path:
    """The first of `names` that lies in a folder; `beside`: or beside this archive or folder. UserError where none."""
    for folder in (path, path.parent) if beside else (path,):
        for name in names:
            if (folder / name).exists():
                return folder / name
    raise UserError(f"{path} does not hold {what}: {' or '.join(names)}")
