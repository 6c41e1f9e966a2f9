"""Stateless named random streams.

A random value is a pure function of (seed, stream name, step, example index):

    key = fold_in(fold_in(fold_in(key(seed), crc32(stream)), step), index)

so nothing about it has to be saved, and it does not depend on the number of devices, hosts or micro-batches. The
generator is Threefry in its partitionable form whatever the environment says: of others, image i would depend on the
batch that it is drawn in, and the values on the machine.
"""

import zlib
from collections.abc import Sequence

import jax
import jax.numpy as jnp

from diffjax.errors import UserError

GENERATOR = "threefry2x32"
jax.config.update("jax_threefry_partitionable", True)  # JAX_THREEFRY_PARTITIONABLE=0 has no effect


def check_environment() -> None:
    """Raise UserError for 64-bit mode, in which layers and optimizers compute, and draw, other values."""
    if jnp.asarray(0.0).dtype == jnp.float64:
        raise UserError("jax_enable_x64 (JAX_ENABLE_X64) changes the values of a run; unset it")


def stream(seed: int | jax.Array, name: str) -> jax.Array:
    """The typed root key of stream `name` ("params", "train", ...) under `seed`, an int or a uint32 scalar."""
    return fold_name(jax.random.key(seed, impl=GENERATOR), name)


def fold_name(key: jax.Array, name: str) -> jax.Array:
    """A key for the sub-stream `name` of `key`; also maps over an array of keys."""
    return fold(key, zlib.crc32(name.encode()))


def fold(key: jax.Array, value: int | jax.Array) -> jax.Array:
    """`jax.random.fold_in`, mapped over `key` when it is an array of keys; `value` is the same for all of them."""
    if key.ndim == 0:
        return jax.random.fold_in(key, value)
    return jax.vmap(lambda k: jax.random.fold_in(k, value))(key)


def key_of(data: jax.Array) -> jax.Array:
    """The typed key of `jax.random.key_data`, uint32 [2]."""
    return jax.random.wrap_key_data(data, impl=GENERATOR)


def per_example(key: jax.Array, index: jax.Array) -> jax.Array:
    """One key per example: index [b] integers -> keys [b]."""
    return jax.vmap(lambda i: jax.random.fold_in(key, i))(index)


def normal(keys: jax.Array, shape: Sequence[int]) -> jax.Array:
    """Standard normal values, float32 [b, *shape], one key [b] per example."""
    return jax.vmap(lambda k: jax.random.normal(k, tuple(shape), jnp.float32))(keys)


def uniform(keys: jax.Array, shape: Sequence[int] = ()) -> jax.Array:
    """Uniform values in [0, 1), float32 [b, *shape], one key [b] per example."""
    return jax.vmap(lambda k: jax.random.uniform(k, tuple(shape), jnp.float32))(keys)


def integers(keys: jax.Array, high: int) -> jax.Array:
    """One integer uniform on {0, ..., high - 1} per key, int32 [b]."""
    return jax.vmap(lambda k: jax.random.randint(k, (), 0, high, jnp.int32))(keys)
