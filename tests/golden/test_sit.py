"""Paths, conversions, losses and intervals against the published SiT code; its trajectories are another file's.

There x1 is the data and x0 the noise. The stored arrays are [b, c, h, w]; all acts on each element, in any layout.
"""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from diffjax.diffusion import flow
from diffjax.diffusion.paths import Conversion, Point, conversion, predicts_score, predicts_velocity
from diffjax.diffusion.process import per_example
from tests import trajectories
from tests.golden.cases import Case, cases
from tests.golden.x64 import float64

pytestmark = pytest.mark.golden

EXACT = {"rtol": 1e-9}
PREDICTIONS = {"velocity": "velocity", "noise": "epsilon", "score": "score"}
WEIGHTINGS = {"none": "uniform", "velocity": "velocity", "likelihood": "likelihood"}


def keys(pattern: str) -> list:
    """One parameter per case and stored key that fits the pattern: the case and the match."""
    found = []
    for parameter in cases("sit"):
        case = parameter.values[0]
        for key in [] if case is None else case.arrays:
            if match := re.fullmatch(pattern, key):
                found.append(pytest.param(case, match, id=f"{parameter.id}-{key}"))
    return found or [pytest.param(None, None, id=f"sit-{pattern}-no-cases")]


def toy(case: Case, x: jax.Array, t: jax.Array) -> jax.Array:
    a, b, c = (case.info["toy"]["params"][name] for name in "abc")
    return a * x + b * jnp.sin(3 * t).reshape(-1, 1, 1, 1) + c


def coefficients(case: Case, path: str) -> tuple[Point, np.ndarray]:
    """The path at the stored times, as [b, 1, 1, 1], and the stored x there."""
    x = case.arrays[f"{path}_xt"]
    return per_example(flow.PATHS[path.lower()](case.arrays["t"]), x), x


@pytest.mark.parametrize("case, match", keys("(.+)_xt"))
def test_paths(case, match):
    assert case is not None, "no stored cases"
    name, stored, t = match[1], case.arrays, case.arrays["t"]
    c = flow.PATHS[name.lower()](t)
    for coefficient, key in zip(c, ("alpha", "sigma", "d_alpha", "d_sigma")):
        np.testing.assert_allclose(coefficient, stored[f"{name}_{key}"], **EXACT, err_msg=key)
    r, diffusion = trajectories.drift(c)
    np.testing.assert_allclose(r, stored[f"{name}_d_alpha_over_alpha"], **EXACT)
    np.testing.assert_allclose(diffusion, stored[f"{name}_drift_var"], **EXACT)
    np.testing.assert_allclose(-r.reshape(-1, 1, 1, 1) * stored[match[0]], stored[f"{name}_drift_mean"], **EXACT)
    process = flow.flow(name.lower())
    with float64():
        x1, t, x0 = (jnp.asarray(array) for array in (stored["x1"], t, stored["x0"]))
        np.testing.assert_allclose(process.q_sample(x1, t, x0), stored[match[0]], **EXACT)
        np.testing.assert_allclose(process.target(x1, t, x0), stored[f"{name}_velocity_target"], **EXACT)


@pytest.mark.parametrize("case, match", keys("(.+)_score_from_velocity"))
def test_conversions(case, match):
    """The toy network's output read as a velocity, and as a score."""
    assert case is not None, "no stored cases"
    name, stored = match[1], case.arrays
    c, x = coefficients(case, name)
    with float64():
        output = np.asarray(toy(case, jnp.asarray(x), jnp.asarray(stored["t"])))
    k: Conversion = conversion(c, predicts_velocity)
    eps = k.eps_x * x + k.eps_f * output
    np.testing.assert_allclose(eps, stored[f"{name}_noise_from_velocity"], **EXACT)
    np.testing.assert_allclose(-eps / c.sigma, stored[match[0]], **EXACT)
    k = conversion(c, predicts_score)
    velocity = k.velocity_x * x + k.velocity_f * output
    np.testing.assert_allclose(velocity, stored[f"{name}_velocity_from_score"], **EXACT)


@pytest.mark.parametrize("case, match", keys("(Linear|GVP|VP)_loss_(velocity|noise|score)_(none|velocity|likelihood)"))
def test_losses(case, match):
    assert case is not None, "no stored cases"
    path, prediction, weighting = match.groups()
    process = flow.flow(path.lower(), prediction=PREDICTIONS[prediction], weighting=WEIGHTINGS[weighting])

    @jax.jit
    def loss(x1, t, x0):
        xt = process.q_sample(x1, t, x0)
        return process.losses(toy(case, xt, t), x1, xt, t, x0)["loss"]

    with float64():
        value = loss(*(jnp.asarray(case.arrays[key]) for key in ("x1", "t", "x0")))
        np.testing.assert_allclose(value, case.arrays[match[0]], **EXACT)


@pytest.mark.parametrize("case", cases("sit"))
def test_intervals(case):
    assert case is not None, "no stored cases"
    for name, expected in case.info["intervals"].items():
        path, prediction = name.split("/")
        for use, interval in expected.items():
            last = use.partition("_last")[2]
            step = float(last) if last not in ("", "None") else 0.0
            actual = getattr(flow.intervals(path.lower(), PREDICTIONS[prediction], step), use.partition("_")[0])
            np.testing.assert_allclose(actual, interval, rtol=1e-12, err_msg=f"{name} {use}")


@pytest.mark.parametrize("case", cases("sit"))
def test_margins(case):
    """What is kept from the ends: of the VP path from the data alone, of the others from both."""
    assert case is not None, "no stored cases"
    for name, margins in case.info["eps"].items():
        path, prediction = name.split("/")
        interval = flow.intervals(path.lower(), PREDICTIONS[prediction])
        for use, margin in ((interval.train, margins["train_eps"]), (interval.ode, margins["sample_eps"])):
            first = 0.0 if path == "VP" else margin
            np.testing.assert_allclose(use, (first, 1 - margin), rtol=1e-12, err_msg=name)
