"""The selective scan: every implementation is the plain loop, forwards, backwards and sharded; refusals; memory."""

import importlib
import logging
import random

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from diffjax.errors import UserError
from diffjax.ops import selective_scan as exported
from diffjax.ops.recurrence import balanced
from diffjax.ops.selective_scan import _default, selective_scan
from diffjax.parallel.mesh import make_mesh
from diffjax.parallel.rules import mesh_axes
from tests import slow
from tests.ops.scans import IMPLEMENTATIONS, KERNELS, draw, exact, scan

module = importlib.import_module("diffjax.ops.selective_scan")  # whose name the function has in its package


def value_and_gradients(implementation, arguments, g, g_last, **options):
    @jax.jit
    def run(arguments):
        call = lambda x: scan(implementation, **x, **options, return_last_state=True)  # noqa: E731
        values, pull = jax.vjp(call, arguments)
        return values, pull((g.astype(values[0].dtype), g_last))[0]

    return run(arguments)


def assert_exact(implementation, arguments, tolerance=1e-5, **options):
    """Values, last state and every gradient, to `tolerance` of the largest entry of each."""
    (b, _, e), n = arguments["u"].shape, arguments["A"].shape[1]
    normal = np.random.default_rng(1).standard_normal
    g, g_last = jnp.asarray(normal(arguments["u"].shape), jnp.float32), jnp.asarray(normal((b, e, n)), jnp.float32)
    found = value_and_gradients(implementation, arguments, g, g_last, **options)
    wanted = exact(arguments, (g.astype(arguments["u"].dtype), g_last), **options)
    for (path, x), y in zip(jax.tree_util.tree_leaves_with_path(found), jax.tree.leaves(wanted)):
        assert x.shape == y.shape
        bound = tolerance * max(np.abs(y).max(), 1e-3)
        np.testing.assert_allclose(np.asarray(x, np.float64), y, rtol=0, atol=bound, err_msg=str(path))
    return found


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize("tokens", slow.but([1, 7], [1, 7, 258, 1026]))
def test_lengths_and_directions(implementation, tokens, reverse):
    assert_exact(implementation, draw((1, tokens, 5, 3)), reverse=reverse)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("seed", slow.but([0], range(6)))
def test_random_shapes_dtypes_and_options(implementation, seed):
    choose = random.Random(seed)
    shape = (choose.randint(1, 3), choose.randint(1, 70), choose.randint(1, 20), choose.choice([1, 2, 4, 16]))
    dtype = choose.choice([jnp.float32, jnp.bfloat16])
    arguments = draw(shape, seed, dtype)
    for name in ("D", "z", "delta_bias"):
        if choose.random() < 0.4:
            del arguments[name]
    options = {"reverse": choose.random() < 0.5, "delta_softplus": choose.random() < 0.7}
    if not options["delta_softplus"]:
        arguments["delta"] = jnp.abs(arguments["delta"])
        arguments.pop("delta_bias", None)
    # bfloat16 keeps 8 bits: what is stored in it is off by up to 2^-9 of itself, and all else is float32.
    (out, last), grads = assert_exact(implementation, arguments, 1e-5 if dtype == jnp.float32 else 2**-8, **options)
    assert out.dtype == dtype
    assert last.dtype == jnp.float32
    assert {name: x.dtype for name, x in grads.items()} == {name: x.dtype for name, x in arguments.items()}


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_bfloat16_is_rounded_once_at_the_boundary(implementation):
    narrow = draw((2, 40, 8, 4), dtype=jnp.bfloat16)
    wide = {name: x.astype(jnp.float32) for name, x in narrow.items()}
    found = scan(implementation, **narrow)
    np.testing.assert_array_equal(found, scan(implementation, **wide).astype(jnp.bfloat16))


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_huge_and_tiny_steps_stay_finite(implementation):
    arguments = draw((1, 20, 4, 3))
    arguments["delta"] = jnp.where(jnp.arange(20)[None, :, None] % 2, 25.0, -40.0) * jnp.ones((1, 20, 4))
    assert_exact(implementation, arguments)


@pytest.mark.slow
@pytest.mark.parametrize("implementation", KERNELS)
@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize("tokens", [258, 1026])
def test_long_lengths_and_directions_of_the_kernels(implementation, tokens, reverse):
    assert_exact(implementation, draw((1, tokens, 2, 2)), reverse=reverse)


