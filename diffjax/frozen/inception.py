"""The Inception-v3 of December 2015, on whose features FID, sFID, KID, precision, recall and the Inception score stand.

It differs from later public implementations. In its graph (`classify_image_graph_def.pb`)

- images of any size are resized by TensorFlow 1's bilinear rule (`ops.resize.legacy_bilinear`); x = (x - 128) / 128;
- 3 x 3 averages divide by the number of real pixels, 4 in a corner; the last block takes the maximum instead;
- there are 1008 outputs, and the Inception score takes softmax(features W), without the bias.

mseitzer/pytorch-fid feeds the same network differently: half-pixel bilinear, and 2 x / 255 - 1. Licence of the weights:
Apache-2.0.
"""

from typing import NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp

from diffjax.errors import UserError
from diffjax.frozen.layers import HIGHEST, ConvNorm, check_images
from diffjax.ops.resize import legacy_bilinear

SIDE = 299
FEATURES, OUTPUTS = 2048, 1008
SPATIAL = 7  # channels of Mixed_6d that sFID takes: the first of its first branch
SPATIAL_FEATURES = 17 * 17 * SPATIAL
INPUTS = ("tensorflow", "pytorch-fid")


class Outputs(NamedTuple):
    """What the scores take of b images, float32 each.

    Attributes:
        pool3 [b, 2048]: means over the last map; FID, KID, precision and recall.
        spatial [b, 2023]: the first channels of a map of 17 x 17, in the order (y, x, channel); sFID.
        logits_unbiased [b, 1008]: without the bias; the Inception score.
        logits [b, 1008]: with it.
    """

    pool3: jax.Array
    spatial: jax.Array
    logits_unbiased: jax.Array
    logits: jax.Array


class Convolution(NamedTuple):
    """A convolution of `taps` rows and columns.

    Of stride 1 it keeps the size of the map unless `valid`; of stride 2 it takes no pixels beyond the map.
    """

    name: str
    features: int
    taps: tuple[int, int] = (1, 1)
    stride: int = 1
    valid: bool = False


class Branch(NamedTuple):
    """One path of a block: a pool (see `pooled`), convolutions, then those of `fork` side by side."""

    layers: tuple[Convolution, ...] = ()
    pool: str = ""
    fork: tuple[Convolution, ...] = ()


STEM = (
    Convolution("Conv2d_1a_3x3", 32, (3, 3), 2),
    Convolution("Conv2d_2a_3x3", 32, (3, 3), valid=True),
    Convolution("Conv2d_2b_3x3", 64, (3, 3)),
)
MIDDLE = (  # between two max pools
    Convolution("Conv2d_3b_1x1", 80),
    Convolution("Conv2d_4a_3x3", 192, (3, 3), valid=True),
)


def block_a(pool_width: int) -> tuple[Branch, ...]:
    return (
        Branch((Convolution("branch1x1", 64),)),
        Branch((Convolution("branch5x5_1", 48), Convolution("branch5x5_2", 64, (5, 5)))),
        Branch(
            (
                Convolution("branch3x3dbl_1", 64),
                Convolution("branch3x3dbl_2", 96, (3, 3)),
                Convolution("branch3x3dbl_3", 96, (3, 3)),
            )
        ),
        Branch((Convolution("branch_pool", pool_width),), pool="mean"),
    )


def block_c(width: int) -> tuple[Branch, ...]:
    return (
        Branch((Convolution("branch1x1", 192),)),
        Branch(
            (
                Convolution("branch7x7_1", width),
                Convolution("branch7x7_2", width, (1, 7)),
                Convolution("branch7x7_3", 192, (7, 1)),
            )
        ),
        Branch(
            (
                Convolution("branch7x7dbl_1", width),
                Convolution("branch7x7dbl_2", width, (7, 1)),
                Convolution("branch7x7dbl_3", width, (1, 7)),
                Convolution("branch7x7dbl_4", width, (7, 1)),
                Convolution("branch7x7dbl_5", 192, (1, 7)),
            )
        ),
        Branch((Convolution("branch_pool", 192),), pool="mean"),
    )


def block_e(pool: str) -> tuple[Branch, ...]:
    return (
        Branch((Convolution("branch1x1", 320),)),
        Branch(
            (Convolution("branch3x3_1", 384),),
            fork=(Convolution("branch3x3_2a", 384, (1, 3)), Convolution("branch3x3_2b", 384, (3, 1))),
        ),
        Branch(
            (Convolution("branch3x3dbl_1", 448), Convolution("branch3x3dbl_2", 384, (3, 3))),
            fork=(Convolution("branch3x3dbl_3a", 384, (1, 3)), Convolution("branch3x3dbl_3b", 384, (3, 1))),
        ),
        Branch((Convolution("branch_pool", 192),), pool=pool),
    )


