"""What makes features of images, and images of codes: patches of pixels, or frozen networks with their weights.

Images are float32 [b, h, w, c] in [-1, 1] throughout.
"""

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.tree_util import Partial
from ml_collections import ConfigDict

from diffjax.errors import UserError
from diffjax.frozen import dinov2, vqgan
from diffjax.tokens import pixels
from diffjax.weights import store


class Encoder(NamedTuple):
    """Features of images, with all that they depend on.

    Attributes:
        encode: images -> features [b, n, d], n = grid * grid; a tree, to be an argument of a jitted function.
        identity: json-able.
        codebook: its own, float32 [k, d]; None: one is to be fitted.
    """

    encode: Partial
    identity: dict[str, Any]
    codebook: np.ndarray | None = None


def load_encoder(config: ConfigDict) -> Encoder:
    """The encoder of a config of codes: `data.encoder`, with its options in `tokens`. UserError when it cannot be."""
    name = config.data.encoder
    if name not in ENCODERS:
        raise UserError(f"data.encoder={name!r} is unknown; valid: {', '.join(ENCODERS)}")
    return ENCODERS[name](config)


def stated(config: ConfigDict) -> dict[str, Any]:
    """What a config says of its encoder and of the images it sees: the identity but for weights."""
    option = {"pixels": "patch", "dinov2": "layer"}.get(config.data.encoder)
    more = {option: config.tokens[option]} if option else {}
    return {"name": config.data.encoder, **_preparation(config), **more}


def _preparation(config: ConfigDict) -> dict[str, Any]:
    return {"image_size": config.images.size, "image_crop": config.images.crop}


def _pixels(config: ConfigDict) -> Encoder:
    patch = config.tokens.patch
    _check_size(config, patch * config.data.size, f"tokens.patch = {patch} times data.size = {config.data.size}")
    return Encoder(Partial(partial(pixels.encode, patch=patch)), stated(config))


def _dinov2(config: ConfigDict) -> Encoder:
    module, params, sha256 = _weights(config.tokens.weights, "tokens.weights", dinov2.DINOv2, "dinov2")
    layer = config.tokens.layer
    grid = dinov2.SIDE // module.patch
    if config.images.size not in (dinov2.SIDE, dinov2.LARGER_SIDE) or config.data.size != grid:
        raise UserError(
            f"images.size = {config.images.size}, data.size = {config.data.size}: dinov2 makes {grid} x {grid} "
            f"features of {dinov2.SIDE} or {dinov2.LARGER_SIDE} pixels"
        )
    module, params = dinov2.cut(module, params, layer)  # without the blocks whose results nobody sees
    identity = stated(config) | {"weights_sha256": sha256}
    return Encoder(Partial(partial(_dinov2_features, module), params), identity)


def _dinov2_features(module: Any, params: Any, images: jax.Array) -> jax.Array:
    with jax.default_matmul_precision("highest"):  # else an accelerator makes other codes
        return dinov2.features(module, params, (images + 1) / 2, layer=1)


def _vqgan(config: ConfigDict) -> Encoder:
    return load_vqgan(config, config.tokens.weights, "tokens.weights")


def load_vqgan(config: ConfigDict, folder: str, leaf: str) -> Encoder:
    """VQGAN's encoder and codebook, of weights that `convert` wrote."""
    module, params, sha256 = _weights(folder, leaf, vqgan.VQGAN, "vqgan")
    factor = 2 ** (len(module.multipliers) - 1)
    _check_size(config, factor * config.data.size, f"{factor} times data.size = {config.data.size}")
    identity = {"name": "vqgan", **_preparation(config), "weights_sha256": sha256}
    return Encoder(Partial(partial(_vqgan_features, module), params), identity, np.asarray(params["codebook"]))


def _vqgan_features(module: Any, params: Any, images: jax.Array) -> jax.Array:
    with jax.default_matmul_precision("highest"):
        z = module.apply({"params": params}, (images + 1) / 2, method="encode")
    return z.reshape(len(z), -1, z.shape[-1])


def load_vqgan_decoder(folder: str, leaf: str) -> tuple[Partial, str]:
    """(codes int32 [b, n] -> images, the sha256 of the weights) of VQGAN."""
    module, params, sha256 = _weights(folder, leaf, vqgan.VQGAN, "vqgan")
    return Partial(partial(_vqgan_images, module), params), sha256


def _vqgan_images(module: Any, params: Any, codes: jax.Array) -> jax.Array:
    return 2 * vqgan.decode(module, params, codes) - 1


ENCODERS: dict[str, Callable[[ConfigDict], Encoder]] = {"pixels": _pixels, "dinov2": _dinov2, "vqgan": _vqgan}


def _weights(folder: str, leaf: str, kind: type, family: str) -> tuple[Any, Any, str]:
    """(module, parameters on the device, their sha256) of a folder that `convert` wrote."""
    if not folder:
        raise UserError(
            f"{leaf} is empty; give the folder of {family}'s weights, made once by "
            f"`python -m diffjax convert --family={family} --checkpoint=FILE --out=FOLDER`"
        )
    module, params, made = store.load(Path(folder))
    if not isinstance(module, kind):
        raise UserError(f"{leaf}={folder} holds a {made['name']}, not a {family}")
    return module, jax.tree.map(jax.numpy.asarray, params), made["sha256"]


def _check_size(config: ConfigDict, size: int, reason: str) -> None:
    if config.images.size != size:
        raise UserError(f"images.size = {config.images.size} is not {reason}")
