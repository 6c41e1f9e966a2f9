"""The implementations of the selective scan as tests call them, and a plain loop in float64 to hold them against."""

import importlib
from typing import Any
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np

from diffjax.ops.selective_scan import selective_scan

IMPLEMENTATIONS = ("sequential", "associative", "chunked")
KERNELS = ("pallas-tpu", "pallas-gpu")
door = importlib.import_module("diffjax.ops.selective_scan")


def scan(implementation: str, **arguments: Any) -> Any:
    """The scan by one of IMPLEMENTATIONS, or by one of KERNELS run as plain operations."""
    if implementation in KERNELS:
        target = implementation.removeprefix("pallas-")
        with mock.patch.object(door, "platform", return_value=target):
            return selective_scan(**arguments, implementation="pallas", interpret=True)
    return selective_scan(**arguments, implementation=implementation)


def draw(shape: tuple[int, int, int, int], seed: int = 0, dtype: Any = jnp.float32) -> dict[str, jax.Array]:
    """Inputs for [b, l, e] and n; step sizes between 0 and 3, most of them small, as in a trained model."""
    b, tokens, e, n = shape
    normal = np.random.default_rng(seed).standard_normal
    wide, narrow = (b, tokens, e), (b, tokens, n)
    along = {"u": normal(wide), "delta": normal(wide) - 2, "z": normal(wide), "B": normal(narrow), "C": normal(narrow)}
    whole = {"A": -np.exp(0.5 * normal((e, n))), "D": normal(e), "delta_bias": 0.5 * normal(e)}
    cast = {name: jnp.asarray(x, dtype) for name, x in along.items()}
    return cast | {name: jnp.asarray(x, jnp.float32) for name, x in whole.items()}


def plain_loop(
    u, delta, A, B, C, D=None, z=None, delta_bias=None, *, delta_softplus=True, reverse=False
) -> tuple[jax.Array, jax.Array]:
    """out and last state, written as the definition; in the dtype of its inputs (float64 in `exact`)."""

    def step(h, now):
        u, d, B, C = now
        h = jnp.exp(d[..., None] * A) * h + (d * u)[..., None] * B[:, None]
        return h, jnp.sum(C[:, None] * h, axis=-1)

    d = delta if delta_bias is None else delta + delta_bias
    d = jnp.logaddexp(d, 0) if delta_softplus else d
    first = jnp.zeros((*u[:, 0].shape, A.shape[1]), u.dtype)
    last, y = jax.lax.scan(step, first, jax.tree.map(lambda x: jnp.swapaxes(x, 0, 1), (u, d, B, C)), reverse=reverse)
    y = jnp.swapaxes(y, 0, 1)
    y = y if D is None else y + D * u
    return (y if z is None else y * z / (1 + jnp.exp(-z))), last


def exact(arguments: dict[str, Any], cotangents: tuple[Any, Any], **options: Any) -> tuple[Any, Any]:
    """((out, last state), gradients by name) of the plain loop, computed in float64."""
    with jax.enable_x64(True):
        wide, g = jax.tree.map(lambda x: jnp.asarray(np.asarray(x, np.float64)), (arguments, cotangents))
        values, pull = jax.vjp(lambda x: plain_loop(**x, **options), wide)
        return jax.device_get((values, pull(g)[0]))
