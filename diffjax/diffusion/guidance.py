"""Guidance: extrapolate from the prediction of a weaker denoiser to that of a stronger one.

    (1)  f_w = f_0 + w (f_1 - f_0)

With classifier-free guidance (2207.12598 eq. 6) f_1 is the network given a label c and f_0 the same network given none
(∅), as labels dropped at random in training have taught it; with autoguidance (2406.02507 eq. 3) f_0 is a smaller or
less trained network given the same label. w = 1 is no guidance (papers also write 1 + w). It acts on predictions of
noise, data, velocity and score alike.

The weight belongs to the step of the sampler, which hands it over with each call. It is a number or follows

    (2)  w(t) = 1 + (s - 1) (1 - cos(π (1 - t/T)^p)) / 2                    power cosine, MDT 2303.14389
    (3)  w(τ) = s where low < τ <= high, else 1,   τ = σ/α                  interval, 2404.07724

In (3) both ends, unless 0 or infinite, are moved to the nearest noise level of the schedule, so that w is constant
within a step; where w = 1 the network f_0 need not be called.
"""

from collections.abc import Callable
from typing import Annotated

import jax
import jax.numpy as jnp
import numpy as np

from diffjax.diffusion.samplers import Denoise, Weight
from diffjax.errors import UserError
from diffjax.options import Leaf, Value, above, at_least, checked, options

DenoiseConditionally = Callable[[jax.Array, jax.Array, jax.Array], jax.Array]
DenoiseBoth = Callable[[jax.Array, jax.Array], tuple[jax.Array, jax.Array]]
CALLS = ("one", "two")


def classifier_free(
    denoise: DenoiseConditionally,
    conditions: jax.Array,
    null: jax.Array | np.ndarray | int,
    *,
    channels: int | None = None,
    calls: str = "one",
    skip: bool = False,
) -> Denoise:
    """A guided `denoise(x, t, weight)` from `denoise(x, t, y)`, for conditions [b, ...] and the one of "none" [...].

    Guided are the first `channels` output channels, by default as many as x has; the rest (the variance output v) is
    the conditional one. channels=3 on four-channel latents is what the published DiT, SiT and MDT figures were sampled
    with: keep it for those alone. calls: "one" on the doubled batch, the conditional row of an example first, or
    "two", which need less memory. skip: leave out the unconditional call where the weight is 1, at the price of
    compiling the network twice; worth it for weights that are 1 in many steps (3).
    """

    def conditional(x: jax.Array, t: jax.Array) -> jax.Array:
        return denoise(x, t, conditions)

    def one_call(x: jax.Array, t: jax.Array) -> tuple[jax.Array, jax.Array]:
        # The two rows of an example stay neighbours, so that a batch split over devices needs no exchange.
        both = jnp.stack([conditions, without], axis=1).reshape(-1, *conditions.shape[1:])
        output = denoise(jnp.repeat(x, 2, axis=0), jnp.repeat(t, 2), both)
        return output[0::2], output[1::2]

    def two_calls(x: jax.Array, t: jax.Array) -> tuple[jax.Array, jax.Array]:
        return denoise(x, t, conditions), denoise(x, t, without)

    without = jnp.broadcast_to(jnp.asarray(null, conditions.dtype), conditions.shape)
    if calls not in CALLS:
        raise UserError(f"guidance with {calls!r} calls: valid: {', '.join(CALLS)}")
    return guided(conditional, one_call if calls == "one" else two_calls, channels, skip)


def autoguidance(denoise: Denoise, worse: Denoise, *, channels: int | None = None, skip: bool = False) -> Denoise:
    """A guided `denoise(x, t, weight)` from two `denoise(x, t)`, of which `worse` is the one to get away from.

    Give both the same labels. The second may be another set of parameters or another model. channels, skip: as for
    `classifier_free`.
    """
    return guided(denoise, lambda x, t: (denoise(x, t), worse(x, t)), channels, skip)


def guided(denoise: Denoise, both: DenoiseBoth, channels: int | None, skip: bool) -> Denoise:
    """Equation (1) of `both(x, t)` -> (f_1, f_0), or with `skip` just `denoise(x, t)`, f_1, where w = 1."""

    def extrapolated(x: jax.Array, t: jax.Array, weight: float | jax.Array) -> jax.Array:
        better, worse = both(x, t)
        return combine(better, worse, weight, x.shape[-1] if channels is None else channels)

    def call(x: jax.Array, t: jax.Array, weight: float | jax.Array) -> jax.Array:
        if not skip:
            return extrapolated(x, t, weight)
        return jax.lax.cond(weight == 1, lambda x, t, w: denoise(x, t), extrapolated, x, t, weight)

    return call


def combine(better: jax.Array, worse: jax.Array, weight: float | jax.Array, channels: int | None = None) -> jax.Array:
    """Equation (1) on the first `channels` of [b, ..., c] (None: all); the others are those of `better`."""
    base = worse[..., :channels]
    result = base + weight * (better[..., :channels] - base)
    return result if channels is None else jnp.concatenate([result, better[..., channels:]], axis=-1)


def weights(kind: str, scale: float, /, **numbers: Value) -> Weight:
    """The weight for `samplers.schedule`: one of SCHEDULES with its options.

    UserError for an unknown kind, for options that it lacks and for values without meaning.
    """
    if kind not in SCHEDULES:
        raise UserError(f"guidance weight {kind!r} is unknown; valid: {', '.join(SCHEDULES)}")
    known = options(SCHEDULES[kind])
    if unknown := [name for name in numbers if name not in known]:
        raise UserError(f"guidance weight {kind!r} with {unknown[0]}: valid: numbers for {list(known)}")
    if not np.isfinite(scale):
        raise UserError(f"guidance {scale}: valid: a finite number, 1 for none")
    return SCHEDULES[kind](scale, **numbers)


def constant_weight(scale: float) -> Weight:
    return scale


@checked
def power_cosine_weight(
    scale: float, *, power: Annotated[float, Leaf("large: guide late; small: throughout", "watch", above(0))] = 4.0
) -> Weight:
    return lambda level, time: power_cosine(time, scale, power)


@checked
def interval_weight(
    scale: float,
    *,
    low: Annotated[float, Leaf("lowest noise level, sigma / alpha, that is guided", "watch", at_least(0))] = 0.0,
    high: Annotated[float | None, Leaf("highest one; none: all", "watch", above(0))] = None,
) -> Weight:
    high = np.inf if high is None else high
    if low >= high:
        raise UserError(f"guidance interval: low = {low} is not below high = {high}; valid: 0 to below high")
    return lambda level, time: interval(level, scale, low, high)


# How the weight changes over the steps; the annotated parameters are the options.
SCHEDULES: dict[str, Callable[..., Weight]] = {
    "constant": constant_weight,
    "power_cosine": power_cosine_weight,
    "interval": interval_weight,
}


def power_cosine(time: np.ndarray, scale: float, power: float) -> np.ndarray:
    """Equation (2) at time = t/T float64 [n], 0 at the data: a large power guides late, a small one throughout."""
    return 1 + (scale - 1) * (1 - np.cos(np.pi * (1 - time) ** power)) / 2


def interval(level: np.ndarray, scale: float, low: float, high: float) -> np.ndarray:
    """Equation (3) at the noise levels of a schedule, float64 [n]."""
    first, last = (float(level[np.argmin(np.abs(level - end))]) if 0 < end < np.inf else end for end in (low, high))
    return np.where((first < level) & (level <= last), scale, 1.0)