@pytest.mark.slow
@pytest.mark.parametrize("implementation", KERNELS)
@pytest.mark.parametrize("seed", range(3))
def test_random_shapes_dtypes_and_options_of_the_kernels(implementation, seed):
    test_random_shapes_dtypes_and_options(implementation, seed)


def test_reverse_is_the_flipped_scan_of_flipped_inputs():
    arguments = draw((2, 19, 6, 4))
    flipped = {name: jnp.flip(x, 1) if x.ndim == 3 else x for name, x in arguments.items()}
    forward = selective_scan(**flipped, implementation="chunked")
    np.testing.assert_allclose(selective_scan(**arguments, reverse=True), jnp.flip(forward, 1), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("implementation", [*IMPLEMENTATIONS, pytest.param("pallas-tpu", marks=pytest.mark.slow)])
@pytest.mark.parametrize(
    "mesh",
    [
        pytest.param({"data": 8}, id="dp8", marks=pytest.mark.slow),
        pytest.param({"data": 2, "fsdp": 2, "tensor": 2}, id="2x2x2"),
    ],
)
def test_devices_scan_their_own_part_and_only_sums_cross(implementation, mesh):
    arguments = draw((8, 21, 6, 4))
    g, g_last = jnp.ones((8, 21, 6)), jnp.ones((8, 6, 4))
    alone = value_and_gradients(implementation, arguments, g, g_last)
    mesh = make_mesh(mesh)
    along = {3: P(("data", "fsdp"), None, "tensor"), 2: P("tensor", None), 1: P("tensor")}
    whole = P(("data", "fsdp"), None, None)  # of B and C, which have no channels

    def spread(name, x):
        return jax.device_put(x, NamedSharding(mesh, whole if name in ("B", "C") else along[x.ndim]))

    spread_out = {name: spread(name, x) for name, x in arguments.items()}
    with jax.set_mesh(mesh):
        together = value_and_gradients(implementation, spread_out, g, g_last)
        gradient = jax.grad(lambda x: jnp.sum(scan(implementation, **x)))
        text = jax.jit(gradient).lower(spread_out).compile().as_text()
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=2e-5, atol=1e-5), together, alone)
    assert "all-reduce" in text
    loops = [part for part in text.split("\n\n") if "get-tuple-element" in part and not part.startswith("ENTRY")]
    assert not any("all-" in line.split("(")[0] for part in loops for line in part.splitlines()), "a loop communicates"


def test_one_example_on_many_devices_is_computed_by_all():
    arguments = draw((1, 9, 4, 2))
    alone = selective_scan(**arguments)
    with jax.set_mesh(make_mesh({"data": 8})):
        np.testing.assert_allclose(jax.jit(lambda x: selective_scan(**x))(arguments), alone, rtol=1e-6, atol=1e-6)


def test_axes_that_divide_split_and_others_do_not():
    with jax.set_mesh(make_mesh({"data": 2, "fsdp": 2, "tensor": 2})):
        assert mesh_axes(batch=8, channels=6) == {"batch": ("data", "fsdp"), "channels": ("tensor",)}
        assert mesh_axes(batch=6, channels=5) == {"batch": ("data",), "channels": ()}
        assert mesh_axes(batch=1) == {"batch": ()}
    assert mesh_axes(batch=8) == {"batch": ()}
    explicit = jax.make_mesh((8,), ("x",), axis_types=(AxisType.Explicit,))
    with jax.set_mesh(explicit), pytest.raises(UserError, match="explicit axes .*; valid: automatic"):
        mesh_axes(batch=8)


def test_a_mesh_with_other_axes_is_left_to_the_compiler():
    arguments = draw((8, 9, 4, 2))
    mesh = jax.make_mesh((8,), ("x",), axis_types=(AxisType.Auto,))
    placed = {n: jax.device_put(x, NamedSharding(mesh, P("x") if x.ndim == 3 else P())) for n, x in arguments.items()}
    with jax.set_mesh(mesh):
        out = jax.jit(lambda x: selective_scan(**x))(placed)
    assert out.sharding.shard_shape(out.shape) == (1, 9, 4)
    np.testing.assert_allclose(out, selective_scan(**arguments), rtol=1e-6, atol=1e-6)


def test_inside_a_shard_map_of_the_caller():
    arguments = draw((8, 9, 4, 2))
    mesh = make_mesh({"data": 8})
    specs = {name: P("data") if x.ndim == 3 else P() for name, x in arguments.items()}

    def run(check):
        local = jax.shard_map(
            lambda x: selective_scan(**x), mesh=mesh, in_specs=(specs,), out_specs=P("data"), check_vma=check
        )
        return jax.jit(local)(arguments)

    np.testing.assert_allclose(run(False), selective_scan(**arguments), rtol=1e-6, atol=1e-6)
    with pytest.raises(UserError, match="check_vma=False"):
        run(True)


