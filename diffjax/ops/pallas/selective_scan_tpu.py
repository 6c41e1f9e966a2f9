"""The selective scan and its gradient as two Pallas kernels for TPUs; equation numbers are those of ops.recurrence.

Channels lie in lanes and states in sublanes: a token's states of 128 channels are a stack of registers [n, 128]. The
grid is (b, chunks, blocks of channels). With the channels innermost, a chunk's B and C are spread over the lanes once
for all of them, and dB and dC, which sum over channels, are finished in VMEM; the states that a chunk hands to the next
wait there too. Nothing but arguments and results is in HBM. With `reverse` the grid and the loops run the other way.

A chunk's work for one block of channels:
1. For 16 tokens at a time what needs no state: d, q and the gate. The next 16 are prepared while the present 16 run.
2. The states, token by token. A step reads its rows of d and q spread over sublanes by the load itself.
3. Sums over states leave the 8 sublanes of each token to be added. They are stored with a stride, sublane s of token t
   in row 8 s + t, so that 8 tokens are summed by 7 additions of whole registers, with neither shuffles nor selections.
Backwards, the chunk's states are first computed again, from the saved one, then the adjoint walks through them.

Bundles (about cycles) per 8 tokens, 16 states, bfloat16, by `tests.benchmarks.tpu_bundles`; no chip was timed:

    chip  channels   forward   backward = states again + adjoint   once for all channels: B, C out   dB, dC in
    v5e   256             88        240 =           72 + 168                                     71         89
    v5e   512            174        468 =          136 + 332                                     71         89
    v6e   256             84        253 =           75 + 178                                     47         66
    v6e   512            174        468 =          127 + 341                                     47         66

Arithmetic fills 93 % (forward) and 97 % (adjoint) of its slots on v5e with 256 channels; 512 spill registers.
"""

import functools
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from numpy.polynomial import Chebyshev, Polynomial

from diffjax.errors import UserError
from diffjax.ops.recurrence import Inputs

LANES, SUBLANES = 128, 8
GROUP = 16  # tokens that are loaded together: the rows of a bfloat16 register
HALVES = GROUP // SUBLANES
WIDE = 2 * GROUP  # tokens whose B and C are spread over the lanes, or dB and dC summed over them, together
CHUNK = 128  # tokens between saved states, at most
BLOCK = 256  # channels that run together
LOG2_E = math.log2(math.e)
# log1p(y) / y on [0, 1] to 2e-7: the hardware's logarithm would lose the small step sizes in 1 + y.
LOG1P = Chebyshev.interpolate(lambda y: np.log1p(y) / y, 8, domain=[0, 1]).convert(kind=Polynomial).coef.tolist()


Ref = Any  # an array in VMEM, inside a kernel


class Shape(NamedTuple):
    """Sizes that both kernels share: l tokens in chunks, e channels in blocks, n states (a multiple of 8)."""

    b: int
    l: int  # noqa: E741
    e: int
    n: int
    chunk: int
    block: int

    @property
    def chunks(self) -> int:
        return pl.cdiv(self.l, self.chunk)

    @property
    def blocks(self) -> int:
        return pl.cdiv(self.e, self.block)


