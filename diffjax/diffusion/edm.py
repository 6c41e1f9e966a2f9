"""EDM (Karras et al. 2206.00364): noise levels as time, preconditioned networks, and the older settings in that form.

Noise is added to data that stay as they are, x = x0 + σ eps, and the time t is σ itself. Around the network F there are
scalings that make a denoiser:

    (1)  D(x; σ) = c_skip x + c_out F(c_in x, c_noise)                                            eq. 7

Requiring inputs and targets of unit variance for data of variance sd², and the least amplification of F's errors, gives

    (2)  c_skip = sd²/(σ²+sd²),   c_out = σ sd/√(σ²+sd²),   c_in = 1/√(σ²+sd²),   c_noise = ln(σ)/4   table 1

Put D = x0 in (1): F estimates f = (x0 - c_skip x)/c_out = p x0 + q eps, with

    (3)  p = (σ/sd)/√(σ²+sd²),   q = -sd/√(σ²+sd²),

a rotation of x0/sd and -eps in which σ/sd is the tangent: the variance is one at all σ, and its squared error is the
weighted loss λ |D - x0|² with λ = 1/c_out². So the weight of f itself is 1. The older settings have c_skip = 1:

    (4)  VP       c_out = -σ, f = eps;   c_in = 1/√(σ²+1);   c_noise = (M-1) t(σ)
         VE       c_out =  σ, f = -eps;  c_in = 1;           c_noise = ln(σ/2)
         iDDPM    c_out = -σ, f = eps;   c_in = 1/√(σ²+1);   c_noise = M-1-j of the nearest u_j                  table 1

VP knows σ by the time of the SDE of Song et al. (2011.13456), iDDPM by a table of M steps, from u_M = 0 upwards:

    (5)  σ(t) = √(exp(β_d t²/2 + β_min t) - 1)
    (6)  u_{j-1} = √((u_j²+1)/max(ᾱ_{j-1}/ᾱ_j, C1) - 1),   ᾱ_j = sin²(π j/(2 M (C2+1)))

Noise levels in training: ln σ ~ N(P_mean, P_std²); VP t uniform on [1e-5, 1]; VE ln σ uniform; iDDPM j uniform. As
every setting has the unit weight in f, its weight of the denoiser's error is 1/σ² for (4).
"""

from collections.abc import Callable
from dataclasses import replace
from functools import cache
from typing import Annotated, NamedTuple

import jax
import numpy as np

from diffjax import rng
from diffjax.diffusion.paths import (
    Array,
    Point,
    Prediction,
    namespace,
    noise_level,
    predicts_epsilon,
    predicts_minus_epsilon,
    predicts_x0,
)
from diffjax.diffusion.process import Process, choose, ones, read, unchanged
from diffjax.diffusion.weighting import Gamma, SigmaData, Weighting, weight_of_time
from diffjax.errors import UserError
from diffjax.options import Leaf, at_least, one_of

STEPS = 1000  # M of (4), (6)
VP_BETAS = (19.9, 0.1)  # β_d, β_min of (5)
VP_FIRST_TIME = 1e-5  # the smallest t of training
VP_LAST_TIME = 1e-3  # of sampling
VE_RANGE = (0.02, 100.0)
IDDPM_CLIPS = (0.001, 0.008)  # C1, C2 of (6)
IDDPM_LARGEST = 81.0  # noise level of sampling


class Schedule(NamedTuple):
    """σ as a function of some other time t: the function, its derivative, its inverse."""

    sigma: Callable[[Array], Array]
    sigma_dot: Callable[[Array], Array]
    inverse: Callable[[Array], Array]


def vp_schedule(beta_d: float = VP_BETAS[0], beta_min: float = VP_BETAS[1]) -> Schedule:
    """Equation (5)."""

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


def ve_schedule() -> Schedule:
    """σ = √t."""
    return Schedule(lambda t: namespace(t).sqrt(t), lambda t: 0.5 / namespace(t).sqrt(t), lambda s: s**2)


def linear_schedule() -> Schedule:
    """σ = t."""
    return Schedule(unchanged, ones, unchanged)


