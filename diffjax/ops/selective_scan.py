"""The selective scan: one function with exact gradients, four implementations; `diffjax.ops.recurrence` has the math.

    sequential    token by token, keeping every state: n times the size of u
    associative   `lax.associative_scan` over the whole length: log-depth, and a dozen arrays n times the size of u
    chunked       in pieces, keeping the state that enters each and recomputing the rest: any backend. Pieces are 16
                  tokens, one by one; for a GPU 64 tokens at once by `lax.associative_scan`
    pallas        token by token in one kernel whose states never leave the chip: TPU, and GPU by name alone, since the
                  compiler behind it, Triton, is deprecated in JAX

Between the passes they all keep the inputs and the state that enters each of their chunks [b, chunks, n, e].
"""

import functools
import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jax.sharding import PartitionSpec

from diffjax.errors import UserError
from diffjax.ops import recurrence
from diffjax.ops.dtypes import DTYPES
from diffjax.ops.recurrence import Inputs
from diffjax.parallel.mesh import platform
from diffjax.parallel.rules import mesh_axes, per_device, sum_over_devices

IMPLEMENTATIONS = ("sequential", "associative", "chunked", "pallas")
KERNELS_FOR = ("tpu", "gpu")

log = logging.getLogger(__name__)


def selective_scan(
    u: jax.Array,
    delta: jax.Array,
    A: jax.Array,
    B: jax.Array,
    C: jax.Array,
    D: jax.Array | None = None,
    z: jax.Array | None = None,
    delta_bias: jax.Array | None = None,
    *,
    delta_softplus: bool = True,
    reverse: bool = False,
    return_last_state: bool = False,
    implementation: str | None = None,
    interpret: bool = False,
) -> Any:
    """h_t = exp(d_t A) h_(t-1) + d_t B_t u_t,  out_t = (C_t h_t + D u_t) silu(z_t),  d_t = softplus(delta_t + bias).

    Mamba, arXiv 2312.00752, algorithm 2. Computed in float32 whatever the inputs. Over the mesh in context
    (`jax.set_mesh`) each device scans its own examples and channels; inside a `jax.shard_map` of the caller's, over
    all its axes, give that check_vma=False. Differentiable in reverse, and by pallas once only.

    Args:
        u, delta, z: [b, l, e], all float32 or all bfloat16. No z: no gate.
        A: [e, n], negative. B, C: [b, l, n], float32 or bfloat16. D, delta_bias: [e]; none: zero.
        delta_softplus: False takes delta + delta_bias itself as the step size.
        reverse: run from the last token to the first.
        implementation: one of `IMPLEMENTATIONS`; None takes pallas for a TPU and chunked elsewhere, and logs it.
            What the program is for says the mesh in context, else jax's default device.
        interpret: run the pallas kernel as plain operations on any backend, slowly: for tests.

    Returns:
        out [b, l, e] in the dtype of u; with `return_last_state` also the state after the last step, float32 [b, e, n].

    Raises:
        UserError: shapes that do not fit together, another dtype, an implementation that cannot run here.
    """
    arguments: dict[str, Any] = {
        "u": u,
        "delta": delta,
        "A": A,
        "B": B,
        "C": C,
        "D": D,
        "z": z,
        "delta_bias": delta_bias,
    }
    arguments = {name: None if x is None else jnp.asarray(x) for name, x in arguments.items()}
    _check(arguments)
    u, delta, A, B, C, D, z, bias = arguments.values()
    target = platform()
    options = Options(delta_softplus, reverse, _chosen(implementation, target, interpret), target, interpret)
    inputs = Inputs(u, delta, A.T.astype(jnp.float32), B, C, _float32(D), z, _float32(bias))
    out, last = _scan(options, inputs)
    return (out, jnp.swapaxes(last, 1, 2)) if return_last_state else out


@dataclass(frozen=True)
class Options:
    softplus: bool
    reverse: bool
    implementation: str
    target: str  # the platform that the program is for
    interpret: bool


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _scan(options: Options, inputs: Inputs) -> tuple[jax.Array, jax.Array]:
    """-> out [b, l, e], last state [b, n, e]."""
    return _forward(options, inputs)[0]


def _forward(options: Options, inputs: Inputs) -> tuple[tuple[jax.Array, jax.Array], tuple[Inputs, jax.Array]]:
    forward, _ = _passes(options)
    outputs = (SEQUENCE, STARTS, STATE)
    whole = options.implementation == "pallas"
    out, starts, last = per_device(forward, _split(inputs), (NAMES,), outputs, whole)(inputs)
    starts = checkpoint_name(starts, "selective_scan")  # for policies that keep it and spare a second forward pass
    return (out, last), (inputs, starts)


def _backward(options: Options, residuals: tuple[Inputs, jax.Array], cotangents: Any) -> tuple[Inputs]:
    inputs, starts = residuals
    _, backward = _passes(options)
    split = _split(inputs)

    def summed(*arguments: Any) -> Inputs:
        return sum_over_devices(backward(*arguments), split, NAMES)

    names, whole = (NAMES, STARTS, SEQUENCE, STATE), options.implementation == "pallas"
    return (per_device(summed, split, names, NAMES, whole)(inputs, starts, *cotangents),)


