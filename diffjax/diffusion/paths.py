"""Gaussian paths between noise and data, and what a network may predict on them.

A path mixes data x0 and noise eps ~ N(0, I), at a time t in which every process counts for itself:

    (1)  x = α x0 + σ eps

Along it the flow moves x with the velocity, and the score is the gradient of the log density:

    (2)  v = α' x0 + σ' eps,   s = -eps / σ

A network predicts f = p x0 + q eps for some p(t) and q(t): the data (1, 0), the noise (0, 1), the velocity (α', σ'),
the score (0, -1/σ), the v of progressive distillation (-σ, α) (2202.00512), the preconditioned output of EDM. With (1)
that makes two linear equations for the two unknowns, so that each prediction gives all others:

    (3)  x0 = (q x - σ f) / Δ,   eps = (α f - p x) / Δ,   Δ = α q - σ p

An error e of the data x0 at a given x is one of -(α/σ) e in the noise, so that the squared errors are related by

    (4)  |f^ - f|² = (Δ/σ)² |x0^ - x0|²,

which is the signal-to-noise ratio (α/σ)² for the noise and 1 for the data. Written with x and the score the velocity is

    (5)  v = r x + D s,   r = α'/α,   D = σ (r σ - σ').

Everything here works alike on float64 numpy arrays, from which samplers make their tables on the host, and on jax
arrays within a compiled loss.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

Array = Any  # a numpy or a jax array of floats


class Point(NamedTuple):
    """The coefficients of (1) and their derivatives with respect to t; each shaped like t."""

    alpha: Array
    sigma: Array
    alpha_dot: Array
    sigma_dot: Array


class Conversion(NamedTuple):
    """Coefficients from (x, f) to data, noise and velocity: x0 = x0_x x + x0_f f, and so on; each shaped like t."""

    x0_x: Array
    x0_f: Array
    eps_x: Array
    eps_f: Array
    velocity_x: Array
    velocity_f: Array


Path = Callable[[Array], Point]
Prediction = Callable[[Point], tuple[Array, Array]]


def namespace(t: Array) -> Any:
    """jax.numpy for jax arrays, numpy for all else."""
    return jnp if isinstance(t, jax.Array) else np


def sigma_as_time(t: Array) -> Point:
    """EDM (2206.00364): t is the standard deviation σ of the noise that is added to the data."""
    ones = namespace(t).ones_like(t)
    return Point(alpha=ones, sigma=t, alpha_dot=0 * ones, sigma_dot=ones)


def linear(t: Array) -> Point:
    """x = t x0 + (1 - t) eps: noise at t = 0, data at t = 1 (2209.03003; SiT 2401.08740, in the time of its code)."""
    ones = namespace(t).ones_like(t)
    return Point(alpha=t, sigma=1 - t, alpha_dot=ones, sigma_dot=-ones)


def gvp(t: Array) -> Point:
    """x = sin(π t / 2) x0 + cos(π t / 2) eps: a generalised variance-preserving path of SiT."""
    xp = namespace(t)
    alpha, sigma = xp.sin(np.pi / 2 * t), xp.sin(np.pi / 2 * (1 - t))  # zero at the end, which a cosine is not
    return Point(alpha, sigma, np.pi / 2 * sigma, -np.pi / 2 * alpha)


def vp(t: Array, beta_min: float = 0.1, beta_max: float = 20.0) -> Point:
    """The variance-preserving diffusion of Song et al. (2011.13456) with data at t = 1, as in SiT."""
    xp, u = namespace(t), 1 - t
    log_alpha = -(u**2) * (beta_max - beta_min) / 4 - u * beta_min / 2
    log_alpha_dot = u * (beta_max - beta_min) / 2 + beta_min / 2
    alpha, sigma = xp.exp(log_alpha), xp.sqrt(-xp.expm1(2 * log_alpha))
    return Point(alpha, sigma, alpha * log_alpha_dot, -(alpha**2) * log_alpha_dot / sigma)


def predicts_x0(c: Point) -> tuple[Array, Array]:
    ones = namespace(c.alpha).ones_like(c.alpha)
    return ones, 0 * ones


def predicts_epsilon(c: Point) -> tuple[Array, Array]:
    ones = namespace(c.alpha).ones_like(c.alpha)
    return 0 * ones, ones


def predicts_minus_epsilon(c: Point) -> tuple[Array, Array]:
    ones = namespace(c.alpha).ones_like(c.alpha)
    return 0 * ones, -ones


def predicts_velocity(c: Point) -> tuple[Array, Array]:
    return c.alpha_dot, c.sigma_dot


def predicts_score(c: Point) -> tuple[Array, Array]:
    return 0 * c.sigma, -1 / c.sigma


def predicts_v(c: Point) -> tuple[Array, Array]:
    return -c.sigma, c.alpha


PREDICTIONS: dict[str, Prediction] = {
    "x0": predicts_x0,
    "epsilon": predicts_epsilon,
    "velocity": predicts_velocity,
    "score": predicts_score,
    "v": predicts_v,
}


def determinant(c: Point, prediction: Prediction) -> Array:
    """Δ of (3)."""
    p, q = prediction(c)
    return c.alpha * q - c.sigma * p


def conversion(c: Point, prediction: Prediction) -> Conversion:
    """Equations (3) and (2) at the points c; infinite or NaN where (1) and the prediction do not determine them."""
    p, q = prediction(c)
    delta = determinant(c, prediction)
    return Conversion(
        x0_x=q / delta,
        x0_f=-c.sigma / delta,
        eps_x=-p / delta,
        eps_f=c.alpha / delta,
        velocity_x=(c.alpha_dot * q - c.sigma_dot * p) / delta,
        velocity_f=(c.sigma_dot * c.alpha - c.alpha_dot * c.sigma) / delta,
    )