def vp_betas(sigma_min: float, sigma_max: float, first: float = VP_LAST_TIME) -> tuple[float, float]:
    """(β_d, β_min) with which (5) goes from sigma_min at t = `first` to sigma_max at t = 1."""
    low, high = np.log1p(sigma_min**2), np.log1p(sigma_max**2)
    beta_d = 2 * (low / first - high) / (first - 1)
    return float(beta_d), float(high - beta_d / 2)


@cache
def iddpm_table(precision: type = np.float32) -> np.ndarray:
    """u_0 > u_1 > ... > u_M = 0 of equation (6): float64 [M + 1].

    ᾱ is rounded to float32 and u to `precision`, as in the public code: float32 in its networks, float64 in its
    sampler. In float64 alone the smallest u would be others by 5e-4 of themselves. The published ones still differ
    by 1.3e-5, and those of the sampler by 4e-7: float32 sines and roots are not always the nearest there, and these
    are. Two builds of torch differ by 1e-6 in the same table.
    """
    c1, c2 = (np.float32(clip) for clip in IDDPM_CLIPS)
    angle = np.float32(np.pi / 2) * np.arange(STEPS + 1, dtype=np.float32) / np.float32(STEPS) / (c2 + np.float32(1))
    abar = np.sin(angle.astype(np.float64)).astype(np.float32) ** 2
    u: np.ndarray = np.zeros(STEPS + 1, precision)
    for j in range(STEPS, 0, -1):
        u[j - 1] = np.sqrt((u[j] ** 2 + precision(1)) / max(abar[j - 1] / abar[j], c1) - precision(1))
    table = u.astype(np.float64)
    table.setflags(write=False)
    return table


def iddpm_index(sigma: Array) -> Array:
    """The j of the u_j nearest to sigma; integers, shaped like it."""
    xp = namespace(sigma)
    rising = xp.asarray(iddpm_table()[::-1], sigma.dtype)
    above = xp.clip(xp.searchsorted(rising, sigma), 1, STEPS)
    return STEPS - above + (sigma - rising[above - 1] <= rising[above] - sigma)


def iddpm_round(sigma: Array) -> Array:
    """The u_j nearest to sigma."""
    return namespace(sigma).asarray(iddpm_table(), sigma.dtype)[iddpm_index(sigma)]


def sigmas(steps: int, sigma_min: float = 0.002, sigma_max: float = 80.0, rho: float = 7.0) -> np.ndarray:
    """Noise levels from sigma_max to sigma_min, evenly spaced in σ^(1/rho), then 0: float64 [steps + 1]. EDM eq. 5."""
    return np.append(ramp(steps, sigma_max ** (1 / rho), sigma_min ** (1 / rho)) ** rho, 0.0)


def vp_sigmas(steps: int) -> np.ndarray:
    """Noise levels evenly spaced in the t of (5) from 1 to 1e-3, then 0: float64 [steps + 1]."""
    return np.append(vp_schedule().sigma(ramp(steps, 1.0, VP_LAST_TIME)), 0.0)


def ve_sigmas(steps: int) -> np.ndarray:
    """Noise levels evenly spaced in ln σ over VE_RANGE, then 0: float64 [steps + 1]."""
    low, high = np.log(VE_RANGE)
    return np.append(np.exp(ramp(steps, high, low)), 0.0)


def iddpm_sigmas(steps: int) -> np.ndarray:
    """Noise levels evenly spread over the u_j of (6) from IDDPM_LARGEST, then 0: float64 [steps + 1]."""
    u = iddpm_table(np.float64)[:STEPS]
    inside = u[u <= IDDPM_LARGEST]
    return np.append(inside[np.round(ramp(steps, 0.0, len(inside) - 1)).astype(int)], 0.0)


def ramp(steps: int, first: float, last: float) -> np.ndarray:
    """`steps` float64 values from first to last; one alone is the first."""
    if steps < 1:
        raise UserError(f"noise levels for {steps} steps: valid: at least 1")
    return first + np.arange(steps) / max(steps - 1, 1) * (last - first)


DISCRETISATIONS: dict[str, Callable[..., np.ndarray]] = {
    "edm": sigmas,
    "vp": vp_sigmas,
    "ve": ve_sigmas,
    "iddpm": iddpm_sigmas,
}


