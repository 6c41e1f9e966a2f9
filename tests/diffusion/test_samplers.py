"""Samplers on data whose best denoiser is known in closed form."""

import itertools
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from diffjax import rng
from diffjax.diffusion import paths, samplers
from diffjax.diffusion.edm import edm
from diffjax.diffusion.gaussian import GaussianDiffusion, gaussian_diffusion
from diffjax.errors import UserError
from tests import slow, trajectories
from tests.diffusion import single_steps

MEAN, STD = 0.7, 0.4
SHAPE = (1, 1, 2)
ABAR = gaussian_diffusion().alphas_cumprod  # of the original steps, which is what a network gets


def keys(count: int, seed: int = 0) -> jax.Array:
    return rng.per_example(jax.random.key(seed), jnp.arange(count))


def exact_eps(x: jax.Array, t: jax.Array, weight: object = None) -> jax.Array:
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

    def denoise(x: jax.Array, t: jax.Array, weight: object) -> jax.Array:
        values = jnp.asarray(v, jnp.float32)[t.astype(jnp.int32)].reshape(-1, 1, 1, 1)
        return jnp.concatenate([exact_eps(x, t), jnp.broadcast_to(values, x.shape)], axis=-1)

    return denoise


def assert_moments(samples: jax.Array, mean: float, std: float) -> None:
    """Within five standard errors."""
    count = samples.size
    assert abs(float(samples.mean()) - mean) < 5 * std / np.sqrt(count)
    assert abs(float(samples.std()) / std - 1.0) < 5 / np.sqrt(2 * count)


def sampled(process: GaussianDiffusion, sampler: str, steps: int, denoise: samplers.Denoise, x, noise=None, **options):
    """Samples of a schedule, compiled."""
    schedule = samplers.schedule(process, sampler, steps, **options)
    return jax.jit(lambda schedule, x: samplers.sample(schedule, denoise, x, noise or jnp.zeros_like))(schedule, x)


def test_ddpm_reaches_the_data_distribution():
    x, noise = samplers.initial_noise(keys(8192), SHAPE), samplers.step_noise(keys(8192), SHAPE)
    denoise = exact_denoise(gaussian_diffusion(respacing="100"))
    assert_moments(sampled(gaussian_diffusion(), "ddpm", 100, denoise, x, noise), MEAN, STD)


def test_deterministic_ddim_is_the_map_between_the_gaussians():
    """The flow of Gaussian data is x0 = MEAN + STD x_T; the error of its discretisation falls with the step."""
    x = samplers.initial_noise(keys(16), SHAPE)
    errors = []
    for steps in (50, 100, 200):
        sample = sampled(gaussian_diffusion(), "ddim", steps, exact_eps, x, spacing="even")
        errors.append(float(jnp.abs(sample - (MEAN + STD * x)).max()))
    assert errors[2] < errors[1] < errors[0] < 0.1
    assert errors[2] < 0.02


@pytest.mark.slow
def test_random_ddim_reaches_the_data_distribution():
    """Its variance β~ leaves out that of x0 given x_k, an error that falls with the step: 5% at 250 steps."""
    x, noise = samplers.initial_noise(keys(8192, 1), SHAPE), samplers.step_noise(keys(8192, 1), SHAPE)
    sample = sampled(gaussian_diffusion(), "ddim", 1000, exact_eps, x, noise, eta=1.0)
    assert abs(float(sample.mean()) - MEAN) < 0.02
    assert abs(float(sample.std()) / STD - 1.0) < 0.03


def test_noise_differs_between_steps_and_from_the_start():
    noise = samplers.step_noise(keys(1), SHAPE)
    values = [samplers.initial_noise(keys(1), SHAPE), noise(jnp.int32(0)), noise(jnp.int32(1))]
    assert len(np.unique(np.concatenate(values))) == 6


def test_the_network_is_traced_once_and_told_the_original_steps():
    process = gaussian_diffusion(respacing="5")
    traces, seen = [], []

    def denoise(x, t, weight):
        traces.append(t.shape)
        jax.debug.callback(lambda t: seen.append(np.asarray(t)), t, ordered=True)
        return jnp.zeros_like(x)

    sampled(gaussian_diffusion(), "ddim", 5, denoise, jnp.ones((3, *SHAPE)), spacing="even").block_until_ready()
    jax.effects_barrier()
    assert traces == [(3,)]
    np.testing.assert_array_equal(np.stack(seen)[:, 0], process.timestep_map[::-1])


