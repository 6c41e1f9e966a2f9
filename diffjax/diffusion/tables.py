"""Samplers as tables: every step of every sampler is linear, so its coefficients can be computed once, on the host.

A sampler looks at the process at a series of noise levels. At each it calls the network, whose output f gives the data
and the noise in x = α x0 + σ eps (paths, equation 3), and moves on:

    (1)  x' = a x + b x0 + c eps + d m + s z,   m' = a' x + b' x0 + c' eps

with a multistep buffer m of what an earlier call found and z ~ N(0, I). One call of the network is one row of
coefficients, a step of a second-order method two rows, and a trajectory is a loop over rows that knows no method by
name. `sigma_samplers`, `time_samplers` and `stochastic_samplers` make the tables.

Euler's step is x' = x + h v(x, t). The second-order family with a look ahead at t + r h (EDM 2206.00364, algorithm 3)

    (2)  y = x + r h v(x, t),   x' = x + h ((1 - 1/2r) v(x, t) + 1/2r v(y, t + r h))

is Heun's method for r = 1, midpoint for 1/2, Ralston's for 2/3: row one gives y and m = x + h (1 - 1/2r) v.

All of this is float64 numpy.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Annotated, Any, NamedTuple

import jax
import numpy as np

from diffjax.diffusion.gaussian import GaussianDiffusion
from diffjax.diffusion.process import Grid, unchanged
from diffjax.diffusion.sigma_grids import AnyProcess
from diffjax.errors import UserError
from diffjax.options import Leaf, Option, Valid, options

ABOVE_0_TO_1 = Valid(lambda: "above 0 to 1", lambda value: 0 < value <= 1)
Ahead = Annotated[float, Leaf("where a step looks: 1 is Heun, 1/2 midpoint, 2/3 Ralston", "watch", ABOVE_0_TO_1)]


class StepCoefficients(NamedTuple):
    """Coefficients of the state x, the data x0, the noise eps and the multistep buffer m in (1); each [rows]."""

    x: Any = 0.0
    x0: Any = 0.0
    eps: Any = 0.0
    buffer: Any = 0.0


class Table(NamedTuple):
    """One row for each call of the network; every leaf [rows].

    How to call it and to convert its output: c_noise, c_in, alpha, sigma, x0_x, x0_f, eps_x, eps_f.
    state, buffer: the two updates of (1).
    noise: s in (1), of the noise z number `slot`.
    log_low, log_high: with a learned variance, the two log variances between which the network chooses, s then being 0
        or 1.
    weight: of the guidance.
    """

    c_noise: Any
    c_in: Any
    alpha: Any
    sigma: Any
    x0_x: Any
    x0_f: Any
    eps_x: Any
    eps_f: Any
    state: StepCoefficients
    buffer: StepCoefficients
    noise: Any
    slot: Any
    log_low: Any
    log_high: Any
    weight: Any


class Trajectory(NamedTuple):
    """The steps of a sampler.

    table: one row per call of the network.
    step [rows]: the step that each row belongs to.
    grid [steps]: the process at the start of each step.
    start, start_noise: the first state is start x plus start_noise times the noise number 0, x ~ N(0, I).
    """

    table: Table
    step: np.ndarray
    grid: Grid
    start: float
    start_noise: float = 0.0


@dataclass(frozen=True)
class SamplerRecord:
    """A sampler. The annotated keyword parameters of its function are its options.

    Attributes:
        trajectory: (process, steps, options) -> its table; None for one that chooses its steps as it goes.
        nfe: steps -> how often the network is called, at most.
        adaptive: (process, guidance weight, options) -> its schedule, of one that chooses its steps as it goes.
    """

    trajectory: Callable[..., Trajectory] | None = None
    nfe: Callable[[int], int] | None = None
    adaptive: Callable[..., Any] | None = None

    @property
    def options(self) -> dict[str, Option]:
        return options(self.trajectory or self.adaptive)


def make_table(grid: Grid, state: StepCoefficients, buffer: StepCoefficients | None = None, **others: Any) -> Table:
    """A table with a row for each entry of the grid; what is left out is 0, and scalars are repeated."""
    c = grid.conversion
    call = (grid.c_noise, grid.c_in, grid.alpha, grid.sigma, c.x0_x, c.x0_f, c.eps_x, c.eps_f)
    defaults = {"noise": 0.0, "slot": 0, "log_low": 0.0, "log_high": 0.0, "weight": 1.0}
    table = Table(*call, state, buffer or StepCoefficients(), **(defaults | others))
    return jax.tree.map(lambda leaf: np.broadcast_to(np.asarray(leaf), len(grid.t)), table)


def scaled(coefficients: StepCoefficients, factor: np.ndarray | float) -> StepCoefficients:
    return StepCoefficients(*(factor * each for each in coefficients))


def next_step_noise(noise: np.ndarray) -> dict[str, Any]:
    """Columns for step i + 1's noise [steps], which its first network call needs: the last row of step i adds it."""
    return {"noise": np.append(noise[1:], 0.0), "slot": np.arange(1, len(noise) + 1)}


def two_stages(
    first: Grid,
    second: Grid,
    drifts: tuple[StepCoefficients, StepCoefficients],
    h: np.ndarray,
    ahead: float,
    noise: np.ndarray,
    final_euler: StepCoefficients | None = None,
) -> tuple[Table, np.ndarray]:
    """Rows of (2) for steps h [steps] from `first` with a look at `second`, and the step of each row.

    drifts: dx/dt at the two, in terms of data and noise.
    noise [steps]: what each step adds to x before it evaluates anything.
    final_euler: the update of a last step that has no second stage.
    """
    corrected = np.append(np.ones(len(h) - 1, bool), final_euler is None)
    slope, slope_ahead = (scaled(drift, h) for drift in drifts)
    predictor = scaled(slope, ahead)._replace(x=np.ones(len(h)))
    if final_euler is not None:
        predictor = jax.tree.map(lambda each, last: np.append(each[:-1], last), predictor, final_euler)
    buffer = scaled(slope, 1 - 0.5 / ahead)._replace(x=1.0)
    corrector = scaled(slope_ahead, 0.5 / ahead)._replace(buffer=1.0)
    after = next_step_noise(noise)
    at_once = {"noise": np.where(corrected, 0.0, after["noise"]), "slot": after["slot"]}
    kept = np.stack([np.ones_like(corrected), corrected], axis=1).reshape(-1)
    pairs = make_table(first, predictor, buffer, **at_once), make_table(second, corrector, **after)
    table = jax.tree.map(lambda a, b: np.stack([a, b], axis=1).reshape(-1)[kept], *pairs)
    return table, np.repeat(np.arange(len(h)), 2)[kept]


def check_ahead(process: AnyProcess, ahead: float) -> None:
    """UserError unless (2) can look `ahead` in a process."""
    if ahead != 1 and (isinstance(process, GaussianDiffusion) or process.nearest is not unchanged):
        raise UserError(f"ahead = {ahead} looks between the steps, where a discrete process is not known; valid: 1")
