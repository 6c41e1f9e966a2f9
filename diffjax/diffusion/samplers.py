"""Samplers: from noise to data with any process, method and guidance, as one compiled loop.

    plan = samplers.plan(process, "edm", steps=18, max_steps=50)         on the host, float64
    x0 = jax.jit(samplers.sample, ...)(plan, denoise, x, noise)          compiled once per shape

A plan is a table with one row per call of the network (see `tables`), padded to that of `max_steps`, and the number of
rows in use. `sample` walks through it with one `lax` loop, so the network is compiled once, and another number of
steps, another weight of the guidance, another seed or another method of the same kind is only another value. Tables
are float64 until they meet x, whose dtype they then take. "dopri5" alone has no table: it chooses its steps as it goes.

`denoise(x, t, weight)` is the network with all else bound: x [b, ..., c] multiplied with the process's input scale, t
[b] its model time, weight the scalar guidance weight of the step -> [b, ..., c], or [b, ..., 2c] with the v of a
learned variance, which all but "ddpm" ignore. `noise(i)` gives the standard normal values [b, ..., c] of step i, an
int32 scalar, so that a sample depends on its key and the step alone.

| sampler | process | network calls of N steps |
|---|---|---|
| ddpm | discrete | N |
| ddim, dpmpp_2m | any | N |
| edm | any | 2N - 1; N with order 1 |
| euler | continuous | N |
| heun | continuous | 2N; one less where the flow at the end cannot be evaluated |
| euler_maruyama | from noise at t = 0 to data at 1 | N + 1; N without a last step |
| sde_heun | the same | 2N + 1; 2N without a last step |
| dopri5 | continuous | as many as its tolerance needs |

Below stand the single steps of a discrete process, which the tables of "ddpm" and "ddim" repeat, and the way back:

    (1)  ancestral step, DDPM algorithm 2:   x_{k-1} = mean + [k > 0] exp(log σ_k² / 2) z
    (2)  DDIM eq. 12, 16:   x_{k-1} = √ᾱ_{k-1} x̂0 + √(1-ᾱ_{k-1}-s²) eps^ + [k > 0] s z,
                            s = η √((1-ᾱ_{k-1})/(1-ᾱ_k)) √(1-ᾱ_k/ᾱ_{k-1})
    (3)  DDIM eq. 14, the step of η = 0 taken upwards:   x_{k+1} = √ᾱ_{k+1} x̂0 + √(1-ᾱ_{k+1}) eps^

η = 0 is deterministic; η = 1 has the variance β~ of the DDPM posterior.
"""

import inspect
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Annotated, Any

import jax
import jax.numpy as jnp
import numpy as np

from diffjax import rng
from diffjax.diffusion import adaptive, tables
from diffjax.diffusion.gaussian import GaussianDiffusion, at
from diffjax.diffusion.process import Process
from diffjax.diffusion.tables import AnyProcess, SamplerRecord, Table, Trajectory
from diffjax.errors import UserError
from diffjax.options import Leaf, above, at_least, check, options

Denoise = Callable[..., jax.Array]
Noise = Callable[[jax.Array], jax.Array]
Weight = float | Callable[[np.ndarray, np.ndarray], np.ndarray]


@partial(
    jax.tree_util.register_dataclass,
    data_fields=["table", "rows", "start", "start_noise"],
    meta_fields=["random", "learned_variance", "through_x0"],
)
@dataclass(frozen=True)
class Plan:
    """What `sample` does; a pytree, to be an argument of a jitted function. Build it with `plan`.

    table: padded. rows: how many of it are in use, int32. start, start_noise: the first state is start x plus
    start_noise times the noise number 0. Static: random, whether noise is used; learned_variance, whether the
    network chooses that noise's size; through_x0, whether a limit on x0 makes sense.
    """

    table: Table
    rows: Any
    start: Any
    start_noise: Any
    random: bool
    learned_variance: bool
    through_x0: bool


