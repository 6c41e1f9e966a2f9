"""Runs of the ODE and SDE samplers on the paths of SiT against willisma/SiT, in float64."""

import re
from dataclasses import replace
from itertools import pairwise

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from diffjax.diffusion import flow, samplers, stochastic_samplers
from diffjax.diffusion.process import Process
from tests import trajectories
from tests.golden.cases import Case, cases
from tests.golden.x64 import float64

pytestmark = pytest.mark.golden

TIGHT = {"rtol": 1e-9}
NEAR_ENDS = {"rtol": 1e-6}  # noise and score predictions divide by small numbers there
PREDICTIONS = {"velocity": "velocity", "noise": "epsilon", "score": "score"}


def process(case: Case, path: str, prediction: str) -> Process:
    known = flow.flow(path.lower(), prediction=PREDICTIONS[prediction])
    assert known.span == tuple(case.info["intervals"][f"{path}/{prediction}"]["ode"])
    return known


def toy(case: Case) -> samplers.Denoise:
    a, b, c = (case.info["toy"]["params"][name] for name in "abc")
    return lambda x, t, weight: a * x + b * jnp.sin(3 * t).reshape(-1, *(1,) * (x.ndim - 1)) + c


def named(prefix: str, parts: int) -> list:
    """One parameter per stored final state "<prefix>_<parts...>"."""
    found = []
    for parameter in cases("sit"):
        case = parameter.values[0]
        keys = [] if case is None else sorted(case.arrays)
        names = [key for key in keys if key.startswith(prefix + "_") and len(key.split("_")) == parts + 1]
        found += [pytest.param(case, name.split("_")[1:], id=f"{parameter.id}-{name}") for name in names]
    return found or [pytest.param(None, [], id=f"sit-{prefix}-no-cases")]


@pytest.mark.parametrize("solver", ["euler", "heun"])
@pytest.mark.parametrize("case", cases("sit"))
def test_fixed_steps_on_a_solvable_field(case, solver):
    assert case is not None, "no stored cases"
    expected = case.arrays["ode_toy_euler" if solver == "euler" else "ode_toy_heun2"]
    schedule = samplers.schedule(process(case, "Linear", "velocity"), solver, case.info["ode"]["num_steps"] - 1)
    with float64():
        states = trajectories.states(schedule, toy(case), jnp.asarray(case.arrays["ode_z"]))
    np.testing.assert_allclose(states if solver == "euler" else states[::2], expected, **TIGHT)


@pytest.mark.parametrize("case", cases("sit"))
def test_backwards(case):
    """The same field from the data to the noise, by times of one's own."""
    assert case is not None, "no stored cases"
    steps = case.info["ode"]["num_steps"] - 1
    known = process(case, "Linear", "velocity")
    schedule = trajectories.schedule_at(known, "heun", np.linspace(*known.span[::-1], steps + 1))
    with float64():
        states = trajectories.states(schedule, toy(case), jnp.asarray(case.arrays["ode_z"]))
    np.testing.assert_allclose(states[::2], case.arrays["ode_reverse_toy_heun2"], **TIGHT)


@pytest.mark.slow
@pytest.mark.parametrize("case", cases("sit"))
def test_adaptive_steps(case):
    """The stored end; at the times between, where the reference interpolates, the exact solution."""
    assert case is not None, "no stored cases"
    known = process(case, "Linear", "velocity")
    stored = case.arrays["ode_toy_dopri5"]
    with float64():
        z = jnp.asarray(case.arrays["ode_z"])
        run = jax.jit(lambda schedule, x: samplers.sample(schedule, toy(case), x, jnp.float32))
        end = run(samplers.schedule(known, "dopri5", rtol=1e-12, atol=1e-12), z)
        np.testing.assert_allclose(end, case.arrays["ode_toy_exact_t1"], rtol=1e-9)
        np.testing.assert_allclose(end, stored[-1], rtol=1e-9)
        x = z
        for before, after in pairwise(np.linspace(*known.span, len(stored))):
            part = replace(known, span=(float(before), float(after)))
            x = run(samplers.schedule(part, "dopri5", rtol=1e-12, atol=1e-12), x)
            np.testing.assert_allclose(x, solution(case, z, after), rtol=1e-9)


def diffusions() -> list:
    """One parameter per stored diffusion "<path>_diffusion_<form>"."""
    found = []
    for parameter in cases("sit"):
        case = parameter.values[0]
        for key in [] if case is None else sorted(case.arrays):
            if match := re.fullmatch(r"([^_]+)_diffusion_(.+)", key):
                found.append(pytest.param(case, *match.groups(), id=f"{parameter.id}-{key}"))
    return found or [pytest.param(None, "", "", id="sit-diffusion-no-cases")]


