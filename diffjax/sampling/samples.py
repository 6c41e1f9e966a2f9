"""Files of generated images: npz in the ADM layout, beside it a json (how they were made) and a png (a grid)."""

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from einops import rearrange
from PIL import Image, ImageDraw, ImageFont

from diffjax.errors import UserError
from diffjax.evaluation.pixels import to_rgb
from diffjax.files import NO_LABELS, Blocks, atomic, read_npz, read_protocol, write_npz, write_protocol

ROUNDING = "truncate(clip(127.5 x + 128, 0, 255))"  # DiT's rule, half up; ADM's is half a grey level darker

GRID_IMAGES = 100  # at most, in a grid
GRID_SIDE = 64  # smaller images are enlarged to about this many pixels
GRID_CLASSES = 20  # more classes have no columns of their own
TITLE = 16  # height of the names of the columns, in pixels


class NotFiniteError(UserError, FloatingPointError):
    """Samples that are not finite: the model or its weights are not."""


def check_finite(values: np.ndarray, numbers: np.ndarray) -> None:
    """NotFiniteError that names the first of the samples [n, ...], numbers [n], with a value that is not finite."""
    finite = np.isfinite(values)
    if not finite.all():
        bad = np.flatnonzero(~finite.reshape(len(values), -1).all(axis=1))
        raise NotFiniteError(
            f"sample {numbers[bad[0]]}{f' and {len(bad) - 1} more' if len(bad) > 1 else ''}: {np.sum(~finite)} of "
            f"{values.size} sampled values are not finite; other weights, a later checkpoint or more steps may help"
        )


def to_uint8(images: np.ndarray) -> np.ndarray:
    """Images float [n, ...] in [-1, 1] -> uint8 by the rule ROUNDING. NotFiniteError when a value is not finite."""
    check_finite(images, np.arange(len(images)))
    return np.clip(127.5 * np.asarray(images, np.float32) + 128, 0, 255).astype(np.uint8)


class Classes(NamedTuple):
    """The classes of the columns of a grid.

    Attributes:
        labels: integers [n], of the images.
        names: of the classes by label; () where they have none.
    """

    labels: np.ndarray
    names: Sequence[str] = ()

    def name(self, label: int) -> str:
        return self.names[label] if label < len(self.names) else str(label)