@partial(
    jax.tree_util.register_dataclass,
    data_fields=["weight", "start", "rtol", "atol"],
    meta_fields=["process", "max_attempts"],
)
@dataclass(frozen=True)
class AdaptivePlan:
    """The plan of "dopri5"; its process is evaluated where the sampler comes to look at it."""

    weight: Any
    start: Any
    rtol: Any
    atol: Any
    process: Process
    max_attempts: int


def plan(
    process: AnyProcess,
    sampler: str,
    steps: int = 0,
    *,
    max_steps: int | None = None,
    weight: Weight = 1.0,
    **given: Any,
) -> Plan | AdaptivePlan:
    """The plan of a sampler by name. UserError for what does not exist or has no meaning, with the reason.

    Args:
        process: a discrete process with all the steps it was trained with, or one in continuous time.
        sampler: one of SAMPLERS.
        steps: N of the table above; "dopri5" has none.
        max_steps: pad the table to that many steps, so that plans of fewer steps share a compilation.
        weight: of the guidance: a number, or a function of the noise level σ/α and the distance to the data (t/T; NaN
            where the process has none), both float64 [n], at the start of each step -> float64 [n].
        given: options of the sampler; see the function of its name in `tables`, and `adaptive_plan` for "dopri5".
    """
    if sampler not in SAMPLERS:
        raise UserError(f"sampler {sampler!r} is unknown; valid: {', '.join(SAMPLERS)}")
    record = SAMPLERS[sampler]
    if record.adaptive:
        if steps:
            raise UserError(f"steps = {steps}: sampler {sampler!r} chooses its steps as it goes; valid: 0")
        return record.adaptive(process, weight, **accepted(record.adaptive, sampler, given, 2))
    assert record.trajectory
    assert record.calls
    if steps < 1 or (max_steps is not None and steps > max_steps):
        raise UserError(f"{steps} sampling steps: valid: 1 to {max_steps or 'as many as the process has'}")
    with np.errstate(divide="ignore", invalid="ignore"):
        made = record.trajectory(process, steps, **accepted(record.trajectory, sampler, given, 2))
    table = made.table._replace(weight=step_weights(process, made, weight)[made.step])
    check_finite(sampler, made, table)
    rows = len(made.step)
    room = max(rows, record.calls(max_steps or 1)) - rows
    return Plan(
        table=jax.tree.map(lambda column: np.pad(column, (0, room)), table),
        rows=np.int32(rows),
        start=np.float64(made.start),
        start_noise=np.float64(made.start_noise),
        random=bool(np.any(table.noise != 0) or made.start_noise != 0),
        learned_variance=bool(np.any(table.log_high != 0)),
        through_x0=record.through_x0,
    )


def adaptive_plan(
    process: AnyProcess,
    weight: Weight = 1.0,
    *,
    rtol: Annotated[float, Leaf("relative error of a step", "watch", above(0))] = 1e-3,
    atol: Annotated[float, Leaf("absolute error of a step", "watch", above(0))] = 1e-6,
    max_attempts: Annotated[int, Leaf("steps after which a sample is given up", "watch", at_least(1))] = 1000,
) -> AdaptivePlan:
    """Dormand and Prince's 5(4) pair along the flow through the span, each sample with steps of its own.

    rtol, atol: of the error of a step. A sample that is not there after max_attempts steps becomes NaN.
    """
    known = tables.continuous(process, "dopri5")
    if not isinstance(weight, int | float):
        raise UserError("sampler 'dopri5' chooses its steps as it goes; valid: a guidance weight that is one number")
    if not (rtol > 0 and atol > 0 and isinstance(max_attempts, int) and max_attempts > 0):
        raise UserError(
            f"rtol {rtol}, atol {atol}, max_attempts {max_attempts}: valid: above 0, the last a whole number"
        )
    start = max(1.0, float(known.grid(np.array(known.span[:1], np.float64)).sigma[0]))
    for end in known.span:
        grid = known.grid(np.array([end], np.float64))
        if not np.isfinite([grid.model_time, grid.conversion.velocity_x, grid.conversion.velocity_f]).all():
            raise UserError(f"sampler 'dopri5' divides by zero at t = {end:g}; valid: a span that ends before it")
    return AdaptivePlan(np.float64(weight), np.float64(start), np.float64(rtol), np.float64(atol), known, max_attempts)


