"""Samplers as tables: every step of every sampler is linear, so its coefficients can be computed once, on the host.

A sampler looks at the process at a series of noise levels. At each it calls the network, whose output f gives the data
and the noise in x = α x0 + σ eps (paths, equation 3), and moves on:

    (1)  x' = a x + b x0 + c eps + d m + s z,   m' = a' x + b' x0 + c' eps

with a memory m of what an earlier call found and z ~ N(0, I). One call of the network is one row of coefficients, a
step of a second-order method two rows, and a trajectory is a loop over rows that knows no method by name.

In time. The flow and, for any diffusion D >= 0 that is put in, the stochastic process with the same marginals are

    (2)  dx/dt = v = α' x0 + σ' eps,      dx = (v + D s) dt + √(2D) dw,   s = -eps/σ           SiT 2401.08740 eq. 4, 6

Euler's step is x' = x + h v(x, t). The second-order family with a look ahead at t + r h (EDM 2206.00364, algorithm 3)

    (3)  y = x + r h v(x, t),   x' = x + h ((1 - 1/2r) v(x, t) + 1/2r v(y, t + r h))

is Heun's method for r = 1, midpoint for 1/2, Ralston's for 2/3: row one gives y and m = x + h (1 - 1/2r) v.

In noise levels. Divided by α every process is the same one, x/α = x0 + τ eps with τ = σ/α, in which v = eps (EDM
section 4). Heun's method there, with steps of the ρ schedule

    (4)  τ_i = (τ_max^(1/ρ) + i/(N-1) (τ_min^(1/ρ) - τ_max^(1/ρ)))^ρ,   τ_N = 0                EDM eq. 5

is the sampler of EDM; Euler's is deterministic DDIM. DDIM (2010.02502 eq. 12, 16), from level t to s on any process:

    (5)  x_s = α_s x0 + √(σ_s² - g²) eps + g z,   g = η (σ_s/σ_t) √(σ_t² - (α_t/α_s)² σ_s²)

DPM-Solver++(2M) (2211.01095 algorithm 2), with λ = ln(α/σ), h_i = λ_i - λ_{i-1} and r_i = h_{i-1}/h_i, remembers the
data found at the level before; its first step, and the last to σ = 0, take D = x0:

    (6)  x_i = (σ_i/σ_{i-1}) x_{i-1} - α_i (exp(-h_i) - 1) D,   D = (1 + 1/2r_i) x0_{i-1} - 1/2r_i x0_{i-2}

The ancestral step of DDPM is derived in `gaussian`. All of this is float64 numpy.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Annotated, Any, NamedTuple

import jax
import numpy as np

from diffjax.diffusion.edm import sigmas
from diffjax.diffusion.gaussian import GaussianDiffusion, respaced_steps
from diffjax.diffusion.paths import Conversion, Point, noise_level
from diffjax.diffusion.process import Grid, Process, unchanged
from diffjax.errors import UserError
from diffjax.options import Leaf, Option, above, at_least, between, one_of, options

SPACINGS = ("even", "stride", "linspace", "trailing")
Every = one_of((*SPACINGS, "rho", None))
SigmaMin = Annotated[
    float | None, Leaf("lowest noise level of spacing rho; none: where the process ends", "watch", above(0))
]
SigmaMax = Annotated[float | None, Leaf("highest one; none: where the process begins", "watch", above(0))]
Rho = Annotated[float | None, Leaf("exponent of spacing rho; none: 7", "watch", above(0))]
Shift = Annotated[float, Leaf("resolution shift of the times", "watch", above(0))]
Ahead = Annotated[float, Leaf("where a step looks: 1 is Heun, 1/2 midpoint, 2/3 Ralston", "watch", between(0, 1))]


class Mix(NamedTuple):
    """Coefficients of the state x, the data x0, the noise eps and the memory m in (1); each [rows]."""

    x: Any = 0.0
    x0: Any = 0.0
    eps: Any = 0.0
    memory: Any = 0.0


class Table(NamedTuple):
    """One row for each call of the network; every leaf [rows].

    model_time, input_scale, alpha, sigma, x0_x, x0_f, eps_x, eps_f: how to call it and to read its output.
    state, memory: (1). noise: s in (1), of the noise z number `slot`. log_low, log_high: with a learned variance, the
    two log variances between which the network chooses, s then being 0 or 1. weight: of the guidance.
    """

    model_time: Any
    input_scale: Any
    alpha: Any
    sigma: Any
    x0_x: Any
    x0_f: Any
    eps_x: Any
    eps_f: Any
    state: Mix
    memory: Mix
    noise: Any
    slot: Any
    log_low: Any
    log_high: Any
    weight: Any


class Trajectory(NamedTuple):
    """A table, the step each row belongs to, the process at the start of each step [steps], and the first state:
    `start` times x ~ N(0, I) plus `start_noise` times the noise number 0."""

    table: Table
    step: np.ndarray
    schedule: Grid
    start: float
    start_noise: float = 0.0


AnyProcess = GaussianDiffusion | Process


@dataclass(frozen=True)
class SamplerRecord:
    """A sampler. The annotated keyword parameters of its function are its options.

    Attributes:
        trajectory: (process, steps, options) -> its table; None for one that chooses its steps as it goes.
        calls: steps -> how often the network is called, at most.
        through_x0: whether it goes through predicted data, so that they can be limited.
        adaptive: (process, guidance weight, options) -> its plan, of one that chooses its steps as it goes.
    """

    trajectory: Callable[..., Trajectory] | None = None
    calls: Callable[[int], int] | None = None
    through_x0: bool = False
    adaptive: Callable[..., Any] | None = None

    @property
    def options(self) -> dict[str, Option]:
        return options(self.trajectory or self.adaptive)


def rows(grid: Grid, state: Mix, memory: Mix | None = None, **others: Any) -> Table:
    """A table with a row for each entry of the grid; what is left out is 0, and scalars are repeated."""
    c = grid.conversion
    reading = (grid.model_time, grid.input_scale, grid.alpha, grid.sigma, c.x0_x, c.x0_f, c.eps_x, c.eps_f)
    defaults = {"noise": 0.0, "slot": 0, "log_low": 0.0, "log_high": 0.0, "weight": 1.0}
    table = Table(*reading, state, memory or Mix(), **(defaults | others))
    return jax.tree.map(lambda leaf: np.broadcast_to(np.asarray(leaf), len(grid.t)), table)


def scaled(mix: Mix, factor: np.ndarray | float) -> Mix:
    return Mix(*(factor * coefficient for coefficient in mix))


def following(noise: np.ndarray) -> dict[str, Any]:
    """What the last row of step i adds for step i + 1, whose noise [steps] comes before its first evaluation."""
    return {"noise": np.append(noise[1:], 0.0), "slot": np.arange(1, len(noise) + 1)}


def two_stages(
    first: Grid,
    second: Grid,
    drifts: tuple[Mix, Mix],
    h: np.ndarray,
    ahead: float,
    noise: np.ndarray,
    alone: Mix | None = None,
) -> tuple[Table, np.ndarray]:
    """Rows of (3) for steps h [steps] from `first` with a look at `second`, and the step of each row.

    drifts: dx/dt at the two, in terms of data and noise. noise: what each step adds to x before it evaluates anything.
    alone: the update of a last step that has no second stage.
    """
    corrected = np.append(np.ones(len(h) - 1, bool), alone is None)
    slope, slope_ahead = (scaled(drift, h) for drift in drifts)
    predictor = scaled(slope, ahead)._replace(x=np.ones(len(h)))
    if alone is not None:
        predictor = jax.tree.map(lambda each, last: np.append(each[:-1], last), predictor, alone)
    memory = scaled(slope, 1 - 0.5 / ahead)._replace(x=1.0)
    corrector = scaled(slope_ahead, 0.5 / ahead)._replace(memory=1.0)
    after = following(noise)
    at_once = {"noise": np.where(corrected, 0.0, after["noise"]), "slot": after["slot"]}
    kept = np.stack([np.ones_like(corrected), corrected], axis=1).reshape(-1)
    pairs = rows(first, predictor, memory, **at_once), rows(second, corrector, **after)
    table = jax.tree.map(lambda a, b: np.stack([a, b], axis=1).reshape(-1)[kept], *pairs)
    return table, np.repeat(np.arange(len(h)), 2)[kept]


# Times and noise levels


def continuous(process: AnyProcess, sampler: str) -> Process:
    """The process, if it is one in continuous time; else UserError."""
    if isinstance(process, GaussianDiffusion):
        raise UserError(
            f"sampler {sampler!r} moves in continuous time, which a discrete process has not; valid: ddpm, ddim, edm, "
            "dpmpp_2m"
        )
    return process


def discrete_steps(count: int, steps: int, spacing: str) -> np.ndarray:
    """Which `steps` of 0, ..., count - 1 a sampler visits, falling: int64 [steps].

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
    raise UserError(f"spacing {spacing!r} is unknown; valid: even, stride, linspace, trailing")


