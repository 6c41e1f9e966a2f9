"""Noise levels, their distributions and the preconditioned target."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from diffjax import rng
from diffjax.diffusion import edm
from diffjax.diffusion.paths import conversion, sigma_as_time
from diffjax.errors import UserError
from tests import ablations
from tests.golden.x64 import float64

SIGMA = np.array([0.002, 0.05, 0.4, 1.0, 7.0, 80.0])
SCHEDULES = {"linear": ablations.linear(), "vp": ablations.vp(), "ve": ablations.ve()}


@pytest.mark.parametrize("sigma_data", [0.5, 1.3])
def test_target_and_input_have_unit_variance(sigma_data):
    """Data and noise are independent, so variances of their parts add up."""
    process = edm.edm(sigma_data=sigma_data)
    p, q = process.prediction(sigma_as_time(SIGMA))
    np.testing.assert_allclose((p * sigma_data) ** 2 + q**2, 1.0, rtol=1e-14)
    np.testing.assert_allclose(process.c_in(SIGMA) ** 2 * (sigma_data**2 + SIGMA**2), 1.0, rtol=1e-14)


def test_target_of_data():
    """The same, measured."""
    generator = np.random.default_rng(0)
    x0, eps = 0.5 * generator.standard_normal((2, 1, 100, 100, 1)).astype(np.float32) * [[[[[1]]]], [[[[2]]]]]
    target = edm.edm().target(*(jnp.asarray(a, jnp.float32) for a in (x0, np.array([0.6]), eps)))
    assert abs(float(target.std()) - 1) < 0.03


def test_the_denoiser_is_the_identity_without_noise():
    k = conversion(sigma_as_time(np.array([0.0])), edm.predicts_edm(0.5))
    np.testing.assert_array_equal([k.x0_x, k.x0_f], [[1.0], [0.0]])


@pytest.mark.parametrize("setting", edm.SETTINGS)
@pytest.mark.parametrize("times", ["", "lognormal", "vp", "ve", "iddpm"])
def test_the_weight_of_a_published_loss_is_one(setting, times):
    t = jnp.array([0.02, 1.0, 50.0])
    np.testing.assert_array_equal(edm.edm(setting, times=times).weight(t), [1.0, 1.0, 1.0])


def test_edm_weight_of_the_data_is_the_unit_weight_of_the_preconditioned_output():
    weight = edm.edm(weighting="edm").weight(SIGMA)
    np.testing.assert_allclose(weight, 1.0, rtol=1e-12)
    c_out = conversion(sigma_as_time(SIGMA), edm.predicts_edm(0.5)).x0_f
    np.testing.assert_allclose(edm.edm(prediction="x0", weighting="edm").weight(SIGMA), c_out**-2, rtol=1e-12)


def test_distributions_of_noise_levels():
    keys = rng.per_example(jax.random.key(0), jnp.arange(20000))
    logs = {times: np.log(edm.edm(times=times).sample_times(keys)) for times in ("lognormal", "ve", "vp", "iddpm")}
    assert abs(logs["lognormal"].mean() + 1.2) < 0.05
    assert abs(logs["lognormal"].std() - 1.2) < 0.05
    low, high = np.log(edm.VE_RANGE)
    assert abs(logs["ve"].mean() - (low + high) / 2) < 0.1
    assert abs(logs["ve"].std() - (high - low) / np.sqrt(12)) < 0.05
    t = edm.vp_time(np.exp(logs["vp"].astype(np.float64)))
    assert abs(t.mean() - 0.5) < 0.01
    j = edm.iddpm_index(np.exp(logs["iddpm"].astype(np.float64)))
    assert 0 <= j.min() <= j.max() < edm.STEPS
    assert abs(j.mean() / edm.STEPS - 0.5) < 0.01


def test_noise_levels_fall_to_zero():
    for steps in (1, 2, 13):
        sigma = edm.sigmas(steps)
        assert sigma.shape == (steps + 1,)
        assert (np.diff(sigma) < 0).all()
        assert sigma[-1] == 0
    with pytest.raises(UserError, match="0 steps"):
        edm.sigmas(0)


def test_vp_betas_are_those_of_the_range():
    np.testing.assert_allclose(ablations.vp_betas(edm.VP_SPAN[1], edm.VP_SPAN[0]), edm.VP_BETAS, rtol=1e-10)


@pytest.mark.parametrize("schedule", SCHEDULES.values(), ids=SCHEDULES)
def test_schedules(schedule):
    t = np.array([0.01, 0.3, 0.9])
    np.testing.assert_allclose(schedule.inverse(schedule.sigma(t)), t, rtol=1e-10)
    with float64():
        expected = jax.vmap(jax.grad(schedule.sigma))(jnp.asarray(t))
    np.testing.assert_allclose(schedule.sigma_dot(t), expected, rtol=1e-10)


@pytest.mark.parametrize("scaling", ["none", "vp"])
@pytest.mark.parametrize("schedule", SCHEDULES.values(), ids=SCHEDULES)
def test_rescaled_process_is_the_same_network(schedule, scaling):
    """Scaled input, told noise level and estimated data do not change; the path's derivatives are right."""
    plain = edm.edm()
    process = ablations.rescaled(plain, schedule, scaling)
    t = np.array([0.01, 0.3, 0.9])
    grid, known = process.grid(t), plain.grid(schedule.sigma(t))
    np.testing.assert_allclose(grid.sigma / grid.alpha, known.sigma, rtol=1e-12)
    np.testing.assert_allclose(grid.c_noise, known.c_noise, rtol=1e-12)
    x, f = np.random.default_rng(0).standard_normal((2, 3))
    np.testing.assert_allclose(grid.c_in * grid.alpha * x, known.c_in * x, rtol=1e-12)
    expected = known.conversion.x0_x * x + known.conversion.x0_f * f
    np.testing.assert_allclose(grid.conversion.x0_x * grid.alpha * x + grid.conversion.x0_f * f, expected, rtol=1e-12)
    with float64():
        for value, derivative in ((0, 2), (1, 3)):
            slopes = jax.vmap(jax.grad(lambda t, value=value: process.path(t)[value]))(jnp.asarray(t))
            np.testing.assert_allclose(process.path(t)[derivative], slopes, rtol=1e-9, atol=1e-12)
    np.testing.assert_allclose(schedule.sigma(np.array(process.span)), plain.span, rtol=1e-9)


