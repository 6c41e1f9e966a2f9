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
    predicts_epsilon,
    predicts_minus_epsilon,
    predicts_x0,
    sigma_as_time,
)
from diffjax.diffusion.process import Process, choose, ones, resolved, unchanged
from diffjax.diffusion.weighting import Gamma, SigmaData, Weighting, weight_of_time
from diffjax.errors import UserError
from diffjax.options import Leaf, at_least, checked, one_of

STEPS = 1000  # M of (4), (6)
VP_BETAS = (19.9, 0.1)  # β_d, β_min of (5)
VP_FIRST_TIME = 1e-5  # the smallest t of training
VP_LAST_TIME = 1e-3  # of sampling
VE_RANGE = (0.02, 100.0)
IDDPM_CLIPS = (0.001, 0.008)  # C1, C2 of (6)
IDDPM_LARGEST = 81.0  # noise level of sampling


def vp_sigma(t: Array) -> Array:
    """Equation (5)."""
    beta_d, beta_min = VP_BETAS
    xp = namespace(t)
    return xp.sqrt(xp.expm1(beta_d * t**2 / 2 + beta_min * t))


def vp_time(sigma: Array) -> Array:
    """Equation (5) solved for t."""
    beta_d, beta_min = VP_BETAS
    xp = namespace(sigma)
    return (xp.sqrt(beta_min**2 + 2 * beta_d * xp.log1p(sigma**2)) - beta_min) / beta_d


@cache
def iddpm_table() -> np.ndarray:
    """u_0 > u_1 > ... > u_M = 0 of equation (6): float64 [M + 1].

    ᾱ and u are rounded to float32, as in the public code of its networks. In float64 alone the smallest u would be
    others by 5e-4 of themselves. The published ones still differ by 1.3e-5: float32 sines and roots are not always the
    nearest there, and these are. Two builds of torch differ by 1e-6 in the same table.
    """
    c1, c2 = (np.float32(clip) for clip in IDDPM_CLIPS)
    angle = np.float32(np.pi / 2) * np.arange(STEPS + 1, dtype=np.float32) / np.float32(STEPS) / (c2 + np.float32(1))
    abar = np.sin(angle.astype(np.float64)).astype(np.float32) ** 2
    u: np.ndarray = np.zeros(STEPS + 1, np.float32)
    for j in range(STEPS, 0, -1):
        u[j - 1] = np.sqrt((u[j] ** 2 + np.float32(1)) / max(abar[j - 1] / abar[j], c1) - np.float32(1))
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
    if steps < 1:
        raise UserError(f"noise levels for {steps} steps: valid: at least 1")
    first, last = sigma_max ** (1 / rho), sigma_min ** (1 / rho)
    return np.append((first + np.arange(steps) / max(steps - 1, 1) * (last - first)) ** rho, 0.0)


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
    return vp_sigma(1 + u * (VP_FIRST_TIME - 1))


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


def vp_c_noise(sigma: Array) -> Array:
    return (STEPS - 1) * vp_time(sigma)


def ve_c_noise(sigma: Array) -> Array:
    return namespace(sigma).log(sigma / 2)


def iddpm_c_noise(sigma: Array) -> Array:
    return (STEPS - 1 - iddpm_index(sigma)).astype(sigma.dtype)


class Setting(NamedTuple):
    """A column of EDM's table 1: what its networks predict and are given, and the noise levels they are made for."""

    prediction: str
    c_in: Callable[[Array], Array] | None  # None: c_in of (2), which depends on sigma_data
    c_noise: Callable[[Array], Array]
    times: str
    span: tuple[float, float]
    nearest: Callable[[Array], Array] = unchanged


VP_SPAN = (float(vp_sigma(np.array(1.0))), float(vp_sigma(np.array(VP_LAST_TIME))))
IDDPM_SPAN = (IDDPM_LARGEST, float(iddpm_table()[STEPS - 1]))
SETTINGS = {
    "edm": Setting("edm", None, quarter_log, "lognormal", (80.0, 0.002)),
    "vp": Setting("epsilon", unit_variance_scale(1.0), vp_c_noise, "vp", VP_SPAN),
    "ve": Setting("minus_epsilon", ones, ve_c_noise, "ve", VE_RANGE[::-1]),
    "iddpm": Setting("epsilon", unit_variance_scale(1.0), iddpm_c_noise, "iddpm", IDDPM_SPAN, iddpm_round),
}


@checked
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
    gamma = resolved("gamma", gamma, 5.0, weighting == "min_snr", "weighting 'min_snr'")
    scaled = chosen.c_in is None or "edm" in (predicts, weighting)
    sigma_data = resolved("sigma_data", sigma_data, 0.5, scaled, "process 'edm', prediction 'edm' or weighting 'edm'")
    p_mean = resolved("p_mean", p_mean, -1.2, times == "lognormal", "times 'lognormal'")
    p_std = resolved("p_std", p_std, 1.2, times == "lognormal", "times 'lognormal'")
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
        path=sigma_as_time,
        prediction=predicted,
        c_in=chosen.c_in or unit_variance_scale(sigma_data),
        c_noise=chosen.c_noise,
        sample_times=lambda keys: chosen.nearest(draw(keys)),
        weight=weight_of_time(weighting, sigma_as_time, predicted, chosen.span, gamma=gamma, sigma_data=sigma_data),
        span=chosen.span,
        uncertainty=weighting == "uncertainty",
        nearest=chosen.nearest,
    )
