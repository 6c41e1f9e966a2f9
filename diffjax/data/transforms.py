"""Decoding of image files, and the resize and crop rules of published data sets, to the byte.

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


def resized(image: Image.Image, size: tuple[int, int], filter: Image.Resampling) -> Image.Image:
    """`image` in another (width, height), whatever its aspect, by a filter of Pillow; see the module docstring."""
    return image.resize((size[0], image.height), filter).resize(size, filter)


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
        image = resized(image, halved, Image.Resampling.BOX)
    image = resized(image, last, Image.Resampling.BICUBIC)
    return _pixels(_square(image, *adm_offset(*last, size), size))


Rule = Callable[[Image.Image, int], np.ndarray]  # an image "RGB" or "L", a size -> uint8 [size, size, channels]


def edm_center_crop(image: Image.Image, size: int) -> np.ndarray:
    """The central square of `image`, resized to uint8 [size, size, channels] by Lanczos in one step (EDM)."""
    side = min(image.size)
    left, top = adm_offset(*image.size, side)
    return _pixels(resized(_square(image, left, top, side), (size, size), Image.Resampling.LANCZOS))


def edm_scale(image: Image.Image, size: int) -> np.ndarray:
    """The whole `image`, whatever its aspect, resized to uint8 [size, size, channels] by Lanczos in one step (EDM)."""
    return _pixels(resized(image, (size, size), Image.Resampling.LANCZOS))


def lsun_box(image: Image.Image, size: int) -> np.ndarray:
    """`image` reduced by a box filter to `size` on its short side, its centre uint8 [size, size, channels].

    As guided-diffusion prepares LSUN: no halvings, sizes rounded half to even.
    """
    scale = size / min(image.size)
    image = resized(image, (round(image.width * scale), round(image.height * scale)), Image.Resampling.BOX)
    return _pixels(_square(image, *adm_offset(*image.size, size), size))


def torchvision_bilinear(image: Image.Image, size: int) -> np.ndarray:
    """The centre of `image` by torchvision's Resize(size) and CenterCrop(size): uint8 [size, size, channels]."""
    return _torchvision(image, size, Image.Resampling.BILINEAR)


def torchvision_bicubic(image: Image.Image, size: int) -> np.ndarray:
    """The same with bicubic interpolation."""
    return _torchvision(image, size, Image.Resampling.BICUBIC)


def _torchvision(image: Image.Image, size: int, filter: Image.Resampling) -> np.ndarray:
    """The long side is truncated to whole pixels, and the offset rounded half to even, unlike those of ADM."""
    short = min(image.size)
    width, height = (int(size * side / short) for side in image.size)
    left, top = round((width - size) / 2), round((height - size) / 2)
    return _pixels(_square(resized(image, (width, height), filter), left, top, size))


CELEBA = (178, 218)  # width and height of an aligned image
CELEBA_CROP = (25, 57, 128)  # left, top, side: 64 pixels to each side of (89, 121)


def celeba_crop(image: Image.Image, size: int) -> np.ndarray:
    """The face of an aligned CelebA image, 128 x 128 pixels, by a bilinear resize to uint8 [size, size, channels].

    As DDIM and U-ViT prepare it. ValueError for an image that is not 178 x 218.
    """
    if image.size != CELEBA:
        raise ValueError(f"{image.width}x{image.height} pixels; an aligned CelebA image has {CELEBA[0]}x{CELEBA[1]}")
    return _pixels(resized(_square(image, *CELEBA_CROP), (size, size), Image.Resampling.BILINEAR))


def unchanged(image: Image.Image, size: int) -> np.ndarray:
    """The pixels of an image that has the size. ValueError for one that has not."""
    if image.size != (size, size):
        raise ValueError(f"{image.width}x{image.height} pixels; valid without a rule: {size}x{size}")
    return _pixels(image)


# Not interchangeable: their results differ by far more than rounding.
RULES: dict[str, Rule] = {
    "adm": adm_center_crop,
    "edm-crop": edm_center_crop,
    "edm-scale": edm_scale,
    "lsun": lsun_box,
    "bilinear": torchvision_bilinear,
    "bicubic": torchvision_bicubic,
    "celeba": celeba_crop,
    "none": unchanged,
}


def _square(image: Image.Image, left: int, top: int, side: int) -> Image.Image:
    return image.crop((left, top, left + side, top + side))


def _pixels(image: Image.Image) -> np.ndarray:
    return np.array(image).reshape(image.height, image.width, -1)
