"""The 5(4) pair of Dormand and Prince (1980) with adaptive steps for each example of a batch.

From x_n at t_n seven stages give two answers whose difference estimates the error of a step h:

    (1)  k_i = v(t_n + c_i h, x_n + h Σ_j a_ij k_j),   x_{n+1} = x_n + h Σ_i b_i k_i,   e = h Σ_i (b_i - b*_i) k_i

The last stage is v at the new point, so that an accepted step hands it on as its k_1. A step is accepted when the root
mean square over an example's elements of e/(atol + rtol max(|x_n|, |x_{n+1}|)) is at most 1; either way the next h is
0.9 / (that)^(1/5) times as long, within a factor of 5 (Hairer, Norsett and Wanner, Solving ordinary differential
equations I, section II.4). All examples share the calls of the network, and none another's step.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np

A = np.zeros((7, 7))
A[1, :1] = [1 / 5]
A[2, :2] = [3 / 40, 9 / 40]
A[3, :3] = [44 / 45, -56 / 15, 32 / 9]
A[4, :4] = [19372 / 6561, -25360 / 2187, 64448 / 6561, -212 / 729]
A[5, :5] = [9017 / 3168, -355 / 33, 46732 / 5247, 49 / 176, -5103 / 18656]
A[6, :6] = [35 / 384, 0, 500 / 1113, 125 / 192, -2187 / 6784, 11 / 84]
LOWER_ORDER = np.array([5179 / 57600, 0, 7571 / 16695, 393 / 640, -92097 / 339200, 187 / 2100, 1 / 40])
ERROR = A[6] - LOWER_ORDER

Velocity = Callable[[jax.Array, jax.Array], jax.Array]


def dopri5(
    velocity: Velocity,
    x: jax.Array,
    span: tuple[float, float],
    rtol: jax.Array,
    atol: jax.Array,
    max_attempts: int,
) -> jax.Array:
    """x [b, ...] carried along dx/dt = velocity(t [b], x) from span[0] to span[1], all of it in the dtype of x.

    An example that is not there after max_attempts steps becomes NaN.
    """
    batch, start, end = x.shape[0], *(jnp.asarray(t, x.dtype) for t in span)

    def spread(values: jax.Array) -> jax.Array:
        return values.reshape(-1, *(1,) * (x.ndim - 1))

    def unfinished(carry: tuple) -> jax.Array:
        attempt, t, *_ = carry
        return (attempt < max_attempts) & jnp.any(t != end)

    def attempt_step(carry: tuple) -> tuple:
        attempt, t, x, h, stages = carry
        last = jnp.abs(h) >= jnp.abs(end - t)
        h = jnp.where(last, end - t, h)
        stages = evaluate_stages(velocity, t, x, h, stages, jnp.where(attempt == 0, 0, 1))
        after = x + spread(h) * combined(A[6], stages)
        scale = atol + rtol * jnp.maximum(jnp.abs(x), jnp.abs(after))
        error = jnp.square(spread(h) * combined(ERROR, stages) / scale)
        error = jnp.sqrt(jnp.mean(error, axis=tuple(range(1, x.ndim))))
        accepted = error <= 1.0
        kept = jnp.where(accepted & last, end, jnp.where(accepted, t + h, t))
        stages = stages.at[0].set(jnp.where(spread(accepted), stages[6], stages[0]))
        factor = jnp.clip(0.9 * jnp.maximum(error, 1e-10) ** -0.2, 0.2, 5.0)
        return attempt + 1, kept, jnp.where(spread(accepted), after, x), h * factor, stages

    carry = (
        jnp.int32(0),
        jnp.full(batch, start),
        x,
        jnp.full(batch, (end - start) / 100),
        jnp.zeros((7, *x.shape), x.dtype),
    )
    _, t, x, _, _ = jax.lax.while_loop(unfinished, attempt_step, carry)
    return jnp.where(spread(t == end), x, jnp.nan)


def evaluate_stages(
    velocity: Velocity, t: jax.Array, x: jax.Array, h: jax.Array, stages: jax.Array, first: jax.Array
) -> jax.Array:
    """The k_i of (1) from number `first` on, in a loop, so that the network is compiled once: [7, b, ...]."""
    table = jnp.asarray(A, x.dtype)
    nodes = jnp.asarray(A.sum(axis=1), x.dtype)

    def stage(i: jax.Array, stages: jax.Array) -> jax.Array:
        step = h.reshape(-1, *(1,) * (x.ndim - 1))
        return stages.at[i].set(velocity(t + nodes[i] * h, x + step * combined(table[i], stages)))

    return jax.lax.fori_loop(first, 7, stage, stages)


def combined(coefficients: jax.Array | np.ndarray, stages: jax.Array) -> jax.Array:
    """Σ_i c_i k_i, exactly the same for an example in any batch."""
    return sum(jnp.asarray(c, stages.dtype) * stages[i] for i, c in enumerate(coefficients))  # type: ignore[return-value]
