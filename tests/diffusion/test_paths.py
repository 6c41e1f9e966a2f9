"""What the paths and predictions must satisfy, whatever their formulas."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from diffjax.diffusion import edm, flow, paths
from diffjax.diffusion.paths import conversion, determinant
from tests import trajectories
from tests.golden.x64 import float64

T = np.array([0.05, 0.3, 0.5, 0.77, 0.97])
PATHS = flow.PATHS | {"sigma_as_time": paths.sigma_as_time}
PREDICTIONS = paths.PREDICTIONS | {"minus_epsilon": paths.predicts_minus_epsilon, "edm": edm.predicts_edm(0.5)}

every_path = pytest.mark.parametrize("path", PATHS.values(), ids=PATHS)
every_prediction = pytest.mark.parametrize("prediction", PREDICTIONS.values(), ids=PREDICTIONS)


def data_and_noise() -> tuple[np.ndarray, np.ndarray]:
    return tuple(np.random.default_rng(0).standard_normal((2, len(T))))


@every_path
def test_derivatives(path):
    with float64():
        t = jnp.asarray(T)
        for value, derivative in ((0, 2), (1, 3)):
            expected = jax.vmap(jax.grad(lambda t, value=value: path(t)[value]))(t)
            np.testing.assert_allclose(path(T)[derivative], expected, rtol=1e-12, atol=1e-14)


@every_path
def test_host_and_device_agree(path):
    t = T.astype(np.float32)
    for host, device in zip(path(t.astype(np.float64)), path(jnp.asarray(t))):
        assert isinstance(host, np.ndarray)
        assert device.dtype == jnp.float32
        np.testing.assert_allclose(device, host, rtol=2e-6)


@pytest.mark.parametrize("name", ["gvp", "vp"])
def test_these_paths_keep_the_variance(name):
    c = PATHS[name](T)
    np.testing.assert_allclose(c.alpha**2 + c.sigma**2, 1.0, rtol=1e-14)


@every_path
@every_prediction
def test_every_prediction_gives_data_noise_and_velocity_back(path, prediction):
    x0, eps = data_and_noise()
    c = path(T)
    x = c.alpha * x0 + c.sigma * eps
    p, q = prediction(c)
    f = p * x0 + q * eps
    k = conversion(c, prediction)
    np.testing.assert_allclose(k.x0_x * x + k.x0_f * f, x0, rtol=1e-9)
    np.testing.assert_allclose(k.eps_x * x + k.eps_f * f, eps, rtol=1e-9)
    np.testing.assert_allclose(k.velocity_x * x + k.velocity_f * f, c.alpha_dot * x0 + c.sigma_dot * eps, rtol=1e-9)


@every_path
@every_prediction
def test_squared_errors_of_predictions_are_those_of_the_data(path, prediction):
    """Equation (4)."""
    c = path(T)
    k = conversion(c, prediction)
    wrong = 0.3
    error = k.x0_f * wrong  # of the data at the same x
    np.testing.assert_allclose((determinant(c, prediction) / c.sigma) ** 2 * error**2, wrong**2, rtol=1e-12)


@every_path
def test_velocity_of_the_score(path):
    """Equation (5)."""
    x0, eps = data_and_noise()
    c = path(T)
    x = c.alpha * x0 + c.sigma * eps
    r, diffusion = trajectories.drift(c)
    np.testing.assert_allclose(
        r * x - diffusion * eps / c.sigma, c.alpha_dot * x0 + c.sigma_dot * eps, rtol=1e-9, atol=1e-12
    )
