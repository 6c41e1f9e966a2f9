"""DiT: the published sizes, its start, its switches."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from diffjax import models
from diffjax.errors import UserError
from diffjax.models.layers import layer_norm, sincos_positions, sinusoidal_time
from diffjax.ops.macs import count_macs

X = jax.ShapeDtypeStruct((1, 32, 32, 4), jnp.float32)
T = jax.ShapeDtypeStruct((1,), jnp.float32)
Y = jax.ShapeDtypeStruct((1,), jnp.int32)
DIT_SIZES = [name for name, row in models.MODELS.items() if row.family == "DiT"]

# Published with the frozen position table counted as a parameter.
WITH_POSITIONS = {
    "DiT-S/2": 32_963_360,
    "DiT-S/4": 32_945_024,
    "DiT-S/8": 33_148_160,
    "DiT-B/2": 130_512_416,
    "DiT-B/4": 130_475_648,
    "DiT-B/8": 130_881_536,
    "DiT-L/2": 458_102_816,
    "DiT-L/4": 458_053_760,
    "DiT-L/8": 458_594_816,
    "DiT-XL/2": 675_129_632,
    "DiT-XL/4": 675_074_432,
    "DiT-XL/8": 675_683_072,
}


def tiny(**kwargs):
    return models.create("DiT", **{"patch": 2, "depth": 2, "width": 48, "heads": 3, "num_classes": 10, **kwargs})


def some_params(model, size=8):
    """Parameters that are all drawn, so that no path is dead as it is in a fresh model."""
    x, t, y = jnp.zeros((1, size, size, model.channels)), jnp.zeros(1), jnp.zeros(1, jnp.int32)
    leaves, tree = jax.tree.flatten(jax.eval_shape(model.init, jax.random.key(0), x, t, y)["params"])
    keys = jax.random.split(jax.random.key(1), len(leaves))
    return tree.unflatten([0.1 * jax.random.normal(k, leaf.shape) for k, leaf in zip(keys, leaves)])


def inputs(size=8, channels=4):
    return jax.random.normal(jax.random.key(2), (3, size, size, channels)), jnp.array([0.0, 500, 999]), jnp.arange(3)


@pytest.mark.parametrize("name", DIT_SIZES)
def test_parameter_count_and_gmacs_are_the_published_ones(name):
    row, model = models.MODELS[name], models.create(name)
    params = jax.eval_shape(model.init, jax.random.key(0), X, T, Y)["params"]
    count = sum(leaf.size for leaf in jax.tree.leaves(params))
    assert count == row.params
    tokens = (32 // model.patch) ** 2
    assert count + tokens * model.width == WITH_POSITIONS[name]
    gmacs = count_macs(lambda p, x, t, y: model.apply({"params": p}, x, t, y), params, X, T, Y) / 1e9
    assert gmacs == pytest.approx(row.gmacs, rel=3e-4, abs=0.01)  # the papers print two decimals


def test_gmacs_of_xl_at_512_pixels():
    model, x = models.create("DiT-XL/2"), jax.ShapeDtypeStruct((1, 64, 64, 4), jnp.float32)
    params = jax.eval_shape(model.init, jax.random.key(0), x, T, Y)["params"]
    gmacs = count_macs(lambda p, x, t, y: model.apply({"params": p}, x, t, y), params, x, T, Y)
    assert gmacs / 1e9 == pytest.approx(524.538, abs=1e-3)


@pytest.mark.parametrize("name", ["dit-xl-2", "DIT-XL/2", "DiT-XL-2"])
def test_names_do_not_depend_on_case_or_slash(name):
    assert models.create(name) == models.create("DiT-XL/2")


def test_a_fresh_model_returns_zeros():
    model = tiny()
    params = model.init(jax.random.key(0), *inputs())["params"]
    assert not model.apply({"params": params}, *inputs()).any()


def test_initial_weights_have_the_published_spread():
    model = tiny(width=192)
    params = model.init(jax.random.key(0), *inputs())["params"]
    d, f = 192, 768
    bounds = {
        "qkv": (params["blocks"]["attention"]["qkv"]["kernel"], d, 3 * d),
        "out": (params["blocks"]["attention"]["out"]["kernel"], d, d),
        "fc1": (params["blocks"]["mlp"]["fc1"]["kernel"], d, f),
        "patch": (params["patch_embed"]["kernel"], 16, d),
    }
    for name, (kernel, fan_in, fan_out) in bounds.items():
        bound = np.sqrt(6 / (fan_in + fan_out))
        assert float(jnp.abs(kernel).max()) == pytest.approx(bound, rel=0.02), name
        assert float(kernel.std()) == pytest.approx(bound / np.sqrt(3), rel=0.05), name
    for normal in (params["time_embed"]["fc1"]["kernel"], params["label_embed"]["embedding"]):
        assert float(normal.std()) == pytest.approx(0.02, rel=0.05)
    first, second = params["blocks"]["mlp"]["fc1"]["kernel"]
    assert not np.allclose(first, second), "every block draws its own values"


def test_gradients_are_finite_and_reach_every_parameter():
    model = tiny()
    params = some_params(model)
    x, t, y = inputs()
    grads = jax.jit(jax.grad(lambda p: jnp.mean(model.apply({"params": p}, x, t, y) ** 2)))(params)
    for path, leaf in jax.tree_util.tree_leaves_with_path(grads):
        assert np.isfinite(leaf).all(), path
        assert np.abs(leaf).max() > 0, path


@pytest.mark.slow
@pytest.mark.parametrize("remat", ["full", "none"])
def test_rematerialisation_changes_no_value(remat):
    x, t, y = inputs()

    def value_and_grad(model, params):
        return jax.value_and_grad(lambda p: jnp.mean(model.apply({"params": p}, x, t, y) ** 2))(params)

    params = some_params(tiny())
    dots, other = value_and_grad(tiny(remat="dots"), params), value_and_grad(tiny(remat=remat), params)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6), dots, other)


def test_bfloat16_computes_in_bfloat16_and_returns_float32():
    params, (x, t, y) = some_params(tiny()), inputs()
    full = tiny().apply({"params": params}, x, t, y)
    half = tiny(dtype="bfloat16").apply({"params": params}, x, t, y)
    assert half.dtype == jnp.float32
    assert 1e-4 < float(jnp.abs(half - full).max() / jnp.abs(full).max()) < 0.05


def test_unconditional_and_without_learned_sigma():
    model = tiny(num_classes=0, learn_sigma=False)
    x, t, _ = inputs()
    params = model.init(jax.random.key(0), x, t, None)["params"]
    assert "label_embed" not in params
    assert model.apply({"params": params}, x, t, None).shape == x.shape


def test_positions_encode_columns_first():
    table = sincos_positions(3, 5, 16).reshape(3, 5, 2, 8)
    np.testing.assert_array_equal(table[0, :, 0], table[2, :, 0])  # the first half knows the column alone
    np.testing.assert_array_equal(table[:, 0, 1], table[:, 4, 1])
    np.testing.assert_allclose(table[0, 3, 0, [0, 4]], [np.sin(3), np.cos(3)], rtol=1e-6)


def test_time_features_are_cosines_first():
    features = np.asarray(sinusoidal_time(jnp.array([2.0])))[0]
    np.testing.assert_allclose(features[[0, 128]], [np.cos(2), np.sin(2)], rtol=1e-6)


def test_layer_norm_statistics_are_float32_for_bfloat16_input():
    x = (1000 + jax.random.normal(jax.random.key(0), (4, 256))).astype(jnp.bfloat16)
    y = layer_norm(x)
    assert y.dtype == jnp.bfloat16
    assert abs(float(y.astype(jnp.float32).std()) - 1) < 0.02


@pytest.mark.parametrize(
    "kwargs, words",
    [
        ({"heads": 5}, "width = 48 is not divisible by heads = 5"),
        ({"width": 45, "heads": 3}, "not divisible by 4"),
        ({"dtype": "float16"}, "valid: float32, bfloat16"),
        ({"remat": "some"}, "valid: none, full, dots"),
        ({"attention": "fast"}, "valid: xla, cudnn"),
        ({"depth": 0}, "depth = 0"),
        ({"colour": 1}, "has no argument colour"),
    ],
)
def test_bad_arguments_are_one_clear_error(kwargs, words):
    with pytest.raises(UserError, match=words):
        tiny(**kwargs)


def test_unknown_names_and_missing_sizes_are_errors():
    with pytest.raises(UserError, match=r"'DiT-Q/2' is unknown; did you mean DiT-S/2 or "):
        models.create("DiT-Q/2")
    with pytest.raises(UserError, match="valid: DiT, DiS, U-DiT, DiffiT, DiffiT-UNet, DiGIT, VAE, DiT-S/2"):
        models.create("StyleGAN")
    with pytest.raises(UserError, match="depth"):
        models.create("DiT", patch=2)


def test_an_image_that_cannot_be_cut_and_missing_labels_are_errors():
    model = tiny()
    with pytest.raises(UserError, match="9 x 9 is not divisible by the model's patch = 2"):
        model.init(jax.random.key(0), jnp.zeros((1, 9, 9, 4)), jnp.zeros(1), jnp.zeros(1, int))
    with pytest.raises(UserError, match="needs labels"):
        model.init(jax.random.key(0), jnp.zeros((1, 8, 8, 4)), jnp.zeros(1), None)
