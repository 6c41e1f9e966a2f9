"""Exponential moving averages of the parameters (float32, sharded alike), and post-hoc EMAs of any length.

After update n (from 1) to parameters θ_n an average moves by its rate 1 - β_n:

    (1)  e_n = β_n e_{n-1} + (1 - β_n) θ_n

With batches of b images, t = n b of them seen, three rules for β_n are here. A constant β, with a length of at most the
part r of the updates so far, so that a run of fewer than a few times 1 / (1 - β) updates forgets its initial
parameters too (r = 0: no such limit, as published recipes have it):

    (1a)  1 - β_n = max(1 - β, 1 / (1 + r n)).

The half-life H in images of EDM (2206.00364), which at first is only the part r of the images seen,

    (2)  β_n = 2^(-b / min(H, r t)).

And the power function of EDM2 (2312.02696), whose average up to t weighs the parameters of time τ by the profile

    (3)  p(τ) = (γ + 1) τ^γ / t^(γ+1),  0 < τ <= t;   β_n = (1 - 1/n)^(γ+1)

exactly, when θ(τ) is constant between updates: β_n is the part of the profile up to t - b. The first update forgets
what the average started from. The profile's standard deviation relative to t names its length,

    (4)  σ_rel² = (γ + 1) / ((γ + 2)² (γ + 3)),

a cubic in γ, γ³ + 7 γ² + (16 - q) γ + (12 - q) = 0 with q = σ_rel^-2, whose largest root is meant.

A run keeps power-function EMAs of different γ, usually two, and snapshots of them. Their profiles p_i, each up to its
own t_i, can be combined to nearly that of any other average: the coefficients x that minimise |Σ x_i p_i - p|² solve

    (5)  Σ_j <p_i, p_j> x_j = <p_i, p>,
    (6)  <p_a, p_b> = (γ_a + 1) (γ_b + 1) / (γ_a + γ_b + 1) (t_a / t_b)^γ_b / t_b   for t_a <= t_b,

and are divided by their sum, so that constant parameters are their own average. By Cauchy and Schwarz the error of the
average is at most |Σ x_i p_i - p| times the norm of the parameters' path.
"""

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from diffjax.errors import UserError
from diffjax.options import Leaf, Valid, at_least, between, check, one_of, options

Rate = Callable[[Any], Any]  # the number of an update, int32 and from 1 -> 1 - β


class Rates(NamedTuple):
    """The rates of the state's averages: of `ema`, and of the power-function EMAs by name."""

    ema: Rate
    power_emas: Mapping[str, Rate] = {}


class Profile(NamedTuple):
    """A power-function average: its last time (in any unit that all share) and its relative length."""

    t: float
    sigma_rel: float


def update(average: Any, params: Any, rate: Any) -> Any:
    """(1) leaf by leaf, with rate = 1 - β."""
    return jax.tree.map(lambda a, p: a + rate * (p - a), average, params)


def constant(decay: float, rampup: float = 0.0) -> Rate:
    """(1a)."""
    if not rampup:
        return lambda number: 1.0 - decay
    return lambda number: jnp.maximum(1.0 - decay, 1.0 / (1.0 + rampup * number))


def halflife(images: float, rampup: float, batch_size: int) -> Rate:
    """(2); `rampup` = 0 starts with the full half-life."""

    def rate(number: Any) -> Any:
        halvings = batch_size / images
        return -jnp.expm1(-math.log(2.0) * (jnp.maximum(halvings, 1.0 / (rampup * number)) if rampup else halvings))

    return rate


def power(sigma_rel: float) -> Rate:
    """(3). Accurate at any number of updates, where β itself would be 1 in float32."""
    exponent = gamma_of(sigma_rel) + 1.0
    return lambda number: -jnp.expm1(exponent * jnp.log1p(-1.0 / number))


def initial_share(rate: Rate, updates: int) -> float:
    """The weight that the initial parameters still have in an average after so many updates: Π β_n, from 1 to 0."""
    moved = np.broadcast_to(np.asarray(rate(np.arange(1, updates + 1)), np.float64), (updates,))
    return float(np.prod(1.0 - moved))


def initial_share_caveat(rate: Rate, updates: int) -> str:
    """One line where an average still holds 1 % or more of the initial parameters; "" where it does not."""
    share = initial_share(rate, updates)
    if share < 0.01:
        return ""
    return (
        f"after {updates:,} updates the average still holds {share:.0%} of the initial parameters; --weights=params "
        "uses the last ones; a shorter average or one that ramps up (ema.decay, ema.decay_rampup) forgets them sooner"
    )


def sigma_rel_of(gamma: Any) -> Any:
    """(4), float64."""
    gamma = np.asarray(gamma, np.float64)
    return np.sqrt((gamma + 1) / ((gamma + 2) ** 2 * (gamma + 3)))


def gamma_of(sigma_rel: float) -> float:
    """The γ >= 0 of a relative length, by (4). UserError for a length that no such γ has."""
    if not 0 < sigma_rel <= LONGEST:
        raise UserError(f"sigma_rel = {sigma_rel}: valid: above 0 to {LONGEST:.4f}, the mean over all updates")
    q = float(sigma_rel) ** -2
    return float(np.max(np.roots([1.0, 7.0, 16.0 - q, 12.0 - q]).real))


def solve_weights(stored: Sequence[Profile], wanted: Profile) -> np.ndarray:
    """(5): float64 coefficients of the stored averages, with sum 1, that come nearest to the wanted one."""
    t, gamma = _columns(stored)
    gram, target = _inner(t[:, None], gamma[:, None], t, gamma), _inner(t, gamma, *_columns([wanted]))
    try:
        coefficients = np.linalg.solve(gram, target)
    except np.linalg.LinAlgError as error:
        raise UserError("two of the stored averages are the same, of one length and time") from error
    return coefficients / coefficients.sum()


