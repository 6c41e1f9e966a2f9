"""Encoders from images to features and decoders from tokens to images: pixel patches, or frozen networks.

Images are float32 [b, h, w, c] in [-1, 1] throughout.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.tree_util import Partial

from diffjax.data import tokens as records
from diffjax.data.source import Source
from diffjax.errors import UserError
from diffjax.frozen import dinov2, vqgan
from diffjax.tokens import pixels
from diffjax.weights import store


class Preparation(NamedTuple):
    """The settings of the encoder that makes the tokens, and of its input images."""

    encoder: str
    grid: int
    image_size: int
    image_crop: str | None  # None: sources whose images have one size
    patch: int
    layer: int
    weights: str
    decoder: str

    def stated(self) -> dict[str, Any]:
        """The identity of the encoder but for its weights."""
        options = {"pixels": {"patch": self.patch}, "dinov2": {"layer": self.layer}}.get(self.encoder, {})
        return {"name": self.encoder, **self.images(), **options}

    def images(self) -> dict[str, Any]:
        return {"image_size": self.image_size, "image_crop": self.image_crop}


@dataclass(frozen=True)
class Tokenization:
    """The settings of `tokenize`: images, encoder and codebook.

    Attributes:
        counts: sizes of the vocabularies by leaf: `vocabulary` of the features and `decoder_vocabulary` of a decoder.
        fit_images, iterations, init, seed: of the k-means that fits the codebook; see section `tokens`.
    """

    images: Source
    made: Preparation
    counts: Mapping[str, int]
    mirrored: bool
    fit_images: int
    iterations: int
    init: str
    seed: int


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


def load_encoder(made: Preparation) -> Encoder:
    """The encoder that a config names. UserError when it cannot be."""
    if made.encoder not in ENCODERS:
        raise UserError(f"data.encoder={made.encoder!r} is unknown; valid: {', '.join(ENCODERS)}")
    return ENCODERS[made.encoder](made)


def check_made_as_stated(folder: Path, made: Preparation) -> None:
    """Raise UserError unless the tokens in a folder were made of images as the config says."""
    found = records.read_manifest(folder)["streams"][0]["encoder"]
    differing = {name: value for name, value in made.stated().items() if found.get(name) != value}
    if wrong := [f"{name} = {found.get(name)}, not {value}" for name, value in differing.items()]:
        raise UserError(f"the tokens in {folder} were made with {'; '.join(wrong)}, as the config says")


def _pixels(made: Preparation) -> Encoder:
    patch = made.patch
    _check_size(made, patch * made.grid, f"tokens.patch = {patch} times data.size = {made.grid}")
    return Encoder(Partial(partial(pixels.encode, patch=patch)), made.stated())


def _dinov2(made: Preparation) -> Encoder:
    module, params, sha256 = _weights(made.weights, "tokens.weights", dinov2.DINOv2, "dinov2")
    layer = made.layer
    grid = dinov2.SIDE // module.patch
    if made.image_size not in (dinov2.SIDE, dinov2.LARGER_SIDE) or made.grid != grid:
        raise UserError(
            f"images.size = {made.image_size}, data.size = {made.grid}: dinov2 makes {grid} x {grid} "
            f"features of {dinov2.SIDE} or {dinov2.LARGER_SIDE} pixels"
        )
    module, params = dinov2.cut(module, params, layer)  # without the blocks whose results nobody sees
    identity = made.stated() | {"weights_sha256": sha256}
    return Encoder(Partial(partial(_dinov2_features, module), params), identity)


def _dinov2_features(module: Any, params: Any, images: jax.Array) -> jax.Array:
    with jax.default_matmul_precision("highest"):  # else an accelerator makes other tokens
        return dinov2.features(module, params, (images + 1) / 2, layer=1)


def _vqgan(made: Preparation) -> Encoder:
    return load_vqgan(made, made.weights, "tokens.weights")


def load_vqgan(made: Preparation, folder: str, leaf: str) -> Encoder:
    """VQGAN's encoder and codebook, of weights that `convert` wrote."""
    module, params, sha256 = _weights(folder, leaf, vqgan.VQGAN, "vqgan")
    factor = 2 ** (len(module.multipliers) - 1)
    _check_size(made, factor * made.grid, f"{factor} times data.size = {made.grid}")
    identity = {"name": "vqgan", **made.images(), "weights_sha256": sha256}
    return Encoder(Partial(partial(_vqgan_features, module), params), identity, np.asarray(params["codebook"]))


def _vqgan_features(module: Any, params: Any, images: jax.Array) -> jax.Array:
    with jax.default_matmul_precision("highest"):
        z = module.apply({"params": params}, (images + 1) / 2, method="encode")
    return z.reshape(len(z), -1, z.shape[-1])


def load_vqgan_decoder(folder: str, leaf: str) -> tuple[Partial, str]:
    """(tokens int32 [b, n] -> images, the sha256 of the weights) of VQGAN."""
    module, params, sha256 = _weights(folder, leaf, vqgan.VQGAN, "vqgan")
    return Partial(partial(_vqgan_images, module), params), sha256


def _vqgan_images(module: Any, params: Any, tokens: jax.Array) -> jax.Array:
    return 2 * vqgan.decode(module, params, tokens) - 1


ENCODERS: dict[str, Callable[[Preparation], Encoder]] = {"pixels": _pixels, "dinov2": _dinov2, "vqgan": _vqgan}


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


def _check_size(made: Preparation, size: int, reason: str) -> None:
    if made.image_size != size:
        raise UserError(f"images.size = {made.image_size} is not {reason}")
