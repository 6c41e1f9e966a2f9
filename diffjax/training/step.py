"""One training step: a pure function of the state, the batch and the root key."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax
from einops import rearrange

from diffjax import rng
from diffjax.contracts import Batch, Metrics, Tree
from diffjax.parallel.rules import constrain
from diffjax.training import ema
from diffjax.training.state import TrainState

Loss = Callable[[Tree, Tree, Batch, jax.Array], tuple[jax.Array, Metrics]]  # params, frozen, batch, key


def train_step(
    state: TrainState,
    frozen: Tree,
    batch: Batch,
    key: jax.Array,
    *,
    loss: Loss,
    optimizer: optax.GradientTransformation,
    learning_rate: optax.Schedule,
    rates: ema.Rates,
    microbatches: int,
) -> tuple[TrainState, Metrics]:
    """(state, frozen, batch, root key) -> (next state, float32 scalars); jitted by the caller, with `state` donated.

    Args:
        frozen: parameters that the loss uses and nothing changes.
        batch: arrays with the global batch in front.
        key: root of the training streams; the step number is folded in here.
        loss: (params, frozen, batch, key) -> (scalar, metrics), a mean over the batch.
        learning_rate: that of an update, by the number of updates before it; to report.
        rates: how the averages move; `rates.power_emas` has the names of `state.power_emas`.
    """
    gradients, metrics = accumulate(loss, state.params, frozen, batch, rng.fold(key, state.step), microbatches)
    updates, opt_state = optimizer.update(gradients, state.opt_state, state.params)
    params = optax.apply_updates(state.params, updates)
    number = state.step + 1
    average = ema.update(state.ema, params, rates.ema(number))
    power_emas = {
        name: ema.update(each, params, rates.power_emas[name](number)) for name, each in state.power_emas.items()
    }
    metrics["grad_norm"], metrics["param_norm"] = optax.tree.norm(gradients), optax.tree.norm(params)
    metrics["learning_rate"] = jnp.asarray(learning_rate(state.step), jnp.float32)
    return TrainState(number, params, opt_state, average, power_emas), metrics


def accumulate(
    loss: Loss, params: Tree, frozen: Tree, batch: Batch, key: jax.Array, microbatches: int
) -> tuple[Tree, Metrics]:
    """Gradient and metrics of the mean loss, over `microbatches` equal parts one after the other."""
    gradient = jax.value_and_grad(loss, has_aux=True)

    def of_part(part: Batch) -> tuple[Any, Metrics]:
        (value, metrics), gradients = gradient(params, frozen, part, key)
        return gradients, {"loss": value, **metrics}

    if microbatches == 1:
        return of_part(batch)
    # Every part takes rows from all over the batch, so that each device keeps its own rows.
    parts = jax.tree.map(lambda array: rearrange(array, "(b m) ... -> m b ...", m=microbatches), batch)
    parts = jax.tree.map(lambda array: constrain(array, None, "batch"), parts)
    first = jax.eval_shape(of_part, jax.tree.map(lambda array: array[0], parts))
    zero = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), first)

    def add(total: Any, part: Batch) -> tuple[Any, None]:
        return jax.tree.map(jnp.add, total, of_part(part)), None

    total, _ = jax.lax.scan(add, zero, parts)
    return jax.tree.map(lambda leaf: leaf / microbatches, total)