def test_iddpm_networks_know_their_table_alone():
    process, u = edm.edm("iddpm"), edm.iddpm_table()
    np.testing.assert_array_equal(edm.iddpm_index(u), np.arange(edm.STEPS + 1))
    between = (u[400] + u[401]) / 2
    np.testing.assert_array_equal(process.grid(np.array([between * 1.0001, between * 0.9999])).t, u[[400, 401]])
    np.testing.assert_array_equal(process.grid(np.array([1e9, -1.0])).t, u[[0, -1]])
    np.testing.assert_array_equal(process.grid(u[[0, 999]]).c_noise, [999, 0])
    sampled = np.asarray(process.sample_times(rng.per_example(jax.random.key(0), jnp.arange(50))))
    assert np.isin(sampled, u.astype(np.float32)).all()


def test_iddpm_table_is_the_cosine_schedule():
    """Where no ratio is clipped, σ² = (1 - ᾱ)/ᾱ up to ᾱ of the last entry, which is not 1."""
    u, j = edm.iddpm_table(), np.arange(20, edm.STEPS)
    abar = np.sin(np.pi * np.arange(edm.STEPS + 1) / (2 * edm.STEPS * 1.008)) ** 2
    np.testing.assert_allclose(u[j] ** 2 + 1, abar[-1] / abar[j], rtol=1e-5)  # float32
