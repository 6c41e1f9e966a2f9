"""Images that are scored, or that others are scored against, from any container: all alike, uint8 RGB, by number.

    .npz      arr_0 uint8 [n, h, w, 3], arr_1 labels, as `sample` and guided-diffusion write it
    .npy      uint8 [n, h, w, 3]
    a folder, a .zip or a .tar of image files; the top-level folders, or a dataset.json, are classes
    a folder that `prepare` wrote
    digits, emoji32: the embedded sets

Nothing is resized, cropped or turned, and nothing but what is asked for is in memory. Grey is repeated. Image files
give the colours that they store, whatever their profile; those that are transparent in places are refused.
"""

import hashlib
import io
import json
import math
import os
import struct
import zipfile
import zlib
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from tqdm import tqdm

from diffjax.data import image_records, npy, shards, sources
from diffjax.data.image_records import ImageRecords
from diffjax.data.images import SUFFIXES, refusing
from diffjax.data.preparation.containers import Container, open_container, reading
from diffjax.data.preparation.pictures import labels_of
from diffjax.data.source import Source, pixels
from diffjax.data.transforms import check_mode
from diffjax.errors import UserError
from diffjax.files import NO_LABELS, local_path, read_npz, read_protocol

EMBEDDED = ("digits", "emoji32")
VALID = "an .npz or .npy of images, a folder, .zip or .tar of image files, a folder that `prepare` wrote"
FIRST = 16  # images of which the range is looked at
HEADER = 2**14  # bytes that hold the header of an npy file
PIECE = 2**20
PREPARED = ("dataset", "split", "rule", "decode")  # what the manifest of records says of how they were made
BLOCK = 512  # images at a time

Read = Callable[[np.ndarray], np.ndarray]  # numbers int64 [k] -> images uint8 [k, h, w, 1 or 3]


@dataclass(frozen=True)
class ImageSet:
    name: str  # of the file, folder or embedded set
    count: int
    shape: tuple[int, int, int]  # h, w, 3
    labels: np.ndarray | None = field(repr=False)  # int32 [count], where they are known
    # numbers int64 [k] -> images uint8 [k, h, w, 3]; compressed files are fast in ascending order alone
    read: Read = field(repr=False)
    # json-able, what identifies the images: "sha256", "of" what, and for prepared data how they were made
    fingerprint: dict[str, Any]
    made: dict[str, Any] = field(default_factory=dict)  # the json beside a samples file, how they were drawn

    def blocks(self, numbers: np.ndarray | None = None, size: int = BLOCK) -> Iterator[np.ndarray]:
        """Images uint8 [size, h, w, 3] of the `numbers` (None: all) in their order; the last block may be smaller."""
        numbers = np.arange(self.count) if numbers is None else numbers
        for start in range(0, len(numbers), size):
            yield self.read(numbers[start : start + size])


def find(name: str, split: str = "train") -> ImageSet:
    """The images of an embedded set, or those at a path."""
    return embedded(name, split) if name in EMBEDDED else open_image_set(local_path(name))


def embedded(name: str, split: str = "train") -> ImageSet:
    """The images of an embedded set, one of EMBEDDED, and of its split, train or test."""
    source = sources.SOURCES[name](split=split)
    images, labels = sources.arrays(source)
    fingerprint = {"sha256": source.fingerprint["sha256"], "of": "the embedded file", "split": split}
    return _image_set(name, images.shape, labels, images.__getitem__, fingerprint)


def open_image_set(path: Path) -> ImageSet:
    """The images at a path, see above; their order is that of the file or of the sorted names.

    Opening reads all bytes once, for the hash; of image files also their headers.

    UserError for what is missing, damaged or of another kind, for sizes that differ, and for fewer than two images.
    """
    if not path.exists():
        raise UserError(f"{path}: no such file or folder; valid: {VALID}")
    kinds: dict[str, Callable[[Path], ImageSet]] = {".npz": _npz, ".npy": _npy, ".zip": _files, ".tar": _files}
    if path.is_dir():
        return _records(path) if (path / image_records.MANIFEST).exists() else _files(path)
    if path.suffix.lower() not in kinds:
        raise UserError(f"{path}: valid: {VALID}")
    return kinds[path.suffix.lower()](path)


