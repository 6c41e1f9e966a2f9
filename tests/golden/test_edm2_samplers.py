"""The guided trajectories of EDM2 (a main and a worse denoiser, a constant weight) against NVlabs/edm2, in float64."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from diffjax.diffusion import edm, guidance, samplers
from tests.golden.cases import cases
from tests.golden.x64 import float64

pytestmark = pytest.mark.golden


@pytest.mark.parametrize("skip", [False, True], ids=["", "skip"])
@pytest.mark.parametrize("case", cases("edm2"))
def test_guided_trajectories(case, skip):
    """The worse denoiser is 0.8 D + 0.1 tanh(x) in terms of data; its network says the same in terms of the output."""
    assert case is not None, "no stored cases"
    a, b = (case.info["toy"][name] for name in "ab")
    steps = int(re.match(r"(\d+)-step", case.info["guided"]).group(1))
    scale_worse, scale_tanh = (
        float(number)
        for number in re.search(r"D_ref = ([\d.]+)\*D_main \+ ([\d.]+)\*tanh", case.info["guided"]).groups()
    )
    process = edm.edm()

    def main(x, t):
        return a * jnp.tanh(x) + b * jnp.sin(t).reshape(-1, *(1,) * (x.ndim - 1))

    def worse(x, t):
        sigma = jnp.exp(4 * t).reshape(-1, *(1,) * (x.ndim - 1))
        c_skip, c_out = 0.25 / (sigma**2 + 0.25), 0.5 * sigma / jnp.sqrt(sigma**2 + 0.25)
        noisy = x / process.c_in(sigma)
        denoised = scale_worse * (c_skip * noisy + c_out * main(x, t)) + scale_tanh * jnp.tanh(noisy)
        return (denoised - c_skip * noisy) / c_out

    keys = [key for key in case.arrays if key.startswith("guided_final_w")]
    assert keys
    with float64():
        x = jnp.asarray(case.arrays["guided_noise"])
        denoise = guidance.autoguidance(main, worse, skip=skip)
        run = jax.jit(lambda schedule, x: samplers.sample(schedule, denoise, x, jnp.float32))
        for key in keys:
            schedule = samplers.schedule(process, "edm", steps, weight=float(key.removeprefix("guided_final_w")))
            # dividing by c_out, which falls to sigma_min, costs some digits
            np.testing.assert_allclose(run(schedule, x), case.arrays[key], rtol=1e-10, err_msg=key)
