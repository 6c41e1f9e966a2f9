"""Scores: influences against finite differences, intervals against simulation, blocks, and what is rejected."""

import numpy as np
import pytest

from diffjax.errors import UserError
from diffjax.evaluation import frechet, manifolds, scores, statistics

rng = np.random.default_rng(0)
GAUSSIAN = np.zeros(3), np.diag([1.0, 2.0, 0.5])  # the reference of Frechet distances


def drawn(n, r=rng, d=3):
    """Images of a law other than the reference's, where distances are of first order in it."""
    return np.abs(r.standard_normal((n, d))) * [1.5, 0.7, 2.0][:d] + [0.3, 0.0, -0.4][:d]


def weighted_frechet(weights, features):
    mean = weights @ features
    centred = features - mean
    covariance = len(features) / (len(features) - 1) * (weights[:, None] * centred).T @ centred
    return frechet.distance(mean, covariance, *GAUSSIAN)


def weighted_inception(weights, logits):
    p = np.exp(logits)
    p /= p.sum(axis=1, keepdims=True)
    return np.exp(weights @ (p * (np.log(p) - np.log(weights @ p))).sum(axis=1))


def weighted_kernel(weights, features):
    reference = drawn(30, np.random.default_rng(7))
    kernels = [(x @ y.T / 3 + 1) ** 3 for x, y in ((features, features), (reference, reference), (features, reference))]
    own, between, across = kernels
    others = weights @ own @ weights - weights**2 @ np.diag(own)
    pairs_of_reference = (between.sum() - np.trace(between)) / (30 * 29)
    return len(features) / (len(features) - 1) * others + pairs_of_reference - 2 * (weights @ across).mean()


SCORED = {
    "frechet": (weighted_frechet, lambda x: scores.frechet_distance(x, *GAUSSIAN)),
    "inception": (weighted_inception, scores.inception_score),
    "kernel": (weighted_kernel, lambda x: scores.kernel_distance(x, drawn(30, np.random.default_rng(7)))),
}


@pytest.mark.parametrize("name", SCORED)
def test_influence_is_the_derivative_by_weights(name):
    weighted, score = SCORED[name]
    features = drawn(25)
    found, step = score(features), 1e-5
    uniform = np.full(25, 1 / 25)
    np.testing.assert_allclose(found.value, weighted(uniform, features), rtol=1e-10)
    assert abs(found.influence.mean()) < 1e-12
    for i in (0, 7, 24):
        change = step * (np.eye(25)[i] - uniform)
        slope = (weighted(uniform + change, features) - weighted(uniform - change, features)) / (2 * step)
        np.testing.assert_allclose(found.influence[i], slope, rtol=1e-5)


def test_influence_on_shares():
    features, reference = drawn(60), drawn(40)
    counted = [*scores.precision_recall(features, reference), *scores.density_coverage(features, reference)]
    for score, n in zip(counted, (60, 40, 60, 40)):
        assert score.influence.shape == (n,)
        np.testing.assert_allclose(score.influence.mean(), 0, atol=1e-12)
    assert set(np.round(counted[0].influence + counted[0].value, 12)) <= {0.0, 1.0}


LAWS = {
    "frechet": lambda r: scores.frechet_distance(drawn(400, r), *GAUSSIAN),
    "inception": lambda r: scores.inception_score(3 * drawn(400, r)),
    "inception-splits": lambda r: scores.inception_score(3 * drawn(400, r), split_size=150),
    "kernel": lambda r: scores.kernel_distance(drawn(200, r), np.random.default_rng(1).standard_normal((100, 3))),
    "density": lambda r: scores.density_coverage(drawn(400, r), drawn(100, np.random.default_rng(1)))[0],
}


@pytest.mark.parametrize("name", LAWS)
def test_width_of_the_interval_is_that_of_a_simulation(name):
    """The standard deviation of 400 independent sets of images, which itself is uncertain by 4 %."""
    r = np.random.default_rng(3)
    sets = [LAWS[name](r) for _ in range(400)]
    simulated = np.std([score.value for score in sets])
    widths = np.diff([scores.interval(score, seed=seed) for seed, score in enumerate(sets[:10])])
    np.testing.assert_allclose(widths.mean() / (2 * 1.96), simulated, rtol=0.15)


def test_interval():
    score = scores.frechet_distance(drawn(300), *GAUSSIAN)
    low, high = scores.interval(score)
    assert low < score.value < high
    assert scores.interval(score) == (low, high)
    narrow = scores.interval(score, level=0.5)
    assert low < narrow[0] < narrow[1] < high
    with pytest.raises(UserError, match="no confidence interval"):
        scores.interval(scores.Score(1.0))


def test_frechet_distance_of_fewer_images_than_features():
    features, reference = rng.standard_normal((10, 30)), statistics.of(rng.standard_normal((50, 30)))
    found = scores.frechet_distance(features, reference.mean, reference.covariance)
    own = statistics.of(features)
    expected = frechet.distance(own.mean, own.covariance, reference.mean, reference.covariance)
    np.testing.assert_allclose(found.value, expected, rtol=1e-12)
    assert np.isfinite(found.influence).all()


def test_frechet_at_infinity_removes_the_bias():
    """Of 400 images in 20 dimensions the distance of equal laws is about 20 * 21 / (4 * 400) = 0.26 times the scale."""
    d = 20
    features = np.random.default_rng(5).standard_normal((400, d))
    given = np.zeros(d), np.eye(d)
    biased, found = scores.frechet_distance(features, *given).value, scores.frechet_at_infinity(features, *given)
    assert abs(found.value) < biased / 3
    assert found == scores.frechet_at_infinity(features, *given, seed=0)
    with pytest.raises(UserError, match="no line through distances of 2 images"):
        scores.frechet_at_infinity(features[:2], *given)