def check_range(images: ImageSet) -> None:
    """UserError where the first images hold 0 and 1 alone: floats from 0 to 1 that were cast without scaling."""
    if images.read(np.arange(min(images.count, FIRST))).max() == 1:
        raise UserError(f"{images.name}: the first images hold 0 and 1 alone; valid: uint8 pixels from 0 to 255")


def _image_set(
    name: str,
    shape: tuple[int, ...],
    labels: np.ndarray | None,
    read: Read,
    fingerprint: dict[str, Any],
    made: Mapping[str, Any] = {},
) -> ImageSet:
    """The set of images of shape [n, h, w, 1 or 3]."""
    count, height, width, channels = shape
    if count < 2:
        raise UserError(f"{name} holds {count} image{'s' * (count != 1)}; at least 2 are needed")

    def read_rgb(numbers: np.ndarray) -> np.ndarray:
        if len(numbers) and not 0 <= np.min(numbers) <= np.max(numbers) < count:
            raise IndexError(f"images {np.min(numbers)} to {np.max(numbers)} of {count}")
        images = read(numbers)
        return np.repeat(images, 3, axis=-1) if channels == 1 else images

    labels = None if labels is None else labels.astype(np.int32)
    return ImageSet(name, count, (height, width, 3), labels, read_rgb, fingerprint, dict(made))


def _of_file(path: Path) -> str:
    return path.name or path.resolve().name


# Arrays


def _npz(path: Path) -> ImageSet:
    with reading(path), zipfile.ZipFile(path) as archive, path.open("rb") as file:
        names = archive.namelist()
        if "arr_0.npy" not in names:
            held = ", ".join(name.removesuffix(".npy") for name in names[:5]) or "nothing"
            raise UserError(f"{path} holds no images, an array arr_0; it holds {held}")
        info = archive.getinfo("arr_0.npy")
        with archive.open(info) as member:
            shape, offset = _check_header(member.read(HEADER), info.file_size, path, "arr_0")
        stored = info.compress_type == zipfile.ZIP_STORED
        start = _start(file, info) if stored else 0
    sha256, checksum = _hashes(path, start, info.file_size if stored else 0)
    if stored and checksum != info.CRC:
        raise UserError(f"{path}: the checksum of arr_0 differs, the file is damaged; get it again")
    read = _Stored(path, start + offset, shape) if stored else _Compressed(path, offset, shape)
    made = read_protocol(path, sha256)
    labels = read_npz(path, ("arr_1",), optional=("arr_1",)).get("arr_1")
    if labels is not None and (not np.issubdtype(labels.dtype, np.integer) or labels.shape != shape[:1]):
        raise UserError(f"{path}: arr_1 is {labels.dtype} {list(labels.shape)}; valid: integers [{shape[0]}]")
    if made.get("labels") == NO_LABELS:
        labels = None
    return _image_set(_of_file(path), shape, labels, read, {"sha256": sha256, "of": "the file"}, made)


def _npy(path: Path) -> ImageSet:
    with reading(path), path.open("rb") as file:
        shape, offset = _check_header(file.read(HEADER), path.stat().st_size, path, "the array")
    fingerprint = {"sha256": _hashes(path)[0], "of": "the file"}
    return _image_set(_of_file(path), shape, None, _Stored(path, offset, shape), fingerprint)


