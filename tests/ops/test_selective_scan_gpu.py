"""The GPU kernels of the selective scan, run as plain operations, against a plain loop in float64."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from diffjax.ops.pallas import selective_scan_gpu as kernels
from diffjax.ops.recurrence import Inputs
from tests.ops.scans import draw, exact

pytestmark = pytest.mark.slow  # a golden case holds the kernel's values and gradients among the fast tests


def inputs_of(arguments):
    return Inputs(
        A=arguments["A"].T,
        bias=arguments.get("delta_bias"),
        **{name: arguments.get(name) for name in ("u", "delta", "B", "C", "D", "z")},
    )


@pytest.fixture
def short_pieces(monkeypatch):
    """Pieces are written out token by token; those of 8 tokens take a CPU's compiler long."""
    monkeypatch.setattr(kernels, "CHUNK", 4)
    monkeypatch.setattr(kernels, "PIECE", 2)
    run.clear_cache()
    yield
    run.clear_cache()


# Compiling takes seconds, running milliseconds.
FAST = {"xla_backend_optimization_level": 0, "xla_llvm_disable_expensive_passes": True}


@functools.partial(jax.jit, static_argnames=("softplus", "reverse"), compiler_options=FAST)
def run(inputs, d_out, d_last, softplus, reverse):
    options = {"softplus": softplus, "reverse": reverse, "interpret": True}
    out, starts, last = kernels.forward(inputs, **options)
    return out, starts, last, kernels.backward(inputs, starts, d_out, d_last, **options)


def assert_exact(arguments, tolerance=1e-5, softplus=True, reverse=False):
    """Values, last state and every gradient, to `tolerance` of the largest entry of each."""
    normal = np.random.default_rng(1).standard_normal
    (b, _, e), n, dtype = arguments["u"].shape, arguments["A"].shape[1], arguments["u"].dtype
    d_out, d_last = jnp.asarray(normal(arguments["u"].shape), dtype), jnp.asarray(normal((b, e, n)), jnp.float32)
    inputs = inputs_of(arguments)
    out, starts, last, grads = run(inputs, d_out, jnp.swapaxes(d_last, 1, 2), softplus, reverse)
    (wanted_out, wanted_last), wanted = exact(arguments, (d_out, d_last), delta_softplus=softplus, reverse=reverse)
    pairs = {"out": (out, wanted_out), "last": (jnp.swapaxes(last, 1, 2), wanted_last)}
    assert [x is None for x in grads] == [x is None for x in inputs]
    wanted = inputs_of(wanted)
    pairs |= {name: (x, getattr(wanted, name)) for name, x in grads._asdict().items() if x is not None}
    for name, (x, y) in pairs.items():
        assert x.shape == y.shape, name
        bound = tolerance * max(np.abs(y).max(), 1e-3)
        np.testing.assert_allclose(np.asarray(x, np.float64), y, rtol=0, atol=bound, err_msg=name)
    return out, starts, last, grads


@pytest.mark.usefixtures("short_pieces")
@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize("tokens", [1, 7, 64, 130])
def test_lengths_and_directions(tokens, reverse):
    assert_exact(draw((2, tokens, 40, 4)), reverse=reverse)


@pytest.mark.parametrize("reverse", [False, True])
def test_pieces_as_shipped(reverse):
    assert_exact(draw((1, 2 * kernels.CHUNK + 3, kernels.CHANNELS + 1, 16)), reverse=reverse)


@pytest.mark.usefixtures("short_pieces")
@pytest.mark.parametrize(
    "missing, softplus, reverse, n",
    [
        (("D",), True, True, 4),
        (("z", "delta_bias"), False, False, 3),
        (("delta_bias",), False, True, 4),
        (("D", "z", "delta_bias"), True, False, 1),
    ],
)
def test_what_may_be_absent_and_other_states(missing, softplus, reverse, n):
    arguments = draw((1, 35, 33, n))
    for name in missing:
        del arguments[name]
    if not softplus:
        arguments["delta"] = jnp.abs(arguments["delta"])
    assert_exact(arguments, softplus=softplus, reverse=reverse)


@pytest.mark.usefixtures("short_pieces")
def test_bfloat16_at_the_boundary():
    # What is stored as bfloat16 is off by up to 2^-9 of itself; all else is float32.
    arguments = draw((2, 21, 36, 4), dtype=jnp.bfloat16)
    out, starts, last, grads = assert_exact(arguments, tolerance=2**-8)
    assert {x.dtype for x in (out, grads.u, grads.delta, grads.z, grads.B, grads.C)} == {jnp.dtype(jnp.bfloat16)}
    assert {x.dtype for x in (starts, last, grads.A, grads.D, grads.bias)} == {jnp.dtype(jnp.float32)}
    wide = {name: x.astype(jnp.float32) for name, x in arguments.items()}
    full, *_ = run(inputs_of(wide), wide["u"], jnp.zeros_like(last), softplus=True, reverse=False)
    np.testing.assert_array_equal(out, full.astype(jnp.bfloat16))


@pytest.mark.usefixtures("short_pieces")
def test_huge_and_tiny_steps_stay_finite():
    arguments = draw((1, 20, 4, 3))
    arguments["delta"] = jnp.where(jnp.arange(20)[None, :, None] % 2, 25.0, -40.0) * jnp.ones((1, 20, 4))
    assert_exact(arguments)


@pytest.mark.usefixtures("short_pieces")
@pytest.mark.parametrize("reverse", [False, True])
def test_starts_are_the_states_that_enter_the_chunks(reverse):
    arguments = draw((1, 2 * kernels.CHUNK + 1, 4, 3))
    _, starts, _, _ = assert_exact(arguments, reverse=reverse)
    assert starts.shape == (1, 3, 3, 4)
    part = slice(2 * kernels.CHUNK, None) if reverse else slice(0, kernels.CHUNK)
    cut = {name: x[:, part] if x.ndim == 3 else x for name, x in arguments.items()}
    _, _, last = kernels.forward(inputs_of(cut), softplus=True, reverse=reverse, interpret=True)
    np.testing.assert_allclose(starts[:, 1], last, rtol=1e-6, atol=1e-7)
    np.testing.assert_array_equal(starts[:, 2 if reverse else 0], 0)
