import os
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from diffjax import rng
from diffjax.config import load
from diffjax.errors import UserError
from diffjax.experiment import build
from tests.programs import ROOT


def test_streams_differ_and_repeat():
    names = ("params", "train", "sample")
    data = [jax.random.key_data(rng.stream(seed, name)) for seed in (0, 1) for name in names]
    assert len({tuple(np.asarray(d)) for d in data}) == 6
    assert (jax.random.key_data(rng.stream(0, "train")) == jax.random.key_data(rng.stream(0, "train"))).all()


def test_an_example_draws_the_same_alone_and_in_any_batch():
    key = rng.stream(3, "train")
    together = rng.normal(rng.per_example(key, jnp.arange(8)), (2, 3))
    alone = rng.normal(rng.per_example(key, jnp.array([5])), (2, 3))
    np.testing.assert_array_equal(together[5:6], alone)
    assert len(np.unique(together)) == together.size


def test_folding_an_array_of_keys_folds_each():
    keys = rng.per_example(rng.stream(0, "sample"), jnp.arange(3))
    folded = rng.fold_name(keys, "noise")
    one = rng.fold_name(keys[1], "noise")
    np.testing.assert_array_equal(jax.random.key_data(folded)[1], jax.random.key_data(one))


def test_uniform_and_integers_stay_in_range_and_fill_it():
    keys = rng.per_example(rng.stream(0, "train"), jnp.arange(4000))
    u, i = rng.uniform(keys), rng.integers(keys, 10)
    assert 0 <= u.min() < 0.01
    assert 0.99 < u.max() < 1
    assert abs(float(u.mean()) - 0.5) < 0.03
    np.testing.assert_allclose(np.bincount(np.asarray(i), minlength=10) / 4000, 0.1, atol=0.03)


@pytest.mark.parametrize(
    "environment",
    [lambda: jax.default_prng_impl("rbg"), lambda: jax.enable_x64(True)],
    ids=["another generator", "64 bits"],
)
def test_values_do_not_depend_on_the_environment(environment):
    def drawn():
        keys = rng.per_example(rng.stream(0, "train"), jnp.arange(8))
        copied = rng.key_of(jax.random.key_data(rng.stream(0, "train")))
        assert copied == rng.stream(0, "train")
        return [np.asarray(rng.normal(keys, (4,))), np.asarray(rng.uniform(keys)), np.asarray(rng.integers(keys, 10))]

    expected = drawn()
    with environment():
        for found, value in zip(drawn(), expected):
            assert found.dtype == value.dtype
            np.testing.assert_array_equal(found, value)


def test_the_form_of_the_generator_is_pinned():
    """JAX_THREEFRY_PARTITIONABLE=0 would be another stream."""
    code = "from diffjax import rng; import jax; print(jax.config.jax_threefry_partitionable)"
    variables = {**os.environ, "JAX_THREEFRY_PARTITIONABLE": "0", "PYTHONPATH": str(ROOT)}
    found = subprocess.run([sys.executable, "-c", code], env=variables, capture_output=True, text=True, check=True)
    assert found.stdout.strip() == "True"


def test_no_run_computes_in_64_bits():
    config = load(f"{ROOT}/configs/quickstart.py:model=dit")
    with jax.enable_x64(True), pytest.raises(UserError, match="JAX_ENABLE_X64.*; unset it"):
        build(config)
