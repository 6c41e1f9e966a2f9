"""The random numbers of faiss: words of a 32-bit Mersenne Twister, and the draws made from them.

Numpy's RandomState is the same generator, and its stream of words is frozen by numpy's compatibility policy.
"""

import numpy as np

SPLIT_SEED = 1234


def perm(n: int, seed: int, count: int | None = None) -> np.ndarray:
    """The first `count` entries (default: all) of faiss's random order of 0 .. n - 1, int64.

    That is a shuffle: for i = 0, 1, ... entry i changes places with entry t_i = i + raw_i mod (n - i), where raw are
    the words of the Mersenne Twister. Without a loop: the entry that step i moves away from its own place is i, or
    came there from the place of the last earlier step that went to i, and so on back; what step i gets is t_i, or what
    the last earlier step that went there left.
    """
    steps = np.arange(n if count is None else count)
    target = steps + _words(np.random.RandomState(seed), len(steps)) % (n - steps)
    order = np.argsort(target, kind="stable")
    again = target[order[1:]] == target[order[:-1]]
    before = np.full(len(steps), -1)  # the last earlier step that went to the same place
    before[order[1:][again]] = order[:-1][again]

    source = steps.copy()  # the last earlier step that went to this step's place
    earlier = order[(target[order] > order) & (target[order] < len(steps))]
    source[target[earlier]] = earlier  # ascending for each place, and the last one stays
    while not np.array_equal(source, source[source]):
        source = source[source]
    return np.where(before >= 0, source[before], target)


def _words(stream: np.random.RandomState, count: int) -> np.ndarray:
    """The next words of a Mersenne Twister, uint32 [count]."""
    return stream.randint(0, 2**32, count, dtype=np.uint32)


def split_empty(centroids: np.ndarray, counts: np.ndarray, n: int) -> np.ndarray:
    """Give every empty cluster half of another one, in the order of their indices.

    Donors are asked in turn, from cluster 0 on, and j agrees with probability (count_j - 1) / (n - k). Both then sit
    at the donor's centroid times 1 +- 2^-10, with opposite signs and alternating over the coordinates.

    Args:
        centroids: float32 [k, d]. counts: integers [k], how many of the n points each has.
    """
    k, d = centroids.shape
    centroids, sizes = centroids.copy(), counts.astype(np.float32)
    stream, draws = np.random.RandomState(SPLIT_SEED), np.empty(0, np.float32)
    sign = np.where(np.arange(d) % 2 == 0, 1, -1).astype(np.float32) / 1024
    for empty in np.flatnonzero(counts == 0):
        chances = (sizes - 1) / np.float32(max(n - k, 1))  # n = k: any cluster of two or more
        agree = np.empty(0, np.int64)
        while not len(agree):
            draws = np.append(draws, _words(stream, max(k - len(draws), 0)).astype(np.float32) / np.float32(2**32 - 1))
            agree = np.flatnonzero(draws[:k] < chances)
            draws = draws[agree[0] + 1 if len(agree) else k :]
        donor = agree[0]
        centroids[empty], centroids[donor] = centroids[donor] * (1 + sign), centroids[donor] * (1 - sign)
        sizes[empty] = sizes[donor] / 2
        sizes[donor] -= sizes[empty]
    return centroids
