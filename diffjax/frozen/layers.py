"""Layers that the convolutional frozen networks share; maps are [b, h, w, c]."""

from typing import Any

import flax.linen as nn
import jax

EPSILON = 1e-6  # of every GroupNorm


def conv(features: int, side: int, bias: bool, dtype: Any, name: str) -> nn.Conv:
    """A convolution of side x side taps that keeps the size of the map."""
    return nn.Conv(features, (side, side), use_bias=bias, dtype=dtype, name=name)


def group_norm(x: jax.Array, groups: int, dtype: Any, name: str) -> jax.Array:
    """GroupNorm with statistics in float32."""
    return nn.GroupNorm(groups, epsilon=EPSILON, use_fast_variance=False, dtype=dtype, name=name)(x)


def norm_silu(x: jax.Array, groups: int, dtype: Any, name: str) -> jax.Array:
    return nn.silu(group_norm(x, groups, dtype, name))


def twice(x: jax.Array) -> jax.Array:
    """Every pixel repeated 2 x 2."""
    return x.repeat(2, axis=1).repeat(2, axis=2)
