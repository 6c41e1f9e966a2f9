"""Resizing of batches for feature networks as Pillow does it, on the host: the rules of dgm-eval, clean-fid and EDM2.

| rule | function |
|---|---|
| dgm-eval's default for DINOv2, EDM2's "pil": bicubic to 224, rounded to uint8 | `pillow` |
| clean-fid, dgm-eval's "clean_resize": every channel apart in float, limited to 0 .. 255 | `pillow_float` |
| EDM2's default, PyTorch's antialiased bicubic: the same, not limited | `pillow_float` with limited=False |
"""

import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import numpy as np
from PIL import Image

from diffjax.data.transforms import resized
from diffjax.errors import UserError

FILTERS = {
    "bicubic": Image.Resampling.BICUBIC,
    "bilinear": Image.Resampling.BILINEAR,
    "box": Image.Resampling.BOX,
    "lanczos": Image.Resampling.LANCZOS,
}


def pillow(images: np.ndarray, side: int, filter: str = "bicubic") -> np.ndarray:
    """uint8 [n, side, side, 3] of images uint8 [n, h, w, 3], bit for bit as Pillow; others than squares are squashed.

    UserError for an unknown filter.
    """
    kind = _filter(filter)

    def one(image: np.ndarray) -> np.ndarray:
        return np.asarray(resized(Image.fromarray(image), (side, side), kind))

    return _each(one, images, np.empty((len(images), side, side, 3), np.uint8))


def pillow_float(images: np.ndarray, side: int, filter: str = "bicubic", limited: bool = True) -> np.ndarray:
    """float32 [n, side, side, 3] of the same images, not rounded.

    limited: to 0 .. 255, which a filter with negative parts leaves at edges.
    """
    kind = _filter(filter)

    def one(image: np.ndarray) -> np.ndarray:
        channels = np.moveaxis(image.astype(np.float32), -1, 0)
        made = [np.asarray(resized(Image.fromarray(np.ascontiguousarray(c)), (side, side), kind)) for c in channels]
        return np.stack(made, axis=-1).clip(*((0, 255) if limited else (None, None)))

    return _each(one, images, np.empty((len(images), side, side, 3), np.float32))


def _filter(name: str) -> Image.Resampling:
    if name not in FILTERS:
        raise UserError(f"filter {name!r} is unknown; valid: {', '.join(FILTERS)}")
    return FILTERS[name]


def _each(one: Callable[[np.ndarray], np.ndarray], images: np.ndarray, out: np.ndarray) -> np.ndarray:
    """`out`, filled by threads; Pillow lets others run while it resizes."""
    if images.dtype != np.uint8 or images.ndim != 4 or images.shape[-1] != 3:
        raise UserError(f"images are {images.dtype} {images.shape}; valid: uint8 [n, h, w, 3]")

    def fill(index: int) -> None:
        out[index] = one(images[index])

    with ThreadPoolExecutor(os.cpu_count()) as threads:
        list(threads.map(fill, range(len(images))))
    return out