def predicts_edm(sigma_data: float) -> Prediction:
    """Equation (3), on any path: there σ/α stands for σ."""

    def prediction(c: Point) -> tuple[Array, Array]:
        norm = namespace(c.alpha).sqrt(c.sigma**2 + (c.alpha * sigma_data) ** 2)
        return c.sigma / sigma_data / norm, -c.alpha * sigma_data / norm

    return prediction


def lognormal(z: Array, p_mean: float, p_std: float) -> Array:
    """σ for standard normal z."""
    return namespace(z).exp(p_mean + p_std * z)


def vp_times(u: Array) -> Array:
    """σ for u uniform on [0, 1): the t of (5) from 1 to 1e-5."""
    return vp_schedule().sigma(1 + u * (VP_FIRST_TIME - 1))


def ve_times(u: Array) -> Array:
    """σ for u uniform on [0, 1): evenly in ln σ."""
    low, high = VE_RANGE
    return low * (high / low) ** u


def iddpm_times(u: Array) -> Array:
    """σ for u uniform on [0, 1): one of u_0, ..., u_{M-1}, all alike."""
    xp = namespace(u)
    return xp.asarray(iddpm_table(), u.dtype)[xp.minimum((u * STEPS).astype(int), STEPS - 1)]


def unit_variance_scale(sigma_data: float) -> Callable[[Array], Array]:
    """c_in of (2)."""
    return lambda sigma: 1 / namespace(sigma).sqrt(sigma**2 + sigma_data**2)


def quarter_log(sigma: Array) -> Array:
    return namespace(sigma).log(sigma) / 4


def vp_model_time(sigma: Array) -> Array:
    return (STEPS - 1) * vp_schedule().inverse(sigma)


def ve_model_time(sigma: Array) -> Array:
    return namespace(sigma).log(sigma / 2)


def iddpm_model_time(sigma: Array) -> Array:
    return (STEPS - 1 - iddpm_index(sigma)).astype(sigma.dtype)


class Setting(NamedTuple):
    """A column of EDM's table 1: what its networks predict and are given, and the noise levels they are made for."""

    prediction: str
    input_scale: Callable[[Array], Array] | None  # None: c_in of (2), which depends on sigma_data
    model_time: Callable[[Array], Array]
    times: str
    span: tuple[float, float]
    nearest: Callable[[Array], Array] = unchanged


VP_SPAN = (float(vp_schedule().sigma(np.array(1.0))), float(vp_schedule().sigma(np.array(VP_LAST_TIME))))
IDDPM_SPAN = (IDDPM_LARGEST, float(iddpm_table()[STEPS - 1]))
SETTINGS = {
    "edm": Setting("edm", None, quarter_log, "lognormal", (80.0, 0.002)),
    "vp": Setting("epsilon", unit_variance_scale(1.0), vp_model_time, "vp", VP_SPAN),
    "ve": Setting("minus_epsilon", ones, ve_model_time, "ve", VE_RANGE[::-1]),
    "iddpm": Setting("epsilon", unit_variance_scale(1.0), iddpm_model_time, "iddpm", IDDPM_SPAN, iddpm_round),
}


