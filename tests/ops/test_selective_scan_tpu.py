"""The TPU kernels as plain operations on the CPU, against the plain loop in float64."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from diffjax.errors import UserError
from diffjax.ops.pallas import selective_scan_tpu as kernels
from diffjax.ops.recurrence import Inputs
from tests.ops.scans import draw, exact

EVERYTHING = ("D", "z", "delta_bias")


def run(arguments, d_out, d_last, *, softplus, reverse):
    """((out, last state), gradients) of the pair, named and laid out as the door names them."""
    x = {name: arguments.get(name) for name in ("u", "delta", "A", "B", "C", *EVERYTHING)}
    inputs = Inputs(*x.values())._replace(A=arguments["A"].T)
    options = {"softplus": softplus, "reverse": reverse, "interpret": True}
    out, starts, last = kernels.forward(inputs, **options)
    chunk, _ = kernels.sizes(*x["u"].shape[1:], x["B"].shape[2])
    assert starts.shape == (last.shape[0], -(-out.shape[1] // chunk), *last.shape[1:])
    grads = kernels.backward(inputs, starts, d_out, jnp.swapaxes(d_last, 1, 2), **options)
    assert jax.tree.map(lambda a: (a.shape, a.dtype), grads) == jax.tree.map(lambda a: (a.shape, a.dtype), inputs)
    grads = dict(zip(x, grads._replace(A=grads.A.T)))
    return (out, jnp.swapaxes(last, 1, 2)), {name: g for name, g in grads.items() if g is not None}


@pytest.mark.slow
@pytest.mark.parametrize(
    "shape, reverse, softplus, options, dtype",
    [
        ((2, 7, 5, 8), True, True, EVERYTHING, "float32"),
        ((2, 24, 8, 16), False, False, ("D",), "bfloat16"),
        ((2, 1, 8, 8), False, True, EVERYTHING, "float32"),
        ((1, 64, 8, 16), False, False, (), "float32"),
        ((1, 258, 4, 4), True, True, ("z",), "float32"),
        ((1, 1026, 3, 8), False, True, ("D", "delta_bias"), "float32"),
        ((2, 20, 256, 8), True, True, EVERYTHING, "float32"),
        ((1, 40, 130, 8), True, True, EVERYTHING, "bfloat16"),
    ],
    ids=str,
)
def test_values_last_state_and_gradients(shape, reverse, softplus, options, dtype):
    b, tokens, e, n = shape
    arguments = {
        name: x for name, x in draw(shape, dtype=dtype).items() if name in (*["u", "delta", "A", "B", "C"], *options)
    }
    if not softplus:
        arguments["delta"] = 0.1 * jnp.abs(arguments["delta"])
    normal = np.random.default_rng(1).standard_normal
    cotangents = jnp.asarray(normal((b, tokens, e)), dtype), jnp.asarray(normal((b, e, n)), jnp.float32)
    found = run(arguments, *cotangents, softplus=softplus, reverse=reverse)
    wanted = exact(arguments, cotangents, delta_softplus=softplus, reverse=reverse)
    for (path, x), y in zip(jax.tree_util.tree_leaves_with_path(found), jax.tree.leaves(wanted)):
        # In float32 all through; what leaves in bfloat16 is rounded once, by at most 2^-8 of itself.
        relative = 1e-5 + (2**-8 if x.dtype == jnp.bfloat16 else 0)
        bound = 1e-5 * np.abs(y).max() + relative * np.abs(y)
        assert x.shape == y.shape, path
        assert np.all(np.abs(np.asarray(x, np.float64) - y) <= bound), path


def test_the_step_size_is_exact_to_float32():
    raw = np.concatenate([-np.logspace(-6, 2, 2000), np.logspace(-6, 4, 2000)]).astype(np.float32)
    inputs = Inputs(None, raw[None, :, None], None, None, None, None, None, None)
    found = jax.jit(lambda: kernels._step_sizes(inputs, slice(None), slice(None), True))()[:, 0]
    wanted = np.logaddexp(raw.astype(np.float64), 0)
    np.testing.assert_allclose(found[raw > -80], wanted[raw > -80], rtol=5e-6)  # that of exp itself: 80 * 2^-24
    np.testing.assert_allclose(found, wanted, atol=1e-30, rtol=1e-5)


@pytest.mark.parametrize("tokens", [1, 16, 17, 128, 258, 1056])
def test_chunks_are_whole_groups(tokens):
    chunk, block = kernels.sizes(tokens, 1536)
    assert chunk % kernels.GROUP == 0
    assert min(tokens, kernels.CHUNK) <= chunk <= kernels.CHUNK
    assert 1536 % block == 0


def test_many_states_shorten_the_chunk():
    assert kernels.sizes(1056, 1536, 64)[0] == 32
    with pytest.raises(UserError, match="at most 128 states, not 256; use 'chunked'"):
        kernels.sizes(1056, 1536, 256)
