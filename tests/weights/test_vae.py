"""The autoencoders' mappings: round trips, the layouts that files have, and complaints in words."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from diffjax.errors import UserError
from diffjax.frozen import create
from diffjax.weights import from_reference, to_reference, vae

KWARGS = {"widths": (16, 24), "depth": 1, "groups": 8}
CONFIG = {"norm_num_groups": 8}
TINY = {"width": 8, "encoder_blocks": (1, 2), "decoder_blocks": (2, 1)}


def module_and_params(name, **kwargs):
    module = create(name, **kwargs)
    side = module.factor
    shapes = jax.eval_shape(module.init, jax.random.key(0), jnp.zeros((1, side, side, module.channels)))["params"]
    leaves, structure = jax.tree.flatten(shapes)
    rng = np.random.default_rng(0)
    return module, structure.unflatten([rng.standard_normal(leaf.shape, np.float32) for leaf in leaves])


def same(found, expected):
    assert found[0] == expected[0]
    jax.tree.map(np.testing.assert_array_equal, found[1], expected[1])


@pytest.fixture(scope="module")
def kl():
    return module_and_params("VAE", **KWARGS)


@pytest.fixture(scope="module")
def state_dict(kl):
    return to_reference("vae", *kl)


@pytest.mark.parametrize(
    "kwargs, config",
    [
        ({}, {}),
        ({"depth": 2, "widths": (16, 16, 24)}, {}),
        ({"widths": (24,)}, {}),
        ({"quant": False, "attention": False}, {"use_quant_conv": False, "mid_block_add_attention": False}),
        ({"channels": 1, "latent_channels": 16}, {"latent_channels": 16, "in_channels": 1}),
        ({"scale": 0.36, "shift": 0.11}, {"scaling_factor": 0.36, "shift_factor": 0.11}),
        (
            {},
            {"_class_name": "AutoencoderKL", "shift_factor": None, "sample_size": 512, "block_out_channels": [16, 24]},
        ),
    ],
    ids=str,
)
def test_round_trip(kwargs, config):
    """Every parameter of the module comes back, and the module itself out of the shapes and the groups."""
    module, params = module_and_params("VAE", **{**KWARGS, **kwargs})
    same(from_reference("vae", to_reference("vae", module, params), **CONFIG, **config), (module, params))


@pytest.mark.parametrize("kwargs", [{}, {"encoder_blocks": (1, 3, 3, 3), "decoder_blocks": (3, 3, 3, 1)}], ids=str)
def test_round_trip_of_the_tiny_one(kwargs):
    module, params = module_and_params("TinyVAE", **{**TINY, **kwargs})
    same(from_reference("tiny_vae", to_reference("tiny_vae", module, params)), (module, params))


def test_keys_and_shapes_of_the_published_file():
    module = create("VAE")
    shapes = jax.eval_shape(module.init, jax.random.key(0), jnp.zeros((1, 8, 8, 3)))["params"]
    weights = to_reference("vae", module, jax.tree.map(lambda x: np.broadcast_to(np.float32(0), x.shape), shapes))
    expected = {
        "encoder.conv_in.weight": (128, 3, 3, 3),
        "encoder.down_blocks.1.resnets.0.conv_shortcut.weight": (256, 128, 1, 1),
        "encoder.down_blocks.2.resnets.0.conv_shortcut.weight": (512, 256, 1, 1),
        "encoder.mid_block.attentions.0.to_q.weight": (512, 512),
        "encoder.conv_out.weight": (8, 512, 3, 3),
        "decoder.conv_in.weight": (512, 4, 3, 3),
        "decoder.up_blocks.2.resnets.0.conv_shortcut.weight": (256, 512, 1, 1),
        "decoder.up_blocks.3.resnets.0.conv_shortcut.weight": (128, 256, 1, 1),
        "decoder.up_blocks.2.upsamplers.0.conv.weight": (256, 256, 3, 3),
        "decoder.conv_norm_out.weight": (128,),
        "decoder.conv_out.weight": (3, 128, 3, 3),
        "quant_conv.weight": (8, 8, 1, 1),
        "post_quant_conv.weight": (4, 4, 1, 1),
    }
    assert {key: weights[key].shape for key in expected} == expected
    assert len(weights) == 248
    assert not any(
        "down_blocks.3.downsamplers" in key or "down_blocks.3.resnets.0.conv_shortcut" in key for key in weights
    )


def compvis(state_dict):
    """The same weights as latent-diffusion names them: levels up counted from the image, attention by convolutions."""
    last = max(int(match[1]) for key in state_dict if (match := re.match(r"decoder\.up_blocks\.(\d+)", key)))
    names = {"to_q": "q", "to_k": "k", "to_v": "v", "to_out.0": "proj_out", "group_norm": "norm"}
    found = {}
    for key, value in state_dict.items():
        key = re.sub(r"encoder\.down_blocks\.(\d+)\.resnets", r"encoder.down.\1.block", key)
        key = re.sub(r"encoder\.down_blocks\.(\d+)\.downsamplers\.0", r"encoder.down.\1.downsample", key)
        for theirs, place in (("resnets", "block"), ("upsamplers.0", "upsample")):
            key = re.sub(
                rf"decoder\.up_blocks\.(\d+)\.{re.escape(theirs)}",
                lambda match, place=place: f"decoder.up.{last - int(match[1])}.{place}",
                key,
            )
        key = re.sub(r"mid_block\.resnets\.(\d)", lambda match: f"mid.block_{int(match[1]) + 1}", key)
        if match := re.match(r"(.*)\.mid_block\.attentions\.0\.(.*)\.(weight|bias)", key):
            key = f"{match[1]}.mid.attn_1.{names[match[2]]}.{match[3]}"
            value = value[:, :, None, None] if value.ndim == 2 else value
        found[key.replace("conv_shortcut", "nin_shortcut").replace("conv_norm_out", "norm_out")] = value
    return found


@pytest.mark.parametrize("widths", [(16, 24), (16, 24, 24, 32)], ids=str)
def test_the_layout_of_latent_diffusion(widths):
    """Alone, under "state_dict" beside a discriminator, and within a whole model."""
    module, params = module_and_params("VAE", **{**KWARGS, "widths": widths})
    theirs = compvis(to_reference("vae", module, params))
    assert not any(key.startswith("decoder.up.0.upsample") for key in theirs)
    trained = {"state_dict": theirs | {"loss.discriminator.main.0.weight": np.zeros((2, 2))}, "epoch": 3}
    unet = {"model.diffusion_model.out.0.weight": np.zeros(3), "betas": np.zeros(9), "logvar": np.zeros(9)}
    whole = {f"first_stage_model.{key}": value for key, value in theirs.items()} | unet
    averaged = {f"model_ema.{key.replace('.', '')}": value for key, value in unet.items()}
    for checkpoint in (theirs, trained, whole, {"state_dict": whole}, {"state_dict": whole | averaged, "epoch": 1}):
        same(from_reference("vae", checkpoint, **CONFIG), (module, params))


def test_earlier_names_of_the_attention(kl, state_dict):
    names = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}
    earlier = {}
    for key, value in state_dict.items():
        for name, before in names.items():
            key = key.replace(f"attentions.0.{name}.", f"attentions.0.{before}.")
        earlier[key] = value
    assert sum("proj_attn" in key for key in earlier) == 4
    same(from_reference("vae", earlier, **CONFIG), kl)


@pytest.mark.parametrize(
    "config, message",
    [
        ({"latent_channels": 8}, "latent_channels = 8 contradicts the weights, whose shapes say 4"),
        ({"block_out_channels": (16, 32)}, r"block_out_channels = \[16, 32\] contradicts the weights"),
        ({"down_block_types": ["DownEncoderBlock2D", "AttnDownEncoderBlock2D"]}, "down_block_types = .* contradicts"),
        ({"act_fn": "relu"}, "act_fn = 'relu' is another network; valid: 'silu'"),
        ({"latents_mean": [0.0]}, r"latents_mean = \[0.0\] is another network; valid: None"),
        ({"norm_num_groups": 5}, r"widths = \(16, 24\); valid: multiples of groups = 5"),
        ({"groups": 8}, "vae has no argument groups; valid: in_channels"),
    ],
)
def test_wrong_arguments(state_dict, config, message):
    with pytest.raises(UserError, match=message):
        from_reference("vae", state_dict, **{**CONFIG, **config})


def test_wrong_weights(state_dict):
    wrong = {
        key: value for key, value in state_dict.items() if key != "decoder.up_blocks.1.resnets.0.conv_shortcut.bias"
    }
    wrong |= {"extra": np.zeros(1), "encoder.mid_block.resnets.0.norm1.bias": np.zeros(3)}
    with pytest.raises(UserError) as error:
        from_reference("vae", wrong, **CONFIG)
    assert str(error.value) == (
        "these are not the weights of a vae model: unexpected keys: extra; missing keys: "
        "decoder.up_blocks.1.resnets.0.conv_shortcut.bias; wrong shapes: encoder.mid_block.resnets.0.norm1.bias is "
        "(3), expected (24)"
    )
    with pytest.raises(UserError, match="not the weights of a vae model: missing keys"):
        from_reference("vae", {})


def test_wrong_weights_and_arguments_of_the_tiny_one():
    module, params = module_and_params("TinyVAE", **TINY)
    weights = to_reference("tiny_vae", module, params)
    with pytest.raises(UserError, match=r"num_encoder_blocks = \[1, 3\] contradicts .* \[1, 2\]"):
        from_reference("tiny_vae", weights, num_encoder_blocks=(1, 3))
    with pytest.raises(UserError, match="latent_magnitude = 4 is another network; valid: 3"):
        from_reference("tiny_vae", weights, latent_magnitude=4)
    with pytest.raises(UserError, match=r"no blocks encoder.layers.\*.conv in every level"):
        from_reference("tiny_vae", {})
    del weights["decoder.layers.3.conv.2.bias"]
    with pytest.raises(UserError, match=r"missing keys: decoder.layers.3.conv.2.bias$"):
        from_reference("tiny_vae", weights)


def test_names_that_are_none_of_ours_stay():
    assert vae.renamed({"encoder.down.0.other": 1}).keys() == {"encoder.down.0.other"}
