"""Samples by number: sample i is a function of (seed, i), its condition and the parameters alone."""

import functools
from collections.abc import Callable, Iterator
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from diffjax import models, rng
from diffjax.contracts import Apply, Sampler, Tree, bind
from diffjax.parallel.hosts import fetch_whole
from diffjax.parallel.mesh import BATCH_AXES, batch_sharding
from diffjax.parallel.rules import on_mesh


def compile_sampler(
    sampler: Sampler,
    model: nn.Module,
    mesh: Mesh,
    seed: int,
    *,
    decode: Tree = None,
    fused: bool = True,
    guide: tuple[nn.Module, Tree] | None = None,
) -> functools.partial:
    """(params, indices [b] int32, conditions [b, ...]) -> samples [b, ...], the batch split over the mesh.

    `params` are those of `model`, sharded or not. With `fused` they are fused on the way, once per batch, where the
    model can be. decode: makes pictures float32 [b, h, w, c] of what is drawn. A guide (model, params) is the worse
    network of autoguidance. The result takes `schedule=` in place of the sampler's own, and another `seed=`; schedules
    of equal shapes, and all seeds, share one compilation.
    """
    worse: Any = guide[0] if guide else None

    def bound(model: nn.Module, params: Tree) -> tuple[Apply, Tree]:
        form, weights = models.fused(model, params) if fused else (model, params)
        return bind(form), weights

    def sample(
        params: Tree,
        indices: jax.Array,
        conditions: jax.Array,
        schedule: Tree,
        decode: Tree,
        seed: jax.Array,
        guide_params: Tree,
    ) -> jax.Array:
        keys = rng.per_example(rng.stream(seed, "sample"), indices)
        denoise_worse = None
        if worse:
            apply_worse, weights = bound(worse, guide_params)
            denoise_worse = functools.partial(apply_worse, weights)
        apply, weights = bound(model, params)
        x = sampler.sample(apply, weights, schedule, conditions, keys, denoise_worse)
        return x if decode is None else decode(x)

    jitted = jax.jit(on_mesh(sample, mesh), out_shardings=batch_sharding(mesh))
    return functools.partial(
        jitted, schedule=sampler.schedule, decode=decode, seed=np.uint32(seed), guide_params=guide[1] if guide else None
    )


def shape_of(sampler: functools.partial, params: Tree, condition: np.ndarray, mesh: Mesh) -> tuple[int, ...]:
    """The shape of one sample; nothing is compiled. sampler: from `compile_sampler`. condition: [1, ...]."""
    shards = _shards(mesh)
    jitted: Any = sampler.func
    numbers, conditions = np.arange(shards, dtype=np.int32), np.repeat(condition, shards, axis=0)
    with jax.set_mesh(mesh):
        drawn = jitted.eval_shape(params, numbers, conditions, **sampler.keywords)
    return tuple(drawn.shape[1:])


def generate(
    sampler: Callable, params: Tree, conditions: np.ndarray, numbers: np.ndarray, mesh: Mesh, batch_size: int
) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """(numbers [n], samples [n, ...]) of this process's part of one batch after the other; see `_batches`."""
    for chosen, real, drawn in _batches(sampler, params, conditions, numbers, mesh, batch_size):
        yield from _own_part(chosen, real, drawn)


def generate_everywhere(
    sampler: Callable, params: Tree, conditions: np.ndarray, numbers: np.ndarray, mesh: Mesh, batch_size: int
) -> Iterator[np.ndarray]:
    """The samples of one whole batch after the other, on every process; see `_batches`."""
    for _, real, drawn in _batches(sampler, params, conditions, numbers, mesh, batch_size):
        yield fetch_whole(drawn)[:real]


def _batches(
    sampler: Callable, params: Tree, conditions: np.ndarray, numbers: np.ndarray, mesh: Mesh, batch_size: int
) -> Iterator[tuple[np.ndarray, int, jax.Array]]:
    """(numbers of the rows, how many of them count, samples) of one batch after the other.

    Args:
        sampler: from `compile_sampler`.
        conditions: [m, ...], one for each of `numbers`, int [m].
        batch_size: filled up to a multiple of the devices that share a batch. The last batch is filled up with
            repetitions, so that one program serves all, and a sample does not depend on how many are asked for.

    The devices work on the next batch while the caller has this one.
    """
    shards = _shards(mesh)
    batch_size = -(-batch_size // shards) * shards
    made: tuple[np.ndarray, int, jax.Array] | None = None
    for start in range(0, len(numbers), batch_size):
        chosen = np.minimum(np.arange(start, start + batch_size), len(numbers) - 1)
        real = min(batch_size, len(numbers) - start)
        with jax.set_mesh(mesh):
            indices = _spread(numbers[chosen].astype(np.int32), mesh)
            drawn = sampler(params, indices, _spread(conditions[chosen], mesh))
        if made is not None:
            yield made
        made = numbers[chosen], real, drawn
    if made is not None:
        yield made


def _shards(mesh: Mesh) -> int:
    """How many parts of a batch there are."""
    return int(np.prod([mesh.shape[axis] for axis in BATCH_AXES]))


def _own_part(numbers: np.ndarray, real: int, drawn: jax.Array) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """The rows of a batch that this process holds, each once, without repetitions; in order of their place."""
    parts = {}
    for shard in drawn.addressable_shards:
        if shard.replica_id == 0:
            rows = shard.index[0].indices(len(numbers))
            parts[rows[0]] = (np.arange(*rows), shard.data)
    if not parts:
        return
    places = np.concatenate([parts[first][0] for first in sorted(parts)])
    rows = np.concatenate([np.asarray(parts[first][1]) for first in sorted(parts)])
    yield numbers[places[places < real]], rows[places < real]


def _spread(array: np.ndarray, mesh: Mesh) -> jax.Array:
    """An array that every host has whole, split over the mesh."""
    return jax.make_array_from_callback(array.shape, batch_sharding(mesh), lambda index: array[index])


def interleaved_labels(num: int, num_classes: int) -> np.ndarray:
    """0, 1, ..., num_classes - 1, 0, 1, ...: classes in equal parts; zeros for an unconditional model. int32 [num]."""
    return (np.arange(num) % max(num_classes, 1)).astype(np.int32)


def uniform_labels(seed: int, num: int, num_classes: int) -> np.ndarray:
    """One class per image drawn uniformly from (seed, i), as DiT's 50,000 images were; int32 [num]."""
    keys = rng.per_example(rng.stream(seed, "sample_label"), jnp.arange(num))
    return np.asarray(rng.integers(keys, max(num_classes, 1)), np.int32)
