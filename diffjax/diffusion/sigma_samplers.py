"""Samplers in noise levels, for any process: DDPM, DDIM, EDM and DPM-Solver++(2M) as tables; see `tables`.

In the variable x/α the flow is dx/dτ = eps with τ = σ/α (EDM section 4). The second-order family of `tables`, equation
(2), over the ρ schedule there is the sampler of EDM (2206.00364); Euler's method is deterministic DDIM. DDIM
(2010.02502 eq. 12, 16), from level t to s on any process:

    (1)  x_s = α_s x0 + √(σ_s² - g²) eps + g z,   g = η (σ_s/σ_t) √(σ_t² - (α_t/α_s)² σ_s²)

DPM-Solver++(2M) (2211.01095 algorithm 2), with λ = ln(α/σ), h_i = λ_i - λ_{i-1} and r_i = h_{i-1}/h_i, keeps the data
found at the level before in the multistep buffer; its first step, and the last to σ = 0, take D = x0:

    (2)  x_i = (σ_i/σ_{i-1}) x_{i-1} - α_i (exp(-h_i) - 1) D,   D = (1 + 1/2r_i) x0_{i-1} - 1/2r_i x0_{i-2}

The ancestral step of DDPM is derived in `gaussian`.
"""

from dataclasses import replace
from typing import Annotated

import numpy as np

from diffjax.diffusion.gaussian import GaussianDiffusion
from diffjax.diffusion.paths import Conversion
from diffjax.diffusion.process import Grid
from diffjax.diffusion.sigma_grids import (
    SPACINGS,
    AnyProcess,
    Every,
    Rho,
    SigmaMax,
    SigmaMin,
    at_sigmas,
    descending,
    discrete_steps,
)
from diffjax.diffusion.tables import (
    Ahead,
    StepCoefficients,
    Trajectory,
    check_ahead,
    make_table,
    next_step_noise,
    two_stages,
)
from diffjax.errors import UserError
from diffjax.options import Leaf, at_least, checked, one_of


@checked
def ddpm(
    process: AnyProcess,
    steps: int,
    *,
    spacing: Annotated[str, Leaf("which steps of the process are visited", "watch", one_of(SPACINGS))] = "even",
) -> Trajectory:
    """Ancestral sampling of a discrete process (DDPM algorithm 2) in `steps` of its steps."""
    if not isinstance(process, GaussianDiffusion):
        raise UserError("sampler 'ddpm' needs a discrete process; valid in continuous time: ddim with eta 1")
    k = discrete_steps(process.num_steps, steps, spacing)
    kept = respaced(process, k[::-1])
    grid = kept.grid(np.arange(steps)[::-1])
    state = StepCoefficients(x=kept.posterior_mean_coef2[::-1], x0=kept.posterior_mean_coef1[::-1])
    noisy = np.append(np.ones(steps - 1), 0.0)
    low, high = kept.posterior_log_variance_clipped[::-1], np.log(kept.betas)[::-1]
    if kept.variance == "learned_range":
        table = make_table(grid, state, noise=noisy, slot=np.arange(steps), log_low=low, log_high=high)
    else:
        fixed = kept.fixed_large_log_variance[::-1] if kept.variance == "fixed_large" else low
        table = make_table(grid, state, noise=noisy * np.exp(0.5 * fixed), slot=np.arange(steps))
    return Trajectory(table, np.arange(steps), grid, start=1.0)


def respaced(process: GaussianDiffusion, kept: np.ndarray) -> GaussianDiffusion:
    """The process of the kept steps, rising: equation (6) of `gaussian`."""
    if len(kept) == process.num_steps:
        return process
    known = process.alphas_cumprod[kept]
    return replace(process, betas=1.0 - known / np.append(1.0, known[:-1]), timestep_map=process.timestep_map[kept])


@checked
def ddim(
    process: AnyProcess,
    steps: int,
    *,
    eta: Annotated[
        float, Leaf("0: deterministic; 1: as much noise as DDPM's posterior has", "watch", at_least(0))
    ] = 0.0,
    spacing: Annotated[
        str | None, Leaf("which noise levels are visited; none: stride, in continuous time rho", "watch", Every)
    ] = None,
    sigma_min: SigmaMin = None,
    sigma_max: SigmaMax = None,
    rho: Rho = None,
) -> Trajectory:
    """(1) down to the data; spacing by default "stride" for a discrete process, else "rho"."""
    default = "stride" if isinstance(process, GaussianDiffusion) else "rho"
    grid = descending(process, steps, spacing or default, sigma_min, sigma_max, rho)
    alpha, sigma = np.append(grid.alpha[1:], 1.0), np.append(grid.sigma[1:], 0.0)
    noise = eta * sigma / grid.sigma * np.sqrt(np.maximum(grid.sigma**2 - (grid.alpha / alpha * sigma) ** 2, 0.0))
    if (noise > sigma).any():
        raise UserError(f"eta = {eta} asks for more noise than there is at a step; valid: 0 to about 1")
    state = StepCoefficients(x0=alpha, eps=np.sqrt(sigma**2 - noise**2))
    table = make_table(grid, state, noise=noise, slot=np.arange(steps))
    return Trajectory(table, np.arange(steps), grid, start_at(process, grid))


