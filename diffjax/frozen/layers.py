"""What the frozen networks share: the check of their sizes, and layers of maps [b, h, w, c]."""

from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from einops import rearrange, repeat

from diffjax.errors import UserError
from diffjax.frozen.strips import Inside, Layer, in_strips
from diffjax.ops.depthwise import depthwise_conv
from diffjax.ops.dtypes import DTYPES
from diffjax.parallel.rules import constrain

EPSILON = 1e-6  # of every GroupNorm
BATCH_EPSILON = 1e-3  # of every ConvNorm
HIGHEST = jax.lax.Precision.HIGHEST  # of feature networks: lower precision changes the features and so the scores


def check_sizes(module: Any, *options: str) -> None:
    """Raise UserError unless the options are positive integers and the compute dtype is known."""
    name = type(module).__name__
    if module.dtype not in DTYPES:
        raise UserError(f"{name}: dtype = {module.dtype!r} is unknown; valid: {', '.join(DTYPES)}")
    for option in options:
        value = getattr(module, option)
        if not isinstance(value, int) or value < 1:
            raise UserError(f"{name}: {option} = {value!r}; valid: a positive integer")


def check_images(name: str, images: jax.Array) -> None:
    """Raise UserError unless images have the shape [b, h, w, 3]."""
    if images.ndim != 4 or images.shape[-1] != 3:
        raise UserError(f"{name}: images of shape {images.shape}; valid: [b, h, w, 3], of 0 .. 255")


def conv(features: int, side: int, bias: bool, dtype: Any, name: str) -> nn.Conv:
    """A convolution of side x side taps that keeps the size of the map."""
    return nn.Conv(features, (side, side), use_bias=bias, dtype=dtype, name=name)


class Depthwise(nn.Module):
    """One kernel per channel of a map [b, h, w, c], zero padding "SAME" as TensorFlow means it, float32.

    Of stride 2 it takes from a map of even sides the odd rows and columns, of odd sides the even ones.
    """

    side: int
    stride: int

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        kernel = self.param("kernel", nn.initializers.lecun_normal(), (self.side, self.side, 1, x.shape[-1]))
        with jax.default_matmul_precision("highest"):
            y = depthwise_conv(x, [kernel])
        top, left = ((side + 1) % self.stride for side in x.shape[1:3])
        return y[:, top :: self.stride, left :: self.stride]


class ConvNorm(nn.Module):
    """activation(norm(conv(x))) of a map, with the given statistics of batches that the network was trained on.

    Attributes:
        taps: rows and columns of the kernel.
        padding: "SAME" as TensorFlow means it, or "VALID".
        depthwise: every channel apart, with square kernels of odd sides and padding "SAME".
        activation: None for none.
    """

    features: int
    taps: tuple[int, int]
    stride: int = 1
    padding: str = "SAME"
    depthwise: bool = False
    activation: Callable[[jax.Array], jax.Array] | None = nn.relu

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        conv: nn.Module
        if self.depthwise:
            conv = Depthwise(self.taps[0], self.stride, name="conv")
        else:
            conv = nn.Conv(
                self.features, self.taps, self.stride, self.padding, use_bias=False, precision=HIGHEST, name="conv"
            )
        x = conv(constrain(x, "batch"))
        zeros, ones, shape = nn.initializers.zeros, nn.initializers.ones, (self.features,)
        scale, bias = self.param("scale", ones, shape), self.param("bias", zeros, shape)
        mean, variance = self.param("mean", zeros, shape), self.param("variance", ones, shape)
        x = (x - mean) * (scale * jax.lax.rsqrt(variance + BATCH_EPSILON)) + bias
        return self.activation(x) if self.activation else x


class GroupNorm(nn.Module):
    """The normalisation of a map, a function of its rows: statistics are those of the whole map, in float32.

    (x - mean) / sqrt(variance + EPSILON) scale + bias
    """

    groups: int
    dtype: Any

    @nn.compact
    def __call__(self, x: jax.Array) -> Callable[[jax.Array], jax.Array]:
        features = x.shape[-1]
        scale = self.param("scale", nn.initializers.ones, (features,))
        bias = self.param("bias", nn.initializers.zeros, (features,))
        grouped = rearrange(x, "b h w (groups c) -> b h w groups c", groups=self.groups).astype(jnp.float32)
        mean = grouped.mean((1, 2, 4), keepdims=True)
        variance = jnp.square(grouped - mean).mean((1, 2, 4), keepdims=True)
        each = features // self.groups
        mean, variance = (repeat(v, "b h w groups 1 -> b h w (groups c)", c=each) for v in (mean, variance))
        multiplier = jax.lax.rsqrt(variance + EPSILON) * scale
        return lambda rows: ((rows - mean) * multiplier + bias).astype(self.dtype)


def norm_silu(x: jax.Array, groups: int, dtype: Any, name: str) -> jax.Array:
    return nn.silu(GroupNorm(groups, dtype, name=name)(x)(x))


def norm_silu_conv(x: jax.Array, norm: GroupNorm, convolution: nn.Conv, strips: int = 1) -> jax.Array:
    """A 3 x 3 convolution of silu(norm(x)); strips: see strips.py."""
    normal = norm(x)

    def layer(inside: Inside, convolution: Layer, x: jax.Array) -> jax.Array:
        return convolution(inside(nn.silu(normal(x))))

    return in_strips(layer, strips, 1, [convolution], x)


def enlarged(x: jax.Array, convolution: nn.Conv, strips: int = 1) -> jax.Array:
    """A 3 x 3 convolution of the map of twice the size; strips: see strips.py."""

    def layer(inside: Inside, convolution: Layer, x: jax.Array) -> jax.Array:
        return convolution(inside(twice(x)))

    return in_strips(layer, strips, 1, [convolution], x, up=2)


def twice(x: jax.Array) -> jax.Array:
    """Every pixel repeated 2 x 2."""
    return x.repeat(2, axis=1).repeat(2, axis=2)
