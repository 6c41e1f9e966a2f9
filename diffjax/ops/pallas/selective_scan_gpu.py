"""The selective scan as two kernels for NVIDIA GPUs, in Pallas, compiled by Triton; math: `diffjax.ops.recurrence`.

One program, a single warp, takes one example and 32 channels and walks over the sequence with their state [n, 32] in
registers. Of the arrays n times the size of u only every 16th state reaches memory.

The backward pass takes pieces of 8 tokens, the last first: from the stored state it runs (1) again up to the piece and
through it, keeps the 8 states of the piece, and walks back. Registers cannot be indexed at run time, hence the 8 tokens
are written out; for n = 16 their states fill half of the registers of a thread, so that the 16 of a chunk would not
fit. Running (1) over another half chunk on average adds a tenth to the instructions of the backward pass and halves
what is kept between the passes, as against storing every 8th state.

dA, dD and dbias are summed over the sequence in registers, and outside over the examples. dB and dC leave as one
partial sum per 32 channels, which are added outside: atomic additions would depend on the order of the programs.

Nothing here was run on a GPU, no time was measured. From the output of the compilers for an H100, n = 16, bfloat16:

    instructions per token and warp    306 forwards, about 1000 backwards; 18 and 46 of them exponentials
    registers per thread               168 forwards; 255 backwards, where 147 more spill: 2 % of the instructions
    bytes per token and channel        12 forwards, 4 of them stored states; 26 backwards, 8 of them sums for dB and dC

By these counts instructions limit both passes, not memory, and a small batch leaves schedulers idle: 8 examples of
1536 channels are 384 warps, an H100 has 528 schedulers. More warps per program, 16 or 64 channels, pieces of 4 or 16
tokens were all compiled and need more instructions or more spills. For n = 64 the kernels compile, but their states no
longer fit in registers.
"""

import functools
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton

from diffjax.ops.recurrence import Inputs

CHUNK = 16  # tokens between two stored states
PIECE = 8  # tokens whose states the backward pass holds at once; divides CHUNK
CHANNELS = 32  # of one program
WARPS = 1  # a program; more would have to exchange every sum over the states through shared memory


