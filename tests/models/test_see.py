"""`see`: the output of one chosen block beside the model's own, for all families."""

import functools
from collections import Counter

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from diffjax.errors import UserError
from diffjax.models import udit
from diffjax.parallel.mesh import batch_sharding, make_mesh
from diffjax.parallel.rules import shardings
from tests import slow
from tests.models import test_diffit, test_diffit_unet, test_digit, test_dis, test_dit, test_udit

MODELS = {
    "DiT": test_dit.tiny(depth=3),
    "DiS": test_dis.tiny(),
    "U-DiT": test_udit.tiny(),
    "DiffiT": test_diffit.tiny(remat="none"),
    "DiffiT-UNet": test_diffit_unet.tiny(dropout=0.2),
    "DiGIT": test_digit.tiny(**test_digit.SOURCE, depth=3),
}
# Their blocks in order: the parameters of each, and its place in them if they are stacked.
PARTS = {
    "DiT": [("blocks", 0), ("blocks", 1), ("blocks", 2)],
    "DiS": [("in_blocks", 0), ("in_blocks", 1), ("mid_block", None), ("out_blocks", 0), ("out_blocks", 1)],
    "U-DiT": [(stage, None) for stage in udit.STAGES],
    "DiffiT": [("blocks", 0), ("blocks", 1)],
    "DiffiT-UNet": [("encoder_0_0", None), ("encoder_1_1", None), ("decoder_0_0", None)],
    "DiGIT": [("blocks", 0), ("blocks", 1), ("blocks", 2)],
}
SCANNED = ("DiT", "DiS", "DiffiT", "DiGIT")


def inputs(family):
    if family == "DiGIT":
        return test_digit.inputs(MODELS[family])
    return test_diffit_unet.inputs() if family == "DiffiT-UNet" else test_dit.inputs()


@functools.cache
def some_params(family, model=None):
    """Parameters that are all drawn, so that no path is dead."""
    shapes = jax.eval_shape((model or MODELS[family]).init, jax.random.key(0), *inputs(family))["params"]
    draw = np.random.default_rng(1).standard_normal
    return jax.tree.map(lambda leaf: np.float32(0.1) * draw(leaf.shape, np.float32), shapes)


def call(family, **options):
    model = MODELS[family].clone(**{k: options.pop(k) for k in ("remat", "dtype") if k in options})
    keys = {"keys": jax.random.split(jax.random.key(7), 3)} if options.get("train") else {}
    return lambda p: model.apply({"params": p}, *inputs(family), **keys, **options)


@functools.cache
def captured(family, train, dtype):
    """The model's output, and those of all blocks, in order, kept by flax."""
    run = jax.jit(call(family, train=train, dtype=dtype, capture_intermediates=True))
    out, state = run(some_params(family))
    blocks = []
    for name, index in PARTS[family]:
        value = state["intermediates"][name]["__call__"][0]
        if family == "U-DiT":
            value = value[0][-1]  # of the last layer
        elif family == "DiS":
            (h, r), _ = value if index is None else jax.tree.map(lambda leaf, i=index: leaf[i], value)
            value = h.astype(jnp.float32) + r
        elif family == "DiGIT":
            value = value[0][0][index]
        elif family != "DiffiT-UNet":
            value = value[0][index]
        blocks.append(value)
    return out, blocks


@pytest.mark.parametrize(
    "family, see, train, dtype",
    [
        ("DiT", 0, False, "float32"),
        ("DiT", 1, False, "bfloat16"),
        ("DiT", 2, True, "float32"),
        *(
            pytest.param(*case, marks=pytest.mark.slow)
            for case in [
                ("DiS", 1, False, "float32"),
                ("DiS", 1, True, "float32"),
                ("DiS", 2, True, "float32"),
                ("DiS", 3, True, "float32"),
                ("DiS", 4, True, "bfloat16"),
                ("U-DiT", 0, True, "float32"),
                ("U-DiT", 3, True, "float32"),
                ("DiffiT", 0, False, "float32"),
                ("DiffiT", 1, False, "float32"),
                ("DiffiT-UNet", 1, True, "float32"),
                ("DiffiT-UNet", 2, True, "float32"),
                ("DiGIT", 0, False, "float32"),
                ("DiGIT", 1, True, "float32"),
                ("DiGIT", 2, True, "bfloat16"),
            ]
        ),
    ],
)
def test_the_output_is_the_same_and_what_is_seen_is_the_blocks(family, see, train, dtype):
    expected, blocks = captured(family, train, dtype)
    out, seen = jax.jit(call(family, train=train, dtype=dtype, see=see))(some_params(family))
    tolerance = {"atol": 1e-5, "rtol": 1e-5} if dtype == "float32" else {"atol": 0.05, "rtol": 0.05}
    np.testing.assert_allclose(out, expected, **tolerance)
    assert seen.shape == blocks[see].shape
    assert seen.dtype == blocks[see].dtype == ("float32" if family == "DiS" else dtype)
    np.testing.assert_allclose(np.float32(seen), np.float32(blocks[see]), **tolerance)


