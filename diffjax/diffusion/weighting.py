"""Weights of the squared error of a prediction, and the uncertainty that a model learns of it.

A loss w |f^ - f|² of the network's output f is, by equation (4) of `paths`, one of the data, and so of anything else:

    (1)  w |f^ - f|² = λ |x0^ - x0|²,   λ = w (Δ/σ)²

The published weights are rules for λ, each the plain squared error of some quantity g, for which λ = (Δ_g/σ)². Here
they are kept as Λ = λ σ², finite also where there is no noise, so that w = Λ / Δ². With SNR = (α/σ)²:

    (2)  uniform      w = 1                           the network's own output
         snr          Λ = α²                          the noise
         min_snr      Λ = min(α², γ σ²)               λ = min(SNR, γ), min-SNR 2303.09556
         edm          Λ = α² + σ²/sd²                 λ = SNR + 1/sd², the 1/c_out² of EDM 2206.00364
         velocity     Λ = Δ_v²,   Δ_v = α σ' - σ α'   the velocity, SiT 2401.08740
         likelihood   Λ = α |Δ_v| / σ                 λ = SNR D/σ² with the D of (5) in `paths`, SiT

so that for the noise min-SNR is min(1, γ/SNR), "velocity" is (D/σ)² and "likelihood" D/σ². Where α = 0 the error of
the data means nothing; min-SNR is 1 there, as in public code. The score's "uniform" is the error of σ s, which is the
noise's: that of the score itself is infinite at the data.

EDM2 (2312.02696) lets the model say how large it expects the error to be, as a log variance u of the noise level that
is trained with it and used for nothing else:

    (3)  w |f^ - f|² / exp(u) + u

is least for exp(u) = E[w |f^ - f|²], where all noise levels send gradients of equal size, whatever w: another w only
shifts u. Here "uncertainty" is (3) with the w of "uniform", for the preconditioned output of EDM the λ of EDM2.
"""

from collections.abc import Callable
from typing import Annotated

import jax
import jax.numpy as jnp
import numpy as np

from diffjax.diffusion.paths import Array, Point, Prediction, determinant, namespace, predicts_score, predicts_velocity
from diffjax.errors import UserError
from diffjax.options import Leaf, above, one_of

WEIGHTINGS = ("uniform", "snr", "min_snr", "edm", "velocity", "likelihood", "uncertainty")
Weighting = Annotated[str, Leaf("of the squared error", valid=one_of(WEIGHTINGS))]
Gamma = Annotated[float | None, Leaf("of the weighting min_snr; none: 5", valid=above(0))]
SigmaData = Annotated[float | None, Leaf("standard deviation of the data, where it is used; none: 0.5", valid=above(0))]
FEATURES = 64  # of each kind in `uncertainty`; together as many as in EDM2


def weights(weighting: str, c: Point, prediction: Prediction, *, gamma: float = 5.0, sigma_data: float = 0.5) -> Array:
    """w of (2) for the squared error of `prediction` at the points c; shaped like t.

    gamma is that of min_snr, sigma_data the sd of edm. Infinite or NaN where a weight has no meaning. UserError on an
    unknown name or a number that is not positive.
    """
    check_numbers(gamma, sigma_data)
    if weighting not in WEIGHTINGS:
        raise UserError(f"weighting {weighting!r} is unknown; valid: {', '.join(WEIGHTINGS)}")
    plain = weighting in ("uniform", "uncertainty")
    if plain and prediction is not predicts_score:
        return namespace(c.alpha).ones_like(c.alpha)
    squared = determinant(c, prediction) ** 2
    if plain or weighting == "snr":
        return c.alpha**2 / squared
    if weighting == "min_snr":
        xp = namespace(c.alpha)
        return xp.where(c.alpha == 0, 1.0, xp.minimum(c.alpha**2, gamma * c.sigma**2) / squared)
    if weighting == "edm":
        return (c.alpha**2 + (c.sigma / sigma_data) ** 2) / squared
    if weighting == "velocity":
        return determinant(c, predicts_velocity) ** 2 / squared
    return c.alpha / c.sigma * abs(determinant(c, predicts_velocity)) / squared


def check_numbers(gamma: float, sigma_data: float) -> None:
    """UserError unless both are positive and finite."""
    for option, value in {"gamma": gamma, "sigma_data": sigma_data}.items():
        if not 0 < value < np.inf:
            raise UserError(f"weighting {option} = {value!r}: valid: a positive number")


def weight_of_time(
    weighting: str,
    path: Callable[[Array], Point],
    prediction: Prediction,
    interval: tuple[float, float],
    **numbers: float,
) -> Callable[[Array], Array]:
    """`weights` as a function of t [b]. UserError when they are not finite at both ends of the training interval."""
    ends = np.array(interval, np.float64)
    with np.errstate(divide="ignore", invalid="ignore"):
        values = weights(weighting, path(ends), prediction, **numbers)
    for t, value in zip(ends, values):
        if not np.isfinite(value):
            raise UserError(f"weighting {weighting!r} is {value} at t = {t:g}, where this prediction is trained")
    return lambda t: weights(weighting, path(t), prediction, **numbers)


def init_uncertainty() -> dict[str, jax.Array]:
    """Parameters of `uncertainty`: zeros, for u = 0 and thus the loss without it."""
    return {"kernel": jnp.zeros(2 * FEATURES + 1, jnp.float32)}


def uncertainty(params: dict[str, jax.Array], log_sigma: jax.Array) -> jax.Array:
    """u of (3) at ln(σ/α) [b] (see `Process.log_sigma`): float32 [b].

    A linear map of cosines and sines of c = ln(σ/α)/4. EDM2 takes cosines of 128 random frequencies with standard
    deviation 2π and random phases, and a unit-norm weight without a constant. Here the frequencies are spread evenly
    up to 4π, which needs no stored numbers, and a constant lets the mean settle at once.
    """
    c = log_sigma.astype(jnp.float32)[:, None] / 4
    angles = c * jnp.asarray(4 * np.pi * np.arange(1, FEATURES + 1) / FEATURES, jnp.float32)
    features = jnp.concatenate([jnp.ones_like(c), jnp.cos(angles), jnp.sin(angles)], axis=-1)
    return jnp.sum(features * params["kernel"], axis=-1)
