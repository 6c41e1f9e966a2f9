"""DiS: the published sizes, its start, drop path, its switches."""

import functools
import math

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from diffjax import models, rng
from diffjax.errors import UserError
from diffjax.models.dis import SIZES, DiS, DiSBlock, add, depthwise_conv
from diffjax.models.layers import sinusoidal_time
from diffjax.ops.macs import count_macs
from tests import slow
from tests.models.test_dit import inputs, some_params

T = jax.ShapeDtypeStruct((1,), jnp.float32)
Y = jax.ShapeDtypeStruct((1,), jnp.int32)
NAMES = [name for name, row in models.MODELS.items() if row.family == "DiS"]

# Of the reference's own instances: ImageNet latents at 256 and 512 pixels, CIFAR-10 without and with labels, CelebA-64.
COUNTS = {
    "DiS-S/2": (29_132_752, 29_415_376, 28_488_008, 28_764_008, 28_770_632),
    "DiS-S/4": (29_115_184, 29_185_840, 28_457_168, 28_733_168, 28_527_824),
    "DiS-S/8": (29_309_872, 29_327_536),
    "DiS-B/2": (121_163_552, 121_753_376, 119_203_608, 120_394_008, 119_793_432),
    "DiS-B/4": (121_126_784, 121_274_240, 119_139_168, 120_329_568, 119_286_624),
    "DiS-B/8": (121_532_672, 121_569_536),
    "DiS-M/2": (231_414_560, 232_004_384, 229_454_616, 230_645_016, 230_044_440),
    "DiS-M/4": (231_377_792, 231_525_248, 229_390_176, 230_580_576, 229_537_632),
    "DiS-M/8": (231_783_680, 231_820_544),
    "DiS-L/2": (407_249_952, 408_036_384, 404_112_408, 406_223_896, 404_898_840),
    "DiS-L/4": (407_200_896, 407_397_504, 404_026_464, 406_137_952, 404_223_072),
    "DiS-L/8": (407_741_952, 407_791_104),
    "DiS-H/2": (906_966_560, 908_146_208, 900_687_384, 905_427_480, 901_867_032),
    "DiS-H/4": (906_892_928, 907_187_840, 900_558_432, 905_298_528, 900_853_344),
    "DiS-H/8": (907_704_320, 907_778_048),
}
COLUMNS = ((32, 4, 1000), (64, 4, 1000), (32, 3, 0), (32, 3, 10), (64, 3, 0))

# 1e9 floating point operations of all matrix products and convolutions at 256 pixels, two per multiply-accumulate.
GFLOPS = {
    "S": (13.73, 3.52, 0.97),
    "B": (58.22, 14.92, 4.09),
    "M": (114.37, 29.28, 8.01),
    "L": (202.07, 51.73, 14.14),
    "H": (451.85, 115.65, 31.61),
}


def tiny(**kwargs):
    return models.create("DiS", **{"patch": 2, "depth": 4, "width": 32, "num_classes": 10, **kwargs})


def apply(model, params, *arguments, **keywords):
    """`model.apply`, compiled: faster than running it operation by operation."""
    return jax.jit(lambda p, *arguments: model.apply({"params": p}, *arguments, **keywords))(params, *arguments)


def blank(size, channels):
    return jax.ShapeDtypeStruct((1, size, size, channels), jnp.float32)


@pytest.mark.parametrize("name", NAMES)
def test_parameter_counts_are_those_of_the_reference(name):
    assert models.MODELS[name].params == COUNTS[name][0]
    for count, (size, channels, num_classes) in zip(COUNTS[name], COLUMNS):
        model = models.create(name, channels=channels, num_classes=num_classes)
        shapes = jax.eval_shape(model.init, jax.random.key(0), blank(size, channels), T, Y if num_classes else None)
        assert sum(leaf.size for leaf in jax.tree.leaves(shapes["params"])) == count, (size, channels, num_classes)


