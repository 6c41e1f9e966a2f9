"""Nearest neighbours against brute force, and the two rules for ties."""

import numpy as np

from diffjax.evaluation.neighbours import label_agreement, nearest, vote

rng = np.random.default_rng(0)


def test_nearest_against_brute_force():
    images = rng.integers(0, 256, (70, 4, 4, 3), np.uint8)
    train = rng.integers(0, 256, (90, 4, 4, 3), np.uint8)
    distances = np.square(images[:, None].astype(int) - train[None].astype(int)).sum(axis=(2, 3, 4))
    expected = np.argsort(distances, axis=1, kind="stable")
    np.testing.assert_array_equal(nearest(images, train, 7, block=16), expected[:, :7])
    np.testing.assert_array_equal(nearest(images, train[:3], 7), np.argsort(distances[:, :3], axis=1, kind="stable"))


def test_equal_distances_keep_the_order_of_the_training_set():
    train = np.array([3, 1, 3, 1, 1, 0], np.uint8).reshape(6, 1, 1, 1)
    np.testing.assert_array_equal(nearest(np.full((1, 1, 1, 1), 2, np.uint8), train, 4), [[0, 1, 2, 3]])
    np.testing.assert_array_equal(nearest(np.full((1, 1, 1, 1), 1, np.uint8), train, 4), [[1, 3, 4, 5]])


def test_majority_and_ties():
    labels = np.array([7, 8, 8, 9, 9, 7])
    neighbours = np.array([[0, 1, 2], [3, 1, 2], [0, 1, 3], [1, 3, 4], [1, 3, 2], [3, 1, 0]])
    np.testing.assert_array_equal(vote(neighbours, labels), [8, 8, 7, 9, 8, 9])
    np.testing.assert_array_equal(vote(np.array([[0, 1, 2, 5, 3]]), labels), [7])


def test_agreement():
    train = np.repeat(np.array([10, 200], np.uint8), 5).reshape(10, 1, 1, 1) + np.arange(10, dtype=np.uint8).reshape(
        10, 1, 1, 1
    )
    train_labels = np.repeat([0, 1], 5)
    images = np.array([0, 255, 20, 190], np.uint8).reshape(4, 1, 1, 1)
    assert label_agreement(images, np.array([0, 1, 0, 1]), train, train_labels) == 1.0
    assert label_agreement(images, np.array([0, 1, 0, 0]), train, train_labels) == 0.75
    assert label_agreement(images, np.array([1, 0, 1, 0]), train, train_labels) == 0.0
