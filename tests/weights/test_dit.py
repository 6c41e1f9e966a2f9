"""The DiT mapping: round trip, what shapes tell, and one clear complaint about everything wrong with a state_dict."""

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

from diffjax.errors import UserError
from diffjax.models import create
from diffjax.models.layers import sincos_positions
from diffjax.weights import choose, from_reference, mapping, to_reference, unwrap

KWARGS = {"patch": 2, "depth": 3, "width": 24, "heads": 2, "channels": 3, "num_classes": 5}


def module_and_params(**kwargs):
    module = create("DiT", **{**KWARGS, **kwargs})
    shapes = jax.eval_shape(
        module.init, jax.random.key(0), jnp.zeros((1, 8, 8, module.channels)), jnp.zeros(1), jnp.zeros(1, jnp.int32)
    )["params"]
    leaves, structure = jax.tree.flatten(shapes)
    rng = np.random.default_rng(0)
    return module, structure.unflatten([rng.standard_normal(leaf.shape, np.float32) for leaf in leaves])


@pytest.fixture(scope="module")
def state_dict():
    positions = sincos_positions(4, 4, 24)[None]
    return {**to_reference("dit", *module_and_params()), "pos_embed": positions}


@pytest.mark.parametrize(
    "kwargs",
    [{}, {"mlp_ratio": 2.9}, {"learn_sigma": False}, {"null_class": False}, {"patch": 1, "depth": 1}],
    ids=str,
)
def test_round_trip(kwargs):
    """Every parameter of the module comes back, and the module itself out of the shapes and the heads."""
    module, params = module_and_params(**kwargs)
    told = {} if module.null_class else {"class_dropout_prob": 0.0}
    found, back = from_reference("dit", to_reference("dit", module, params), num_heads=2, **told)
    assert int(24 * found.mlp_ratio) == int(24 * module.mlp_ratio)
    assert found.clone(mlp_ratio=module.mlp_ratio) == module
    jax.tree.map(np.testing.assert_array_equal, back, params)


def test_keys_and_layout_of_the_reference(state_dict):
    assert len(state_dict) == 12 + 10 * 3
    assert all(value.flags.c_contiguous for value in state_dict.values())  # as safetensors needs them
    _, params = module_and_params()
    kernel = params["blocks"]["attention"]["qkv"]["kernel"]  # [l, d, h, 3, k]
    # the reference's rows: q of all heads, then k, then v; each head's features together
    np.testing.assert_array_equal(state_dict["blocks.1.attn.qkv.weight"][24 + 12 + 5], kernel[1, :, 1, 1, 5])
    pixel = params["patch_embed"]["kernel"].reshape(2, 2, 3, 24)
    np.testing.assert_array_equal(state_dict["x_embedder.proj.weight"][7, 2, 1, 0], pixel[1, 0, 2, 7])
    np.testing.assert_array_equal(state_dict["blocks.2.mlp.fc1.weight"], params["blocks"]["mlp"]["fc1"]["kernel"][2].T)


def test_all_arguments_of_the_reference(state_dict):
    config = {"input_size": 8, "patch_size": 2, "in_channels": 3, "hidden_size": 24, "depth": 3, "num_heads": 2}
    config |= {"mlp_ratio": 4.0, "class_dropout_prob": 0.1, "num_classes": 5, "learn_sigma": True}
    assert from_reference("dit", state_dict, **config)[0] == create("DiT", **KWARGS)


def test_half_precision_becomes_float32(state_dict):
    halves = {key: value.astype(ml_dtypes.bfloat16) for key, value in state_dict.items() if key != "pos_embed"}
    _, params = from_reference("dit", halves, num_heads=2)
    assert {leaf.dtype for leaf in jax.tree.leaves(params)} == {np.dtype(np.float32)}


def test_published_heads_need_not_be_given():
    module, params = module_and_params(depth=12, width=384, heads=6, num_classes=1)
    assert from_reference("dit", to_reference("dit", module, params))[0].heads == 6


@pytest.mark.parametrize(
    "config, message",
    [
        ({}, "depth 3, width 24 is no published size; give num_heads"),
        ({"num_heads": 5}, "width = 24 is not divisible by heads = 5"),
        ({"hidden_size": 48}, "hidden_size = 48 contradicts the weights, whose shapes say 24"),
        ({"depth": 12}, "depth = 12 contradicts"),
        ({"patch_size": 4}, "patch_size = 4 contradicts"),
        ({"in_channels": 4}, "in_channels = 4 contradicts"),
        ({"num_classes": 1000}, "num_classes = 1000 contradicts .* 5"),
        ({"num_classes": 5, "class_dropout_prob": 0.0}, "num_classes = 5 contradicts .* 6"),
        ({"mlp_ratio": 2.0}, "mlp_ratio = 2.0 contradicts"),
        ({"learn_sigma": False}, "learn_sigma = False contradicts"),
        ({"num_heads": 2, "input_size": 16}, r"pos_embed is \(1, 16, 24\), expected .* = \(1, 64, 24\)"),
        ({"heads": 2}, "no argument heads; valid: input_size, patch_size"),
    ],
)
def test_arguments_that_cannot_be(state_dict, config, message):
    with pytest.raises(UserError, match=message):
        from_reference("dit", state_dict, **config)


