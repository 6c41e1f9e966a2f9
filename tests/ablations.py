"""EDM's processes in another time and scale, as its ablations sample them (2206.00364, section 2 and table 1).

The package samples EDM in noise levels alone; here are the other forms, to hold its steps to the stored trajectories.
"""

from collections.abc import Callable
from dataclasses import replace
from typing import NamedTuple

import numpy as np

from diffjax.diffusion import edm
from diffjax.diffusion.paths import Array, Point, namespace, sigma_as_time
from diffjax.diffusion.process import Process, ones, unchanged


class Schedule(NamedTuple):
    """σ as a function of some other time t: the function, its derivative, its inverse."""

    sigma: Callable[[Array], Array]
    sigma_dot: Callable[[Array], Array]
    inverse: Callable[[Array], Array]


def vp(beta_d: float = edm.VP_BETAS[0], beta_min: float = edm.VP_BETAS[1]) -> Schedule:
    """σ = √(exp(β_d t²/2 + β_min t) - 1)."""

    def sigma(t: Array) -> Array:
        xp = namespace(t)
        return xp.sqrt(xp.expm1(beta_d * t**2 / 2 + beta_min * t))

    def sigma_dot(t: Array) -> Array:
        s = sigma(t)
        return (beta_d * t + beta_min) * (s**2 + 1) / (2 * s)

    def inverse(s: Array) -> Array:
        xp = namespace(s)
        return (xp.sqrt(beta_min**2 + 2 * beta_d * xp.log1p(s**2)) - beta_min) / beta_d

    return Schedule(sigma, sigma_dot, inverse)


def vp_betas(sigma_min: float, sigma_max: float, first: float = edm.VP_LAST_TIME) -> tuple[float, float]:
    """(β_d, β_min) with which `vp` goes from sigma_min at t = `first` to sigma_max at t = 1."""
    low, high = np.log1p(sigma_min**2), np.log1p(sigma_max**2)
    beta_d = 2 * (low / first - high) / (first - 1)
    return float(beta_d), float(high - beta_d / 2)


def ve() -> Schedule:
    """σ = √t."""
    return Schedule(lambda t: namespace(t).sqrt(t), lambda t: 0.5 / namespace(t).sqrt(t), lambda s: s**2)


def linear() -> Schedule:
    """σ = t."""
    return Schedule(unchanged, ones, unchanged)


def spread(steps: int, first: float, last: float) -> np.ndarray:
    return first + np.arange(steps) / max(steps - 1, 1) * (last - first)


def vp_sigmas(steps: int) -> np.ndarray:
    """Noise levels evenly spaced in the time of `vp` from 1 to 1e-3, then 0: float64 [steps + 1]."""
    return np.append(vp().sigma(spread(steps, 1.0, edm.VP_LAST_TIME)), 0.0)


def ve_sigmas(steps: int) -> np.ndarray:
    """Noise levels evenly spaced in ln σ, then 0: float64 [steps + 1]."""
    low, high = np.log(edm.VE_RANGE)
    return np.append(np.exp(spread(steps, high, low)), 0.0)


DISCRETISATIONS = {"edm": edm.sigmas, "vp": vp_sigmas, "ve": ve_sigmas}  # that of iDDPM is its float64 table's


def rescaled(process: Process, schedule: Schedule, scaling: str) -> Process:
    """The process of `edm` in another time and scale: x = s(t) (x0 + σ(t) eps), EDM eq. 4.

    The network is the same: it predicts what it did at σ(t), of x / s(t). scaling: "none", s = 1, or "vp",
    s = 1/√(σ²+1), which with `vp` is the path of Song et al. The span is that of the process in the new time.
    """

    def path(t: Array) -> Point:
        sigma, sigma_dot = schedule.sigma(t), schedule.sigma_dot(t)
        if scaling == "none":
            return Point(ones(t), sigma, 0 * sigma, sigma_dot)
        scale = 1 / namespace(t).sqrt(sigma**2 + 1)
        scale_dot = -sigma * sigma_dot * scale**3
        return Point(scale, scale * sigma, scale_dot, scale_dot * sigma + scale * sigma_dot)

    return replace(
        process,
        path=path,
        prediction=lambda c: process.prediction(sigma_as_time(c.sigma / c.alpha)),
        c_in=lambda t: process.c_in(schedule.sigma(t)) / path(t).alpha,
        c_noise=lambda t: process.c_noise(schedule.sigma(t)),
        span=tuple(schedule.inverse(np.array(process.span)).tolist()),
    )
