"""U-DiT: the published sizes, the fused form, its start, its switches."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from configs import udit_imagenet
from diffjax import models, rng
from diffjax.errors import UserError
from diffjax.models import udit
from diffjax.models.udit import fuse
from diffjax.ops.macs import count_macs
from diffjax.ops.rotary import rope_angles
from diffjax.training.state import initial_state

SIZES = [name for name, row in models.MODELS.items() if row.family == "U-DiT"]
# Printed in the paper, of the deploy form: millions of parameters and GFLOPs (multiply-accumulates in 1e9).
PUBLISHED = {"U-DiT-S": (52.05, 6.04), "U-DiT-B": (204.43, 22.22), "U-DiT-L": (810.19, 85.00)}
# Table 10: its vanilla models; parameters counted on the reference.
VANILLA = {"U-DiT-S": (51_465_992, 5.893), "U-DiT-B": (203_266_568, 21.924), "U-DiT-L": (807_871_496, 84.398)}
AT_512_PIXELS = {"U-DiT-S": 32.932, "U-DiT-B": 106.294, "U-DiT-L": 374.312}

ATTEND = udit.SubImageAttention(
    heads=2,
    factor=2,
    kernel=5,
    shortcut=True,
    kind="cosine",
    positions="rope",
    rope_rows="sqrt",
    logit_clamp=4.6052,
    depthwise=None,
    dtype=jnp.float32,
)


def shapes(model, side=32):
    x = jax.ShapeDtypeStruct((1, side, side, model.channels), jnp.float32)
    return x, jax.ShapeDtypeStruct((1,), jnp.float32), jax.ShapeDtypeStruct((1,), jnp.int32)


def counted(model, side=32):
    """Parameters and GMACs, every depthwise convolution on its own as the paper counts them."""
    model = model.clone(depthwise="separate")
    params = jax.eval_shape(model.init, jax.random.key(0), *shapes(model, side))["params"]
    macs = count_macs(lambda p, *inputs: model.apply({"params": p}, *inputs), params, *shapes(model, side))
    return sum(leaf.size for leaf in jax.tree.leaves(params)), macs / 1e9


def tiny(**kwargs):
    sizes = {"width": 16, "heads": 2, "depth": (1, 1, 1, 1, 1), "num_classes": 10}
    return models.create("U-DiT", **{**sizes, **kwargs})


def some_params(model, *inputs, seed=1):
    """Parameters that are all drawn, so that no path is dead as it is in a fresh model."""
    inputs = inputs or shapes(model, 8)
    leaves, tree = jax.tree.flatten(jax.eval_shape(model.init, jax.random.key(0), *inputs)["params"])
    keys = jax.random.split(jax.random.key(seed), len(leaves))
    return tree.unflatten([0.2 * jax.random.normal(k, leaf.shape) for k, leaf in zip(keys, leaves)])


@functools.cache
def fresh(model):
    return jax.jit(model.init)(jax.random.key(0), *inputs())["params"]


def inputs(height=8, width=8, channels=4):
    x = jax.random.normal(jax.random.key(2), (3, height, width, channels))
    return x, jnp.array([0.0, 500, 999]), jnp.arange(3)


@functools.partial(jax.jit, static_argnums=0, static_argnames="train")
def run(model, params, *arguments, **keywords):
    return model.apply({"params": params}, *arguments, **keywords)


def distance(a, b):
    return float(jnp.abs(a - b).max() / jnp.abs(b).max())


@functools.cache
def reference():
    """Model, parameters and output of the published options."""
    model = tiny()
    params = some_params(model)
    return model, params, run(model, params, *inputs())


@pytest.mark.slow
@pytest.mark.parametrize("name", SIZES)
def test_counts_of_both_forms_are_those_of_the_table(name):
    row, model = models.MODELS[name], models.create(name)
    params, gmacs = counted(model)
    assert params == row.params
    assert gmacs == pytest.approx(row.gmacs, rel=1e-3)
    params, gmacs = counted(model.fused())
    assert params == row.deploy_params
    assert gmacs == pytest.approx(row.deploy_gmacs, rel=1e-3)
    if name in PUBLISHED:
        assert (params / 1e6, gmacs) == pytest.approx(PUBLISHED[name], rel=4e-3)


@pytest.mark.parametrize("name", VANILLA)
def test_counts_of_the_vanilla_rows(name):
    params, gmacs = counted(models.create(name, **udit_imagenet.VANILLA))
    assert params == VANILLA[name][0]
    assert gmacs == pytest.approx(VANILLA[name][1], rel=1e-3)


@pytest.mark.parametrize("name", AT_512_PIXELS)
def test_gmacs_at_512_pixels(name):
    assert counted(models.create(name).fused(), 64)[1] == pytest.approx(AT_512_PIXELS[name], rel=1e-3)


@pytest.mark.slow
def test_a_fresh_model_returns_zeros():
    model = tiny(width=64)
    params = fresh(model)
    assert not run(model, params, *inputs()).any()
    np.testing.assert_allclose(params["latent"]["attention"]["logit_scale"], np.log(10.0), rtol=1e-6)


@pytest.mark.slow
def test_initial_weights_have_the_published_spread():
    """Xavier-uniform; of a convolution fan-out counts all channels, in groups or not; x is embedded as by a matrix."""
    params = fresh(tiny(width=64))
    w, latent = 256, params["latent"]
    bounds = {
        "qkv": (latent["attention"]["qkv"]["kernel"], w + 3 * w),
        "in_1": (latent["mlp"]["in_1"]["kernel"], w + 2 * w),
        "downsample": (latent["attention"]["downsample"]["kernel"], 25 * (1 + w)),
        "kernel_3": (latent["mlp"]["kernel_3"], 9 * (1 + 2 * w)),
        "kernel_1": (latent["mlp"]["kernel_1"], 1 + 2 * w),
        "grow": (params["grow_2"]["conv"]["kernel"], 9 * (w + 2 * w)),
        "image": (params["image_embed"]["kernel"], 9 * 4 + 64),
    }
    for name, (kernel, fans) in bounds.items():
        bound = np.sqrt(6 / fans)
        assert float(jnp.abs(kernel).max()) == pytest.approx(bound, rel=0.02), name
        assert float(kernel.std()) == pytest.approx(bound / np.sqrt(3), rel=0.05), name
    for level in (1, 2, 3):
        assert float(params[f"time_embed_{level}"]["fc2"]["kernel"].std()) == pytest.approx(0.02, rel=0.05)
        assert float(params[f"label_embed_{level}"]["embedding"].std()) == pytest.approx(0.02, rel=0.1)
    assert not np.allclose(*latent["mlp"]["in_0"]["kernel"]), "every layer draws its own values"
    others = jax.tree_util.tree_leaves_with_path(params)
    assert all(not leaf.any() for path, leaf in others if "bias" in jax.tree_util.keystr(path))


@pytest.mark.slow
def test_gradients_are_finite_and_reach_every_parameter():
    model, params, _ = reference()
    x, t, y = inputs(16, 16)
    gradient = jax.jit(jax.grad(lambda p: jnp.mean(model.apply({"params": p}, x, t, y) ** 2)))
    for path, leaf in jax.tree_util.tree_leaves_with_path(gradient(params)):
        assert np.isfinite(leaf).all(), path
        assert np.abs(leaf).max() > 0, path


@pytest.mark.slow
def test_gradients_are_finite_where_queries_and_keys_are_zero():
    """As for a black image in a fresh model."""
    x = jnp.zeros((1, 4, 4, 16))
    params = ATTEND.init(jax.random.key(1), x)
    gradients = jax.grad(lambda p, x: jnp.sum(ATTEND.apply(p, x)), argnums=(0, 1))(params, x)
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(gradients))


@pytest.mark.slow
def test_fused_parameters_compute_the_same():
    model, params, out = reference()
    before = jax.tree.map(np.array, params)
    fused = fuse(params)
    wanted = jax.eval_shape(model.fused().init, jax.random.key(0), *shapes(model, 8))["params"]
    assert jax.tree.map(jnp.shape, fused) == jax.tree.map(jnp.shape, wanted)
    assert distance(run(model.fused(), fused, *inputs()), out) < 1e-5
    jax.tree.map(np.testing.assert_array_equal, params, before)
    jax.tree.map(np.testing.assert_array_equal, fuse(fused), fused)
    # without the identity, which is 1 at the centre of the 5 x 5 kernel, it is another function
    mlps = {stage: fused[stage]["mlp"] for stage in udit.STAGES}
    for mlp in mlps.values():
        mlp["kernel_5"] = mlp["kernel_5"].at[:, 2, 2].add(-1.0)
    assert distance(run(model.fused(), fused, *inputs()), out) > 1e-2


@pytest.mark.slow
def test_fused_parameters_in_bfloat16():
    model, params, out = reference()
    half = run(model.clone(dtype="bfloat16"), params, *inputs())
    fused = run(model.fused().clone(dtype="bfloat16"), fuse(params), *inputs())
    assert half.dtype == fused.dtype == jnp.float32
    for other in (half, fused):
        assert 1e-4 < distance(other, out) < 0.1


@pytest.mark.slow
@pytest.mark.parametrize("ffn", ["basic", "single"])
def test_fuse_leaves_other_forms_alone(ffn):
    """The reference cannot be evaluated with its own single form."""
    model = tiny(ffn=ffn)
    params = some_params(model)
    assert model.fused() == model
    jax.tree.map(np.testing.assert_array_equal, fuse(params), params)


@pytest.mark.slow
def test_gradients_pass_through_the_fused_form():
    """In the reference's there are none to the parameters of the feed-forward networks."""
    x = jax.random.normal(jax.random.key(0), (2, 6, 6, 8))
    trained, single = (udit.ConvMlp(16, rep, None, jnp.float32) for rep in (True, False))
    params = some_params(trained, x)

    def loss(params, module):
        fused = params if module.rep else fuse(params)
        return jnp.sum(jnp.sin(module.apply({"params": fused}, x)))

    expected = jax.grad(loss)(params, trained)
    assert all(leaf.any() for leaf in jax.tree.leaves(expected))
    pairs = jax.tree.map(distance, jax.grad(loss)(params, single), expected)
    assert max(jax.tree.leaves(pairs)) < 1e-4