@pytest.mark.parametrize("name", NAMES)
def test_gmacs(name):
    """Counted matrix products, and with the convolutions' taps the operations that follow from the shapes."""
    row, model, x = models.MODELS[name], models.create(name, scan="chunked"), blank(32, 4)
    params = jax.eval_shape(model.init, jax.random.key(0), x, T, Y)["params"]
    macs = count_macs(lambda p, x, t, y: model.apply({"params": p}, x, t, y), params, x, T, Y)
    assert macs / 1e9 == pytest.approx(row.gmacs, abs=0.005)
    tokens = (32 // model.patch) ** 2 + 2
    convolutions = (model.depth + 1) * 2 * 4 * 2 * model.width * tokens
    size, _, patch = name.removeprefix("DiS-").partition("/")
    assert SIZES[size] == (model.depth, model.width)
    assert 2 * (macs + convolutions) / 1e9 == pytest.approx(GFLOPS[size]["248".index(patch)], abs=0.006)


@pytest.fixture(scope="module")
def fresh():
    model = tiny(width=128, depth=4)
    x, t, y = inputs()
    return jax.jit(model.init)(jax.random.key(0), x, t, y)["params"]


def test_initial_weights_are_uniform_within_the_published_bounds(fresh):
    block, direction = fresh["in_blocks"]["mixer"], fresh["in_blocks"]["mixer"]["backward"]
    width, channels, rank = 128, 256, 8
    bounds = {
        "patch_embed": (fresh["patch_embed"]["kernel"], 16),
        "patch_embed bias": (fresh["patch_embed"]["bias"], 16),
        "time_embed fc1": (fresh["time_embed"]["fc1"]["kernel"], width),
        "time_embed fc2": (fresh["time_embed"]["fc2"]["kernel"], 4 * width),
        "in_proj": (block["in_proj"], width),
        "conv": (direction["conv_kernel"], 4),
        "conv bias": (direction["conv_bias"], 4),
        "x_proj": (direction["x_proj"]["kernel"], channels),
        "dt_proj": (direction["dt_proj"]["kernel"], rank),
        "out_proj": (block["out_proj"]["kernel"], channels * 4),
        "skip": (fresh["out_blocks"]["skip"]["kernel"], 2 * width),
        "modulation": (fresh["final"]["modulation"]["kernel"], width),
        "linear": (fresh["final"]["linear"]["kernel"], width),
    }
    for name, (values, fan_in) in bounds.items():
        bound = 1 / math.sqrt(fan_in)
        assert float(jnp.abs(values).max()) == pytest.approx(bound, rel=0.03), name
        assert float(values.std()) == pytest.approx(bound / math.sqrt(3), rel=0.1), name
    assert float(fresh["label_embed"]["embedding"].std()) == pytest.approx(0.02, rel=0.1)
    first, second = block["in_proj"]
    assert not np.allclose(first, second), "every block draws its own values"


def test_initial_constants(fresh):
    mixer = fresh["out_blocks"]["mixer"]
    for zero in (
        fresh["positions"],
        fresh["time_embed"]["fc1"]["bias"],
        fresh["out_blocks"]["skip"]["bias"],
        fresh["final"]["linear"]["bias"],
        fresh["final"]["modulation"]["bias"],
        mixer["backward"]["dt_bias"],
    ):
        assert not zero.any()
    for one in (fresh["norm"]["scale"], fresh["mid_block"]["norm"]["scale"], mixer["forward"]["D"]):
        assert (one == 1).all()
    for direction in ("forward", "backward"):
        decay = mixer[direction]["A_log"]
        np.testing.assert_allclose(jnp.exp(decay), np.broadcast_to(np.arange(1, 17), decay.shape), rtol=1e-6)


def test_initial_steps_are_log_uniform_in_the_forward_direction(fresh):
    steps = np.log(jax.nn.softplus(fresh["in_blocks"]["mixer"]["forward"]["dt_bias"]))
    low, high = math.log(0.001), math.log(0.1)
    assert low - 1e-3 < steps.min() < low + 0.1
    assert high - 0.1 < steps.max() < high + 1e-3
    assert steps.mean() == pytest.approx((low + high) / 2, abs=0.15)
    assert steps.std() == pytest.approx((high - low) / math.sqrt(12), rel=0.1)


@pytest.mark.parametrize("depth, blocks", [(1, 1), (4, 5), (5, 5)])
def test_blocks_are_not_depth(depth, blocks):
    model = tiny(depth=depth)
    params = jax.eval_shape(model.init, jax.random.key(0), *inputs())["params"]
    sides = [params[side]["norm"]["scale"].shape[0] for side in ("in_blocks", "out_blocks") if side in params]
    assert sum(sides) + 1 == blocks


def test_rates_of_drop_path():
    """Row j: 0, then 0 .. rate in `depth` steps over the blocks, then the rate itself; the rest is scaled up."""
    keys = rng.per_example(jax.random.key(0), jnp.arange(4000))
    for depth in (4, 5):
        kept = np.asarray(tiny(depth=depth, drop_path=0.4)._kept(keys))
        blocks = [0, *(0.4 * np.arange(depth) / (depth - 1))]
        rates = [*blocks[: 2 * (depth // 2) + 1], 0.4]
        assert kept.shape == (len(rates), 4000)
        for row, rate in zip(kept, rates):
            assert (row == 0).mean() == pytest.approx(rate, abs=0.03)
            np.testing.assert_allclose(row[row > 0], 1 / (1 - rate), rtol=1e-6)
    assert (kept[:2] == 1).all()
    assert not np.array_equal(kept[-1] == 0, kept[-2] == 0), "every addition draws anew"


@pytest.mark.slow
def test_drop_path_depends_on_the_key_of_the_example_alone():
    model = tiny(drop_path=0.9)
    params, (x, t, y) = some_params(model), inputs()
    keys = rng.per_example(jax.random.key(3), jnp.array([5, 6, 7]))
    run = jax.jit(lambda x, t, y, keys: model.apply({"params": params}, x, t, y, True, keys))
    out = run(x, t, y, keys)
    order = jnp.array([2, 0, 1])
    np.testing.assert_allclose(run(x[order], t[order], y[order], keys[order]), out[order], rtol=1e-5, atol=1e-5)
    assert not np.allclose(run(x, t, y, keys[order]), out, atol=1e-2)


@pytest.mark.slow
def test_drop_path_drops_the_input_of_a_block():
    """With all of it dropped but rate 0's, what is left is the tokens and the first block's output."""
    model = tiny(depth=2, drop_path=0.999)
    params, (x, t, y) = some_params(model), inputs()
    keys = rng.per_example(jax.random.key(0), jnp.arange(3))
    kept = model._kept(keys)
    assert (kept[:2] == 1).all()
    assert (kept[2:] == 0).all()
    out = apply(model, params, x, t, y, train=True, keys=keys)
    others = {"mid_block": without_output(params["mid_block"]), "out_blocks": silent(params["out_blocks"])}
    alone = apply(model, params | others, x, t, y)
    np.testing.assert_allclose(out, alone, rtol=1e-5, atol=1e-5)


def without_output(block):
    return {**block, "mixer": {**block["mixer"], "out_proj": jax.tree.map(jnp.zeros_like, block["mixer"]["out_proj"])}}


def silent(block):
    """Out blocks that add nothing and return nothing."""
    return without_output({**block, "skip": jax.tree.map(jnp.zeros_like, block["skip"])})


@pytest.mark.slow
def test_every_addition_drops_by_its_own_row():
    """Two blocks on either side of the middle one, against the same blocks called one by one."""
    model = tiny(depth=4, drop_path=0.8)
    params, (x, t, y) = some_params(model), inputs()
    keys = rng.per_example(jax.random.key(1), jnp.arange(3))

    class Tokens(DiS):
        @nn.compact
        def __call__(self, x, t, y):
            return self._tokens(x, t, y)[0]

    class Together(DiS):
        @nn.compact
        def __call__(self, x, t, y):
            kept = self._kept(keys)
            (h, r), _ = self._all_blocks(self._tokens(x, t, y)[0], kept)
            return add(r, h, kept[-1])

    fields = {name: getattr(model, name) for name in DiS.__dataclass_fields__ if name not in ("parent", "name")}

    def one_by_one(params):
        tokens, kept = Tokens(**fields).apply({"params": params}, x, t, y), model._kept(keys)
        block, carry, skips = DiSBlock(*model._block_fields()), (jnp.zeros_like(tokens), tokens), []
        for j in range(5):
            own, skip = params["mid_block"], None
            if j != 2:
                own = jax.tree.map(lambda a, i=j % 3: a[i], params["in_blocks" if j < 2 else "out_blocks"])
                skip = skips.pop() if j > 2 else None
            carry, h = block.apply({"params": own}, carry, kept[j], skip)
            if j < 2:
                skips.append(h)
        return add(carry[1], carry[0], kept[5])

    found = jax.jit(lambda p: Together(**fields).apply({"params": p}, x, t, y))(params)
    np.testing.assert_allclose(found, jax.jit(one_by_one)(params), rtol=1e-5, atol=1e-5)
    rows = np.asarray(model._kept(keys))
    assert len({tuple(row) for row in rows[2:]}) > 2, "rows that differ, or this test sees nothing"


@pytest.mark.slow
def test_without_training_or_rate_nothing_is_dropped():
    params, (x, t, y) = some_params(tiny()), inputs()
    keys = rng.per_example(jax.random.key(0), jnp.arange(3))
    plain = apply(tiny(), params, x, t, y)
    np.testing.assert_array_equal(apply(tiny(drop_path=0.9), params, x, t, y, keys=keys), plain)
    np.testing.assert_array_equal(apply(tiny(drop_path=0.0), params, x, t, y, train=True), plain)


@functools.cache
def value_and_gradients(remat):
    model = tiny(remat=remat)
    params, (x, t, y) = some_params(model), inputs()
    return jax.jit(jax.value_and_grad(lambda p: jnp.mean(model.apply({"params": p}, x, t, y) ** 2)))(params)


@pytest.mark.slow
def test_gradients_are_finite_and_reach_every_parameter():
    for path, leaf in jax.tree_util.tree_leaves_with_path(value_and_gradients("dots")[1]):
        assert np.isfinite(leaf).all(), path
        assert np.abs(leaf).max() > 0, path


@pytest.mark.slow
@pytest.mark.parametrize("remat", ["full", "none"])
def test_rematerialisation_changes_no_value(remat):
    close = functools.partial(np.testing.assert_allclose, rtol=1e-4, atol=1e-6)
    jax.tree.map(close, value_and_gradients(remat), value_and_gradients("dots"))


@pytest.mark.parametrize("see", slow.but([None], [None, 0]))
def test_dots_keeps_what_spares_a_second_forward_scan(see):
    """At depth 3 there are blocks of all kinds: one that stands alone, and stacked ones on either side."""

    def loops(remat):
        model, (x, t, y) = tiny(depth=3, remat=remat, scan="sequential"), inputs()
        params = jax.eval_shape(model.init, jax.random.key(0), x, t, y)["params"]

        def loss(params):
            out = model.apply({"params": params}, x, t, y, see=see)
            return jnp.mean((out if see is None else out[0]) ** 2)

        return str(jax.make_jaxpr(jax.grad(loss))(params)).count("scan[")

    assert loops("none") == loops("dots") < loops("full")


@pytest.mark.slow
def test_bfloat16_computes_in_bfloat16_and_returns_float32():
    params, (x, t, y) = some_params(tiny()), inputs()
    full = apply(tiny(), params, x, t, y)
    half, captured = apply(tiny(dtype="bfloat16"), params, x, t, y, capture_intermediates=True)
    assert half.dtype == jnp.float32
    (hidden, residual), _ = captured["intermediates"]["mid_block"]["__call__"][0]
    assert (hidden.dtype, residual.dtype) == (jnp.bfloat16, jnp.float32)
    assert 1e-4 < float(jnp.abs(half - full).max() / jnp.abs(full).max()) < 0.05


def test_unconditional_and_without_learned_sigma():
    model = tiny(num_classes=0, learn_sigma=False)
    x, t, _ = inputs()
    out, params = jax.eval_shape(model.init_with_output, jax.random.key(0), x, t, None)
    assert out.shape == x.shape
    assert "label_embed" not in params["params"]
    assert "modulation" not in params["params"]["final"]
    assert params["params"]["positions"].shape == (1, 17, 32)


def test_switches():
    model = tiny(skip="none", norm="layer", time_mlp=False)
    params = jax.eval_shape(model.init, jax.random.key(0), *inputs())["params"]
    assert "time_embed" not in params
    assert "skip" not in params["out_blocks"]
    assert params["mid_block"]["norm"].keys() == {"scale", "bias"}


@pytest.mark.parametrize("reverse", [False, True])
def test_depthwise_convolution(reverse):
    x = jax.random.normal(jax.random.key(0), (2, 7, 3))
    kernel, bias = jax.random.normal(jax.random.key(1), (4, 3)), jnp.arange(3.0)
    out = depthwise_conv(x, kernel, bias, reverse)
    x, out = (x[:, ::-1], out[:, ::-1]) if reverse else (x, out)
    expected = [[np.convolve(x[b, :, e], kernel[::-1, e])[:7] + bias[e] for e in range(3)] for b in range(2)]
    np.testing.assert_allclose(out, np.swapaxes(expected, 1, 2), rtol=1e-5, atol=1e-5)


def test_time_features_of_odd_width_end_in_zero():
    features = sinusoidal_time(jnp.array([2.0]), 5)[0]
    np.testing.assert_allclose(features, [np.cos(2), np.cos(0.02), np.sin(2), np.sin(0.02), 0], rtol=1e-6)


@pytest.mark.parametrize(
    "kwargs, words",
    [
        ({"dtype": "float16"}, "valid: float32, bfloat16"),
        ({"remat": "some"}, "valid: none, full, dots"),
        ({"skip": "add"}, "valid: concat, none"),
        ({"norm": "batch"}, "valid: rms, layer"),
        ({"scan": "fast"}, "valid: sequential, associative, chunked, pallas"),
        ({"depth": 0}, "depth = 0"),
        ({"depth": 3.5}, "DiS: depth = 3.5: valid: a whole number"),
        ({"num_classes": -1}, "num_classes = -1; valid: 0 \\(none\\) or a positive integer"),
        ({"d_state": 0}, "d_state = 0"),
        ({"drop_path": 1.0}, "drop_path = 1.0: valid: 0 to below 1"),
        ({"heads": 4}, "has no argument heads"),
    ],
)
def test_bad_arguments_are_one_clear_error(kwargs, words):
    with pytest.raises(UserError, match=words):
        tiny(**kwargs)


def test_images_that_do_not_fit_are_errors():
    model, (x, t, y) = tiny(), inputs()
    with pytest.raises(UserError, match="9 x 9 is not divisible by the model's patch = 2"):
        model.check_input(9, 9)
    with pytest.raises(UserError, match="8 x 10: DiS takes square images only"):
        model.check_input(8, 10)
    params = jax.eval_shape(model.init, jax.random.key(0), x, t, y)["params"]
    words = r"positions for images of 8 x 8 \(18 tokens\), not for images of 12 x 12 \(38 tokens\)"
    with pytest.raises(UserError, match=words):
        jax.eval_shape(model.apply, {"params": params}, jnp.zeros((3, 12, 12, 4)), t, y)


def test_missing_labels_and_missing_keys_are_errors():
    model, (x, t, y) = tiny(), inputs()
    with pytest.raises(UserError, match="needs labels"):
        model.init(jax.random.key(0), x, t, None)
    with pytest.raises(UserError, match="drop_path above 0 needs keys, one per example"):
        jax.eval_shape(lambda: model.init(jax.random.key(0), x, t, y, train=True))