def noise_levels(
    process: AnyProcess, steps: int, sigma_min: float | None, sigma_max: float | None, rho: float | None
) -> np.ndarray:
    """The levels τ of (4) without the last: float64 [steps]. By default between the ends of the process, and from 80
    and to 0.002 where there is none, with ρ = 7."""
    rho = 7.0 if rho is None else rho
    if steps < 1 or not rho > 0:
        raise UserError(f"{steps} steps with rho {rho}: valid: at least one step and rho above 0")
    if isinstance(process, GaussianDiffusion):
        ends = process.grid(np.array([process.num_steps - 1, 0]))
    else:
        ends = process.grid(np.array(process.span, np.float64))
    with np.errstate(divide="ignore"):
        highest, lowest = ends.sigma / ends.alpha
    high = sigma_max if sigma_max is not None else highest if np.isfinite(highest) else 80.0
    low = sigma_min if sigma_min is not None else lowest if lowest > 0 else 0.002
    if not 0 < low < high:
        raise UserError(f"noise levels from {high:g} to {low:g}: valid: falling and above 0")
    return sigmas(steps, low, high, rho)[:-1]


def at_levels(process: AnyProcess, levels: np.ndarray) -> Grid:
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
    """The process where a sampler in noise levels looks at it: `discrete_steps`, or with "rho" (4)."""
    if spacing == "rho":
        return at_levels(process, noise_levels(process, steps, sigma_min, sigma_max, rho))
    if not isinstance(process, GaussianDiffusion):
        raise UserError(f"spacing {spacing!r} is for discrete processes; valid in continuous time: rho")
    if (sigma_min, sigma_max, rho) != (None, None, None):
        raise UserError(f"sigma_min, sigma_max and rho have no meaning with spacing {spacing!r}; valid with: rho")
    return process.grid(discrete_steps(process.num_steps, steps, spacing))


