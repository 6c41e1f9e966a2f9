"""Batches on the device: what training sees of values that came as they are stored.

Pixels are mirrored and scaled, latents drawn from their posteriors. Random values are drawn for (seed, number of the
batch, index of the example), so they depend neither on hosts nor on devices.
"""

from dataclasses import dataclass

import jax
import jax.numpy as jnp

from diffjax import rng
from diffjax.contracts import Batch, Stored
from diffjax.data.source import Preparation


def prepare(preparation: Preparation, stored: Stored, seed: int) -> Batch:
    """The batch of stored values."""
    key = rng.fold(rng.stream(seed, "data"), stored.number[0])
    x = preparation.draw(stored.raw, stored.mirrored, OnDevice(rng.per_example(key, stored.index)))
    condition = stored.condition
    if preparation.separate:
        x, condition = preparation.separate(x, condition)
    aux = {name: function(stored.aux[name], stored.mirrored) for name, function in preparation.aux}
    return Batch(x, condition, stored.index, aux)


@dataclass(frozen=True)
class OnDevice:
    """`contracts.Device` with one key [b] per example."""

    keys: jax.Array

    def normal(self, shape: tuple[int, ...]) -> jax.Array:
        return rng.normal(self.keys, shape)

    def divide(self, x: jax.Array, by: float) -> jax.Array:
        # XLA multiplies with the reciprocal of a number that it knows, which rounds otherwise than a division does.
        return x / jax.lax.optimization_barrier(jnp.full_like(x, by))
