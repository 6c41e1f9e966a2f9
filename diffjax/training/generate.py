"""Images by number: image i is a function of (seed, i), its label and the parameters alone."""

import functools
from collections.abc import Callable, Iterator
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from diffjax import models, rng
from diffjax.parallel.mesh import BATCH_AXES, batch_sharding, replicated
from diffjax.training.objective import Apply, Objective, bind


def compile_sampler(
    objective: Objective,
    model: nn.Module,
    mesh: Mesh,
    seed: int,
    fused: bool = True,
    guide: tuple[nn.Module, Any] | None = None,
) -> functools.partial:
    """(params, indices [b] int32, labels [b] int32) -> float32 images [b, h, w, c], the batch split over the mesh.

    `params` are those of `model`. With `fused` they are fused on the way, once per batch, where the model can be. A
    guide (model, params) is the worse network of autoguidance. The result takes `plan=` in place of the objective's
    own, and another `seed=`; plans of equal shapes, and all seeds, share one compilation.
    """
    worse: Any = guide[0] if guide else None

    def bound(model: nn.Module, params: Any) -> tuple[Apply, Any]:
        form, weights = models.fused(model, params) if fused else (model, params)
        return bind(form), weights

    def sample(
        params: Any, indices: jax.Array, labels: jax.Array, plan: Any, seed: jax.Array, guide_params: Any
    ) -> jax.Array:
        keys = rng.per_example(rng.stream(seed, "sample"), indices)
        denoise_worse = None
        if worse:
            apply_worse, weights = bound(worse, guide_params)
            denoise_worse = functools.partial(apply_worse, weights)
        return objective.sample(*bound(model, params), labels, keys, plan, denoise_worse)

    jitted = jax.jit(sample, out_shardings=batch_sharding(mesh))
    return functools.partial(
        jitted, plan=objective.plan(), seed=np.uint32(seed), guide_params=guide[1] if guide else None
    )


def generate(
    sampler: Callable, params: Any, labels: np.ndarray, mesh: Mesh, batch_size: int, first: int = 0
) -> Iterator[np.ndarray]:
    """Images first, first + 1, ..., one per label, in batches of at most `batch_size` (every host gets all of them).

    The last batch is filled up with repetitions that are thrown away, so that one program serves all.
    """
    shards = int(np.prod([mesh.shape[axis] for axis in BATCH_AXES]))
    batch_size = min(batch_size, len(labels))
    batch_size = -(-batch_size // shards) * shards
    gather = jax.jit(jnp.copy, out_shardings=replicated(mesh))
    made: jax.Array | None = None  # dispatched, not fetched: the devices work while the caller does
    for start in range(0, len(labels), batch_size):
        chosen = np.minimum(np.arange(start, start + batch_size), len(labels) - 1)
        with jax.set_mesh(mesh):
            indices, classes = (_spread(array, mesh) for array in (first + chosen, labels[chosen]))
            images = gather(sampler(params, indices, classes))
        if made is not None:
            yield jax.device_get(made)
        made = images
    yield jax.device_get(made)[: len(labels) - start]


def _spread(array: np.ndarray, mesh: Mesh) -> jax.Array:
    """An array that every host has whole -> int32, split over the mesh."""
    values = array.astype(np.int32)
    return jax.make_array_from_callback(values.shape, batch_sharding(mesh), lambda index: values[index])


def interleaved_labels(num: int, num_classes: int) -> np.ndarray:
    """0, 1, ..., num_classes - 1, 0, 1, ...: classes in equal parts; zeros for an unconditional model. int32 [num]."""
    return (np.arange(num) % max(num_classes, 1)).astype(np.int32)


def uniform_labels(seed: int, num: int, num_classes: int) -> np.ndarray:
    """One class per image drawn uniformly from (seed, i), as DiT's 50,000 images were; int32 [num]."""
    keys = rng.per_example(rng.stream(seed, "sample_label"), jnp.arange(num))
    return np.asarray(rng.integers(keys, max(num_classes, 1)), np.int32)
