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

SQUARED_NORMS = {"grad_squares": "grad_norm", "param_squares": "param_norm"}  # of every array; the norm of all
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
    """(state, frozen, batch, root key) -> (next state, metrics); jitted by the caller, with `state` donated.

    Metrics are float32 scalars (`skipped`, 0 or 1: whether the update was left out), and under the names of
    `SQUARED_NORMS` the squared norm of every array of the gradient and of the new parameters, in the order of the
    tree's leaves.

    Args:
        frozen: parameters that the loss uses and nothing changes.
        batch: arrays with the global batch in front.
        key: root of the training streams; the step number is folded in here.
        loss: (params, frozen, batch, key) -> (scalar, metrics), a mean over the batch.
        learning_rate: that of an update, by the number of updates before it; to report.
        rates: how the averages move; `rates.power_emas` has the names of `state.power_emas`.
    """
    gradients, metrics = accumulate(loss, state.params, frozen, batch, rng.fold(key, state.step), microbatches)
    updates_made = state.step
    if isinstance(state.opt_state, optax.ApplyIfFiniteState):
        updates_made -= state.opt_state.total_notfinite
    updates, opt_state = optimizer.update(gradients, state.opt_state, state.params)
    params = optax.apply_updates(state.params, updates)
    number = state.step + 1
    average = ema.update(state.ema, params, rates.ema(number))
    power_emas = {
        name: ema.update(each, params, rates.power_emas[name](number)) for name, each in state.power_emas.items()
    }
    for (per_array, norm), tree in zip(SQUARED_NORMS.items(), (gradients, params)):
        squares = [jnp.sum(jnp.square(leaf)) for leaf in jax.tree.leaves(tree)]
        metrics[per_array], metrics[norm] = jnp.stack(squares), jnp.sqrt(sum(squares))
    if isinstance(opt_state, optax.ApplyIfFiniteState):
        # One skipped step too many, and the parameters take over what is not finite.
        metrics["skipped"] = jnp.float32(~opt_state.last_finite & jnp.isfinite(metrics["param_norm"]))
        metrics["skipped_steps"] = jnp.float32(opt_state.total_notfinite)
    metrics["learning_rate"] = jnp.asarray(learning_rate(updates_made), jnp.float32)
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
