"""The table of scorers: what each computes, and what the protocol of its results records.

The weights of a scorer are loaded when it is chosen.
A scorer compares images with training images, and held-out real images with them beside, so that one sees what is left
to gain. Images are pairs (uint8 [n, h, w, 1 or 3], labels [n] or None).
"""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from diffjax.evaluation import lite0, pixels

Values = dict[str, dict[str, float]]


@dataclass(frozen=True)
class Scorer:
    """A way to score."""

    # as the protocol of results records them
    features: str
    features_sha256: str
    resize: str
    kind: str  # what its scores are, and are not
    # (images, training images, held-out real images or None) -> {score: {"value", "held_out_real"}}
    score: Callable[[pixels.Labelled, pixels.Labelled, pixels.Labelled | None], Values]
    # (how many images, how many of the reference, images) -> a warning, or ""
    caveat: Callable[[int, int, np.ndarray], str]


PIXELS = Scorer(pixels.FEATURES, "none", "none", "pixel scores, not FID", pixels.score, pixels.caveat)


def _lite0() -> Scorer:
    network = lite0.load()
    return Scorer(lite0.FEATURES, lite0.SHA256, lite0.RESIZE, "FD-lite0, not FID", network.score, lite0.caveat)


SCORERS: dict[str, Callable[[], Scorer]] = {"pixels": lambda: PIXELS, "lite0": _lite0}
