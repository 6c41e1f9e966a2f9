"""Samplers on data whose best denoiser is known in closed form."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from diffjax import rng
from diffjax.diffusion import samplers
from diffjax.diffusion.gaussian import GaussianDiffusion, gaussian_diffusion
from diffjax.errors import UserError

MEAN, STD = 0.7, 0.4
SHAPE = (1, 1, 2)
ABAR = gaussian_diffusion().alphas_cumprod  # of the original steps, which is what a network is told


def keys(count: int, seed: int = 0) -> jax.Array:
    return rng.per_example(jax.random.key(seed), jnp.arange(count))


def exact_eps(x: jax.Array, t: jax.Array) -> jax.Array:
    """E[eps | x_t] for data N(MEAN, STD²)."""
    abar = jnp.asarray(ABAR, jnp.float32)[t.astype(jnp.int32)].reshape(-1, 1, 1, 1)
    return jnp.sqrt(1.0 - abar) * (x - jnp.sqrt(abar) * MEAN) / (abar * STD**2 + 1.0 - abar)


def exact_denoise(process: GaussianDiffusion) -> samplers.Denoise:
    """`exact_eps` with the v that makes σ² the true variance of x_{k-1} given x_k: β~ + coef1² Var[x0 | x_k]."""
    data_variance = (
        STD**2 * (1.0 - process.alphas_cumprod) / (process.alphas_cumprod * STD**2 + 1 - process.alphas_cumprod)
    )
    log_variance = np.log(process.posterior_variance + process.posterior_mean_coef1**2 * data_variance)
    low, high = process.posterior_log_variance_clipped, np.log(process.betas)
    v = np.zeros(1000)
    v[process.timestep_map] = 2.0 * (log_variance - low) / np.where(high > low, high - low, 1.0) - 1.0

    def denoise(x: jax.Array, t: jax.Array) -> jax.Array:
        values = jnp.asarray(v, jnp.float32)[t.astype(jnp.int32)].reshape(-1, 1, 1, 1)
        return jnp.concatenate([exact_eps(x, t), jnp.broadcast_to(values, x.shape)], axis=-1)

    return denoise


def assert_moments(samples: jax.Array, mean: float, std: float) -> None:
    """Within five standard errors."""
    count = samples.size
    assert abs(float(samples.mean()) - mean) < 5 * std / np.sqrt(count)
    assert abs(float(samples.std()) / std - 1.0) < 5 / np.sqrt(2 * count)


def test_ddpm_reaches_the_data_distribution():
    process = gaussian_diffusion(respacing="100")
    x, noise = samplers.initial_noise(keys(8192), SHAPE), samplers.step_noise(keys(8192), SHAPE)
    assert_moments(samplers.ddpm(process, exact_denoise(process), x, noise), MEAN, STD)


def test_deterministic_ddim_is_the_map_between_the_gaussians():
    """The flow of Gaussian data is x0 = MEAN + STD x_T; the error of its discretisation falls with the step."""
    x = samplers.initial_noise(keys(16), SHAPE)
    errors = []
    for respacing in ("50", "100", "200"):
        process = gaussian_diffusion(respacing=respacing, variance="fixed_small")
        sample = jax.jit(lambda x, process=process: samplers.ddim(process, exact_eps, x))(x)
        errors.append(float(jnp.abs(sample - (MEAN + STD * x)).max()))
    assert errors[2] < errors[1] < errors[0] < 0.1
    assert errors[2] < 0.02


def test_random_ddim_reaches_the_data_distribution():
    """Its variance β~ leaves out that of x0 given x_k, an error that falls with the step: 5% at 250 steps."""
    process = gaussian_diffusion(variance="fixed_small")
    x, noise = samplers.initial_noise(keys(8192, 1), SHAPE), samplers.step_noise(keys(8192, 1), SHAPE)
    sample = samplers.ddim(process, exact_eps, x, noise, eta=1.0)
    assert abs(float(sample.mean()) - MEAN) < 0.02
    assert abs(float(sample.std()) / STD - 1.0) < 0.03


def test_ddim_reverse_finds_the_noise_that_ddim_starts_from():
    process = gaussian_diffusion(variance="fixed_small")
    x0 = MEAN + STD * samplers.initial_noise(keys(8), SHAPE)
    x = samplers.ddim_reverse(process, exact_eps, x0)
    np.testing.assert_allclose(x, (x0 - MEAN) / STD, atol=0.05)
    np.testing.assert_allclose(samplers.ddim(process, exact_eps, x), x0, atol=1e-2)


def test_a_sample_depends_on_its_own_key_alone():
    process = gaussian_diffusion(respacing="5")

    @jax.jit
    def sample(keys):
        x, noise = samplers.initial_noise(keys, SHAPE), samplers.step_noise(keys, SHAPE)
        return samplers.ddpm(process, exact_denoise(process), x, noise)

    together = sample(keys(6))
    np.testing.assert_allclose(sample(keys(6)[2:4]), together[2:4], rtol=1e-6)
    assert len(np.unique(together)) == together.size


def test_noise_differs_between_steps_and_from_the_start():
    noise = samplers.step_noise(keys(1), SHAPE)
    values = [samplers.initial_noise(keys(1), SHAPE), noise(jnp.int32(0)), noise(jnp.int32(1))]
    assert len(np.unique(np.concatenate(values))) == 6


def test_the_network_is_traced_once_and_told_the_original_steps():
    process = gaussian_diffusion(respacing="5", variance="fixed_small")
    traces, seen = [], []

    def denoise(x, t):
        traces.append(t.shape)
        jax.debug.callback(lambda t: seen.append(np.asarray(t)), t, ordered=True)
        return jnp.zeros_like(x)

    samplers.ddim(process, denoise, jnp.ones((3, *SHAPE))).block_until_ready()
    jax.effects_barrier()
    assert traces == [(3,)]
    np.testing.assert_array_equal(np.stack(seen)[:, 0], process.timestep_map[::-1])


def test_random_ddim_without_noise_is_refused():
    with pytest.raises(UserError, match="noise"):
        samplers.ddim(gaussian_diffusion(), exact_eps, jnp.zeros((1, *SHAPE)), eta=0.5)


def test_clipping_keeps_samples_in_range():
    process = gaussian_diffusion(respacing="10", variance="fixed_small")
    x = 3.0 * jnp.ones((1, *SHAPE))
    free, clipped = (samplers.ddim(process, lambda x, t: -x, x, clip=clip) for clip in (False, True))
    assert float(free.max()) > 1.0
    assert float(jnp.abs(clipped).max()) <= 1.0
