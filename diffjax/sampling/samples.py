"""Files of generated images: npz in the ADM layout, beside it a json (how they were made) and a png (a grid)."""

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from einops import rearrange
from PIL import Image

from diffjax.errors import UserError
from diffjax.evaluation.pixels import to_rgb
from diffjax.files import atomic, file_sha256, read_npz, write_json, write_npz

ROUNDING = "truncate(clip(127.5 x + 128, 0, 255))"  # DiT's rule, half up; ADM's is half a grey level darker

GRID_IMAGES = 100  # at most, in a grid
GRID_SIDE = 64  # smaller images are enlarged to about this many pixels


def to_uint8(images: np.ndarray) -> np.ndarray:
    """Images float [..., c] in [-1, 1] -> uint8 by the rule ROUNDING. FloatingPointError when one is not finite."""
    if not np.isfinite(images).all():
        raise FloatingPointError(f"{np.sum(~np.isfinite(images))} of {images.size} sampled values are not finite")
    return np.clip(127.5 * np.asarray(images, np.float32) + 128, 0, 255).astype(np.uint8)


def grid(images: np.ndarray) -> np.ndarray:
    """The first images of uint8 [n, h, w, 1 or 3] row by row in one square picture, uint8 [h', w', 3], on white."""
    images = to_rgb(images[:GRID_IMAGES])
    columns = math.ceil(math.sqrt(len(images)))
    rows = math.ceil(len(images) / columns)
    scale = max(1, GRID_SIDE // images.shape[1])
    images = images.repeat(scale, axis=1).repeat(scale, axis=2)
    images = np.pad(images, ((0, rows * columns - len(images)), (1, 1), (1, 1), (0, 0)), constant_values=255)
    return rearrange(images, "(rows columns) h w c -> (rows h) (columns w) c", rows=rows)


def write_png(path: Path, picture: np.ndarray, owner: str = "file") -> None:
    """Write a picture uint8 [h, w, 3]."""
    with atomic(path, owner) as file:
        Image.fromarray(picture).save(file, format="png")


def write_samples(path: Path, images: np.ndarray, labels: np.ndarray, protocol: Mapping[str, Any]) -> None:
    """Write `path` (.npz: arr_0 uint8 [n, h, w, 3], arr_1 int32 [n]), and beside it the .json and the .png.

    Args:
        images: uint8 [n, h, w, 1 or 3]; grey is repeated.
        labels: integers [n].
        protocol: json-able, how the images were made; the hash of the npz file is stored with it.
    """
    path = Path(path)
    if path.suffix != ".npz":
        raise UserError(f"{path}: a samples file ends in .npz")
    images, labels = to_rgb(np.asarray(images)), np.asarray(labels)
    if problem := _problem(images, labels):
        raise UserError(f"{path}: {problem}")
    path.parent.mkdir(parents=True, exist_ok=True)
    write_npz(path, {"arr_0": images, "arr_1": labels.astype(np.int32)})
    write_protocol(path, protocol)
    write_png(path.with_suffix(".png"), grid(images))


def write_protocol(path: Path, protocol: Mapping[str, Any], owner: str = "file") -> None:
    """Write the .json beside `path`: how its arrays were made, and the hash of the file."""
    write_json(path.with_suffix(".json"), {**protocol, "samples_sha256": file_sha256(path)}, owner)


def read_samples(path: Path) -> tuple[np.ndarray, np.ndarray, dict[str, Any]]:
    """(images uint8 [n, h, w, 3], labels int32 [n], protocol) of a samples file; {} when no json lies beside it.

    Raises UserError when the file is missing, damaged or of another layout, or the json is that of another file.
    """
    path = Path(path)
    if not path.is_file():
        raise UserError(f"{path}: no such samples file; `python -m diffjax sample --out={path}` writes one")
    images, labels = read_npz(path, ("arr_0", "arr_1"), "a samples file").values()
    if problem := _problem(images, labels):
        raise UserError(f"{path}: {problem}")
    return images, labels.astype(np.int32), _read_protocol(path)


def _read_protocol(path: Path) -> dict[str, Any]:
    described = path.with_suffix(".json")
    if not described.exists():
        return {}
    try:
        protocol = json.loads(described.read_text())
    except ValueError as error:
        raise UserError(f"{described}: not json ({error})") from error
    if not isinstance(protocol, dict) or protocol.pop("samples_sha256", None) != file_sha256(path):
        raise UserError(f"{described} does not describe {path.name}: the hash of the file differs; sample again")
    return protocol


def _problem(images: np.ndarray, labels: np.ndarray) -> str | None:
    if images.dtype != np.uint8 or images.ndim != 4 or images.shape[-1] != 3 or 0 in images.shape:
        return f"arr_0 is {images.dtype} {list(images.shape)}, expected uint8 [n, h, w, 3]"
    if not np.issubdtype(labels.dtype, np.integer) or labels.shape != images.shape[:1]:
        return f"arr_1 is {labels.dtype} {list(labels.shape)}, expected integers [{len(images)}]"
    return None
