"""EDM's augmentation of small images, on which the network is conditioned (arXiv 2206.00364, appendix F.2).

Of each image, by draws of its own: mirrored in x with probability 1/2, and each of the following with probability p,
with w standard normal and u uniform in [0, 1):

    yflip       mirrored in y if a coin says so        scale      s = 2^(0.2 w)
    rotation    theta = pi (2u - 1)                    aniso      t = 2^(0.2 w), along r = pi (2u - 1) or, half of the
    translation W w0 / 8, H w1 / 8 pixels                         time, along x: r = 0

The mirrors move pixels. The rest is one affine map from positions in the result to positions in the image, in pixels
with the origin at the centre and y downwards; R is a rotation, D a diagonal matrix:

    G(o) = L (o - (W w0, H w1) / 8),   L = 1/s R(theta) R(-r) D(1/t, t) R(r)                                       (1)

To map without aliasing, the image is mirrored at its edges (size - 1 pixels to every side), made twice as large with
the orthonormal low-pass filter `FILTER` (sym6), read by (1) bilinearly, with zeros outside, at twice the resolution and
with 6 more pixels to every side, and made half as large with the same filter. The public code mirrors no more pixels
than the strongest map of a batch needs, on which its result depends by up to 1.5e-5; here nothing depends on the batch.

The network gets 9 numbers, all zero for an image that was not augmented, which is what samplers ask for:

    [xflip, yflip, w of s, cos(theta) - 1, sin(theta), w of t cos(r), w of t sin(r), w0, w1]                       (2)
"""

import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from diffjax import rng

LABELS = 9
MARGIN = 6  # pixels around the result that the filter on the way down reaches
FILTER = np.array(
    [
        *(0.015404109327027373, 0.0034907120842174702, -0.11799011114819057, -0.048311742585633),
        *(0.4910559419267466, 0.787641141030194, 0.3379294217276218, -0.07263748278646252),
        *(-0.021060292512300564, 0.04472490177066578, 0.0017677118642428036, -0.007800708325034148),
    ]
)


class Draws(NamedTuple):
    """Random draws for the images, each [b] unless noted; all zero for an unchanged image.

    Attributes:
        xflip, yflip: 0 or 1. scale: w of s. rotation: theta. aniso, axis: w of t, and r. translation: w0, w1, [b, 2].
        gates: uniform in [0, 1), [b, 6], of yflip, scale, rotation, aniso and translation, and of the axis.
    """

    xflip: jax.Array
    yflip: jax.Array
    scale: jax.Array
    rotation: jax.Array
    aniso: jax.Array
    axis: jax.Array
    translation: jax.Array
    gates: jax.Array


def augment(images: jax.Array, keys: jax.Array, probability: float) -> tuple[jax.Array, jax.Array]:
    """Augmented images and the labels that the network is conditioned on.

    Args:
        images: float32 [b, h, w, c], pixels in [-1, 1]; the result may go a little beyond.
        keys: typed [b], one per image, all that its augmentation depends on.
        probability: p, 0 to 1; at 0 the mirror in x is off, too.

    Returns:
        float32 [b, h, w, c] and labels float32 [b, 9], eq. 2.

    For 64 images of 32 x 32 (64 x 64) about 15 (150) ms were measured on 2 cores of a CPU, beside 2 s for the gradient
    of a U of 1.2 million parameters at 32 x 32; on a TPU v5e it takes 38 (276) MiB of memory.
    """
    draws = gated(draw(keys), probability)
    return transform(images, draws), labels(draws)


def draw(keys: jax.Array) -> Draws:
    """All draws of keys [b], before the gates are looked at."""
    scale, aniso, *translation = rng.normal(rng.fold_name(keys, "normal"), (4,)).T
    xflip, yflip, rotation, axis, *gates = rng.uniform(rng.fold_name(keys, "uniform"), (10,)).T
    return Draws(
        xflip=jnp.floor(2 * xflip),
        yflip=jnp.floor(2 * yflip),
        scale=scale,
        rotation=math.pi * (2 * rotation - 1),
        aniso=aniso,
        axis=math.pi * (2 * axis - 1),
        translation=jnp.stack(translation, axis=-1),
        gates=jnp.stack(gates, axis=-1),
    )


def gated(draws: Draws, probability: float) -> Draws:
    """The draws with zeros where their gate is closed; that of xflip always stands open, but at probability 0."""
    yflip, scale, rotation, aniso, translation = (draws.gates[:, :5] < probability).astype(jnp.float32).T
    turned = draws.gates[:, 5] < 0.5
    return draws._replace(
        xflip=draws.xflip * (probability > 0),
        yflip=draws.yflip * yflip,
        scale=draws.scale * scale,
        rotation=draws.rotation * rotation,
        aniso=draws.aniso * aniso,
        axis=draws.axis * aniso * turned,
        translation=draws.translation * translation[:, None],
    )


def labels(draws: Draws) -> jax.Array:
    """Eq. 2 of gated draws, float32 [b, 9]."""
    turn = [jnp.cos(draws.rotation) - 1, jnp.sin(draws.rotation)]
    aniso = [draws.aniso * jnp.cos(draws.axis), draws.aniso * jnp.sin(draws.axis)]
    return jnp.stack([draws.xflip, draws.yflip, draws.scale, *turn, *aniso, *draws.translation.T], axis=-1)


def transform(images: jax.Array, draws: Draws) -> jax.Array:
    """Images [b, h, w, c] mirrored and mapped by gated draws."""
    height, width = images.shape[1:3]
    return warp(mirrored(images, draws), affine(draws, height, width))


