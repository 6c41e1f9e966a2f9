"""What the frozen networks share: the check of their sizes, and layers of maps [b, h, w, c]."""

from typing import Any

import flax.linen as nn
import jax

from diffjax.errors import UserError
from diffjax.ops.dtypes import DTYPES

EPSILON = 1e-6  # of every GroupNorm


def check_sizes(module: Any, *options: str) -> None:
    """Raise UserError unless the options are positive integers and the compute dtype is known."""
    name = type(module).__name__
    if module.dtype not in DTYPES:
        raise UserError(f"{name}: dtype = {module.dtype!r} is unknown; valid: {', '.join(DTYPES)}")
    for option in options:
        value = getattr(module, option)
        if not isinstance(value, int) or value < 1:
            raise UserError(f"{name}: {option} = {value!r}; valid: a positive integer")


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