def _check_header(data: bytes, size: int, path: Path, name: str) -> tuple[tuple[int, ...], int]:
    """Shape [n, h, w, 1 or 3] of an npy file of `size` bytes that starts with `data`, and where its pixels begin."""
    dtype, shape, fortran, offset = npy.header(data, f"{path}: {name}")
    if dtype != np.uint8:
        raise UserError(f"{path}: {name} is {dtype} {list(shape)}; valid: uint8, the rounded pixels that files hold")
    if len(shape) != 4 or shape[-1] not in (1, 3) or 0 in shape[1:] or fortran:
        order = " in Fortran order" if fortran else ""
        raise UserError(f"{path}: {name} is uint8 {list(shape)}{order}; valid: [n, h, w, 3], or 1 channel of grey")
    if size != offset + math.prod(shape):
        raise UserError(f"{path}: {name} is uint8 {list(shape)} and holds {size - offset:,} bytes; it is damaged")
    return shape, offset


def _start(file: io.BufferedReader, info: zipfile.ZipInfo) -> int:
    """Where the bytes of a member of a zip begin: after its own header, a name and an extra field."""
    file.seek(info.header_offset)
    name, extra = struct.unpack_from("<HH", file.read(30).ljust(30, b"\0"), 26)
    return info.header_offset + 30 + name + extra


def _hashes(path: Path, start: int = 0, size: int = 0) -> tuple[str, int]:
    """The sha256 of a file, and the CRC-32 of `size` bytes of it from `start`."""
    digest, checksum, place = hashlib.sha256(), 0, 0
    with reading(path), path.open("rb") as file:
        while piece := file.read(PIECE):
            digest.update(piece)
            checksum = zlib.crc32(piece[max(0, start - place) : max(0, start + size - place)], checksum)
            place += len(piece)
    return digest.hexdigest(), checksum


@dataclass(frozen=True)
class _Stored:
    """Images that lie in a file as they are, from `offset` on."""

    path: Path
    offset: int
    shape: tuple[int, ...]  # n, h, w, channels

    def __call__(self, numbers: np.ndarray) -> np.ndarray:
        images = np.empty((len(numbers), *self.shape[1:]), np.uint8)
        size = math.prod(self.shape[1:])
        with reading(self.path), self.path.open("rb") as file:
            for image, number in zip(images, numbers):
                file.seek(self.offset + int(number) * size)
                if file.readinto(image) != size:
                    raise EOFError("the file ends before its images")
        return images


class _Compressed:
    """Images in a compressed array of an npz: what lies before an image is inflated for it, but not twice."""

    def __init__(self, path: Path, offset: int, shape: tuple[int, ...]):
        self.path, self.offset, self.shape = path, offset, shape
        self.file = zipfile.ZipFile(path).open("arr_0.npy")  # noqa: SIM115  # stays open from call to call

    def __call__(self, numbers: np.ndarray) -> np.ndarray:
        images = np.empty((len(numbers), *self.shape[1:]), np.uint8)
        size = math.prod(self.shape[1:])
        with reading(self.path, "arr_0"):  # also a ValueError, where it ends before its images
            for image, number in zip(images, numbers):
                self.file.seek(self.offset + int(number) * size)
                image[:] = np.frombuffer(self.file.read(size), np.uint8).reshape(image.shape)
        return images


# Image files


def _files(path: Path) -> ImageSet:
    container = open_container(path)
    names = list(container.sizes)
    if not names:
        raise UserError(f"{path} holds no images, no {', '.join(SUFFIXES)}")
    labels, classes = labels_of(container, path)
    digest = hashlib.sha256()
    first = (0, 0)
    for name in tqdm(names, desc="checking", unit="image", disable=None, leave=False):
        data = container.read(name)
        with refusing(f"{path}: {name}"), Image.open(io.BytesIO(data)) as image:
            _check_mode(image.mode)
            size = image.size
        first = size if name == names[0] else first
        if size != first:
            sizes = f"{names[0]} is {first[0]}x{first[1]} and {name} is {size[0]}x{size[1]}"
            raise UserError(f"{path}: {sizes}; images of one set have one size (`prepare images` resizes them)")
        digest.update(f"{name}\t{len(data)}\t{hashlib.sha256(data).hexdigest()}\n".encode("utf-8", "surrogateescape"))
    width, height = first
    fingerprint = {"sha256": digest.hexdigest(), "of": "names, sizes and sha256 of the image files"}
    read = _in_threads(lambda number: _rgb(container, names[number], path), (height, width, 3))
    labels = labels if len(classes) > 1 else None
    return _image_set(_of_file(path), (len(names), height, width, 3), labels, read, fingerprint)


