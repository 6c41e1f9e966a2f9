"""The process itself: options, respacing, the limits its formulas must meet."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from diffjax import rng
from diffjax.diffusion.gaussian import (
    discretized_log_likelihood,
    gaussian_diffusion,
    linear_betas,
    respaced_steps,
)
from diffjax.errors import UserError
from tests.golden.x64 import float64


@pytest.mark.parametrize(
    "num_steps, spec, expected",
    [
        (5, "", [0, 1, 2, 3, 4]),
        (10, "1", [0]),
        (10, "4", [0, 3, 6, 9]),
        (10, "2,3", [0, 4, 5, 7, 9]),
        (11, "1,1,2", [0, 4, 8, 10]),  # sections of 4, 4 and 3
        (6, "0,2", [3, 5]),
        (6, "3", [0, 2, 5]),  # 2.5 rounds half to even
        (1000, "ddim4", [0, 250, 500, 750]),
        (10, "ddim5", [0, 2, 4, 6, 8]),
    ],
)
def test_respaced_steps(num_steps, spec, expected):
    assert respaced_steps(num_steps, spec) == expected


@pytest.mark.parametrize("spec", ["1001", "10,x", "ddim", "ddim300", "ddim-5", "2.5", "-3", "10,", " "])
def test_impossible_respacing_is_named(spec):
    with pytest.raises(UserError, match="respacing"):
        respaced_steps(1000, spec)


@pytest.mark.parametrize(
    "options",
    [{"prediction": "velocity"}, {"variance": "learned"}, {"loss": "l1"}, {"steps": 20}, {"respacing": "1"}],
    ids=lambda options: next(iter(options)),
)
def test_impossible_options_are_refused(options):
    with pytest.raises(UserError):
        gaussian_diffusion(**options)


def test_output_channels_must_fit_the_variance():
    x, k = jnp.zeros((2, 4, 4, 3)), jnp.array([0, 5])
    with pytest.raises(UserError, match="needs 6 output channels"):
        gaussian_diffusion().p_mean_variance(x, x, k)
    with pytest.raises(UserError, match="needs 3 output channels"):
        gaussian_diffusion(variance="fixed_small").losses(jnp.zeros((2, 4, 4, 6)), x, x, k, x)


def test_respacing_keeps_the_marginals():
    full, short = gaussian_diffusion(), gaussian_diffusion(respacing="10,15,20")
    np.testing.assert_allclose(short.alphas_cumprod, full.alphas_cumprod[short.timestep_map], rtol=1e-12)
    np.testing.assert_allclose(full.betas, linear_betas(), rtol=1e-9)


def test_sample_times_covers_every_step_evenly():
    process = gaussian_diffusion(respacing="10")
    keys = rng.per_example(jax.random.key(0), jnp.arange(5000))
    k = process.sample_times(keys)
    counts = np.bincount(k, minlength=10)
    assert k.dtype == jnp.int32
    assert counts.sum() == 5000
    assert len(counts) == 10
    assert (abs(counts - 500) < 5 * np.sqrt(450)).all()
    np.testing.assert_array_equal(process.sample_times(keys[7:9]), k[7:9])


def test_a_perfect_prediction_has_no_squared_error_and_inverts_the_noising():
    process = gaussian_diffusion(variance="fixed_small")
    x0, eps = np.random.default_rng(0).standard_normal((2, 4, 3, 3, 2)).astype(np.float32)
    k = jnp.array([0, 10, 500, 999])
    xt = process.q_sample(x0, k, eps)
    assert not process.losses(eps, x0, xt, k, eps)["loss"].any()
    # at the last step ᾱ is 4e-5, so one rounding of xt is 160 roundings of x0
    np.testing.assert_allclose(process.x0_from_eps(xt, k, eps), x0, atol=2e-4)
    np.testing.assert_allclose(process.eps_from_x0(xt, k, x0), eps, atol=2e-4)


def test_bound_of_the_true_posterior_is_zero_and_grows_with_the_error():
    process = gaussian_diffusion(prediction="x0", variance="fixed_small", loss="rescaled_kl")
    x0 = np.random.default_rng(1).uniform(-1, 1, (3, 4, 4, 2)).astype(np.float32)
    k = jnp.array([1, 300, 999])
    xt = process.q_sample(x0, k, jnp.ones_like(x0))
    exact = process.losses(x0, x0, xt, k, None)["loss"]
    worse = process.losses(x0 + 0.1, x0, xt, k, None)["loss"]
    np.testing.assert_allclose(exact, 0.0, atol=1e-3)
    assert (worse > exact).all()


def test_eight_bit_bins_add_up_to_one():
    """exp(-L_0) over all 256 levels is a probability distribution."""
    process = gaussian_diffusion(prediction="x0", variance="fixed_large", loss="rescaled_kl")
    levels = (jnp.arange(256.0) / 127.5 - 1.0).reshape(256, 1, 1, 1)
    k = jnp.zeros(256, jnp.int32)
    bits = process.variational_bound(jnp.full_like(levels, 0.1), levels, jnp.full_like(levels, 0.1), k)
    np.testing.assert_allclose(jnp.sum(2.0**-bits), 1.0, atol=1e-4)


def published_log_likelihood(x, mean, log_scale):
    """As the published losses write it: a difference of two values of a distribution."""
    cdf = lambda z: 0.5 * (1 + jnp.tanh(np.sqrt(2 / np.pi) * (z + 0.044715 * z**3)))  # noqa: E731
    upper, lower = (cdf((x - mean + half) * jnp.exp(-log_scale)) for half in (1 / 255, -1 / 255))
    probability = jnp.where(x < -0.999, upper, jnp.where(x > 0.999, 1 - lower, upper - lower))
    return jnp.log(jnp.maximum(probability, 1e-12))


def test_the_likelihood_of_a_bin_and_its_gradient_are_exact_to_float32():
    """Bins of all widths within four standard deviations, against float64."""
    r = np.random.default_rng(5)
    x = (r.integers(0, 256, 4000) / 127.5 - 1).astype(np.float32)
    log_scale = r.uniform(-6, 0, x.shape).astype(np.float32)
    mean = (x + np.exp(log_scale) * r.uniform(-4, 4, x.shape)).astype(np.float32)

    def found(function, dtype):
        total = lambda *arguments: jnp.sum(function(jnp.asarray(x, dtype), *arguments))  # noqa: E731
        arguments = jnp.asarray(mean, dtype), jnp.asarray(log_scale, dtype)
        return function(jnp.asarray(x, dtype), *arguments), *jax.jit(jax.grad(total, argnums=(0, 1)))(*arguments)

    with float64():
        exact = found(published_log_likelihood, jnp.float64)
    for value, expected in zip(found(discretized_log_likelihood, jnp.float32), exact):
        assert value.dtype == jnp.float32
        np.testing.assert_allclose(value, expected, rtol=3e-5, atol=1e-5)


def test_what_float32_cannot_tell_from_nothing_counts_as_published():
    x, far = jnp.zeros(2), jnp.array([0.0, 8.0])
    value, gradient = jax.value_and_grad(lambda m: jnp.sum(discretized_log_likelihood(x, m, jnp.zeros(2))))(far)
    np.testing.assert_allclose(value, np.log(1e-12) + published_log_likelihood(0.0, 0.0, 0.0), rtol=1e-5)
    assert gradient[1] == 0


def test_low_precision_outputs_give_float32_losses():
    process = gaussian_diffusion()
    x = jnp.ones((2, 2, 2, 1))
    k = jnp.array([3, 0])
    terms = process.losses(jnp.zeros((2, 2, 2, 2), jnp.bfloat16), x, x, k, x)
    assert {term: (value.dtype, value.shape) for term, value in terms.items()} == dict.fromkeys(
        ["loss", "mse", "vb"], (jnp.float32, (2,))
    )


def test_v_means_what_the_noise_means():
    x0, eps = np.random.default_rng(2).standard_normal((2, 3, 2, 2, 1)).astype(np.float32)
    k = jnp.array([1, 400, 990])
    process = gaussian_diffusion(prediction="v", variance="fixed_small")
    xt = process.q_sample(x0, k, eps)
    v = process.target(x0, k, eps)
    np.testing.assert_allclose(process.p_mean_variance(v, xt, k).x0, x0, atol=1e-6)
    assert not process.losses(v, x0, xt, k, eps)["loss"].any()


def test_weighted_squared_error():
    x0, eps, output = np.random.default_rng(3).standard_normal((3, 4, 2, 2, 1)).astype(np.float32)
    k = jnp.array([0, 10, 400, 990])
    plain, weighted = (
        gaussian_diffusion(variance="fixed_small", **options)
        for options in ({}, {"weighting": "min_snr", "gamma": 2.0})
    )
    xt = plain.q_sample(x0, k, eps)
    snr = plain.alphas_cumprod[k] / (1 - plain.alphas_cumprod[k])
    expected = np.minimum(1, 2 / snr) * plain.losses(output, x0, xt, k, eps)["loss"]
    np.testing.assert_allclose(weighted.losses(output, x0, xt, k, eps)["loss"], expected, rtol=1e-6)
    np.testing.assert_array_equal(plain.mse_weights, 1.0)


@pytest.mark.parametrize("prediction", ["epsilon", "x0", "v"])
def test_grid_holds_the_steps_and_the_data(prediction):
    process = gaussian_diffusion(respacing="10", prediction=prediction, variance="fixed_small")
    steps = np.array([9, 4, 0, -1])
    grid = process.grid(steps)
    np.testing.assert_array_equal(grid.t, steps)
    np.testing.assert_array_equal(grid.c_noise, [*process.timestep_map[[9, 4, 0]], -1])
    np.testing.assert_array_equal(grid.c_in, 1.0)
    np.testing.assert_allclose(grid.alpha**2, np.append(process.alphas_cumprod[[9, 4, 0]], 1.0))
    np.testing.assert_allclose(grid.alpha**2 + grid.sigma**2, 1.0)
    assert np.isnan(grid.conversion.velocity_f).all()
    x0, eps = np.random.default_rng(4).standard_normal((2, 3, 1, 1, 1)).astype(np.float32)
    k = jnp.asarray(steps[:3])
    xt, f = (np.asarray(a, np.float64).ravel() for a in (process.q_sample(x0, k, eps), process.target(x0, k, eps)))
    c = grid.conversion
    np.testing.assert_allclose(c.x0_x[:3] * xt + c.x0_f[:3] * f, x0.ravel(), atol=1e-4)
    np.testing.assert_allclose(c.eps_x[:3] * xt + c.eps_f[:3] * f, eps.ravel(), atol=1e-4)
    with pytest.raises(UserError, match="valid: -1"):
        process.grid(np.array([10]))
