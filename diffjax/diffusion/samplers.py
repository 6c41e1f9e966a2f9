"""Samplers: from noise to data with any process, method and guidance, as one compiled loop.

    schedule = samplers.schedule(process, "edm", steps=18, max_steps=50)     on the host, float64
    x0 = jax.jit(samplers.sample, ...)(schedule, denoise, x, noise)          compiled once per shape

A sampler schedule is a table with one row per call of the network (see `tables`), padded to that of `max_steps`, and
the number of rows in use. `sample` walks through it with one `lax` loop, so the network is compiled once, and another
number of steps, another weight of the guidance, another seed or another method of the same kind is only another value.
Tables are float64 until they meet x, whose dtype they then take. "dopri5" alone has no table: it chooses its steps as
it goes.

`denoise(x, t, weight)` is the network with all else bound: x [b, ..., c] multiplied with the process's c_in, t [b] its
c_noise, weight the scalar guidance weight of the step -> [b, ..., c], or [b, ..., 2c] with the v of a learned variance,
which all but "ddpm" ignore. `noise(i)` gives the standard normal values [b, ..., c] of step i, an int32 scalar, so that
a sample depends on its key and the step alone.

| sampler | process | NFE of N steps |
|---|---|---|
| ddpm | discrete | N |
| ddim, dpmpp_2m | any | N |
| edm | any | 2N - 1; N with order 1 |
| euler | continuous | N |
| heun | continuous | 2N; one less where the flow at the end cannot be evaluated |
| euler_maruyama | from noise at t = 0 to data at 1 | N + 1; N without a last step |
| sde_heun | the same | 2N + 1; 2N without a last step |
| dopri5 | continuous | as many as its tolerance needs |
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Annotated, Any

import jax
import jax.numpy as jnp
import numpy as np

from diffjax import rng
from diffjax.diffusion import adaptive, sigma_samplers, stochastic_samplers, time_samplers
from diffjax.diffusion.process import Process
from diffjax.diffusion.sigma_grids import AnyProcess, continuous, noise_time
from diffjax.diffusion.tables import SamplerRecord, StepCoefficients, Table, Trajectory
from diffjax.errors import UserError
from diffjax.options import Leaf, above, at_least, checked

Denoise = Callable[..., jax.Array]
Noise = Callable[[jax.Array], jax.Array]
Weight = float | Callable[[np.ndarray, np.ndarray], np.ndarray]


@partial(
    jax.tree_util.register_dataclass,
    data_fields=["table", "nfe", "start", "start_noise"],
    meta_fields=["random", "learned_variance"],
)
@dataclass(frozen=True)
class SamplerSchedule:
    """The schedule that `sample` executes: a pytree, an argument of jitted functions. Build it with `schedule`.

    table: padded.
    nfe: how many rows of it are in use, one per call of the network, int32.
    start, start_noise: the first state is start x plus start_noise times the noise number 0.
    random: whether noise is used; static, as the following.
    learned_variance: whether the network chooses that noise's size.
    """

    table: Table
    nfe: Any
    start: Any
    start_noise: Any
    random: bool
    learned_variance: bool


@partial(
    jax.tree_util.register_dataclass,
    data_fields=["weight", "start", "rtol", "atol"],
    meta_fields=["process", "max_attempts"],
)
@dataclass(frozen=True)
class AdaptiveSchedule:
    """The schedule of "dopri5"; its process is evaluated where the sampler comes to look at it."""

    weight: Any
    start: Any
    rtol: Any
    atol: Any
    process: Process
    max_attempts: int


def schedule(
    process: AnyProcess,
    sampler: str,
    steps: int = 0,
    *,
    max_steps: int | None = None,
    weight: Weight = 1.0,
    **given: Any,
) -> SamplerSchedule | AdaptiveSchedule:
    """The schedule of a sampler by name. UserError for what does not exist or has no meaning, with the reason.

    Args:
        process: a discrete process with all the steps it was trained with, or one in continuous time.
        sampler: one of SAMPLERS.
        steps: N of the table above; "dopri5" has none.
        max_steps: pad the table to that many steps, so that schedules of fewer steps share a compilation.
        weight: of the guidance: a number, or a function of the noise level σ/α and the distance to the data (t/T; NaN
            where the process has none), both float64 [n], at the start of each step -> float64 [n].
        given: options of the sampler; the keyword parameters of its function in SAMPLERS.
    """
    if sampler not in SAMPLERS:
        raise UserError(f"sampler {sampler!r} is unknown; valid: {', '.join(SAMPLERS)}")
    record = SAMPLERS[sampler]
    if record.adaptive:
        if steps:
            raise UserError(f"steps = {steps}: sampler {sampler!r} chooses its steps as it goes; valid: 0")
        return record.adaptive(process, weight, **accepted(record, sampler, given))
    assert record.trajectory
    assert record.nfe
    if steps < 1 or (max_steps is not None and steps > max_steps):
        raise UserError(f"{steps} sampling steps: valid: 1 to {max_steps or 'as many as the process has'}")
    with np.errstate(divide="ignore", invalid="ignore"):
        made = record.trajectory(process, steps, **accepted(record, sampler, given))
    return padded(process, sampler, made, weight, record.nfe(max_steps or 1))


def padded(process: AnyProcess, sampler: str, made: Trajectory, weight: Weight, room: int) -> SamplerSchedule:
    """The schedule of what a sampler made, with space for `room` rows if it has fewer. UserError where it divides by
    zero."""
    table = made.table._replace(weight=step_weights(process, made, weight)[made.step])
    check_finite(sampler, made, table)
    nfe = len(made.step)
    return SamplerSchedule(
        table=jax.tree.map(lambda column: np.pad(column, (0, max(nfe, room) - nfe)), table),
        nfe=np.int32(nfe),
        start=np.float64(made.start),
        start_noise=np.float64(made.start_noise),
        random=bool(np.any(table.noise != 0) or made.start_noise != 0),
        learned_variance=bool(np.any(table.log_high != 0)),
    )


@checked
def adaptive_schedule(
    process: AnyProcess,
    weight: Weight = 1.0,
    *,
    rtol: Annotated[float, Leaf("relative error of a step", "watch", above(0))] = 1e-3,
    atol: Annotated[float, Leaf("absolute error of a step", "watch", above(0))] = 1e-6,
    max_attempts: Annotated[int, Leaf("steps after which a sample is given up", "watch", at_least(1))] = 1000,
) -> AdaptiveSchedule:
    """Dormand and Prince's 5(4) pair along the flow through the span, with adaptive steps per sample.

    rtol, atol: of the error of a step. A sample that is not there after max_attempts steps becomes NaN.
    """
    known = continuous(process, "dopri5")
    if not isinstance(weight, int | float):
        raise UserError("sampler 'dopri5' chooses its steps as it goes; valid: a guidance weight that is one number")
    start = max(1.0, float(known.grid(np.array(known.span[:1], np.float64)).sigma[0]))
    for end in known.span:
        grid = known.grid(np.array([end], np.float64))
        if not np.isfinite([grid.c_noise, grid.conversion.velocity_x, grid.conversion.velocity_f]).all():
            raise UserError(f"sampler 'dopri5' divides by zero at t = {end:g}; valid: a span that ends before it")
    return AdaptiveSchedule(
        np.float64(weight), np.float64(start), np.float64(rtol), np.float64(atol), known, max_attempts
    )


def accepted(record: SamplerRecord, sampler: str, given: dict[str, Any]) -> dict[str, Any]:
    """The given options, if the sampler has them all; else UserError."""
    if unknown := [name for name in given if name not in record.options]:
        raise UserError(f"sampler {sampler!r} has no option {unknown[0]!r}; valid: {', '.join(record.options)}")
    return given


def step_weights(process: AnyProcess, made: Trajectory, weight: Weight) -> np.ndarray:
    """The guidance weight of each step, float64 [steps]."""
    if isinstance(weight, int | float):
        return np.full(len(made.grid.t), float(weight))
    with np.errstate(divide="ignore"):
        weights = weight(made.grid.sigma / made.grid.alpha, noise_time(process, made.grid))
    if not np.isfinite(weights).all():
        raise UserError("the guidance weight depends on t/T, which this process has not; valid: constant, interval")
    return weights


def check_finite(sampler: str, made: Trajectory, table: Table) -> None:
    """UserError where a row of the table divides by zero."""
    bad = ~np.all([np.isfinite(column) for column in jax.tree.leaves(table)], axis=0)
    if bad.any():
        raise UserError(
            f"sampler {sampler!r} divides by zero in its step from t = {made.grid.t[made.step[bad][0]]:g}, where "
            "the network's prediction does not tell data and noise apart; valid: a span within which it does"
        )


def known_steps() -> list[str]:
    """The samplers whose steps are known beforehand."""
    return [name for name, record in SAMPLERS.items() if record.trajectory]


def sample(
    schedule: SamplerSchedule | AdaptiveSchedule, denoise: Denoise, x: jax.Array, noise: Noise, clip: bool = False
) -> jax.Array:
    """Data [b, ..., c] in the dtype of x from x ~ N(0, I); call it in a jitted function that takes the schedule.

    clip limits the predicted data to [-1, 1]; it suits pixels, never latents.
    """
    if clip and isinstance(schedule, AdaptiveSchedule):
        raise UserError(f"clip limits x0, which an adaptive sampler does not know; valid: {', '.join(known_steps())}")
    if isinstance(schedule, AdaptiveSchedule):
        return follow_flow(schedule, denoise, x)
    table = jax.tree.map(lambda column: in_dtype_of(x, column), schedule.table)
    state = in_dtype_of(x, schedule.start) * x
    if schedule.random:
        state += in_dtype_of(x, schedule.start_noise) * noise(jnp.int32(0)).astype(x.dtype)

    def advance(i: jax.Array, carry: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        row = jax.tree.map(lambda column: column[i], table)
        state, buffer = carry
        output = call(denoise, row.c_noise, row.c_in * state, row.weight, schedule.learned_variance)
        x0, eps = converted(row, state, output[..., : x.shape[-1]], clip)
        after, buffer = (combined(each, state, x0, eps, buffer) for each in (row.state, row.buffer))
        if schedule.random:
            size = row.noise * learned_size(row, output, x.shape[-1]) if schedule.learned_variance else row.noise
            after += size * noise(row.slot).astype(x.dtype)
        return after, buffer

    return jax.lax.fori_loop(0, schedule.nfe, advance, (state, jnp.zeros_like(state)))[0]


def in_dtype_of(x: jax.Array, column: Any) -> jax.Array:
    """Numbers of a schedule ready to meet x; those that count things stay integers."""
    array = jnp.asarray(column)
    return array if jnp.issubdtype(array.dtype, jnp.integer) else array.astype(x.dtype)


def call(denoise: Denoise, c_noise: jax.Array, x: jax.Array, weight: jax.Array, learned_variance: bool) -> jax.Array:
    """The network's output at one time for the whole batch, in the dtype of x; UserError if its channels do not fit."""
    output = denoise(x, jnp.broadcast_to(c_noise, x.shape[:1]), weight)
    valid = [count * x.shape[-1] for count in ((2,) if learned_variance else (1, 2))]
    if output.shape[-1] not in valid:
        raise UserError(
            f"the sampler needs {' or '.join(map(str, valid))} output channels for {x.shape[-1]} input channels, "
            f"the model gives {output.shape[-1]}"
        )
    return output.astype(x.dtype)