@pytest.mark.slow
def test_the_average_starts_as_the_parameters():
    """The reference's starts with its 5 x 5 kernels fused already, and forgets it in some 100,000 steps."""
    params = reference()[1]
    state = initial_state(params, optax.identity())
    jax.tree.map(np.testing.assert_array_equal, state.ema, params)


@pytest.mark.slow
def test_rematerialisation_changes_no_value():
    x, t, y = inputs()
    params = some_params(tiny())

    def gradient(model):
        return jax.jit(jax.grad(lambda p: jnp.mean(model.apply({"params": p}, x, t, y) ** 2)))(params)

    dots = gradient(tiny(remat="dots"))
    for remat in ("full", "none"):
        pairs = zip(jax.tree.leaves(gradient(tiny(remat=remat))), jax.tree.leaves(dots))
        assert max(distance(a, b) for a, b in pairs if b.any()) < 1e-3


@pytest.mark.slow
@pytest.mark.parametrize(
    "changed",
    [
        {"similarity": "dot"},
        {"positions": "none"},
        {"down_shortcut": False},
        {"logit_clamp": -1.0},
        {"down_factor": (1, 2, 2, 2, 2)},
        {"down_factor": (2, 2, 2, 2, 1)},
    ],
    ids=str,
)
def test_options_change_the_output(changed):
    """With the same parameters."""
    model, params, out = reference()
    assert distance(run(model.clone(**changed), params, *inputs()), out) > 1e-3