def without_alpha(grid: Grid) -> Grid:
    """The same process in the variable x/α, in which the flow is dx/dτ = eps."""
    c, alpha = grid.conversion, grid.alpha
    converted = Conversion(c.x0_x * alpha, c.x0_f, c.eps_x * alpha, c.eps_f, c.eps_x * alpha, c.eps_f)
    return grid._replace(
        input_scale=grid.input_scale * alpha, alpha=np.ones_like(alpha), sigma=grid.sigma / alpha, conversion=converted
    )


def own_times(process: Process, steps: int, shift: float) -> np.ndarray:
    """steps + 1 times through the span, of those that the network knows: even in u, 1 at the noise, before the
    resolution shift u -> a u/(1 + (a-1) u) (2403.03206 eq. 23); where time is the noise level itself, (4)."""
    if steps < 1 or not shift > 0:
        raise UserError(f"{steps} steps with shift {shift}: valid: at least one step and a shift above 0")
    if process.path is noise_level:
        if shift != 1:
            raise UserError(f"shift {shift} has no meaning where time is the noise level; valid: 1")
        return process.nearest(np.append(noise_levels(process, steps, None, None, None), 0.0))
    u = np.linspace(1.0, 0.0, steps + 1)
    u = shift * u / (1 + (shift - 1) * u)
    noise, data = process.span
    return process.nearest(data + (noise - data) * u)


