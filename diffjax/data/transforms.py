"""Decoding of image files, and the ADM centre crop, to the byte as the public ImageNet references were made.

There are two ways to decode. `shown` gives the pixels that a viewer shows on a white page. `stored` gives what the
programs behind the public references saw: transparency is dropped, which uncovers the colours under it, and the
orientation in EXIF is not applied. Both read the first picture of an animation, and neither applies colour profiles.

Pillow rounds each pass of a resize to uint8, so the order of the passes matters; Pillow 13 changed it for tall images.
Every resize here is therefore two resizes of one axis each, the horizontal one first, which gives the same bytes in all
versions.
"""

from collections.abc import Callable
from pathlib import Path
from typing import BinaryIO

import numpy as np
from PIL import Image, ImageOps

MODES = {1: "L", 3: "RGB"}  # channels -> Pillow's name


def shown(file: Path | BinaryIO, channels: int = 3) -> Image.Image:
    """The image in `file` with 1 or 3 channels: turned as EXIF says, transparency on white, 16 bits scaled to 8."""
    with Image.open(file) as opened:
        check_mode(opened.mode, "shown")
        image = _eight_bits(ImageOps.exif_transpose(opened))
        if image.has_transparency_data:
            image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image.convert("RGBA"))
        return image.convert(MODES[channels])


def stored(file: Path | BinaryIO, channels: int = 3) -> Image.Image:
    """The image in `file` with 1 or 3 channels: alpha dropped, palettes expanded, EXIF rotation not applied."""
    with Image.open(file) as image:
        check_mode(image.mode, "stored")
        return image.convert(MODES[channels])


DECODERS: dict[str, Callable[..., Image.Image]] = {"shown": shown, "stored": stored}


def check_mode(mode: str, how: str) -> None:
    """ValueError for a mode of Pillow that the decoder `how` does not take: 32 bits, of which no range says what is
    black and white, and 16 bits where they are not scaled."""
    if mode in ("I", "F"):
        raise ValueError(f"32 bits of grey (Pillow's mode {mode}) have no known range; valid: 8 or 16 bits")
    if how == "stored" and mode.startswith("I;16"):
        raise ValueError("16 bits of grey would all become white; data.decode='shown' scales them to 8")


def _eight_bits(image: Image.Image) -> Image.Image:
    """The image with 8 bits per channel."""
    if not image.mode.startswith("I;16"):
        return image
    values = np.asarray(image)
    grey = Image.fromarray(((values.astype(np.uint32) + 128) // 257).astype(np.uint8))
    if (clear := image.info.get("transparency")) is not None:  # the one value that is transparent
        grey.putalpha(Image.fromarray(np.where(values == clear, 0, 255).astype(np.uint8)))
    return grey


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
