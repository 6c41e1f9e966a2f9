"""The U-DiT mapping: round trip, old names, what shapes tell, fused weights refused, and complaints about the rest."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from diffjax.errors import UserError
from diffjax.models import create
from diffjax.weights import from_reference, to_reference
from tests import slow

KWARGS = {"width": 16, "heads": 2, "depth": (1, 2, 3, 2, 1), "channels": 3, "num_classes": 5}
DROPPED = "decoder_level_2.1.attn2.downsampler.layer.weight"


def module_and_params(scale=1.0, **kwargs):
    module = create("U-DiT", **{**KWARGS, **kwargs})
    x, y = jnp.zeros((1, 24, 24, module.channels)), jnp.zeros(1, jnp.int32)
    shapes = jax.eval_shape(module.init, jax.random.key(0), x, jnp.zeros(1), y)["params"]
    leaves, structure = jax.tree.flatten(shapes)
    rng = np.random.default_rng(0)
    return module, structure.unflatten([scale * rng.standard_normal(leaf.shape, np.float32) for leaf in leaves])


@pytest.fixture(scope="module")
def state_dict():
    return to_reference("udit", *module_and_params())


ROUND_TRIPS = [
    ({}, {}),
    ({"num_classes": 0}, {}),
    ({"null_class": False, "label_drop": 0.0}, {"class_dropout_prob": 0.0}),
    ({"learn_sigma": False, "mlp_ratio": 1.5}, {}),
    ({"similarity": "dot", "positions": "none", "ffn": "basic", "mlp_ratio": 4}, {"num_heads": 2}),
    ({"similarity": "dot", "heads": 1}, {"num_heads": 1, "posemb_type": "rope2d"}),
    ({"positions": "none", "width": 10}, {"posemb_type": None}),
    ({"down_kernel": 7, "down_shortcut": False}, {"down_shortcut": 0}),
    ({"down_kernel": 0, "down_factor": 1}, {"down_factor": 1}),
    ({"down_factor": (2, 1, 1, 3, 2)}, {"down_factor": [2, 1, 1, 3, 2]}),
    ({"label_drop": 0.2}, {"class_dropout_prob": 0.2}),
]


@pytest.mark.parametrize("kwargs, told", slow.but(ROUND_TRIPS[:3], ROUND_TRIPS), ids=str)
def test_round_trip(kwargs, told):
    """Every parameter of the module comes back, and the module itself."""
    module, params = module_and_params(**kwargs)
    weights = to_reference("udit", module, params)
    found, back = from_reference("udit", weights, **told)
    assert found == module
    jax.tree.map(np.testing.assert_array_equal, back, params)
    again = to_reference("udit", found, back)
    assert again.keys() == weights.keys()
    for key, value in weights.items():
        np.testing.assert_array_equal(again[key], value)


def test_keys_and_layout_of_the_reference(state_dict):
    _, params = module_and_params()
    latent = params["latent"]
    attention, mlp = latent["attention"], latent["mlp"]
    assert len(state_dict) == 31 + 9 * 2 * 23
    key = "latent.2.attn2."  # the sixth layer of a width of 64 and heads of 32
    np.testing.assert_array_equal(state_dict[key + "logit_scale"][:, 0, 0], attention["logit_scale"][5])
    np.testing.assert_array_equal(
        state_dict[key + "downsampler.layer.weight"][7, 0], attention["downsample"]["kernel"][5, :, :, 0, 7]
    )
    np.testing.assert_array_equal(state_dict["latent.0.mlp1.dwconv.1.weight"][9, 0], mlp["kernel_3"][0, :, :, 0, 9])
    # the second head's keys: neighbours there, halves here
    rows = state_dict[key + "to_qkv.weight"][64 + 32 : 64 + 64]
    np.testing.assert_array_equal(rows[0::2], attention["qkv"]["kernel"][5, :, 1, 1, :16].T)
    np.testing.assert_array_equal(rows[1::2], attention["qkv"]["kernel"][5, :, 1, 1, 16:].T)
    # pixel (dy, dx) of channel c is output c * 4 + dy * 2 + dx there
    grow = params["grow_2"]["conv"]["kernel"].reshape(3, 3, 64, 2, 2, 32)
    np.testing.assert_array_equal(state_dict["up3_2.body.0.weight"][11 * 4 + 2].transpose(1, 2, 0), grow[..., 1, 0, 11])


def test_all_arguments_of_the_reference(state_dict):
    config = {"input_size": 32, "down_factor": 2, "in_channels": 3, "hidden_size": 16, "depth": [1, 2, 3, 2, 1]}
    config |= {"num_heads": 2, "mlp_ratio": 2, "num_classes": 5, "downsampler": "dwconv5", "learn_sigma": True}
    config |= {"rep": 1, "ffn_type": "rep", "attn_type": "v2", "posemb_type": "rope2d", "down_shortcut": 1}
    config |= {"class_dropout_prob": 0.1}
    assert from_reference("udit", state_dict, **config)[0] == create("U-DiT", **KWARGS)
    assert from_reference("udit", state_dict, depth=(1, 2, 3, 2, 1))[0] == create("U-DiT", **KWARGS)


@pytest.mark.parametrize(
    "wrap",
    [
        lambda weights, other: {"model": other, "ema": weights, "opt": {}, "args": None},
        lambda weights, other: {f"module.{key}": value for key, value in weights.items()},
        lambda weights, other: {k.replace("downsampler.layer", "before_attn"): v for k, v in weights.items()},
    ],
    ids=["ema", "module", "old name"],
)
def test_files_as_they_are_found(state_dict, wrap):
    other = {key: np.zeros_like(value) for key, value in state_dict.items()}
    _, params = from_reference("udit", wrap(state_dict, other))
    jax.tree.map(np.testing.assert_array_equal, params, module_and_params()[1])


def after_eval(weights, times=1):
    """What the reference's eval() does to its weights."""
    weights = {key: value.copy() for key, value in weights.items()}
    for key in weights:
        if key.endswith("dwconv.0.weight"):
            for _ in range(times):
                weights[key][:, :, 1:4, 1:4] += weights[key.replace("dwconv.0", "dwconv.1")]
                weights[key][:, :, 2:3, 2:3] += weights[key.replace("dwconv.0", "dwconv.2")] + 1
    return weights


