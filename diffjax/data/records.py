"""One record per latent: a header of twelve bytes and the raw float16 moments.

header (little-endian): magic "DJXL", version uint16, views uint16, label int32
body: views x (mean, std) x [h, w, c]; the second view, if there is one, is the encoding of the mirrored image.

A flipped latent is not the encoding of the flipped image, hence the second view. The standard deviation is stored, not
the logarithm of the variance, so that a sample is mean + std * eps. float16 keeps ten bits of the mantissa.
"""

import struct

import numpy as np

from diffjax.errors import UserError

HEADER = struct.Struct("<4sHHi")
MAGIC, VERSION = b"DJXL", 1


def encode(moments: np.ndarray, label: int) -> bytes:
    """The record of moments [views, 2, h, w, c], views 1 or 2. `UserError` for what float16 cannot hold."""
    with np.errstate(over="ignore"):
        stored = moments.astype("<f2")
    if not np.isfinite(stored).all():
        raise UserError(f"latent moments must be finite and within +-65504; found {np.abs(moments).max()}")
    return HEADER.pack(MAGIC, VERSION, len(moments), label) + stored.tobytes()


def decode(record: bytes, shape: tuple[int, int, int]) -> tuple[np.ndarray, int]:
    """The moments float32 [views, 2, *shape] and the label of a record. `UserError` when it is not one."""
    magic, version, views, label = HEADER.unpack_from(record)
    expected = HEADER.size + views * 2 * int(np.prod(shape)) * 2
    if (magic, version) != (MAGIC, VERSION) or len(record) != expected:
        raise UserError(
            f"not a latent record of version {VERSION} and shape {shape}: starts with {magic!r}, version {version}, "
            f"{len(record)} bytes where {expected} are expected"
        )
    stored = np.frombuffer(record, "<f2", offset=HEADER.size)
    return stored.astype(np.float32).reshape(views, 2, *shape), label