def noise_time(process: AnyProcess, grid: Grid) -> np.ndarray:
    """How far each time is from the data, 0 to 1: t/T of the original steps, 1 - t of a path from 0 to 1, else NaN."""
    if isinstance(process, GaussianDiffusion):
        return grid.model_time / process.original_steps
    inside = 0 <= process.span[0] < process.span[1] <= 1
    return 1.0 - grid.t if inside else np.full(len(grid.t), np.nan)


# Samplers in noise levels


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
    state = Mix(x=kept.posterior_mean_coef2[::-1], x0=kept.posterior_mean_coef1[::-1])
    noisy = np.append(np.ones(steps - 1), 0.0)
    low, high = kept.posterior_log_variance_clipped[::-1], np.log(kept.betas)[::-1]
    if kept.variance == "learned_range":
        table = rows(grid, state, noise=noisy, slot=np.arange(steps), log_low=low, log_high=high)
    else:
        fixed = kept.fixed_large_log_variance[::-1] if kept.variance == "fixed_large" else low
        table = rows(grid, state, noise=noisy * np.exp(0.5 * fixed), slot=np.arange(steps))
    return Trajectory(table, np.arange(steps), grid, start=1.0)


def respaced(process: GaussianDiffusion, kept: np.ndarray) -> GaussianDiffusion:
    """The process of the kept steps, rising: equation (6) of `gaussian`."""
    if len(kept) == process.num_steps:
        return process
    known = process.alphas_cumprod[kept]
    return replace(process, betas=1.0 - known / np.append(1.0, known[:-1]), timestep_map=process.timestep_map[kept])


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
    """(5) down to the data; spacing by default "stride" for a discrete process, else "rho"."""
    if eta < 0:
        raise UserError(f"eta {eta}: valid: 0 (deterministic) and above")
    default = "stride" if isinstance(process, GaussianDiffusion) else "rho"
    grid = descending(process, steps, spacing or default, sigma_min, sigma_max, rho)
    alpha, sigma = np.append(grid.alpha[1:], 1.0), np.append(grid.sigma[1:], 0.0)
    noise = eta * sigma / grid.sigma * np.sqrt(np.maximum(grid.sigma**2 - (grid.alpha / alpha * sigma) ** 2, 0.0))
    if (noise > sigma).any():
        raise UserError(f"eta {eta} asks for more noise than there is at a step; valid: 0 to about 1")
    state = Mix(x0=alpha, eps=np.sqrt(sigma**2 - noise**2))
    table = rows(grid, state, noise=noise, slot=np.arange(steps))
    return Trajectory(table, np.arange(steps), grid, start_at(process, grid))


