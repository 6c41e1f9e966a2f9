"""The step: accumulation, averaging, determinism, what is donated."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from diffjax.contracts import Batch
from diffjax.experiment import build
from diffjax.training import ema
from diffjax.training.state import initial_state
from diffjax.training.step import accumulate, train_step
from tests.programs import tiny_config


def loss(params, frozen, batch, key):
    """A regression whose noise hangs on the example's index."""
    noise = jax.vmap(lambda i: jax.random.normal(jax.random.fold_in(key, i)))(batch.index)
    error = batch.x @ params["w"] + frozen * noise - batch.condition
    return jnp.mean(error**2), {"mse": jnp.mean(error**2)}


def example_batch(n=12):
    r = np.random.default_rng(0)
    x, condition = (jnp.asarray(r.normal(size=shape), jnp.float32) for shape in ((n, 5), n))
    return Batch(x, condition, jnp.arange(n))


@pytest.mark.parametrize("microbatches", [2, 3, 12])
def test_accumulated_gradients_equal_those_of_the_whole_batch(microbatches):
    params, key = {"w": jnp.ones(5)}, jax.random.key(0)
    whole = accumulate(loss, params, 0.1, example_batch(), key, 1)
    parts = accumulate(loss, params, 0.1, example_batch(), key, microbatches)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=2e-5), whole, parts)


def test_one_step_is_adamw_and_the_average():
    params, key = {"w": jnp.ones(5)}, jax.random.key(0)
    optim = optax.adamw(0.1)
    state = initial_state(params, optim)
    rate = lambda count: 0.1 - 0.01 * count  # noqa: E731
    rates = ema.Rates(ema.constant(0.9))
    step = functools.partial(train_step, loss=loss, optimizer=optim, learning_rate=rate, rates=rates, microbatches=1)
    state, metrics = step(state, 0.1, example_batch(), key)
    gradient = jax.grad(lambda p: loss(p, 0.1, example_batch(), jax.random.fold_in(key, 0))[0])(params)["w"]
    moved = params["w"] - 0.1 * (jnp.sign(gradient) + 1e-4 * params["w"])  # the first step of Adam is the sign
    np.testing.assert_allclose(state.params["w"], moved, rtol=1e-4)
    np.testing.assert_allclose(state.ema["w"], 0.9 * params["w"] + 0.1 * state.params["w"], rtol=1e-6)
    assert int(state.step) == 1
    np.testing.assert_allclose(metrics["grad_norm"], jnp.linalg.norm(gradient), rtol=1e-6)
    np.testing.assert_allclose(metrics["learning_rate"], 0.1, rtol=1e-6)  # that of the first update


def test_average_of_constant_parameters_is_constant():
    params = {"w": jnp.array([0.1, -3.0])}
    np.testing.assert_array_equal(ema.update(params, params, 0.9999)["w"], params["w"])


def test_the_compiled_step_donates_its_state_and_repeats_itself():
    experiment = build(tiny_config(), devices=jax.devices()[:1])
    batches = experiment.stream()
    batch = next(batches)
    batches.close()
    with jax.set_mesh(experiment.mesh):
        put = experiment.put(batch)
        first = experiment.init()
        kernel = first.params["patch_embed"]["kernel"]
        state, metrics = experiment.step(first, experiment.frozen, put, experiment.key)
        assert kernel.is_deleted()
        again, metrics_again = experiment.step(experiment.init(), experiment.frozen, put, experiment.key)
        assert experiment.step._cache_size() == 1
    jax.tree.map(np.testing.assert_array_equal, jax.device_get(state), jax.device_get(again))
    assert float(metrics["loss"]) == float(metrics_again["loss"])


def test_a_step_keeps_its_constraints_without_a_mesh_in_context():
    """`jax.set_mesh` may be forgotten in a notebook; the program for a mesh is the same."""
    experiment = build(tiny_config())
    number = jax.ShapeDtypeStruct((experiment.batch_size,), jnp.int32)
    x = jax.ShapeDtypeStruct((experiment.batch_size, 8, 8, 1), jnp.float32)
    arguments = experiment.abstract, {}, Batch(x, number, number), experiment.key

    def constraints():
        return str(experiment.step.trace(*arguments).jaxpr).count("sharding_constraint[")

    alone = constraints()
    with jax.set_mesh(experiment.mesh):
        assert alone == constraints() > 0
