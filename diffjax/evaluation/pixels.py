"""Scores on raw pixels, for small embedded sets: no feature network, nothing to download.

They tell whether training works. They are not FID, nor comparable with any published number.
"""

from collections.abc import Iterator

import numpy as np

from diffjax.errors import UserError
from diffjax.evaluation import frechet, neighbours, statistics

FEATURES = "RGB pixels / 255"
NEIGHBOURS = 5
LARGEST = 64  # side; the covariance of larger images does not fit memory, and pixels say little there

Labelled = tuple[np.ndarray, np.ndarray]  # images uint8 [n, h, w, 1 or 3], labels integers [n]


def to_rgb(images: np.ndarray) -> np.ndarray:
    """Images [n, h, w, 1 or 3] -> [n, h, w, 3], grey repeated."""
    if images.ndim != 4 or images.shape[-1] not in (1, 3):
        raise UserError(f"images of shape {images.shape}; expected [n, h, w, 3], or 1 channel of grey")
    return np.repeat(images, 3, axis=-1) if images.shape[-1] == 1 else images


def score(samples: Labelled, train: Labelled, held_out: Labelled | None = None) -> dict[str, dict[str, float]]:
    """{score: {"value": of the samples, "held_out_real": of real images that were not trained on}}.

    label_agreement_pixels: fraction of images whose 5 nearest training images mostly bear the image's label.
    frechet_distance_pixels: between Gaussians fitted to the pixels of the images and of the training images; it falls
    with the number of images, so compare equal numbers only.

    Raises:
        UserError: the images are not as large as the training images, or fewer than two.
    """
    train = (to_rgb(train[0]), train[1])
    scored = {"value": samples} | ({"held_out_real": held_out} if held_out else {})
    scored = {name: (to_rgb(images), labels) for name, (images, labels) in scored.items()}
    for images, _ in scored.values():
        if max(images.shape[1:3]) > LARGEST:
            raise UserError(f"pixel scores are for images of at most {LARGEST} x {LARGEST}, not {images.shape[1:3]}")
        if images.shape[1:] != train[0].shape[1:]:
            sizes = [" x ".join(map(str, array.shape[1:3])) for array in (images, train[0])]
            raise UserError(f"the images are {sizes[0]} and those of the reference {sizes[1]}; they must be equal")
    agreement, distance = {}, {}
    for name, (images, labels) in scored.items():
        agreement[name] = neighbours.label_agreement(images, labels, *train, k=NEIGHBOURS)
        distance[name] = _distance(images, train[0])
    return {"label_agreement_pixels": agreement, "frechet_distance_pixels": distance}


def _distance(images: np.ndarray, train: np.ndarray) -> float:
    """Frechet distance by the faster of two equal ways."""
    if len(images) < 2:
        raise UserError(f"the covariance of {len(images)} images is undefined; score at least 2")
    if len(images) + len(train) < images[0].size:
        return frechet.distance_of_samples(*(array.reshape(len(array), -1) / 255 for array in (images, train)))
    found, reference = (statistics.gather(_features(array)) for array in (images, train))
    return frechet.distance(found.mean, found.covariance, reference.mean, reference.covariance)


def _features(images: np.ndarray, block: int = 1024) -> Iterator[np.ndarray]:
    """float64 [n, h * w * 3] in blocks."""
    for start in range(0, len(images), block):
        part = images[start : start + block]
        yield part.reshape(len(part), -1) / 255
