"""The DiffiT mapping: round trip, what shapes tell, tables that are checked, complaints about a wrong state_dict."""

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

from diffjax.errors import UserError
from diffjax.models import create
from diffjax.weights import from_reference, to_reference

KWARGS = {"patch": 2, "depth": 3, "width": 24, "heads": 2, "window": 4, "channels": 3, "num_classes": 5}
INDEX = "blocks.2.attn.relative_position_index"


def module_and_params(**kwargs):
    module = create("DiffiT", **{**KWARGS, **kwargs})
    x = jnp.zeros((1, *2 * (module.patch * module.window,), module.channels))
    shapes = jax.eval_shape(module.init, jax.random.key(0), x, jnp.zeros(1), jnp.zeros(1, jnp.int32))["params"]
    leaves, structure = jax.tree.flatten(shapes)
    rng = np.random.default_rng(0)
    return module, structure.unflatten([rng.standard_normal(leaf.shape, np.float32) for leaf in leaves])


@pytest.fixture(scope="module")
def state_dict():
    return to_reference("diffit", *module_and_params())


@pytest.mark.parametrize(
    "kwargs",
    [{}, {"mlp_ratio": 2.9}, {"learn_sigma": False}, {"null_class": False}, {"patch": 1, "depth": 1, "window": 3}],
    ids=str,
)
def test_round_trip(kwargs):
    """Every parameter of the module comes back, and the module itself, heads and window included, out of the shapes."""
    module, params = module_and_params(**kwargs)
    told = {} if module.null_class else {"class_dropout_prob": 0.0}
    found, back = from_reference("diffit", to_reference("diffit", module, params), **told)
    assert int(24 * found.mlp_ratio) == int(24 * module.mlp_ratio)
    assert found.clone(mlp_ratio=module.mlp_ratio) == module
    jax.tree.map(np.testing.assert_array_equal, back, params)


def test_keys_and_layout_of_the_reference(state_dict):
    assert len(state_dict) == 1 + 9 + 12 * 3
    _, params = module_and_params()
    for theirs, ours in (("qkv", "qkv"), ("qkv_temb", "qkv_time")):
        kernel = params["blocks"]["attention"][ours]["kernel"]  # [l, d, h, 3, k]
        # the reference's rows: q of all heads, then k, then v; each head's features together
        stored = state_dict[f"blocks.1.attn.{theirs}.weight"]
        np.testing.assert_array_equal(stored[24 + 12 + 5], kernel[1, :, 1, 1, 5])
    table = state_dict["blocks.2.attn.relative_position_bias_table"]
    np.testing.assert_array_equal(table, params["blocks"]["attention"]["relative_bias"][2])
    assert (table.shape, state_dict[INDEX].shape, state_dict[INDEX].dtype) == ((49, 2), (16, 16), np.int64)
    assert state_dict["pos_embed"].shape == (1, 16, 24)


def test_published_sizes():
    """Names and shapes of the public files, without their numbers."""
    for name, grid in (("DiffiT-XL/2", 16), ("DiffiT-XL/2-512", 32)):
        module = create(name, depth=1)
        x = jax.ShapeDtypeStruct((1, 2 * grid, 2 * grid, 4), jnp.float32)
        t, y = jax.ShapeDtypeStruct((1,), jnp.float32), jax.ShapeDtypeStruct((1,), jnp.int32)
        shapes = jax.eval_shape(module.init, jax.random.key(0), x, t, y)["params"]
        written = to_reference("diffit", module, jax.tree.map(lambda s: np.zeros(s.shape, np.float32), shapes))
        found = {key: value.shape for key, value in written.items()}
        assert found["blocks.0.attn.relative_position_bias_table"] == ((2 * grid - 1) ** 2, 16)
        assert found["blocks.0.attn.relative_position_index"] == (grid**2, grid**2)
        assert found["pos_embed"] == (1, grid**2, 1152)
        assert found["x_embedder.proj.weight"] == (1152, 4, 2, 2)
        assert found["y_embedder.embedding_table.weight"] == (1001, 1152)
        assert found["blocks.0.attn.qkv_temb.weight"] == (3456, 1152)
        assert found["final_layer.linear.weight"] == (32, 1152)
        assert from_reference("diffit", written)[0] == module


