"""Examples held in memory, and npz files of images, conditions and auxiliary arrays."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from diffjax.contracts import Condition
from diffjax.errors import UserError
from diffjax.files import read_npz


@dataclass(frozen=True)
class ArrayExamples:
    """Images uint8 [n, h, w, c], labels [n], tokens [n, m] or vectors [n, k], and auxiliary arrays [n, ...] by name."""

    images: np.ndarray
    labels: np.ndarray
    aux: Mapping[str, np.ndarray] = field(default_factory=dict)

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> dict[str, Any]:
        aux = {name: array[index] for name, array in self.aux.items()}
        return {"image": self.images[index], "label": self.labels[index], "aux": aux}


def read_arrays(path: Path) -> dict[str, np.ndarray]:
    """The arrays of an npz file, all of one length, among them images. UserError for anything else."""
    if not path.is_file():
        raise UserError(f"{path}: no such file; data.name = 'arrays' reads images, conditions and more from it")
    stored = read_npz(path)
    images = stored.get("images")
    if images is None or images.dtype != np.uint8 or images.ndim != 4 or images.shape[1] != images.shape[2]:
        found = "none" if images is None else f"{images.dtype} {list(images.shape)}"
        raise UserError(f"{path}: images: {found}; valid: uint8 [n, h, h, c]")
    if wrong := [name for name, array in stored.items() if array.ndim < 1 or len(array) != len(images)]:
        raise UserError(f"{path}: {', '.join(wrong)}: not as many as the {len(images)} images")
    if wrong := [name for name, array in stored.items() if array.dtype.kind not in "biuf"]:
        raise UserError(f"{path}: {wrong[0]}: {stored[wrong[0]].dtype}; valid: numbers, true and false")
    if wrong := [name for name, array in stored.items() if name != "conditions" and not np.isfinite(array).all()]:
        raise UserError(f"{path}: {wrong[0]}: not all values are finite")
    if wrong := [name for name, array in stored.items() if name.startswith("image") and array.ndim < 3]:
        raise UserError(
            f"{path}: {wrong[0]}: {list(stored[wrong[0]].shape)}; valid: [n, h, w] or [n, h, w, ...], since arrays "
            "named image... are mirrored with the images"
        )
    return stored


def check_conditions(path: Path, found: np.ndarray | None, count: int, expected: Condition | None) -> np.ndarray:
    """The conditions [n, ...] of a file in the dtype of `expected`; zeros for none. UserError when they are others."""
    if expected is None:
        return np.zeros(count, np.int32)
    kind = np.floating if expected.kind == "vectors" else np.integer
    described = "none" if found is None else f"{found.dtype} {list(found.shape)}"
    if found is None or not np.issubdtype(found.dtype, kind) or found.shape[1:] != expected.shape:
        shape = [count, *expected.shape]
        raise UserError(f"{path}: conditions: {described}; the config says {expected.kind} {shape}")
    if expected.count and len(found) and (found.min() < 0 or found.max() >= expected.count):
        raise UserError(f"{path}: conditions from {found.min()} to {found.max()}; valid: 0 to {expected.count - 1}")
    with np.errstate(over="ignore"):
        converted = found.astype(expected.dtype)
    if not np.isfinite(converted).all():
        raise UserError(f"{path}: conditions are not all finite numbers of float32")
    return converted
