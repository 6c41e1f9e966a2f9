"""The Frechet (2-Wasserstein) distance between two Gaussians (Dowson and Landau 1982), in float64.

    d^2 = |m_a - m_b|^2 + tr A + tr B - 2 tr (A^1/2 B A^1/2)^1/2                                              (1)

With any factors F F^T = A and G G^T = B the last trace is the sum of the singular values of K = F^T G:

    tr (A^1/2 B A^1/2)^1/2 = sum_i sqrt(l_i),   l = eigenvalues of K K^T, or of K^T K, whichever is smaller   (2)

The factors are Cholesky's with pivoting, which stops at the rank of the covariance. So K has no singular values that
are zero but for rounding (fewer images than features would give them), of which the root would lose half the digits.

The derivative of the trace with respect to A, times two, is the optimal transport map from N(0, A) to N(0, B),

    T = B^1/2 (B^1/2 A B^1/2)^{+1/2} B^1/2 = G V diag(1 / sqrt(l)) V^T G^T,   K^T K = V diag(l) V^T           (3)

The distance of equal Gaussians is zero up to rounding of either sign, and is returned as it is.
"""

import numpy as np
import scipy.linalg

from diffjax.errors import UserError
from diffjax.evaluation import statistics

INDEFINITE = 1e-3  # of the trace, which factors of a covariance give but for rounding, float32's too
EPSILON = np.finfo(np.float64).eps


def distance(mean_a: np.ndarray, covariance_a: np.ndarray, mean_b: np.ndarray, covariance_b: np.ndarray) -> float:
    """d^2 of means [d] and covariances [d, d]; what the literature reports as Frechet distance."""
    factor_a, factor_b = _factor(covariance_a), _factor(covariance_b)
    eigenvalues = np.linalg.eigvalsh(_smaller_gram(factor_a.T @ factor_b))
    return _squared(mean_a, factor_a, mean_b, factor_b, _sum_of_roots(eigenvalues))


def distance_and_transport(
    mean_a: np.ndarray, covariance_a: np.ndarray, mean_b: np.ndarray, covariance_b: np.ndarray
) -> tuple[float, np.ndarray]:
    """`distance`, and T [d, d] of (3), which maps the centred Gaussian a to b; 0 where a has no variance."""
    factor_a, factor_b = _factor(covariance_a), _factor(covariance_b)
    k = factor_a.T @ factor_b
    eigenvalues, vectors = np.linalg.eigh(_smaller_gram(k))
    squared = _squared(mean_a, factor_a, mean_b, factor_b, _sum_of_roots(eigenvalues))
    kept = eigenvalues > len(eigenvalues) * EPSILON * eigenvalues.max(initial=0.0)
    roots, vectors = np.sqrt(eigenvalues[kept]), vectors[:, kept]
    if k.shape[0] < k.shape[1]:  # these are left singular vectors; the right ones follow from K
        vectors = k.T @ vectors / roots
    mapped = factor_b @ vectors
    return squared, (mapped / roots) @ mapped.T


def distance_of_features(a: np.ndarray, b: np.ndarray) -> float:
    """`distance` of the Gaussians fitted to features [n, d] and [m, d] of any real dtype, by the faster of two ways."""
    if len(a) + len(b) < a.shape[1]:
        return distance_of_samples(a, b)
    found, reference = statistics.of(a), statistics.of(b)
    return distance(found.mean, found.covariance, reference.mean, reference.covariance)


def distance_of_samples(a: np.ndarray, b: np.ndarray) -> float:
    """`distance_of_features` without covariances, whose factors the centred features are: for n + m < d."""
    means = [np.asarray(features, np.float64).mean(axis=0) for features in (a, b)]
    factors = [((features - mean) / np.sqrt(len(features) - 1)).T for features, mean in zip((a, b), means)]
    singular = np.linalg.svd(factors[0].T @ factors[1], compute_uv=False)  # the last is zero: centred rows add to 0
    return _squared(means[0], factors[0], means[1], factors[1], float(singular.sum()))


def _squared(
    mean_a: np.ndarray, factor_a: np.ndarray, mean_b: np.ndarray, factor_b: np.ndarray, overlap: float
) -> float:
    """Equation (1), given its last trace."""
    shift = np.square(np.asarray(mean_a, np.float64) - mean_b).sum()
    return float(shift + np.square(factor_a).sum() + np.square(factor_b).sum() - 2 * overlap)


def _factor(covariance: np.ndarray) -> np.ndarray:
    """F [d, rank] with F F^T = covariance; what is left after `rank` pivots is within rounding of zero."""
    covariance = np.asarray(covariance, np.float64)
    packed, pivots, rank, _ = scipy.linalg.lapack.dpstrf(covariance, lower=1)  # pivots count from 1
    factor = np.empty((len(covariance), rank))
    factor[pivots - 1] = np.tril(packed)[:, :rank]
    trace = np.trace(covariance)
    if not abs(np.square(factor).sum() - trace) <= INDEFINITE * abs(trace):
        raise UserError(f"a covariance of {len(covariance)} features is not positive semi-definite; it is damaged")
    return factor


def _smaller_gram(k: np.ndarray) -> np.ndarray:
    return k @ k.T if k.shape[0] < k.shape[1] else k.T @ k


def _sum_of_roots(eigenvalues: np.ndarray) -> float:
    return float(np.sqrt(np.maximum(eigenvalues, 0)).sum())
