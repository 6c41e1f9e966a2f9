"""The Frechet (2-Wasserstein) distance between two Gaussians (Dowson and Landau 1982), in float64.

    d^2 = |m_a - m_b|^2 + tr A + tr B - 2 tr (A^1/2 B A^1/2)^1/2

The matrix under the last root is symmetric, so symmetric eigenvalues give its trace. That stays accurate for singular
covariances (fewer images than features), where the general square root of A B returns complex noise.

The last trace is also the sum of the singular values of F G^T for any F^T F = A, G^T G = B: with F and G the centred
features, an [n, m] problem instead of [d, d].
"""

import numpy as np


def distance(mean_a: np.ndarray, covariance_a: np.ndarray, mean_b: np.ndarray, covariance_b: np.ndarray) -> float:
    """d^2 of means [d] and covariances [d, d]; what the literature reports as Frechet distance. Never negative."""
    values, vectors = np.linalg.eigh(np.asarray(covariance_a, np.float64))
    root = (vectors * np.sqrt(np.maximum(values, 0))) @ vectors.T
    product = root @ covariance_b @ root
    overlap = np.sqrt(np.maximum(np.linalg.eigvalsh((product + product.T) / 2), 0)).sum()
    difference = np.asarray(mean_a, np.float64) - mean_b
    squared = difference @ difference + np.trace(covariance_a) + np.trace(covariance_b) - 2 * overlap
    return max(float(squared), 0.0)  # equal Gaussians give rounding of either sign


def distance_of_samples(a: np.ndarray, b: np.ndarray) -> float:
    """`distance` of the Gaussians fitted to features [n, d] and [m, d]; the faster way where n + m < d."""
    means = [np.asarray(features, np.float64).mean(axis=0) for features in (a, b)]
    factors = [(features - mean) / np.sqrt(len(features) - 1) for features, mean in zip((a, b), means)]
    overlap = np.linalg.svd(factors[0] @ factors[1].T, compute_uv=False).sum()
    traces = sum(np.square(factor).sum() for factor in factors)
    return max(float(np.square(means[0] - means[1]).sum() + traces - 2 * overlap), 0.0)