def converted(row: Table, x: jax.Array, prediction: jax.Array, clip: bool) -> tuple[jax.Array, jax.Array]:
    """The data and the noise in x that the network's prediction stands for."""
    x0 = row.x0_x * x + row.x0_f * prediction
    if not clip:
        return x0, row.eps_x * x + row.eps_f * prediction
    x0 = jnp.clip(x0, -1.0, 1.0)
    noisy = row.sigma > 0  # else x is the data, and says nothing of the noise
    eps = (x - row.alpha * x0) / jnp.where(noisy, row.sigma, 1.0)
    return x0, jnp.where(noisy, eps, row.eps_x * x + row.eps_f * prediction)


def combined(c: StepCoefficients, x: jax.Array, x0: jax.Array, eps: jax.Array, buffer: jax.Array) -> jax.Array:
    """Equation (1) of `tables` without its noise."""
    return c.x * x + c.x0 * x0 + c.eps * eps + c.buffer * buffer


def learned_size(row: Table, output: jax.Array, channels: int) -> jax.Array:
    """σ of equation (4) of `gaussian`, from the second half of the output's channels."""
    fraction = (output[..., channels:] + 1.0) / 2.0
    return jnp.exp(0.5 * (fraction * row.log_high + (1.0 - fraction) * row.log_low))