def start_at(process: AnyProcess, grid: Grid) -> float:
    """The first standard deviation of a sampler in noise levels: σ, but for a discrete process 1, as published."""
    return 1.0 if isinstance(process, GaussianDiffusion) else float(grid.sigma[0])


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
    """EDM's sampler (algorithm 2) in x/α: (3) over (4), 2 steps - 1 calls, or with order 1 Euler's, `steps` calls.

    ahead: r of (3). churn, churn_min, churn_max, churn_noise: S_churn, S_min, S_max, S_noise.
    """
    if order not in (1, 2) or not churn >= 0:
        raise UserError(f"order {order}, churn {churn}: valid: 1 or 2, 0 and above")
    if order == 1 and ahead != 1:
        raise UserError(f"ahead {ahead} has no meaning with order 1, which does not look ahead; valid: order 2")
    churn_max = np.inf if churn_max is None else churn_max
    if not churn and (churn_min, churn_max, churn_noise) != (0.0, np.inf, 1.0):
        raise UserError("churn_min, churn_max and churn_noise have no meaning without churn; valid with: churn above 0")
    if not 0 <= churn_min <= churn_max or not churn_noise >= 0:
        raise UserError(
            f"churn_min {churn_min}, churn_max {churn_max}, churn_noise {churn_noise}: valid: in this order"
        )
    check_ahead(process, ahead)
    schedule = descending(process, steps, "rho", sigma_min, sigma_max, rho)
    level = schedule.sigma / schedule.alpha
    churned = (churn_min <= level) & (level <= churn_max)
    raised = level * (1 + churned * min(churn / steps, np.sqrt(2) - 1))
    grid = without_alpha(at_levels(process, raised) if churn else schedule)
    noise = churn_noise * np.sqrt(np.maximum(grid.sigma**2 - level**2, 0.0))
    after = np.append(level[1:], 0.0)
    euler = Mix(x0=np.ones(steps), eps=after)
    first = {"start": float(level[0]), "start_noise": float(noise[0])}
    if order == 1:
        return Trajectory(rows(grid, euler, **following(noise)), np.arange(steps), schedule, **first)
    h = after - grid.sigma
    target = np.where(after > 0, grid.sigma + ahead * h, level)  # the last is left out
    second = without_alpha(at_levels(process, target))
    drift = Mix(eps=np.ones(steps))
    table, step = two_stages(grid, second, (drift, drift), h, ahead, noise, alone=Mix(x0=1.0))
    return Trajectory(table, step, schedule, **first)


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
    """(6) down to the data; spacing by default "linspace" for a discrete process, else "rho"."""
    default = "linspace" if isinstance(process, GaussianDiffusion) else "rho"
    grid = descending(process, steps, spacing or default, sigma_min, sigma_max, rho)
    h = np.diff(np.log(grid.alpha / grid.sigma))
    if (h <= 0).any():
        raise UserError(f"{steps} steps of spacing {spacing or default!r} visit a step of the process twice")
    weight = -grid.alpha[1:] * np.expm1(-h)
    back = np.append(0.0, 0.5 * h[1:] / h[:-1])[: len(h)]  # 1/2r, and 0 in the first step
    state = Mix(
        x=np.append(grid.sigma[1:] / grid.sigma[:-1], 0.0),
        x0=np.append(weight * (1 + back), 1.0),
        memory=np.append(-weight * back, 0.0),
    )
    return Trajectory(rows(grid, state, Mix(x0=1.0)), np.arange(steps), grid, start_at(process, grid))


# Samplers in time


def check_ahead(process: AnyProcess, ahead: float) -> None:
    """UserError unless (3) can look `ahead` in a process."""
    if not 0 < ahead <= 1:
        raise UserError(f"ahead {ahead}: valid: above 0 to 1")
    if ahead != 1 and (isinstance(process, GaussianDiffusion) or process.nearest is not unchanged):
        raise UserError(f"ahead {ahead} looks between the steps, where a discrete process is not known; valid: 1")


def flow_drift(point: Point) -> Mix:
    return Mix(x0=point.alpha_dot, eps=point.sigma_dot)


def time_grid(process: AnyProcess, sampler: str, steps: int, shift: float, times: Any) -> tuple[Process, np.ndarray]:
    """The process and the times [steps + 1] of an ODE sampler, given or `own_times`."""
    known = continuous(process, sampler)
    if times is None:
        return known, own_times(known, steps, shift)
    if shift != 1:
        raise UserError(f"shift {shift} has no meaning when the times are given; valid: one of the two")
    given = np.asarray(times, np.float64)
    if given.shape != (steps + 1,):
        raise UserError(f"times of shape {given.shape}: valid: {steps + 1} of them for {steps} steps")
    return known, known.nearest(given)


def euler(process: AnyProcess, steps: int, *, shift: Shift = 1.0, times: Any = None) -> Trajectory:
    """Euler's steps along the flow (2), through the span or the given times [steps + 1]."""
    known, t = time_grid(process, "euler", steps, shift, times)
    grid, point = known.grid(t[:-1]), known.path(t[:-1])
    state = scaled(flow_drift(point), np.diff(t))._replace(x=1.0)
    return Trajectory(rows(grid, state), np.arange(steps), grid, max(1.0, float(grid.sigma[0])))


