"""The selective recurrence of Mamba (arXiv 2312.00752, algorithm 2) and its gradient, in plain JAX.

With step sizes d_t = softplus(delta_t + bias) and inputs q_t = d_t u_t, for every channel and its n states

    h_t = exp(d_t A) h_(t-1) + q_t B_t,    h_(-1) = 0                                             (1)
    y_t = sum_n C_t h_t                                                                           (2)
    out_t = (y_t + D u_t) silu(z_t)                                                               (3)

Let g be the cotangent of `out` and gy_t = g_t silu(z_t) that of y_t. The adjoint of the state runs the other way:

    G_t = C_t gy_t + exp(d_(t+1) A) G_(t+1),    beyond the end: the cotangent of the last state   (4)
    dC_t = sum_e h_t gy_t      dB_t = sum_e G_t q_t      dq_t = sum_n G_t B_t                     (5)
    P_t = G_t exp(d_t A) h_(t-1)      dA = sum_t P_t d_t      dd_t = dq_t u_t + sum_n P_t A       (6)
    du_t = dq_t d_t + D gy_t      ddelta_t = dd_t sigmoid(delta_t + bias)                         (7)
    dz_t = g_t (y_t + D u_t) silu'(z_t)      dD = sum_t gy_t u_t      dbias = sum_t ddelta_t      (8)

exp(d_t A) lies in (0, 1) and may be tiny, so h_(t-1) is never recovered from h_t by division: the forward pass keeps
the state that enters every chunk of the sequence, and the backward pass runs (1) again inside each chunk. Kept are
n / chunk times the size of u; recomputed at once are chunk states.

The implementations differ in the length of a chunk and in how a chunk is run: `LOOP` goes token by token, `ASSOCIATIVE`
composes the maps h -> a h + x in parallel, log2(chunk) times over everything. All arithmetic is float32. Both passes
together, on two CPU cores for [2, 1024, 768] with 16 states, and MiB of temporaries of [8, 1026, 3072] in bfloat16:

    in a chunk         chunk   CPU ms   CPU MiB   compiled for v5e   for H100
    LOOP                  16       69        31                374        452
    ASSOCIATIVE           16      189        44                575        490
    ASSOCIATIVE           64      357        87               1078        633
    ASSOCIATIVE          128      412       160               1390        855

A GPU is given every step of a loop as kernels of its own. Kernels started by the two passes for [8, 1026, 3072] in
bfloat16, compiled for an H100 (tests/ops/compile_for_h100.py), and MiB of temporaries of each:

    in a chunk         chunk   forward   MiB   backward   MiB
    LOOP                  16      4820   200      16397   357
    ASSOCIATIVE           16       530   207       2032   409
    ASSOCIATIVE           64       265   266        680   685
    ASSOCIATIVE          128       150   206        384   812

No time was measured on a GPU.
"""

import functools
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from einops import rearrange
from jax import lax


class Inputs(NamedTuple):
    """The inputs of an implementation, or their gradients: arrays; None for absent D, z and bias."""

    u: Any  # [b, l, e] float32 or bfloat16
    delta: Any  # [b, l, e] as u
    A: Any  # [n, e] float32
    B: Any  # [b, l, n] float32 or bfloat16
    C: Any  # [b, l, n] float32 or bfloat16
    D: Any  # [e] float32
    z: Any  # [b, l, e] as u
    bias: Any  # [e] float32


class Chunk(NamedTuple):
    """A stretch of the sequence, time in front, float32."""

    d: jax.Array  # [t, b, e]
    q: jax.Array  # [t, b, e]
    B: jax.Array  # [t, b, n]
    C: jax.Array  # [t, b, n]


class Form(NamedTuple):
    """The form in which a chunk is computed.

    outputs(A, chunk, h, reverse) -> (state that leaves [b, n, e], y [t, b, e])
    adjoint(A, chunk, gy, h, G, reverse) -> (G that leaves, y, dA [n, e], dd without u's part, dq, dB, dC)
    """

    outputs: Callable[..., Any]
    adjoint: Callable[..., Any]


