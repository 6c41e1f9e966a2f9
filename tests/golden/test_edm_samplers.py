"""Trajectories of EDM's samplers against NVlabs/edm, in float64 (its arrays are channels first; the networks are
elementwise, so they are used as they are)."""

import re

import jax.numpy as jnp
import numpy as np
import pytest

from diffjax.diffusion import samplers, tables
from diffjax.diffusion.paths import Point, noise_level, predicts_epsilon
from tests import trajectories
from tests.golden.cases import Case, cases
from tests.golden.x64 import float64

pytestmark = pytest.mark.golden

EXACT = {"rtol": 1e-10, "atol": 1e-10}


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


def levels(plan: samplers.Plan) -> np.ndarray:
    used = slice(int(plan.rows))
    return plan.table.sigma[used] / plan.table.alpha[used]


@pytest.mark.parametrize("case", cases("edm"))
def test_noise_levels(case):
    for key in stored(case, "sched_"):
        count, low, high, rho = (float(re.sub("[a-zA-Z]", "", part)) for part in key.split("_")[1:])
        expected = case.arrays[key]
        actual = tables.noise_levels(trajectories.edm(), int(count), low, high, rho)
        np.testing.assert_allclose(np.append(actual, 0.0), expected, rtol=1e-12, err_msg=key)


def heun_plan(case: Case, **options) -> samplers.Plan:
    settings = case.info["heun"]
    process = trajectories.edm(span=(settings["sigma_max"], settings["sigma_min"]))
    return samplers.plan(process, "edm", settings["num_steps"], rho=settings["rho"], **options)


@pytest.mark.parametrize("kind", ["linear", "tanh"])
@pytest.mark.parametrize("case", cases("edm"))
def test_heun(case, kind):
    stored(case, f"heun_{kind}_f64")
    plan = heun_plan(case)
    np.testing.assert_allclose(levels(plan), case.arrays[f"heun_{kind}_f64_call_sigma"], rtol=1e-12)
    with float64():
        states = trajectories.states(plan, network(case, kind), jnp.asarray(case.arrays["traj_latents"]))
    assert_calls(states, case, f"heun_{kind}_f64", EXACT)


@pytest.mark.parametrize("case", cases("edm"))
def test_heun_in_float32(case):
    """The state is float32 here, and float64 around a float32 network there."""
    stored(case, "heun_tanh_f32")
    x = jnp.asarray(case.arrays["traj_latents"], jnp.float32)
    states = trajectories.states(heun_plan(case), network(case, "tanh"), x)
    assert states.dtype == np.float32
    largest = np.abs(case.arrays["heun_tanh_f32_call_x"]).max()
    assert_calls(states, case, "heun_tanh_f32", {"rtol": 0, "atol": 1e-6 * largest})
    np.testing.assert_allclose(states[-1], case.arrays["heun_tanh_f32_final"], rtol=0, atol=1e-4)


@pytest.mark.parametrize("case", cases("edm"))
def test_churned_heun(case):
    stored(case, "churn_tanh_f64")
    churn = case.info["churn"]
    plan = heun_plan(
        case,
        churn=churn["S_churn"],
        churn_min=churn["S_min"],
        churn_max=churn["S_max"],
        churn_noise=churn["S_noise"],
    )
    np.testing.assert_allclose(levels(plan), case.arrays["churn_tanh_f64_call_sigma"], rtol=1e-12)
    with float64():
        noise = jnp.asarray(case.arrays["churn_noise"])
        x = jnp.asarray(case.arrays["traj_latents"])
        states = trajectories.states(plan, network(case, "tanh"), x, lambda i: noise[i])
    assert_calls(states, case, "churn_tanh_f64", EXACT)


