"""Scores of stored features against the figures of the public evaluation codes."""

import functools
import json
import re

import numpy as np
import pytest

from diffjax.evaluation import frechet, manifolds, scores, statistics
from tests.golden.cases import ORACLES

pytestmark = pytest.mark.golden
FOLDER = ORACLES / "evaluation"
FLOAT32 = 1e-6  # relative: of figures that were computed in float32, or of float32 statistics


@functools.cache
def arrays():
    with np.load(FOLDER / "metrics.npz") as file:
        return dict(file)


@functools.cache
def stored(section):
    return json.loads((FOLDER / "metrics.json").read_text())[section]


def cases(*sections):
    """pytest parameters (section, name), one per stored figure; one that fails where there is no file."""
    if not (FOLDER / "metrics.json").is_file():
        return [pytest.param("", "", id=f"evaluation-no-metrics-in-{FOLDER}")]
    return [
        pytest.param(section, name, id=f"evaluation-{section}-{name}")
        for section in sections
        for name in stored(section)
    ]


def frechet_pair(name):
    a, b, c = (arrays()[f"feat_{letter}"] for letter in "abc")
    return {
        "a_vs_b": (a, b),
        "c_vs_b_rank_deficient": (c, b),
        "c_vs_c2_both_rank_deficient": (c, b[:30]),
        "a_vs_a": (a, a),
        "a_vs_shifted_a": (a, a + np.float32(0.25)),
    }[name]


@functools.cache
def frechet_distances(name):
    """By each way that the package has."""
    a, b = map(statistics.of, frechet_pair(name))
    given = a.mean, a.covariance, b.mean, b.covariance
    return [
        frechet.distance(*given),
        frechet.distance_and_transport(*given)[0],
        frechet.distance_of_features(*frechet_pair(name)),
        frechet.distance_of_samples(*frechet_pair(name)),
        scores.frechet_distance(frechet_pair(name)[0], b.mean, b.covariance).value,
    ]


@pytest.mark.parametrize("section, name", cases("frechet", "frechet_guided_diffusion_from_float32_features"))
def test_frechet_distance(section, name):
    expected = stored(section)[name]
    for key, value in (expected if isinstance(expected, dict) else {"from_float32_features": expected}).items():
        tolerance = FLOAT32 if "float32" in key or "rank_deficient" in name else 1e-9
        np.testing.assert_allclose(frechet_distances(name), value, rtol=tolerance, atol=1e-12, err_msg=key)


@pytest.mark.parametrize("section, name", cases("inception_score"))
def test_inception_score(section, name):
    expected = stored(section)[name]
    logits = (arrays()["feat_b"].astype(np.float64) @ arrays()["is_weight"]).astype(np.float32)
    if "with_bias" in name:
        logits = logits + arrays()["is_bias"]
    if match := re.fullmatch(r"guided_diffusion_split_size_(\d+)", name):
        found = scores.inception_score(logits, split_size=int(match[1]))
        np.testing.assert_allclose(found.value, expected, rtol=2 * FLOAT32)  # a float32 mean of float32 logarithms
        assert found.spread is None
        return
    match = re.fullmatch(r"\w*?splits(\d+)(?:_noshuffle|_shuffle_seed(\d+))?", name)
    found = scores.inception_score(logits, splits=int(match[1]), shuffle_seed=int(match[2]) if match[2] else None)
    np.testing.assert_allclose(found.value, expected["inception_score_mean"], rtol=1e-9)
    np.testing.assert_allclose(found.spread, expected["inception_score_std"], rtol=1e-9)


def kernel_distance(name):
    a, b = arrays()["feat_a"], arrays()["feat_b"]
    if match := re.fullmatch(r"torch_fidelity_subsets(\d+)_size(\d+)_seed(\d+)", name):
        return scores.kernel_distance_of_subsets(a, b, *map(int, match.groups()))
    if match := re.fullmatch(r"clean_fid_subsets(\d+)_size(\d+)_np_seed(\d+)", name):
        return scores.kernel_distance_of_subsets(b, a, *map(int, match.groups()))
    if name.startswith("biased_vstatistic"):
        own = scores.kernel_means(a, a).mean() + scores.kernel_means(b, b).mean()
        return scores.Score(own - 2 * scores.kernel_means(b, a).mean())
    if name.endswith("a_vs_a"):
        return scores.kernel_distance(a, a)
    return scores.kernel_distance(b[:500] if "first500" in name else b, a)


@pytest.mark.parametrize("section, name", cases("kid"))
def test_kernel_distance(section, name):
    """torch-fidelity's subsets have kernels in float32: distances are small differences of their means."""
    expected, found = stored(section)[name], kernel_distance(name)
    if isinstance(expected, dict):
        np.testing.assert_allclose(found.spread, expected["kernel_inception_distance_std"], rtol=0, atol=1e-6)
        expected = expected["kernel_inception_distance_mean"]
    tolerance = 1e-6 if name.startswith("torch_fidelity_subsets") else 1e-12
    np.testing.assert_allclose(found.value, expected, rtol=0, atol=tolerance)


def neighbours(name):
    return int(re.search(r"k(\d+)", name)[1])