def test_the_output_of_a_scanned_model_is_bitwise_the_same():
    run = {see: jax.jit(call("DiT", see=see)) for see in (None, 1)}
    params = some_params("DiT")
    np.testing.assert_array_equal(run[1](params)[0], run[None](params))


def test_a_truncated_model_ends_with_what_is_seen():
    """The first two of three blocks, as a model of their own."""
    params = some_params("DiT")
    first = {**params, "blocks": jax.tree.map(lambda leaf: leaf[:2], params["blocks"])}
    short = MODELS["DiT"].clone(depth=2)
    forward = jax.jit(lambda p: short.apply({"params": p}, *inputs("DiT"), capture_intermediates=True)[1])
    last = forward(first)["intermediates"]["blocks"]["__call__"][0][0][-1]
    seen = jax.jit(call("DiT", see=1))(params)[1]
    np.testing.assert_allclose(seen, last, atol=1e-6)


@pytest.mark.parametrize(
    "family, see",
    [
        ("DiT", 1),
        *(
            pytest.param(*case, marks=pytest.mark.slow)
            for case in [("DiS", 3), ("U-DiT", 2), ("DiffiT", 0), ("DiffiT-UNet", 1), ("DiGIT", 1)]
        ),
    ],
)
def test_gradients_reach_the_blocks_up_to_the_one_seen(family, see):
    gradients = jax.jit(jax.grad(lambda p: jnp.sum(jnp.sin(call(family, see=see)(p)[1].astype(jnp.float32)))))(
        some_params(family)
    )
    for j, (name, index) in enumerate(PARTS[family]):
        leaves = [leaf if index is None else leaf[index] for leaf in jax.tree.leaves(gradients[name])]
        size = max(float(jnp.abs(leaf).max()) for leaf in leaves)
        assert np.isfinite(size)
        assert (size > 0) == (j <= see), (name, index)
    last = "output" if family == "DiGIT" else "final"
    assert not any(np.any(leaf) for leaf in jax.tree.leaves(gradients[last]))


@pytest.mark.parametrize("family", slow.but(["DiT"], ["DiT", "DiffiT"]))
def test_gradients_of_the_output_do_not_depend_on_see(family):
    def loss(p, see):
        out = call(family, see=see)(p)
        return jnp.mean(jnp.sin(out if see is None else out[0]))

    run = jax.jit(jax.grad(loss), static_argnums=1)
    alone, beside = run(some_params(family), None), run(some_params(family), 1)
    for a, b in zip(jax.tree.leaves(alone), jax.tree.leaves(beside)):
        np.testing.assert_allclose(a, b, atol=1e-6, rtol=1e-4)


def scan_outputs(function, *arguments):
    """The shapes of all that the scans of a program return, with how often: stacked outputs, carries, residuals."""

    def visit(jaxpr):
        for equation in jaxpr.eqns:
            if equation.primitive.name == "scan":
                counter.update(variable.aval.shape for variable in equation.outvars)
            for value in equation.params.values():
                for inner in value if isinstance(value, tuple | list) else [value]:
                    if inner := getattr(inner, "jaxpr", inner if hasattr(inner, "eqns") else None):
                        visit(inner)

    counter = Counter()
    visit(jax.make_jaxpr(function)(*arguments).jaxpr)
    return counter


@pytest.mark.parametrize("family", slow.but(["DiT"], SCANNED))
def test_no_scan_returns_an_array_per_block_for_what_is_seen(family):
    """With remat = "full", forwards and with gradients: one more buffer, and the index's comparison in each step."""
    params = some_params(family)

    def loss(p, see):
        out = call(family, remat="full", see=see)(p)
        return sum(jnp.sum(jnp.sin(part.astype(jnp.float32))) for part in jax.tree.leaves(out))

    seen = jax.eval_shape(call(family, see=1), params)[1].shape
    for program in (loss, jax.grad(loss)):
        shapes = {see: scan_outputs(functools.partial(program, see=see), params) for see in (None, 1)}
        more = {shape: count for shape, count in (shapes[1] - shapes[None]).items() if len(shape) > 1}
        assert set(more) == {seen}, more
        assert more[seen] <= 2  # the buffer, and in the backward scan its cotangent


