"""Scores on raw pixels, for small embedded sets: no feature network, nothing to download.

They tell whether training works. They are not FID, nor comparable with any published number.
"""

import numpy as np

from diffjax.errors import UserError

FEATURES = "RGB pixels / 255"
LARGEST = 64  # side; the covariance of larger images does not fit memory, and pixels say little there


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


def check_labels(labels: np.ndarray, known: np.ndarray) -> None:
    """Raise UserError for labels that no image of the reference has: none of its images could agree with them."""
    if len(unknown := np.setdiff1d(labels, known)):
        listed = ", ".join(map(str, unknown[:5])) + (", ..." if len(unknown) > 5 else "")
        raise UserError(
            f"no image of the reference has label {listed}; its labels: {known.min()} to {known.max()}; valid: a "
            "reference of the same classes, or samples without arr_1, which are scored without labels"
        )
