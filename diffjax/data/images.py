"""Examples that are image files: a folder of them, or a data set prepared by tensorflow_datasets."""

import contextlib
import io
import os
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from PIL import Image

from diffjax.data.transforms import DECODERS, adm_center_crop, check_mode
from diffjax.errors import UserError

SUFFIXES = (".bmp", ".gif", ".jfif", ".jpe", ".jpeg", ".jpg", ".png", ".tif", ".tiff", ".webp")
LIMITS = "at most 178 megapixels, and 1 MiB of colour profile or text in a png"  # Pillow's
CHECKED = 1000  # files of a folder whose headers are read when it is opened


@dataclass(frozen=True)
class Listing:
    """The files below a folder.

    Attributes:
        images: paths of the image files, relative, with "/", sorted part by part (so folder after folder); a file that
            several links lead to is there once.
        folders: the top-level folders, sorted, also those without images.
        others: how many files are no images, by suffix.
        repeated: how many links lead to files that are listed already.
    """

    images: list[str]
    folders: list[str]
    others: Mapping[str, int]
    repeated: int

    def __len__(self) -> int:
        return len(self.images)

    def left_out(self) -> str:
        """In words, what was left out; "" for nothing."""
        counts = [f"{count:,} {suffix or 'without a suffix'}" for suffix, count in sorted(self.others.items())]
        found = [f"files that are no images ({', '.join(counts)})"] if counts else []
        return " and ".join(found + ([f"{self.repeated:,} links to files listed already"] if self.repeated else []))


def list_images(root: Path) -> Listing:
    """The image files below `root`. Links are followed; names that begin with a dot are passed over."""
    images: list[str] = []
    others: Counter[str] = Counter()
    links: list[str] = []  # looked at after everything that is no link
    real_root = os.path.realpath(root)
    walked, linked, repeated = {real_root}, set(), 0  # real paths of folders, and of files that links led to

    def walk(inside: str, real: str) -> None:
        for entry in _visible(real):
            if entry.is_symlink():
                links.append(inside + entry.name)
            elif not entry.is_dir():
                add(inside + entry.name)
            elif (below := os.path.join(real, entry.name)) not in walked:
                walked.add(below)
                walk(f"{inside}{entry.name}/", below)

    def add(path: str) -> None:
        if is_image(path):
            images.append(path)
        else:
            others[Path(path).suffix.lower()] += 1

    walk("", real_root)
    for link in links:  # which grows meanwhile
        real = os.path.realpath(root / link)
        if real in walked or real in linked or (os.path.dirname(real) in walked and is_image(real)):
            repeated += 1
        elif os.path.isdir(real):
            walked.add(real)
            walk(f"{link}/", real)
        else:
            linked.add(real)
            add(link)
    folders = [entry.name for entry in _visible(real_root) if entry.is_dir()]
    return Listing(sorted(images, key=lambda path: path.split("/")), folders, others, repeated)


def _visible(folder: str) -> list[os.DirEntry[str]]:
    """The entries of a folder, sorted by name, without hidden ones."""
    try:
        with os.scandir(folder) as entries:
            return sorted((e for e in entries if not e.name.startswith(".")), key=lambda entry: entry.name)
    except OSError as error:
        raise UserError(f"{folder} cannot be listed: {error.strerror}") from error


def is_image(path: str) -> bool:
    name = path.rpartition("/")[2].lower()
    return name.endswith(SUFFIXES) and not name.startswith(".")


def class_names(root: Path, found: Listing) -> list[str]:
    """The top-level folders, sorted: a label is a rank in this list. UserError unless each holds images, and all do."""
    loose = [file for file in found.images if "/" not in file]
    if found.images and len(loose) == len(found.images):
        raise UserError(
            f"{root}: {len(loose):,} images and no folders; labels need one sub-folder per class, without labels "
            "data.num_classes=0"
        )
    if loose:
        raise UserError(f"image {loose[0]} lies beside class folders in {root}; move it into one of them")
    if empty := sorted(set(found.folders) - {file.split("/")[0] for file in found.images}):
        raise UserError(
            f"{root}: class folder {empty[0]!r} holds no image that is read ({', '.join(SUFFIXES)}) and no other class "
            "has; convert its files, or remove the folder"
        )
    return found.folders


def unread_classes(root: Path, found: Listing) -> str:
    """In words, that the sub-folders of unlabelled images could be read as classes; "" where they could not."""
    try:
        count = len(class_names(root, found))
    except UserError:
        return ""
    return f"the names of {count} sub-folders (classes with data.num_classes={count})" if count > 1 else ""


@dataclass(frozen=True)
class FolderExamples:
    """Image files as uint8 [size, size, 3]."""

    root: Path
    files: list[str] = field(repr=False)
    labels: np.ndarray = field(repr=False)  # int32 [n]
    size: int
    crop: bool  # by the ADM centre crop; else every image must have the size
    decode: str  # one of transforms.DECODERS

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, index: int) -> dict[str, Any]:
        path = self.root / self.files[index]
        image = _decode(path, str(path), 3, self.decode)
        return {"image": _sized(image, str(path), self.size, self.crop), "label": int(self.labels[index])}

    def check_headers(self) -> None:
        """Open the first CHECKED files without decoding them.

        UserError for one that is no image, of 32 bits, beyond Pillow's limits, or of another size where nothing is
        cropped. Later files, and damage behind the header, are found when they are decoded.
        """
        for file in self.files[:CHECKED]:
            path = self.root / file
            with refusing(str(path)), Image.open(path) as image:
                check_mode(image.mode, self.decode)
                size = image.size
            if not self.crop:
                _check_size(size, str(path), self.size)


@dataclass(frozen=True)
class PreparedExamples:
    """Encoded images of a tensorflow_datasets data source as uint8 [size, size, channels]."""

    records: Any = field(repr=False)  # random access to {"image": encoded bytes, "label": integer, ...}
    size: int
    channels: int
    crop: bool
    decode: str
    labelled: bool

    def __len__(self) -> int:
        return len(self.records)

    def __getitem__(self, index: int) -> dict[str, Any]:
        record = self.records[index]
        image = _decode(io.BytesIO(record["image"]), f"example {index}", self.channels, self.decode)
        sized = _sized(image, f"example {index}", self.size, self.crop)
        return {"image": sized, "label": int(record["label"]) if self.labelled else 0}


def _sized(image: Image.Image, name: str, size: int, crop: bool) -> np.ndarray:
    if not crop:
        _check_size(image.size, name, size)
    return adm_center_crop(image, size)


def _check_size(found: tuple[int, int], name: str, size: int) -> None:
    if found != (size, size):
        width, height = found
        raise UserError(
            f"{name} is {width}x{height}, data.size={size}, and data.crop='none'; data.crop='adm' crops and resizes"
        )


def _decode(file: Path | BinaryIO, name: str, channels: int, how: str) -> Image.Image:
    with refusing(name):
        return DECODERS[how](file, channels)


@contextlib.contextmanager
def refusing(name: str) -> Iterator[None]:
    """Errors of Pillow become UserError, which names the file, and the limit where one was passed."""
    try:
        yield
    except Exception as error:  # a damaged file, or one beyond Pillow's limits, can break it in any way
        reason = " ".join(str(error).split())[:200] or type(error).__name__
        beyond = isinstance(error, Image.DecompressionBombError) or "MAX_TEXT" in reason
        limits = f"; what is read: {LIMITS}" if beyond else ""
        raise UserError(f"{name} cannot be decoded: {reason}{limits}") from error
