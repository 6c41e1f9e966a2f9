"""Statistics against numpy, the Frechet distance against scipy and closed forms, singular covariances included."""

import functools

import numpy as np
import pytest
import scipy.linalg

from diffjax.errors import UserError
from diffjax.evaluation import frechet, statistics

rng = np.random.default_rng(0)


def covariance(d: int, rank: int | None = None) -> np.ndarray:
    factor = rng.standard_normal((d, rank or 2 * d))
    return factor @ factor.T / factor.shape[1]


def gather(blocks):
    return functools.reduce(statistics.merge, map(statistics.of, blocks))


def test_statistics_of_blocks():
    features = (3.0 + rng.standard_normal((1000, 7)) * [1, 10, 100, 1, 0, 1, 1]).astype(np.float32)
    blocks = np.split(features, [1, 400, 401, 900])
    gathered = gather(blocks)
    grouped = statistics.merge(gather(blocks[3:]), gather(blocks[:3]))
    for found in (gathered, grouped):
        assert found.count == 1000
        assert found.mean.dtype == found.covariance.dtype == np.float64
        np.testing.assert_allclose(found.mean, features.astype(np.float64).mean(axis=0), rtol=1e-13)
        np.testing.assert_allclose(found.covariance, np.cov(features.T.astype(np.float64)), rtol=1e-11, atol=1e-12)


