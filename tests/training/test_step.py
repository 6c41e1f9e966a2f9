"""The step: accumulation, averaging, determinism, what is donated."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from diffjax.training import ema
from diffjax.training.loop import open_batches
from diffjax.training.optimizer import optimizer, schedule
from diffjax.training.setup import build
from diffjax.training.state import initial_state
from diffjax.training.step import accumulate, train_step
from tests.programs import tiny_config


def loss(params, batch, key):
    """A regression whose noise hangs on the example's index."""
    noise = jax.vmap(lambda i: jax.random.normal(jax.random.fold_in(key, i)))(batch["index"])
    error = batch["image"] @ params["w"] + 0.1 * noise - batch["label"]
    return jnp.mean(error**2), {"mse": jnp.mean(error**2)}


def example_batch(n=12):
    r = np.random.default_rng(0)
    return {
        "image": jnp.asarray(r.normal(size=(n, 5)), jnp.float32),
        "label": jnp.asarray(r.normal(size=n), jnp.float32),
        "index": jnp.arange(n),
    }


@pytest.mark.parametrize("microbatches", [2, 3, 12])
def test_accumulated_gradients_equal_those_of_the_whole_batch(microbatches):
    params, key = {"w": jnp.ones(5)}, jax.random.key(0)
    whole = accumulate(loss, params, example_batch(), key, 1)
    parts = accumulate(loss, params, example_batch(), key, microbatches)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=2e-5), whole, parts)


def test_one_step_is_adamw_and_the_average():
    params, key = {"w": jnp.ones(5)}, jax.random.key(0)
    optim = optax.adamw(0.1)
    state = initial_state(params, optim)
    step = functools.partial(train_step, loss=loss, optimizer=optim, rates=ema.Rates(ema.constant(0.9)), microbatches=1)
    state, metrics = step(state, example_batch(), key)
    gradient = jax.grad(lambda p: loss(p, example_batch(), jax.random.fold_in(key, 0))[0])(params)["w"]
    moved = params["w"] - 0.1 * (jnp.sign(gradient) + 1e-4 * params["w"])  # the first step of Adam is the sign
    np.testing.assert_allclose(state.params["w"], moved, rtol=1e-4)
    np.testing.assert_allclose(state.ema["w"], 0.9 * params["w"] + 0.1 * state.params["w"], rtol=1e-6)
    assert int(state.step) == 1
    np.testing.assert_allclose(metrics["grad_norm"], jnp.linalg.norm(gradient), rtol=1e-6)


def test_average_of_constant_parameters_is_constant():
    params = {"w": jnp.array([0.1, -3.0])}
    np.testing.assert_array_equal(ema.update(params, params, 0.9999)["w"], params["w"])


def test_the_compiled_step_donates_its_state_and_repeats_itself():
    setup = build(tiny_config(), devices=jax.devices()[:1])
    batches = open_batches(setup.config)
    batch = next(batches)
    batches.close()
    with jax.set_mesh(setup.mesh):
        put = setup.put(batch)
        first = setup.init()
        kernel = first.params["patch_embed"]["kernel"]
        state, metrics = setup.step(first, put, setup.key)
        assert kernel.is_deleted()
        again, metrics_again = setup.step(setup.init(), put, setup.key)
        assert setup.step._cache_size() == 1
    jax.tree.map(np.testing.assert_array_equal, jax.device_get(state), jax.device_get(again))
    assert float(metrics["loss"]) == float(metrics_again["loss"])


