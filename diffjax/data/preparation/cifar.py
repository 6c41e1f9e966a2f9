"""CIFAR-10 and CIFAR-100 from their archives, the python or the binary version.

binary: records of label bytes (CIFAR-100: coarse, fine) and the planes of an image, uint8 [3, 32, 32]; names in .txt
python: pickles of a dict with `data` uint8 [n, 3072], `labels` or `fine_labels`; names in another pickle. They are read
        by `numpy_pickle`, which refuses all but arrays and plain values.
"""

import tarfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from diffjax import numpy_pickle
from diffjax.data.preparation.containers import reading
from diffjax.data.preparation.originals import Originals, describe, find, index_sha256
from diffjax.errors import UserError

PLANES = 3 * 32 * 32  # bytes of an image
LARGEST = 2**28  # bytes of a file in the archive


@dataclass(frozen=True)
class Version:
    """The layout of an archive: its folder, and in it the files of each split and of the names of classes."""

    archive: str
    folder: str
    files: dict[str, list[str]]
    names: str
    labels: str = ""  # of the python version: the key of the labels
    label_bytes: int = 0  # of the binary version: the last one counts


CIFAR10 = (
    Version(
        "cifar-10-binary.tar.gz",
        "cifar-10-batches-bin",
        {"train": [f"data_batch_{i}.bin" for i in range(1, 6)], "test": ["test_batch.bin"]},
        "batches.meta.txt",
        label_bytes=1,
    ),
    Version(
        "cifar-10-python.tar.gz",
        "cifar-10-batches-py",
        {"train": [f"data_batch_{i}" for i in range(1, 6)], "test": ["test_batch"]},
        "batches.meta",
        labels="labels",
    ),
)
CIFAR100 = (
    Version(
        "cifar-100-binary.tar.gz",
        "cifar-100-binary",
        {"train": ["train.bin"], "test": ["test.bin"]},
        "fine_label_names.txt",
        label_bytes=2,
    ),
    Version(
        "cifar-100-python.tar.gz",
        "cifar-100-python",
        {"train": ["train"], "test": ["test"]},
        "meta",
        labels="fine_labels",
    ),
)
NAMES = {"labels": "label_names", "fine_labels": "fine_label_names"}  # of the classes, by the key of the labels


def read(versions: tuple[Version, ...], path: Path, split: str) -> Originals:
    """The images of an archive, or of the first version whose archive lies in a folder, in their stored order."""
    archives = [version.archive for version in versions]
    if path.is_dir():
        path = find(path, archives, "an archive of CIFAR")
    if path.name not in archives:
        raise UserError(f"{path}: valid: a folder of {' or '.join(archives)}, or that file")
    version = versions[archives.index(path.name)]
    with reading(path), tarfile.open(path, "r:gz") as tar:
        read_file = _binary if version.label_bytes else _python
        parts = [read_file(version, _member(tar, path, version, name), path) for name in version.files[split]]
        classes = _classes(version, _member(tar, path, version, version.names), path)
    images, labels = (np.concatenate(each) for each in zip(*parts))
    if len(labels) and not 0 <= labels.min() <= labels.max() < len(classes):
        raise UserError(f"{path}: labels from {labels.min()} to {labels.max()}, and {len(classes)} names of classes")
    names = [f"{split}_{i:05d}" for i in range(len(labels))]
    return Originals(
        names, labels.astype(np.int32), images.__getitem__, describe([path]), index_sha256(names, labels), classes
    )


def _member(tar: tarfile.TarFile, path: Path, version: Version, name: str) -> bytes:
    try:
        info = tar.getmember(f"{version.folder}/{name}")
    except KeyError as error:
        raise UserError(f"{path} lacks {version.folder}/{name}") from error
    file = tar.extractfile(info) if info.isreg() and info.size <= LARGEST else None
    if file is None:
        raise UserError(f"{path}: {info.name} is no file of at most {LARGEST:,} bytes")
    return file.read()


def _binary(version: Version, data: bytes, path: Path) -> tuple[np.ndarray, np.ndarray]:
    """Images uint8 [n, 32, 32, 3] and labels [n]."""
    size = version.label_bytes + PLANES
    if len(data) % size:
        raise UserError(f"{path}: {len(data)} bytes are no whole number of records of {size}")
    records = np.frombuffer(data, np.uint8).reshape(-1, size)
    return _images(records[:, version.label_bytes :]), records[:, version.label_bytes - 1]


def _python(version: Version, data: bytes, path: Path) -> tuple[np.ndarray, np.ndarray]:
    """The same of a pickle."""
    batch = _unpickle(data, path)
    pixels, labels = batch.get("data"), batch.get(version.labels)
    known = isinstance(labels, list) and all(type(label) is int and 0 <= label < 256 for label in labels)
    if not (known and isinstance(pixels, np.ndarray) and pixels.shape == (len(labels or ()), PLANES)):
        raise UserError(f"{path}: a batch without data [n, {PLANES}] and {version.labels} [n]")
    return _images(pixels), np.array(labels, np.int64)


def _images(planes: np.ndarray) -> np.ndarray:
    return np.ascontiguousarray(planes.reshape(-1, 3, 32, 32).transpose(0, 2, 3, 1))


def _classes(version: Version, data: bytes, path: Path) -> tuple[str, ...]:
    if version.label_bytes:
        return tuple(data.decode().split())
    names = _unpickle(data, path).get(NAMES[version.labels])
    if not isinstance(names, list):
        raise UserError(f"{path}: {version.names} without a list {NAMES[version.labels]}")
    return tuple(name.decode() if isinstance(name, bytes) else str(name) for name in names)


def _unpickle(data: bytes, path: Path) -> dict[str, Any]:
    """The dict in a pickle; bytes as text, arrays as numpy arrays."""
    found = numpy_pickle.load(data, str(path))
    if not isinstance(found, dict):
        raise UserError(f"{path}: a pickle of a {type(found).__name__}; valid: of a dict")
    return {key.decode() if isinstance(key, bytes) else str(key): value for key, value in found.items()}
