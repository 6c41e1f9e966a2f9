"""Preconditioning, noise levels and losses against the published EDM code; its trajectories are another file's.

The stored arrays are [b, c, h, w]; the toy networks act on each element, so that any layout serves.
"""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from diffjax.diffusion import edm
from diffjax.diffusion.paths import predicts_x0, sigma_as_time
from diffjax.diffusion.weighting import weights
from tests.golden.cases import Case, cases
from tests.golden.x64 import float64

pytestmark = pytest.mark.golden

EXACT = {"rtol": 1e-10}
SETTINGS = {"EDM": "edm", "VP": "vp", "VE": "ve"}


def keys(pattern: str) -> list:
    """One parameter per case and stored key that fits the pattern: the case and the match."""
    found = []
    for parameter in cases("edm"):
        case = parameter.values[0]
        for key in [] if case is None else case.arrays:
            if match := re.fullmatch(pattern, key):
                found.append(pytest.param(case, match, id=f"{parameter.id}-{key}"))
    return found or [pytest.param(None, None, id=f"edm-{pattern}-no-cases")]


def column(x: np.ndarray) -> np.ndarray:
    return x.reshape(-1, 1, 1, 1)


def toy(case: Case, kind: str, x: jax.Array, c: jax.Array) -> jax.Array:
    a, b, k = (case.info["toy"]["params"][name] for name in "abk")
    return a * (x if kind == "linear" else jnp.tanh(k * x)) + b * jnp.sin(column(c))


@pytest.mark.parametrize("case, match", keys(r"pre_(EDM|VP|VE)Precond_(linear|tanh)_(f32|f64)"))
def test_denoiser(case, match):
    assert case is not None, "no stored cases"
    setting, kind, precision = match.groups()
    process, exact = edm.edm(SETTINGS[setting]), precision == "f64"
    k = process.grid(case.arrays["pre_sigma"]).conversion
    with float64():
        dtype = jnp.float64 if exact else jnp.float32
        x, sigma = (jnp.asarray(case.arrays[key], dtype) for key in ("pre_x", "pre_sigma"))
        output = toy(case, kind, column(process.c_in(sigma)) * x, process.c_noise(sigma))
        denoised = column(jnp.asarray(k.x0_x, dtype)) * x + column(jnp.asarray(k.x0_f, dtype)) * output
    assert denoised.dtype == dtype
    tolerance = EXACT if exact else {"rtol": 0, "atol": 1e-5 * np.abs(case.arrays["pre_x"]).max()}
    np.testing.assert_allclose(denoised, case.arrays[match[0]], **tolerance)


@pytest.mark.parametrize("case", cases("edm"))
def test_coefficients(case):
    assert case is not None, "no stored cases"
    stored = case.arrays
    grid = edm.edm().grid(stored["pre_sigma"])
    np.testing.assert_allclose(grid.conversion.x0_x, stored["pre_c_skip"], **EXACT)
    np.testing.assert_allclose(grid.conversion.x0_f, stored["pre_c_out"], **EXACT)
    np.testing.assert_allclose(grid.c_in, stored["pre_c_in"], **EXACT)
    np.testing.assert_allclose(grid.c_noise, stored["pre_c_noise"], **EXACT)
    vp = edm.edm("vp").grid(stored["pre_sigma"])
    np.testing.assert_allclose(vp.c_noise, stored["pre_vp_c_noise"], **EXACT)
    np.testing.assert_allclose(edm.VP_SPAN[0], case.info["vp_sigma_max"], rtol=1e-6)  # float32 in the reference


FLOAT32_SINES = {"rtol": 1.4e-5}  # their last digits, which add up over the table of iDDPM


@pytest.mark.parametrize("case", cases("edm"))
def test_iddpm_table(case):
    assert case is not None, "no stored cases"
    stored, sigma = case.arrays, case.arrays["iddpm_sigma_in"]
    assert (case.info["iddpm"]["C_1"], case.info["iddpm"]["C_2"]) == edm.IDDPM_CLIPS
    assert case.info["iddpm"]["M"] == edm.STEPS
    assert len(stored["iddpm_u"]) == edm.STEPS + 1
    np.testing.assert_allclose(edm.iddpm_table(), stored["iddpm_u"], **FLOAT32_SINES)
    process = edm.edm("iddpm")
    grid = process.grid(sigma)
    np.testing.assert_array_equal(edm.iddpm_index(sigma), stored["iddpm_index"])
    np.testing.assert_array_equal(grid.c_noise, edm.STEPS - 1 - stored["iddpm_index"])
    np.testing.assert_allclose(grid.t, stored["iddpm_sigma_rounded"], **FLOAT32_SINES)
    on_device = jnp.asarray(sigma, jnp.float32)
    np.testing.assert_array_equal(process.c_noise(on_device), edm.STEPS - 1 - stored["iddpm_index"])


def training_sigma(case: Case, name: str) -> np.ndarray:
    """The noise levels of a loss from its pinned random values [b]."""
    if name == "EDM":
        mean, std = (float(re.search(rf"{key}=(-?[\d.]+\d)", case.info["loss"])[1]) for key in ("P_mean", "P_std"))
        return edm.lognormal(case.arrays["loss_rnd_normal"].ravel(), mean, std)
    times = {"VP": edm.vp_times, "VE": edm.ve_times}[name]
    return times(case.arrays["loss_rnd_uniform"].ravel())


@pytest.mark.parametrize("case, match", keys(r"loss_(EDM|VP|VE)Loss_(linear|tanh)_f64"))
def test_losses(case, match):
    assert case is not None, "no stored cases"
    name, kind = match.groups()
    process, expected = edm.edm(SETTINGS[name]), case.arrays[match[0]]
    sigma = training_sigma(case, name)
    np.testing.assert_allclose(sigma, case.arrays[f"loss_{name}_sigma"].ravel(), **EXACT)

    @jax.jit
    def loss(y, eps, sigma):
        xt = process.q_sample(y, sigma, eps)
        output = toy(case, kind, column(process.c_in(sigma)) * xt, process.c_noise(sigma))
        elements = column(process.weight(sigma)) * (output - process.target(y, sigma, eps)) ** 2
        return elements, process.losses(output, y, xt, sigma, eps)["loss"]

    with float64():
        elements, mean = loss(*(jnp.asarray(a) for a in (case.arrays["loss_y"], case.arrays["loss_unit_noise"], sigma)))
        np.testing.assert_allclose(elements, expected, **EXACT)
        np.testing.assert_allclose(mean, expected.mean(axis=(1, 2, 3)), **EXACT)


@pytest.mark.parametrize("case", cases("edm"))
def test_loss_weight(case):
    """λ, of the denoiser's squared error."""
    assert case is not None, "no stored cases"
    points = sigma_as_time(case.arrays["loss_EDM_sigma"].ravel())
    weight = weights("edm", points, predicts_x0, sigma_data=0.5)
    np.testing.assert_allclose(weight, case.arrays["loss_EDM_weight"].ravel(), **EXACT)


@pytest.mark.parametrize("case, match", keys(r"sched_N(\d+)_lo([\d.]+)_hi([\d.]+)_rho([\d.]+)"))
def test_noise_levels(case, match):
    assert case is not None, "no stored cases"
    steps, low, high, rho = match.groups()
    np.testing.assert_allclose(
        edm.sigmas(int(steps), float(low), float(high), float(rho)), case.arrays[match[0]], **EXACT
    )
