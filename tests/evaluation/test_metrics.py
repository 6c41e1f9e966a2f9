"""Scores on real digits order real, blurred, mislabelled and random images as the eye does."""

import dataclasses
import re

import numpy as np
import pytest

from diffjax.data import sources
from diffjax.errors import UserError
from diffjax.evaluation import metrics, networks, scores
from diffjax.evaluation.standard import Images, Standard, moments_of
from tests.evaluation import projection

rng = np.random.default_rng(0)
PIXELS = networks.load("pixels")


@pytest.fixture(scope="module")
def digits():
    parts = [sources.digits(split=split) for split in ("train", "test")]
    return [sources.arrays(part) for part in parts]


def seen(labelled):
    """Images and their labels as the scores get them."""
    images, labels = labelled
    return Images(PIXELS.compute(images), labels)


def score(samples, train, held_out=None):
    known = Standard({}, images=seen(train), held_out=seen(held_out) if held_out else None)
    return metrics.score(seen(samples), known, PIXELS)


def test_scores_fall_with_quality(digits):
    train, (images, labels) = digits
    noisy = [np.clip(images + rng.normal(0, std, images.shape), 0, 255).astype(np.uint8) for std in (20, 60, 150)]
    found = [score((x, labels), train, (images, labels)) for x in (images, *noisy)]
    distances = [each["frechet_distance_pixels"]["value"] for each in found]
    agreements = [each["label_agreement_pixels"]["value"] for each in found]
    assert distances == sorted(distances)
    assert agreements[0] > 0.95
    assert agreements[0] >= agreements[1] > agreements[2] > agreements[3]
    for each in found:
        assert each["label_agreement_pixels"]["held_out_real"] == agreements[0]
        assert each["frechet_distance_pixels"]["held_out_real"] == distances[0]


def test_wrong_labels(digits):
    train, (images, labels) = digits
    found = score((images, (labels + 1) % 10), train)
    assert found["label_agreement_pixels"]["value"] < 0.05
    assert "held_out_real" not in found["label_agreement_pixels"]


def test_training_images_themselves(digits):
    train, _ = digits
    assert score(train, train)["frechet_distance_pixels"]["value"] < 1e-6


def test_labels_that_no_reference_image_has_are_refused(digits):
    train, (images, labels) = digits
    with pytest.raises(UserError, match=r"no image of the reference has label 10, 11; its labels: 0 to 9; valid: "):
        score((images, np.where(labels > 7, labels + 2, labels)), train)
    few = train[1] != 3
    with pytest.raises(UserError, match="no image of the reference has label 3; its labels: 0 to 9"):
        score((images, labels), (train[0][few], train[1][few]))


def test_without_labels_the_distance_alone_is_scored(digits):
    train, (images, labels) = digits
    distance = score((images, labels), train)["frechet_distance_pixels"]
    for samples, reference in (((images, None), train), ((images, labels), (train[0], None))):
        assert score(samples, reference, (images, labels)) == {
            "frechet_distance_pixels": {"value": distance["value"], "held_out_real": distance["value"]}
        }
    reference = (train[0], None)
    assert list(score((images, None), reference)) == ["frechet_distance_pixels"]


@pytest.mark.parametrize("samples, reference, words", [(1, 9, "1 images is"), (9, 1, "1 images of the reference is")])
def test_one_image_has_no_covariance(digits, samples, reference, words):
    train, (images, _) = digits
    chosen = np.zeros(reference, int)
    with pytest.raises(UserError, match=f"the covariance of {words} undefined; at least 2 are needed"):
        score((images[:samples], None), (train[0][chosen], None))


def test_fewer_images_than_dimensions_are_said(digits):
    train, _ = digits
    assert caveat(297, train) == ""
    assert caveat(64, train).startswith("warning: 64 samples are no more than the 64 dimensions")
    both = caveat(65, (np.random.default_rng(0).integers(0, 255, (192, 8, 8, 3), np.uint8), None))
    assert both.startswith("warning: 65 samples and 192 of the reference are no more than the 192 dimensions")


def caveat(count, train):
    return metrics.caveat(count, Standard({}, images=seen(train)), PIXELS)


def test_a_network_has_the_scores_of_its_features():
    assert [m.scores for m in metrics.chosen(PIXELS)] == [("fd",), ("label_agreement",)]
    with pytest.raises(UserError, match=r"score 'fid' is none of pixels; valid: frechet_distance_pixels, label_agr"):
        metrics.chosen(PIXELS, ["fid"])


IMAGES = np.random.default_rng(1).integers(0, 256, (60, 8, 8, 3), np.uint8)


@pytest.fixture(scope="module", params=[True, False], ids=["published", "others"])
def inception(request):
    """A stand-in for Inception, whether of the published weights, and features of images and of a reference."""
    network = projection.inception(request.param)
    return network, request.param, Images(network.compute(IMAGES[:40])), Images(network.compute(IMAGES[20:]))


def moments(images, kinds):
    return {kind: moments_of(images.features[kind]) for kind in kinds}


