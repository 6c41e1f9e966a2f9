"""Tables, losses, single steps and whole loops against the published DiT diffusion code."""

import functools
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from diffjax.diffusion import samplers
from diffjax.diffusion.gaussian import gaussian_diffusion
from tests.golden.cases import Case, cases

pytestmark = pytest.mark.golden

# float32 in the reference's order agrees to a few roundings; x0 of the last steps is a difference of values near 500.
ARRAY = {"rtol": 1e-5, "atol": 1e-5}
BOUND = {"rtol": 2e-4, "atol": 1e-7}

TABLES = {
    "betas",
    "timestep_map",
    "alphas_cumprod",
    "alphas_cumprod_prev",
    "alphas_cumprod_next",
    "sqrt_alphas_cumprod",
    "sqrt_one_minus_alphas_cumprod",
    "log_one_minus_alphas_cumprod",
    "sqrt_recip_alphas_cumprod",
    "sqrt_recipm1_alphas_cumprod",
    "posterior_variance",
    "posterior_log_variance_clipped",
    "posterior_mean_coef1",
    "posterior_mean_coef2",
}


def groups(prefix: str) -> list:
    """One parameter per stored group "<prefix>/<respacing>/..." of each case: the case and the respacing."""
    found = []
    for parameter in cases("diffusion"):
        case = parameter.values[0]
        keys = [] if case is None else [key.split("/") for key in case.arrays]
        depth = prefix.count("/") + 1
        names = sorted({key[depth] for key in keys if key[:depth] == prefix.split("/")})
        found += [pytest.param(case, name, id=f"{parameter.id}-{prefix}-{name}") for name in names]
    return found or [pytest.param(None, "", id=f"diffusion-{prefix}-no-cases")]


def group(case: Case, prefix: str) -> dict[str, np.ndarray]:
    """The arrays under `prefix`, channels last."""
    assert case is not None, "no stored cases"
    return {key[len(prefix) + 1 :]: channels_last(a) for key, a in case.arrays.items() if key.startswith(prefix + "/")}


def channels_last(array: np.ndarray) -> np.ndarray:
    return np.moveaxis(array, -3, -1) if array.ndim >= 4 else array


def respacing(name: str) -> str:
    return "" if name == "full" else name


def toy_denoise(x: jax.Array, t: jax.Array, weight: jax.Array) -> jax.Array:
    phase = (t / 1000.0)[:, None, None, None]
    eps = 0.6 * x + 0.3 * jnp.sin(2.0 * x + 5.0 * phase)
    return jnp.concatenate([eps, jnp.tanh(0.5 * x + phase)], axis=-1)


@pytest.mark.parametrize("case, name", groups("table"))
def test_tables(case, name):
    stored = group(case, f"table/{name}")
    process = gaussian_diffusion(respacing=respacing(name))
    assert stored.keys() == TABLES
    for table, expected in stored.items():
        actual = getattr(process, table)
        assert actual.dtype == expected.dtype
        np.testing.assert_allclose(actual, expected, rtol=1e-12, atol=1e-15, err_msg=table)


@pytest.mark.parametrize("case, name", groups("step"))
def test_forward_process(case, name):
    stored = group(case, f"step/{name}")
    process = gaussian_diffusion(respacing=respacing(name))
    k = jnp.asarray(stored["t"], jnp.int32)
    np.testing.assert_array_equal(process.c_noise(k), stored["t_seen_by_model"])
    np.testing.assert_allclose(process.q_sample(stored["x_start"], k, stored["noise"]), stored["q_sample"], **ARRAY)
    mean, _ = process.posterior(stored["x_start"], stored["x_t"], k)
    np.testing.assert_allclose(mean, stored["q_posterior_mean"], **ARRAY)


@pytest.mark.parametrize("case, name", groups("step"))
def test_losses(case, name):
    stored = group(case, f"step/{name}")
    k = jnp.asarray(stored["t"], jnp.int32)
    settings = {
        "": {},
        "rescaled_mse/": {"loss": "rescaled_mse"},
        "rescaled_kl/": {"loss": "rescaled_kl"},
        "predict_xstart/": {"prediction": "x0"},
    }
    for prefix, options in settings.items():
        process = gaussian_diffusion(respacing=respacing(name), **options)
        xt = process.q_sample(stored["x_start"], k, stored["noise"])
        terms = jax.jit(process.losses)(stored["model_output"], stored["x_start"], xt, k, stored["noise"])
        for term in ("mse", "vb", "loss"):
            if prefix + term in stored:
                tolerance = ARRAY if term == "mse" else BOUND
                assert terms[term].dtype == jnp.float32
                np.testing.assert_allclose(terms[term], stored[prefix + term], **tolerance, err_msg=prefix + term)


@pytest.mark.parametrize("case, name", groups("step"))
def test_loss_gradient(case, name):
    """The bound must not move the mean: its prediction enters under a stop-gradient."""
    stored = group(case, f"step/{name}")
    process = gaussian_diffusion(respacing=respacing(name))
    k = jnp.asarray(stored["t"], jnp.int32)
    xt = process.q_sample(stored["x_start"], k, stored["noise"])

    @jax.jit
    @jax.grad
    def gradient(output):
        return process.losses(output, stored["x_start"], xt, k, stored["noise"])["loss"].mean()

    expected = stored["grad_model_output_of_mean_loss"]
    np.testing.assert_allclose(gradient(stored["model_output"]), expected, rtol=0, atol=1e-4 * np.abs(expected).max())