def test_one_error_names_every_wrong_key(state_dict):
    broken = dict(state_dict)
    del broken["blocks.1.attn.qkv.weight"], broken["final_layer.linear.bias"]
    broken |= {"blocks.7.mlp.fc1.bias": np.zeros(96), "head.weight": np.zeros((2, 2)), "y_embedder.note": "text"}
    broken["x_embedder.proj.weight"] = broken["x_embedder.proj.weight"].transpose(1, 0, 2, 3)
    broken["blocks.2.attn.proj.bias"] = np.zeros(25)
    broken["t_embedder.mlp.2.weight"] = [1.0]
    with pytest.raises(UserError) as error:
        from_reference("dit", broken, num_heads=2)
    unexpected, missing, wrong = str(error.value).split("; ")
    assert "unexpected keys: blocks.7.mlp.fc1.bias, head.weight, y_embedder.note" in unexpected
    assert missing == "missing keys: blocks.1.attn.qkv.weight, final_layer.linear.bias"
    assert wrong == (
        "wrong shapes: blocks.2.attn.proj.bias is (25), expected (24), "
        "t_embedder.mlp.2.weight is no array but of type list, "
        "x_embedder.proj.weight is (3, 24, 2, 2), expected (24, ?, ?, ?)"
    )


@pytest.mark.parametrize("key", ["x_embedder.proj.weight", "final_layer.linear.weight", "t_embedder.mlp.0.bias"])
def test_each_key_is_needed(state_dict, key):
    with pytest.raises(UserError, match=f"missing keys: {key}$"):
        from_reference("dit", {k: v for k, v in state_dict.items() if k != key}, num_heads=2)


@pytest.mark.parametrize("wrong", [{}, {"model": {}, "opt": {}}])
def test_something_else_entirely(wrong):
    with pytest.raises(UserError, match=r"missing keys: blocks\.0\.adaLN_modulation\.1\.bias, .* and 15 more"):
        from_reference("dit", wrong)


def test_oblong_patches_are_refused(state_dict):
    broken = state_dict | {"x_embedder.proj.weight": np.zeros((24, 3, 2, 3), np.float32)}
    with pytest.raises(UserError, match=r"x_embedder\.proj\.weight is"):
        from_reference("dit", broken, num_heads=2)


@pytest.mark.parametrize(
    "change, message",
    [
        (lambda table: table[:, ::-1], "differs from the fixed table"),
        (lambda table: np.roll(table, 12, axis=2), "differs from the fixed table"),
        (lambda table: table + np.float32(np.nan), "differs from the fixed table"),
        (lambda table: table[:, :15], "pos_embed is"),
        (lambda table: table[0], "pos_embed is"),
    ],
)
def test_other_positions_are_refused(state_dict, change, message):
    with pytest.raises(UserError, match=message):
        from_reference("dit", state_dict | {"pos_embed": change(state_dict["pos_embed"])}, num_heads=2)


def test_unknown_family(state_dict):
    with pytest.raises(UserError, match="weights of family 'dti' are unknown; valid: dit"):
        from_reference("dti", state_dict)


def test_unwrap():
    weights = {"a": np.zeros(2)}
    other = {"a": np.ones(2)}
    assert unwrap({"model": other, "ema": weights, "opt": {}}) == weights
    assert unwrap({"model": weights, "opt": {}}) == weights
    assert unwrap(weights) == weights
    assert unwrap({"model": {"module.a": weights["a"]}, "opt": {}}) == weights
    both = {"module.a": weights["a"], "b": weights["a"]}
    assert unwrap(both) == both
    for nothing in ({"opt": {}}, {}, [1], 3):
        with pytest.raises(UserError, match="the checkpoint holds no weights"):
            unwrap(nothing)


AVERAGED, LAST = {"a": np.zeros(2)}, {"a": np.ones(2)}