@pytest.mark.parametrize("times", slow.but([2], [1, 2, 3]))
@pytest.mark.parametrize("scale", slow.but([0.05], [0.0, 0.05, 0.3]))
def test_weights_that_went_through_eval_are_refused(times, scale):
    weights = to_reference("udit", *module_and_params(scale))
    from_reference("udit", weights)
    with pytest.raises(UserError, match=rf"already hold .* {times} times?: .* saved after the reference's eval\(\)"):
        from_reference("udit", after_eval(weights, times))


@pytest.mark.parametrize("moved", [0.2, -0.3, 1.0, -1.0])
def test_branches_that_were_trained_alike_are_taken_for_what_they_are(moved):
    """Parallel branches get equal gradients, so Adam moves their common taps by the same amounts."""
    weights = to_reference("udit", *module_and_params(0.05))
    for key, value in weights.items():
        if "dwconv" in key and key.endswith("weight"):
            shift = moved * np.random.default_rng(len(value)).standard_normal((len(value), 1)) + moved / 2
            value[:, :, value.shape[2] // 2, value.shape[3] // 2] += shift
    from_reference("udit", weights)
    with pytest.raises(UserError, match="1 time:"):
        from_reference("udit", after_eval(weights))


@pytest.mark.parametrize(
    "config, message",
    [
        ({"in_channels": 4}, "in_channels = 4 contradicts the weights, whose shapes say 3"),
        ({"hidden_size": 32}, "hidden_size = 32 contradicts"),
        ({"depth": [1, 1, 1, 1, 1]}, r"depth = \[1, 1, 1, 1, 1\] contradicts .* \[1, 2, 3, 2, 1\]"),
        ({"num_heads": 4}, "num_heads = 4 contradicts .* 2"),
        ({"mlp_ratio": 4}, "mlp_ratio = 4 contradicts .* 2.0"),
        ({"num_classes": 1000}, "num_classes = 1000 contradicts .* 5"),
        ({"learn_sigma": False}, "learn_sigma = False contradicts"),
        ({"downsampler": "dwconv3"}, "downsampler = dwconv3 contradicts .* dwconv5"),
        ({"rep": 0}, "rep = 0 contradicts .* 1"),
        ({"ffn_type": "basic"}, "ffn_type = basic contradicts .* rep"),
        ({"attn_type": None}, "attn_type = None contradicts .* v2"),
        ({"posemb_type": "sincos"}, "posemb_type = 'sincos' is not supported; valid: 'rope2d', None"),
        ({"down_factor": [2, 2]}, "five positive integers"),
        ({"patch_size": 2}, "no argument patch_size; valid: input_size, down_factor"),
    ],
)
def test_arguments_that_cannot_be(state_dict, config, message):
    with pytest.raises(UserError, match=message):
        from_reference("udit", state_dict, **config)


def test_one_error_names_every_wrong_key(state_dict):
    broken = dict(state_dict)
    del broken["latent.2.mlp1.dwconv.2.bias"], broken["up3_2.body.0.weight"]
    broken |= {"latent.0.mlp1.dwconv.weight": np.zeros((128, 1, 5, 5)), "latent.0.attn3.to_qkv.bias": np.zeros(192)}
    broken["output.weight"] = np.zeros((32, 32, 1, 1))
    with pytest.raises(UserError) as error:
        from_reference("udit", broken)
    unexpected, missing, wrong = str(error.value).split("; ")
    assert "unexpected keys: latent.0.attn3.to_qkv.bias, latent.0.mlp1.dwconv.weight" in unexpected
    assert missing == "missing keys: latent.2.mlp1.dwconv.2.bias, up3_2.body.0.weight"
    assert wrong == "wrong shapes: output.weight is (32, 32, 1, 1), expected (32, 32, 3, 3)"


@pytest.mark.parametrize(
    "key", ["x_embedder.proj.weight", "t_embedder_2.mlp.0.bias", DROPPED, "final_layer.out_proj.bias"]
)
def test_each_key_is_needed(state_dict, key):
    with pytest.raises(UserError, match=f"missing keys: {key}$"):
        from_reference("udit", {k: v for k, v in state_dict.items() if k != key})


def test_heads_of_other_widths_must_be_given_and_fused_weights_are_ours_alone():
    module, params = module_and_params(similarity="dot", positions="none", ffn="basic")
    with pytest.raises(UserError, match="width 16 is no published size; give num_heads"):
        from_reference("udit", to_reference("udit", module, params))
    with pytest.raises(UserError, match="the reference stores no fused weights"):
        to_reference("udit", *module_and_params(ffn="single"))
