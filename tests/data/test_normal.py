"""Normal values from raw words: fixed for ever, those of numpy 2 but for roundings in the tail, and normal."""

import hashlib

import numpy as np
import pytest

from diffjax.data import draws
from diffjax.data.latents import Sample
from diffjax.data.normal import R, standard_normal

COUNT = 400_000


@pytest.fixture(scope="module")
def values():
    return standard_normal(draws.philox(5, "latent"), (COUNT,))


def test_values_are_fixed_for_ever(values):
    """Training on latents draws them: other values would be another run."""
    assert (
        hashlib.sha256(values.tobytes()).hexdigest()
        == "49789a6a110c1ea66ae3104fdd1f34b19b42cebfc28e1cffde58451640ecfba4"
    )


def test_values_are_those_that_numpy_2_draws(values):
    """Where numpy's stream changes this may go: what counts is the hash above."""
    numpy = np.random.Generator(draws.philox(5, "latent")).standard_normal(COUNT, np.float32)
    body = np.abs(numpy) < R
    assert 50 < np.sum(~body) < 200
    np.testing.assert_array_equal(values[body], numpy[body])
    np.testing.assert_array_max_ulp(values[~body], numpy[~body], 1)


def test_values_are_normal(values):
    assert abs(values.mean()) < 4 / np.sqrt(COUNT)
    assert abs(values.var() - 1) < 4 * np.sqrt(2 / COUNT)
    edges = np.array([-2.5, -1.0, -0.3, 0.1, 0.8, 1.7, 3.0])
    expected = [0.00620967, 0.15865525, 0.38208858, 0.53982784, 0.7881446, 0.95543454, 0.9986501]
    found = (values[:, None] < edges).mean(axis=0)
    np.testing.assert_allclose(found, expected, atol=4 * 0.5 / np.sqrt(COUNT))


@pytest.mark.parametrize("count", [0, 1, 2, 3, 100])
def test_fewer_values_are_the_first_of_more(values, count):
    np.testing.assert_array_equal(standard_normal(draws.philox(5, "latent"), (count,)), values[:count])


def test_samples_of_latents_do_not_depend_on_numpys_distributions(monkeypatch):
    def refused(*_):
        raise AssertionError("numpy's generator of normal values was asked")

    monkeypatch.setattr(np.random, "Generator", refused)
    moments = np.stack([np.zeros((2, 3, 3, 4)), np.ones((2, 3, 3, 4))], axis=1)[:, None].astype(np.float32)
    drawn = Sample(0.5)(moments, np.zeros(2, bool), np.array([7, 8]), 3)
    np.testing.assert_array_equal(drawn[1], standard_normal(draws.philox(3, "latent", block=8), (3, 3, 4)) / 2)