def test_schedules():
    optim = tiny_config("optim.lr=2.0", "optim.warmup_steps=10", "optim.schedule=cosine").optim
    lr = schedule(optim, 110)
    np.testing.assert_allclose([lr(0), lr(5), lr(10), lr(60), lr(110)], [0, 1, 2, 1, 0], atol=1e-6)
    optim = tiny_config("optim.lr=2.0", "optim.warmup_steps=10", "optim.schedule=cosine_to_hundredth").optim
    lr = schedule(optim, 110)
    np.testing.assert_allclose([lr(10), lr(60), lr(110)], [2.0, 1.01, 0.02], rtol=1e-5)
    optim = tiny_config("optim.lr=2.0", "optim.warmup_steps=0", "optim.schedule=constant").optim
    assert {float(schedule(optim, 9)(step)) for step in (0, 5, 100)} == {2.0}
    inverse = ("optim.schedule=inverse_sqrt", "optim.decay_after_steps=25")
    lr = schedule(tiny_config("optim.lr=2.0", "optim.warmup_steps=10", *inverse).optim, 110)
    np.testing.assert_allclose([lr(0), lr(5), lr(10), lr(25), lr(100)], [0, 1, 2, 2, 1], atol=1e-6)
    optim = tiny_config("optim.lr=2.0", "optim.warmup_steps=10", "optim.warmup_from=1.0").optim
    np.testing.assert_allclose([schedule(optim, 110)(step) for step in (0, 5, 10)], [1, 1.5, 2], atol=1e-6)
    with pytest.raises(ValueError, match="warmup_from = 1.0 has no effect without optim.warmup_steps"):
        schedule(tiny_config("optim.warmup_steps=0", "optim.warmup_from=1.0").optim, 110)


def test_other_options_keep_the_tree_of_states():
    params = {"w": jnp.zeros(3)}
    constant = ("optim.clip=0.0", "optim.schedule=constant", "optim.warmup_steps=0")
    options = ((), ("optim.clip=1.0",), constant, ("optim.name=fairseq_adam",))
    trees = [jax.tree.structure(optimizer(tiny_config(*o).optim, 10).init(params)) for o in options]
    assert all(tree == trees[0] for tree in trees)


def test_clipping_bounds_the_gradient_and_unknown_schedules_are_errors():
    config = tiny_config("optim.clip=1.0").optim
    optim = optimizer(config, 10)
    params = {"w": jnp.zeros(3)}
    big = {"w": jnp.array([30.0, 40.0, 0.0])}
    clipped, _ = optim.update(big, optim.init(params), params)
    scaled, _ = optim.update({"w": big["w"] / 50}, optim.init(params), params)
    np.testing.assert_allclose(clipped["w"], scaled["w"], rtol=1e-5)
    with pytest.raises(ValueError, match="valid: constant, cosine"):
        optimizer(tiny_config("optim.schedule=step").optim, 10)


def test_fairseq_s_adam_and_clipping():
    """Two steps by hand: epsilons stand beside the norm and beside sqrt(v), and every parameter decays."""
    lr, b1, b2, eps, decay, limit = 0.1, 0.9, 0.98, 0.05, 0.01, 1.0
    leaves = (f"lr={lr}", f"b1={b1}", f"b2={b2}", f"eps={eps}", f"weight_decay={decay}", f"clip={limit}")
    others = ("name=fairseq_adam", "schedule=constant", "warmup_steps=0")
    optim = optimizer(tiny_config(*(f"optim.{leaf}" for leaf in (*leaves, *others))).optim, 10)
    w, m, v = np.array([1.0, -2.0]), 0.0, 0.0
    params, state = {"bias": jnp.asarray(w, jnp.float32)}, optim.init({"bias": jnp.zeros(2)})
    for t, g in enumerate((np.array([3.0, 4.0]), np.array([1e-7, 0.0])), 1):
        updates, state = optim.update({"bias": jnp.asarray(g, jnp.float32)}, state, params)
        params = optax.apply_updates(params, updates)
        g = g * min(1.0, limit / (np.linalg.norm(g) + 1e-6))
        m, v = b1 * m + (1 - b1) * g, b2 * v + (1 - b2) * g**2
        w = w - lr * decay * w - lr * np.sqrt(1 - b2**t) / (1 - b1**t) * m / (np.sqrt(v) + eps)
        np.testing.assert_allclose(params["bias"], w, rtol=1e-5)
    with pytest.raises(ValueError, match="optim.name = 'sgd' is unknown; valid: adamw, fairseq_adam"):
        optimizer(tiny_config("optim.name=sgd").optim, 10)
