"""Scores of features of generated images against those of a reference, in float64; nothing here reads or writes.

    Frechet distance (Heusel et al. 2017), the same extrapolated to infinitely many images (Chong and Forsyth 2020),
    Inception score (Salimans et al. 2016), kernel distance (Binkowski et al. 2018), precision and recall
    (Kynkaanniemi et al. 2019), density and coverage (Naeem et al. 2020)

Beside its value a score has the influence function at each image (Hampel 1974): the derivative of the value with
respect to the image's weight, times the number of images. The value of a sample is the value of the law it comes from,
plus the mean influence, to first order; so the influence gives confidence intervals at no cost (Efron 1982, chapter 6).
"""

import itertools
from collections.abc import Iterator
from typing import NamedTuple

import numpy as np

from diffjax.errors import UserError
from diffjax.evaluation import frechet, manifolds, statistics

BLOCK = manifolds.BLOCK


class Score(NamedTuple):
    """A score, and how certain it is."""

    value: float
    # float64 [n]: first-order effect of each image on the value, of mean 0. Images of the generated set, but of the
    # reference for recall and coverage, which are shares of the reference.
    influence: np.ndarray | None = None
    spread: float | None = None  # standard deviation over splits or subsets, where the convention has one


def check_finite(features: np.ndarray, what: str) -> None:
    """UserError unless all features [n, d] are finite; names the first image by its index. what: whose features."""
    for rows in _slices(len(features)):
        finite = np.isfinite(features[rows]).all(axis=1)
        if not finite.all():
            raise UserError(
                f"image {rows.start + int(np.argmin(finite))} of {what} (counted from 0) has features that are not "
                "finite; valid: numbers"
            )


def frechet_distance(features: np.ndarray, mean: np.ndarray, covariance: np.ndarray) -> Score:
    """Frechet distance of features [n, d] from a reference of given mean [d] and covariance [d, d].

    The influence of image i is g_i minus the mean of all g, with T the optimal transport map from the generated to the
    reference Gaussian:

        g_i = 2 (m - m_r).(f_i - m) + n / (n - 1) (f_i - m)^T (I - T) (f_i - m)
    """
    check_finite(features, "the generated images")
    found = statistics.of(features)
    value, transport = frechet.distance_and_transport(found.mean, found.covariance, mean, covariance)
    influence = np.empty(found.count)
    for rows in _slices(found.count):
        centred = features[rows] - found.mean
        quadratic = (centred * (centred - centred @ transport)).sum(axis=1)
        influence[rows] = 2 * centred @ (found.mean - mean) + found.count / (found.count - 1) * quadratic
    return Score(value, influence - influence.mean())