@pytest.mark.parametrize("section, name", cases("precision_recall_float64_and_torch_fidelity"))
def test_precision_and_recall(section, name):
    """torch-fidelity states float32; density and coverage go by strict inequality."""
    a, b, k, expected = arrays()["feat_a"], arrays()["feat_b"], neighbours(name), stored(section)[name]
    found = dict(zip(("precision", "recall"), scores.precision_recall(b, a, k=k)))
    found |= dict(zip(("precision_batched128", "recall_batched128"), scores.precision_recall(b, a, k=k, block=128)))
    found |= dict(zip(("density", "coverage"), scores.density_coverage(b, a, k=k)))
    for key, value in expected.items():
        np.testing.assert_allclose(found[key].value, value, rtol=1e-7 if "torch_fidelity" in name else 1e-14)


@pytest.mark.parametrize("section, name", cases("precision_recall_guided_diffusion_tensorflow"))
def test_precision_and_recall_of_guided_diffusion(section, name):
    """Its own distances are float16 unless the name says float32, where they decide as exact ones do."""
    factor = 200 if "times_200" in name else 1
    a, b = (np.float32(factor) * arrays()[key] for key in ("feat_a", "feat_b"))
    block = 100 if "batched" in name else 2500
    found = scores.precision_recall(b, a, k=neighbours(name), adm_fp16="float32" not in name, block=block)
    expected = stored(section)[name]
    np.testing.assert_allclose(
        [score.value for score in found], [expected["precision"], expected["recall"]], rtol=1e-14
    )


@pytest.mark.parametrize("section, name", cases("dgm_eval"))
def test_dgm_eval(section, name):
    a, b = arrays()["feat_a"], arrays()["feat_b"]
    if name.startswith("dgm_eval_fd"):
        np.testing.assert_allclose(frechet.distance_of_features(a, b), stored(section)[name], rtol=FLOAT32)
        return
    found = (*scores.precision_recall(b, a, k=neighbours(name)), *scores.density_coverage(b, a, k=neighbours(name)))
    expected = [stored(section)[name][key] for key in ("precision", "recall", "density", "coverage")]
    np.testing.assert_allclose([score.value for score in found], expected, rtol=1e-14)


@pytest.mark.parametrize("letter", ["a", "b"], ids="evaluation-radii-{}".format)
def test_radii(letter):
    """Those of guided-diffusion in every bit of their float16."""
    features = arrays()[f"feat_{letter}"]
    exact, halves = arrays()[f"knn3_radius_sq_{letter}"], arrays()[f"gd_fp16_radius_{letter}"]
    np.testing.assert_allclose(manifolds.squared_radii(features, 3), exact, rtol=1e-12)
    np.testing.assert_array_equal(manifolds.squared_radii(features, 3, adm_fp16=True), halves[:, 0])


@pytest.fixture
def shards():
    """The stored statistics of the shards of the stream."""
    counts, means, scatters = (arrays()[f"stream_{name}"] for name in ("sizes", "shard_mean", "shard_M2"))
    return [statistics.Statistics(int(n), mean, scatter) for n, mean, scatter in zip(counts, means, scatters)]


def error(covariance):
    """Relative to the largest entry, as the stored figures are relative to the truth."""
    return np.abs(covariance - arrays()["stream_sigma"]).max() / np.abs(arrays()["stream_sigma"]).max()


@pytest.mark.parametrize("seed", range(4), ids="evaluation-streaming-{}".format)
def test_statistics_of_a_stream(shards, seed):
    """Of the stored shards, and of their rows, merged in any order."""
    parts = np.split(arrays()["stream"], np.cumsum(arrays()["stream_sizes"])[:-1])
    order = np.random.default_rng(seed).permutation(len(parts))
    blocks = [statistics.of(parts[i]) for i in order]
    for part, shard in zip(blocks, (shards[i] for i in order)):
        assert part.count == shard.count
        np.testing.assert_allclose(part.mean, shard.mean, rtol=1e-12)
        np.testing.assert_allclose(part.scatter, shard.scatter, rtol=0, atol=1e-9 * np.abs(shard.scatter).max())
    for merged in (functools.reduce(statistics.merge, blocks), functools.reduce(statistics.merge, shards)):
        assert merged.count == len(arrays()["stream"])
        np.testing.assert_allclose(merged.mean, arrays()["stream_mu"], rtol=1e-12)
        np.testing.assert_allclose(merged.scatter, arrays()["stream_M2"], rtol=1e-9, atol=1e-9 * merged.scatter.max())
        assert error(merged.covariance) < 1e-9


def test_float32_moments_of_the_stream_are_useless():
    """Sums of x and x x^T in float32, in which nothing is left of a covariance of 1e-7 of the mean's square."""
    stream = arrays()["stream"]
    total, products = stream.sum(axis=0), stream.T @ stream
    raw = (products - np.outer(total, total) / np.float32(len(stream))) / np.float32(len(stream) - 1)
    assert error(raw) > 0.1
    assert stored("streaming")["relative_error_raw_moments_float32"] > 0.1
    assert error(statistics.of(stream).covariance) < 1e-9