def test_scores_by_their_names(inception):
    """Those of other weights than the published ones are never called fid."""
    network, published, images, reference = inception
    known = Standard({}, moments(reference, ("pool3", "spatial")), reference, reference.count)
    usual = list(metrics.score(images, known, network))
    names = ["fid", "sfid", "inception_score", "inception_score_shuffled", "precision", "recall"]
    general = ["fd", "sfd", "class_score", "class_score_shuffled", "precision", "recall"]
    assert usual == (names if published else [f"{name}_inception" for name in general])
    wanted = ["coverage", "kid", "fid_infinity"] if published else [f"{n}_inception" for n in ("coverage", "kd", "fd")]
    found = metrics.score(images, known, network, wanted)
    paired = "density" if published else "density_inception"
    assert found.keys() == {*wanted, paired}  # computed with coverage
    everything = [
        network.called(score) for metric in metrics.METRICS[:1] + metrics.METRICS[2:] for score in metric.scores
    ]
    assert list(metrics.score(images, known, network, everything)) == everything
    if not published:
        assert not [name for name in everything if re.search("fid|kid|inception_score", name)]
    with pytest.raises(UserError, match=f"score 'fidd' is none of inception.*; valid: {usual[0]}, {usual[1]}, "):
        metrics.score(images, known, network, ["fidd"])
    with pytest.raises(UserError, match="score 'label_agreement.*' is none of inception"):
        metrics.chosen(network, [network.called("label_agreement")])


def test_columns_of_scores(inception):
    network, _, images, reference = inception
    held_out = Images(network.compute(IMAGES[:30]))
    known = Standard({}, moments(reference, ("pool3", "spatial")), reference, reference.count, held_out)
    found = metrics.score(images, known, network)
    for score in ("fd", "sfd", "precision", "recall"):
        column = found[network.called(score)]
        low, high = column["interval"]
        assert low <= column["value"] <= high, score
        kind = {"sfd": "spatial"}.get(score, "pool3")
        if score.endswith("fd"):
            of_moments = known.moments[kind]
            real = scores.frechet_distance(held_out.features[kind], of_moments.mean, of_moments.covariance)
            assert column["held_out_real"] == real.value
    assert found[network.called("class_score_shuffled")]["spread"] > 0
    assert found[network.called("precision")]["rule"] == "k = 3, float64"
    assert "spread" not in found[network.called("fd")]


def test_what_is_lacking_is_left_out_or_said(inception):
    network, _, images, reference = inception
    statistics = Standard({}, moments(reference, ("pool3",)))
    found = list(metrics.score(images, statistics, network))
    assert found == [network.called(score) for score in ("fd", "class_score", "class_score_shuffled")]
    for score, words in (
        ("precision", "the reference has no images, only mean and covariance"),
        ("recall", "the reference has no images, only mean and covariance"),
        ("kd", "the reference has no images, only mean and covariance"),
        ("sfd", "the reference has no mean and covariance of spatial"),
    ):
        first = {"recall": "precision"}.get(score, score)
        with pytest.raises(UserError, match=f"{network.called(first)} cannot be computed: {words}"):
            metrics.score(images, statistics, network, [network.called(score)])
    few = Images({kind: rows[:9] for kind, rows in images.features.items()})
    assert network.called("class_score_shuffled") not in metrics.score(few, statistics, network)
    with pytest.raises(UserError, match="cannot be computed: 9 samples, and it takes 10"):
        metrics.score(few, statistics, network, [network.called("class_score_shuffled")])


def test_features_that_are_not_finite(inception):
    network, _, images, reference = inception
    spoiled = {kind: rows.copy() for kind, rows in images.features.items()}
    spoiled["spatial"][7, 2] = np.inf
    with pytest.raises(UserError, match=r"image 7 of the samples \(spatial\) \(counted from 0\) has features"):
        metrics.score(Images(spoiled), Standard({}, moments(reference, ("pool3",))), network)


def test_a_title_of_published_names_and_many_images(inception):
    network, published, _, reference = inception
    titles = {count: metrics.title(count, network) for count in (500, 9_000, 10_000, 10_500, 50_000)}
    named = {10_000: "FID-10K", 50_000: "FID-50K"} if published else {}
    assert titles == {count: named.get(count, "") for count in titles}
    assert metrics.title(50_000, network, 200) == ""
    assert metrics.title(50_000, network, 10_000) == titles[50_000]
    assert metrics.title(50_000, PIXELS) == metrics.title(50_000, projection.network()) == ""
    statistics = Standard({}, moments(reference, ("pool3",)), None, 50_000)
    few = f"warning: of fewer than 10,000 images {network.called('fd')} is biased upwards"
    assert metrics.caveat(9_999, statistics, network).startswith(few)
    assert metrics.caveat(10_000, statistics, network) == ""
    assert metrics.caveat(10_000, dataclasses.replace(statistics, count=9_999), network).startswith(few)
    assert metrics.caveat(10_000, dataclasses.replace(statistics, count=None), network) == ""


def test_which_scores_take_images_of_the_reference(inception):
    network = inception[0]
    assert metrics.needs_images(network)
    assert metrics.needs_images(network, [network.called("kd")])
    assert not metrics.needs_images(network, [network.called(score) for score in ("fd", "sfd", "class_score")])


def test_the_kernel_distance_of_subsets_draws_of_the_samples_first_as_torch_fidelity_does(inception):
    network, _, images, reference = inception
    known = Standard({}, images=reference)
    found = metrics.score(images, known, network, [network.called("kd_subsets")])[network.called("kd_subsets")]
    size = min(images.count, reference.count)
    pair = images.features["pool3"], reference.features["pool3"]
    expected = scores.kernel_distance_of_subsets(*pair, subsets=100, size=size, seed=2020)
    assert (found["value"], found["spread"]) == (expected.value, expected.spread)
    if images.count != reference.count:
        assert expected != scores.kernel_distance_of_subsets(*pair[::-1], subsets=100, size=size, seed=2020)
