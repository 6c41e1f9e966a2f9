"""From a config to the compiled pieces of a run: model, objective, shardings, initial state, step.

Nothing large is ever held by one device: shapes come from `jax.eval_shape`, shardings from the shapes, and the state
is made by a jitted function whose outputs are already sharded.
"""

import functools
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import flax.linen as nn
import jax
import numpy as np
from jax.sharding import Mesh
from ml_collections import ConfigDict

from diffjax import rng
from diffjax.errors import UserError
from diffjax.options import options, parse
from diffjax.parallel.mesh import batch_sharding, check_batch, check_processes, make_mesh, replicated
from diffjax.parallel.rules import parameters
from diffjax.training import ema
from diffjax.training.objective import (
    EXTRA_AXES,
    Apply,
    Objective,
    bind,
    build_model,
    build_objective,
    example,
    init_extra,
)
from diffjax.training.optimizer import OPTIMIZERS, Optim, make
from diffjax.training.state import TrainState, initial_state, state_shardings, with_shardings
from diffjax.training.step import train_step


@dataclass(frozen=True)
class Setup:
    """Everything a run needs except its data and its folder.

    Attributes:
        abstract: shapes, dtypes and shardings of the state.
        init: () -> state at step 0. step: (state, batch, key) -> (state, metrics), donates the state.
    """

    config: ConfigDict
    mesh: Mesh
    model: nn.Module
    apply: Apply
    objective: Objective
    abstract: TrainState
    init: Callable[[], TrainState]
    step: Callable[[TrainState, Mapping[str, jax.Array], jax.Array], tuple[TrainState, dict[str, jax.Array]]]

    @functools.cached_property
    def key(self) -> jax.Array:
        """Root of the training streams."""
        return jax.jit(lambda: rng.stream(self.config.seed, "train"), out_shardings=replicated(self.mesh))()

    def put(self, batch: Mapping[str, np.ndarray]) -> dict[str, jax.Array]:
        """This host's part of a batch -> arrays of the global batch, sharded over the mesh."""
        sharding = batch_sharding(self.mesh)
        with jax.transfer_guard_host_to_device("allow"):  # the one transfer of a step that is meant
            return {
                name: jax.make_array_from_process_local_data(
                    sharding, array, (self.config.batch_size, *array.shape[1:])
                )
                for name, array in batch.items()
            }


def build(config: ConfigDict, devices: Any = None) -> Setup:
    """Check the config against itself and the devices, and prepare the jitted functions; compiles nothing yet."""
    check_numbers(config)
    mesh = make_mesh(config.parallel.mesh, devices)
    check_batch(config.batch_size, mesh, config.optim.accumulate)
    check_processes(mesh)
    model, objective = build_model(config), build_objective(config)
    params_key = rng.stream(config.seed, "params")
    axes = (*EXTRA_AXES, *model.logical_axes)
    leaves = parameters(jax.eval_shape(lambda key: init_params(model, config, key), params_key), axes)
    optim, _ = make(Optim(**config.optim), config.total_steps, leaves)
    rates = ema.rates(averages(config), config.batch_size)

    def init(key: jax.Array) -> TrainState:
        return initial_state(init_params(model, config, key), optim, rates.tracks)

    shapes = jax.eval_shape(init, params_key)
    sharding = state_shardings(shapes, mesh, config.parallel, axes, OPTIMIZERS[config.optim.name].state_axes)
    jitted_init = jax.jit(init, out_shardings=sharding)

    apply = bind(model)
    step = functools.partial(
        train_step,
        loss=functools.partial(objective.loss, apply),
        optimizer=optim,
        rates=rates,
        microbatches=config.optim.accumulate,
    )
    return Setup(
        config=config,
        mesh=mesh,
        model=model,
        apply=apply,
        objective=objective,
        abstract=with_shardings(shapes, sharding),
        init=lambda: jitted_init(params_key),
        step=jax.jit(step, donate_argnums=0, out_shardings=(sharding, replicated(mesh))),
    )


def averages(config: ConfigDict) -> ema.Ema:
    """The section `ema`, whose tracks are text: "0.05,0.1"."""
    tracks = parse("ema.tracks", options(ema.Ema)["tracks"], config.ema.tracks)
    return ema.Ema(**{**config.ema, "tracks": tracks})


def init_params(model: nn.Module, config: ConfigDict, key: jax.Array) -> Any:
    """Fresh parameters of the backbone, traced on one blank example, and of the loss."""
    return {**model.init(key, *example(config))["params"], **init_extra(config)}


def abstract_params(config: ConfigDict, mesh: Mesh) -> Any:
    """Shapes of the parameters, replicated over the mesh: what a restore for sampling needs."""
    shapes = jax.eval_shape(lambda key: init_params(build_model(config), config, key), jax.random.key(0))
    return with_shardings(shapes, jax.tree.map(lambda leaf: replicated(mesh), shapes))


def check_numbers(config: ConfigDict) -> None:
    """Raise UserError for counts that are not counts."""
    positive = {
        "total_steps": config.total_steps,
        "batch_size": config.batch_size,
        "optim.accumulate": config.optim.accumulate,
        "checkpoint.every_steps": config.checkpoint.every_steps,
        "checkpoint.keep": config.checkpoint.keep,
        "log.every_steps": config.log.every_steps,
    }
    if config.evals.samples.every_steps:
        positive["evals.samples.num"] = config.evals.samples.num
    if wrong := [f"{name} = {value}" for name, value in positive.items() if value < 1]:
        raise UserError(f"{', '.join(wrong)}: valid: 1 or more")
    if not 0 <= config.seed < 2**32:
        raise UserError(f"seed = {config.seed}: valid: 0 to 2**32 - 1")