def accepted(make: Callable, sampler: str, given: dict[str, Any], leading: int) -> dict[str, Any]:
    """The given options, checked, if they are all keywords of `make`, after its leading arguments; else UserError."""
    valid = list(inspect.signature(make).parameters)[leading:]
    known = options(make)
    if unknown := [name for name in given if name not in valid]:
        raise UserError(f"sampler {sampler!r} has no option {unknown[0]!r}; valid: {', '.join(valid)}")
    return {
        name: check(f"sampler {sampler!r}: {name}", known[name], value) if name in known else value
        for name, value in given.items()
    }


def step_weights(process: AnyProcess, made: Trajectory, weight: Weight) -> np.ndarray:
    """The guidance weight of each step, float64 [steps]."""
    if isinstance(weight, int | float):
        return np.full(len(made.schedule.t), float(weight))
    with np.errstate(divide="ignore"):
        weights = weight(made.schedule.sigma / made.schedule.alpha, tables.noise_time(process, made.schedule))
    if not np.isfinite(weights).all():
        raise UserError("the guidance weight depends on t/T, which this process has not; valid: constant, interval")
    return weights


def check_finite(sampler: str, made: Trajectory, table: Table) -> None:
    """UserError where a row of the table divides by zero."""
    bad = ~np.all([np.isfinite(column) for column in jax.tree.leaves(table)], axis=0)
    if bad.any():
        raise UserError(
            f"sampler {sampler!r} divides by zero in its step from t = {made.schedule.t[made.step[bad][0]]:g}, where "
            "the network's prediction does not tell data and noise apart; valid: a span within which it does"
        )


def evaluations(what: Plan | str, steps: int | None = None) -> int:
    """How often the network is called: by a plan, exactly; by a sampler's name in N steps, at most, which is what the
    table above says for the default options."""
    if isinstance(what, Plan):
        return int(what.rows)
    calls = SAMPLERS[what].calls if what in SAMPLERS else None
    if calls is None or steps is None:
        raise UserError(f"network calls of {what!r} are not known beforehand; valid: {', '.join(known_steps())}")
    return calls(steps)


def known_steps() -> list[str]:
    """The samplers whose steps are known beforehand."""
    return [name for name, record in SAMPLERS.items() if record.trajectory]


def through_x0() -> list[str]:
    """The samplers that go through predicted data."""
    return [name for name, record in SAMPLERS.items() if record.through_x0]


def can_clip(plan: Plan | AdaptivePlan) -> bool:
    """Whether the sampler goes through predicted data, so that they can be limited."""
    return isinstance(plan, Plan) and plan.through_x0


