"""Nothing depends on the number of devices but the order of additions."""

import jax
import numpy as np
import pytest

from diffjax.training import generate
from diffjax.training.checkpoint import Checkpoints
from diffjax.training.loop import open_batches
from diffjax.training.setup import build
from tests.programs import tiny_config

STEPS = 20
# Large enough leaves are sharded whatever their size; heads 4 and width 64 divide.
SHAPES = ("model.width=64", "model.heads=4", "parallel.replicate_below=0", f"total_steps={STEPS}", "optim.clip=1.0")
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


def setup_of(layout):
    if layout == "one":
        return build(tiny_config(*SHAPES), devices=jax.devices()[:1])
    return build(tiny_config(*SHAPES, *LAYOUTS[layout]))


def run(setup, state, first, last):
    """Losses of the steps first..last, and the state after them."""
    batches = open_batches(setup.config, start=first)
    losses = []
    with jax.set_mesh(setup.mesh):
        for _ in range(first, last):
            state, metrics = setup.step(state, setup.put(next(batches)), setup.key)
            losses.append(float(metrics["loss"]))
    batches.close()
    return np.array(losses), state


@pytest.fixture(scope="module")
def one():
    setup = setup_of("one")
    with jax.set_mesh(setup.mesh):
        state = setup.init()
    losses, state = run(setup, state, 0, STEPS)
    return setup, losses, state


@pytest.mark.parametrize("layout", LAYOUTS)
def test_losses_and_initial_values_equal_those_of_one_device(one, layout, tmp_path):
    setup = setup_of(layout)
    with jax.set_mesh(setup.mesh):
        state = setup.init()
    fresh = one[0].init()
    jax.tree.map(np.testing.assert_array_equal, jax.device_get(state.params), jax.device_get(fresh.params))
    kernel = state.params["blocks"]["mlp"]["fc1"]["kernel"]
    assert (
        kernel.sharding.shard_shape(kernel.shape)[1:]
        == {"dp8": (64, 256), "fsdp8": (8, 256), "2x2x2": (32, 128)}[layout]
    )

    half = STEPS // 2
    first, state = run(setup, state, 0, half)
    checkpoints = Checkpoints(tmp_path)
    checkpoints.save(state, half, {"next_batch": half}, {})
    checkpoints.wait()
    second, state = run(setup, state, half, STEPS)
    losses = np.concatenate([first, second])
    assert len(set(losses)) == STEPS
    np.testing.assert_allclose(losses, one[1], rtol=1e-5)

    # The other way round: what eight devices saved goes on on one.
    restored, _ = checkpoints.restore(one[0].abstract, half)
    checkpoints.close()
    assert len(restored.params["patch_embed"]["kernel"].sharding.device_set) == 1
    resumed, _ = run(one[0], restored, half, STEPS)
    np.testing.assert_allclose(resumed, second, rtol=1e-5)


def test_what_one_device_saved_goes_on_on_eight(one, tmp_path):
    setup, losses, _ = one
    state = setup.init()
    _, state = run(setup, state, 0, 10)
    checkpoints = Checkpoints(tmp_path)
    checkpoints.save(state, 10, {"next_batch": 10}, {})
    checkpoints.wait()
    eight = setup_of("2x2x2")
    restored, _ = checkpoints.restore(eight.abstract, 10)
    checkpoints.close()
    resumed, _ = run(eight, restored, 10, STEPS)
    np.testing.assert_allclose(resumed, losses[10:], rtol=1e-5)


def test_image_i_depends_neither_on_the_batch_nor_on_the_devices(one):
    setup, _, state = one
    labels = generate.interleaved_labels(12, 10)

    def images(setup, params, batch_size, first=0, labels=labels):
        sampler = generate.compile_sampler(setup.objective, setup.apply, setup.mesh, seed=7)
        batches = generate.generate(sampler, params, labels, setup.mesh, batch_size, first)
        return np.concatenate(list(batches))

    together = images(setup, state.ema, 12)
    assert together.std() > 0.1
    np.testing.assert_allclose(images(setup, state.ema, 5), together, atol=1e-4)
    np.testing.assert_allclose(images(setup, state.ema, 3, first=4, labels=labels[4:7]), together[4:7], atol=1e-4)
    eight = setup_of("dp8")
    params = jax.device_put(jax.device_get(state.ema), jax.tree.map(lambda leaf: leaf.sharding, eight.abstract.ema))
    np.testing.assert_allclose(images(eight, params, 12), together, atol=1e-4)
    assert not np.allclose(together[0], together[10])  # the same label, another image


def test_random_values_of_an_example_are_bit_equal_on_one_and_eight_devices(one):
    """The time, noise, label drop and keys of the loss, seen through a backbone that returns what it is given."""
    draws = {}
    for layout in ("one", *LAYOUTS):
        setup = one[0] if layout == "one" else setup_of(layout)
        batches = open_batches(setup.config)
        batch = next(batches)
        batches.close()
        seen = {}

        def spy(params, x, t, y, train, keys, seen=seen):
            seen.update(x=x, t=t, y=y, keys=jax.random.key_data(keys))
            return jax.numpy.concatenate([x, x], axis=-1)

        def draw(batch, key, setup=setup, spy=spy, seen=seen):
            setup.objective.loss(spy, None, batch, key)
            return dict(seen)

        with jax.set_mesh(setup.mesh):
            draws[layout] = jax.device_get(jax.jit(draw)(setup.put(batch), setup.key))
    for layout in LAYOUTS:
        jax.tree.map(np.testing.assert_array_equal, draws["one"], draws[layout])
    assert len(np.unique(draws["one"]["t"])) > 8


@pytest.mark.slow
def test_dis_with_drop_path_trains_alike_on_every_layout():
    """Channels, their scans and their convolutions divided over devices; examples drop what they drop on one device."""
    shapes = ("model.width=64", "model.drop_path=0.5", "parallel.replicate_below=0", "optim.clip=1.0")
    losses = {}
    for layout, overrides in {"one": (), **LAYOUTS}.items():
        config = tiny_config(*shapes, *overrides, model="dis")
        setup = build(config, devices=jax.devices()[:1] if layout == "one" else None)
        with jax.set_mesh(setup.mesh):
            state = setup.init()
        kernel = state.params["in_blocks"]["mixer"]["in_proj"]
        shard = {"one": (64, 128), "dp8": (64, 128), "fsdp8": (8, 128), "2x2x2": (32, 64)}[layout]
        assert kernel.sharding.shard_shape(kernel.shape)[2:] == shard
        losses[layout], _ = run(setup, state, 0, 4)
    for layout in LAYOUTS:
        np.testing.assert_allclose(losses[layout], losses["one"], rtol=1e-5)