# Schedules: every sampler on every kind of process

DISCRETE = gaussian_diffusion(variance="fixed_large")
LINEAR = trajectories.make(paths.linear, paths.predicts_velocity, (0.0, 1.0))
EDM = trajectories.edm(span=(80.0, 0.002))
CENTRE = np.array([0.4, -0.2])
ROOT = np.array([[0.5, 0.0], [0.3, 0.2]])  # of the covariance
SCHEDULES = {
    "ddpm": (DISCRETE, 1000, {}),
    "ddim": (DISCRETE, 250, {}),
    "ddim-eta": (LINEAR, 400, {"eta": 1.0}),
    "edm-discrete": (DISCRETE, 40, {}),
    "edm": (EDM, 40, {}),
    "edm-churn": (EDM, 256, {"churn": 40.0, "churn_min": 0.05, "churn_max": 50.0, "churn_noise": 1.003}),
    "dpmpp_2m-discrete": (DISCRETE, 100, {}),
    "dpmpp_2m": (LINEAR, 60, {}),
    "euler": (LINEAR, 200, {}),
    "euler-edm": (EDM, 400, {}),
    "heun": (LINEAR, 50, {}),
    "heun-edm": (EDM, 40, {}),
    "euler_maruyama": (LINEAR, 250, {"norm": 0.5}),
    "sde_heun": (LINEAR, 250, {"norm": 0.5}),
    "dopri5": (LINEAR, 0, {}),
}


def named_schedule(
    name: str, steps: int | None = None, **others
) -> samplers.SamplerSchedule | samplers.AdaptiveSchedule:
    process, default, options = SCHEDULES[name]
    steps = 0 if name == "dopri5" else steps or default
    return samplers.schedule(process, name.split("-")[0], steps, **(options | others))


def correlated(process) -> samplers.Denoise:
    """The best network for data N(CENTRE, ROOT ROOT') over the last axis."""
    covariance, abar = jnp.asarray(ROOT @ ROOT.T, jnp.float32), jnp.asarray(ABAR, jnp.float32)

    def coefficients(told):
        if isinstance(process, GaussianDiffusion):
            a = abar[told.astype(jnp.int32)]
            alpha, sigma = jnp.sqrt(a), jnp.sqrt(1 - a)
            return alpha, sigma, jnp.ones_like(a), (0.0, 1.0)
        t = jnp.exp(4 * told) if process is EDM else told
        c = process.path(t)
        return c.alpha, c.sigma, process.c_in(t), process.prediction(c)

    def denoise(x, told, weight):
        alpha, sigma, scale, (p, q) = (
            jax.tree.map(lambda a: jnp.reshape(a, (-1, 1, 1, 1)), value) for value in coefficients(told)
        )
        offset = x / scale - alpha * CENTRE.astype(np.float32)
        spread = alpha[..., None] ** 2 * covariance + sigma[..., None] ** 2 * jnp.eye(2)
        solved = jnp.linalg.solve(spread, offset[..., None])[..., 0]
        return p * (CENTRE.astype(np.float32) + alpha * (solved @ covariance)) + q * sigma * solved

    return denoise


def drawn(name: str, schedule: samplers.SamplerSchedule | samplers.AdaptiveSchedule, keys: jax.Array) -> jax.Array:
    x, noise = samplers.initial_noise(keys, SHAPE), samplers.step_noise(keys, SHAPE)
    return samplers.sample(schedule, correlated(SCHEDULES[name][0]), x, noise)


@pytest.mark.parametrize(
    "name", slow.but(["ddim", "dpmpp_2m", "euler", "heun-edm", "euler_maruyama", "dopri5"], SCHEDULES)
)
def test_every_sampler_reaches_mean_and_covariance(name):
    """Within four standard errors of 4096 samples, plus 2% for the finite steps."""
    count = 4096
    samples = np.asarray(jax.jit(partial(drawn, name))(named_schedule(name), keys(count, 3)))[:, 0, 0]
    covariance = ROOT @ ROOT.T
    variances = np.diag(covariance)
    np.testing.assert_array_less(np.abs(samples.mean(axis=0) - CENTRE), (4 / count**0.5 + 0.02) * np.sqrt(variances))
    error = np.sqrt((np.outer(variances, variances) + covariance**2) / count)  # of a sample covariance
    allowed = 4 * error + 0.04 * np.sqrt(np.outer(variances, variances))
    np.testing.assert_array_less(np.abs(np.cov(samples.T) - covariance), allowed)


