"""Trajectories of EDM's samplers against NVlabs/edm, in float64 (its arrays are channels first; the networks are
elementwise, so they are used as they are)."""

import re

import jax.numpy as jnp
import numpy as np
import pytest

from diffjax.diffusion import edm, samplers, sigma_grids
from tests import ablations, trajectories
from tests.golden.cases import Case, cases
from tests.golden.x64 import float64

pytestmark = pytest.mark.golden

EXACT = {"rtol": 1e-10}


def stored(case: Case, pattern: str) -> list[str]:
    assert case is not None, "no stored cases"
    found = [key for key in case.arrays if key.startswith(pattern)]
    assert found, f"nothing stored under {pattern}"
    return found


def network(case: Case, kind: str) -> samplers.Denoise:
    a, b, k = (case.info["toy"]["params"][name] for name in "abk")

    def denoise(x, t, weight):
        f = x if kind == "linear" else jnp.tanh(k * x)
        return a * f + b * jnp.sin(t).reshape(-1, *(1,) * (x.ndim - 1))

    return denoise


def assert_calls(states: np.ndarray, case: Case, name: str, tolerance: dict) -> None:
    """`states` are the stored inputs of the network and the result."""
    np.testing.assert_allclose(states[:-1], case.arrays[f"{name}_call_x"], **tolerance)
    np.testing.assert_allclose(states[-1], case.arrays[f"{name}_final"], **tolerance)


def called(schedule: samplers.SamplerSchedule) -> np.ndarray:
    """The noise level of every call of the network."""
    used = slice(int(schedule.nfe))
    return schedule.table.sigma[used] / schedule.table.alpha[used]


@pytest.mark.parametrize("case", cases("edm"))
def test_noise_levels(case):
    for key in stored(case, "sched_"):
        count, low, high, rho = (float(re.sub("[a-zA-Z]", "", part)) for part in key.split("_")[1:])
        expected = case.arrays[key]
        actual = sigma_grids.sigma_grid(edm.edm(), int(count), low, high, rho)
        np.testing.assert_allclose(np.append(actual, 0.0), expected, **EXACT, err_msg=key)


def heun_schedule(case: Case, **options) -> samplers.SamplerSchedule:
    settings = case.info["heun"]
    numbers = {name: settings[name] for name in ("sigma_min", "sigma_max", "rho")}
    return samplers.schedule(edm.edm(), "edm", settings["num_steps"], **numbers, **options)


@pytest.mark.parametrize("kind", ["linear", "tanh"])
@pytest.mark.parametrize("case", cases("edm"))
def test_heun(case, kind):
    stored(case, f"heun_{kind}_f64")
    schedule = heun_schedule(case)
    np.testing.assert_allclose(called(schedule), case.arrays[f"heun_{kind}_f64_call_sigma"], **EXACT)
    with float64():
        states = trajectories.states(schedule, network(case, kind), jnp.asarray(case.arrays["traj_latents"]))
    assert_calls(states, case, f"heun_{kind}_f64", EXACT)


@pytest.mark.parametrize("case", cases("edm"))
def test_heun_in_float32(case):
    """The state is float32 here, and float64 around a float32 network there."""
    stored(case, "heun_tanh_f32")
    x = jnp.asarray(case.arrays["traj_latents"], jnp.float32)
    np.testing.assert_allclose(called(heun_schedule(case)), case.arrays["heun_tanh_f32_call_sigma"], **EXACT)
    states = trajectories.states(heun_schedule(case), network(case, "tanh"), x)
    assert states.dtype == np.float32
    largest = np.abs(case.arrays["heun_tanh_f32_call_x"]).max()
    assert_calls(states, case, "heun_tanh_f32", {"rtol": 0, "atol": 1e-6 * largest})
    np.testing.assert_allclose(states[-1], case.arrays["heun_tanh_f32_final"], rtol=0, atol=1e-4)