def heun(process: AnyProcess, steps: int, *, ahead: Ahead = 1.0, shift: Shift = 1.0, times: Any = None) -> Trajectory:
    """(3) along the flow; the last step is Euler's where the flow at its end divides by zero.

    ahead: r of (3). times: [steps + 1] to use instead of those through the span, which `shift` moves.
    """
    known, t = time_grid(process, "heun", steps, shift, times)
    check_ahead(known, ahead)
    h = np.diff(t)
    looked = t[:-1] + ahead * h
    with np.errstate(divide="ignore", invalid="ignore"):
        grid, point = known.grid(t[:-1]), known.path(t[:-1])
        second, point_ahead = known.grid(looked), known.path(looked)
        drifts = flow_drift(point), flow_drift(point_ahead)
        end = (second.model_time, *second.conversion[:4], point_ahead.alpha_dot, point_ahead.sigma_dot)
    finite = all(np.isfinite(value[-1]) for value in end)
    alone = None if finite else Mix(1.0, h[-1] * point.alpha_dot[-1], h[-1] * point.sigma_dot[-1])
    table, step = two_stages(grid, second, drifts, h, ahead, np.zeros(steps), alone)
    return Trajectory(table, step, grid, max(1.0, float(grid.sigma[0])))


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
    """The process (2) at times [n]: the grid, D and the drift."""

    grid: Grid
    diffusion: np.ndarray
    drift: Mix


def stochastic(process: Process, t: np.ndarray, form: str, norm: float) -> Stochastic:
    if form not in DIFFUSIONS:
        raise UserError(f"diffusion form {form!r} is unknown; valid: {', '.join(DIFFUSIONS)}")
    with np.errstate(divide="ignore", invalid="ignore"):
        grid, point = process.grid(t), process.path(t)
        d = DIFFUSIONS[form](norm, t, point)
        drift = Mix(x0=point.alpha_dot, eps=point.sigma_dot - d / point.sigma)
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
    if last_step not in LAST_STEPS:
        raise UserError(f"last step {last_step!r} is unknown; valid: {', '.join(LAST_STEPS)}")
    if last_step == "none" and last_step_size:
        raise UserError(
            f"last_step_size {last_step_size} has no meaning without a last step; valid: mean, euler, tweedie"
        )
    size = 0.04 if last_step_size is None else last_step_size
    first, end = noise if start is None else start, data if last_step == "none" else 1 - size
    if steps < 1 or not noise <= first < end <= 1:
        raise UserError(f"{steps} steps from t = {first:g} to {end:g}: valid: at least 1, within {noise:g} to 1")
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
        grid, update = process.grid(times), Mix(x0=1.0)  # x0 = (x + σ² s)/α
    elif last_step == "euler":
        grid, update = process.grid(times), scaled(flow_drift(process.path(times)), np.array([size]))._replace(x=1.0)
    else:
        end = stochastic(process, times, form, norm)
        grid, update = end.grid, scaled(end.drift, np.array([size]))._replace(x=1.0)

    def append(a: np.ndarray, b: np.ndarray) -> np.ndarray:
        return np.concatenate([a, b])

    return trajectory._replace(
        table=jax.tree.map(append, trajectory.table, rows(grid, update)),
        step=np.append(trajectory.step, len(trajectory.schedule.t)),
        schedule=jax.tree.map(append, trajectory.schedule, grid),
    )


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
    table = rows(at.grid, scaled(at.drift, h)._replace(x=1.0), noise=noise, slot=np.arange(steps))
    trajectory = Trajectory(table, np.arange(steps), at.grid, max(1.0, float(at.grid.sigma[0])))
    return with_last_step(trajectory, known, t[-1], diffusion, norm, last_step, size)


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
    """y = x + √(2Dh) z, then (3) with the drift v + D s; options as `euler_maruyama`."""
    known, t, size = sde_times(process, "sde_heun", steps, start, last_step, last_step_size)
    at, h = stochastic(known, t, diffusion, norm), np.diff(t)
    at = at._replace(drift=scaled(at.drift, np.ones(steps + 1)))
    first, second = (jax.tree.map(lambda a, part=part: a[part], at) for part in (slice(None, -1), slice(1, None)))
    noise = np.sqrt(2 * first.diffusion * h)
    table, step = two_stages(first.grid, second.grid, (first.drift, second.drift), h, 1.0, noise)
    begin = max(1.0, float(first.grid.sigma[0]))
    trajectory = Trajectory(table, step, first.grid, begin, start_noise=float(noise[0]))
    return with_last_step(trajectory, known, t[-1], diffusion, norm, last_step, size)
