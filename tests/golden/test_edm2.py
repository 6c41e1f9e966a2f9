"""The loss with a learned uncertainty against the published EDM2 code; averages and trajectories are other files'."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from diffjax.diffusion import edm
from tests.golden.cases import cases
from tests.golden.x64 import float64

pytestmark = pytest.mark.golden


@pytest.mark.parametrize("case", cases("edm2", having="loss"))
def test_uncertainty_loss(case):
    """Stored per element [b, c, h, w]; u is the same for all elements of an example, so means agree with means."""
    assert case is not None, "no stored cases"
    number = {key: float(re.search(rf"{key}=(-?[\d.]+\d)", case.info["loss"])[1]) for key in ("P_mean", "P_std")}
    sigma_data = float(re.search(r"sigma_data=([\d.]+\d)", case.info["loss"])[1])
    process = edm.edm(weighting="uncertainty", sigma_data=sigma_data)
    a, b = case.info["toy"]["a"], case.info["toy"]["b"]

    @jax.jit
    def loss(y, z, eps, log_variance):
        sigma = edm.lognormal(z, number["P_mean"], number["P_std"])
        xt = process.q_sample(y, sigma, eps)
        scale, c_noise = (f(sigma).reshape(-1, *(1,) * (y.ndim - 1)) for f in (process.c_in, process.c_noise))
        output = a * jnp.tanh(scale * xt) + b * jnp.sin(c_noise)
        return process.losses(output, y, xt, sigma, eps, log_variance)["loss"]

    with float64():
        y, z, eps, u = (jnp.asarray(case.arrays[f"loss_{k}"]) for k in ("y", "rnd_normal", "unit_noise", "logvar"))
        value = loss(y, z.ravel(), eps, u.ravel())
        np.testing.assert_allclose(value, case.arrays["loss"].mean(axis=(1, 2, 3)), rtol=1e-10)
