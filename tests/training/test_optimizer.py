"""Schedules, the trees of states, weight decay, and the second moments of each optimizer."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from diffjax.errors import UserError
from diffjax.experiment import build
from diffjax.options import options
from diffjax.parallel.rules import Parameter, key_path, parameters
from diffjax.training.checkpoint import Checkpoints
from diffjax.training.optimizer import (
    OPTIMIZERS,
    SCHEDULES,
    Optim,
    is_matrix,
    make,
    reads,
    scale_by_factored_moments,
    schedule,
)
from tests.parallel.test_rules import abstract_params
from tests.programs import tiny_config
from tests.training.test_devices import LAYOUTS, OWN_SHAPES, SHAPES

W = (Parameter("w", (3,), (None,)),)
# Of a tiny DiT: half of the paths of `mu`, and of `nu`.
PATHS = [
    *(f"blocks/attention/{name}/{kind}" for name in ("out", "qkv") for kind in ("bias", "kernel")),
    *(f"blocks/mlp/{name}/{kind}" for name in ("fc1", "fc2") for kind in ("bias", "kernel")),
    *("blocks/modulation/bias", "blocks/modulation/kernel"),
    *("final/linear/bias", "final/linear/kernel", "final/modulation/bias", "final/modulation/kernel"),
    *("label_embed/embedding", "patch_embed/bias", "patch_embed/kernel"),
    *(f"time_embed/{name}/{kind}" for name in ("fc1", "fc2") for kind in ("bias", "kernel")),
]


def test_schedules():
    lr = schedule(Optim(lr=2.0, warmup_steps=10, schedule="cosine"), 110)
    np.testing.assert_allclose([lr(0), lr(5), lr(10), lr(60), lr(110)], [0, 1, 2, 1, 0], atol=1e-6)
    lr = schedule(Optim(lr=2.0, warmup_steps=10, schedule="cosine_to_hundredth"), 110)
    np.testing.assert_allclose([lr(10), lr(60), lr(110)], [2.0, 1.01, 0.02], rtol=1e-5)
    assert {float(schedule(Optim(lr=2.0), 9)(step)) for step in (0, 5, 100)} == {2.0}
    lr = schedule(Optim(lr=2.0, warmup_steps=10, schedule="inverse_sqrt", decay_after_steps=25), 110)
    np.testing.assert_allclose([lr(0), lr(5), lr(10), lr(25), lr(100)], [0, 1, 2, 2, 1], atol=1e-6)
    lr = schedule(Optim(lr=2.0, warmup_steps=10, warmup_from=1.0), 110)
    np.testing.assert_allclose([lr(step) for step in (0, 5, 10)], [1, 1.5, 2], atol=1e-6)


# Rates of version 0.1.0 at STEPS: lr = 3e-4 from 1e-5 after 10 steps, 100 in all, decay after 25.
STEPS = (0, 3, 10, 11, 40, 99, 100, 150)
RATES = {
    "constant": "1.4f8b80p-17 1.96d8fcp-14 1.3a92a4p-12 1.3a92a4p-12 1.3a92a4p-12 1.3a92a4p-12 1.3a92a4p-12 "
    "1.3a92a4p-12",
    "cosine": "1.4f8b80p-17 1.96d8fcp-14 1.3a92a4p-12 1.3a7a1cp-12 1.d7dbf6p-13 1.8872b2p-24 0.0p+0 0.0p+0",
    "cosine_to_hundredth": "1.4f8b80p-17 1.96d8fcp-14 1.3a92a4p-12 1.3a7a5cp-12 1.d96e9ep-13 1.9ecb68p-19 1.92a738p-19 "
    "1.92a738p-19",
    "inverse_sqrt": "1.4f8b80p-17 1.96d8fcp-14 1.3a92a4p-12 1.3a92a4p-12 1.f16220p-13 1.3c2856p-13 1.3a92a4p-13 "
    "1.00d8fep-13",
}


@pytest.mark.parametrize("name", SCHEDULES)
def test_rates_are_the_stored_ones_bit_for_bit(name):
    after = 25 if name == "inverse_sqrt" else 0
    section = Optim(lr=3e-4, warmup_steps=10, warmup_from=1e-5, schedule=name, decay_after_steps=after)
    _, learning_rate = make(section, 100, ())
    found = [np.float32(learning_rate(jnp.int32(step))) for step in STEPS]
    assert found == [np.float32(float.fromhex("0x" + text)) for text in RATES[name].split()]


REFUSED = {
    "name": ({"name": "sgd"}, "optim.name = 'sgd': valid: adamw, fairseq_adam, adafactor"),
    "schedule": ({"schedule": "step"}, "optim.schedule = 'step': valid: constant, cosine"),
    "rate": ({"lr": -1.0}, "optim.lr = -1.0: valid: 0 or more"),
    "momentum": ({"b1": 1.0}, "optim.b1 = 1.0: valid: 0 to below 1"),
    "decayed": ({"decayed": "kernels"}, "optim.decayed = 'kernels': valid: all, matrices"),
    "warmup": ({"warmup_from": 1.0}, "warmup_from = 1.0 has no effect without optim.warmup_steps"),
    "no-decay": ({"schedule": "inverse_sqrt"}, "optim.decay_after_steps = 0: valid: 1 or more"),
    "early-decay": (
        {"schedule": "inverse_sqrt", "warmup_steps": 10, "decay_after_steps": 5},
        "optim.decay_after_steps = 5: valid: 1 or more, not in the warm-up",
    ),
}


@pytest.mark.parametrize("mistake", REFUSED)
def test_what_contradicts_itself_is_refused(mistake):
    fields, message = REFUSED[mistake]
    with pytest.raises(UserError, match=message):
        make(Optim(**fields), 110, W)


def test_rows_read_fields_of_the_section():
    for name in OPTIMIZERS:
        found = reads(Optim(name=name))
        assert len(set(found)) == len(found)
        assert set(found) <= options(Optim).keys()
    assert "decay_after_steps" not in reads(Optim())
    assert "decay_after_steps" in reads(Optim(schedule="inverse_sqrt"))
    assert "b2" not in reads(Optim(name="adafactor"))


@pytest.mark.parametrize("name", ["adamw", "fairseq_adam"])
@pytest.mark.parametrize("fields", [{}, {"clip": 1.0, "warmup_steps": 5}, {"decayed": "matrices"}], ids=str)
def test_the_tree_of_states_is_the_one_that_checkpoints_have(name, fields):
    model, params = abstract_params("DiT-S/8")
    optim, _ = make(Optim(name=name, **fields), 10, parameters(params, model.logical_axes))
    state = jax.eval_shape(optim.init, params)
    found = [key_path(path) for path, _ in jax.tree_util.tree_leaves_with_path(state)]
    assert found == [
        "1/0/count",
        *(f"1/0/mu/{path}" for path in PATHS),
        *(f"1/0/nu/{path}" for path in PATHS),
        "1/2/count",
    ]
    assert jax.tree.structure(state) == jax.tree.structure(
        jax.eval_shape(optax.chain(optax.identity(), optax.adamw(optax.constant_schedule(0.1))).init, params)
    )


def test_clipping_bounds_the_gradient():
    optim, _ = make(Optim(clip=1.0), 10, W)
    params = {"w": jnp.zeros(3)}
    big = {"w": jnp.array([30.0, 40.0, 0.0])}
    clipped, _ = optim.update(big, optim.init(params), params)
    scaled, _ = optim.update({"w": big["w"] / 50}, optim.init(params), params)
    np.testing.assert_allclose(clipped["w"], scaled["w"], rtol=1e-5)


def test_fairseq_s_adam_and_clipping():
    """Two steps by hand: epsilons stand beside the norm and beside sqrt(v), and every parameter decays."""
    lr, b1, b2, eps, decay, limit = 0.1, 0.9, 0.98, 0.05, 0.01, 1.0
    section = Optim(name="fairseq_adam", lr=lr, b1=b1, b2=b2, eps=eps, weight_decay=decay, clip=limit)
    optim, _ = make(section, 10, ())
    w, m, v = np.array([1.0, -2.0]), 0.0, 0.0
    params, state = {"bias": jnp.asarray(w, jnp.float32)}, optim.init({"bias": jnp.zeros(2)})
    for t, g in enumerate((np.array([3.0, 4.0]), np.array([1e-7, 0.0])), 1):
        updates, state = optim.update({"bias": jnp.asarray(g, jnp.float32)}, state, params)
        params = optax.apply_updates(params, updates)
        g = g * min(1.0, limit / (np.linalg.norm(g) + 1e-6))
        m, v = b1 * m + (1 - b1) * g, b2 * v + (1 - b2) * g**2
        w = w - lr * decay * w - lr * np.sqrt(1 - b2**t) / (1 - b1**t) * m / (np.sqrt(v) + eps)
        np.testing.assert_allclose(params["bias"], w, rtol=1e-5)


def random_like(params, seed):
    leaves, structure = jax.tree.flatten(params)
    r = np.random.default_rng(seed)
    return jax.tree.unflatten(structure, [jnp.asarray(r.normal(size=leaf.shape), jnp.float32) for leaf in leaves])


@pytest.mark.slow
def test_adamw_s_numbers_are_optax_s():
    model, params = abstract_params("DiT-S/8", width=24, heads=2, depth=2)
    section = Optim(lr=0.1, weight_decay=0.01)
    optim, _ = make(section, 10, parameters(params, model.logical_axes))
    params = random_like(params, 0)
    gradients = random_like(params, 1)
    own, reference = [
        transform.update(gradients, transform.init(params), params)[0]
        for transform in (optim, optax.adamw(optax.constant_schedule(0.1), weight_decay=0.01))
    ]
    jax.tree.map(np.testing.assert_array_equal, own, reference)


# By the last two names of the path: which leaves of two dimensions or more are no matrices.
TABLES = {
    "DiT-S/2": {"label_embed/embedding", "qkv/bias"},
    "U-DiT-S": {"label_embed_1/embedding", "label_embed_2/embedding", "label_embed_3/embedding", "qkv/bias"}
    | {"downsample/kernel", "mlp/kernel_1", "mlp/kernel_3", "mlp/kernel_5"},
    "DiS-S/2": {"label_embed/embedding", "positions"}
    | {f"{way}/{name}" for way in ("forward", "backward") for name in ("A_log", "conv_kernel")},
    "DiffiT-XL/2": {"label_embed/embedding", "qkv/bias", "qkv_time/bias", "attention/relative_bias"},
    "digit-b": {"token_embed", "positions", "key/bias", "query/bias", "value/bias"},
}


@pytest.mark.parametrize("name", TABLES)
def test_matrices_are_told_from_biases_scales_and_tables(name):
    model, params = abstract_params(name)
    leaves = parameters(params, model.logical_axes)
    ends = {leaf: "/".join(leaf.path.split("/")[-2:]) for leaf in leaves}
    assert {ends[leaf] for leaf in leaves if len(leaf.axes) > 1 and not is_matrix(leaf)} == TABLES[name]
    assert all(leaf.path.endswith(("/kernel", "/in_proj")) for leaf in leaves if is_matrix(leaf))


@pytest.mark.slow
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_only_matrices_decay(name):
    model, params = abstract_params("DiT-S/8", width=24, heads=2, depth=2)
    leaves = parameters(params, model.logical_axes)
    section = Optim(name=name, lr=0.5, weight_decay=0.1, decayed="matrices")
    params = jax.tree.map(lambda leaf: jnp.ones(leaf.shape), params)
    optim, _ = make(section, 10, leaves)
    updates, _ = optim.update(jax.tree.map(jnp.zeros_like, params), optim.init(params), params)
    for path, update in jax.tree_util.tree_leaves_with_path(updates):
        np.testing.assert_allclose(update, -0.05 if key_path(path).endswith("kernel") else 0.0, rtol=1e-6)


def two_updates(transform, gradients):
    state = transform.init(gradients[0])
    found = []
    for gradient in gradients:
        updates, state = transform.update(gradient, state, gradient)
        found.append(updates)
    return found


def test_factored_moments_of_a_matrix_are_optax_s():
    """And each layer of a stack has those of its own."""
    r = np.random.default_rng(0)
    gradients = [{"kernel": jnp.asarray(r.normal(size=(3, 8, 6)) * [[[0.01]], [[1]], [[30]]])} for _ in range(2)]
    own = two_updates(scale_by_factored_moments([Parameter("kernel", (3, 8, 6), ("embed", "mlp"))], 1e-15), gradients)
    reference = optax.chain(optax.scale_by_factored_rms(min_dim_size_to_factor=1), optax.clip_by_block_rms(1.0))
    for layer in range(3):
        alone = two_updates(reference, [{"kernel": gradient["kernel"][layer]} for gradient in gradients])
        for found, expected in zip(own, alone):
            np.testing.assert_allclose(found["kernel"][layer], expected["kernel"], rtol=1e-5)


def test_a_matrix_with_heads_is_factored_as_the_flat_one():
    r = np.random.default_rng(0)
    flat = [jnp.asarray(r.normal(size=(8, 24)), jnp.float32) for _ in range(2)]
    [expected] = jax.tree.leaves(
        two_updates(scale_by_factored_moments([Parameter("", (8, 24), ("embed", "mlp"))], 1e-8), flat)[1:]
    )
    for shape, axes, turn in (
        ((8, 2, 3, 4), ("embed", "heads", None, "kv"), lambda x: x),
        ((2, 12, 8), ("heads", "kv", "embed"), jnp.transpose),
    ):
        leaf = Parameter("kernel", shape, axes)
        gradients = [{"kernel": turn(gradient).reshape(shape)} for gradient in flat]
        found = two_updates(scale_by_factored_moments([leaf], 1e-8), gradients)[1]["kernel"]
        np.testing.assert_allclose(found, turn(expected).reshape(shape), rtol=1e-5)


@pytest.mark.parametrize("name", ["DiT-XL/2", "DiS-H/2", "digit-l"])
def test_adafactor_s_state_has_rows_and_columns(name):
    model, params = abstract_params(name)
    leaves = parameters(params, model.logical_axes)
    optim, _ = make(Optim(name="adafactor"), 10, leaves)
    state = jax.eval_shape(optim.init, params)
    sizes = [sum(leaf.size for leaf in jax.tree.leaves(tree)) for tree in (state, params)]
    assert sizes[0] < 0.01 * sizes[1]
    if name == "DiT-XL/2":
        d, moments = 1152, state[1][0]
        assert moments.v_row["blocks"]["attention"]["qkv"]["kernel"].shape == (28, d)
        assert moments.v_col["blocks"]["attention"]["qkv"]["kernel"].shape == (28, 16, 3, 72)
        assert moments.v_row["blocks"]["attention"]["out"]["kernel"].shape == (28, 16, 72)
        assert moments.v_col["blocks"]["mlp"]["fc1"]["kernel"].shape == (28, 4 * d)
        assert moments.v["blocks"]["mlp"]["fc1"]["kernel"].shape == ()
        assert moments.v["blocks"]["mlp"]["fc1"]["bias"].shape == (28, 4 * d)


def adafactor_run(*layout, devices=None):
    """The experiment, losses of five steps, and the state after them."""
    fields = ("optim.name=adafactor", "optim.weight_decay=0.1")
    experiment = build(tiny_config(*SHAPES, *OWN_SHAPES["dit"], *fields, *layout), devices=devices)
    batches = experiment.stream()
    losses = []
    with jax.set_mesh(experiment.mesh):
        state = experiment.init()
        for _ in range(5):
            state, metrics = experiment.step(state, experiment.frozen, experiment.put(next(batches)), experiment.key)
            losses.append(float(metrics["loss"]))
    batches.close()
    return experiment, losses, state


@pytest.mark.slow
def test_adafactor_trains_alike_on_one_and_eight_devices(tmp_path):
    alone, one, _ = adafactor_run(devices=jax.devices()[:1])
    experiment, eight, state = adafactor_run(*LAYOUTS["fsdp8"])
    assert len(set(one)) == 5
    np.testing.assert_allclose(eight, one, rtol=1e-5)
    jax.tree.map(assert_same_place, state, experiment.abstract)
    moments = state.opt_state[1][0]
    row, column = (tree["blocks"]["mlp"]["fc1"]["kernel"] for tree in (moments.v_row, moments.v_col))
    assert row.sharding.shard_shape(row.shape) == (2, 8)  # 64 rows over 8 devices
    assert column.sharding.shard_shape(column.shape) == (2, 256)
    row, column = (tree["blocks"]["mlp"]["fc2"]["kernel"] for tree in (moments.v_row, moments.v_col))
    assert row.sharding.shard_shape(row.shape) == (2, 256)
    assert column.sharding.shard_shape(column.shape) == (2, 8)

    checkpoints = Checkpoints(tmp_path)
    checkpoints.save(state, 5, {"next_batch": 5}, {})
    checkpoints.wait()
    restored, _ = checkpoints.restore(alone.abstract, 5)
    checkpoints.close()
    jax.tree.map(np.testing.assert_array_equal, jax.device_get(restored), jax.device_get(state))


def assert_same_place(leaf, declared):
    assert leaf.shape == declared.shape
    assert leaf.sharding.is_equivalent_to(declared.sharding, leaf.ndim)