@pytest.mark.parametrize(
    "checkpoint, name",
    [
        ({"model": LAST, "model_ema": AVERAGED}, "model_ema"),
        ({"model": LAST, "ema_model": AVERAGED}, "ema_model"),
        ({"state_dict": LAST, "state_dict_ema": AVERAGED, "args": {"ema_rates": [0.9]}}, "state_dict_ema"),
        ({"model": LAST, "ema_state_dict": AVERAGED}, "ema_state_dict"),
        ({"model": LAST, "EMA": {"shadow": AVERAGED, "decay": np.float32(0.9)}}, "EMA.shadow"),
        ({"state": {"model": LAST, "params_ema": AVERAGED}}, "state.params_ema"),
        ({"model": LAST, "optimizer": {"state": {0: {"exp_avg": np.ones(2)}}}, "ema0.9999": AVERAGED}, "ema0.9999"),
        ({"state_dict": {"model.a": np.ones(2), "model_ema.a": np.zeros(2)}}, "state_dict.model_ema"),
        ({"n_averaged": np.int64(7), "module.a": np.zeros(2)}, ""),
        ({"_orig_mod.module.a": np.zeros(2)}, ""),
        ({"model": AVERAGED, "ema": None, "opt": {"state": {0: LAST}}}, "model"),
        ({"net": AVERAGED}, "net"),
    ],
    ids=lambda value: str(value) if isinstance(value, str) else "",
)
def test_the_average_is_found_under_its_usual_names(checkpoint, name):
    found, weights = choose(checkpoint)
    assert found == name
    assert list(weights) == ["a"]
    assert not weights["a"].any()


@pytest.mark.parametrize(
    "checkpoint, message",
    [
        ({"model": LAST, "ema": {}}, "the average 'ema' of the checkpoint holds no weights by name; there are: model"),
        ({"model": LAST, "ema": {"shadow_params": [np.zeros(2)]}}, "the average 'ema' of the checkpoint holds no"),
        ({"ema": AVERAGED, "ema_1": LAST}, "holds 2 sets of weights: ema, ema_1; name the one to take"),
        ({"teacher": AVERAGED, "student": LAST}, "holds 2 sets of weights: teacher, student"),
    ],
)
def test_weights_that_are_not_clear_are_asked_for(checkpoint, message):
    with pytest.raises(UserError, match=message):
        choose(checkpoint)
    name = next(key for key, weights in checkpoint.items() if "a" in weights)
    assert choose(checkpoint, name)[0] == name
    with pytest.raises(UserError, match="has no weights named 'none'; there are: "):
        choose(checkpoint, "none")


@pytest.mark.parametrize("value", [np.nan, np.inf, 1e39])
def test_values_that_are_not_finite_are_refused(state_dict, value):
    broken = state_dict | {"final_layer.linear.bias": np.full(24, value)}
    with pytest.raises(UserError, match="dit: values that are not finite in 1 of 41 arrays: final_layer.linear.bias"):
        from_reference("dit", broken, num_heads=2)


@pytest.mark.parametrize("dtype", [np.float16, ml_dtypes.bfloat16, np.float32, np.float64])
def test_every_precision_is_read_with_its_position_table(state_dict, dtype):
    found = from_reference("dit", {key: value.astype(dtype) for key, value in state_dict.items()}, num_heads=2)[1]
    expected = state_dict["t_embedder.mlp.0.bias"].astype(dtype).astype(np.float32)
    np.testing.assert_array_equal(found["time_embed"]["fc1"]["bias"], expected)


@pytest.mark.parametrize("dtype", [np.float16, np.float32])
def test_a_position_table_that_an_average_moved_is_read(state_dict, dtype):
    table = state_dict["pos_embed"].astype(np.float32)
    moved = table.copy()
    for _ in range(5000):
        moved = (moved * np.float32(0.9999) + table * np.float32(1 - 0.9999)).astype(np.float32)
    assert np.abs(moved - table).max() > 1e-4
    from_reference("dit", state_dict | {"pos_embed": moved.astype(dtype)}, num_heads=2)
    with pytest.raises(UserError, match="pos_embed differs from the fixed table by up to 0.00"):
        from_reference("dit", state_dict | {"pos_embed": (moved * 0.997).astype(dtype)}, num_heads=2)


def test_sit_leaves_out_the_channels_that_it_does_not_use(state_dict, caplog):
    module, params = module_and_params()
    with caplog.at_level("INFO"):
        found, cut = from_reference("sit", state_dict, num_heads=2)
    assert "SiT has 6 output channels; the last 3, of a variance, are not used and left out" in caplog.text
    assert found == module.clone(learn_sigma=False)
    x = np.random.default_rng(0).standard_normal((2, 8, 8, 3), np.float32)
    t, y = jnp.array([0.2, 0.7]), jnp.array([0, 5])
    both, first = (m.apply({"params": p}, x, t, y) for m, p in ((module, params), (found, cut)))
    np.testing.assert_allclose(first, both[..., :3], atol=1e-5 * np.abs(both).max())
    again = from_reference("sit", to_reference("sit", found, cut), num_heads=2)
    assert again[0] == found
    jax.tree.map(np.testing.assert_array_equal, again[1], cut)


def test_infer_takes_the_majority_and_solves_products():
    table = [("a.{l}.w", "a/w", "(two d) p1 p2 -> (two d p1) p2"), ("b", "b", "d -> d"), ("c", "c", "d -> d")]
    arrays = {f"a.{i}.w": np.zeros((6, 4, 4)) for i in range(4)} | {"b": np.zeros(7), "c": np.zeros(3)}
    assert mapping.infer(table, arrays, {"two": 2}) == {"two": 2, "l": 4, "d": 3, "p": 4}
