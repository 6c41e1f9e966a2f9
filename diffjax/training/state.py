"""The training state: what a checkpoint holds and a step maps to its successor."""

from collections.abc import Iterable
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh, NamedSharding

from diffjax.parallel.rules import LogicalAxes, StateAxes, parameters, shardings


@flax.struct.dataclass
class TrainState:
    """step: int32 scalar, the number of updates made. params, ema: float32, same tree; so is each of `tracks`, the
    power-function averages by name."""

    step: jax.Array
    params: Any
    opt_state: Any
    ema: Any
    tracks: dict[str, Any] = flax.struct.field(default_factory=dict)


def initial_state(params: Any, optimizer: optax.GradientTransformation, tracks: Iterable[str] = ()) -> TrainState:
    """Step 0; the averages start as copies of the parameters."""
    ema, *copies = (jax.tree.map(jnp.copy, params) for _ in ("ema", *tracks))
    return TrainState(jnp.zeros((), jnp.int32), params, optimizer.init(params), ema, dict(zip(tracks, copies)))


def state_shardings(
    abstract: TrainState,
    mesh: Mesh,
    strategy: str,
    replicate_below: int,
    axes: LogicalAxes,
    state_axes: StateAxes | None = None,
) -> TrainState:
    """A TrainState of NamedShardings, by a strategy, the model's logical axes and the optimizer's `state_axes`."""
    owners = parameters(abstract.params, axes)
    return shardings(abstract, mesh, strategy, axes, replicate_below, owners, state_axes)


def with_shardings(abstract: Any, sharding: Any) -> Any:
    """The same shapes with shardings attached, as a restore needs them."""

    def attach(leaf: jax.ShapeDtypeStruct, where: NamedSharding) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=where)

    return jax.tree.map(attach, abstract, sharding)