def frechet_at_infinity(
    features: np.ndarray, mean: np.ndarray, covariance: np.ndarray, seed: int = 0, points: int = 15
) -> Score:
    """Frechet distance without the bias of finitely many images: fitted linearly in 1 / n, at 1 / n = 0.

    The fit has as many points as `points`: random subsets of features [n, d], of sizes evenly spaced from
    min(5000, max(n // 10, 2)) to n.
    """
    check_finite(features, "the generated images")
    sizes = np.linspace(min(5000, max(len(features) // 10, 2)), len(features), points).astype(np.int64)
    if points < 2 or sizes[0] >= sizes[-1]:
        raise UserError(
            f"no line through distances of {len(features)} images at {points} sizes; valid: 3 or more images, and 2 or "
            "more sizes"
        )
    rng = np.random.default_rng(seed)
    distances = []
    for size in sizes:
        found = statistics.of(features[np.sort(rng.choice(len(features), size, replace=False))])
        distances.append(frechet.distance(found.mean, found.covariance, mean, covariance))
    _, intercept = np.polyfit(1 / sizes, distances, 1)
    return Score(float(intercept))


def inception_score(
    logits: np.ndarray, split_size: int | None = None, splits: int | None = None, shuffle_seed: int | None = None
) -> Score:
    """Mean over splits of exp(mean_i KL(p_i || mean of p)), p the softmax of the logits [n, classes].

    ADM has consecutive splits of 5,000 images in file order, of which a shorter last one counts as much; torch-fidelity
    10 splits after shuffling with seed 2020, and says their standard deviation too.

    Args:
        split_size: images of a split.
        splits: number of splits, of equal sizes up to one image; not together with split_size. Neither: one split.
        shuffle_seed: of the permutation before splitting; None keeps the order.
    """
    n = len(logits)
    if split_size is not None and splits is not None:
        raise UserError("the Inception score takes split_size or splits, not both")
    if n < (splits or 1) or not n:
        raise UserError(f"{n} images cannot be divided into {splits or 1} splits; at least one image each is needed")
    check_finite(logits, "the logits")
    order = np.arange(n) if shuffle_seed is None else np.random.RandomState(shuffle_seed).permutation(n)
    count = splits or 1
    bounds = [*range(0, n, split_size), n] if split_size else [i * n // count for i in range(count + 1)]
    values, influence = [], np.empty(n)
    for start, stop in itertools.pairwise(bounds):
        chosen = order[start:stop]
        divergences = _divergences(logits[chosen].astype(np.float64))
        value = np.exp(divergences.mean())
        values.append(value)
        influence[chosen] = value * (divergences - divergences.mean()) * n / (len(chosen) * (len(bounds) - 1))
    return Score(float(np.mean(values)), influence, None if splits is None else float(np.std(values)))


def _divergences(logits: np.ndarray) -> np.ndarray:
    """[n]: KL(p_i || mean of p), p the softmax of float64 logits [n, classes]."""
    logits = logits - logits.max(axis=1, keepdims=True)
    log_p = logits - np.log(np.exp(logits).sum(axis=1, keepdims=True))
    p = np.exp(log_p)
    log_mean = np.log(np.maximum(p.mean(axis=0), np.finfo(np.float64).tiny))  # a class that no image has: 0 log 0 = 0
    return (p * (log_p - log_mean)).sum(axis=1)


def kernel_distance(features: np.ndarray, reference_features: np.ndarray, block: int = BLOCK) -> Score:
    """Unbiased squared maximum mean discrepancy of features [n, d] and [m, d] over all pairs, n, m > 1 (KID).

    With the kernel k(x, y) = (x.y / d + 1)^3 it is the mean of k over pairs of distinct generated images, plus that
    over pairs of distinct reference images, minus twice that over pairs of one of each. It can be negative. The
    influence of an image is twice the deviation of its own means from these.
    """
    _check_sets(features, reference_features)
    own = _means_over_others(features, block)
    across = kernel_means(features, reference_features, block)
    between = _means_over_others(reference_features, block).mean()
    means = own - across
    return Score(float(own.mean() + between - 2 * across.mean()), 2 * (means - means.mean()))


def kernel_distance_of_subsets(
    reference_features: np.ndarray, features: np.ndarray, subsets: int = 100, size: int = 1000, seed: int = 2020
) -> Score:
    """Mean and standard deviation of `kernel_distance` over random subsets, as torch-fidelity draws them.

    Of each of the `subsets` pairs of `size` images without replacement, those of reference_features [m, d] are drawn
    first, then those of features [n, d], by numpy's RandomState. clean-fid is that with the two sets exchanged.
    """
    _check_sets(features, reference_features)
    if size > min(len(features), len(reference_features)):
        raise UserError(
            f"subsets of {size} images from {len(features)} generated and {len(reference_features)} reference images; "
            "valid: no more than there are of either"
        )
    rng = np.random.RandomState(seed)
    values = []
    for _ in range(subsets):
        pair = [array[rng.choice(len(array), size, replace=False)] for array in (reference_features, features)]
        values.append(kernel_distance(pair[1], pair[0]).value)
    return Score(float(np.mean(values)), spread=float(np.std(values)))


def kernel_means(x: np.ndarray, y: np.ndarray, block: int = BLOCK) -> np.ndarray:
    """float64 [n]: the mean of the kernel (x.y / d + 1)^3 of each row of x [n, d] with all of y [m, d]."""
    sums = np.zeros(len(x))
    for rows in _slices(len(x), block):
        u = x[rows].astype(np.float64) / x.shape[1]
        for columns in _slices(len(y), block):
            sums[rows] += ((u @ y[columns].astype(np.float64).T + 1) ** 3).sum(axis=1)
    return sums / len(y)


def _means_over_others(x: np.ndarray, block: int) -> np.ndarray:
    """[n]: the mean of the kernel of each row of x [n, d] with the other rows."""
    itself = (np.square(x.astype(np.float64)).mean(axis=1) + 1) ** 3
    return (len(x) * kernel_means(x, x, block) - itself) / (len(x) - 1)


def precision_recall(
    features: np.ndarray, reference_features: np.ndarray, k: int = 3, adm_fp16: bool = False, block: int = BLOCK
) -> tuple[Score, Score]:
    """Improved precision and recall of features [n, d] and [m, d].

    Precision is the share of generated images in a ball around a reference image that reaches to its k-th nearest other
    one; recall is the share of reference images in such a ball around a generated one. Surfaces belong to balls.

    Args:
        adm_fp16: round as ADM's evaluator in TensorFlow on CPU does, in float16, or float32 for a block where that
            overflows; for comparing digits only.
        block: rows of features in memory at a time, squared in distances; exact distances do not depend on it.
    """
    _check_sets(features, reference_features)
    radii, reference_radii = (
        manifolds.squared_radii(array, k, block, adm_fp16) for array in (features, reference_features)
    )
    found = manifolds.membership(features, reference_features, radii, reference_radii, block=block, adm_fp16=adm_fp16)
    return _mean(found.generated > 0), _mean(found.reference > 0)


def density_coverage(
    features: np.ndarray, reference_features: np.ndarray, k: int = 5, block: int = BLOCK
) -> tuple[Score, Score]:
    """Density and coverage of features [n, d] and [m, d].

    Both look at the balls around reference images that reach to the k-th nearest other one, without their surfaces.
    Density is the number of them that hold a generated image, averaged over the generated images, over k; coverage is
    the share of those that hold any.
    """
    _check_sets(features, reference_features)
    radii = manifolds.squared_radii(reference_features, k, block)
    found = manifolds.membership(features, reference_features, None, radii, strict=True, block=block)
    return _mean(found.generated / k), _mean(found.covered > 0)


def interval(score: Score, level: float = 0.95, resamples: int = 1000, seed: int = 0) -> tuple[float, float]:
    """Confidence interval of a score: percentiles of its bootstrap distribution to first order.

    Resampled are the images; the value of a resample is that of all plus the mean of their influence. The bootstrap of
    the distance itself would be off centre: a resample has fewer distinct images (63 % of them), and distances are
    biased upwards by few images. The reference is taken as given, or for recall and coverage the generated images.
    """
    if score.influence is None:
        raise UserError("this score has no influence of single images, hence no confidence interval")
    rng = np.random.default_rng(seed)
    n = len(score.influence)
    means = [score.influence[rng.integers(n, size=n)].mean() for _ in range(resamples)]  # one resample in memory
    low, high = score.value + np.quantile(means, [(1 - level) / 2, (1 + level) / 2])
    return float(low), float(high)


def _mean(indicator: np.ndarray) -> Score:
    """The mean of numbers, one an image, and its influence."""
    value = indicator.mean()
    return Score(float(value), indicator - value)


def _check_sets(features: np.ndarray, reference_features: np.ndarray) -> None:
    """UserError for features that are not finite, of different widths, or of fewer than two images."""
    for array, whose in ((features, "the generated images"), (reference_features, "the reference")):
        if len(array) < 2:
            raise UserError(f"the spread of {len(array)} image(s) of {whose} is undefined; score at least 2")
        check_finite(array, whose)
    if features.shape[1] != reference_features.shape[1]:
        raise UserError(
            f"{features.shape[1]} features an image against {reference_features.shape[1]} of the reference; they must "
            "be of the same network"
        )


def _slices(count: int, size: int = BLOCK) -> Iterator[slice]:
    for start in range(0, count, size):
        yield slice(start, start + size)