def test_the_depthwise_convolution_has_any_odd_side_or_is_not_there():
    for side in (7, 0):
        model = tiny(down_kernel=side)
        params = jax.eval_shape(model.init, jax.random.key(0), *shapes(model, 8))["params"]["latent"]["attention"]
        found = params["downsample"]["kernel"].shape if "downsample" in params else None
        assert found == ((2, 7, 7, 1, 64) if side else None)


def test_sub_images_are_interleaved_and_apart():
    """Changing a pixel moves the attention's output in its own sub-image alone (without convolution before)."""
    attend = ATTEND.clone(kernel=0)
    x = jax.random.normal(jax.random.key(0), (1, 6, 8, 16))
    params = attend.init(jax.random.key(1), x)
    moved = jnp.abs(attend.apply(params, x.at[0, 3, 4].add(1.0)) - attend.apply(params, x)).max(axis=(0, 3))
    expected = np.zeros((6, 8), bool)
    expected[1::2, 0::2] = True
    np.testing.assert_array_equal(np.asarray(moved) > 1e-6, expected)
    np.testing.assert_array_equal(np.asarray(moved) == 0, ~expected)


@pytest.mark.slow
def test_positions_of_maps_that_are_not_square():
    """Published: rows of floor(sqrt(tokens)); "width" gives the true coordinates. Square maps are the same."""
    true, published = (rope_angles(2, 8, 8, rows).reshape(2, 8, 2, 2) for rows in ("width", "sqrt"))
    np.testing.assert_array_equal(true[1, 5, 0], [5, 1])
    np.testing.assert_array_equal(published[1, 5, 0], [1, 3])  # token 13 in rows of four
    np.testing.assert_allclose(true[1, 5, 1], np.array([5, 1]) * 10000.0**-0.5, rtol=1e-6)
    np.testing.assert_array_equal(rope_angles(4, 4, 8, "width"), rope_angles(4, 4, 8, "sqrt"))
    model, params, _ = reference()
    wide = inputs(8, 24)
    assert distance(run(model.clone(rope_rows="width"), params, *wide), run(model, params, *wide)) > 1e-2