def sample(plan: Plan | AdaptivePlan, denoise: Denoise, x: jax.Array, noise: Noise, clip: bool = False) -> jax.Array:
    """Data [b, ..., c] in the dtype of x from x ~ N(0, I); call it in a jitted function that takes the plan.

    clip limits the predicted data to [-1, 1]; it suits pixels, never latents.
    """
    if clip and not can_clip(plan):
        raise UserError(f"clip limits x0, which this sampler does not go through; valid: {', '.join(through_x0())}")
    if isinstance(plan, AdaptivePlan):
        return follow_flow(plan, denoise, x)
    table = jax.tree.map(lambda column: in_dtype_of(x, column), plan.table)
    state = in_dtype_of(x, plan.start) * x
    if plan.random:
        state += in_dtype_of(x, plan.start_noise) * noise(jnp.int32(0)).astype(x.dtype)

    def advance(i: jax.Array, carry: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        row = jax.tree.map(lambda column: column[i], table)
        state, memory = carry
        output = call(denoise, row.model_time, row.input_scale * state, row.weight, plan.learned_variance)
        x0, eps = read(row, state, output[..., : x.shape[-1]], clip)
        after, memory = (mixed(mix, state, x0, eps, memory) for mix in (row.state, row.memory))
        if plan.random:
            size = row.noise * learned_size(row, output, x.shape[-1]) if plan.learned_variance else row.noise
            after += size * noise(row.slot).astype(x.dtype)
        return after, memory

    return jax.lax.fori_loop(0, plan.rows, advance, (state, jnp.zeros_like(state)))[0]


def in_dtype_of(x: jax.Array, column: Any) -> jax.Array:
    """Numbers of a plan ready to meet x; those that count things stay integers."""
    array = jnp.asarray(column)
    return array if jnp.issubdtype(array.dtype, jnp.integer) else array.astype(x.dtype)


def call(denoise: Denoise, model_time: jax.Array, x: jax.Array, weight: jax.Array, learned_variance: bool) -> jax.Array:
    """The network's output at one time for the whole batch, in the dtype of x; UserError if its channels do not fit."""
    output = denoise(x, jnp.broadcast_to(model_time, x.shape[:1]), weight)
    valid = [count * x.shape[-1] for count in ((2,) if learned_variance else (1, 2))]
    if output.shape[-1] not in valid:
        raise UserError(
            f"the sampler needs {' or '.join(map(str, valid))} output channels for {x.shape[-1]} input channels, "
            f"the model gives {output.shape[-1]}"
        )
    return output.astype(x.dtype)


def read(row: Table, x: jax.Array, prediction: jax.Array, clip: bool) -> tuple[jax.Array, jax.Array]:
    """The data and the noise in x that the network's prediction stands for."""
    x0 = row.x0_x * x + row.x0_f * prediction
    if not clip:
        return x0, row.eps_x * x + row.eps_f * prediction
    x0 = jnp.clip(x0, -1.0, 1.0)
    return x0, (x - row.alpha * x0) / row.sigma


def mixed(mix: tables.Mix, x: jax.Array, x0: jax.Array, eps: jax.Array, memory: jax.Array) -> jax.Array:
    """Equation (1) of `tables` without its noise."""
    return mix.x * x + mix.x0 * x0 + mix.eps * eps + mix.memory * memory


def learned_size(row: Table, output: jax.Array, channels: int) -> jax.Array:
    """σ of equation (4) of `gaussian`, from the second half of the output's channels."""
    fraction = (output[..., channels:] + 1.0) / 2.0
    return jnp.exp(0.5 * (fraction * row.log_high + (1.0 - fraction) * row.log_low))


def follow_flow(plan: AdaptivePlan, denoise: Denoise, x: jax.Array) -> jax.Array:
    """The end of the flow from start x through the span of the process, with steps chosen for each sample."""
    start, rtol, atol, weight = (in_dtype_of(x, value) for value in (plan.start, plan.rtol, plan.atol, plan.weight))

    def velocity(t: Any, state: jax.Array) -> jax.Array:
        grid = jax.tree.map(lambda leaf: leaf.reshape(-1, *(1,) * (x.ndim - 1)), plan.process.grid(t))
        output = denoise(grid.input_scale * state, grid.model_time.reshape(-1), weight).astype(x.dtype)
        return grid.conversion.velocity_x * state + grid.conversion.velocity_f * output[..., : x.shape[-1]]

    return adaptive.dopri5(velocity, start * x, plan.process.span, rtol, atol, plan.max_attempts)


def initial_noise(keys: jax.Array, shape: Sequence[int]) -> jax.Array:
    """Where sampling starts: standard normal float32 [b, *shape], sample i from keys[i] alone."""
    return rng.normal(rng.fold_name(keys, "x_T"), shape)


def step_noise(keys: jax.Array, shape: Sequence[int]) -> Noise:
    """The `noise` of a sampler: standard normal float32 [b, *shape] of a step, sample i from (keys[i], step) alone."""
    streams = rng.fold_name(keys, "noise")
    return lambda k: rng.normal(rng.fold(streams, k), shape)


def ddim_reverse(process: GaussianDiffusion, denoise: Denoise, x: jax.Array, *, clip: bool = False) -> jax.Array:
    """The x_{K-1} from which deterministic DDIM returns to x = x_0 [b, ..., c]: K - 1 steps of (3)."""

    def step(k: jax.Array, x: jax.Array) -> jax.Array:
        steps = jnp.full(x.shape[0], k)
        return ddim_reverse_step(process, denoise(x, process.model_time(steps)), x, steps, clip=clip)

    return jax.lax.fori_loop(0, process.num_steps - 1, step, x.astype(jnp.float32))


def ddpm_step(
    process: GaussianDiffusion,
    model_output: jax.Array,
    xt: jax.Array,
    k: jax.Array,
    z: jax.Array,
    *,
    clip: bool = False,
) -> jax.Array:
    """x_{k-1} from xt = x_k [b, ..., c], the network's output there, k [b] int32 and noise z: equation (1)."""
    p = process.p_mean_variance(model_output, xt, k, clip)
    return p.mean + not_first(k, xt) * jnp.exp(0.5 * p.log_variance) * z


def ddim_step(
    process: GaussianDiffusion,
    model_output: jax.Array,
    xt: jax.Array,
    k: jax.Array,
    z: jax.Array | None = None,
    *,
    eta: float = 0.0,
    clip: bool = False,
) -> jax.Array:
    """x_{k-1} from xt = x_k [b, ..., c], the network's output there and k [b] int32: equation (2). A v is ignored."""
    x0 = process.p_mean_variance(model_output, xt, k, clip).x0
    eps = process.eps_from_x0(xt, k, x0)  # of the clipped x0, as in the published samplers
    now, before = at(process.alphas_cumprod, k, xt), at(process.alphas_cumprod_prev, k, xt)
    sigma = eta * jnp.sqrt((1.0 - before) / (1.0 - now)) * jnp.sqrt(1.0 - now / before)
    mean = x0 * jnp.sqrt(before) + jnp.sqrt(1.0 - before - sigma**2) * eps
    return mean if z is None else mean + not_first(k, xt) * sigma * z


def ddim_reverse_step(
    process: GaussianDiffusion, model_output: jax.Array, xt: jax.Array, k: jax.Array, *, clip: bool = False
) -> jax.Array:
    """x_{k+1} from xt = x_k [b, ..., c], the network's output there and k [b] int32: equation (3)."""
    x0 = process.p_mean_variance(model_output, xt, k, clip).x0
    eps = process.eps_from_x0(xt, k, x0)
    after = at(process.alphas_cumprod_next, k, xt)
    return x0 * jnp.sqrt(after) + jnp.sqrt(1.0 - after) * eps


def not_first(k: jax.Array, like: jax.Array) -> jax.Array:
    """0 where k is 0, which ends the chain without noise, else 1: float32 [b, 1, ...]."""
    return (k != 0).astype(jnp.float32).reshape(-1, *(1,) * (like.ndim - 1))


SAMPLERS: dict[str, SamplerRecord] = {
    "ddpm": SamplerRecord(tables.ddpm, calls=lambda steps: steps, through_x0=True),
    "ddim": SamplerRecord(tables.ddim, calls=lambda steps: steps, through_x0=True),
    "edm": SamplerRecord(tables.edm, calls=lambda steps: 2 * steps - 1, through_x0=True),
    "dpmpp_2m": SamplerRecord(tables.dpmpp_2m, calls=lambda steps: steps, through_x0=True),
    "euler": SamplerRecord(tables.euler, calls=lambda steps: steps),
    "heun": SamplerRecord(tables.heun, calls=lambda steps: 2 * steps),
    "euler_maruyama": SamplerRecord(tables.euler_maruyama, calls=lambda steps: steps + 1),
    "sde_heun": SamplerRecord(tables.sde_heun, calls=lambda steps: 2 * steps + 1),
    "dopri5": SamplerRecord(adaptive=adaptive_plan),
}