_scan.defvjp(_forward, _backward)

# The dimensions of the arrays, by name; those with a name are split over the mesh.
SEQUENCE = PartitionSpec("batch", None, "channels")
STATE = PartitionSpec("batch", None, "channels")
STARTS = PartitionSpec("batch", None, None, "channels")
NAMES = Inputs(
    u=SEQUENCE,
    delta=SEQUENCE,
    A=PartitionSpec(None, "channels"),
    B=PartitionSpec("batch", None, None),
    C=PartitionSpec("batch", None, None),
    D=PartitionSpec("channels"),
    z=SEQUENCE,
    bias=PartitionSpec("channels"),
)


def _split(inputs: Inputs) -> dict[str, tuple[str, ...]]:
    return mesh_axes(batch=inputs.u.shape[0], channels=inputs.u.shape[2])


def _passes(options: Options) -> tuple[Callable, Callable]:
    """(forward, backward) of the implementation."""
    keywords: dict[str, Any] = {"softplus": options.softplus, "reverse": options.reverse}
    if options.implementation == "pallas":
        kernels = _kernels(options.target)
        passes = kernels.forward, kernels.backward
        keywords["interpret"] = options.interpret
    elif options.implementation == "chunked":
        passes = recurrence.CHUNKED_IN_PARALLEL if options.target == "gpu" else recurrence.CHUNKED
    else:
        passes = recurrence.SEQUENTIAL if options.implementation == "sequential" else recurrence.WHOLE_ASSOCIATIVE
    forward, backward = (functools.partial(function, **keywords) for function in passes)
    return forward, backward


def _kernels(target: str) -> Any:
    # Imported where they are used: most programs on a CPU have no use for Pallas.
    if target == "gpu":
        from diffjax.ops.pallas import selective_scan_gpu

        return selective_scan_gpu
    from diffjax.ops.pallas import selective_scan_tpu

    return selective_scan_tpu


def _chosen(implementation: str | None, target: str, interpret: bool) -> str:
    if implementation is None:
        return _default(target)
    if implementation not in IMPLEMENTATIONS:
        raise UserError(
            f"selective_scan: implementation {implementation!r} is unknown; valid: {', '.join(IMPLEMENTATIONS)}"
        )
    if implementation == "pallas" and target not in KERNELS_FOR and not interpret:
        raise UserError(
            f"selective_scan: implementation 'pallas' runs on {' and '.join(KERNELS_FOR)}, this program is for "
            f"{target}; use 'chunked' (in a test of the kernel, interpret=True)"
        )
    return implementation


@functools.cache
def _default(target: str) -> str:
    """The implementation for a platform; cached, so that it is logged once."""
    implementation = "pallas" if target == "tpu" else "chunked"
    log.info("selective_scan: %s, as this program is for %s", implementation, target)
    return implementation


def _check(arrays: Mapping[str, Any]) -> None:
    """Raise UserError unless shapes and dtypes are those of the docstring."""
    if absent := [name for name in ("u", "delta", "A", "B", "C") if arrays[name] is None]:
        raise UserError(f"selective_scan: {', '.join(absent)} not given; only D, z and delta_bias may be None")
    if any(_varies_over_devices(x) for x in arrays.values() if x is not None):
        raise UserError("selective_scan inside jax.shard_map needs check_vma=False there")
    u, A = arrays["u"], arrays["A"]
    if 0 in A.shape or u.ndim != 3 or 0 in u.shape or A.ndim != 2 or A.shape[0] != u.shape[2]:
        raise UserError(f"selective_scan: u is {u.shape}, A is {A.shape}; valid: u [b, l, e], A [e, n], none empty")
    (b, tokens, e), n = u.shape, A.shape[1]
    per_token, wide, narrow = (b, tokens, e), (e,), (b, tokens, n)
    expected = {"delta": per_token, "B": narrow, "C": narrow, "D": wide, "z": per_token, "delta_bias": wide}
    for name, shape in expected.items():
        if (x := arrays[name]) is not None and x.shape != shape:
            raise UserError(f"selective_scan: {name} is {x.shape}, expected {shape} for u {u.shape} and A {A.shape}")
    for name, x in arrays.items():
        if x is not None and x.dtype not in DTYPES.values():
            raise UserError(f"selective_scan: {name} is {x.dtype}; valid: {', '.join(DTYPES)}")
        if x is not None and name in ("delta", "z") and x.dtype != u.dtype:
            raise UserError(f"selective_scan: {name} is {x.dtype} and u is {u.dtype}; valid: the same for both")


def _varies_over_devices(x: jax.Array) -> bool:
    """Whether x is a part of an array inside a `shard_map` that checks which values differ between devices."""
    kind = getattr(jax.typeof(x), "manual_axis_type", None)
    return bool(kind is not None and kind.varying)


def _float32(x: jax.Array | None) -> jax.Array | None:
    return None if x is None else x.astype(jnp.float32)