def start_at(process: AnyProcess, grid: Grid) -> float:
    """The first standard deviation of a sampler in noise levels: σ, but for a discrete process 1, as published."""
    return 1.0 if isinstance(process, GaussianDiffusion) else float(grid.sigma[0])


@checked
def edm(
    process: AnyProcess,
    steps: int,
    *,
    order: Annotated[int, Leaf("2: Heun's steps; 1: Euler's", "watch", one_of((1, 2)))] = 2,
    ahead: Ahead = 1.0,
    sigma_min: SigmaMin = None,
    sigma_max: SigmaMax = None,
    rho: Rho = None,
    churn: Annotated[float, Leaf("S_churn: how much noise is added on the way", "watch", at_least(0))] = 0.0,
    churn_min: Annotated[float, Leaf("S_min: lowest noise level where it is", "watch", at_least(0))] = 0.0,
    churn_max: Annotated[float | None, Leaf("S_max: highest one; none: all", "watch", at_least(0))] = None,
    churn_noise: Annotated[float, Leaf("S_noise: standard deviation of the added noise", "watch", at_least(0))] = 1.0,
) -> Trajectory:
    """EDM's sampler (algorithm 2) in x/α over the ρ schedule, 2 steps - 1 calls; with order 1 Euler's, `steps` calls.

    ahead: r of equation (2) of `tables`. churn, churn_min, churn_max, churn_noise: S_churn, S_min, S_max, S_noise.
    """
    if order == 1 and ahead != 1:
        raise UserError(f"ahead = {ahead} has no meaning with order 1, which does not look ahead; valid: order 2")
    churn_max = np.inf if churn_max is None else churn_max
    if not churn and (churn_min, churn_max, churn_noise) != (0.0, np.inf, 1.0):
        raise UserError("churn_min, churn_max and churn_noise have no meaning without churn; valid with: churn above 0")
    if churn_min > churn_max:
        raise UserError(f"churn_min = {churn_min} is above churn_max = {churn_max}; valid: 0 to churn_max")
    check_ahead(process, ahead)
    visited = descending(process, steps, "rho", sigma_min, sigma_max, rho)
    sigma = visited.sigma / visited.alpha
    churned = (churn_min <= sigma) & (sigma <= churn_max)
    raised = sigma * (1 + churned * min(churn / steps, np.sqrt(2) - 1))
    grid = without_alpha(at_sigmas(process, raised) if churn else visited)
    noise = churn_noise * np.sqrt(np.maximum(grid.sigma**2 - sigma**2, 0.0))
    after = np.append(sigma[1:], 0.0)
    euler = StepCoefficients(x0=np.ones(steps), eps=after)
    first = {"start": float(sigma[0]), "start_noise": float(noise[0])}
    if order == 1:
        return Trajectory(make_table(grid, euler, **next_step_noise(noise)), np.arange(steps), visited, **first)
    h = after - grid.sigma
    target = np.where(after > 0, grid.sigma + ahead * h, sigma)  # the last is left out
    second = without_alpha(at_sigmas(process, target))
    drift = StepCoefficients(eps=np.ones(steps))
    table, step = two_stages(grid, second, (drift, drift), h, ahead, noise, final_euler=StepCoefficients(x0=1.0))
    return Trajectory(table, step, visited, **first)


def without_alpha(grid: Grid) -> Grid:
    """The same process in the variable x/α, in which the flow is dx/dτ = eps."""
    c, alpha = grid.conversion, grid.alpha
    converted = Conversion(c.x0_x * alpha, c.x0_f, c.eps_x * alpha, c.eps_f, c.eps_x * alpha, c.eps_f)
    return grid._replace(
        c_in=grid.c_in * alpha, alpha=np.ones_like(alpha), sigma=grid.sigma / alpha, conversion=converted
    )


@checked
def dpmpp_2m(
    process: AnyProcess,
    steps: int,
    *,
    spacing: Annotated[
        str | None, Leaf("which noise levels are visited; none: linspace, in continuous time rho", "watch", Every)
    ] = None,
    sigma_min: SigmaMin = None,
    sigma_max: SigmaMax = None,
    rho: Rho = None,
) -> Trajectory:
    """(2) down to the data; spacing by default "linspace" for a discrete process, else "rho"."""
    default = "linspace" if isinstance(process, GaussianDiffusion) else "rho"
    grid = descending(process, steps, spacing or default, sigma_min, sigma_max, rho)
    h = np.diff(np.log(grid.alpha / grid.sigma))
    if (h <= 0).any():
        raise UserError(f"{steps} steps of spacing {spacing or default!r} visit a step of the process twice")
    weight = -grid.alpha[1:] * np.expm1(-h)
    back = np.append(0.0, 0.5 * h[1:] / h[:-1])[: len(h)]  # 1/2r, and 0 in the first step
    state = StepCoefficients(
        x=np.append(grid.sigma[1:] / grid.sigma[:-1], 0.0),
        x0=np.append(weight * (1 + back), 1.0),
        buffer=np.append(-weight * back, 0.0),
    )
    return Trajectory(
        make_table(grid, state, StepCoefficients(x0=1.0)), np.arange(steps), grid, start_at(process, grid)
    )