def grid(images: np.ndarray, classes: Classes | None = None, columns: int = 0) -> np.ndarray:
    """The first images of uint8 [n, h, w, 1 or 3] in one picture, uint8 [h', w', 3], on white.

    Row by row in so many columns, by default a square; of some classes, not more than GRID_CLASSES, one class per
    column under its name.
    """
    images = to_rgb(images[:GRID_IMAGES])
    scale = max(1, GRID_SIDE // images.shape[1])
    images = images.repeat(scale, axis=1).repeat(scale, axis=2)
    images = np.pad(images, ((0, 0), (1, 1), (1, 1), (0, 0)), constant_values=255)
    found = np.unique(classes.labels[: len(images)]) if classes else ()
    if classes is None or not 1 < len(found) <= GRID_CLASSES:
        return _rows(images, columns or math.ceil(math.sqrt(len(images))))
    longest = math.ceil(math.sqrt(GRID_IMAGES))
    stacks = [images[classes.labels[: len(images)] == label][:longest] for label in found]
    rows = max(map(len, stacks))
    filled = [_filled(stack, rows) for stack in stacks]
    titles = np.concatenate([_title(classes.name(int(label)), images.shape[2]) for label in found], axis=1)
    return np.concatenate([titles, _rows(np.stack(filled, axis=1).reshape(-1, *images.shape[1:]), len(found))])


def _rows(images: np.ndarray, columns: int) -> np.ndarray:
    """Images [n, h, w, 3] row by row in so many columns, the rest white."""
    rows = math.ceil(len(images) / columns)
    return rearrange(_filled(images, rows * columns), "(rows columns) h w c -> (rows h) (columns w) c", rows=rows)


def _filled(images: np.ndarray, count: int) -> np.ndarray:
    """Images [n, h, w, 3], and white ones up to `count`."""
    return np.pad(images, ((0, count - len(images)), (0, 0), (0, 0), (0, 0)), constant_values=255)


def _title(name: str, width: int) -> np.ndarray:
    """A name on white, smaller or cut where it does not fit, uint8 [TITLE, width, 3]."""
    picture = Image.new("RGB", (width, TITLE), "white")
    fonts = [ImageFont.load_default(size) for size in range(TITLE * 3 // 4, TITLE // 2 - 1, -1)]
    font = next((each for each in fonts if each.getlength(name) < width - 2), fonts[-1])
    left = max(1.0, (width - font.getlength(name)) / 2)
    ImageDraw.Draw(picture).text((left, TITLE / 2), name, fill="black", font=font, anchor="lm")
    return np.asarray(picture)


def write_png(path: Path, picture: np.ndarray, owner: str = "file") -> None:
    """Write a picture uint8 [h, w, 3]."""
    with atomic(path, owner) as file:
        Image.fromarray(picture).save(file, format="png")


def write_samples(
    path: Path,
    images: np.ndarray | Blocks,
    labels: np.ndarray,
    protocol: Mapping[str, Any],
    *,
    more: Mapping[str, np.ndarray] = {},
    shown: np.ndarray | None = None,
    classes: Classes | None = None,
    owner: str = "file",
) -> None:
    """Write `path` (.npz: arr_0 uint8 [n, h, w, 3], arr_1 int32 [n]), and beside it the .json and the .png.

    Args:
        images: uint8 [n, h, w, 1 or 3]; grey is repeated. Of blocks, uint8 [n, h, w, 3], `shown` are the first.
        labels: integers [n].
        protocol: json-able, how the images were made; the hash of the npz file is stored with it.
        more: further arrays of the npz.
        classes: see `grid`.
    """
    path = Path(path)
    if path.suffix != ".npz":
        raise UserError(f"{path}: a samples file ends in .npz")
    if not isinstance(images, Blocks):
        images = shown = to_rgb(np.asarray(images))
    assert shown is not None
    if problem := _problem(images, np.asarray(labels)):
        raise UserError(f"{path}: {problem}")
    path.parent.mkdir(parents=True, exist_ok=True)
    write_npz(path, {"arr_0": images, "arr_1": np.asarray(labels).astype(np.int32), **more}, owner)
    write_protocol(path, protocol, owner)
    write_png(path.with_suffix(".png"), grid(shown, classes), owner)


def read_samples(path: Path) -> tuple[np.ndarray, np.ndarray | None, dict[str, Any]]:
    """(images uint8 [n, h, w, 3], labels int32 [n] or None, protocol) of a samples file; {} when it has no json beside.

    Files of others may have no labels; those of `sample` have them, which say nothing of a model without classes.

    Raises UserError when the file is missing, damaged or of another layout, or the json is that of another file.
    """
    path = Path(path)
    if not path.is_file():
        raise UserError(f"{path}: no such samples file; `python -m diffjax sample --out={path}` writes one")
    found = read_npz(path, ("arr_0", "arr_1"), "a samples file", optional=("arr_1",))
    images, labels = found["arr_0"], found.get("arr_1")
    if problem := _problem(images, labels):
        raise UserError(f"{path}: {problem}")
    protocol = read_protocol(path)
    if labels is None or protocol.get("labels") == NO_LABELS:
        return images, None, protocol
    return images, labels.astype(np.int32), protocol


def _problem(images: np.ndarray | Blocks, labels: np.ndarray | None) -> str | None:
    if images.dtype != np.uint8 or len(images.shape) != 4 or images.shape[-1] != 3 or 0 in images.shape:
        return f"arr_0 is {images.dtype} {list(images.shape)}, expected uint8 [n, h, w, 3]"
    if labels is not None and (not np.issubdtype(labels.dtype, np.integer) or labels.shape != images.shape[:1]):
        return f"arr_1 is {labels.dtype} {list(labels.shape)}, expected integers [{images.shape[0]}]"
    return None
