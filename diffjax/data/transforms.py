"""Decoding and the ADM centre crop, to the byte as the public ImageNet references were made.

Pillow rounds each pass of a resize to uint8, so the order of the passes matters; Pillow 13 changed it for tall images.
Every resize here is therefore two resizes of one axis each, the horizontal one first, which gives the same bytes in all
versions.
"""

from pathlib import Path
from typing import BinaryIO

import numpy as np
from PIL import Image

MODES = {1: "L", 3: "RGB"}  # channels -> Pillow's name


def decode(file: Path | BinaryIO, channels: int = 3) -> Image.Image:
    """The image in `file` with 1 or 3 channels: alpha dropped, palettes expanded, EXIF rotation not applied."""
    with Image.open(file) as image:
        return image.convert(MODES[channels])


def adm_sizes(width: int, height: int, size: int) -> list[tuple[int, int]]:
    """The (width, height) that `adm_center_crop` passes through: at the start, after each halving, before the crop.

    Halve, rounding down, while the short side is at least 2 size; then scale by size / short side, rounding half to
    even (guided-diffusion, `center_crop_arr`).
    """
    sizes = [(width, height)]
    while min(sizes[-1]) >= 2 * size:
        sizes.append((sizes[-1][0] // 2, sizes[-1][1] // 2))
    scale = size / min(sizes[-1])
    return [*sizes, (round(sizes[-1][0] * scale), round(sizes[-1][1] * scale))]


def adm_offset(width: int, height: int, size: int) -> tuple[int, int]:
    """The left and top corner of the crop; an odd surplus pixel is lost at the right and the bottom."""
    return (width - size) // 2, (height - size) // 2


def adm_center_crop(image: Image.Image, size: int) -> np.ndarray:
    """The central square of `image` ("RGB" or "L"), reduced or enlarged to uint8 [size, size, channels].

    The halvings are box filters, the last step is bicubic.
    """
    *halvings, last = adm_sizes(*image.size, size)[1:]
    for halved in halvings:
        image = _resize(image, halved, Image.Resampling.BOX)
    image = _resize(image, last, Image.Resampling.BICUBIC)
    left, top = adm_offset(*last, size)
    cropped = image.crop((left, top, left + size, top + size))
    return np.array(cropped).reshape(size, size, -1)


def _resize(image: Image.Image, size: tuple[int, int], filter: Image.Resampling) -> Image.Image:
    return image.resize((size[0], image.height), filter).resize(size, filter)