def edm(
    setting: str = "edm",
    *,
    prediction: Annotated[
        str,
        Leaf(
            "what the network predicts; '': that of the process",
            valid=one_of(("", "edm", "epsilon", "minus_epsilon", "x0")),
        ),
    ] = "",
    weighting: Weighting = "uniform",
    times: Annotated[
        str,
        Leaf(
            "how noise levels are drawn in training; '': as the process does",
            valid=one_of(("", "lognormal", "vp", "ve", "iddpm")),
        ),
    ] = "",
    sigma_data: SigmaData = None,
    gamma: Gamma = None,
    p_mean: Annotated[float | None, Leaf("mean of ln sigma, lognormal times; none: -1.2")] = None,
    p_std: Annotated[
        float | None, Leaf("standard deviation of ln sigma, lognormal times; none: 1.2", valid=at_least(0))
    ] = None,
) -> Process:
    """A process whose time is the noise level σ; "" takes what belongs to the setting.

    setting: one of SETTINGS. prediction: "edm" of (3), "epsilon", "minus_epsilon" or "x0". weighting: see `weighting`,
    whose numbers are sigma_data (0.5, also that of (2)) and gamma (5). times: "lognormal" with p_mean (-1.2) and p_std
    (1.2), "vp", "ve" or "iddpm". EDM2 (2312.02696) has p_mean -0.4, p_std 1.0 for 512-pixel latents and -0.8, 1.6 for
    64 pixels. UserError on an unknown name, an impossible number, or one that nothing reads.
    """
    chosen = choose(SETTINGS, "setting", setting)
    times, predicts = times or chosen.times, prediction or chosen.prediction
    gamma = read("gamma", gamma, 5.0, weighting == "min_snr", "weighting 'min_snr'")
    scaled = chosen.input_scale is None or "edm" in (predicts, weighting)
    sigma_data = read("sigma_data", sigma_data, 0.5, scaled, "process 'edm', prediction 'edm' or weighting 'edm'")
    p_mean = read("p_mean", p_mean, -1.2, times == "lognormal", "times 'lognormal'")
    p_std = read("p_std", p_std, 1.2, times == "lognormal", "times 'lognormal'")
    if p_std < 0:
        raise UserError(f"p_std = {p_std}: valid: at least 0")
    predictions: dict[str, Prediction] = {
        "edm": predicts_edm(sigma_data),
        "epsilon": predicts_epsilon,
        "minus_epsilon": predicts_minus_epsilon,
        "x0": predicts_x0,
    }
    predicted = choose(predictions, "prediction", predicts)
    draws: dict[str, Callable[[jax.Array], jax.Array]] = {
        "lognormal": lambda keys: lognormal(rng.normal(keys, ()), p_mean, p_std),
        "vp": lambda keys: vp_times(rng.uniform(keys)),
        "ve": lambda keys: ve_times(rng.uniform(keys)),
        "iddpm": lambda keys: iddpm_times(rng.uniform(keys)),
    }
    draw = choose(draws, "times", times)
    return Process(
        path=noise_level,
        prediction=predicted,
        input_scale=chosen.input_scale or unit_variance_scale(sigma_data),
        model_time=chosen.model_time,
        sample_times=lambda keys: chosen.nearest(draw(keys)),
        weight=weight_of_time(weighting, noise_level, predicted, chosen.span, gamma=gamma, sigma_data=sigma_data),
        span=chosen.span,
        uncertainty=weighting == "uncertainty",
        nearest=chosen.nearest,
    )


def rescaled(process: Process, schedule: Schedule, scaling: str = "none") -> Process:
    """The process of `edm` in another time and scale, for samplers: x = s(t) (x0 + σ(t) eps), EDM section 2 and eq. 4.

    The network is the same: it predicts what it did at σ(t), of x / s(t). scaling: "none", s = 1, or "vp",
    s = 1/√(σ²+1), which with `vp_schedule` is the path of Song et al. The span is that of the process in the new time.
    """
    if scaling not in ("none", "vp"):
        raise UserError(f"scaling {scaling!r} is unknown; valid: none, vp")

    def path(t: Array) -> Point:
        sigma, sigma_dot = schedule.sigma(t), schedule.sigma_dot(t)
        if scaling == "none":
            return Point(ones(t), sigma, 0 * sigma, sigma_dot)
        scale = 1 / namespace(t).sqrt(sigma**2 + 1)
        scale_dot = -sigma * sigma_dot * scale**3
        return Point(scale, scale * sigma, scale_dot, scale_dot * sigma + scale * sigma_dot)

    def nearest(t: Array) -> Array:
        return schedule.inverse(process.nearest(schedule.sigma(t)))

    return replace(
        process,
        path=path,
        prediction=lambda c: process.prediction(noise_level(c.sigma / c.alpha)),
        input_scale=lambda t: process.input_scale(schedule.sigma(t)) / path(t).alpha,
        model_time=lambda t: process.model_time(schedule.sigma(t)),
        sample_times=lambda keys: schedule.inverse(process.sample_times(keys)),
        weight=lambda t: process.weight(schedule.sigma(t)),
        span=tuple(schedule.inverse(np.array(process.span)).tolist()),
        nearest=unchanged if process.nearest is unchanged else nearest,
    )