class Schedule:
    """σ(t) of VP between two noise levels, as NVlabs/edm fits it, or √t of VE, or t; and s(t)."""

    def __init__(self, kind: str, scaled: bool, sigma_min: float, sigma_max: float, first: float = 1e-3):
        low, high = np.log1p(sigma_min**2), np.log1p(sigma_max**2)
        self.beta_d = 2 * (low / first - high) / (first - 1)
        self.beta_min = high - self.beta_d / 2
        self.kind, self.scaled = kind, scaled

    def path(self, t) -> Point:
        xp = trajectories.namespace(t)
        if self.kind == "vp":
            sigma = xp.sqrt(xp.expm1(self.beta_d * t**2 / 2 + self.beta_min * t))
            sigma_dot = (self.beta_d * t + self.beta_min) * (sigma**2 + 1) / (2 * sigma)
        else:
            sigma, sigma_dot = (xp.sqrt(t), 0.5 / xp.sqrt(t)) if self.kind == "ve" else (t, xp.ones_like(t))
        if not self.scaled:
            return Point(xp.ones_like(t), sigma, 0 * t, sigma_dot)
        s = 1 / xp.sqrt(sigma**2 + 1)
        s_dot = -sigma * sigma_dot * s**3
        return Point(s, s * sigma, s_dot, s_dot * sigma + s * sigma_dot)

    def time(self, sigma: np.ndarray) -> np.ndarray:
        if self.kind == "vp":
            return (np.sqrt(self.beta_min**2 + 2 * self.beta_d * np.log1p(sigma**2)) - self.beta_min) / self.beta_d
        return sigma**2 if self.kind == "ve" else sigma


def ablations() -> list:
    found = [parameter for parameter in cases("edm") if parameter.values[0] is not None]
    names = [(p.values[0], name, p.id) for p in found for name in p.values[0].info["ablation"]]
    return [pytest.param(case, name, id=f"{i}-{name}") for case, name, i in names] or [pytest.param(None, "", id="edm")]


@pytest.mark.parametrize("case, name", ablations())
def test_other_schedules_and_scalings(case, name):
    """EDM's generalised sampler: Euler and the second-order family on other paths, in their own time; the noise levels
    of its discretisations are the stored ones (those of "edm" are its own sampler's)."""
    stored(case, f"{name}_f64")
    settings, calls = case.info["ablation"][name], case.arrays[f"{name}_f64_call_sigma"]
    steps, second_order = settings["num_steps"], settings["solver"] == "heun"
    starts = calls[::2] if second_order else calls
    schedule = Schedule(settings["schedule"], settings["scaling"] == "vp", starts[-1], starts[0])
    process = trajectories.edm(path=schedule.path, span=tuple(schedule.time(starts[[0, -1]])))
    if settings["schedule"] == "linear":
        options = {"ahead": settings["alpha"], "order": 2} if second_order else {"order": 1}
        if settings["discretization"] == "edm":
            plan = samplers.plan(process, "edm", steps, **options)
        else:
            plan = samplers.plan(process, settings["solver"], steps, times=np.append(starts, 0.0))
    else:
        options = {"ahead": settings["alpha"]} if second_order else {}
        plan = samplers.plan(process, settings["solver"], steps, times=np.append(schedule.time(starts), 0.0), **options)
    np.testing.assert_allclose(levels(plan), calls, rtol=1e-9)
    point = process.path(schedule.time(starts[:1]))
    with float64():
        latents = jnp.asarray(case.arrays["traj_latents"]) * min(1.0, point.sigma[0])
        final = trajectories.states(plan, network(case, "tanh"), latents)[-1]
    np.testing.assert_allclose(final, case.arrays[f"{name}_f64_final"], **EXACT)


@pytest.mark.parametrize("solver, order", [("euler", 1), ("heun", 2)])
@pytest.mark.parametrize("case", cases("edm"))
def test_gaussian_data(case, solver, order):
    """The stored results and, for every count of steps, the stored error to the exact solution."""
    stored(case, f"gauss_{solver}")
    settings = case.info["gaussian"]
    process = trajectories.make(noise_level, predicts_epsilon, (80.0, 0.002))
    denoise = trajectories.exact(process, settings["mu"], settings["s"])
    with float64():
        x = jnp.asarray(case.arrays["traj_latents"])
        for row in settings["errors"][solver]:
            plan = samplers.plan(process, "edm", row["N"], order=order)
            states = trajectories.states(plan, denoise, x)
            # the file gives the first digits of errors that are differences of numbers near 1
            before, after = (
                np.abs(state - case.arrays[f"gauss_exact_at_{place}"]).max()
                for state, place in ((states[-2], "sigma_min"), (states[-1], "0"))
            )
            np.testing.assert_allclose(before, row["max_err_at_sigma_min"], rtol=1e-9)
            np.testing.assert_allclose(after, row["max_err_at_0"], rtol=1e-9)
            if f"gauss_{solver}_N{row['N']}_final" in case.arrays:
                np.testing.assert_allclose(states[-1], case.arrays[f"gauss_{solver}_N{row['N']}_final"], **EXACT)
