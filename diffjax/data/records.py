"""One record per latent: a header of twelve bytes and the raw float16 moments.

header (little-endian): magic "DJXL", version uint16, views uint16, label int32
body: views x (mean, std) x [h, w, c]; the second view, if there is one, is the encoding of the mirrored image.
Version 2 has the image itself behind them: the uint8 pixels [H, W, channels], not mirrored.

A flipped latent is not the encoding of the flipped image, hence the second view. The standard deviation is stored, not
the logarithm of the variance, so that a sample is mean + std * eps. float16 keeps ten bits of the mantissa.
"""

import math
import struct
from collections.abc import Sequence

import numpy as np

from diffjax.errors import UserError

HEADER = struct.Struct("<4sHHi")
MAGIC, VERSION, WITH_IMAGE = b"DJXL", 1, 2


def version(image: Sequence[int] | None) -> int:
    """The version of records with images of that shape; None: without."""
    return WITH_IMAGE if image else VERSION


def encode(moments: np.ndarray, label: int, image: np.ndarray | None = None) -> bytes:
    """The record of moments [views, 2, h, w, c], views 1 or 2, and an image uint8 [H, W, channels] or none.

    `UserError` for moments that float16 cannot hold.
    """
    with np.errstate(over="ignore"):
        stored = moments.astype("<f2")
    if not np.isfinite(stored).all():
        raise UserError(f"latent moments must be finite and within +-65504; found {np.abs(moments).max()}")
    header = HEADER.pack(MAGIC, version(None if image is None else image.shape), len(moments), label)
    return header + stored.tobytes() + (b"" if image is None else image.tobytes())


def decode(record: bytes, shape: Sequence[int], image: Sequence[int] | None = None) -> tuple[np.ndarray, int]:
    """The moments float16 [views, 2, *shape] and the label of a record, behind which lies an image of a shape or none.

    `UserError` when it is not such a record.
    """
    magic, found, views, label = HEADER.unpack_from(record)
    count = views * 2 * math.prod(shape)
    expected = HEADER.size + count * 2 + (math.prod(image) if image else 0)
    if (magic, found) != (MAGIC, version(image)) or len(record) != expected:
        raise UserError(
            f"not a latent record of version {version(image)} and shape {shape}: starts with {magic!r}, version "
            f"{found}, {len(record)} bytes where {expected} are expected"
        )
    stored = np.frombuffer(record, "<f2", count, HEADER.size)
    return stored.reshape(views, 2, *shape), label


def decode_image(record: bytes, image: Sequence[int]) -> np.ndarray:
    """The image uint8 [*image] of a record that `decode` found to have one."""
    return np.frombuffer(record, np.uint8, offset=len(record) - math.prod(image)).reshape(image)