@pytest.mark.parametrize("case", cases("edm"))
def test_churned_heun(case):
    stored(case, "churn_tanh_f64")
    churn = case.info["churn"]
    schedule = heun_schedule(
        case,
        churn=churn["S_churn"],
        churn_min=churn["S_min"],
        churn_max=churn["S_max"],
        churn_noise=churn["S_noise"],
    )
    np.testing.assert_allclose(called(schedule), case.arrays["churn_tanh_f64_call_sigma"], **EXACT)
    with float64():
        noise = jnp.asarray(case.arrays["churn_noise"])
        x = jnp.asarray(case.arrays["traj_latents"])
        states = trajectories.states(schedule, network(case, "tanh"), x, lambda i: noise[i])
    assert_calls(states, case, "churn_tanh_f64", EXACT)


def time_schedule(name: str, levels: np.ndarray) -> ablations.Schedule:
    """σ(t), that of VP from the highest noise level at t = 1 to the lowest."""
    if name == "vp":
        return ablations.vp(*ablations.vp_betas(levels[-1], levels[0]))
    return {"ve": ablations.ve, "linear": ablations.linear}[name]()


def stored_ablations() -> list:
    found = [parameter for parameter in cases("edm") if parameter.values[0] is not None]
    names = [(p.values[0], name, p.id) for p in found for name in p.values[0].info["ablation"]]
    return [pytest.param(case, name, id=f"{i}-{name}") for case, name, i in names] or [pytest.param(None, "", id="edm")]


@pytest.mark.parametrize("case, name", stored_ablations())
def test_other_schedules_and_scalings(case, name):
    """EDM's generalised sampler: Euler and the second-order family on other paths, in their own time; looking ahead by
    a part of a step is its own sampler's in noise levels. The table of iDDPM is known to float32 alone, so that there
    the stored noise levels are taken."""
    stored(case, f"{name}_f64")
    settings, calls = case.info["ablation"][name], case.arrays[f"{name}_f64_call_sigma"]
    steps, second_order = settings["num_steps"], settings["solver"] == "heun"
    discretisation = settings["discretization"]
    starts = calls[::2] if second_order else calls
    levels = np.append(starts, 0.0) if discretisation == "iddpm" else ablations.DISCRETISATIONS[discretisation](steps)
    time = time_schedule(settings["schedule"], levels[:-1])
    process = ablations.rescaled(edm.edm(), time, settings["scaling"])
    ahead = {"ahead": settings["alpha"]} if second_order else {}
    if discretisation == "edm":
        schedule = samplers.schedule(process, "edm", steps, order=2 if second_order else 1, **ahead)
    else:
        schedule = trajectories.schedule_at(process, settings["solver"], time.inverse(levels), **ahead)
    np.testing.assert_allclose(called(schedule), calls, **EXACT)
    scale = process.path(time.inverse(levels[:1])).sigma[0]
    with float64():
        latents = jnp.asarray(case.arrays["traj_latents"]) * min(1.0, scale)
        final = trajectories.states(schedule, network(case, "tanh"), latents)[-1]
    np.testing.assert_allclose(final, case.arrays[f"{name}_f64_final"], **EXACT)


@pytest.mark.parametrize("solver, order", [("euler", 1), ("heun", 2)])
@pytest.mark.parametrize("case", cases("edm"))
def test_gaussian_data(case, solver, order):
    """The stored results and, for every count of steps, the stored error to the exact solution."""
    stored(case, f"gauss_{solver}")
    settings = case.info["gaussian"]
    process = edm.edm()
    denoise = trajectories.exact(process, settings["mu"], settings["s"], lambda c_noise: jnp.exp(4 * c_noise))
    with float64():
        x = jnp.asarray(case.arrays["traj_latents"])
        for row in settings["errors"][solver]:
            schedule = samplers.schedule(process, "edm", row["N"], order=order)
            states = trajectories.states(schedule, denoise, x)
            # the file gives the first digits of errors that are differences of numbers near 1
            before, after = (
                np.abs(state - case.arrays[f"gauss_exact_at_{place}"]).max()
                for state, place in ((states[-2], "sigma_min"), (states[-1], "0"))
            )
            np.testing.assert_allclose(before, row["max_err_at_sigma_min"], rtol=1e-9)
            np.testing.assert_allclose(after, row["max_err_at_0"], rtol=1e-9)
            if f"gauss_{solver}_N{row['N']}_final" in case.arrays:
                np.testing.assert_allclose(states[-1], case.arrays[f"gauss_{solver}_N{row['N']}_final"], **EXACT)