FEW = {"ddpm": (7, 10), "ddim": (5, 10), "ddim-eta": (6, 9)}


@pytest.mark.parametrize(
    "name", slow.but(["ddim-eta", "dpmpp_2m", "heun-edm"], [name for name in SCHEDULES if name != "dopri5"])
)
def test_one_compilation_whatever_the_steps_the_weight_and_the_seed(name):
    """And nothing passes between host and device within a trajectory."""
    run = jax.jit(partial(drawn, name))
    few, most = FEW.get(name, (4, 9))
    results = []
    for steps, weight, seed in ((most, 1.0, 0), (few, 2.5, 0), (few, 1.0, 1)):
        arguments = jax.device_put((named_schedule(name, steps, max_steps=most, weight=weight), keys(2, seed)))
        with jax.transfer_guard("disallow"):
            results.append(run(*arguments))
    assert run._cache_size() == 1
    assert len({float(result.sum()) for result in results}) == 3
    unpadded = jax.jit(partial(drawn, name))(named_schedule(name, few), keys(2, 1))
    np.testing.assert_allclose(results[-1], unpadded, rtol=1e-5, atol=1e-6)


def test_adaptive_sampler_compiles_once_for_all_tolerances_and_seeds():
    run = jax.jit(partial(drawn, "dopri5"))
    for rtol, weight, seed in ((1e-3, 1.0, 0), (1e-4, 1.0, 0), (1e-4, 3.0, 1)):
        arguments = jax.device_put((named_schedule("dopri5", rtol=rtol, weight=weight), keys(2, seed)))
        with jax.transfer_guard("disallow"):
            run(*arguments)
    assert run._cache_size() == 1


def test_samplers_with_equal_room_share_a_compilation():
    def drawn_from(schedule, keys):
        return samplers.sample(schedule, correlated(LINEAR), samplers.initial_noise(keys, SHAPE), lambda i: None)

    run = jax.jit(drawn_from)
    for sampler, room in (("ddim", 32), ("dpmpp_2m", 32), ("euler", 32), ("heun", 16)):
        run(samplers.schedule(LINEAR, sampler, 8, max_steps=room), keys(2))
    assert run._cache_size() == 1


@pytest.mark.parametrize("name", ["ddpm", "ddim-eta", "edm-churn", "euler_maruyama", "sde_heun", "dopri5"])
def test_a_sample_depends_on_its_own_key_alone(name):
    run, schedule = jax.jit(partial(drawn, name)), named_schedule(name, 9 if name != "ddpm" else 10)
    together = run(schedule, keys(6))
    np.testing.assert_allclose(run(schedule, keys(6)[2:4]), together[2:4], rtol=1e-5, atol=1e-6)
    assert len(np.unique(together)) == together.size


def calls_of(schedule: samplers.SamplerSchedule | samplers.AdaptiveSchedule, process) -> int:
    """How often the compiled sampler really calls the network."""
    counted = []

    def denoise(x, t, weight):
        jax.debug.callback(lambda t: counted.append(t), t[0])
        return trajectories.exact(process, 0.0, 1.0)(x, t) if process is not DISCRETE else x

    run = jax.jit(lambda schedule, x: samplers.sample(schedule, denoise, x, jnp.zeros_like))
    jax.block_until_ready(run(schedule, jnp.ones((1, *SHAPE))))
    jax.effects_barrier()
    return len(counted)


@pytest.mark.parametrize("name", [name for name in SCHEDULES if "eta" not in name and "churn" not in name])
def test_the_network_is_called_as_often_as_the_nfe_says(name):
    process = SCHEDULES[name][0]
    if process is EDM:
        process = trajectories.make(paths.sigma_as_time, paths.predicts_x0, (80.0, 0.002))
    sampler, steps = name.split("-")[0], 10
    if sampler == "dopri5":
        assert calls_of(samplers.schedule(process, sampler), process) > 7
        assert sampler not in samplers.known_steps()
        return
    schedule = samplers.schedule(process, sampler, steps, max_steps=20)
    left_out = name == "heun-edm"  # the last look ahead, at no noise
    assert calls_of(schedule, process) == int(schedule.nfe) == samplers.SAMPLERS[sampler].nfe(steps) - left_out


