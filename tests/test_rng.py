import jax
import jax.numpy as jnp
import numpy as np

from diffjax import rng


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
