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

Labelled = tuple[np.ndarray, np.ndarray | None]  # images uint8 [n, h, w, 1 or 3], labels integers [n] where known


def to_rgb(images: np.ndarray) -> np.ndarray:
    """Images [n, h, w, 1 or 3] -> [n, h, w, 3], grey repeated."""
    if images.ndim != 4 or images.shape[-1] not in (1, 3):
        raise UserError(f"images of shape {images.shape}; expected [n, h, w, 3], or 1 channel of grey")
    return np.repeat(images, 3, axis=-1) if images.shape[-1] == 1 else images


def check_sizes(images: tuple[int, ...], reference: tuple[int, ...]) -> None:
    """UserError unless both (height, width) are the same."""
    if images != reference:
        sizes = [" x ".join(map(str, size)) for size in (images, reference)]
        raise UserError(f"the images are {sizes[0]} and those of the reference {sizes[1]}; they must be equal")


def check_pair(images: np.ndarray, reference: np.ndarray) -> None:
    """UserError unless the images [n, h, w, c] are as large as those of the reference, and two or more of either."""
    check_sizes(images.shape[1:3], reference.shape[1:3])
    for array, whose in ((images, ""), (reference, " of the reference")):
        if len(array) < 2:
            raise UserError(f"the covariance of {len(array)} images{whose} is undefined; at least 2 are needed")


def score(samples: Labelled, train: Labelled, held_out: Labelled | None = None) -> dict[str, dict[str, float]]:
    """{score: {"value": of the samples, "held_out_real": of real images that were not trained on}}.

    label_agreement_pixels: fraction of images whose 5 nearest training images mostly bear the image's label; only where
    samples and training images have labels.
    frechet_distance_pixels: between Gaussians fitted to the pixels of the images and of the training images; it falls
    with the number of images, so compare equal numbers only.

    Raises:
        UserError: the images are not as large as the training images, fewer than two of either, or labels that no
            training image has.
    """
    reference = to_rgb(train[0])
    scored = {"value": samples} | ({"held_out_real": held_out} if held_out else {})
    scored = {name: (to_rgb(images), labels) for name, (images, labels) in scored.items()}
    for images, _ in scored.values():
        if max(images.shape[1:3]) > LARGEST:
            raise UserError(
                f"pixel scores are for images of at most {LARGEST} x {LARGEST}, not {images.shape[1:3]}; "
                "--features=lite0 scores larger ones"
            )
        check_pair(images, reference)
    agreement, distance = {}, {}
    for name, (images, labels) in scored.items():
        if labels is not None and train[1] is not None:
            check_labels(labels, train[1])
            agreement[name] = neighbours.label_agreement(images, labels, reference, train[1], k=NEIGHBOURS)
        distance[name] = _distance(images, reference)
    found = {"label_agreement_pixels": agreement, "frechet_distance_pixels": distance}
    return {name: columns for name, columns in found.items() if "value" in columns}


def check_labels(labels: np.ndarray, known: np.ndarray) -> None:
    """Raise UserError for labels that no image of the reference has: none of its images could agree with them."""
    if len(unknown := np.setdiff1d(labels, known)):
        listed = ", ".join(map(str, unknown[:5])) + (", ..." if len(unknown) > 5 else "")
        raise UserError(
            f"no image of the reference has label {listed}; its labels: {known.min()} to {known.max()}; valid: a "
            "reference of the same classes, or samples without arr_1, which are scored without labels"
        )


def caveat(count: int, reference: int, images: np.ndarray) -> str:
    """A warning for Frechet distances of too few images [n, h, w, c] for full-rank covariances; "" otherwise."""
    dimensions = int(np.prod(images.shape[1:3])) * (1 if is_grey(images) else images.shape[3])
    few = [f"{n:,} {whose}" for n, whose in ((count, "samples"), (reference, "of the reference")) if n <= dimensions]
    if not few:
        return ""
    return (
        f"warning: {' and '.join(few)} are no more than the {dimensions:,} dimensions of the pixels, so the Frechet "
        "distance says little; compare it with that of as many other images alone, or take more"
    )


def is_grey(images: np.ndarray) -> bool:
    """Whether all channels of images [n, h, w, c] are equal."""
    return bool((images == images[..., :1]).all())


def _distance(images: np.ndarray, train: np.ndarray) -> float:
    """Frechet distance by the faster of two equal ways."""
    if len(images) + len(train) < images[0].size:
        return frechet.distance_of_samples(*(array.reshape(len(array), -1) / 255 for array in (images, train)))
    found, reference = (statistics.gather(_features(array)) for array in (images, train))
    return frechet.distance(found.mean, found.covariance, reference.mean, reference.covariance)


def _features(images: np.ndarray, block: int = 1024) -> Iterator[np.ndarray]:
    """float64 [n, h * w * 3] in blocks."""
    for start in range(0, len(images), block):
        part = images[start : start + block]
        yield part.reshape(len(part), -1) / 255