def test_all_arguments_of_the_reference(state_dict):
    config = {"input_size": 8, "patch_size": 2, "in_channels": 3, "hidden_size": 24, "depth": 3, "num_heads": 2}
    config |= {"mlp_ratio": 4.0, "class_dropout_prob": 0.1, "num_classes": 5, "learn_sigma": True}
    assert from_reference("diffit", state_dict, **config)[0] == create("DiffiT", **KWARGS)


def test_computed_tables_may_be_missing(state_dict):
    bare = {key: value for key, value in state_dict.items() if "index" not in key and key != "pos_embed"}
    assert from_reference("diffit", bare)[0] == create("DiffiT", **KWARGS)


@pytest.mark.parametrize(
    "config, message",
    [
        ({"num_heads": 4}, "num_heads = 4 contradicts the weights, whose shapes say 2"),
        ({"input_size": 16}, "input_size = 16 contradicts the weights, whose shapes say 8"),
        ({"hidden_size": 48}, "hidden_size = 48 contradicts"),
        ({"num_classes": 1000}, "num_classes = 1000 contradicts .* 5"),
        ({"mlp_ratio": 2.0}, "mlp_ratio = 2.0 contradicts"),
        ({"heads": 2}, "no argument heads; valid: input_size, patch_size"),
    ],
)
def test_arguments_that_cannot_be(state_dict, config, message):
    with pytest.raises(UserError, match=message):
        from_reference("diffit", state_dict, **config)


@pytest.mark.parametrize(
    "key, change, message",
    [
        ("pos_embed", lambda table: table[:, ::-1], "pos_embed differs from the fixed table by up to"),
        ("pos_embed", lambda table: table + np.float32(np.nan), "pos_embed differs"),
        ("pos_embed", lambda table: table[:, :9], r"pos_embed is \(1, 9, 24\), expected \(1, 16, 24\)"),
        (INDEX, lambda index: index.T, "blocks.2.attn.relative_position_index differs .* by up to 48"),
        (INDEX, lambda index: index[:9, :9], r"relative_position_index is \(9, 9\), expected \(16, 16\)"),
    ],
)
def test_other_tables_are_refused(state_dict, key, change, message):
    with pytest.raises(UserError, match=message):
        from_reference("diffit", state_dict | {key: change(state_dict[key])})


def test_the_position_table_may_be_rounded_or_averaged(state_dict):
    moved = state_dict["pos_embed"] * np.float32(1 - 2e-4)
    for dtype in (np.float16, ml_dtypes.bfloat16, np.float32):
        from_reference("diffit", state_dict | {"pos_embed": moved.astype(dtype)})


def test_wrong_keys_are_one_error_that_names_them(state_dict):
    broken = {key: value for key, value in state_dict.items() if key != "blocks.1.attn.qkv_temb.weight"}
    broken |= {"head.weight": np.zeros(3), "blocks.2.attn.relative_position_bias_table": np.zeros((49, 3))}
    with pytest.raises(UserError) as error:
        from_reference("diffit", broken)
    for words in (
        "unexpected keys: head.weight",
        "missing keys: blocks.1.attn.qkv_temb.weight",
        "blocks.2.attn.relative_position_bias_table is (49, 3), expected (49, 2)",
    ):
        assert words in str(error.value)
    with pytest.raises(UserError, match="unexpected key blocks.7.attn.relative_position_index at depth 3"):
        from_reference("diffit", state_dict | {"blocks.7.attn.relative_position_index": state_dict[INDEX]})


def test_tables_of_no_square_are_refused(state_dict):
    for rows in (36, 50):
        tables = {key: np.zeros((rows, 2)) for key in state_dict if key.endswith("bias_table")}
        with pytest.raises(UserError, match=rf"has {rows} rows, expected \(2 n - 1\)\^2"):
            from_reference("diffit", state_dict | tables)