@functools.partial(jax.jit, static_argnames="clip")
def one_step(schedule, row, xt, output, z, clip):
    """x after row `row` of a schedule alone, from the state xt, with the network's output and noise given."""
    table = jax.tree.map(lambda column: column[row][None], schedule.table)
    alone = replace(schedule, table=table, nfe=jnp.int32(1), start=1.0)
    return samplers.sample(alone, lambda x, t, weight: output, xt, lambda i: z, clip)


def after_step(process, sampler, stored, clip, **options):
    """What a sampler makes of the stored x_t of each example in its own step t."""
    schedule = samplers.schedule(process, sampler, process.num_steps, **options)
    rows = [
        one_step(
            schedule,
            process.num_steps - 1 - int(k),
            *(stored[name][i : i + 1] for name in ("x_t", "model_output", "step_noise")),
            clip,
        )
        for i, k in enumerate(stored["t"])
    ]
    return np.concatenate(rows)


@pytest.mark.parametrize("clip", [False, True], ids=["noclip", "clip"])
@pytest.mark.parametrize("case, name", groups("step"))
def test_reverse_steps(case, name, clip):
    stored = group(case, f"step/{name}")
    process = gaussian_diffusion(respacing=respacing(name))
    k, xt, label = jnp.asarray(stored["t"], jnp.int32), stored["x_t"], "clip" if clip else "noclip"
    p = process.p_mean_variance(stored["model_output"], xt, k, clip)
    actual = {
        f"p/{label}/mean": p.mean,
        f"p/{label}/variance": jnp.exp(p.log_variance),
        f"p/{label}/log_variance": p.log_variance,
        f"p/{label}/pred_xstart": p.x0,
        f"p/{label}/sample": after_step(process, "ddpm", stored, clip),
    }
    for key in stored:
        if key.startswith(f"ddim/{label}/eta"):
            eta = float(key.split("eta")[1])
            actual[key] = after_step(process, "ddim", stored, clip, eta=eta, spacing="even")
    compared = [key for key in stored if f"/{label}" in key and not key.startswith("ddim_reverse/")]
    assert compared
    rounding = rounding_of_ddim(process, p.x0, stored)
    for key in compared:
        allowed = ARRAY["atol"] + ARRAY["rtol"] * np.abs(stored[key]) + key.startswith("ddim/") * rounding
        assert (np.abs(actual[key] - stored[key]) <= allowed).all(), key


def rounding_of_ddim(process, x0, stored):
    """What the reference's float32 1 - ᾱ, a difference of numbers near 1, leaves open in a step of DDIM: [b, ..., c].

    σ of the step after is off by up to 2^-24 / σ, and multiplies the noise that follows from x0, large where x0 is
    clipped. The package has it from float64.
    """
    k = stored["t"].astype(int).reshape(-1, 1, 1, 1)
    alpha, sigma = np.sqrt(process.alphas_cumprod[k]), np.sqrt(1 - process.alphas_cumprod[k])
    after = np.sqrt(1 - process.alphas_cumprod_prev[k])
    noise = np.abs((stored["x_t"] - alpha * x0) / sigma)
    return noise * np.divide(2.0**-24, after, out=np.zeros_like(after), where=after > 0)


@pytest.mark.parametrize("variance", ["fixed_large", "fixed_small"])
@pytest.mark.parametrize("case, name", groups("step"))
def test_fixed_variances(case, name, variance):
    stored = group(case, f"step/{name}")
    process = gaussian_diffusion(respacing=respacing(name), variance=variance)
    xt = stored["x_t"]
    p = process.p_mean_variance(stored["model_output"][..., : xt.shape[-1]], xt, jnp.asarray(stored["t"], jnp.int32))
    np.testing.assert_allclose(p.mean, stored[f"{variance}/mean"], **ARRAY)
    np.testing.assert_allclose(p.log_variance, stored[f"{variance}/log_variance"], **ARRAY)


@pytest.mark.parametrize("sampler", ["ddpm", "ddim"])
@pytest.mark.parametrize("case", cases("diffusion"))
def test_loops(case, sampler):
    """Schedules of the process with all its steps; the noise of step i is noises[i]."""
    assert case is not None, "no stored cases"
    names = sorted({key.split("/")[2] for key in case.arrays if key.startswith(f"loop/{sampler}/")})
    assert names
    for name in names:
        stored = group(case, f"loop/{sampler}/{name}")
        process, count = gaussian_diffusion(), int(name.removeprefix("ddim"))
        schedule = samplers.schedule(process, sampler, count, spacing="stride" if "ddim" in name else "even")
        np.testing.assert_array_equal(schedule.table.c_noise, gaussian_diffusion(respacing=name).timestep_map[::-1])
        noises = jnp.asarray(stored.get("noises", np.zeros(1)))
        run = jax.jit(lambda schedule, x, noises: samplers.sample(schedule, toy_denoise, x, lambda i: noises[i]))
        np.testing.assert_allclose(run(schedule, stored["x_T"], noises), stored["final"], rtol=0, atol=2e-5)