def profile_error(stored: Sequence[Profile], wanted: Profile, coefficients: np.ndarray) -> float:
    """|Σ x_i p_i - p| / |p|: 0 when the combination has the wanted profile."""
    (t, gamma), (t_wanted, gamma_wanted) = _columns(stored), _columns([wanted])
    gram, target = _inner(t[:, None], gamma[:, None], t, gamma), _inner(t, gamma, t_wanted, gamma_wanted)
    [norm] = _inner(t_wanted, gamma_wanted, t_wanted, gamma_wanted)
    square = coefficients @ gram @ coefficients - 2 * coefficients @ target + norm
    return float(np.sqrt(max(square, 0.0) / norm))


def combine(trees: Iterable[Any], coefficients: Iterable[float]) -> Any:
    """Σ x_i tree_i of numpy arrays, in float64; takes the trees one by one."""
    total: Any = None
    for tree, coefficient in zip(trees, coefficients):
        if total is None:
            total = jax.tree.map(lambda leaf: np.zeros(leaf.shape), tree)
        jax.tree.map(lambda sum_, leaf, x=coefficient: np.add(sum_, x * np.float64(leaf), out=sum_), total, tree)
    return total


@dataclass(frozen=True)
class Average:
    """A kind of average: its rate, from the config's section and the batch size, and the fields that it alone reads."""

    build: Callable[["Ema", int], Rate]
    reads: tuple[str, ...]


def _halflife(ema: "Ema", batch_size: int) -> Rate:
    if not ema.halflife_images:
        raise UserError("ema.halflife_images = 0: ema.kind = 'halflife' needs a half-life above 0")
    return halflife(ema.halflife_images, ema.rampup, batch_size)


AVERAGES: dict[str, Average] = {
    "constant": Average(lambda ema, batch_size: constant(ema.decay, ema.decay_rampup), ("decay", "decay_rampup")),
    "halflife": Average(_halflife, ("halflife_images", "rampup")),
}
LONGEST = float(sigma_rel_of(0.0))  # the relative length of the mean over all updates


def _different_lengths(lengths: tuple[float, ...]) -> bool:
    exact = all(0 < length <= LONGEST and float(_name(length)) == length for length in lengths)
    return exact and len(set(lengths)) == len(lengths)


LENGTHS = Valid(lambda: f"different lengths above 0 to {LONGEST:.4f}, of up to three decimals", _different_lengths)


@dataclass(frozen=True)
class Ema:
    """Section `ema` of a config."""

    kind: Annotated[str, Leaf("how the average of the parameters forgets", valid=one_of(AVERAGES))] = "constant"
    decay: Annotated[float, Leaf("constant: β of equation (1)", valid=between(0, 1))] = 0.9999
    decay_rampup: Annotated[
        float,
        Leaf(
            "constant: r of equation (1a), the longest average as part of the updates", valid=at_least(0, zero="none")
        ),
    ] = 0.0
    halflife_images: Annotated[float, Leaf("halflife: H of equation (2), in images", valid=at_least(0))] = 0.0
    rampup: Annotated[float, Leaf("halflife: at most this part of the images seen", valid=at_least(0, zero="none"))] = (
        0.05
    )
    sigma_rel: Annotated[
        tuple[float, ...], Leaf("relative lengths of power-function EMAs to keep as well", valid=LENGTHS)
    ] = ()
    snapshot_every_steps: Annotated[
        int,
        Leaf("permanent snapshots of the power-function EMAs, for EMAs of any length", valid=at_least(0, zero="never")),
    ] = 0

    def unread(self) -> dict[str, str]:
        """The leaves that the kind of average does not read, and why."""
        others = {leaf for average in AVERAGES.values() for leaf in average.reads} - set(AVERAGES[self.kind].reads)
        return dict.fromkeys(others, f"with ema.kind = {self.kind}")


def rates(ema: Ema, batch_size: int) -> Rates:
    """The averages that a config asks for. UserError for what is not valid or contradicts itself."""
    for name, value in vars(ema).items():
        check(f"ema.{name}", options(Ema)[name], value)
    if bool(ema.sigma_rel) != bool(ema.snapshot_every_steps):
        raise UserError(
            f"ema.sigma_rel = {ema.sigma_rel}, ema.snapshot_every_steps = {ema.snapshot_every_steps}: power-function "
            "EMAs need snapshots, every 1 or more steps, and snapshots need power-function EMAs, such as (0.05, 0.1)"
        )
    power_emas = {name: power(length) for name, length in by_name(ema.sigma_rel).items()}
    return Rates(AVERAGES[ema.kind].build(ema, batch_size), power_emas)


def by_name(sigma_rel: Iterable[float]) -> dict[str, float]:
    """{"0.050": 0.05, ...}: names of the power-function EMAs in checkpoints, and their relative lengths."""
    return {_name(length): length for length in sigma_rel}


def _name(length: float) -> str:
    return f"{length:.3f}"


def _columns(profiles: Sequence[Profile]) -> tuple[np.ndarray, np.ndarray]:
    """Times and exponents."""
    return np.array([p.t for p in profiles], np.float64), np.array([gamma_of(p.sigma_rel) for p in profiles])


def _inner(t_a: np.ndarray, gamma_a: np.ndarray, t_b: np.ndarray, gamma_b: np.ndarray) -> np.ndarray:
    """(6), elementwise."""
    first, last = np.minimum(t_a, t_b), np.maximum(t_a, t_b)
    gamma_of_last = np.where(t_a < t_b, gamma_b, gamma_a)
    overlap = (gamma_a + 1) * (gamma_b + 1) / (gamma_a + gamma_b + 1)
    return overlap * (first / last) ** gamma_of_last / last