def forward(
    inputs: Inputs, *, softplus: bool, reverse: bool, form: Form, chunk: Callable[[int], int]
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """-> out [b, l, e] as u, states that enter the chunks [b, chunks, n, e], last state [b, n, e]; both float32.

    Args:
        reverse: the recurrence runs from the last token to the first.
        chunk: length of the sequence -> length of a chunk.
    """
    tokens = inputs.u.shape[1]

    def run(h: jax.Array, part: Inputs) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
        part = _float32(part)
        last, y = form.outputs(part.A, _discretise(part, softplus), h, reverse)
        return last, (_gated(y, part).astype(inputs.u.dtype), h)

    last, (out, starts) = _over_chunks(run, _zero_state(inputs), inputs, (), chunk(tokens), softplus, reverse)
    return _joined(out, tokens), jnp.moveaxis(starts, 0, 1), last


def backward(
    inputs: Inputs,
    starts: jax.Array,
    d_out: jax.Array,
    d_last: jax.Array,
    *,
    softplus: bool,
    reverse: bool,
    form: Form,
    chunk: Callable[[int], int],
) -> Inputs:
    """Gradients of the inputs, each in its input's shape and dtype.

    Args:
        starts: as `forward` returned them.
        d_out: cotangent of out [b, l, e]. d_last: of the last state [b, n, e], float32.
    """
    tokens = inputs.u.shape[1]
    whole = {name: getattr(inputs, name) for name in ("A", "D", "bias")}
    zeros = {name: jnp.zeros_like(value) for name, value in whole.items() if value is not None}

    def run(carry: Any, parts: Any) -> Any:
        G, sums = carry
        part, (h, g) = parts
        part, g = _float32(part), g.astype(jnp.float32)
        steps = _discretise(part, softplus)
        gy = g if part.z is None else g * jax.nn.silu(part.z)
        G, y, dA, dd, dq, dB, dC = form.adjoint(part.A, steps, gy, h, G, reverse)
        ddelta = dd + dq * part.u
        if softplus:
            ddelta = ddelta * jax.nn.sigmoid(_shifted(part))
        terms = {"A": dA, "D": jnp.sum(gy * part.u, (0, 1)), "bias": jnp.sum(ddelta, (0, 1))}
        sums = {name: total + terms[name] for name, total in sums.items()}
        du = dq * steps.d + (0.0 if part.D is None else part.D * gy)
        dz = None if part.z is None else g * _skipped(y, part) * _silu_slope(part.z)
        grads = Inputs(u=du, delta=ddelta, A=None, B=dB, C=dC, D=None, z=dz, bias=None)
        return (G, sums), jax.tree.map(lambda x, like: x.astype(like.dtype), grads, _sequences(inputs))

    extra = (jnp.moveaxis(starts, 1, 0), _chunks(d_out, chunk(tokens)))
    (_, sums), grads = _over_chunks(run, (d_last, zeros), inputs, extra, chunk(tokens), softplus, not reverse)
    return jax.tree.map(lambda x: _joined(x, tokens), grads)._replace(**sums)


def _over_chunks(
    run: Callable, carry: Any, inputs: Inputs, extra: tuple, length: int, softplus: bool, reverse: bool
) -> Any:
    """`lax.scan` of run(carry, part of the inputs) over chunks; `run` also gets parts of `extra` where there are any.

    A sequence that the chunks overshoot is prolonged by steps of size zero, which leave the state as it is and whose
    gradients vanish: softplus(-inf) = sigmoid(-inf) = 0.
    """
    z = None if inputs.z is None else 0.0
    beyond = Inputs(u=0.0, delta=-jnp.inf if softplus else 0.0, A=None, B=0.0, C=0.0, D=None, z=z, bias=None)
    parts = jax.tree.map(lambda x, value: _chunks(x, length, value), _sequences(inputs), beyond)

    def step(carry: Any, now: Any) -> Any:
        part, rest = now
        part = part._replace(A=inputs.A, D=inputs.D, bias=inputs.bias)
        return run(carry, (part, rest) if rest else part)

    return lax.scan(step, carry, (parts, extra), reverse=reverse)


def _sequences(inputs: Inputs) -> Inputs:
    """The inputs with a time axis."""
    return inputs._replace(A=None, D=None, bias=None)


def _chunks(x: jax.Array, length: int, beyond: float = 0.0) -> jax.Array:
    """[b, l, k] -> [chunks, t, b, k], filled up with `beyond`."""
    missing = -x.shape[1] % length
    x = jnp.pad(x, ((0, 0), (0, missing), (0, 0)), constant_values=beyond) if missing else x
    return rearrange(x, "b (chunks t) k -> chunks t b k", t=length)


def _joined(x: jax.Array, tokens: int) -> jax.Array:
    return rearrange(x, "chunks t b k -> b (chunks t) k")[:, :tokens]


def _zero_state(inputs: Inputs) -> jax.Array:
    return jnp.zeros((inputs.u.shape[0], *inputs.A.shape), jnp.float32)


def _float32(part: Inputs) -> Inputs:
    return jax.tree.map(lambda x: x.astype(jnp.float32), part)


def _shifted(part: Inputs) -> jax.Array:
    return part.delta if part.bias is None else part.delta + part.bias


def _discretise(part: Inputs, softplus: bool) -> Chunk:
    d = jax.nn.softplus(_shifted(part)) if softplus else _shifted(part)
    return Chunk(d, d * part.u, part.B, part.C)


def _skipped(y: jax.Array, part: Inputs) -> jax.Array:
    return y if part.D is None else y + part.D * part.u


def _gated(y: jax.Array, part: Inputs) -> jax.Array:
    return _skipped(y, part) if part.z is None else _skipped(y, part) * jax.nn.silu(part.z)  # (3)


def _silu_slope(z: jax.Array) -> jax.Array:
    s = jax.nn.sigmoid(z)
    return s * (1 + z * (1 - s))


# Token by token. Every value of a step is as large as one state, so that it stays in the cache.


def _loop_outputs(A: jax.Array, chunk: Chunk, h: jax.Array, reverse: bool) -> tuple[jax.Array, jax.Array]:
    def step(h: jax.Array, now: Chunk) -> tuple[jax.Array, jax.Array]:
        h = jnp.exp(now.d[:, None] * A) * h + now.q[:, None] * now.B[..., None]  # (1)
        return h, jnp.sum(now.C[..., None] * h, axis=1)  # (2)

    return lax.scan(step, h, chunk, reverse=reverse)


def _loop_adjoint(
    A: jax.Array, chunk: Chunk, gy: jax.Array, h: jax.Array, G: jax.Array, reverse: bool
) -> tuple[jax.Array, ...]:
    def again(h: jax.Array, now: Chunk) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
        before = h
        h = jnp.exp(now.d[:, None] * A) * h + now.q[:, None] * now.B[..., None]
        return h, (before, jnp.sum(now.C[..., None] * h, axis=1))

    def step(carry: Any, now: Any) -> Any:
        G, dA = carry
        (d, q, B, C), gy, before = now
        a = jnp.exp(d[:, None] * A)
        # Without the barriers XLA computes both products again, with their exp, in every sum below.
        G = lax.optimization_barrier(G + C[..., None] * gy[:, None])  # (4)
        aG = lax.optimization_barrier(a * G)
        P = aG * before  # (6)
        dC = jnp.einsum("bne,be->bn", a * before, gy) + B * jnp.sum(q * gy, axis=1, keepdims=True)
        dB = jnp.einsum("bne,be->bn", G, q)  # (5)
        sums = jnp.sum(P * A, axis=1), jnp.sum(G * B[..., None], axis=1), dB, dC
        return (aG, dA + P * d[:, None]), sums

    _, (before, y) = lax.scan(again, h, chunk, reverse=reverse)
    (G, dA), sums = lax.scan(step, (G, jnp.zeros_like(G)), (chunk, gy, before), reverse=not reverse)
    return G, y, jnp.sum(dA, axis=0), *sums


LOOP = Form(_loop_outputs, _loop_adjoint)


# All tokens of a chunk at once, as a composition of maps h -> a h + x.


def _states(a: jax.Array, x: jax.Array, h: jax.Array, reverse: bool) -> jax.Array:
    """h_t = a_t h_(t-1) + x_t for all t; a, x [t, b, n, e], h [b, n, e] the state before the first."""

    def then(first: tuple[jax.Array, jax.Array], second: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        return first[0] * second[0], second[0] * first[1] + second[1]

    decay, states = lax.associative_scan(then, (a, x), reverse=reverse)
    return states + decay * h


def _associative_outputs(A: jax.Array, chunk: Chunk, h: jax.Array, reverse: bool) -> tuple[jax.Array, jax.Array]:
    a, x = jnp.exp(chunk.d[:, :, None] * A), chunk.q[:, :, None] * chunk.B[..., None]
    states = _states(a, x, h, reverse)  # (1)
    return states[0 if reverse else -1], jnp.sum(chunk.C[..., None] * states, axis=2)  # (2)


def _associative_adjoint(
    A: jax.Array, chunk: Chunk, gy: jax.Array, h: jax.Array, G: jax.Array, reverse: bool
) -> tuple[jax.Array, ...]:
    a, x = jnp.exp(chunk.d[:, :, None] * A), chunk.q[:, :, None] * chunk.B[..., None]
    states = _states(a, x, h, reverse)
    before = _moved(states, h, reverse)
    # (4) as a recurrence of the same form: its decay is that of the step after.
    after = _moved(a, jnp.ones_like(h), not reverse)
    adjoint = _states(after, chunk.C[..., None] * gy[:, :, None], G, not reverse)
    P = adjoint * a * before  # (6)
    dA, dd = jnp.einsum("tbne,tbe->ne", P, chunk.d), jnp.sum(P * A, axis=2)
    dq = jnp.sum(adjoint * chunk.B[..., None], axis=2)  # (5)
    dB = jnp.einsum("tbne,tbe->tbn", adjoint, chunk.q)
    dC = jnp.einsum("tbne,tbe->tbn", states, gy)
    first = -1 if reverse else 0
    return a[first] * adjoint[first], jnp.sum(chunk.C[..., None] * states, axis=2), dA, dd, dq, dB, dC


def _moved(x: jax.Array, entering: jax.Array, reverse: bool) -> jax.Array:
    """The values one step earlier in the direction of the recurrence."""
    entering = entering[None]
    return jnp.concatenate([x[1:], entering] if reverse else [entering, x[:-1]])


ASSOCIATIVE = Form(_associative_outputs, _associative_adjoint)


def balanced(tokens: int, limit: int = 16) -> int:
    """The length of equal chunks of at most `limit` tokens, so that the last one overshoots little."""
    return math.ceil(tokens / math.ceil(tokens / limit))


def pair(form: Form, chunk: Callable[[int], int]) -> tuple[Callable, Callable]:
    """(forward, backward) of an implementation."""
    return functools.partial(forward, form=form, chunk=chunk), functools.partial(backward, form=form, chunk=chunk)


SEQUENTIAL = pair(LOOP, lambda tokens: 1)
WHOLE_ASSOCIATIVE = pair(ASSOCIATIVE, lambda tokens: tokens)
CHUNKED = pair(LOOP, balanced)
CHUNKED_IN_PARALLEL = pair(ASSOCIATIVE, functools.partial(balanced, limit=64))
