"""Examples that are image files: a folder of them, or a data set prepared by tensorflow_datasets."""

import io
import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from PIL import Image

from diffjax.data.transforms import adm_center_crop, decode
from diffjax.errors import UserError

SUFFIXES = (".jpeg", ".jpg", ".png", ".webp")


def list_images(root: Path) -> list[str]:
    """Paths of all image files below `root`, relative, with "/", sorted part by part (so folder after folder)."""
    found = []
    for folder, _, files in os.walk(root, followlinks=True):
        inside = Path(folder).relative_to(root)
        found += [(inside / file).as_posix() for file in files if file.lower().endswith(SUFFIXES)]
    return sorted(found, key=lambda path: path.split("/"))


def class_names(files: list[str]) -> list[str]:
    """The top-level folders of `files`, sorted: a label is a rank in this list. Empty when no file is in a folder."""
    if loose := [file for file in files if "/" not in file]:
        if len(loose) < len(files):
            raise UserError(f"image {loose[0]} lies beside class folders; move it into one of them")
        return []
    return sorted({file.split("/")[0] for file in files})


@dataclass(frozen=True)
class FolderExamples:
    """Image files as uint8 [size, size, 3]."""

    root: Path
    files: list[str] = field(repr=False)
    labels: np.ndarray = field(repr=False)  # int32 [n]
    size: int
    crop: bool  # by the ADM centre crop; else every image must have the size

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, index: int) -> dict[str, Any]:
        path = self.root / self.files[index]
        image = _decode(path, str(path), channels=3)
        return {"image": _sized(image, str(path), self.size, self.crop), "label": int(self.labels[index])}


@dataclass(frozen=True)
class PreparedExamples:
    """Encoded images of a tensorflow_datasets data source as uint8 [size, size, channels]."""

    records: Any = field(repr=False)  # random access to {"image": encoded bytes, "label": integer, ...}
    size: int
    channels: int
    crop: bool
    labelled: bool

    def __len__(self) -> int:
        return len(self.records)

    def __getitem__(self, index: int) -> dict[str, Any]:
        record = self.records[index]
        image = _decode(io.BytesIO(record["image"]), f"example {index}", self.channels)
        sized = _sized(image, f"example {index}", self.size, self.crop)
        return {"image": sized, "label": int(record["label"]) if self.labelled else 0}


def _sized(image: Image.Image, name: str, size: int, crop: bool) -> np.ndarray:
    if not crop and image.size != (size, size):
        width, height = image.size
        raise UserError(
            f"{name} is {width}x{height}, data.size={size}, and data.crop='none'; data.crop='adm' crops and resizes"
        )
    return adm_center_crop(image, size)


def _decode(file: Path | BinaryIO, name: str, channels: int) -> Image.Image:
    try:
        return decode(file, channels)
    except OSError as error:
        raise UserError(f"{name} cannot be decoded: {error}") from error