BLOCKS: dict[str, tuple[Branch, ...]] = {
    "Mixed_5b": block_a(32),
    "Mixed_5c": block_a(64),
    "Mixed_5d": block_a(64),
    "Mixed_6a": (
        Branch((Convolution("branch3x3", 384, (3, 3), 2),)),
        Branch(
            (
                Convolution("branch3x3dbl_1", 64),
                Convolution("branch3x3dbl_2", 96, (3, 3)),
                Convolution("branch3x3dbl_3", 96, (3, 3), 2),
            )
        ),
        Branch(pool="halved"),
    ),
    "Mixed_6b": block_c(128),
    "Mixed_6c": block_c(160),
    "Mixed_6d": block_c(160),
    "Mixed_6e": block_c(192),
    "Mixed_7a": (
        Branch((Convolution("branch3x3_1", 192), Convolution("branch3x3_2", 320, (3, 3), 2))),
        Branch(
            (
                Convolution("branch7x7x3_1", 192),
                Convolution("branch7x7x3_2", 192, (1, 7)),
                Convolution("branch7x7x3_3", 192, (7, 1)),
                Convolution("branch7x7x3_4", 192, (3, 3), 2),
            )
        ),
        Branch(pool="halved"),
    ),
    "Mixed_7b": block_e("mean"),
    "Mixed_7c": block_e("max"),
}


def convolved(layer: Convolution, x: jax.Array) -> jax.Array:
    padding = "VALID" if layer.valid or layer.stride > 1 else "SAME"
    return ConvNorm(layer.features, layer.taps, layer.stride, padding, name=layer.name)(x)


class Mixed(nn.Module):
    """A block: the maps [b, h, w, c] of its branches side by side, in the order of the table."""

    branches: tuple[Branch, ...]

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        found: list[jax.Array] = []
        for layers, pool, fork in self.branches:
            h = pooled(x, pool)
            for layer in layers:
                h = convolved(layer, h)
            found += [convolved(layer, h) for layer in fork] or [h]
        return jnp.concatenate(found, axis=-1)


def pooled(x: jax.Array, kind: str) -> jax.Array:
    """3 x 3 pools: "mean" of the real pixels and "max", of stride 1; "halved", the maximum of stride 2; "" is none."""
    pools = {
        "": lambda: x,
        "mean": lambda: nn.avg_pool(x, (3, 3), (1, 1), "SAME", count_include_pad=False),
        "max": lambda: nn.max_pool(x, (3, 3), (1, 1), "SAME"),
        "halved": lambda: nn.max_pool(x, (3, 3), (2, 2)),
    }
    return pools[kind]()


class Inception(nn.Module):
    """The network; see the module docstring.

    Attributes:
        inputs: how images are resized and scaled, "tensorflow" or "pytorch-fid".
    """

    inputs: str = "tensorflow"

    def validate(self) -> None:
        """Raise UserError for options that are unknown, before anything is traced."""
        if self.inputs not in INPUTS:
            raise UserError(f"Inception: inputs = {self.inputs!r} is unknown; valid: {', '.join(INPUTS)}")

    @nn.compact
    def __call__(self, images: jax.Array) -> Outputs:
        """images [b, h, w, 3]: 0 .. 255, of any size and dtype; images in [0, 1] or [-1, 1] are not detected."""
        check_images("Inception", images)
        x = self.scaled(images.astype(jnp.float32))
        for layers in (STEM, MIDDLE):
            for layer in layers:
                x = convolved(layer, x)
            x = pooled(x, "halved")
        spatial = x
        for name, branches in BLOCKS.items():
            x = Mixed(branches, name=name)(x)
            if name == "Mixed_6d":
                spatial = x[..., :SPATIAL]
        pool3 = x.mean((1, 2))
        logits = nn.Dense(OUTPUTS, use_bias=False, precision=HIGHEST, name="classifier")(pool3)
        bias = self.param("classifier_bias", nn.initializers.zeros, (OUTPUTS,))
        return Outputs(pool3, spatial.reshape(len(spatial), -1), logits, logits + bias)

    def scaled(self, x: jax.Array) -> jax.Array:
        """Images of 0 .. 255 -> [b, 299, 299, 3] in about [-1, 1]."""
        if self.inputs == "tensorflow":
            return (legacy_bilinear(x, SIDE, SIDE) - 128) / 128
        shape = (len(x), SIDE, SIDE, x.shape[-1])
        return 2 * jax.image.resize(x / 255, shape, "bilinear", antialias=False, precision=HIGHEST) - 1
