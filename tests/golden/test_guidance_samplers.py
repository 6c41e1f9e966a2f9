"""Guidance weights and combinations of MDT and DiffiT, guidance intervals, and DPM-Solver++(2M) runs, in float64."""

import jax.numpy as jnp
import numpy as np
import pytest

from diffjax.diffusion import edm, guidance, samplers, sigma_grids
from diffjax.diffusion.gaussian import gaussian_diffusion
from tests import trajectories
from tests.golden.cases import Case, cases
from tests.golden.x64 import float64

pytestmark = pytest.mark.golden

EXACT = {"rtol": 1e-12, "atol": 1e-13}


def stored(prefix: str) -> list:
    """One parameter per array whose key starts with the prefix: the case and the key."""
    found = []
    for parameter in cases("guidance"):
        case = parameter.values[0]
        keys = [] if case is None else [key for key in case.arrays if key.startswith(prefix)]
        found += [pytest.param(case, key, id=f"{parameter.id}-{key}") for key in keys]
    return found or [pytest.param(None, "", id=f"guidance-{prefix}-no-cases")]


def numbers(key: str, names: str) -> list[float]:
    """The numbers after the given letters: "powcos_s4.4_p4.0" with "s p" -> [4.4, 4.0]."""
    parts = key.split("_")
    return [next(float(p[len(n) :]) for p in parts if p.startswith(n) and p[len(n)].isdigit()) for n in names.split()]


@pytest.mark.parametrize("case, key", stored("powcos"))
def test_power_cosine(case, key):
    assert case is not None, "no stored cases"
    scale, power = numbers(key, "s p")
    steps = len(case.arrays["t"])
    np.testing.assert_allclose(
        guidance.power_cosine(case.arrays["t"] / steps, scale, power), case.arrays[key], **EXACT, err_msg=key
    )


@pytest.mark.parametrize("case, key", stored("powcos"))
def test_power_cosine_in_a_respaced_schedule(case, key):
    """By the original step, whatever the sampler keeps of them."""
    assert case is not None, "no stored cases"
    scale, power = numbers(key, "s p")
    kept, process = case.arrays["respaced_t_250"], gaussian_diffusion(steps=len(case.arrays["t"]))
    weight = guidance.weights("power_cosine", scale, power=power)
    schedule = samplers.schedule(process, "ddpm", len(kept), weight=weight)
    np.testing.assert_array_equal(schedule.table.c_noise, kept[::-1])
    np.testing.assert_allclose(schedule.table.weight, case.arrays[key][kept[::-1]], **EXACT)


@pytest.mark.parametrize("calls", ["one", "two"])
@pytest.mark.parametrize("case, key", stored("guided_"))
def test_combinations(case, key, calls):
    """Predictions with and without labels, of which some channels are guided; there the rest is the conditional one."""
    assert case is not None, "no stored cases"
    conditional, unconditional = (np.moveaxis(case.arrays[name], 1, -1) for name in ("cond_out", "uncond_out"))
    channels = int(key.split("_")[-1].removesuffix("ch"))
    rule = case.info["combination"]
    if "powcos" in key:
        time = case.arrays["comb_t"] / len(case.arrays["t"])
        weights = guidance.power_cosine(time, rule["scale"], rule["power"])
    else:
        weights = np.full(len(conditional), float(key.split("_")[1].removeprefix("const")))
    x, labels, null = conditional[..., : conditional.shape[-1] // 2], np.arange(len(conditional)), len(conditional)

    def denoise(x, t, y):
        each = jnp.concatenate([conditional, np.stack([unconditional[i] for i in range(null)])])
        return each[jnp.where(y == null, null + t.astype(jnp.int32), y)]

    with float64():
        guided = guidance.classifier_free(denoise, jnp.asarray(labels), null, channels=channels, calls=calls)
        for i, weight in enumerate(weights):  # a weight belongs to a step; the stored ones differ between examples
            actual = guided(jnp.asarray(x), jnp.asarray(labels, jnp.float64), weight)[i]
            np.testing.assert_allclose(actual, np.moveaxis(case.arrays[key], 1, -1)[i], **EXACT)


@pytest.mark.parametrize("case, key", stored("interval_w"))
def test_intervals(case, key):
    assert case is not None, "no stored cases"
    low, high = numbers(key, "lo hi")
    levels, expected = case.arrays["interval_sigma"], case.arrays[key]
    scale = expected.max()
    np.testing.assert_array_equal(guidance.interval(levels, scale, low, high), expected)
    info = case.info[key.replace("interval_w", "interval")]
    assert (guidance.interval(levels, 2.0, info["snapped_lo"], info["snapped_hi"]) == 2.0).sum() == info["guided_steps"]
    schedule = samplers.schedule(
        edm.edm(),
        "edm",
        len(levels),
        sigma_max=levels[0],
        sigma_min=levels[-1],
        weight=guidance.weights("interval", scale, low=low, high=high),
    )
    np.testing.assert_array_equal(schedule.table.weight, np.repeat(expected, 2)[:-1])  # both calls of a step


def dpm_name(key: str) -> tuple[str, int]:
    _, spacing, count, _ = key.split("_")
    return spacing, int(count.removeprefix("n"))


@pytest.mark.parametrize("case, key", [p for p in stored("dpm_") if p.values[0] is None or "_traj" in p.values[1]])
def test_dpm_solver(case: Case, key):
    assert case is not None, "no stored cases"
    (spacing, steps), settings = dpm_name(key), case.info["dpm"]
    process = gaussian_diffusion(variance="fixed_small")
    schedule = samplers.schedule(process, "dpmpp_2m", steps, spacing=spacing)
    np.testing.assert_array_equal(schedule.table.c_noise, case.arrays[key.replace("traj", "timesteps")])
    abar = process.alphas_cumprod

    def denoise(x, t, weight):
        a = jnp.asarray(abar)[t.astype(jnp.int32)].reshape(-1, *(1,) * (x.ndim - 1))
        alpha, sigma = jnp.sqrt(a), jnp.sqrt(1 - a)
        return sigma * (x - alpha * settings["mu"]) / (alpha**2 * settings["s"] ** 2 + sigma**2)

    with float64():
        states = trajectories.states(schedule, denoise, jnp.asarray(case.arrays["dpm_z"]))
    np.testing.assert_allclose(states, case.arrays[key], rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("case, key", [p for p in stored("dpm_") if p.values[0] is None or "_time" in p.values[1]])
def test_dpm_timesteps(case, key):
    assert case is not None, "no stored cases"
    spacing, steps = dpm_name(key)
    np.testing.assert_array_equal(sigma_grids.discrete_steps(1000, steps, spacing), case.arrays[key])
