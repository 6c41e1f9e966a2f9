"""Maps that are computed strip by strip, so that what a layer makes on the way exists for a few rows at a time."""

from collections.abc import Callable, Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from diffjax.parallel.rules import constrain

Layer = Callable[..., jax.Array]
Inside = Callable[[jax.Array], jax.Array]


def in_strips(
    layer: Layer, strips: int, halo: int, modules: Sequence[nn.Module], *maps: jax.Array, up: int = 1
) -> jax.Array:
    """What a layer makes of maps, [b, up h, w', c'], as one or in strips one after the other; equal but for rounding.

    Args:
        layer: (inside, *modules, *maps) -> map. Of r rows it makes up * r; each depends on no more than the `halo`
            rows above and below. It gives the input of every convolution to `inside`, which makes zeros of the rows
            beyond the map, as the convolution's padding is.
        strips: a divisor of h.
        modules: those that the layer calls, with their parameters.
        maps: [b, h, w, c], of the same height.
    """
    if strips == 1:
        return layer(lambda x: x, *modules, *maps)
    height = maps[0].shape[1]
    rows = height // strips
    # Inside a loop of jax a module of flax is a function of its parameters.
    functions = [_function(module) for module in modules]

    def of_strip(first: jax.Array) -> jax.Array:
        numbers = first + jnp.arange(-halo, rows + halo)
        valid = (numbers >= 0) & (numbers < height)
        taken = [each.take(numbers, axis=1, mode="clip") for each in maps]

        def inside(x: jax.Array) -> jax.Array:
            return jnp.where(valid.repeat(x.shape[1] // len(numbers))[:, None, None], x, 0)

        return layer(inside, *functions, *taken)[:, up * halo : up * (halo + rows)]

    def add(strip: jax.Array, made: jax.Array) -> jax.Array:
        return jax.lax.dynamic_update_slice_in_dim(made, of_strip(rows * strip), up * rows * strip, axis=1)

    # All of it is overwritten. Zeros would not wait for anything, and a compiler would make those of all layers ahead.
    shape = jax.eval_shape(of_strip, jax.ShapeDtypeStruct((), jnp.int32))
    first = maps[0][:, :1, :1, :1].astype(shape.dtype)
    empty = jnp.broadcast_to(first, (shape.shape[0], up * height, *shape.shape[2:]))
    return jax.lax.fori_loop(0, strips, add, constrain(empty, "batch"))


def _function(module: nn.Module) -> Callable[..., Any]:
    alone, variables = module.unbind()
    return lambda *args: alone.apply(variables, *args)
