"""Nothing depends on the number of devices but the order of additions."""

import functools

import jax
import numpy as np
import pytest

from diffjax.experiment import build
from diffjax.sampling import generate
from diffjax.training.checkpoint import Checkpoints
from tests import slow
from tests.programs import BACKBONES, tiny_config

STEPS = 20
# Leaves are sharded whatever their size; the widths and 4 heads divide.
SHAPES = ("parallel.replicate_below=0", f"total_steps={STEPS}", "optim.clip=1.0")
OWN_SHAPES = {
    "dit": ("model.width=64", "model.heads=4"),
    "dis": ("model.width=64", "model.drop_path=0.3"),
    "udit": ("model.width=32", "model.heads=4"),
    "diffit": ("model.widths=(16,32)", "model.head_width=8", "model.dropout=0.1", "data.augment=0.5"),
    "diffit-latent": ("model.width=64", "model.heads=4"),
    "digit": ("model.width=64", "model.heads=4"),
}
# A parameter, and its part on a device of the layouts that are tried: all with the smallest, else all axes at once.
SHARDED = {
    "dit": (("blocks", "mlp", "fc1", "kernel"), {"dp8": (64, 256), "fsdp8": (8, 256), "2x2x2": (32, 128)}),
    "dis": (("out_blocks", "mixer", "out_proj", "kernel"), {"fsdp8": (16, 64), "2x2x2": (64, 32)}),
    "udit": (("latent", "mlp", "in_1", "kernel"), {"2x2x2": (64, 128)}),
    "diffit": (("encoder_1_1", "block", "attention", "relative_bias"), {"2x2x2": (2,)}),
    "diffit-latent": (("blocks", "attention", "relative_bias"), {"2x2x2": (49, 2)}),
    "digit": (("blocks", "attention", "query", "kernel"), {"2x2x2": (32, 2, 16)}),
}
LAYOUTS = {
    "dp8": ("parallel.mesh.data=8",),
    "fsdp8": ("parallel.mesh.data=1", "parallel.mesh.fsdp=8", "parallel.strategy=fsdp"),
    "2x2x2": (
        "parallel.mesh.data=2",
        "parallel.mesh.fsdp=2",
        "parallel.mesh.tensor=2",
        "parallel.strategy=fsdp_tp",
    ),
}


def experiment_of(layout, model):
    shapes = (*SHAPES, *OWN_SHAPES[model])
    if layout == "one":
        return build(tiny_config(*shapes, model=model), devices=jax.devices()[:1])
    return build(tiny_config(*shapes, *LAYOUTS[layout], model=model))


def run(experiment, state, first, last):
    """Losses of the steps first..last, and the state after them."""
    batches = experiment.stream(first)
    losses = []
    with jax.set_mesh(experiment.mesh):
        for _ in range(first, last):
            state, metrics = experiment.step(state, experiment.frozen, experiment.put(next(batches)), experiment.key)
            losses.append(float(metrics["loss"]))
    batches.close()
    return np.array(losses), state


@pytest.fixture(scope="module", params=slow.but(["dit"], BACKBONES))
def one(request):
    """Experiment, losses and final state of a backbone on one device, and the backbone."""
    return one_device(request.param)


@functools.cache
def one_device(model):
    experiment = experiment_of("one", model)
    with jax.set_mesh(experiment.mesh):
        state = experiment.init()
    losses, state = run(experiment, state, 0, STEPS)
    return experiment, losses, state, model


@pytest.mark.slow
@pytest.mark.parametrize("model, layout", [(model, layout) for model in BACKBONES for layout in SHARDED[model][1]])
def test_losses_and_initial_values_equal_those_of_one_device(model, layout, tmp_path):
    one = one_device(model)
    experiment = experiment_of(layout, model)
    with jax.set_mesh(experiment.mesh):
        state = experiment.init()
    fresh = one[0].init()
    jax.tree.map(np.testing.assert_array_equal, jax.device_get(state.params), jax.device_get(fresh.params))
    path, part = SHARDED[model]
    kernel = functools.reduce(lambda tree, name: tree[name], path, state.params)
    assert kernel.sharding.shard_shape(kernel.shape)[1:] == part[layout]

    half = STEPS // 2
    first, state = run(experiment, state, 0, half)
    checkpoints = Checkpoints(tmp_path)
    checkpoints.save(state, half, {"next_batch": half}, {})
    checkpoints.wait()
    second, state = run(experiment, state, half, STEPS)
    losses = np.concatenate([first, second])
    assert len(set(losses)) == STEPS
    np.testing.assert_allclose(losses, one[1], rtol=1e-5)

    # The other way round: what eight devices saved goes on on one.
    restored, _ = checkpoints.restore(one[0].abstract, half)
    checkpoints.close()
    assert {len(leaf.sharding.device_set) for leaf in jax.tree.leaves(restored.params)} == {1}
    resumed, _ = run(one[0], restored, half, STEPS)
    np.testing.assert_allclose(resumed, second, rtol=1e-5)