def test_schedules_of_a_discrete_process_are_its_steps():
    """Learned variance, a clip and eta included; the noise of row i is that of the step k = K - 1 - i."""
    full, ten = gaussian_diffusion(), gaussian_diffusion(respacing="10")
    x, noise = samplers.initial_noise(keys(3), SHAPE), samplers.step_noise(keys(3), SHAPE)
    wide = lambda x, t, w: jnp.concatenate([jnp.sin(3 * x + 0.01 * t[:, None, None, None]), jnp.cos(x)], -1)  # noqa: E731
    steps = {"ddpm": single_steps.ddpm_step, "ddim": partial(single_steps.ddim_step, eta=0.6)}
    options = {"ddpm": {}, "ddim": {"eta": 0.6, "spacing": "even"}}
    for sampler, clip in itertools.product(steps, (False, True)):
        expected = single_steps.loop(ten, steps[sampler], wide, x, noise, clip)
        schedule = samplers.schedule(full, sampler, 10, **options[sampler])
        actual = jax.jit(lambda schedule, x, clip=clip: samplers.sample(schedule, wide, x, noise, clip))(schedule, x)
        np.testing.assert_allclose(actual, expected, rtol=1e-5, atol=2e-5)


@pytest.mark.parametrize("name", ["ddpm", "ddim", "edm-discrete", "dpmpp_2m-discrete"])
def test_clipping_keeps_samples_in_range(name):
    schedule = named_schedule(name, 10)
    wild = lambda x, t, weight: -2.0 * x  # noqa: E731
    free, clipped = (
        samplers.sample(schedule, wild, jnp.ones((1, *SHAPE)), jnp.zeros_like, clip) for clip in (False, True)
    )
    assert float(jnp.abs(free).max()) > 1.0
    assert float(jnp.abs(clipped).max()) <= 1.0 + 1e-6


@pytest.mark.parametrize("name", ["euler", "heun", "euler_maruyama", "sde_heun"])
def test_a_clip_acts_on_the_flow(name):
    """At the end of a path, where x is the data and says nothing of the noise, too."""
    schedule = named_schedule(name, 4)
    wild = lambda x, t, weight: 20.0 * x  # noqa: E731
    free, clipped = (
        samplers.sample(schedule, wild, jnp.ones((1, *SHAPE)), jnp.zeros_like, clip) for clip in (False, True)
    )
    assert np.isfinite(clipped).all()
    assert float(jnp.abs(clipped).max()) < 0.1 * float(jnp.abs(free).max())


def test_a_clip_of_an_adaptive_sampler_is_refused():
    with pytest.raises(UserError, match="valid: ddpm, ddim, edm, dpmpp_2m, euler"):
        samplers.sample(named_schedule("dopri5"), correlated(LINEAR), jnp.ones((1, *SHAPE)), jnp.zeros_like, clip=True)


def test_a_network_in_low_precision_leaves_the_state_as_it_is():
    schedule = named_schedule("heun", 4)
    sample = samplers.sample(
        schedule, lambda x, t, weight: x.astype(jnp.bfloat16), jnp.ones((1, *SHAPE)), jnp.zeros_like
    )
    assert sample.dtype == jnp.float32


def test_output_channels_must_fit():
    schedule, x = samplers.schedule(gaussian_diffusion(), "ddpm", 5), jnp.ones((1, *SHAPE))
    with pytest.raises(UserError, match="needs 4 output channels for 2 input channels, the model gives 2"):
        samplers.sample(schedule, lambda x, t, weight: x, x, jnp.zeros_like)
    with pytest.raises(UserError, match="needs 2 or 4 output channels"):
        samplers.sample(named_schedule("euler", 5), lambda x, t, weight: x[..., :1], x, jnp.zeros_like)


def test_flows_of_a_network_of_discrete_steps_keep_to_them():
    """The times of "heun" on iDDPM's table are in the table, also those between which its steps are measured."""
    process = edm("iddpm")
    schedule = samplers.schedule(process, "heun", 12)
    levels = schedule.table.sigma[: schedule.nfe]
    np.testing.assert_array_equal(levels, process.nearest(levels))
    assert np.all(np.diff(levels)[levels[:-1] > 0.1] <= 0)
    moved = schedule.table.state.eps[: schedule.nfe : 2]
    np.testing.assert_allclose(moved, np.diff(np.unique(levels)[::-1]), rtol=1e-12)
