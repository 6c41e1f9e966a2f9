"""DINOv2 and the VQGAN against stored outputs of what DiGIT runs, and its tokens of images."""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from diffjax.frozen import dinov2, vqgan
from diffjax.tokens.kmeans import assign
from diffjax.weights import from_reference
from tests.golden.cases import cases, to_nchw, to_nhwc

pytestmark = pytest.mark.golden
ATOL = 1e-4
MARGIN = 1e-3  # above it the nearest of the centroids does not hang on rounding
COMMITMENT = 0.25

DINO = pytest.mark.parametrize("case", cases("digit", "pos_embed_"))
TOKENS = pytest.mark.parametrize("case", cases("digit", "sem_tokens"))
VQGAN = pytest.mark.parametrize("case", cases("digit", "rand_indices"))


def close(found, stored, name=""):
    np.testing.assert_allclose(found, stored, rtol=0, atol=ATOL, err_msg=name)


def equal_where_clear(found, stored, margin):
    clear = margin > MARGIN
    assert clear.any()
    np.testing.assert_array_equal(np.asarray(found)[clear], stored[clear])


def images(case, key):
    """Stored uint8 NCHW pixels as the doors take them: [b, h, w, 3] in [0, 1]."""
    return jnp.asarray(to_nhwc(case.arrays[key]), jnp.float32) / 255


@functools.cache
def load(case):
    assert case is not None, "no stored cases"
    config = case.info["config"]
    family = "vqgan" if "ddconfig" in config else "dinov2"
    return from_reference(family, case.state_dict, **config.get("dino", config))


@functools.cache
def states(case, size):
    """All states of a stored size, the input of the first block in front, and the last norm."""
    module, params = load(case)

    @jax.jit
    def run(params, pixels):
        out, captured = module.apply(
            {"params": params}, pixels, capture_intermediates=lambda _, method: method in ("embed", "__call__")
        )
        first, (blocks, _) = captured["intermediates"]["embed"][0], captured["intermediates"]["blocks"]["__call__"][0]
        return jnp.concatenate([first[None], blocks]), out

    with jax.default_matmul_precision("highest"):
        return run(params, dinov2.normalise(images(case, f"pixels_u8_{size}")))


def sizes(case):
    assert case is not None, "no stored cases"
    return [key.removeprefix("pixels_u8_") for key in case.arrays if key.startswith("pixels_u8_")]


@DINO
def test_positions(case):
    module, params = load(case)
    for size in sizes(case):
        height, width = (int(side) // module.patch for side in size.split("x"))
        found = dinov2.interpolate(jnp.asarray(params["positions"]), height, width)
        close(found, case.arrays[f"pos_embed_{size}"][0], size)


@DINO
def test_states(case):
    for size in sizes(case):
        found, last = states(case, size)
        close(found, case.arrays[f"hidden_{size}"], size)
        close(last, case.arrays[f"final_norm_{size}"], size)


@DINO
def test_features(case):
    """Of all stored layers and sizes; those of 224 x 224 images also from the images."""
    module, params = load(case)
    found = [key for key in case.arrays if re.match(r"layer\d+_", key)]
    assert found
    for key in found:
        layer, size = re.fullmatch(r"layer(\d+)_(.*)", key).groups()
        pixels = images(case, f"pixels_u8_{size}")
        function, inputs = dinov2.patches, dinov2.normalise(pixels)
        if pixels.shape[1:3] == (dinov2.SIDE, dinov2.SIDE):
            function, inputs = dinov2.features, pixels
        with jax.default_matmul_precision("highest"):
            features = jax.jit(functools.partial(function, module, layer=int(layer)))(params, inputs)
        close(features, case.arrays[key], key)


@TOKENS
def test_images_are_shrunk(case):
    assert case is not None, "no stored cases"
    [key] = [key for key in case.arrays if key.startswith("resized_pixels")]
    stored = case.arrays[key]
    found = to_nchw(dinov2.shrink(dinov2.normalise(images(case, "pixels_u8"))))
    close(found[:, :, : stored.shape[2]], stored)


@TOKENS
def test_tokens(case):
    """From images to tokens, the whole way: the encoder and the centroids are inside the checkpoint."""
    module, params = load(case)
    config, arrays = case.info["config"], case.arrays

    @jax.jit
    def tokens(params, pixels):
        features = dinov2.features(module, params, pixels, config["dino"]["layer"])
        return assign(features, case.state_dict["centroids"].T)

    with jax.default_matmul_precision("highest"):
        found = tokens(params, images(case, "pixels_u8"))
    equal_where_clear(found, arrays["sem_tokens"] - config["nspecial"], arrays["sem_margin"])


@functools.cache
def encoded(case):
    """z, its tokens, and the entries of the stored tokens."""
    module, params = load(case)

    @jax.jit
    def run(params, pixels, indices):
        bound = module.bind({"params": params})
        z = bound.encode(pixels)
        return z, bound.quantise(z), bound.lookup(indices)

    with jax.default_matmul_precision("highest"):
        return run(params, images(case, "pixels_u8"), case.arrays["indices"])


@VQGAN
def test_vqgan_encoder(case):
    """With the training loss, which is no part of ours, as a sum over both."""
    z, tokens, entries = encoded(case)
    arrays = case.arrays
    close(to_nchw(z), arrays["encoder_out"])
    close(to_nchw(entries), arrays["quant"])
    equal_where_clear(tokens, arrays["indices"], arrays["index_margin"])
    close((1 + COMMITMENT) * jnp.mean(jnp.square(entries - z)), arrays["vq_loss"])


@VQGAN
def test_vqgan_tokens_of_images(case):
    module, params = load(case)
    arrays = case.arrays
    with jax.default_matmul_precision("highest"):
        found = jax.jit(functools.partial(vqgan.encode, module))(params, images(case, "pixels_u8"))
    equal_where_clear(found, arrays["indices"].reshape(found.shape), arrays["index_margin"].reshape(found.shape))


@VQGAN
def test_vqgan_decoder(case):
    """Stored images are not cut to [0, 1], those of the door are, which takes square ones."""
    module, params = load(case)
    for tokens, image in (("indices", "recon"), ("rand_indices", "rand_decoded")):
        tokens, stored = case.arrays[tokens], case.arrays[image]
        with jax.default_matmul_precision("highest"):
            raw = jax.jit(lambda p, tokens: module.apply({"params": p}, tokens, method="decode"))(params, tokens)
        close(to_nchw(raw), stored, image)
        if tokens.shape[1] == tokens.shape[2]:
            cut = jax.jit(functools.partial(vqgan.decode, module))(params, tokens.reshape(len(tokens), -1))
            np.testing.assert_array_equal(cut, np.clip(raw, 0, 1), err_msg=image)
