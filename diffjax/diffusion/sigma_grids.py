"""Sampler grids: the steps, noise levels σ/α and times that samplers visit, in float64.

Divided by α every process is the same one, x/α = x0 + τ eps with τ = σ/α. The ρ schedule of EDM (2206.00364 eq. 5) is

    (1)  τ_i = (τ_max^(1/ρ) + i/(N-1) (τ_min^(1/ρ) - τ_max^(1/ρ)))^ρ,   τ_N = 0
"""

from typing import Annotated

import numpy as np

from diffjax.diffusion.edm import sigmas
from diffjax.diffusion.gaussian import GaussianDiffusion, respaced_steps
from diffjax.diffusion.paths import sigma_as_time
from diffjax.diffusion.process import Grid, Process
from diffjax.errors import UserError
from diffjax.options import Leaf, above, one_of

AnyProcess = GaussianDiffusion | Process

SPACINGS = ("even", "stride", "linspace", "trailing")
Every = one_of((*SPACINGS, "rho", None))
SigmaMin = Annotated[
    float | None, Leaf("lowest noise level of spacing rho; none: where the process ends", "watch", above(0))
]
SigmaMax = Annotated[float | None, Leaf("highest one; none: where the process begins", "watch", above(0))]
Rho = Annotated[float | None, Leaf("exponent of spacing rho; none: 7", "watch", above(0))]
Shift = Annotated[float, Leaf("resolution shift of the times", "watch", above(0))]


def continuous(process: AnyProcess, sampler: str) -> Process:
    """The process, if it is one in continuous time; else UserError."""
    if isinstance(process, GaussianDiffusion):
        raise UserError(
            f"sampler {sampler!r} moves in continuous time, which a discrete process has not; valid: ddpm, ddim, edm, "
            "dpmpp_2m"
        )
    return process


def discrete_steps(count: int, steps: int, spacing: str) -> np.ndarray:
    """The steps of 0, ..., count - 1 that a sampler visits, descending: int64 [steps].

    "even": spread with both ends, "stride": every i-th from 0, both as `respaced_steps`; "linspace": steps + 1 points
    spread with both ends, without 0; "trailing": every (count / steps)-th, counted from the last.
    """
    if not 1 <= steps <= count:
        raise UserError(f"{steps} sampling steps: valid: 1 to {count}, the steps of the process")
    if spacing in ("even", "stride"):
        return np.array(respaced_steps(count, f"{'ddim' * (spacing == 'stride')}{steps}")[::-1], np.int64)
    if spacing == "linspace":
        return np.linspace(0, count - 1, steps + 1).round()[:0:-1].astype(np.int64)
    if spacing == "trailing":
        return np.arange(count, 0, -count / steps)[:steps].round().astype(np.int64) - 1
    raise UserError(f"spacing {spacing!r} is unknown; valid: {', '.join(SPACINGS)}")


def sigma_grid(
    process: AnyProcess, steps: int, sigma_min: float | None, sigma_max: float | None, rho: float | None
) -> np.ndarray:
    """The levels τ of (1) without the last: float64 [steps]. By default between the ends of the process, and from 80
    and to 0.002 where there is none, with ρ = 7."""
    rho = 7.0 if rho is None else rho
    if isinstance(process, GaussianDiffusion):
        ends = process.grid(np.array([process.num_steps - 1, 0]))
    else:
        ends = process.grid(np.array(process.span, np.float64))
    with np.errstate(divide="ignore"):
        highest, lowest = ends.sigma / ends.alpha
    high = sigma_max if sigma_max is not None else highest if np.isfinite(highest) else 80.0
    low = sigma_min if sigma_min is not None else lowest if lowest > 0 else 0.002
    if low >= high:
        raise UserError(f"sigma_min = {low:g} is not below sigma_max = {high:g}; valid: above 0 to below sigma_max")
    return sigmas(steps, low, high, rho)[:-1]


def at_sigmas(process: AnyProcess, levels: np.ndarray) -> Grid:
    """The process where σ/α has the given values [n]; a discrete one at its nearest steps."""
    if isinstance(process, GaussianDiffusion):
        known = process.sqrt_one_minus_alphas_cumprod / process.sqrt_alphas_cumprod
        return process.grid(np.abs(known[None] - levels[:, None]).argmin(axis=1))
    return process.grid(times_at(process, levels))


def times_at(process: Process, levels: np.ndarray) -> np.ndarray:
    """The times t [n] with σ/α = levels, to the last digits; the nearer end of the span for levels beyond it."""
    with np.errstate(all="ignore"):
        point = process.path(levels)
        if np.array_equal(point.sigma / point.alpha, levels):
            return levels
        noise, data = (np.full_like(levels, end) for end in process.span)
        for _ in range(200):  # halvings: more than the digits of a float64, also for times near 0
            middle = 0.5 * (noise + data)
            point = process.path(middle)
            above = point.sigma / point.alpha > levels
            noise, data = np.where(above, middle, noise), np.where(above, data, middle)
    return data


def descending(
    process: AnyProcess,
    steps: int,
    spacing: str,
    sigma_min: float | None = None,
    sigma_max: float | None = None,
    rho: float | None = None,
) -> Grid:
    """The process where a sampler in noise levels looks at it: `discrete_steps`, or with "rho" (1)."""
    if spacing == "rho":
        return at_sigmas(process, sigma_grid(process, steps, sigma_min, sigma_max, rho))
    if not isinstance(process, GaussianDiffusion):
        raise UserError(f"spacing {spacing!r} is for discrete processes; valid in continuous time: rho")
    if (sigma_min, sigma_max, rho) != (None, None, None):
        raise UserError(f"sigma_min, sigma_max and rho have no meaning with spacing {spacing!r}; valid with: rho")
    return process.grid(discrete_steps(process.num_steps, steps, spacing))


def own_times(process: Process, steps: int, shift: float) -> np.ndarray:
    """steps + 1 times through the span, of those that the network knows: even in u, 1 at the noise, before the
    resolution shift u -> a u/(1 + (a-1) u) (2403.03206 eq. 23); where time is the noise level itself, (1)."""
    if process.path is sigma_as_time:
        if shift != 1:
            raise UserError(f"shift = {shift} has no meaning where time is the noise level; valid: 1")
        return process.nearest(np.append(sigma_grid(process, steps, None, None, None), 0.0))
    u = np.linspace(1.0, 0.0, steps + 1)
    u = shift * u / (1 + (shift - 1) * u)
    noise, data = process.span
    return process.nearest(data + (noise - data) * u)


def noise_time(process: AnyProcess, grid: Grid) -> np.ndarray:
    """How far each time is from the data, 0 to 1: t/T of the original steps, 1 - t of a path from 0 to 1, else NaN."""
    if isinstance(process, GaussianDiffusion):
        return grid.c_noise / process.original_steps
    inside = 0 <= process.span[0] < process.span[1] <= 1
    return 1.0 - grid.t if inside else np.full(len(grid.t), np.nan)
