"""Mean and covariance of features in float64, gathered in parts that can be merged in any grouping.

    n = n_a + n_b,   d = m_b - m_a
    m = m_a + d n_b / n,   S = S_a + S_b + d d^T n_a n_b / n            (Chan, Golub, LeVeque 1979)

with S the scatter, the sum of (x - m)(x - m)^T. No rows, n = 0, are the identity of the merge. The one-pass form
sum(x x^T) - n m m^T would cancel.
"""

import functools
from dataclasses import dataclass

import numpy as np

from diffjax.errors import UserError


@dataclass(frozen=True)
class Statistics:
    count: int
    mean: np.ndarray  # float64 [d]
    scatter: np.ndarray  # float64 [d, d]

    @property
    def covariance(self) -> np.ndarray:
        """float64 [d, d], unbiased (divided by count - 1); UserError for fewer than two rows."""
        if self.count < 2:
            raise UserError(f"the covariance of {self.count} images is undefined; score at least 2")
        return self.scatter / (self.count - 1)


def of(features: np.ndarray, block: int = 4096) -> Statistics:
    """The statistics of features [n, d] of any real dtype, of which `block` rows at a time are converted to float64."""
    starts = range(block, len(features), block)
    parts = (_of_block(features[start : start + block]) for start in starts)
    return functools.reduce(merge, parts, _of_block(features[:block]))


def _of_block(features: np.ndarray) -> Statistics:
    features = np.asarray(features, np.float64)
    if not len(features):
        d = features.shape[1]
        return Statistics(0, np.zeros(d), np.zeros((d, d)))
    mean = features.mean(axis=0)
    centred = features - mean
    return Statistics(len(features), mean, centred.T @ centred)


def merge(a: Statistics, b: Statistics) -> Statistics:
    """The statistics of both sets together; those of no rows are the identity."""
    if not a.count or not b.count:
        return a if a.count else b
    count = a.count + b.count
    difference = b.mean - a.mean
    mean = a.mean + difference * (b.count / count)
    scatter = a.scatter + b.scatter + np.outer(difference, difference) * (a.count * b.count / count)
    return Statistics(count, mean, scatter)
