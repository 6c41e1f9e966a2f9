"""The DINOv2 mapping: round trip, the encoder inside a DiGIT checkpoint, and complaints in words."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from diffjax.errors import UserError
from diffjax.frozen import create
from diffjax.frozen.dinov2 import SIZES
from diffjax.weights import from_reference, store, to_reference

KWARGS = {"depth": 3, "width": 16, "heads": 2, "hidden": 64, "grid": 5}


def module_and_params(**kwargs):
    module = create("DINOv2", **{**KWARGS, **kwargs})
    shapes = jax.eval_shape(module.init, jax.random.key(0), jnp.zeros((1, 28, 28, 3)))["params"]
    leaves, structure = jax.tree.flatten(shapes)
    rng = np.random.default_rng(0)
    return module, structure.unflatten([rng.standard_normal(leaf.shape, np.float32) for leaf in leaves])


@pytest.fixture(scope="module")
def state_dict():
    return to_reference("dinov2", *module_and_params())


@pytest.mark.parametrize(
    "kwargs",
    [
        {},
        {"gated": True, "hidden": 48},
        {"hidden": 40, "depth": 1},
        {"registers": 2, "grid": 37, "patch": 7},
        {"registers": 0},
    ],
    ids=str,
)
def test_round_trip(kwargs):
    """Every parameter of the module comes back, and the module itself out of the shapes and the heads."""
    module, params = module_and_params(**kwargs)
    found, back = from_reference("dinov2", to_reference("dinov2", module, params), num_heads=2)
    assert found == module
    jax.tree.map(np.testing.assert_array_equal, back, params)


def test_keys_and_layout_of_the_reference(state_dict):
    _, params = module_and_params()
    assert len(state_dict) == 8 + 3 * 14
    assert state_dict["pos_embed"].shape == (1, 26, 16)
    assert state_dict["cls_token"].shape == (1, 1, 16)
    kernel = params["blocks"]["attention"]["qkv"]["kernel"]  # [l, d, h, 3, k]
    np.testing.assert_array_equal(state_dict["blocks.1.attn.qkv.weight"][16 + 8 + 5], kernel[1, :, 1, 1, 5])
    pixel = params["patch_embed"]["kernel"].reshape(14, 14, 3, 16)
    np.testing.assert_array_equal(state_dict["patch_embed.proj.weight"][7, 2, 13, 0], pixel[13, 0, 2, 7])
    gated = to_reference("dinov2", *module_and_params(gated=True))
    assert gated["blocks.0.mlp.w12.weight"].shape == (128, 16)
    assert gated["blocks.0.mlp.w3.weight"].shape == (16, 64)


def test_all_arguments_of_the_reference(state_dict):
    config = {"patch_size": 14, "embed_dim": 16, "depth": 3, "num_heads": 2, "num_register_tokens": 4, "mlp_ratio": 4}
    config |= {"interpolate_antialias": False, "interpolate_offset": 0.1, "layer_norm_eps": 1e-6, "layer": 3}
    config |= {"pos_embed_tokens": 26, "normalisation": "as of ImageNet", "notes": ""}
    assert from_reference("dinov2", state_dict, **config)[0] == module_and_params()[0]
    gated = to_reference("dinov2", *module_and_params(gated=True, hidden=48))
    assert from_reference("dinov2", gated, num_heads=2, mlp_ratio=4)[0].hidden == 48


def test_inside_a_checkpoint_of_digit(state_dict):
    """Among the weights of the decoder, and the centroids; a key of no known network is refused."""
    others = {
        "decoder.embed_tokens.weight": 0,
        "centroids": 0,
        "centroid_norm": 0,
        "vqgan.quantize.embedding.weight": 0,
    }
    checkpoint = {f"pretrained_encoder.{key}": value for key, value in state_dict.items()} | others
    module, params = from_reference("dinov2", {"model": checkpoint}, num_heads=2)
    assert module == module_and_params()[0]
    jax.tree.map(np.testing.assert_array_equal, params, module_and_params()[1])
    with pytest.raises(UserError, match="unexpected keys: head.weight$"):
        from_reference("dinov2", checkpoint | {"head.weight": np.zeros(1)}, num_heads=2)
    with pytest.raises(UserError, match="unexpected keys: centroids$"):
        from_reference("dinov2", state_dict | {"centroids": np.zeros(1)}, num_heads=2)


def test_wrong_weights(state_dict):
    wrong = {key: value for key, value in state_dict.items() if key != "norm.bias"}
    wrong |= {"blocks.1.ls1.gamma": np.zeros(7), "pooler.weight": np.zeros(1)}
    with pytest.raises(UserError) as error:
        from_reference("dinov2", wrong, num_heads=2)
    assert str(error.value) == (
        "these are not the weights of a dinov2 model: unexpected keys: pooler.weight; missing keys: norm.bias; "
        "wrong shapes: blocks.1.ls1.gamma is (7), expected (16)"
    )
    with pytest.raises(UserError, match="pos_embed has 25 rows; valid: one and a square, such as 1370"):
        from_reference("dinov2", state_dict | {"pos_embed": np.zeros((1, 25, 16))}, num_heads=2)


@pytest.mark.parametrize(
    "config, message",
    [
        ({}, "depth 3, width 16 is no published size; give num_heads"),
        ({"num_heads": 3}, "width = 16 is not divisible by heads = 3"),
        ({"num_heads": 2, "depth": 4}, "depth = 4 contradicts the weights, whose shapes say 3"),
        ({"num_heads": 2, "mlp_ratio": 3}, "mlp_ratio = 3 contradicts the weights, whose shapes say 4.0"),
        (
            {"num_heads": 2, "interpolate_antialias": True},
            "interpolate_antialias = True is not supported; valid: False",
        ),
        (
            {"num_heads": 2, "num_register_tokens": 0},
            "num_register_tokens = 0 contradicts the weights",
        ),
        ({"heads": 2}, "dinov2 has no argument heads; valid: patch_size, embed_dim"),
    ],
)
def test_wrong_arguments(state_dict, config, message):
    with pytest.raises(UserError, match=message):
        from_reference("dinov2", state_dict, **config)


def test_published_heads_are_known():
    module = create("DINOv2", **SIZES["S"])
    shapes = jax.eval_shape(module.init, jax.random.key(0), jnp.zeros((1, 28, 28, 3)))["params"]
    zeros = jax.tree.map(lambda leaf: np.broadcast_to(np.float32(0), leaf.shape), shapes)
    assert from_reference("dinov2", to_reference("dinov2", module, zeros))[0] == module


def test_saved_and_loaded(tmp_path):
    module, params = module_and_params()
    saved = store.save(tmp_path / "p", module, params, {"family": "dinov2"})
    found, loaded, model = store.load(tmp_path / "p")
    assert found == module
    jax.tree.map(np.testing.assert_array_equal, loaded, params)
    assert model == saved
    assert model["name"] == "DINOv2"
    assert model["sha256"] == store.tree_sha256(params)
