"""Samplers along the flow dx/dt = v = α' x0 + σ' eps of a process in continuous time, as tables; see `tables`."""

import numpy as np

from diffjax.diffusion.paths import Point
from diffjax.diffusion.process import Process
from diffjax.diffusion.sigma_grids import AnyProcess, Shift, continuous, own_times
from diffjax.diffusion.tables import Ahead, StepCoefficients, Trajectory, check_ahead, make_table, scaled, two_stages
from diffjax.options import checked


@checked
def euler(process: AnyProcess, steps: int, *, shift: Shift = 1.0) -> Trajectory:
    """Euler's steps along the flow through the span of the process, at `own_times`."""
    known = continuous(process, "euler")
    return euler_at(known, own_times(known, steps, shift))


@checked
def heun(process: AnyProcess, steps: int, *, ahead: Ahead = 1.0, shift: Shift = 1.0) -> Trajectory:
    """The second-order family along the flow through the span of the process, at `own_times`.

    ahead: r of equation (2) of `tables`.
    """
    known = continuous(process, "heun")
    check_ahead(known, ahead)
    return heun_at(known, own_times(known, steps, shift), ahead)


def flow_drift(point: Point) -> StepCoefficients:
    return StepCoefficients(x0=point.alpha_dot, eps=point.sigma_dot)


def euler_at(process: Process, t: np.ndarray) -> Trajectory:
    """Euler's steps between the times t [steps + 1]."""
    grid, point = process.grid(t[:-1]), process.path(t[:-1])
    state = scaled(flow_drift(point), np.diff(t))._replace(x=1.0)
    return Trajectory(make_table(grid, state), np.arange(len(t) - 1), grid, max(1.0, float(grid.sigma[0])))


def heun_at(process: Process, t: np.ndarray, ahead: float = 1.0) -> Trajectory:
    """Second-order steps between the times t [steps + 1]; the last is Euler's where the flow at its end divides by
    zero."""
    h = np.diff(t)
    looked = t[:-1] + ahead * h
    with np.errstate(divide="ignore", invalid="ignore"):
        grid, point = process.grid(t[:-1]), process.path(t[:-1])
        second, point_ahead = process.grid(looked), process.path(looked)
        drifts = flow_drift(point), flow_drift(point_ahead)
        end = (second.c_noise, *second.conversion[:4], point_ahead.alpha_dot, point_ahead.sigma_dot)
    finite = all(np.isfinite(value[-1]) for value in end)
    euler_step = StepCoefficients(1.0, h[-1] * point.alpha_dot[-1], h[-1] * point.sigma_dot[-1])
    table, step = two_stages(grid, second, drifts, h, ahead, np.zeros(len(h)), None if finite else euler_step)
    return Trajectory(table, step, grid, max(1.0, float(grid.sigma[0])))