@pytest.mark.slow
def test_gradient_memory_does_not_grow_with_depth():
    """The compiled program of a deep DiT needs no more for `see` than a few buffers of its blocks' output."""
    model = test_dit.tiny(depth=24, remat="full")
    x, t, y = jnp.zeros((8, 16, 16, 4)), jnp.zeros(8), jnp.zeros(8, jnp.int32)
    params = jax.eval_shape(model.init, jax.random.key(0), x, t, y)["params"]

    def loss(p, see):
        out = model.apply({"params": p}, x, t, y, see=see)
        return sum(jnp.sum(jnp.sin(part)) for part in jax.tree.leaves(out))

    size = {
        see: jax.jit(jax.grad(loss), static_argnums=1).lower(params, see).compile().memory_analysis().temp_size_in_bytes
        for see in (None, 5)
    }
    buffer = 8 * 64 * model.width * 4
    assert size[5] - size[None] <= 4 * buffer
    assert size[None] > 24 * buffer  # which a stack of all outputs would have added


@pytest.mark.parametrize("family", slow.but(["DiT"], MODELS))
def test_parameters_do_not_depend_on_see(family):
    model = MODELS[family]
    shapes = [
        jax.eval_shape(functools.partial(model.init, see=see), jax.random.key(0), *inputs(family))["params"]
        for see in (None, model.blocks_to_see - 1)
    ]
    assert shapes[0] == shapes[1]


def test_parameters_start_alike():
    model = MODELS["DiT"]
    alone, beside = (
        jax.jit(functools.partial(model.init, see=see))(jax.random.key(0), *inputs("DiT"))["params"]
        for see in (None, 1)
    )
    jax.tree.map(np.testing.assert_array_equal, alone, beside)


@pytest.mark.parametrize("family", MODELS)
def test_a_block_that_is_not_there_is_an_error(family):
    count = MODELS[family].blocks_to_see
    assert count == len(PARTS[family])
    for see in (-1, count, 0.5):
        with pytest.raises(UserError, match=f"{family}: see = {see}: valid: 0 to {count - 1}"):
            jax.eval_shape(call(family, see=see), some_params(family))


def test_a_model_of_one_block():
    model = test_dis.tiny(depth=1)
    assert model.blocks_to_see == 1
    shapes = jax.eval_shape(lambda key: model.init_with_output(key, *inputs("DiS"), see=0)[0], jax.random.key(0))
    assert [leaf.shape for leaf in shapes] == [(3, 8, 8, 8), (3, 18, 32)]


def test_inside_of_another_module():
    class Probe(nn.Module):
        @nn.compact
        def __call__(self, *arguments):
            out, seen = MODELS["DiT"].clone(parent=self, name="model")(*arguments, see=1)
            return out, nn.Dense(5, name="probe")(seen)

    run = jax.jit(lambda key: Probe().init_with_output(key, *inputs("DiT")))
    (_, projected), variables = run(jax.random.key(0))
    assert projected.shape == (3, 16, 5)
    assert set(variables["params"]) == {"model", "probe"}


@pytest.mark.parametrize("family", slow.but(["DiT"], ["DiT", "DiGIT"]))
def test_on_a_mesh(family):
    mesh = make_mesh({"data": 2, "fsdp": 2, "tensor": 2})
    model = test_dit.tiny(depth=3, heads=4) if family == "DiT" else MODELS[family]
    params = some_params(family, model)
    arguments = [None if a is None else jnp.concatenate([a, a[:1]]) for a in inputs(family)]
    forward = jax.jit(lambda p, *a: model.apply({"params": p}, *a, see=1))
    expected = forward(params, *arguments)
    placed = jax.device_put(params, shardings(params, mesh, "fsdp_tp", model.logical_axes, 0))
    with jax.set_mesh(mesh):
        out = forward(placed, *(None if a is None else jax.device_put(a, batch_sharding(mesh)) for a in arguments))
    for a, b in zip(out, expected):
        np.testing.assert_allclose(a, b, atol=2e-5)
    assert out[1].sharding.shard_shape(out[1].shape)[0] == 1
