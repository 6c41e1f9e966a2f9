"""Loss weights in the forms in which they are published, and what the uncertainty can learn."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from diffjax.diffusion import paths, weighting
from diffjax.diffusion.paths import PREDICTIONS
from diffjax.errors import UserError
from tests import trajectories

T = np.array([0.05, 0.3, 0.6, 0.95])


def weights(name: str, prediction: str, path: paths.Path = paths.vp, **numbers: float) -> np.ndarray:
    return weighting.weights(name, path(T), PREDICTIONS[prediction], **numbers)


def test_min_snr():
    c = paths.vp(T)
    snr, gamma = (c.alpha / c.sigma) ** 2, 0.7
    np.testing.assert_allclose(weights("min_snr", "x0", gamma=gamma), np.minimum(snr, gamma), rtol=1e-12)
    np.testing.assert_allclose(weights("min_snr", "epsilon", gamma=gamma), np.minimum(1, gamma / snr), rtol=1e-12)
    np.testing.assert_allclose(weights("min_snr", "v", gamma=gamma), np.minimum(snr, gamma) / (snr + 1), rtol=1e-12)


@pytest.mark.parametrize("prediction", ["epsilon", "x0", "v"])
def test_min_snr_without_signal_is_one(prediction):
    c = paths.Point(*(np.array([value]) for value in (0.0, 1.0, np.nan, np.nan)))
    with np.errstate(invalid="ignore"):
        np.testing.assert_array_equal(weighting.weights("min_snr", c, PREDICTIONS[prediction]), [1.0])


def test_other_weights():
    c = paths.linear(T)
    np.testing.assert_allclose(weights("snr", "epsilon"), 1.0, rtol=1e-12)
    np.testing.assert_allclose(weights("uniform", "score") / c.sigma**2, weights("snr", "score") / c.sigma**2)
    np.testing.assert_allclose(weights("uniform", "score", paths.linear), c.sigma**2, rtol=1e-12)
    np.testing.assert_allclose(weights("velocity", "x0", paths.linear), 1 / (1 - T) ** 2, rtol=1e-12)
    np.testing.assert_allclose(weights("velocity", "velocity", paths.gvp), 1.0, rtol=1e-12)
    _, diffusion = trajectories.drift(c)
    np.testing.assert_allclose(weights("likelihood", "epsilon", paths.linear), diffusion / c.sigma**2, rtol=1e-12)
    snr = (c.alpha / c.sigma) ** 2
    np.testing.assert_allclose(weights("edm", "x0", paths.linear, sigma_data=0.4), snr + 1 / 0.4**2, rtol=1e-12)


@pytest.mark.parametrize("numbers", [{"gamma": 0.0}, {"sigma_data": -1.0}, {"gamma": float("nan")}, {"gamma": np.inf}])
def test_impossible_numbers_are_refused(numbers):
    with pytest.raises(UserError, match="positive"):
        weights("edm", "x0", **numbers)


def test_uncertainty_learns_the_size_of_the_error():
    """Gradient descent on equation (3) for an error that depends on the noise level finds its logarithm."""
    level = jnp.linspace(-5.0, 4.0, 200)
    error = jnp.exp(jnp.sin(level) + 0.3 * level)

    @jax.jit
    def step(_, params):
        loss = lambda p: jnp.mean(error / jnp.exp(u := weighting.uncertainty(p, level)) + u)  # noqa: E731
        return jax.tree.map(lambda p, g: p - 0.03 * g, params, jax.grad(loss)(params))

    start = weighting.init_uncertainty()
    np.testing.assert_array_equal(weighting.uncertainty(start, level), 0.0)
    learned = jax.lax.fori_loop(0, 2000, step, start)
    np.testing.assert_allclose(weighting.uncertainty(learned, level), jnp.log(error), atol=0.05)