def test_statistics_far_from_zero():
    """Mean 1e8 and variance 1: the sum of squares minus the square of the sum would lose every digit."""
    features = 1e8 + rng.standard_normal((500, 3))
    found = gather(np.split(features, 5))
    np.testing.assert_allclose(found.covariance, np.cov(features.T), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("seed", range(8))
def test_statistics_of_any_partition(seed):
    """Empty shards and shards of one row included, merged in any order and grouping."""
    r = np.random.default_rng(seed)
    n, d = int(r.integers(2, 200)), int(r.integers(1, 9))
    features = 1 + r.standard_normal((n, d))
    cuts = np.sort(r.integers(0, n + 1, size=r.integers(0, 12)))  # repeated ones give empty shards
    shards = [statistics.of(shard) for shard in np.split(features, [*cuts, n - 1])]
    while len(shards) > 1:
        i, j = r.choice(len(shards), 2, replace=False)
        merged = statistics.merge(shards[i], shards[j])
        shards = [shard for k, shard in enumerate(shards) if k not in (i, j)] + [merged]
    whole = statistics.of(features, block=int(r.integers(1, n + 2)))
    for found in (shards[0], whole):
        assert found.count == n
        np.testing.assert_allclose(found.mean, features.mean(axis=0), rtol=1e-9, atol=1e-12)
        np.testing.assert_allclose(found.covariance, np.atleast_2d(np.cov(features.T)), rtol=1e-9, atol=1e-12)


def test_no_rows_are_the_identity():
    empty, some = statistics.of(np.zeros((0, 3), np.float32)), statistics.of(rng.standard_normal((5, 3)))
    assert statistics.merge(empty, some) is statistics.merge(some, empty) is some
    assert (empty.count, empty.mean.shape, empty.scatter.shape) == (0, (3,), (3, 3))
    assert statistics.merge(empty, empty).count == 0
    with pytest.raises(UserError, match="covariance of 0 images is undefined"):
        _ = empty.covariance


def test_one_image_has_no_covariance():
    with pytest.raises(UserError, match="covariance of 1 images is undefined"):
        _ = statistics.of(np.zeros((1, 3))).covariance


@pytest.mark.parametrize("d", [1, 5, 64])
def test_distance_against_scipy(d):
    mean_a, mean_b, a, b = rng.standard_normal(d), rng.standard_normal(d), covariance(d), 3 * covariance(d)
    root = scipy.linalg.sqrtm(a @ b).real
    expected = np.sum((mean_a - mean_b) ** 2) + np.trace(a + b - 2 * root)
    np.testing.assert_allclose(frechet.distance(mean_a, a, mean_b, b), expected, rtol=1e-10)
    np.testing.assert_allclose(frechet.distance(mean_b, b, mean_a, a), expected, rtol=1e-10)


def test_distance_of_commuting_gaussians():
    """Diagonal covariances: |m_a - m_b|^2 + sum (sqrt a - sqrt b)^2; two of the variances are zero."""
    a, b = np.array([4.0, 9, 0, 1, 0]), np.array([1.0, 25, 16, 1, 0])
    mean = np.array([1.0, 0, 0, 0, 2])
    expected = 5 + np.sum((np.sqrt(a) - np.sqrt(b)) ** 2)
    np.testing.assert_allclose(frechet.distance(mean, np.diag(a), 0 * mean, np.diag(b)), expected, rtol=1e-12)


def test_distance_of_singular_gaussians():
    """Rank 10 of 60 in disjoint subspaces: the overlap is zero; in the same subspace it is that of the small ones."""
    basis, _ = np.linalg.qr(rng.standard_normal((60, 60)))
    a, b = covariance(10), covariance(10)
    wide_a, same = basis[:, :10] @ a @ basis[:, :10].T, basis[:, :10] @ b @ basis[:, :10].T
    other = basis[:, 10:20] @ b @ basis[:, 10:20].T
    zero = np.zeros(60)
    np.testing.assert_allclose(frechet.distance(zero, wide_a, zero, other), np.trace(a) + np.trace(b), rtol=1e-12)
    narrow = frechet.distance(np.zeros(10), a, np.zeros(10), b)
    np.testing.assert_allclose(frechet.distance(zero, wide_a, zero, same), narrow, rtol=1e-12)


@pytest.mark.parametrize("rank", [None, 10])
def test_distance_to_itself(rank):
    a = covariance(60, rank)
    assert abs(frechet.distance(np.ones(60), a, np.ones(60), a)) < 1e-12 * np.trace(a)


@pytest.mark.parametrize("n, m, d", [(20, 30, 100), (300, 50, 7), (2, 3, 40)])
def test_distance_of_samples_is_that_of_their_statistics(n, m, d):
    a, b = 5 + rng.standard_normal((n, d)), 2 * rng.standard_normal((m, d)) + np.arange(d)
    fitted = [value for found in map(statistics.of, (a, b)) for value in (found.mean, found.covariance)]
    np.testing.assert_allclose(frechet.distance_of_samples(a, b), frechet.distance(*fitted), rtol=1e-10)


def test_distance_of_a_wide_spectrum():
    """Variances from 1e1 to 1e-9 in a common basis, where the distance has a closed form."""
    basis, _ = np.linalg.qr(rng.standard_normal((100, 100)))
    a = 10.0 ** np.linspace(1, -9, 100)
    for b in (a[::-1], 2 * a):
        found = frechet.distance(np.zeros(100), (basis * a) @ basis.T, np.zeros(100), (basis * b) @ basis.T)
        np.testing.assert_allclose(found, np.square(np.sqrt(a) - np.sqrt(b)).sum(), rtol=1e-11)


@pytest.mark.parametrize("rank_a, rank_b", [(None, None), (None, 10), (10, None), (10, 20), (20, 10)])
def test_transport(rank_a, rank_b):
    """T maps a to b where a has variance in all directions of b, and tr(T A) is the trace of the distance anyway."""
    a, b, mean = covariance(30, rank_a), 2 * covariance(30, rank_b), np.ones(30)
    squared, transport = frechet.distance_and_transport(mean, a, 0 * mean, b)
    np.testing.assert_allclose(squared, frechet.distance(mean, a, 0 * mean, b), rtol=1e-12)
    np.testing.assert_allclose(30 + np.trace(a + b) - 2 * np.trace(transport @ a), squared, rtol=1e-9)
    np.testing.assert_allclose(transport, transport.T, atol=1e-12)
    if rank_a is None:
        np.testing.assert_allclose(transport @ a @ transport, b, atol=1e-9)


def test_distance_to_a_point():
    a = covariance(5)
    point = np.zeros((5, 5))
    np.testing.assert_allclose(frechet.distance(np.ones(5), a, np.zeros(5), point), 5 + np.trace(a), rtol=1e-12)
    assert frechet.distance(np.ones(5), point, np.zeros(5), point) == 5


def test_both_ways_to_the_distance_agree():
    r = np.random.default_rng(0)
    a, b = r.standard_normal((30, 40)), 1 + r.standard_normal((25, 40))
    expected = frechet.distance_of_samples(a, b)
    np.testing.assert_allclose(frechet.distance_of_features(a, b), expected, rtol=1e-9)
    np.testing.assert_allclose(
        frechet.distance_of_features(a[:15], b[:10]), frechet.distance_of_samples(a[:15], b[:10])
    )


@pytest.mark.parametrize("covariance", [[[1.0, 2.0], [2.0, 1.0]], [[-1.0, 0.0], [0.0, 1.0]]])
def test_what_is_no_covariance_is_refused(covariance):
    with pytest.raises(UserError, match="a covariance of 2 features is not positive semi-definite"):
        frechet.distance(np.zeros(2), np.eye(2), np.zeros(2), np.array(covariance))
