import jax
import jax.numpy as jnp
import numpy as np

from diffjax.diffusion import adaptive
from tests.golden.x64 import float64


def decay(t: jax.Array, x: jax.Array) -> jax.Array:
    """Fast for large x, so that examples need steps of their own: dx/dt = -x², x(t) = 1/(t + 1/x(0))."""
    return -(x**2)


X = jnp.array([[0.1], [1.0], [300.0]])


def carried(x, span=(0.0, 1.0), velocity=decay, rtol=1e-4, attempts=1000):
    return jax.jit(lambda x: adaptive.dopri5(velocity, x, span, jnp.asarray(rtol), jnp.asarray(1e-9), attempts))(x)


def test_the_pair_is_of_fifth_and_fourth_order():
    """Σ b_i c_i^(k-1) = 1/k up to the order."""
    nodes = adaptive.A.sum(axis=1)
    for weights, order in ((adaptive.A[6], 5), (adaptive.LOWER_ORDER, 4)):
        for k in range(1, order + 1):
            np.testing.assert_allclose(weights @ nodes ** (k - 1), 1 / k, rtol=1e-12)
    assert abs(adaptive.LOWER_ORDER @ nodes**4 - 1 / 5) > 1e-4


def test_it_meets_its_tolerance_there_and_back():
    with float64():
        x = jnp.asarray(np.asarray(X, np.float64))
        for rtol in (1e-4, 1e-8):
            end = carried(x, rtol=rtol)
            np.testing.assert_allclose(end, 1 / (1 + 1 / x), rtol=20 * rtol)
            np.testing.assert_allclose(carried(end, (1.0, 0.0), rtol=rtol)[:2], x[:2], rtol=100 * rtol)


def test_examples_have_steps_of_their_own():
    together = carried(X)
    for i in range(len(X)):
        np.testing.assert_allclose(carried(X[i : i + 1])[0], together[i], rtol=1e-6)


def test_an_example_that_does_not_arrive_is_nan_and_the_others_are_not():
    end = carried(X, attempts=12)
    np.testing.assert_array_equal(np.isnan(end)[:, 0], [False, False, True])
    assert np.isnan(carried(X, velocity=lambda t, x: jnp.nan * x, attempts=5)).all()


def test_the_velocity_is_compiled_once():
    traces = []
    carried(X, velocity=lambda t, x: traces.append(t.shape) or -x)
    assert traces == [(3,)]