def test_inception_score_of_known_laws():
    """1 where all images have the same classes, the number of classes where each image is sure of its own."""
    np.testing.assert_allclose(scores.inception_score(np.ones((12, 5))).value, 1, rtol=1e-12)
    certain = 2000.0 * np.eye(4)[np.arange(12) % 4]
    np.testing.assert_allclose(scores.inception_score(certain).value, 4, rtol=1e-12)
    in_order = scores.inception_score(np.sort(certain, axis=0), splits=3)
    assert in_order.spread is not None
    shuffled = scores.inception_score(certain[np.argsort(np.arange(12) % 4)], splits=3, shuffle_seed=2020)
    assert in_order.value < shuffled.value <= 4


def test_last_split_counts_as_much():
    logits = drawn(25)
    parts = [scores.inception_score(part).value for part in (logits[:10], logits[10:20], logits[20:])]
    np.testing.assert_allclose(scores.inception_score(logits, split_size=10).value, np.mean(parts), rtol=1e-12)


def all_shares(features, reference, block):
    shares = scores.precision_recall(features, reference, k=3, block=block)
    return [*shares, *scores.density_coverage(features, reference, k=3, block=block)]


@pytest.mark.parametrize("block", [3, 7, 64])
def test_shares_do_not_depend_on_blocks(block):
    """Also where points lie on surfaces: of a set with itself, with copies, float32 far from the origin."""
    features = (100 + drawn(50)).astype(np.float32)
    copies = np.concatenate([features[:20], np.repeat(features[20:22], 6, axis=0)])
    for pair in ((features, features), (copies, features), (features, copies), (drawn(40), drawn(30))):
        for found, expected in zip(all_shares(*pair, block), all_shares(*pair, 2500)):
            assert found.value == expected.value
            np.testing.assert_array_equal(found.influence, expected.influence)


def test_copies_lie_in_balls_of_radius_zero():
    copies = np.repeat(100 + drawn(2), 5, axis=0)
    np.testing.assert_array_equal(manifolds.squared_radii(copies, 3), 0)
    assert [score.value for score in scores.precision_recall(copies, copies)] == [1, 1]
    assert [score.value for score in scores.density_coverage(copies, copies, k=3)] == [0, 0]  # without surfaces


@pytest.mark.parametrize("k", [1, 3])
def test_shares_against_their_definition(k):
    features, reference = drawn(45), drawn(35)

    def distances(x, y):
        return np.square(x[:, None] - y).sum(axis=2)

    radii, reference_radii = (np.sort(distances(x, x), axis=1)[:, k] for x in (features, reference))
    np.testing.assert_allclose(manifolds.squared_radii(features, k, block=10), radii, rtol=1e-12)
    across = distances(reference, features)
    inside = across < reference_radii[:, None]
    expected = (
        inside.any(axis=0).mean(),
        (across < radii).any(axis=1).mean(),
        inside.sum() / (k * 45),
        inside.any(axis=1).mean(),
    )
    found = (*scores.precision_recall(features, reference, k=k), *scores.density_coverage(features, reference, k=k))
    np.testing.assert_allclose([score.value for score in found], expected, rtol=1e-12)


def test_kernel_distance_does_not_depend_on_blocks():
    features, reference = drawn(50), drawn(40)
    found, expected = (scores.kernel_distance(features, reference, block=block) for block in (7, 2500))
    np.testing.assert_allclose(found.value, expected.value, rtol=1e-12, atol=1e-13)
    np.testing.assert_allclose(found.influence, expected.influence, rtol=1e-10, atol=1e-12)


def test_kernel_distance_of_one_subset_of_all():
    features, reference = drawn(30), drawn(30)
    found = scores.kernel_distance_of_subsets(reference, features, subsets=3, size=30)
    np.testing.assert_allclose(found.value, scores.kernel_distance(features, reference).value, rtol=1e-9)
    np.testing.assert_allclose(found.spread, 0, atol=1e-9)


def bad(i, value):
    features = drawn(20)
    features[i, 1] = value
    return features


REJECTED = {
    "nan": (lambda: scores.frechet_distance(bad(17, np.nan), *GAUSSIAN), "image 17 of the generated images"),
    "infinite": (lambda: scores.kernel_distance(drawn(20), bad(3, -np.inf)), "image 3 of the reference"),
    "shares": (lambda: scores.precision_recall(bad(5, np.nan), drawn(20)), "image 5 of the generated images"),
    "logits": (lambda: scores.inception_score(bad(0, np.inf)), "image 0 of the logits"),
    "at-infinity": (lambda: scores.frechet_at_infinity(bad(19, np.nan), *GAUSSIAN), "image 19"),
    "one-image": (lambda: scores.frechet_distance(drawn(1), *GAUSSIAN), "covariance of 1 images is undefined"),
    "one-of-kernel": (lambda: scores.kernel_distance(drawn(5), drawn(1)), "1 image.* of the reference"),
    "neighbours": (lambda: scores.precision_recall(drawn(3), drawn(9)), "3 images have no 3-th nearest other image"),
    "splits": (lambda: scores.inception_score(drawn(9), splits=10), "9 images cannot be divided into 10 splits"),
    "both": (lambda: scores.inception_score(drawn(9), splits=2, split_size=3), "not both"),
    "subsets": (lambda: scores.kernel_distance_of_subsets(drawn(50), drawn(20), size=30), "subsets of 30 images"),
    "widths": (lambda: scores.kernel_distance(drawn(5), drawn(5, d=2)), "3 features an image against 2"),
}


@pytest.mark.parametrize("name", REJECTED)
def test_rejected(name):
    call, message = REJECTED[name]
    with pytest.raises(UserError, match=message):
        call()
