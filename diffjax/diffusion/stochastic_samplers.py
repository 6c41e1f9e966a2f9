"""Stochastic samplers of a path from noise at t = 0 to data at t = 1, as tables; see `tables`.

For any diffusion D >= 0 that is put in, the process with the marginals of the flow is (SiT 2401.08740 eq. 6)

    (1)  dx = (v + D s) dt + √(2D) dw,   v = α' x0 + σ' eps,   s = -eps/σ
"""

from typing import Annotated, NamedTuple

import jax
import numpy as np

from diffjax.diffusion.process import Grid, Process
from diffjax.diffusion.sigma_grids import AnyProcess, continuous
from diffjax.diffusion.tables import StepCoefficients, Trajectory, make_table, scaled, two_stages
from diffjax.diffusion.time_samplers import flow_drift
from diffjax.errors import UserError
from diffjax.options import Leaf, at_least, between, checked, one_of

DIFFUSIONS = {
    "constant": lambda c, t, point: c + 0 * t,
    "sbdm": lambda c, t, p: c * (p.alpha_dot / p.alpha * p.sigma**2 - p.sigma * p.sigma_dot),
    "sigma": lambda c, t, point: c * point.sigma,
    "linear": lambda c, t, point: c * (1 - t),
    "decreasing": lambda c, t, point: 0.25 * (c * np.cos(np.pi * t) + 1) ** 2,
    "increasing_decreasing": lambda c, t, point: c * np.sin(np.pi * t) ** 2,
}
LAST_STEPS = ("mean", "euler", "tweedie", "none")
Form = Annotated[str, Leaf("form of the diffusion coefficient", "watch", one_of(DIFFUSIONS))]
Norm = Annotated[float, Leaf("its size", "watch", at_least(0))]
LastStep = Annotated[str, Leaf("the last step, without noise", "watch", one_of(LAST_STEPS))]
LastStepSize = Annotated[float | None, Leaf("its size; none: 0.04", "watch", between(0, 1))]
Start = Annotated[float | None, Leaf("the first time; none: where the process begins", "watch", between(0, 1))]


class Stochastic(NamedTuple):
    """The process (1) at times [n]: the grid, D and the drift."""

    grid: Grid
    diffusion: np.ndarray
    drift: StepCoefficients


def stochastic(process: Process, t: np.ndarray, form: str, norm: float) -> Stochastic:
    with np.errstate(divide="ignore", invalid="ignore"):
        grid, point = process.grid(t), process.path(t)
        d = DIFFUSIONS[form](norm, t, point)
        drift = StepCoefficients(x0=point.alpha_dot, eps=point.sigma_dot - d / point.sigma)
    bad = ~np.isfinite(d) | ~np.isfinite(drift.eps)
    if bad.any():
        raise UserError(
            f"the diffusion form {form!r} divides by zero at t = {t[bad][0]:g}; valid: another form, a later start, "
            "or a last step before the end"
        )
    if (d < 0).any():
        raise UserError(f"the diffusion form {form!r} with norm {norm} is negative at t = {t[d < 0][0]:g}")
    return Stochastic(grid, d, drift)


def sde_times(
    process: AnyProcess, sampler: str, steps: int, start: float | None, last_step: str, last_step_size: float | None
) -> tuple[Process, np.ndarray, float]:
    """steps + 1 even times from `start` (None: that of the span) to 1 - last_step_size, or the span's end; the size."""
    known = continuous(process, sampler)
    noise, data = known.span
    if not 0 <= noise < data <= 1:
        raise UserError(f"sampler {sampler!r} counts time from noise at 0 to data at 1; for others take edm with churn")
    if last_step == "none" and last_step_size:
        raise UserError(
            f"last_step_size = {last_step_size} has no meaning without a last step; valid: mean, euler, tweedie"
        )
    size = 0.04 if last_step_size is None else last_step_size
    first, end = noise if start is None else start, data if last_step == "none" else 1 - size
    if not noise <= first < end <= 1:
        raise UserError(f"start = {first:g}: valid: {noise:g} to below {end:g}, where the last step begins")
    return known, np.linspace(first, end, steps + 1), size


def with_last_step(
    trajectory: Trajectory, process: Process, t: float, form: str, norm: float, last_step: str, size: float
) -> Trajectory:
    """One more step from time t to the data, without noise: `mean` along the drift of the stochastic process, `euler`
    along the flow, `tweedie` to the data that is expected there."""
    if last_step == "none":
        return trajectory
    times = np.array([t])
    if last_step == "tweedie":
        grid, update = process.grid(times), StepCoefficients(x0=1.0)  # x0 = (x + σ² s)/α
    elif last_step == "euler":
        grid, update = process.grid(times), scaled(flow_drift(process.path(times)), np.array([size]))._replace(x=1.0)
    else:
        end = stochastic(process, times, form, norm)
        grid, update = end.grid, scaled(end.drift, np.array([size]))._replace(x=1.0)

    def append(a: np.ndarray, b: np.ndarray) -> np.ndarray:
        return np.concatenate([a, b])

    return trajectory._replace(
        table=jax.tree.map(append, trajectory.table, make_table(grid, update)),
        step=np.append(trajectory.step, len(trajectory.grid.t)),
        grid=jax.tree.map(append, trajectory.grid, grid),
    )


@checked
def euler_maruyama(
    process: AnyProcess,
    steps: int,
    *,
    diffusion: Form = "sigma",
    norm: Norm = 1.0,
    last_step: LastStep = "mean",
    last_step_size: LastStepSize = None,
    start: Start = None,
) -> Trajectory:
    """x' = x + h (v + D s) + √(2Dh) z for a path from noise at 0 to data at 1, then the last step.

    diffusion, norm: form and size of D. last_step: mean, euler, tweedie or none. start: the first time.
    """
    known, t, size = sde_times(process, "euler_maruyama", steps, start, last_step, last_step_size)
    at, h = stochastic(known, t[:-1], diffusion, norm), np.diff(t)
    noise = np.sqrt(2 * at.diffusion * h)
    table = make_table(at.grid, scaled(at.drift, h)._replace(x=1.0), noise=noise, slot=np.arange(steps))
    trajectory = Trajectory(table, np.arange(steps), at.grid, max(1.0, float(at.grid.sigma[0])))
    return with_last_step(trajectory, known, t[-1], diffusion, norm, last_step, size)


@checked
def sde_heun(
    process: AnyProcess,
    steps: int,
    *,
    diffusion: Form = "sigma",
    norm: Norm = 1.0,
    last_step: LastStep = "mean",
    last_step_size: LastStepSize = None,
    start: Start = None,
) -> Trajectory:
    """y = x + √(2Dh) z, then Heun's step with the drift v + D s; options as `euler_maruyama`."""
    known, t, size = sde_times(process, "sde_heun", steps, start, last_step, last_step_size)
    at, h = stochastic(known, t, diffusion, norm), np.diff(t)
    at = at._replace(drift=scaled(at.drift, np.ones(steps + 1)))
    first, second = (jax.tree.map(lambda a, part=part: a[part], at) for part in (slice(None, -1), slice(1, None)))
    noise = np.sqrt(2 * first.diffusion * h)
    table, step = two_stages(first.grid, second.grid, (first.drift, second.drift), h, 1.0, noise)
    begin = max(1.0, float(first.grid.sigma[0]))
    trajectory = Trajectory(table, step, first.grid, begin, start_noise=float(noise[0]))
    return with_last_step(trajectory, known, t[-1], diffusion, norm, last_step, size)
