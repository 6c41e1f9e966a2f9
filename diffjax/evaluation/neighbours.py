"""Label agreement: whether the real training images nearest to a sample share its label."""

import numpy as np


def label_agreement(
    images: np.ndarray, labels: np.ndarray, train_images: np.ndarray, train_labels: np.ndarray, k: int = 5
) -> float:
    """Fraction of the images whose k nearest training images (L2 in pixel space) have the image's label in majority.

    Args:
        images: uint8 [n, h, w, c], with labels, integers [n]: what the images should show.
        train_images: uint8 [m, h, w, c], with train_labels, integers [m].

    A tie between labels goes to the one that has the nearest image; images at the same distance count in the order
    of the training set. Distances are exact, so the result is the same on every machine.
    """
    return float(np.mean(vote(nearest(images, train_images, k), train_labels) == labels))


def nearest(images: np.ndarray, train_images: np.ndarray, k: int, block: int = 512) -> np.ndarray:
    """Indices of the k nearest training images, nearest first, int64 [n, min(k, m)]."""
    train = train_images.reshape(len(train_images), -1).astype(np.float64)
    train_norms = np.square(train).sum(axis=1)
    k = min(k, len(train))
    found = []
    for start in range(0, len(images), block):
        part = images[start : start + block].reshape(-1, train.shape[1]).astype(np.float64)
        # squares of integers below 2^53: float64 holds them exactly, |x|^2 is the same for all and left out
        distances = (train_norms - 2 * part @ train.T).astype(np.int64)
        keys = distances * len(train) + np.arange(len(train))  # no two equal
        chosen = np.argpartition(keys, k - 1, axis=1)[:, :k]
        order = np.argsort(np.take_along_axis(keys, chosen, axis=1), axis=1)
        found.append(np.take_along_axis(chosen, order, axis=1))
    return np.concatenate(found)


def vote(neighbours: np.ndarray, train_labels: np.ndarray) -> np.ndarray:
    """The majority label of each row of neighbours [n, k], nearest first; ties as in `label_agreement`."""
    candidates = np.asarray(train_labels)[neighbours]
    votes = (candidates[:, :, None] == candidates[:, None, :]).sum(axis=2)
    return np.take_along_axis(candidates, votes.argmax(axis=1)[:, None], axis=1)[:, 0]