def test_chunked_needs_a_twentieth_of_the_memory_of_associative():
    arguments = draw((2, 1024, 768, 16))
    del arguments["D"], arguments["z"], arguments["delta_bias"]

    def temporaries(implementation):
        grad = jax.jit(jax.grad(lambda x: jnp.sum(scan(implementation, **x))))
        return grad.lower(arguments).compile().memory_analysis().temp_size_in_bytes

    assert 20 * temporaries("chunked") < temporaries("associative")


@pytest.mark.parametrize("tokens, length", [(1, 1), (16, 16), (17, 9), (18, 9), (258, 16), (1026, 16)])
def test_chunks_are_of_about_equal_length(tokens, length):
    assert balanced(tokens) == length


@pytest.mark.parametrize("target, kernel", [("cpu", False), ("gpu", False), ("tpu", True)])
def test_only_a_tpu_gets_a_kernel_by_default(target, kernel, monkeypatch):
    """That of a GPU is compiled by Triton, which is leaving JAX."""
    monkeypatch.setattr(module, "platform", lambda: target)
    jaxpr = jax.make_jaxpr(jax.grad(lambda x: jnp.sum(exported(**x))))(draw((1, 4, 8, 2)))
    assert ("pallas_call" in str(jaxpr)) == kernel
    assert ("scan[" in str(jaxpr)) != kernel


def test_chunked_in_parallel_is_the_same_recurrence(monkeypatch):
    """The form for a GPU, over more than one chunk."""
    arguments = draw((2, 130, 4, 3))
    run = lambda: jax.value_and_grad(lambda x: jnp.sum(exported(**x, implementation="chunked") ** 2))(arguments)  # noqa: E731
    expected = run()
    monkeypatch.setattr(module, "platform", lambda: "gpu")
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-4 * np.abs(b).max()), run(), expected)


def test_the_choice_is_logged_once(caplog, monkeypatch):
    _default.cache_clear()
    logger = logging.getLogger("diffjax")
    monkeypatch.setattr(logger, "handlers", [caplog.handler])  # the program's own may stand there
    monkeypatch.setattr(logger, "propagate", False)
    with caplog.at_level(logging.INFO, logger="diffjax"):
        for _ in range(3):
            exported(**draw((1, 4, 2, 2)))
    assert [record.getMessage() for record in caplog.records] == ["selective_scan: chunked, as this program is for cpu"]


@pytest.mark.parametrize(
    "change, words",
    [
        ({"u": jnp.zeros((2, 3))}, r"u is \(2, 3\).*valid: u \[b, l, e\]"),
        ({"u": jnp.zeros((2, 0, 4)), "delta": jnp.zeros((2, 0, 4))}, "none empty"),
        ({"A": jnp.zeros((4, 0))}, "none empty"),
        ({"B": None}, "B not given; only D, z and delta_bias may be None"),
        ({"A": jnp.zeros((5, 3))}, r"A is \(5, 3\)"),
        ({"delta": jnp.zeros((2, 6, 1))}, r"delta is \(2, 6, 1\), expected \(2, 6, 4\)"),
        ({"B": jnp.zeros((2, 6, 4))}, r"B is \(2, 6, 4\), expected \(2, 6, 3\)"),
        ({"delta_bias": jnp.zeros((3,))}, r"delta_bias is \(3,\), expected \(4,\)"),
        ({"u": jnp.zeros((2, 6, 4), jnp.float16)}, "u is float16; valid: float32, bfloat16"),
        ({"C": jnp.zeros((2, 6, 3), jnp.int32)}, "C is int32; valid: float32, bfloat16"),
        ({"z": jnp.zeros((2, 6, 4), jnp.bfloat16)}, "z is bfloat16 and u is float32; valid: the same"),
        ({"implementation": "fast"}, "'fast' is unknown; valid: sequential, associative, chunked, pallas"),
        ({"implementation": "pallas"}, "'pallas' runs on tpu and gpu, this program is for cpu; use 'chunked'"),
    ],
)
def test_bad_input_is_one_clear_error(change, words):
    with pytest.raises(UserError, match=words):
        selective_scan(**(draw((2, 6, 4, 3)) | change))
