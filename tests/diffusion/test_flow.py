"""Times of flow matching, and the process of given options."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from diffjax import rng
from diffjax.diffusion import flow
from diffjax.errors import UserError

KEYS = rng.per_example(jax.random.key(0), jnp.arange(20000))


def test_uniform_times_fill_the_interval_of_training():
    for prediction in ("velocity", "epsilon"):
        low, high = flow.intervals("linear", prediction).train
        t = np.asarray(flow.flow("linear", prediction=prediction).sample_times(KEYS))
        assert low <= t.min() < low + 1e-3
        assert high - 1e-3 < t.max() <= high
        assert abs(t.mean() - 0.5) < 0.01


def test_logit_normal_times_and_their_direction():
    """A positive mean is more noise, so earlier times; the logit is normal."""
    t = np.asarray(flow.flow(times="logit_normal", logit_mean=0.5, logit_std=0.6).sample_times(KEYS), np.float64)
    logit = np.log((1 - t) / t)
    assert abs(logit.mean() - 0.5) < 0.02
    assert abs(logit.std() - 0.6) < 0.02
    assert t.mean() < 0.5


def test_shift_follows_the_number_of_tokens():
    """The uncertainty of a constant image under n tokens of noise is (u/(1-u))/√n: SD3 section 5.3.2."""
    u, shift = np.array([0.0, 0.2, 0.5, 0.9, 1.0]), 2.0
    moved = flow.shifted(u, shift)
    np.testing.assert_allclose(moved[[0, -1]], [0.0, 1.0])
    np.testing.assert_allclose(moved[1:-1] / (1 - moved[1:-1]), shift * u[1:-1] / (1 - u[1:-1]), rtol=1e-12)
    np.testing.assert_allclose(flow.shifted(flow.shifted(u, 2.0), 0.5), u, rtol=1e-12)
    plain, shifted = (np.asarray(flow.flow(shift=a).sample_times(KEYS)) for a in (1.0, 3.0))
    np.testing.assert_allclose(1 - shifted, flow.shifted(1 - plain, 3.0), rtol=1e-5, atol=1e-6)


def test_span_is_the_interval_of_the_ode():
    for name in flow.PATHS:
        for prediction in ("velocity", "epsilon", "score", "x0", "v"):
            assert flow.flow(name, prediction=prediction).span == flow.intervals(name, prediction).ode


def test_the_network_sees_time_and_input_as_they_are():
    process, t = flow.flow(), jnp.array([0.1, 0.9])
    np.testing.assert_array_equal(process.c_noise(t), t)
    np.testing.assert_array_equal(process.c_in(t), [1.0, 1.0])


@pytest.mark.parametrize("path, prediction", [("ve", "velocity"), ("linear", "edm")])
def test_unknown_intervals_are_refused(path, prediction):
    with pytest.raises(UserError, match="is unknown"):
        flow.intervals(path, prediction)