def test_what_one_device_saved_goes_on_on_eight(one, tmp_path):
    experiment, losses, _, model = one
    state = experiment.init()
    _, state = run(experiment, state, 0, 10)
    checkpoints = Checkpoints(tmp_path)
    checkpoints.save(state, 10, {"next_batch": 10}, {})
    checkpoints.wait()
    eight = experiment_of("2x2x2", model)
    restored, _ = checkpoints.restore(eight.abstract, 10)
    checkpoints.close()
    resumed, _ = run(eight, restored, 10, STEPS)
    np.testing.assert_allclose(resumed, losses[10:], rtol=1e-5)


@pytest.mark.slow
def test_image_i_depends_neither_on_the_batch_nor_on_the_devices(one):
    experiment, _, state, model = one
    labels = generate.interleaved_labels(12, 10)

    def images(experiment, params, batch_size, first=0, labels=labels):
        sampler = generate.compile_sampler(
            experiment.sampler, experiment.model, experiment.mesh, seed=7, decode=experiment.decode
        )
        numbers = first + np.arange(len(labels))
        drawn = generate.generate(sampler, params, labels, numbers, experiment.mesh, batch_size)
        return np.concatenate([rows for _, rows in drawn])

    together = images(experiment, state.ema, 12)
    assert together.std() > 0.1
    np.testing.assert_allclose(images(experiment, state.ema, 5), together, atol=1e-4)
    np.testing.assert_allclose(images(experiment, state.ema, 3, first=4, labels=labels[4:7]), together[4:7], atol=1e-4)
    eight = experiment_of("dp8", model)  # the sampler alone is compiled for it
    params = jax.device_put(jax.device_get(state.ema), jax.tree.map(lambda leaf: leaf.sharding, eight.abstract.ema))
    np.testing.assert_allclose(images(eight, params, 12), together, atol=1e-4)
    assert not np.allclose(together[0], together[10])  # the same label, another image


def test_random_values_of_an_example_are_bit_equal_on_one_and_eight_devices(one):
    """Time, noise, label drop and dropout keys of the loss, seen through a backbone that returns what it is given."""
    draws = {}
    for layout in ("one", *LAYOUTS):
        experiment = one[0] if layout == "one" else experiment_of(layout, one[3])
        batches = experiment.stream()
        batch = next(batches)
        batches.close()
        seen = {}

        def spy(params, x, *inputs, train, keys, seen=seen, **told):
            seen.update(x=x, inputs=inputs, keys=jax.random.key_data(keys), **told)
            if x.ndim == 2:  # tokens: as many logits, and those of the end
                return jax.numpy.zeros((len(x), x.shape[1] + 1, 200))
            return jax.numpy.concatenate([x, x], axis=-1)

        def draw(batch, key, experiment=experiment, spy=spy, seen=seen):
            experiment.method.loss(spy, None, {}, batch, key)
            return dict(seen)

        with jax.set_mesh(experiment.mesh):
            draws[layout] = jax.device_get(jax.jit(draw)(experiment.put(batch), experiment.key))
    for layout in LAYOUTS:
        if "augment" in draws[layout]:  # what is drawn is bit-equal, what becomes of an image by it is not
            np.testing.assert_allclose(draws[layout].pop("x"), draws["one"]["x"], atol=1e-5)
            draws[layout]["x"] = draws["one"]["x"]
        jax.tree.map(np.testing.assert_array_equal, draws["one"], draws[layout])
    times_or_labels = draws["one"]["inputs"][0]
    assert len(np.unique(times_or_labels)) > 4
