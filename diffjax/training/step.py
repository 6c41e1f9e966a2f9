"""One training step: a pure function of the state, the batch and the root key."""

from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import optax
from einops import rearrange

from diffjax import rng
from diffjax.parallel.rules import constrain
from diffjax.training import ema
from diffjax.training.state import TrainState

Batch = Mapping[str, jax.Array]
Metrics = dict[str, jax.Array]
Loss = Callable[[Any, Batch, jax.Array], tuple[jax.Array, Metrics]]


def train_step(
    state: TrainState,
    batch: Batch,
    key: jax.Array,
    *,
    loss: Loss,
    optimizer: optax.GradientTransformation,
    rates: ema.Rates,
    microbatches: int,
) -> tuple[TrainState, Metrics]:
    """(state, batch, root key) -> (next state, float32 scalars); jitted by the caller, with `state` donated.

    Args:
        batch: arrays with the global batch in front, among them `index` [b], the example's place in the global batch.
        key: root of the training streams; the step number is folded in here.
        loss: (params, batch, key) -> (scalar, metrics), a mean over the batch.
        rates: how the averages move; `rates.tracks` has the names of `state.tracks`.
    """
    gradients, metrics = accumulate(loss, state.params, batch, rng.fold(key, state.step), microbatches)
    updates, opt_state = optimizer.update(gradients, state.opt_state, state.params)
    params = optax.apply_updates(state.params, updates)
    number = state.step + 1
    average = ema.update(state.ema, params, rates.ema(number))
    tracks = {name: ema.update(track, params, rates.tracks[name](number)) for name, track in state.tracks.items()}
    metrics["grad_norm"], metrics["param_norm"] = optax.tree.norm(gradients), optax.tree.norm(params)
    return TrainState(number, params, opt_state, average, tracks), metrics


def accumulate(loss: Loss, params: Any, batch: Batch, key: jax.Array, microbatches: int) -> tuple[Any, Metrics]:
    """Gradient and metrics of the mean loss, over `microbatches` equal parts one after the other."""
    gradient = jax.value_and_grad(loss, has_aux=True)

    def of_part(part: Batch) -> tuple[Any, Metrics]:
        (value, metrics), gradients = gradient(params, part, key)
        return gradients, {"loss": value, **metrics}

    if microbatches == 1:
        return of_part(batch)
    # Every part takes rows from all over the batch, so that each device keeps its own rows.
    parts = {name: rearrange(array, "(b m) ... -> m b ...", m=microbatches) for name, array in batch.items()}
    parts = {name: constrain(array, None, "batch") for name, array in parts.items()}
    first = jax.eval_shape(of_part, jax.tree.map(lambda array: array[0], parts))
    zero = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), first)

    def add(total: Any, part: Batch) -> tuple[Any, None]:
        return jax.tree.map(jnp.add, total, of_part(part)), None

    total, _ = jax.lax.scan(add, zero, parts)
    return jax.tree.map(lambda leaf: leaf / microbatches, total)
