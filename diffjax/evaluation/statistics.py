"""Mean and covariance of features in float64, gathered in parts that can be merged in any grouping.

    n = n_a + n_b,   d = m_b - m_a
    m = m_a + d n_b / n,   S = S_a + S_b + d d^T n_a n_b / n            (Chan, Golub, LeVeque 1979)

with S the scatter, the sum of (x - m)(x - m)^T. The one-pass form sum(x x^T) - n m m^T would cancel.
"""

import functools
from collections.abc import Iterable
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
        """float64 [d, d], unbiased (divided by count - 1); UserError for a single row."""
        if self.count < 2:
            raise UserError(f"the covariance of {self.count} images is undefined; score at least 2")
        return self.scatter / (self.count - 1)


def of(features: np.ndarray) -> Statistics:
    """The statistics of features [n, d] of any real dtype, n > 0."""
    features = np.asarray(features, np.float64)
    mean = features.mean(axis=0)
    centred = features - mean
    return Statistics(len(features), mean, centred.T @ centred)


def merge(a: Statistics, b: Statistics) -> Statistics:
    """The statistics of both sets together."""
    count = a.count + b.count
    difference = b.mean - a.mean
    mean = a.mean + difference * (b.count / count)
    scatter = a.scatter + b.scatter + np.outer(difference, difference) * (a.count * b.count / count)
    return Statistics(count, mean, scatter)


def gather(blocks: Iterable[np.ndarray]) -> Statistics:
    """The statistics of all rows of the blocks [n_i, d], of which only one is in memory at a time."""
    return functools.reduce(merge, map(of, blocks))
