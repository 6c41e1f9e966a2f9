"""The Frechet (2-Wasserstein) distance between two Gaussians (Dowson and Landau 1982), in float64.

    d^2 = |m_a - m_b|^2 + tr A + tr B - 2 tr (A^1/2 B A^1/2)^1/2

With any factors F^T F = A and G^T G = B the last trace is the sum of the singular values of F G^T. That stays accurate
for singular covariances (fewer images than features), where the square root of the matrix A B returns complex noise.
"""

import numpy as np

from diffjax.evaluation import statistics


def distance(mean_a: np.ndarray, covariance_a: np.ndarray, mean_b: np.ndarray, covariance_b: np.ndarray) -> float:
    """d^2 of means [d] and covariances [d, d]; what the literature reports as Frechet distance. Never negative."""
    return _distance(mean_a, _factor(covariance_a), mean_b, _factor(covariance_b))


def distance_of_samples(a: np.ndarray, b: np.ndarray) -> float:
    """`distance` of the Gaussians fitted to features [n, d] and [m, d]; the faster way where n + m < d."""
    means = [np.asarray(features, np.float64).mean(axis=0) for features in (a, b)]
    factors = [(features - mean) / np.sqrt(len(features) - 1) for features, mean in zip((a, b), means)]
    return _distance(means[0], factors[0], means[1], factors[1])


def distance_of_features(a: np.ndarray, b: np.ndarray) -> float:
    """`distance` of the Gaussians fitted to features [n, d] and [m, d], by the faster of two equal ways."""
    if len(a) + len(b) < a.shape[1]:
        return distance_of_samples(a, b)
    found, reference = statistics.of(a), statistics.of(b)
    return distance(found.mean, found.covariance, reference.mean, reference.covariance)


def _distance(mean_a: np.ndarray, factor_a: np.ndarray, mean_b: np.ndarray, factor_b: np.ndarray) -> float:
    overlap = np.linalg.svd(factor_a @ factor_b.T, compute_uv=False).sum()
    shift = np.square(np.asarray(mean_a, np.float64) - mean_b).sum()
    squared = shift + np.square(factor_a).sum() + np.square(factor_b).sum() - 2 * overlap
    return max(float(squared), 0.0)  # equal Gaussians give rounding of either sign


def _factor(covariance: np.ndarray) -> np.ndarray:
    """F [rank, d] with F^T F = covariance; eigenvalues within rounding of zero are zero."""
    values, vectors = np.linalg.eigh(np.asarray(covariance, np.float64))
    kept = values > len(values) * np.finfo(np.float64).eps * values[-1]
    return np.sqrt(values[kept])[:, None] * vectors[:, kept].T