@pytest.mark.parametrize("case, path, form", diffusions())
def test_diffusions(case, path, form):
    """Of norm 1, at the stored times."""
    assert case is not None, "no stored cases"
    t = case.arrays["t"]
    actual = stochastic_samplers.DIFFUSIONS[form.lower().replace("-", "_")](1.0, t, flow.PATHS[path.lower()](t))
    np.testing.assert_allclose(actual, case.arrays[f"{path}_diffusion_{form}"], **TIGHT)


def solution(case: Case, z, t):
    """x(t) of dx/dt = a x + b sin(3t) + c from x(0) = z."""
    a, b, c = (case.info["toy"]["params"][name] for name in "abc")
    particular = lambda t: -b * (a * np.sin(3 * t) + 3 * np.cos(3 * t)) / (a**2 + 9) - c / a  # noqa: E731
    return (z - particular(0.0)) * np.exp(a * t) + particular(t)


@pytest.mark.parametrize("case, name", named("ode_gauss", 4))
def test_fixed_steps_on_gaussian_data(case, name):
    assert case is not None, "no stored cases"
    _, path, prediction, solver = name
    known, settings = process(case, path, prediction), case.info["gauss"]
    schedule = samplers.schedule(known, {"heun2": "heun"}.get(solver, solver), case.info["ode"]["num_steps"] - 1)
    with float64():
        denoise = trajectories.exact(known, settings["mu"], settings["s"])
        final = trajectories.states(schedule, denoise, jnp.asarray(case.arrays["ode_z"]))[-1]
    np.testing.assert_allclose(final, case.arrays["_".join(["ode", *name])], **NEAR_ENDS)


@pytest.mark.parametrize("solver", ["euler", "heun2"])
@pytest.mark.parametrize("path", ["Linear", "GVP"])
@pytest.mark.parametrize("case", cases("sit"))
def test_convergence_on_gaussian_data(case, path, solver):
    """The stored error to the exact solution for every number of updates."""
    assert case is not None, "no stored cases"
    known, settings = process(case, path, "velocity"), case.info["gauss"]
    with float64():
        denoise = trajectories.exact(known, settings["mu"], settings["s"])
        x = jnp.asarray(case.arrays["ode_z"])
        largest = settings["errors"][f"{path}/{solver}"][-1]["updates"]
        run = jax.jit(lambda schedule, x: samplers.sample(schedule, denoise, x, jnp.float32))
        for row in settings["errors"][f"{path}/{solver}"]:
            schedule = samplers.schedule(
                known, {"heun2": "heun"}.get(solver, solver), row["updates"], max_steps=largest
            )
            final = run(schedule, x)
            error = np.abs(final - case.arrays["gauss_exact_t1"]).max()
            np.testing.assert_allclose(error, row["max_err"], rtol=1e-8)
            stored = f"gauss_{path}_{solver}_n{row['updates'] + 1}"
            if stored in case.arrays:
                np.testing.assert_allclose(final, case.arrays[stored], **TIGHT)


@pytest.mark.parametrize("case, name", named("sde", 5))
def test_stochastic_samplers(case, name):
    assert case is not None, "no stored cases"
    path, prediction, method, form, last_step = name
    known, settings, key = process(case, path, prediction), case.info["gauss"], "_".join(["sde", *name])
    schedule = samplers.schedule(
        known,
        {"Euler": "euler_maruyama", "Heun": "sde_heun"}[method],
        case.info["sde"]["num_steps"] - 1,
        diffusion=form.lower().replace("-", "_"),
        last_step=last_step.lower(),
        last_step_size=None if last_step == "None" else case.info["sde"]["last_step_size"],
    )
    with float64():
        denoise = trajectories.exact(known, settings["mu"], settings["s"])
        noise = jnp.asarray(case.arrays["sde_noise"])
        states = trajectories.states(schedule, denoise, jnp.asarray(case.arrays["ode_z"]), lambda i: noise[i])
    tolerance = TIGHT if prediction == "velocity" else NEAR_ENDS
    np.testing.assert_allclose(states[-1], case.arrays[key], **tolerance)
    if f"{key}_traj" in case.arrays:  # after every update; Euler's, with a call of the network each
        assert method == "Euler"
        np.testing.assert_allclose(states[1:], case.arrays[f"{key}_traj"], **tolerance)
