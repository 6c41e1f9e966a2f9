"""The image-space DiffiT: counts of its sizes by formula, its start, its switches, dropout, sharding of its leaves."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from diffjax import models, rng
from diffjax.errors import UserError
from diffjax.models import layers
from diffjax.models.diffit_unet import SIZES, fourier_time, positional_time
from diffjax.models.layers import drop
from diffjax.ops.attention import attention
from diffjax.ops.macs import count_macs
from diffjax.parallel.mesh import make_mesh
from diffjax.parallel.rules import key_path, shardings

T = jax.ShapeDtypeStruct((1,), jnp.float32)
COUNTS = {
    "DiffiT-CIFAR10": (28_702_339, 7.36),
    "DiffiT-CIFAR10_l2": (15_880_771, 4.33),
    "DiffiT-CIFAR10_w256": (39_642_659, 16.42),
    "DiffiT-FFHQ64": (44_835_779, 32.21),
    "DiffiT-FFHQ64_l2": (23_810_395, 15.95),
}


def tiny(**kwargs):
    sizes = {"widths": (16, 32), "depth": (1, 2), "window": 4, "head_width": 8, "groups": 8, "time_width": 24}
    return models.create("DiffiT-UNet", **{**sizes, **kwargs})


def inputs(size=8):
    x = jax.random.normal(jax.random.key(2), (3, size, size, 3))
    return x, jnp.array([-1.5, 0.0, 1.1]), jnp.arange(3)


def some_params(model, size=8):
    """Parameters that are all drawn, so that no path is dead as it is in a fresh model."""
    leaves, tree = jax.tree.flatten(jax.eval_shape(model.init, jax.random.key(0), *inputs(size))["params"])
    keys = jax.random.split(jax.random.key(1), len(leaves))
    return tree.unflatten([0.1 * jax.random.normal(k, leaf.shape) for k, leaf in zip(keys, leaves)])


@functools.cache
def apply(model, **keywords):
    """`model.apply` on the parameters of `some_params`, compiled."""
    params, keywords = some_params(model), dict(keywords)
    return jax.jit(lambda x, t, y, keys=None: model.apply({"params": params}, x, t, y, keys=keys, **keywords))


def block_count(a, c, window):
    """Parameters of a residual block from a to c channels."""
    heads, table = c // 32, (2 * window - 1) ** 2
    convolution = 2 * a + 9 * a * c + c + (a * c + c if a != c else 0)
    attend = 3 * c**2 + 3 * c + 3 * 512 * c + 3 * c + c**2 + c + table * heads
    return convolution + 4 * c + attend + 8 * c**2 + 5 * c


def count(widths, depth, window, size):
    """Parameters of the U: first and last convolution, time, and per stage its blocks, twice but for the lowest."""
    total = 9 * 3 * widths[0] + widths[0]
    total += 9 * 128 + 128 * 512 + 512 + 512 * 512 + 512
    total += 2 * widths[0] + 9 * widths[0] * 3 + 3
    for i, width in enumerate(widths):
        side = min(window, size // 2**i)
        rest = (depth[i] - 1) * block_count(width, width, side)
        total += block_count(widths[max(i - 1, 0)], width, side) + rest
        if i < len(widths) - 1:
            below = widths[i + 1]
            total += 9 * width**2 + width + 9 * below**2 + below  # down and up
            total += block_count(below + width, width, side) + rest
    return total


@pytest.mark.parametrize("name", COUNTS)
def test_parameters_and_gmacs(name):
    """Nothing is published to compare with: by the formula, and by what was counted elsewhere from the description."""
    model, row, size = models.create(name), models.MODELS[name], 64 if "FFHQ" in name else 32
    x = jax.ShapeDtypeStruct((1, size, size, 3), jnp.float32)
    params = jax.eval_shape(model.init, jax.random.key(0), x, T, None)["params"]
    total = sum(leaf.size for leaf in jax.tree.leaves(params))
    widths, depth, window, _ = SIZES[name.removeprefix("DiffiT-")]
    assert total == row.params == COUNTS[name][0] == count(widths, depth, window, size)
    macs = count_macs(lambda p, x, t: model.apply({"params": p}, x, t, None), params, x, T)
    assert macs / 1e9 == pytest.approx(row.gmacs, abs=0.005)
    assert macs / 1e9 == pytest.approx(COUNTS[name][1], abs=0.005)
    assert macs > 20 * count_products(model, size)


def count_products(model, size):
    """Multiply-accumulates of the two products of attention alone: windows of 16 or 64 tokens make them few."""
    total, lowest = 0, len(model.widths) - 1
    for i, (width, depth) in enumerate(zip(model.widths, model.depth)):
        n, heads = model.window**2, width // model.head_width
        q = jax.ShapeDtypeStruct(((size // 2**i) ** 2 // n, n, heads, model.head_width), jnp.float32)
        total += depth * (1 if i == lowest else 2) * count_macs(attention, q, q, q)
    return total


@pytest.mark.slow
def test_a_fresh_model_returns_zeros_of_the_input_s_shape():
    model, (x, t, _) = tiny(widths=(16,), depth=(1,)), inputs()
    params = jax.jit(model.init)(jax.random.key(0), x, t, None)["params"]
    out = model.apply({"params": params}, x, t, None)
    assert out.shape == x.shape
    assert not out.any()
    for path, leaf in jax.tree_util.tree_leaves_with_path(params):
        if path[-1].key == "bias" or path[0].key == "final":
            assert not leaf.any(), path


@pytest.mark.slow
@pytest.mark.parametrize("kwargs", [{}, {"num_classes": 5, "time_in": "mlp", "time_features": "fourier"}], ids=str)
def test_gradients_are_finite_and_reach_every_parameter(kwargs):
    model, (x, t, y) = tiny(**kwargs), inputs()
    augment = jax.random.normal(jax.random.key(0), (3, 9))

    @jax.jit
    def gradients(params):
        return jax.grad(lambda p: jnp.mean(model.apply({"params": p}, x, t, y, augment=augment) ** 2))(params)

    for path, leaf in jax.tree_util.tree_leaves_with_path(gradients(some_params(model))):
        assert np.isfinite(leaf).all(), path
        assert np.abs(leaf).max() > 0, path


@pytest.mark.slow
def test_time_label_and_augmentation_matter_and_none_is_zeros():
    model, (x, t, y) = tiny(num_classes=5), inputs()
    params = some_params(model)
    forward = jax.jit(lambda t, y, augment: model.apply({"params": params}, x, t, y, augment=augment))
    out = forward(t, y, None)
    np.testing.assert_allclose(out, forward(t, y, jnp.zeros((3, 9))), rtol=1e-4, atol=1e-5)
    for other in (forward(t + 0.5, y, None), forward(t, y + 1, None), forward(t, y, jnp.ones((3, 9)))):
        assert float(jnp.abs(other - out).max()) > 1e-3


@pytest.mark.slow
@pytest.mark.parametrize("remat", ["full", "none"])
def test_rematerialisation_changes_no_value(remat):
    x, t, y = inputs()

    def value_and_grad(model, params):
        loss = jax.jit(jax.value_and_grad(lambda p: jnp.mean(model.apply({"params": p}, x, t, y) ** 2)))
        return loss(params)

    params = some_params(tiny())
    close = functools.partial(np.testing.assert_allclose, rtol=1e-4, atol=1e-6)
    jax.tree.map(close, value_and_grad(tiny(remat="dots"), params), value_and_grad(tiny(remat=remat), params))


@pytest.mark.slow
def test_bfloat16_returns_float32():
    full, half = (apply(tiny(dtype=dtype))(*inputs()) for dtype in ("float32", "bfloat16"))
    assert half.dtype == jnp.float32
    assert 1e-4 < float(jnp.abs(half - full).max() / jnp.abs(full).max()) < 0.05


@pytest.mark.slow
def test_dropout_is_drawn_for_every_example_from_its_own_key():
    model, (x, t, y) = tiny(dropout=0.2), inputs()
    train = apply(model, train=True)
    keys = rng.per_example(jax.random.key(3), jnp.arange(3))
    out = train(x, t, y, keys)
    assert not np.allclose(out, apply(model)(x, t, y), atol=1e-3)
    np.testing.assert_allclose(train(x[::-1], t[::-1], y, keys[::-1]), out[::-1], rtol=1e-4, atol=1e-5)
    others = train(x, t, y, keys.at[1].set(jax.random.key(9)))
    np.testing.assert_allclose(others[::2], out[::2], rtol=1e-4, atol=1e-5)
    assert not np.allclose(others[1], out[1], atol=1e-3)
    with pytest.raises(UserError, match="dropout above 0 needs keys, one per example"):
        train(x, t, y)


def test_dropped_values_are_zero_and_the_others_grow():
    x = jnp.ones((2, 100, 100))
    dropped = drop(x, 0.25, rng.per_example(jax.random.key(0), jnp.arange(2)))
    np.testing.assert_allclose(np.unique(dropped), [0, 4 / 3], rtol=1e-6)
    assert float((dropped == 0).mean()) == pytest.approx(0.25, abs=0.01)
    assert (dropped[0] != dropped[1]).any()


@pytest.mark.slow
def test_every_block_drops_others(monkeypatch):
    """Of two examples, and a stage down and up and one below with two blocks: eight keys."""
    seen = []
    monkeypatch.setattr(layers, "drop", lambda x, rate, keys: (seen.append(jax.random.key_data(keys)), x)[1])
    model = tiny(dropout=0.5, remat="none")
    x, t, y = inputs()
    params = jax.eval_shape(model.init, jax.random.key(0), x, t, y)["params"]
    examples = rng.per_example(jax.random.key(0), jnp.arange(len(x)))
    zeros = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape), params)
    model.apply({"params": zeros}, x, t, y, train=True, keys=examples)
    assert len(np.unique(np.concatenate(seen), axis=0)) == len(x) * len(seen) == len(x) * 4


def test_time_features():
    features = np.asarray(positional_time(jnp.array([0.7])))[0]
    expected = [np.sin(0.7), np.sin(0.7e-4), np.cos(0.7), np.cos(0.7 * 1e4 ** (-1 / 63))]
    np.testing.assert_allclose(features[[0, 63, 64, 65]], expected, rtol=1e-5)
    waves = np.asarray(fourier_time(jnp.linspace(-1, 1, 500)))
    np.testing.assert_allclose(waves[:, :64] ** 2 + waves[:, 64:] ** 2, 1, atol=1e-5)
    assert np.array_equal(waves, fourier_time(jnp.linspace(-1, 1, 500)))


def test_maps_smaller_than_a_window_are_one_window():
    shapes = jax.eval_shape(tiny(window=8).init, jax.random.key(0), *inputs())["params"]
    sides = {name: shapes[name]["block"]["attention"]["relative_bias"].shape[-2] for name in shapes if "coder" in name}
    assert sides == {
        "encoder_0_0": 15**2,
        "encoder_1_0": 7**2,
        "encoder_1_1": 7**2,
        "decoder_0_0": 15**2,
    }


@pytest.mark.parametrize("name", ["DiffiT-CIFAR10", "DiffiT-FFHQ64"])
def test_what_is_sharded(name):
    """Heads, with their bias tables, and hidden values on the tensor axis; all large weights on fsdp."""
    model = models.create(name, num_classes=10, time_in="attention")
    x, y = jax.ShapeDtypeStruct((1, 64, 64, 3), jnp.float32), jax.ShapeDtypeStruct((1,), jnp.int32)
    params = jax.eval_shape(model.init, jax.random.key(0), x, T, y)["params"]
    mesh = make_mesh({"data": 2, "fsdp": 2, "tensor": 2})
    tree = shardings(params, mesh, "fsdp_tp", model.logical_axes, 0)
    specs = {key_path(path): leaf.spec for path, leaf in jax.tree_util.tree_leaves_with_path(tree)}
    for path, shape in ((key_path(p), leaf.shape) for p, leaf in jax.tree_util.tree_leaves_with_path(params)):
        if "relative_bias" in path:
            assert specs[path][len(shape) - 2 :] == (None, "tensor"), path
        if path.endswith(("fc1/kernel", "qkv/kernel", "qkv_time/kernel")) and "block/" in path:
            assert {"fsdp", "tensor"} <= set(specs[path]), path
        if np.prod(shape) > 2**16:
            assert {"fsdp", "tensor"} & set(specs[path]), path


@pytest.mark.parametrize(
    "kwargs, words",
    [
        ({"head_width": 12}, "a width of 16 is not divisible by head_width = 12"),
        ({"groups": 32}, "a width of 16 is not divisible by groups = 32"),
        ({"depth": (1,)}, r"depth = \(1,\): valid: a positive integer per stage"),
        ({"depth": (1, 0)}, r"depth = \(1, 0\)"),
        ({"window": 0}, "window = 0"),
        ({"dropout": 1.0}, "dropout = 1.0: valid: 0 to below 1"),
        ({"augment_labels": -1}, "augment_labels = -1"),
        ({"time_features": "sine"}, "valid: positional, fourier"),
        ({"time_in": "bias"}, "valid: attention, values, mlp"),
        ({"attention": "fast"}, "valid: xla, cudnn"),
        ({"num_classes": -1}, "num_classes = -1"),
    ],
)
def test_bad_arguments_are_one_clear_error(kwargs, words):
    with pytest.raises(UserError, match=words):
        tiny(**kwargs)


def test_bad_inputs_are_one_clear_error():
    model, (x, t, _) = tiny(num_classes=5, augment_labels=0), inputs()
    with pytest.raises(
        UserError, match="12 x 12: its map at 1/2 cannot be cut into windows of side 4; .* 8 and its mul"
    ):
        model.check_input(12, 12)
    for size in (1, 9):
        with pytest.raises(UserError, match="cannot be cut"):
            model.check_input(size, size)
    for size in ((8, 16), (4, 4), (2, 2)):
        model.check_input(*size)
    with pytest.raises(UserError, match="needs labels"):
        jax.eval_shape(model.init, jax.random.key(0), x, t, None)
    with pytest.raises(UserError, match="augment_labels = 0: it takes none"):
        jax.eval_shape(lambda: model.init(jax.random.key(0), x, t, None, augment=jnp.zeros((3, 9))))
    params = jax.eval_shape(tiny().init, jax.random.key(0), *inputs())
    with pytest.raises(UserError, match="a bias for windows of 4 x 4 tokens, not of 2 x 2"):
        jax.eval_shape(tiny().apply, params, *inputs(4))
