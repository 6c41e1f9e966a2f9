"""The stream of training batches as training sees them."""

import functools
from typing import Any

import jax

from diffjax.contracts import Batch, Stored
from diffjax.data import pipeline
from diffjax.data.source import Source
from diffjax.training.batches import prepare

PREPARE = jax.jit(prepare, static_argnums=0)


def seen(source: Source, stored: Stored, seed: int = 0) -> Batch:
    """A batch of numpy arrays."""
    return jax.device_get(PREPARE(source.preparation, stored, seed=seed))


class Batches(pipeline.Batches):
    """`pipeline.Batches`, each prepared."""

    def __init__(self, source: Source, **options: Any):
        super().__init__(source, **options)
        self._seen = functools.partial(seen, source, seed=options["seed"])

    def __next__(self) -> Any:
        return self._seen(super().__next__())
