"""The autoencoders of the stored cases through the commands: pixels to latents in records, and back to pictures.

Of the means and deviations that the commands store float16 keeps ten bits, 2^-11 of a value.
"""

import json

import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image
from safetensors.numpy import save_file

from diffjax.__main__ import main
from diffjax.data import latents, records, shards
from diffjax.data.latents import Scaling
from diffjax.methods.latents import load_decoder
from diffjax.sampling.samples import to_uint8
from diffjax.weights import from_reference
from diffjax.weights.autoencoders import Autoencoder
from tests.golden.cases import cases, to_nhwc

pytestmark = pytest.mark.golden
ROUNDED = 2.0**-11  # relative, of float16
ATOL = 1e-4


def family(case) -> str:
    return "vae" if "moments_nchw" in case.arrays else "tiny_vae"


@pytest.fixture
def folders(case, tmp_path):
    """A folder of diffusers with the weights of a case, and a folder of images."""
    assert case is not None, "no stored cases"
    vae, images = tmp_path / "vae", tmp_path / "images"
    vae.mkdir()
    images.mkdir()
    save_file(dict(case.state_dict), vae / "diffusion_pytorch_model.safetensors")
    (vae / "config.json").write_text(json.dumps(case.info["config"]))
    pixels = to_uint8(np.clip(to_nhwc(case.arrays["image_nchw"]), -1, 1))
    pixels = np.concatenate([pixels, 255 - pixels, pixels[:, ::-1]])
    for number, image in enumerate(pixels):
        Image.fromarray(image).save(images / f"{number}.png")
    return vae, images, pixels


@pytest.mark.parametrize("case", cases("vae", slow=["kl_c16x24x32_l2"]))
def test_latents_and_pictures_through_the_commands(case, folders, tmp_path):
    vae, images, pixels = folders
    module, params = from_reference(family(case), case.state_dict, **case.info["config"])
    scale = getattr(module, "scale", 1.0)
    size = pixels.shape[1] // module.factor
    leaves = {
        "images.name": "folder",
        "images.dir": images,
        "images.split": "",
        "images.size": pixels.shape[1],
        "images.num_classes": 0,
        "images.crop": "none",
        "autoencoder.weights": vae,
        "data.size": size,
        "data.channels": module.latent_channels,
        "data.num_classes": 0,
        "data.scale": scale,
        "data.flip": "true",
        "diffusion.label_drop": 0.0,
        "sampling.guidance.scale": 1.0,
        "sampling.guidance.channels": 0,
    }
    given = [f"--config.{leaf}={value}" for leaf, value in leaves.items()]
    out = tmp_path / "latents"
    assert main(["encode", "--config=configs/imagenet256.py:model=dit-s-2", *given, f"--out={out}"]) == 0
    manifest = latents.read_manifest(out)
    stored = shards.open_records(out, manifest)
    found = np.stack([records.decode(stored[i], manifest["shape"])[0] for i in range(len(stored))]).astype(np.float32)

    for view, seen in enumerate((pixels, pixels[:, :, ::-1])):
        x = jnp.asarray(seen, jnp.float32) / 127.5 - 1
        mean, log_variance = module.apply({"params": params}, x, method="encode")
        np.testing.assert_allclose(found[:, view, 0], mean, rtol=ROUNDED, atol=ATOL)
        np.testing.assert_allclose(found[:, view, 1], np.exp(log_variance / 2), rtol=ROUNDED, atol=ATOL)

    decode = load_decoder(Autoencoder(str(vae)), str(out), module.latent_channels, Scaling(scale))
    expected = module.apply({"params": params}, jnp.asarray(found[:, 0, 0]), method="decode")
    np.testing.assert_allclose(decode(jnp.asarray(found[:, 0, 0] * scale)), expected, atol=ATOL)
