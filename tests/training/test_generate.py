import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from diffjax import rng
from diffjax.commands import sample
from diffjax.contracts import Sampler
from diffjax.experiment import build
from diffjax.parallel.mesh import make_mesh
from diffjax.sampling import generate
from tests.programs import tiny_config


def fake_sampler(params, indices, labels):
    """An image that says which one it is."""
    return jnp.stack([indices + params, labels], axis=-1).astype(jnp.float32).reshape(-1, 1, 1, 2)


def drawn(sampler, params, labels, numbers, mesh, batch_size):
    """The samples in the order of `numbers`, which `generate` says beside them."""
    parts = list(generate.generate(sampler, params, labels, numbers, mesh, batch_size))
    np.testing.assert_array_equal(np.concatenate([chosen for chosen, _ in parts]), numbers)
    return np.concatenate([rows for _, rows in parts])


def test_every_image_is_made_once_in_order_whatever_the_batch():
    labels = generate.interleaved_labels(11, 3)
    mesh = make_mesh({"data": 4}, jax.devices()[:4])
    for batch_size in (1, 4, 5, 100):
        images = drawn(fake_sampler, 0, labels, np.arange(20, 31), mesh, batch_size)
        np.testing.assert_array_equal(images[:, 0, 0], np.stack([np.arange(20, 31), labels], axis=-1))


def test_labels():
    np.testing.assert_array_equal(generate.interleaved_labels(5, 3), [0, 1, 2, 0, 1])
    np.testing.assert_array_equal(generate.interleaved_labels(3, 0), [0, 0, 0])
    uniform = generate.uniform_labels(0, 3000, 10)
    np.testing.assert_array_equal(uniform[:100], generate.uniform_labels(0, 100, 10))
    np.testing.assert_allclose(np.bincount(uniform) / 3000, 0.1, atol=0.03)
    assert not np.array_equal(uniform[:100], generate.uniform_labels(1, 100, 10))


def test_each_image_has_its_own_key():
    def spy(apply, params, schedule, conditions, keys, guide):
        return jax.random.key_data(keys).astype(jnp.float32)

    mesh = make_mesh({"data": 1}, jax.devices()[:1])
    sampler = generate.compile_sampler(Sampler(spy, None), None, mesh, seed=5)
    seen = drawn(sampler, 0.0, np.zeros(6, np.int32), np.arange(6), mesh, 4)
    expected = jax.random.key_data(rng.per_example(rng.stream(5, "sample"), jnp.arange(6)))
    np.testing.assert_array_equal(seen, np.asarray(expected, np.float32))
    other = functools.partial(sampler, seed=np.uint32(2**32 - 1))
    large = drawn(other, 0.0, np.zeros(4, np.int32), np.arange(4), mesh, 4)
    expected = jax.random.key_data(rng.per_example(rng.stream(2**32 - 1, "sample"), jnp.arange(4)))
    np.testing.assert_array_equal(large, np.asarray(expected, np.float32))
    assert sampler.func._cache_size() == 1


def test_another_schedule_is_no_other_program():
    """Steps and guidance weights are arguments of the compiled sampler."""
    configs = [tiny_config("sampling.steps=4"), tiny_config("sampling.steps=2", "sampling.guidance.scale=3.0")]
    experiment = build(configs[0], devices=jax.devices()[:1])
    sampler = generate.compile_sampler(experiment.sampler, experiment.model, experiment.mesh, seed=3)
    shapes, r = experiment.abstract.params, np.random.default_rng(0)
    params = jax.tree.map(lambda leaf: jnp.asarray(r.normal(0, 0.1, leaf.shape), jnp.float32), shapes)
    images = []
    for config in configs:
        schedule = experiment.method.sampler(config.sampling, max_steps=4).schedule
        images.append(sampler(params, np.arange(2), np.arange(2), schedule=schedule))
    np.testing.assert_array_equal(images[0], sampler(params, np.arange(2), np.arange(2)))
    assert not np.array_equal(*images)
    assert sampler.func._cache_size() == 1


@pytest.mark.slow
def test_the_fused_form_draws_the_same_images():
    experiment = build(tiny_config(model="udit"), devices=jax.devices()[:1])
    shapes, r = experiment.abstract.params, np.random.default_rng(0)
    params = jax.tree.map(lambda leaf: jnp.asarray(r.normal(0, 0.1, leaf.shape), jnp.float32), shapes)
    before, images = jax.tree.map(np.array, params), {}
    for fused in (True, False):
        sampler = generate.compile_sampler(experiment.sampler, experiment.model, experiment.mesh, seed=3, fused=fused)
        images[fused] = sampler(params, jnp.arange(4), jnp.arange(4))
    jax.tree.map(np.testing.assert_array_equal, params, before)
    assert float(jnp.std(images[False])) > 0.1
    scale = float(jnp.max(jnp.abs(images[False])))
    np.testing.assert_allclose(images[True], images[False], atol=1e-4 * scale)
    assert not np.array_equal(images[True], images[False])  # two programs, not one
    assert sample.describe_form(experiment.model, params, fused=True).startswith("fused: ")
    assert sample.describe_form(experiment.model, params, fused=False) == "as trained"
    dit = build(tiny_config(model="dit"), devices=jax.devices()[:1])
    assert sample.describe_form(dit.model, dit.abstract.params, fused=True) == "as trained"
