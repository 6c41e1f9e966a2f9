"""The DiS mapping: round trip, training checkpoints, what shapes tell, and one clear complaint about what is wrong."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from diffjax.errors import UserError
from diffjax.models import create
from diffjax.weights import from_reference, to_reference
from tests import slow

KWARGS = {"patch": 2, "depth": 4, "width": 24, "channels": 3, "num_classes": 5}


def module_and_params(**kwargs):
    module = create("DiS", **{**KWARGS, **kwargs})
    x, y = jnp.zeros((1, 8, 8, module.channels)), jnp.zeros(1, jnp.int32)
    shapes = jax.eval_shape(module.init, jax.random.key(0), x, jnp.zeros(1), y)["params"]
    leaves, structure = jax.tree.flatten(shapes)
    rng = np.random.default_rng(0)
    return module, structure.unflatten([rng.standard_normal(leaf.shape, np.float32) for leaf in leaves])


@pytest.fixture(scope="module")
def state_dict():
    return to_reference("dis", *module_and_params())


ROUND_TRIPS = [
    ({}, {}),
    ({"depth": 5}, {"depth": 5}),
    ({"depth": 1}, {}),
    ({"num_classes": 0}, {}),
    ({"null_class": False}, {"class_dropout_prob": 0.0}),
    ({"learn_sigma": False, "time_mlp": False}, {}),
    ({"skip": "none", "norm": "layer"}, {}),
    ({"d_state": 3, "d_conv": 5, "expand": 1}, {}),
    ({"drop_path": 0.3}, {"drop_path_rate": 0.3}),
]


@pytest.mark.parametrize("kwargs, told", slow.but(ROUND_TRIPS[:3], ROUND_TRIPS), ids=str)
def test_round_trip(kwargs, told):
    """Every parameter of the module comes back, and the module itself."""
    module, params = module_and_params(**kwargs)
    weights = to_reference("dis", module, params)
    found, back = from_reference("dis", weights, **told)
    assert found == module
    jax.tree.map(np.testing.assert_array_equal, back, params)
    again = to_reference("dis", found, back)
    assert again.keys() == weights.keys()
    for key, value in weights.items():
        np.testing.assert_array_equal(again[key], value)


def test_keys_and_layout_of_the_reference(state_dict):
    _, params = module_and_params()
    block = params["out_blocks"]
    assert len(state_dict) == 13 + 5 * 17 + 2 * 2
    mixer = "out_blocks.1.mixer."
    # the first half of the projection's rows is convolved, the second is the gate
    np.testing.assert_array_equal(state_dict[mixer + "in_proj.weight"][48 + 7], block["mixer"]["in_proj"][1, 1, :, 7])
    np.testing.assert_array_equal(
        state_dict[mixer + "conv1d_b.weight"][:, 0, 2], block["mixer"]["backward"]["conv_kernel"][1, 2]
    )
    np.testing.assert_array_equal(state_dict[mixer + "A_log"], block["mixer"]["forward"]["A_log"][1])
    np.testing.assert_array_equal(state_dict["out_blocks.0.skip_linear.weight"], block["skip"]["kernel"][0].T)
    pixel = params["patch_embed"]["kernel"].reshape(2, 2, 3, 24)
    np.testing.assert_array_equal(state_dict["patch_embed.proj.weight"][7, 2, 1, 0], pixel[1, 0, 2, 7])


def test_all_arguments_of_the_reference(state_dict):
    config = {"img_size": 8, "patch_size": 2, "channels": 3, "embed_dim": 24, "depth": 4, "num_classes": 5}
    config |= {"class_dropout_prob": 0.1, "learn_sigma": True, "mlp_time_embed": True, "drop_path_rate": 0.1}
    config |= {"ssm_cfg": {"d_state": 16, "d_conv": 4, "expand": 2}, "rms_norm": True, "skip": True}
    config |= {"fused_add_norm": True, "norm_epsilon": 1e-5, "residual_in_fp32": True, "bimamba_type": "v2"}
    assert from_reference("dis", state_dict, **config)[0] == create("DiS", **KWARGS)
    assert from_reference("dis", state_dict, ssm_cfg=None)[0] == create("DiS", **KWARGS)


def test_unconditional_is_minus_one_class():
    module, params = module_and_params(num_classes=0)
    weights = to_reference("dis", module, params)
    for given in (-1, 0):
        assert from_reference("dis", weights, num_classes=given)[0] == module
    with pytest.raises(UserError, match="num_classes = 10 contradicts the weights, whose shapes say -1"):
        from_reference("dis", weights, num_classes=10)


@pytest.mark.parametrize(
    "wrap",
    [
        lambda weights, other: {"model": other, "ema": weights, "opt": {}, "args": None},
        lambda weights, other: {"model": weights, "opt": {}},
        lambda weights, other: {f"module.{key}": value for key, value in weights.items()},
        lambda weights, other: {"ema": {f"module.{key}": value for key, value in weights.items()}, "model": other},
    ],
    ids=["ema", "model", "module", "module in ema"],
)
def test_training_checkpoints(state_dict, wrap):
    other = {key: np.zeros_like(value) for key, value in state_dict.items()}
    _, params = from_reference("dis", wrap(state_dict, other))
    jax.tree.map(np.testing.assert_array_equal, params, module_and_params()[1])


@pytest.mark.parametrize(
    "config, message",
    [
        ({"img_size": 16}, "img_size = 16 contradicts the weights, whose shapes say 8"),
        ({"patch_size": 4}, "patch_size = 4 contradicts"),
        ({"channels": 4}, "channels = 4 contradicts"),
        ({"embed_dim": 48}, "embed_dim = 48 contradicts"),
        ({"depth": 6}, "depth = 6 contradicts the weights, whose shapes say 4"),
        ({"num_classes": 1000}, "num_classes = 1000 contradicts .* 5"),
        ({"num_classes": -1}, "num_classes = -1 contradicts .* 5"),
        ({"num_classes": 5, "class_dropout_prob": 0.0}, "num_classes = 5 contradicts .* 6"),
        ({"learn_sigma": False}, "learn_sigma = False contradicts"),
        ({"mlp_time_embed": False}, "mlp_time_embed = False contradicts"),
        ({"rms_norm": False}, "rms_norm = False contradicts"),
        ({"skip": False}, "skip = False contradicts"),
        ({"ssm_cfg": {"d_state": 8}}, "ssm_cfg: d_state = 8 contradicts .* 16"),
        ({"ssm_cfg": {"dt_rank": 7}}, "ssm_cfg: dt_rank = 7 contradicts"),
        ({"ssm_cfg": {"states": 8}}, "ssm_cfg has no argument states; valid: d_state"),
        ({"bimamba_type": "v1"}, "bimamba_type = v1 is not supported; valid: v2"),
        ({"drop_path_rate": 1.5}, "drop_path = 1.5: valid: 0 to below 1"),
        ({"hidden_size": 24}, "no argument hidden_size; valid: img_size, patch_size"),
    ],
)
def test_arguments_that_cannot_be(state_dict, config, message):
    with pytest.raises(UserError, match=message):
        from_reference("dis", state_dict, **config)


def test_one_error_names_every_wrong_key(state_dict):
    broken = dict(state_dict)
    del broken["mid_block.mixer.D_b"], broken["out_blocks.1.skip_linear.bias"]
    broken |= {"in_blocks.7.norm.weight": np.zeros(24), "head.weight": np.zeros((2, 2))}
    broken["in_blocks.0.mixer.dt_proj.weight"] = np.zeros((48, 3))
    broken["patch_embed.proj.weight"] = broken["patch_embed.proj.weight"].transpose(1, 0, 2, 3)
    with pytest.raises(UserError) as error:
        from_reference("dis", broken)
    unexpected, missing, wrong = str(error.value).split("; ")
    assert "unexpected keys: head.weight, in_blocks.7.norm.weight" in unexpected
    assert missing == "missing keys: mid_block.mixer.D_b, out_blocks.1.skip_linear.bias"
    assert wrong.startswith("wrong shapes: in_blocks.0.mixer.dt_proj.weight is (48, 3), expected (48, 2), patch_embed")


@pytest.mark.parametrize(
    "key",
    ["pos_embed", "label_emb.embedding_table.weight", "time_embed.0.bias", "in_blocks.1.mixer.A_log", "norm_f.weight"],
)
def test_each_key_is_needed(state_dict, key):
    with pytest.raises(UserError, match=f"missing keys: {key}$"):
        from_reference("dis", {k: v for k, v in state_dict.items() if k != key})


@pytest.mark.parametrize("wrong", [{}, {"model": {}, "opt": {}}])
def test_something_else_entirely(wrong):
    with pytest.raises(UserError, match=r"missing keys: .*mid_block"):
        from_reference("dis", wrong)


@pytest.mark.parametrize("key", ["pos_embed", "mid_block.mixer.in_proj.weight"])
def test_shapes_without_a_model_are_refused(state_dict, key):
    """Tokens that are no square of patches; a rank that is not that of the width."""
    broken = {"pos_embed": np.zeros((1, 17, 24), np.float32)} if key == "pos_embed" else {key: np.zeros((90, 24))}
    with pytest.raises(UserError, match=f"{key} (is|has)"):
        from_reference("dis", state_dict | broken)