def forward(
    inputs: Inputs, *, softplus: bool, reverse: bool, interpret: bool = False
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """-> out [b, l, e] as u, states that enter the chunks [b, chunks, n, e], last state [b, n, e]; both float32.

    Args:
        reverse: the recurrence runs from the last token to the first.
        interpret: run on any backend, slowly.
    """
    (b, tokens, e), n = inputs.u.shape, inputs.A.shape[0]
    place = _places(inputs)
    shapes = (
        _shape(b, tokens, e, dtype=inputs.u.dtype),
        _shape(b, pl.cdiv(tokens, CHUNK), n, e),
        _shape(b, n, e),
    )
    kernel = functools.partial(_forward_kernel, like=inputs, softplus=softplus, reverse=reverse)
    places = (place.sequence, place.starts, place.state)
    return _call(kernel, inputs, (_of_inputs(place, inputs),), places, shapes, interpret)(inputs)


def backward(
    inputs: Inputs,
    starts: jax.Array,
    d_out: jax.Array,
    d_last: jax.Array,
    *,
    softplus: bool,
    reverse: bool,
    interpret: bool = False,
) -> Inputs:
    """Gradients of the inputs, each in its input's shape and dtype.

    Args:
        starts: as `forward` returned them.
        d_out: cotangent of out [b, l, e]. d_last: of the last state [b, n, e], float32.
    """
    (b, tokens, e), n = inputs.u.shape, inputs.A.shape[0]
    place = _places(inputs)
    like_u, partial = _shape(b, tokens, e, dtype=inputs.u.dtype), _shape(b, pl.cdiv(e, CHANNELS), tokens, n)
    shapes = Inputs(
        u=like_u, delta=like_u, A=_shape(b, n, e), B=partial, C=partial, D=_shape(b, e), z=like_u, bias=_shape(b, e)
    )
    places = _of_inputs(place, inputs)._replace(A=place.state, B=place.partial, C=place.partial)
    places = _present(places._replace(D=place.sum, bias=place.sum), inputs)
    kernel = functools.partial(_backward_kernel, like=inputs, softplus=softplus, reverse=reverse)
    in_places = (_of_inputs(place, inputs), place.starts, place.sequence, place.state)
    call = _call(kernel, inputs, in_places, (places,), (_present(shapes, inputs),), interpret)
    (parts,) = call(inputs, starts, d_out, d_last)
    over = Inputs(u=(), delta=(), A=0, B=1, C=1, D=0, z=(), bias=0)
    return Inputs(
        *(None if x is None else jnp.sum(part, axis).astype(x.dtype) for x, part, axis in zip(inputs, parts, over))
    )


# Where the parts of a program lie: the grid is (blocks of channels, examples).


class Places(NamedTuple):
    sequence: pl.BlockSpec  # of [b, l, e]
    narrow: pl.BlockSpec  # [b, l, n]
    matrix: pl.BlockSpec  # [n, e]
    vector: pl.BlockSpec  # [e]
    starts: pl.BlockSpec  # [b, chunks, n, e]
    state: pl.BlockSpec  # [b, n, e]
    partial: pl.BlockSpec  # [b, blocks, l, n]
    sum: pl.BlockSpec  # [b, e]


def _places(inputs: Inputs) -> Places:
    # Triton knows powers of two only; what they exceed of an array is masked in the kernels.
    tokens, n = inputs.u.shape[1], pl.next_power_of_2(inputs.A.shape[0])
    return Places(
        sequence=pl.BlockSpec((None, tokens, CHANNELS), lambda block, i: (i, 0, block)),
        narrow=pl.BlockSpec((None, tokens, n), lambda block, i: (i, 0, 0)),
        matrix=pl.BlockSpec((n, CHANNELS), lambda block, i: (0, block)),
        vector=pl.BlockSpec((CHANNELS,), lambda block, i: (block,)),
        starts=pl.BlockSpec((None, pl.cdiv(tokens, CHUNK), n, CHANNELS), lambda block, i: (i, 0, 0, block)),
        state=pl.BlockSpec((None, n, CHANNELS), lambda block, i: (i, 0, block)),
        partial=pl.BlockSpec((None, None, tokens, n), lambda block, i: (i, block, 0, 0)),
        sum=pl.BlockSpec((None, CHANNELS), lambda block, i: (i, block)),
    )


def _of_inputs(place: Places, inputs: Inputs) -> Inputs:
    sequence, narrow = place.sequence, place.narrow
    places = Inputs(sequence, sequence, place.matrix, narrow, narrow, place.vector, sequence, place.vector)
    return _present(places, inputs)


def _present(values: Inputs, inputs: Inputs) -> Inputs:
    return Inputs(*(None if x is None else value for value, x in zip(values, inputs)))


def _shape(*shape: int, dtype: Any = jnp.float32) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(shape, dtype)


def _call(kernel: Callable, inputs: Inputs, in_places: Any, out_places: Any, shapes: Any, interpret: bool) -> Callable:
    b, _, e = inputs.u.shape
    return pl.pallas_call(
        kernel,
        grid=(pl.cdiv(e, CHANNELS), b),
        in_specs=in_places,
        out_specs=out_places,
        out_shape=shapes,
        compiler_params=triton.CompilerParams(num_warps=WARPS, num_stages=1),
        interpret=interpret,
    )


# The kernels. Arrays of a program are [n, e], [e] or, for B and C, [n, 1], where e stands for its 32 channels.


class Fixed(NamedTuple):
    """Values that are constant along the sequence."""

    A: jax.Array  # [n, e] divided by log(2): exp(d A) = 2^(d A / log(2))
    D: jax.Array | None  # [e]
    bias: jax.Array | float  # [e]
    channels: jax.Array  # [e] true where there is a channel
    states: jax.Array  # [n]
    both: jax.Array  # [n, e]
    tokens: int
    softplus: bool


class Row(NamedTuple):
    """The values loaded for a token, float32; zero beyond the length, the channels and the states of the arrays."""

    channels: jax.Array  # [e] true where there is a token and a channel
    states: jax.Array  # [n]
    u: jax.Array
    delta: jax.Array  # with the bias
    B: jax.Array  # [n, 1]
    C: jax.Array  # [n, 1]
    z: jax.Array | None


def _fixed(inputs: Inputs, like: Inputs, softplus: bool) -> Fixed:
    _, tokens, e = like.u.shape
    channels = pl.program_id(0) * CHANNELS + jnp.arange(CHANNELS) < e
    states = jnp.arange(inputs.A.shape[0]) < like.A.shape[0]
    both = states[:, None] & channels
    A = _load(inputs.A, both) / math.log(2)
    D = None if inputs.D is None else _load(inputs.D, channels)
    bias = 0.0 if inputs.bias is None else _load(inputs.bias, channels)
    return Fixed(A, D, bias, channels, states, both, tokens, softplus)


def _row(inputs: Inputs, fixed: Fixed, t: jax.Array) -> Row:
    channels, states = fixed.channels & (t < fixed.tokens), fixed.states & (t < fixed.tokens)
    u, delta = _load(inputs.u.at[t], channels), _load(inputs.delta.at[t], channels) + fixed.bias
    B, C = _load(inputs.B.at[t], states)[:, None], _load(inputs.C.at[t], states)[:, None]
    return Row(channels, states, u, delta, B, C, None if inputs.z is None else _load(inputs.z.at[t], channels))


def _step(row: Row, fixed: Fixed) -> jax.Array:
    """d [e]; zero beyond the sequence, where it leaves the state as it is."""
    d = jnp.maximum(row.delta, 0) + jnp.log1p(jnp.exp(-jnp.abs(row.delta))) if fixed.softplus else row.delta
    return jnp.where(row.channels, d, 0)


def _advance(h: jax.Array, row: Row, fixed: Fixed) -> jax.Array:
    d = _step(row, fixed)
    return jnp.exp2(d * fixed.A) * h + (d * row.u) * row.B  # (1)


def _output(h: jax.Array, row: Row, fixed: Fixed) -> jax.Array:
    """y_t + D u_t."""
    y = jnp.sum(row.C * h, axis=0)  # (2)
    return y if fixed.D is None else y + fixed.D * row.u


def _forward_kernel(
    inputs: Inputs, out: Any, starts: Any, last: Any, *, like: Inputs, softplus: bool, reverse: bool
) -> None:
    fixed = _fixed(inputs, like, softplus)
    chunks = starts.shape[0]

    def piece(i: jax.Array, h: jax.Array) -> jax.Array:
        times = _times(i, reverse)
        rows = [_row(inputs, fixed, t) for t in times]
        outs = []
        for row in rows:
            h = _advance(h, row, fixed)
            y = _output(h, row, fixed)
            outs.append(y if row.z is None else y * row.z * _sigmoid(row.z))  # (3)
        # A load cannot be moved ahead of a store, hence all stores at the end.
        for t, row, y in zip(times, rows, outs):
            _store(out.at[t], y, row.channels)
        return h

    def chunk(i: jax.Array, h: jax.Array) -> jax.Array:
        c = chunks - 1 - i if reverse else i
        _store(starts.at[c], h, fixed.both)
        return _over_pieces(c, CHUNK // PIECE, piece, h, reverse)

    _store(last, lax.fori_loop(0, chunks, chunk, jnp.zeros_like(fixed.A)), fixed.both)


def _backward_kernel(
    inputs: Inputs,
    starts: Any,
    d_out: Any,
    d_last: Any,
    grads: Inputs,
    *,
    like: Inputs,
    softplus: bool,
    reverse: bool,
) -> None:
    fixed = _fixed(inputs, like, softplus)
    chunks = starts.shape[0]

    def again(i: jax.Array, h: jax.Array) -> jax.Array:
        for row in [_row(inputs, fixed, t) for t in _times(i, reverse)]:
            h = _advance(h, row, fixed)
        return h

    def chunk(i: jax.Array, carry: Any) -> Any:
        c = i if reverse else chunks - 1 - i

        def piece(j: jax.Array, carry: Any) -> Any:
            before = CHUNK // PIECE - 1 - j
            h = _over_pieces(c, before, again, _load(starts.at[c], fixed.both), reverse)
            times = _times(_piece(c, before, reverse), reverse)
            states = _walk(inputs, fixed, d_out, grads, h, times)
            return _walk_back(inputs, fixed, d_out, grads, states, times, carry)

        return lax.fori_loop(0, CHUNK // PIECE, piece, carry)

    row = jnp.zeros((CHANNELS,), jnp.float32)
    carry = _load(d_last, fixed.both), jnp.zeros_like(fixed.A), row, row
    _, dA, dD, dbias = lax.fori_loop(0, chunks, chunk, carry)
    _store(grads.A, dA, fixed.both)
    for ref, value in ((grads.D, dD), (grads.bias, dbias)):
        if ref is not None:
            _store(ref, value, fixed.channels)


def _walk(
    inputs: Inputs, fixed: Fixed, d_out: Any, grads: Inputs, h: jax.Array, times: list[jax.Array]
) -> list[jax.Array]:
    """The state before each token of a piece; stores the gradients that need the state after it, dC and dz."""
    states = []
    for t in times:
        states.append(h)
        row = _row(inputs, fixed, t)
        h = _advance(h, row, fixed)
        g = _load(d_out.at[t], row.channels)
        if row.z is not None:
            s = _sigmoid(row.z)
            dz = g * _output(h, row, fixed) * s * (1 + row.z * (1 - s))  # (8)
            _store(grads.z.at[t], dz, row.channels)
        _store(grads.C.at[t], jnp.sum(h * _ungated(g, row), axis=1), row.states)  # (5)
    return states


def _ungated(g: jax.Array, row: Row) -> jax.Array:
    """gy of (4) to (8)."""
    return g if row.z is None else g * row.z * _sigmoid(row.z)


def _walk_back(
    inputs: Inputs,
    fixed: Fixed,
    d_out: Any,
    grads: Inputs,
    states: list[jax.Array],
    times: list[jax.Array],
    carry: Any,
) -> Any:
    """The other gradients; the carry is (exp(d A) G of the step after, dA, dD, dbias)."""
    G, dA, dD, dbias = carry
    # Everything is loaded again, since registers are short.
    for t, h in reversed(list(zip(times, states))):
        row = _row(inputs, fixed, t)
        d, gy = _step(row, fixed), _ungated(_load(d_out.at[t], row.channels), row)
        G = G + row.C * gy  # (4)
        _store(grads.B.at[t], jnp.sum(G * (d * row.u), axis=1), row.states)  # (5)
        dq = jnp.sum(G * row.B, axis=0)
        G = jnp.exp2(d * fixed.A) * G
        P = G * h  # (6)
        dA = dA + P * d
        ddelta = dq * row.u + jnp.sum(P * fixed.A, axis=0) * math.log(2)
        ddelta = jnp.where(row.channels, ddelta * _sigmoid(row.delta) if fixed.softplus else ddelta, 0)  # (7)
        _store(grads.delta.at[t], ddelta, row.channels)
        _store(grads.u.at[t], dq * d if fixed.D is None else dq * d + fixed.D * gy, row.channels)
        dD, dbias = dD + gy * row.u, dbias + ddelta
    return G, dA, dD, dbias


def _over_pieces(c: jax.Array, count: Any, run: Callable, h: jax.Array, reverse: bool) -> jax.Array:
    """h through the first `count` pieces of chunk c in the direction of the recurrence."""
    return lax.fori_loop(0, count, lambda j, h: run(_piece(c, j, reverse), h), h)


def _piece(c: jax.Array, j: jax.Array, reverse: bool) -> jax.Array:
    """The index of the j-th piece of chunk c that the recurrence meets."""
    pieces = CHUNK // PIECE
    return c * pieces + (pieces - 1 - j if reverse else j)


def _times(piece: jax.Array, reverse: bool) -> list[jax.Array]:
    """The tokens of a piece in the order of the recurrence."""
    return [piece * PIECE + (PIECE - 1 - k if reverse else k) for k in range(PIECE)]


def _load(ref: Any, mask: jax.Array) -> jax.Array:
    return triton.load(ref, mask=mask, other=0).astype(jnp.float32)


def _store(ref: Any, value: jax.Array, mask: jax.Array) -> None:
    triton.store(ref, value.astype(ref.dtype), mask=mask)


def _sigmoid(x: jax.Array) -> jax.Array:
    return 1 / (1 + jnp.exp(-x))
