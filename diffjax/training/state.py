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
    """The training state, a pytree."""

    step: jax.Array  # int32 scalar: the number of updates made
    params: Any  # float32
    opt_state: Any
    ema: Any  # float32, the tree of `params`
    power_emas: dict[str, Any] = flax.struct.field(default_factory=dict)  # by name, each like `ema`


def initial_state(params: Any, optimizer: optax.GradientTransformation, power_emas: Iterable[str] = ()) -> TrainState:
    """Step 0; the averages start as copies of the parameters."""
    ema, *copies = (jax.tree.map(jnp.copy, params) for _ in ("ema", *power_emas))
    return TrainState(jnp.zeros((), jnp.int32), params, optimizer.init(params), ema, dict(zip(power_emas, copies)))


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