def mirrored(images: jax.Array, draws: Draws) -> jax.Array:
    """Apply the mirrors only, exactly."""
    for flip, axis in ((draws.xflip, 2), (draws.yflip, 1)):
        images = jnp.where(flip.astype(bool)[:, None, None, None], jnp.flip(images, axis), images)
    return images


def affine(draws: Draws, height: int, width: int) -> jax.Array:
    """Eq. 1 as [L, offset] with (x, y) in this order, float32 [b, 2, 3]."""
    t = jnp.exp2(0.2 * draws.aniso)
    diagonal = jnp.stack([1 / t, t], axis=-1) * jnp.exp2(-0.2 * draws.scale)[:, None]
    with jax.default_matmul_precision("highest"):
        linear = (_rotation(draws.rotation - draws.axis) * diagonal[:, None]) @ _rotation(draws.axis)
        offset = linear @ (-0.125 * draws.translation * np.array([width, height], np.float32))[..., None]
    return jnp.concatenate([linear, offset], axis=-1)


def _rotation(angle: jax.Array) -> jax.Array:
    """R: angle [b] -> [b, 2, 2]."""
    cos, sin = jnp.cos(angle), jnp.sin(angle)
    return jnp.stack([jnp.stack([cos, -sin], axis=-1), jnp.stack([sin, cos], axis=-1)], axis=-2)


def warp(images: jax.Array, matrices: jax.Array) -> jax.Array:
    """Images [b, h, w, c] read at the positions that `matrices` [b, 2, 3] say, eq. 1."""
    height, width = images.shape[1:3]
    sampled = sample(enlarged(images), matrices, height, width)
    return _separably(sampled, shrinking(height), shrinking(width))


def enlarged(images: jax.Array) -> jax.Array:
    """Images mirrored at their edges and twice as large, [b, h, w, c] -> [b, 6h - 1, 6w - 1, c]; see `enlarging`."""
    return _separably(images, enlarging(images.shape[1]), enlarging(images.shape[2]))


def sample(image: jax.Array, matrices: jax.Array, height: int, width: int) -> jax.Array:
    """The output of `enlarged`, sampled bilinearly at the positions of the finer grid: [b, 2h + 12, 2w + 12, c].

    Four look-ups of all channels at one index: 17 ms on a CPU for 64 images of 32 x 32, with all the rest, against 94
    for products with rows of weights, which need no look-up, 29 for one look-up of 2 x 2 pixels and 37 for one of four
    pixels packed beforehand; on a TPU the last two take 50 and 7 times the memory.

    As the filter has an even number of values, both grids lie half a pixel, of the finer grid, off the centre of their
    image; counted from there, in pixels of the finer grid, pixel i of one is read from j of the other:

        j = L (i - (W + 5)) + 2 offset + 3 (W - 1)
    """
    b, _, columns, channels = image.shape
    x, y = (jnp.arange(2 * (size + MARGIN)) - (size + MARGIN - 1.0) for size in (width, height))
    terms = matrices[..., None, None]  # two rows of [b, 3, 1, 1]
    at_x, at_y = (row[:, 0] * x + row[:, 1] * y[:, None] + 2 * row[:, 2] for row in (terms[:, 0], terms[:, 1]))
    column, right = _neighbours(at_x + 3 * (width - 1), width)
    row, below = _neighbours(at_y + 3 * (height - 1), height)
    positions = (row * columns + column).reshape(b, -1, 1)
    pixels = image.reshape(b, -1, channels)

    def read(step: int) -> jax.Array:
        found = jnp.take_along_axis(pixels, positions + step, axis=1, mode="promise_in_bounds")
        return found.reshape(*column.shape, channels)

    right, below = right[..., None], below[..., None]
    upper = (1 - right) * read(0) + right * read(1)
    lower = (1 - right) * read(columns) + right * read(columns + 1)
    return (1 - below) * upper + below * lower


def _neighbours(position: jax.Array, size: int) -> tuple[jax.Array, jax.Array]:
    """Along an axis of what `enlarged` gave: number of the pixel before each position, and the part of the next.

    Positions outside are moved to the nearest from which nothing but zeros is read.
    """
    position = jnp.clip(position, -1, 6 * size - 4)
    before = jnp.floor(position)
    return before.astype(jnp.int32) + 1, position - before


def enlarging(size: int) -> np.ndarray:
    """Matrix [6 size - 1, size]: mirrored to 3 size - 2 pixels, twice as many, and zeros: one before, two after."""
    spread = np.zeros((6 * size - 4, size))
    spread[::2] = np.pad(np.eye(size), ((size - 1, size - 1), (0, 0)), mode="reflect")
    filtered = np.stack([np.convolve(column, FILTER) for column in spread.T], axis=1)
    return np.pad(filtered[5 : 5 + len(spread)], ((1, 2), (0, 0)))


def shrinking(size: int) -> np.ndarray:
    """Matrix [size, 2 size + 12]: half as many pixels, without those of the margin."""
    matrix = np.zeros((size, 2 * (size + MARGIN)))
    for i in range(size):
        matrix[i, 2 * i + 1 : 2 * i + 1 + len(FILTER)] = FILTER
    return matrix


def _separably(images: jax.Array, rows: np.ndarray, columns: np.ndarray) -> jax.Array:
    """The matrices applied along the height and the width of images [b, h, w, c]."""
    images = jnp.einsum("bhwc,xw->bhxc", images, columns.astype(np.float32), precision="highest")
    return jnp.einsum("bhxc,yh->byxc", images, rows.astype(np.float32), precision="highest")