@pytest.mark.slow
def test_no_gradient_above_the_clamp_of_the_logits():
    """Nor does log 100 do for the published bound of 4.6052, though the difference is small."""
    attend = ATTEND
    x = jax.random.normal(jax.random.key(0), (1, 8, 8, 16))
    params = attend.init(jax.random.key(1), x)["params"]

    def loss(logit_scale, module=attend):
        return jnp.sum(jnp.sin(module.apply({"params": params | {"logit_scale": logit_scale}}, x)))

    high = jnp.array([4.6053, 4.0])
    gradient = jax.grad(loss)(high)
    assert gradient[0] == 0
    assert gradient[1] != 0
    assert loss(high) == loss(high.at[0].set(9.0))
    assert loss(high) != loss(high, attend.clone(logit_clamp=float(np.log(100.0))))


def labels_seen(model, y, keys):
    """What the label tables of the three levels look up in training, [3, b]."""
    return np.stack([model._drop(y, level, keys) for level in (1, 2, 3)])


def test_levels_drop_labels_on_their_own_and_by_the_example():
    model, n = tiny(), 20_000
    keys = rng.per_example(jax.random.key(3), jnp.arange(n))
    y = jnp.full(n, 4)
    seen = labels_seen(model, y, keys)
    dropped = seen == 10
    assert set(np.unique(seen)) == {4, 10}
    np.testing.assert_allclose(dropped.mean(axis=1), 0.1, atol=0.01)
    assert dropped.any(axis=0).mean() == pytest.approx(1 - 0.9**3, abs=0.01)
    assert dropped.all(axis=0).mean() == pytest.approx(0.001, abs=0.001)
    np.testing.assert_array_equal(labels_seen(model, y[5:9], keys[5:9]), seen[:, 5:9])
    for other in (model.clone(label_drop_per_level=False), model.clone(label_drop=0.0)):
        assert not (labels_seen(other, y, keys) == 10).any()