def _check_mode(mode: str) -> None:
    """ValueError for images of more than 8 bits, by Pillow's mode."""
    if mode.startswith("I;16"):
        raise ValueError("16 bits of grey; valid: 8 bits, to which `prepare images --decode=shown` scales them")
    check_mode(mode, "stored")


def _rgb(container: Container, name: str, path: Path) -> np.ndarray:
    """The image uint8 [h, w, 3] of a file."""
    data = container.read(name)
    with refusing(f"{path}: {name}"), Image.open(io.BytesIO(data)) as image:
        if image.has_transparency_data and np.asarray(image.convert("RGBA"))[..., 3].min() < 255:
            raise ValueError("it is transparent in places; `prepare images --decode=shown` puts it on white")
        return np.asarray(image.convert("RGB"))


def _in_threads(load: Callable[[int], np.ndarray], shape: tuple[int, int, int]) -> Read:
    """`load` of many numbers, in as many threads as there are cores."""

    def read(numbers: np.ndarray) -> np.ndarray:
        images = np.empty((len(numbers), *shape), np.uint8)
        with ThreadPoolExecutor(os.cpu_count() or 1) as pool:
            for place, image in zip(images, pool.map(load, map(int, numbers))):
                place[:] = image
        return images

    return read


def _records(root: Path) -> ImageSet:
    manifest = image_records.read_manifest(root)
    count, size = manifest["count"], manifest["size"]
    examples = ImageRecords(shards.open_records(root, manifest), labelled=True)

    def load(number: int) -> np.ndarray:
        with reading(root, f"record {number}"):
            return examples[number]["image"]

    def label(number: int) -> int:
        with reading(root, f"record {number}"):
            return image_records.parse(examples.records[number]).label

    labels = None
    if manifest["num_classes"] > 1:
        numbers = tqdm(range(count), desc="reading labels", unit="image", disable=None, leave=False)
        labels = np.fromiter(map(label, numbers), np.int32, count)
    made = {key: manifest[key] for key in PREPARED if key in manifest}
    fingerprint = {"sha256": manifest["records_sha256"], "of": "the records", **made}
    read = _in_threads(load, (size, size, manifest["channels"]))
    return _image_set(_of_file(root), (count, size, size, manifest["channels"]), labels, read, fingerprint)


# Training data


def of_source(source: Source, most: int, labelled: bool) -> ImageSet:
    """The images of a data source of pixels, at most `most` of them, evenly spaced in stored order.

    labelled: with their labels, which takes the reading of all of them.
    """
    if source.draw is not pixels:
        raise UserError(f"data source {source.name} holds no pixels; evaluation needs an image source")
    total = len(source.examples)
    count = min(total, most)
    chosen = np.arange(count) * total // count

    def read(numbers: np.ndarray) -> np.ndarray:
        return np.stack([source.examples[int(number)]["image"] for number in chosen[numbers]])

    labels = None
    if labelled and source.condition and source.condition.kind == "labels":
        labels = np.array([source.examples[int(number)]["label"] for number in chosen], np.int32)
    digest = hashlib.sha256(json.dumps(source.fingerprint, sort_keys=True).encode()).hexdigest()
    fingerprint = {"sha256": digest, "of": "the fingerprint of the training data"}
    return _image_set(source.name, (count, source.size, source.size, source.channels), labels, read, fingerprint)
