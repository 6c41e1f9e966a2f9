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