@pytest.mark.slow
def test_labels_drop_in_training_alone():
    model, params, out = reference()
    keys = rng.per_example(jax.random.key(0), jnp.arange(3))
    always = model.clone(label_drop=0.999999)
    null = run(model, params, *inputs()[:2], jnp.full(3, 10))
    np.testing.assert_array_equal(run(always, params, *inputs(), train=True, keys=keys), null)
    np.testing.assert_array_equal(run(always, params, *inputs()), out)
    assert distance(null, out) > 1e-2
    with pytest.raises(UserError, match="label_drop_per_level needs keys, one per example"):
        model.apply({"params": params}, *inputs(), train=True)


def test_unconditional_and_without_learned_sigma():
    model = tiny(num_classes=0, learn_sigma=False)
    x, t, _ = inputs()
    params = jax.eval_shape(model.init, jax.random.key(0), x, t, None)["params"]
    assert not any("label" in name for name in params)
    out = jax.eval_shape(lambda p: model.apply({"params": p}, x, t, None, train=True), params)
    assert out.shape == x.shape


@pytest.mark.parametrize(
    "kwargs, words",
    [
        ({"heads": 3}, "width = 16 is not divisible by heads = 3"),
        ({"width": 24, "heads": 4}, "24 / 4 = 6 is not divisible by 4, as positions = 'rope' need"),
        ({"width": 15, "heads": 1}, "width = 15 is not even"),
        ({"width": 20, "heads": 1, "mlp_ratio": 1.75}, "width = 20 times mlp_ratio = 1.75 is not even"),
        ({"depth": (1, 2, 3)}, r"depth = \(1, 2, 3\): valid: five positive integers"),
        (
            {"down_factor": (2, 2)},
            r"down_factor = \(2, 2\): valid: a positive integer, or five positive integers, one per stage",
        ),
        ({"down_factor": 0}, "down_factor"),
        ({"down_kernel": 4}, "down_kernel = 4: valid: an odd number, or 0"),
        ({"similarity": "xla"}, "valid: cosine, dot"),
        ({"positions": "sincos"}, "valid: rope, none"),
        ({"rope_rows": "height"}, "valid: sqrt, width"),
        ({"ffn": "fused"}, "valid: rep, single, basic"),
        ({"depthwise": "fast"}, "valid: shifts, grouped, separate"),
        ({"dtype": "float16"}, "valid: float32, bfloat16"),
        ({"label_drop": 1.0}, "label_drop = 1.0; valid: 0 to below 1"),
        ({"colour": 1}, "has no argument colour"),
    ],
)
def test_bad_arguments_are_one_clear_error(kwargs, words):
    with pytest.raises(UserError, match=words):
        tiny(**kwargs)


@pytest.mark.parametrize(
    "factor, size, unit",
    [(2, (8, 12), 8), (3, (24, 32), 12), (1, (8, 6), 4), ((4, 1, 1, 1, 1), (6, 4), 4), ((1, 1, 1, 1, 8), (8, 12), 8)],
)
def test_an_image_that_cannot_be_cut_is_an_error(factor, size, unit):
    model = tiny(down_factor=factor)
    with pytest.raises(UserError, match=f"{size[0]} x {size[1]} is not divisible by {unit}"):
        jax.eval_shape(model.init, jax.random.key(0), jnp.zeros((1, *size, 4)), jnp.zeros(1), jnp.zeros(1, int))
    model.check_input(4 * unit, unit)


def test_missing_labels_are_an_error():
    with pytest.raises(UserError, match="needs labels"):
        tiny().init(jax.random.key(0), jnp.zeros((1, 8, 8, 4)), jnp.zeros(1), None)
