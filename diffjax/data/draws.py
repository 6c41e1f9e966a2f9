"""Random numbers on the host as pure functions of (seed, stream name, position).

Philox is counter-based: key = (seed, crc32(stream)), counter = where in the stream. Any position is reached at once,
so nothing has to be saved or replayed. Only raw 64-bit words are used: numpy guarantees these to stay the same over its
versions, which it does not for its distributions.
"""

import zlib

import numpy as np


def philox(seed: int, stream: str, *, block: int = 0, counter: int = 0) -> np.random.Philox:
    """The generator of `stream` under `seed`. Blocks never overlap; within one, four words belong to each counter."""
    key = np.array([seed % 2**64, zlib.crc32(stream.encode())], np.uint64)
    return np.random.Philox(key=key, counter=np.array([counter, 0, 0, block], np.uint64))


def permutation(seed: int, stream: str, block: int, length: int) -> np.ndarray:
    """The `block`-th random order of 0 .. length - 1, int64 [length]."""
    return np.argsort(philox(seed, stream, block=block).random_raw(length), kind="stable")


def coins(seed: int, stream: str, first: int, count: int) -> np.ndarray:
    """Fair coins of the positions first .. first + count - 1, bool [count]."""
    words = philox(seed, stream, counter=first).random_raw(4 * count)[::4]
    return (words >> np.uint64(63)).astype(bool)
