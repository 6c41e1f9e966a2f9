"""Scores on real digits order real, blurred, mislabelled and random images as the eye does."""

import numpy as np
import pytest

from diffjax.data import sources
from diffjax.errors import UserError
from diffjax.evaluation import pixels

rng = np.random.default_rng(0)


@pytest.fixture(scope="module")
def digits():
    parts = [sources.digits(split=split) for split in ("train", "test")]
    return [sources.arrays(part) for part in parts]


def test_scores_fall_with_quality(digits):
    train, (images, labels) = digits
    noisy = [np.clip(images + rng.normal(0, std, images.shape), 0, 255).astype(np.uint8) for std in (20, 60, 150)]
    scores = [pixels.score((x, labels), train, (images, labels)) for x in (images, *noisy)]
    distances = [score["frechet_distance_pixels"]["value"] for score in scores]
    agreements = [score["label_agreement_pixels"]["value"] for score in scores]
    assert distances == sorted(distances)
    assert agreements[0] > 0.95
    assert agreements[0] >= agreements[1] > agreements[2] > agreements[3]
    for score in scores:
        assert score["label_agreement_pixels"]["held_out_real"] == agreements[0]
        assert score["frechet_distance_pixels"]["held_out_real"] == distances[0]


def test_wrong_labels(digits):
    train, (images, labels) = digits
    score = pixels.score((images, (labels + 1) % 10), train)
    assert score["label_agreement_pixels"]["value"] < 0.05
    assert "held_out_real" not in score["label_agreement_pixels"]


def test_training_images_themselves(digits):
    train, _ = digits
    assert pixels.score(train, train)["frechet_distance_pixels"]["value"] < 1e-6


def test_sizes_must_be_equal(digits):
    train, (images, labels) = digits
    with pytest.raises(UserError, match="the images are 4 x 4 and those of the reference 8 x 8"):
        pixels.score((images[:, :4, :4], labels), train)


def test_labels_that_no_reference_image_has_are_refused(digits):
    train, (images, labels) = digits
    with pytest.raises(UserError, match=r"no image of the reference has label 10, 11; its labels: 0 to 9; valid: "):
        pixels.score((images, np.where(labels > 7, labels + 2, labels)), train)
    few = train[1] != 3
    with pytest.raises(UserError, match="no image of the reference has label 3; its labels: 0 to 9"):
        pixels.score((images, labels), (train[0][few], train[1][few]))


def test_without_labels_the_distance_alone_is_scored(digits):
    train, (images, labels) = digits
    distance = pixels.score((images, labels), train)["frechet_distance_pixels"]
    for samples, reference in (((images, None), train), ((images, labels), (train[0], None))):
        assert pixels.score(samples, reference, (images, labels)) == {
            "frechet_distance_pixels": {"value": distance["value"], "held_out_real": distance["value"]}
        }
    reference = (train[0], None)
    assert list(pixels.score((images, None), reference)) == ["frechet_distance_pixels"]


@pytest.mark.parametrize("samples, reference, words", [(1, 9, "1 images is"), (9, 1, "1 images of the reference is")])
def test_one_image_has_no_covariance(digits, samples, reference, words):
    train, (images, _) = digits
    chosen = np.zeros(reference, int)
    with pytest.raises(UserError, match=f"the covariance of {words} undefined; at least 2 are needed"):
        pixels.score((images[:samples], None), (train[0][chosen], None))


def test_fewer_images_than_dimensions_are_said(digits):
    train, (images, _) = digits
    assert pixels.caveat(297, len(train[0]), train[0]) == ""
    assert pixels.caveat(64, 1500, images).startswith("warning: 64 samples are no more than the 64 dimensions")
    both = pixels.caveat(65, 192, np.random.default_rng(0).integers(0, 255, (4, 8, 8, 3)))
    assert both.startswith("warning: 65 samples and 192 of the reference are no more than the 192 dimensions")