def sizes(l: int, e: int, n: int = 16) -> tuple[int, int]:  # noqa: E741
    """(tokens per chunk, channels per block) for l tokens of e channels with n states; both passes fit 16 MiB.

    Raises:
        UserError: more states than fit.
    """
    if n > 128:
        raise UserError(f"selective_scan: pallas on a TPU takes at most 128 states, not {n}; use 'chunked'")
    chunk = max(WIDE, CHUNK * 16 // max(n, 16) // WIDE * WIDE)
    return min(chunk, pl.cdiv(l, WIDE) * WIDE), BLOCK if e % BLOCK == 0 else LANES


def forward(
    inputs: Inputs, *, softplus: bool, reverse: bool, interpret: bool = False
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """-> out [b, l, e] as u, states that enter the chunks [b, chunks, n, e], last state [b, n, e]; both float32."""
    x, shape = _prepare(inputs)
    tile = _Specs(shape, forwards=not reverse)
    padded = shape.blocks * shape.block
    out, starts, last = pl.pallas_call(
        functools.partial(_forward_kernel, shape=shape, softplus=softplus, reverse=reverse, interpret=interpret),
        grid=(shape.b, shape.chunks, shape.blocks),
        in_specs=[tile.inputs(x)],
        out_specs=[tile.tokens, tile.starts, tile.whole],
        out_shape=[
            jax.ShapeDtypeStruct(x.u.shape, x.u.dtype),
            jax.ShapeDtypeStruct((shape.b, shape.chunks, shape.n, shape.e), jnp.float32),
            jax.ShapeDtypeStruct((shape.b, shape.n, padded), jnp.float32),
        ],
        scratch_shapes=[
            *[_lanes(shape.chunk, shape.n)] * 2,
            *[_rows(shape)] * 2,
            _partial_sums(shape),
        ],
        compiler_params=pltpu.CompilerParams(dimension_semantics=("parallel", "arbitrary", "arbitrary")),
        cost_estimate=_cost(shape, x, operations=7, exponentials=1, passes=1),
        interpret=interpret,
        name="selective_scan",
    )(x)
    n = inputs.A.shape[0]
    return out, starts[:, :, :n], last[:, :n, : shape.e]


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
    x, shape = _prepare(inputs)
    tile = _Specs(shape, forwards=reverse)
    padded = shape.blocks * shape.block
    per_channel = jax.ShapeDtypeStruct((shape.b, 1, padded), jnp.float32)
    like = jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype), x)
    out_shape = like._replace(
        A=jax.ShapeDtypeStruct((shape.b, shape.n, padded), jnp.float32),
        D=None if x.D is None else per_channel,
        bias=None if x.bias is None else per_channel,
    )
    (grads,) = pl.pallas_call(
        functools.partial(_backward_kernel, shape=shape, softplus=softplus, reverse=reverse, interpret=interpret),
        grid=(shape.b, shape.chunks, shape.blocks),
        in_specs=[tile.inputs(x), tile.starts, tile.tokens, tile.last],
        out_specs=[tile.gradients(x)],
        out_shape=[out_shape],
        scratch_shapes=[
            *[_lanes(shape.chunk, shape.n)] * 4,
            *[_rows(shape)] * 4,
            *[_partial_sums(shape)] * 3,
            pltpu.VMEM((shape.block // LANES, shape.chunk, shape.n, LANES), jnp.float32),
            pltpu.VMEM((shape.blocks, shape.n, shape.block), jnp.float32),
        ],
        compiler_params=pltpu.CompilerParams(dimension_semantics=("parallel", "arbitrary", "arbitrary")),
        cost_estimate=_cost(shape, x, operations=24, exponentials=2, passes=2),
        interpret=interpret,
        name="selective_scan_gradient",
    )(x, _pad_states(starts, 2, shape.n), d_out, _pad_states(d_last, 1, shape.n))
    n = inputs.A.shape[0]
    dD, dbias = (None if a is None else jnp.sum(a, 0)[0, : shape.e] for a in (grads.D, grads.bias))
    return grads._replace(
        A=jnp.sum(grads.A, 0)[:n, : shape.e],
        B=grads.B[..., :n],
        C=grads.C[..., :n],
        D=dD,
        bias=dbias,
    )


def _prepare(inputs: Inputs) -> tuple[Inputs, Shape]:
    """Inputs as the kernels want them: rows [1, e] for what is per channel, states padded to whole registers."""
    b, l, e = inputs.u.shape  # noqa: E741
    n = pl.cdiv(inputs.A.shape[0], SUBLANES) * SUBLANES
    x = inputs._replace(
        A=_pad_states(inputs.A, 0, n),
        B=_pad_states(inputs.B, 2, n),
        C=_pad_states(inputs.C, 2, n),
        D=None if inputs.D is None else inputs.D[None],
        bias=None if inputs.bias is None else inputs.bias[None],
    )
    return x, Shape(b, l, e, n, *sizes(l, e, n))


def _pad_states(array: jax.Array, axis: int, n: int) -> jax.Array:
    missing = n - array.shape[axis]
    return array if missing == 0 else jnp.pad(array, [(0, missing * (i == axis)) for i in range(array.ndim)])


class _Specs:
    """Blocks of the arrays; `forwards` tells whether the grid meets the chunks in the order of memory."""

    def __init__(self, shape: Shape, forwards: bool):
        chunk = (lambda c: c) if forwards else (lambda c: shape.chunks - 1 - c)
        n, block, padded = shape.n, shape.block, shape.blocks * shape.block
        self.tokens = pl.BlockSpec((1, shape.chunk, block), lambda b, c, j: (b, chunk(c), j))
        self.coefficients = pl.BlockSpec((1, shape.chunk, n), lambda b, c, j: (b, chunk(c), 0))
        self.states = pl.BlockSpec((n, block), lambda b, c, j: (0, j))
        self.row = pl.BlockSpec((1, block), lambda b, c, j: (0, j))
        self.starts = pl.BlockSpec((1, 1, n, block), lambda b, c, j: (b, chunk(c), 0, j))
        self.last = pl.BlockSpec((1, n, block), lambda b, c, j: (b, 0, j))
        self.whole = pl.BlockSpec((1, n, padded), lambda b, c, j: (b, 0, 0))
        self.whole_row = pl.BlockSpec((1, 1, padded), lambda b, c, j: (b, 0, 0))

    def inputs(self, x: Inputs) -> Inputs:
        specs = Inputs(
            self.tokens, self.tokens, self.states, self.coefficients, self.coefficients, self.row, self.tokens, self.row
        )
        return Inputs(*(None if a is None else spec for a, spec in zip(x, specs)))

    def gradients(self, x: Inputs) -> Inputs:
        specs = self.inputs(x)
        rows = [None if a is None else self.whole_row for a in (x.D, x.bias)]
        return specs._replace(A=self.whole, D=rows[0], bias=rows[1])


def _lanes(tokens: int, n: int) -> Any:
    return pltpu.VMEM((tokens, n, LANES), jnp.float32)


def _rows(shape: Shape) -> Any:
    return pltpu.VMEM((shape.block // LANES, shape.chunk, LANES), jnp.float32)


def _partial_sums(shape: Shape) -> Any:
    return pltpu.VMEM((shape.block // LANES, HALVES, SUBLANES * SUBLANES, LANES), jnp.float32)


def _cost(shape: Shape, x: Inputs, operations: int, exponentials: int, passes: int) -> pl.CostEstimate:
    elements = shape.b * shape.l * shape.e * shape.n
    arrays = sum(a.size * a.dtype.itemsize for a in x if a is not None) + x.u.size * x.u.dtype.itemsize
    starts = shape.b * shape.chunks * shape.n * shape.e * 4
    return pl.CostEstimate(
        flops=operations * elements, transcendentals=exponentials * elements, bytes_accessed=passes * arrays + starts
    )


# Inside the kernels. A value of `block` channels is a list of registers of 128 lanes, one for each step of `lanes`.


def _forward_kernel(
    x: Inputs,
    out: Ref,
    starts: Ref,
    last: Ref,
    B: Ref,
    C: Ref,
    d: Ref,
    q: Ref,
    partial: Ref,
    *,
    shape: Shape,
    softplus: bool,
    reverse: bool,
    interpret: bool,
) -> None:
    tokens = _tokens(shape, forwards=not reverse)
    block = pl.program_id(2)
    lanes = [pl.ds(i, LANES) for i in range(0, shape.block, LANES)]
    whole = [pl.ds(pl.multiple_of(block * shape.block + i, LANES), LANES) for i in range(0, shape.block, LANES)]

    @pl.when(pl.program_id(1) == 0)
    def _():
        for w in whole:
            last[0, :, w] = jnp.zeros((shape.n, LANES), jnp.float32)

    @pl.when(block == 0)
    def _():
        _spread(x, B, C, tokens, shape)

    A2 = [x.A[:, i] * LOG2_E for i in lanes]
    for i, w in zip(lanes, whole):
        starts[0, 0, :, i] = last[0, :, w]

    def prepare(step):
        g = tokens.group(step, reverse)
        rows, ready = _aligned(g, GROUP), []
        for v, i in enumerate(lanes):
            u = _load(x.u, rows, i)
            d_g = _step_sizes(x, rows, i, softplus)
            u, d_g = _masked(tokens, g * GROUP, u, d_g)
            ready += [(d, v, d_g), (q, v, d_g * u)]
        return rows, ready

    def steps(step, h):
        g = tokens.group(step, reverse)
        rows = _aligned(g, GROUP)
        ready = prepare(step + 1)

        def token(h, half, k, t):
            h = list(h)
            for v in range(len(lanes)):
                a = jnp.exp2(d[v, pl.ds(t, 1)] * A2[v])
                h[v] = a * h[v] + q[v, pl.ds(t, 1)] * B[t]  # (1)
                _keep(partial, v, half, k, C[t] * h[v])  # (2)
            return tuple(h)

        h = _walk(token, h, g, reverse, interpret)
        for v, i in enumerate(lanes):
            y = _total(partial, v)
            if x.D is not None:
                y = y + x.D[:, i] * _load(x.u, rows, i)
            if x.z is not None:
                y = y * jax.nn.silu(_load(x.z, rows, i))
            out[0, rows, i] = y.astype(out.dtype)
        _keep_rows(*ready)
        return h

    _keep_rows(*prepare(0))
    h = lax.fori_loop(0, tokens.groups, steps, tuple(last[0, :, w] for w in whole))
    for w, h_v in zip(whole, h):
        last[0, :, w] = h_v


def _backward_kernel(
    x: Inputs,
    starts: Ref,
    d_out: Ref,
    d_last: Ref,
    grad: Inputs,
    B: Ref,
    C: Ref,
    dB: Ref,
    dC: Ref,
    d: Ref,
    q: Ref,
    gy: Ref,
    gate: Ref,
    dq_sums: Ref,
    PA_sums: Ref,
    y_sums: Ref,
    states: Ref,
    adjoint: Ref,
    *,
    shape: Shape,
    softplus: bool,
    reverse: bool,
    interpret: bool,
) -> None:
    tokens = _tokens(shape, forwards=reverse)
    block = pl.program_id(2)
    lanes = [pl.ds(i, LANES) for i in range(0, shape.block, LANES)]
    whole = [pl.ds(pl.multiple_of(block * shape.block + i, LANES), LANES) for i in range(0, shape.block, LANES)]
    tiles = range(len(lanes))

    @pl.when(pl.program_id(1) == 0)
    def _():
        adjoint[block] = d_last[0]
        for ref in (grad.A, grad.D, grad.bias):
            for w in whole if ref is not None else ():
                ref[0, :, w] = jnp.zeros((ref.shape[1], LANES), jnp.float32)

    @pl.when(block == 0)
    def _():
        _spread(x, B, C, tokens, shape)
        dB[...] = jnp.zeros_like(dB)
        dC[...] = jnp.zeros_like(dC)

    A = [x.A[:, i] for i in lanes]
    A2 = [a * LOG2_E for a in A]

    def prepare(step):
        g = tokens.group(step, reverse)
        rows, ready = _aligned(g, GROUP), []
        for v, i in enumerate(lanes):
            u, g_out, d_g = _load(x.u, rows, i), _load(d_out, rows, i), _step_sizes(x, rows, i, softplus)
            if x.z is not None:
                z = _load(x.z, rows, i)
                open_g = jax.nn.sigmoid(z)
                g_out = g_out * z * open_g
                ready.append((gate, v, open_g))
            u, g_out, d_g = _masked(tokens, g * GROUP, u, g_out, d_g)
            ready += [(d, v, d_g), (q, v, d_g * u), (gy, v, g_out)]
        return rows, ready

    def recompute(step, h):
        g = tokens.group(step, reverse)
        ready = prepare(step + 1)

        def token(h, half, k, t):
            h = list(h)
            for v in tiles:
                states[v, t] = h[v]
                h[v] = jnp.exp2(d[v, pl.ds(t, 1)] * A2[v]) * h[v] + q[v, pl.ds(t, 1)] * B[t]
            return tuple(h)

        h = _walk(token, h, g, reverse, interpret)
        _keep_rows(*ready)
        return h

    _keep_rows(*prepare(0))
    h = lax.fori_loop(0, tokens.groups, recompute, tuple(starts[0, 0, :, i] for i in lanes))

    def steps(step, carry):
        g = tokens.group(step, not reverse)
        rows = _aligned(g, GROUP)

        def token(carry, half, k, t):
            h, G, dA = (list(c) for c in carry)  # h_t, exp(d_(t+1) A) G_(t+1), dA
            dB_t, dC_t = dB[t], dC[t]
            for v in tiles:
                d_t, q_t, gy_t = d[v, pl.ds(t, 1)], q[v, pl.ds(t, 1)], gy[v, pl.ds(t, 1)]
                G_t = G[v] + C[t] * gy_t  # (4)
                dC_t = dC_t + _live(shape, block, v, h[v] * gy_t)  # (5)
                dB_t = dB_t + _live(shape, block, v, G_t * q_t)
                if x.z is not None:
                    _keep(y_sums, v, half, k, C[t] * h[v])
                _keep(dq_sums, v, half, k, G_t * B[t])
                G[v] = jnp.exp2(d_t * A2[v]) * G_t
                h[v] = states[v, t]
                P = G[v] * h[v]  # (6)
                dA[v] = dA[v] + P * d_t
                _keep(PA_sums, v, half, k, P * A[v])
            dB[t], dC[t] = dB_t, dC_t
            return tuple(h), tuple(G), tuple(dA)

        carry = _walk(token, carry, g, not reverse, interpret)
        for v, i in enumerate(lanes):
            dq, PA = _total(dq_sums, v), _total(PA_sums, v)
            u, d_g, gy_g = _load(x.u, rows, i), d[v, rows], gy[v, rows]
            (u,) = _masked(tokens, g * GROUP, u)
            du, dd = dq * d_g, dq * u + PA  # (6, 7)
            if softplus:
                dd = dd * jnp.exp(_raw(x, rows, i) - d_g)  # sigmoid(x) = exp(x - softplus(x))
            (dd,) = _masked(tokens, g * GROUP, dd)
            if x.D is not None:
                du = du + x.D[:, i] * gy_g
                grad.D[0, :, whole[v]] += jnp.sum(gy_g * u, axis=0, keepdims=True)
            if x.bias is not None:
                grad.bias[0, :, whole[v]] += jnp.sum(dd, axis=0, keepdims=True)
            if x.z is not None:
                y = _total(y_sums, v)
                if x.D is not None:
                    y = y + x.D[:, i] * u
                z = _load(x.z, rows, i)
                gate_g = gate[v, rows]
                dz = _load(d_out, rows, i) * y * gate_g * (1 + z * (1 - gate_g))  # (8)
                grad.z[0, rows, i] = dz.astype(grad.z.dtype)
            grad.u[0, rows, i] = du.astype(grad.u.dtype)
            grad.delta[0, rows, i] = dd.astype(grad.delta.dtype)
        return carry

    carry = h, tuple(adjoint[block, :, i] for i in lanes), tuple(grad.A[0, :, w] for w in whole)
    h, G, dA = lax.fori_loop(0, tokens.groups, steps, carry)
    for v, i in enumerate(lanes):
        adjoint[block, :, i] = G[v]
        grad.A[0, :, whole[v]] = dA[v]

    @pl.when(block == shape.blocks - 1)
    def _():
        def gather(i, _):
            rows = _aligned(i, WIDE)
            grad.B[0, rows] = jnp.sum(dB[rows], axis=-1).astype(grad.B.dtype)
            grad.C[0, rows] = jnp.sum(dC[rows], axis=-1).astype(grad.C.dtype)
            return 0

        lax.fori_loop(0, _count(tokens.count, WIDE), gather, 0)


class _Tokens(NamedTuple):
    count: Any  # tokens of this chunk
    groups: Any  # groups that hold them
    ragged: bool  # whether some chunk's last group has rows beyond the end

    def group(self, step: Any, reverse: bool) -> Any:
        """The group of this step of the walk; after the last one comes the last one again."""
        step = jnp.minimum(step, self.groups - 1)
        return self.groups - 1 - step if reverse else step


def _tokens(shape: Shape, forwards: bool) -> _Tokens:
    c = pl.program_id(1)
    c = c if forwards else shape.chunks - 1 - c
    count = jnp.minimum(shape.chunk, shape.l - c * shape.chunk)
    return _Tokens(count, _count(count, GROUP), shape.l % GROUP != 0)


def _masked(tokens: _Tokens, first: Any, *arrays: Any) -> tuple:
    """0 in the rows beyond the last token, whose content is undefined: such a step leaves the state as it is."""
    if not tokens.ragged:
        return arrays
    live = lax.broadcasted_iota(jnp.int32, arrays[0].shape, 0) < tokens.count - first
    return tuple(jnp.where(live, a, 0) for a in arrays)


def _live(shape: Shape, block: Any, v: int, product: Any) -> Any:
    """0 in the lanes beyond the last channel."""
    if shape.e % shape.block == 0:
        return product
    lane = lax.broadcasted_iota(jnp.int32, product.shape, 1)
    return jnp.where(lane < shape.e - block * shape.block - v * LANES, product, 0)


def _aligned(i: Any, size: int) -> Any:
    return pl.ds(pl.multiple_of(i * size, size), size)


def _count(length: Any, size: int) -> Any:
    """The number of pieces of this size, the last of them perhaps not full."""
    return lax.div(length + (size - 1), jnp.int32(size))


def _load(ref: Ref, rows: Any, i: Any) -> Any:
    return ref[0, rows, i].astype(jnp.float32)


def _raw(x: Inputs, rows: Any, i: Any) -> Any:
    delta = _load(x.delta, rows, i)
    return delta if x.bias is None else delta + x.bias[:, i]


def _keep_rows(rows: Any, ready: list) -> None:
    for ref, v, value in ready:
        ref[v, rows] = value


def _step_sizes(x: Inputs, rows: Any, i: Any, softplus: bool) -> Any:
    """d = softplus(delta + bias), or the sum itself."""
    raw = _raw(x, rows, i)
    if not softplus:
        return raw
    y = jnp.exp2(jnp.abs(raw) * -LOG2_E)
    return jnp.maximum(raw, 0) + y * functools.reduce(lambda p, c: p * y + c, reversed(LOG1P))


def _spread(x: Inputs, B: Ref, C: Ref, tokens: _Tokens, shape: Shape) -> None:
    """Each token's n coefficients as [n, 128]: states in sublanes, the same in every lane."""

    def some(i, _):
        for source, target in ((x.B, B), (x.C, C)):
            (values,) = _masked(tokens, i * WIDE, source[0, _aligned(i, WIDE)].astype(jnp.float32))
            columns = values.T
            for k in range(WIDE):
                target[i * WIDE + k] = jnp.broadcast_to(columns[:, k : k + 1], (shape.n, LANES))
        return 0

    lax.fori_loop(0, _count(tokens.count, WIDE), some, 0)


def _keep(partial: Ref, v: int, half: int, k: Any, products: Any) -> None:
    """Adds products [n, 128] of token k of a half group to 8 sublanes and keeps those for `_total`."""
    rows = sum(products[i : i + SUBLANES] for i in range(0, products.shape[0], SUBLANES))
    partial.at[v, half][pl.ds(k, SUBLANES, stride=SUBLANES), :] = rows


def _total(partial: Ref, v: int) -> Any:
    """Sums over the states for a group of tokens: [16, 128]."""
    rows = [pl.ds(s * SUBLANES, SUBLANES) for s in range(SUBLANES)]
    return jnp.concatenate([sum(partial[v, half, r] for r in rows) for half in range(HALVES)], axis=0)


def _walk(step: Callable, carry: Any, g: Any, backwards: bool, interpret: bool) -> Any:
    """carry = step(carry, half, k, t) for the tokens of group g; token t is the k-th of its half."""
    for half in range(HALVES)[:: -1 if backwards else 1]:

        def one(i, carry, half=half):
            k = SUBLANES - 1 - i if backwards else i
            return step(carry, half, k, g * GROUP + half * SUBLANES + k)

        if interpret:  # unrolled it would compile for a minute
            carry = lax.fori_loop(0, SUBLANES, one, carry)
        else:
            for i in range(SUBLANES):
                carry = one(i, carry)
    return carry
