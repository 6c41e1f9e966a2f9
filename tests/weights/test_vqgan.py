"""The VQGAN mapping: round trip, the published keys, where a file may hold them, and complaints in words."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import save_file

from diffjax.__main__ import main
from diffjax.errors import UserError
from diffjax.frozen import create
from diffjax.weights import from_reference, store, to_reference, unwrap

KWARGS = {"vocabulary": 12, "features": 8, "width": 32, "multipliers": (1, 2), "depth": 1}


def module_and_params(**kwargs):
    module = create("VQGAN", **{**KWARGS, **kwargs})
    side = 2 ** (len(module.multipliers) - 1)
    shapes = jax.eval_shape(module.init, jax.random.key(0), jnp.zeros((1, side, side, 3)))["params"]
    leaves, structure = jax.tree.flatten(shapes)
    rng = np.random.default_rng(0)
    return module, structure.unflatten([rng.standard_normal(leaf.shape, np.float32) for leaf in leaves])


@pytest.fixture(scope="module")
def state_dict():
    return to_reference("vqgan", *module_and_params())


@pytest.mark.parametrize(
    "kwargs",
    [{}, {"depth": 2, "multipliers": (1, 1, 2)}, {"multipliers": (2, 3), "features": 32}, {"multipliers": (3,)}],
    ids=str,
)
def test_round_trip(kwargs):
    """Every parameter of the module comes back, and the module itself out of the shapes."""
    module, params = module_and_params(**kwargs)
    found, back = from_reference("vqgan", to_reference("vqgan", module, params))
    assert found == module
    jax.tree.map(np.testing.assert_array_equal, back, params)


def test_keys_and_layout_of_the_published_file():
    """Shortcuts where a level changes the channels, one map up per level but the largest, biases as published."""
    module = create("VQGAN")
    shapes = jax.eval_shape(module.init, jax.random.key(0), jnp.zeros((1, 16, 16, 3)))["params"]
    zeros = jax.tree.map(lambda leaf: np.broadcast_to(np.float32(0), leaf.shape), shapes)
    weights = to_reference("vqgan", module, zeros)
    assert len(weights) == 168
    assert {key for key in weights if "nin_shortcut" in key} == {
        f"{place}.block.0.nin_shortcut.weight"
        for place in ("encoder.down.2", "encoder.down.4", "decoder.up.1", "decoder.up.3")
    }
    assert {key for key in weights if "upsample" in key and key.endswith("weight")} == {
        f"decoder.up.{level}.upsample.conv.weight" for level in (1, 2, 3, 4)
    }
    assert weights["encoder.conv_out.weight"].shape == (256, 512, 1, 1)
    assert weights["decoder.up.3.block.0.conv1.weight"].shape == (256, 512, 3, 3)
    assert weights["decoder.up.1.block.0.nin_shortcut.weight"].shape == (128, 128, 1, 1)
    biases = {key.removesuffix(".bias") for key in weights if key.endswith(".bias") and "norm" not in key}
    up = {f"decoder.up.{level}.upsample.conv" for level in (1, 2, 3, 4)}
    assert biases == {"encoder.conv_out", "decoder.conv_in", "decoder.conv_out"} | up


def test_layout(state_dict):
    _, params = module_and_params()
    kernel = params["encoder"]["level_1_block_0"]["conv1"]["kernel"]
    np.testing.assert_array_equal(state_dict["encoder.down.1.block.0.conv1.weight"][50, 3, 0, 2], kernel[0, 2, 3, 50])


def test_all_arguments_of_the_reference(state_dict):
    halves = {"double_z": False, "z_channels": 8, "resolution": 32, "in_channels": 3, "out_ch": 3, "ch": 32}
    halves |= {"ch_mult": [1, 2], "num_res_blocks": 1, "attn_resolutions": [16], "dropout": 0.0}
    found, _ = from_reference("vqgan", state_dict, ddconfig=halves, n_embed=12, embed_dim=8, note="")
    assert found == module_and_params()[0]


def test_where_a_file_may_hold_them(state_dict):
    """Under "state_dict", or among the other networks of a DiGIT checkpoint."""
    params = module_and_params()[1]
    others = {"decoder.embed_tokens.weight": 0, "centroids": 0, "centroid_norm": 0, "pretrained_encoder.cls_token": 0}
    inside = {f"vqgan.{key}": value for key, value in state_dict.items()} | others
    for checkpoint in ({"state_dict": state_dict, "epoch": 7}, inside, {"model": inside, "cfg": {}}):
        jax.tree.map(np.testing.assert_array_equal, from_reference("vqgan", checkpoint)[1], params)
    assert unwrap({"state_dict": state_dict, "epoch": 7}).keys() == state_dict.keys()


@pytest.mark.parametrize(
    "config, message",
    [
        ({"n_embed": 13}, "n_embed = 13 contradicts the weights, whose shapes say 12"),
        ({"ddconfig": {"ch_mult": [1, 1]}}, r"ch_mult = \[1, 1\] contradicts the weights, whose shapes say \[1, 2\]"),
        ({"ddconfig": {"double_z": True}}, "double_z = True contradicts"),
        ({"ddconfig": {"tanh_out": True}}, "vqgan ddconfig has no argument tanh_out; valid: double_z"),
        ({"lossconfig": {}}, "vqgan has no argument lossconfig; valid: ddconfig, n_embed"),
    ],
)
def test_wrong_arguments(state_dict, config, message):
    with pytest.raises(UserError, match=message):
        from_reference("vqgan", state_dict, **config)


def test_wrong_weights(state_dict):
    wrong = {key: value for key, value in state_dict.items() if key != "decoder.up.0.block.0.nin_shortcut.weight"}
    wrong |= {"quant_conv.weight": np.zeros(1), "encoder.mid.block_1.norm1.bias": np.zeros(3)}
    with pytest.raises(UserError) as error:
        from_reference("vqgan", wrong)
    assert str(error.value) == (
        "these are not the weights of a vqgan model: unexpected keys: quant_conv.weight; missing keys: "
        "decoder.up.0.block.0.nin_shortcut.weight; wrong shapes: encoder.mid.block_1.norm1.bias is (3), expected (64)"
    )
    with pytest.raises(UserError, match="missing keys: decoder.conv_in.bias, .* and 42 more"):
        from_reference("vqgan", {})


def test_converted_on_the_command_line(tmp_path, capsys, state_dict):
    save_file(state_dict, tmp_path / "vqgan.safetensors")
    out = tmp_path / "out"
    assert main(["convert", "--family=vqgan", f"--checkpoint={tmp_path / 'vqgan.safetensors'}", f"--out={out}"]) == 0
    module, params, model = store.load(out)
    assert module == module_and_params()[0]
    jax.tree.map(np.testing.assert_array_equal, params, module_and_params()[1])
    assert model["name"] == "VQGAN"
    assert model["sha256"] == json.loads((out / "model.json").read_text())["sha256"]
    assert model["sha256"] in capsys.readouterr().out