def follow_flow(schedule: AdaptiveSchedule, denoise: Denoise, x: jax.Array) -> jax.Array:
    """The end of the flow from start x through the span of the process, with steps chosen for each sample."""
    start, rtol, atol, weight = (
        in_dtype_of(x, value) for value in (schedule.start, schedule.rtol, schedule.atol, schedule.weight)
    )

    def velocity(t: Any, state: jax.Array) -> jax.Array:
        grid = jax.tree.map(lambda leaf: leaf.reshape(-1, *(1,) * (x.ndim - 1)), schedule.process.grid(t))
        output = denoise(grid.c_in * state, grid.c_noise.reshape(-1), weight).astype(x.dtype)
        return grid.conversion.velocity_x * state + grid.conversion.velocity_f * output[..., : x.shape[-1]]

    return adaptive.dopri5(velocity, start * x, schedule.process.span, rtol, atol, schedule.max_attempts)


def initial_noise(keys: jax.Array, shape: Sequence[int]) -> jax.Array:
    """The initial state of sampling: standard normal float32 [b, *shape], sample i from keys[i] alone."""
    return rng.normal(rng.fold_name(keys, "x_T"), shape)


def step_noise(keys: jax.Array, shape: Sequence[int]) -> Noise:
    """The `noise` of a sampler: standard normal float32 [b, *shape] of a step, sample i from (keys[i], step) alone."""
    streams = rng.fold_name(keys, "noise")
    return lambda k: rng.normal(rng.fold(streams, k), shape)


SAMPLERS: dict[str, SamplerRecord] = {
    "ddpm": SamplerRecord(sigma_samplers.ddpm, nfe=lambda steps: steps),
    "ddim": SamplerRecord(sigma_samplers.ddim, nfe=lambda steps: steps),
    "edm": SamplerRecord(sigma_samplers.edm, nfe=lambda steps: 2 * steps - 1),
    "dpmpp_2m": SamplerRecord(sigma_samplers.dpmpp_2m, nfe=lambda steps: steps),
    "euler": SamplerRecord(time_samplers.euler, nfe=lambda steps: steps),
    "heun": SamplerRecord(time_samplers.heun, nfe=lambda steps: 2 * steps),
    "euler_maruyama": SamplerRecord(stochastic_samplers.euler_maruyama, nfe=lambda steps: steps + 1),
    "sde_heun": SamplerRecord(stochastic_samplers.sde_heun, nfe=lambda steps: 2 * steps + 1),
    "dopri5": SamplerRecord(adaptive=adaptive_schedule),
}
