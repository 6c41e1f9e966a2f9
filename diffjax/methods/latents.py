"""Latents of images by an autoencoder, and pictures of latents."""

import logging
import math
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from einops import rearrange
from jax.tree_util import Partial

from diffjax.contracts import AutoencoderOptions
from diffjax.data.latents import MANIFEST, Scaling, read_manifest
from diffjax.data.source import Source
from diffjax.errors import UserError
from diffjax.parallel.mesh import BATCH_AXES
from diffjax.weights import autoencoders

AT_ONCE = 2**19  # pixels that a device decodes at a time: two images of 512 pixels


@dataclass(frozen=True)
class Encoding:
    """The settings of `encode`: images, autoencoder, and what latents a config expects.

    Attributes:
        size, channels, scaling, num_classes: of the latents.
        mirrored: whether the encoding of the mirrored image is stored, too.
        threads: that read images.
    """

    images: Source
    autoencoder: AutoencoderOptions
    size: int
    channels: int
    scaling: Scaling
    num_classes: int
    mirrored: bool
    threads: int


def load_decoder(asked: AutoencoderOptions, data_folder: str, channels: int, scaling: Scaling) -> Partial:
    """Latents float32 [b, h, w, channels], as models train on them -> images float32 [b, f h, f w, c] in [-1, 1].

    Args:
        data_folder: of the latents that the model was trained on; if it is there, its manifest has to have `scaling`.

    Raises:
        UserError: the autoencoder is one of other latents.
    """
    module, params, _ = autoencoders.read(asked)
    named = f"autoencoder.weights = {asked.weights!r}"
    if module.latent_channels != channels:
        raise UserError(f"{named} is for latents of {module.latent_channels} channels, not {channels}")
    scaling.check(channels)
    check_scaling(module, scaling, named)
    if (Path(data_folder) / MANIFEST).is_file():
        manifest = read_manifest(Path(data_folder))
        scaling.check_manifest(Path(data_folder), manifest)
        check_encoder(module, params, manifest, named, data_folder)
    if hasattr(module, "scale"):  # by its own statistics or by those of the data
        module = module.clone(scale=scaling.scale, shift=scaling.shift)
    return Partial(partial(decode, module, scaling.input_range, asked.tile), jax.tree.map(jnp.asarray, params))


def check_encoder(module: Any, params: Any, manifest: Mapping[str, Any], named: str, folder: str) -> None:
    """UserError for an autoencoder that encodes otherwise than the one that made latents; a line where it may be so.

    sd-vae-ft-ema and -mse have one encoder and two decoders. A tiny autoencoder decodes the latents of the large one.
    """
    stored = manifest["encoder_sha256"]
    if stored and stored == autoencoders.encoder_sha256(params):
        return
    if stored and manifest["autoencoder"].startswith(f"{type(module).__name__}("):
        raise UserError(
            f"{named} has another encoder than the autoencoder that made the latents in {folder}: it decodes others"
        )
    if stored or manifest.get("weights_sha256"):
        logging.getLogger("diffjax").info(
            f"nothing says that {named} decodes the latents in {folder}, which another file of weights made"
        )


def check_scaling(module: Any, scaling: Scaling, name: str) -> None:
    """UserError for an autoencoder whose latents are scaled otherwise than the config says.

    Statistics per channel are those of a data set, whatever the autoencoder's own are; one without any has latents that
    are those of models already, so that nothing can be shifted.
    """
    if not hasattr(module, "scale"):
        if scaling.per_channel or scaling.shift:
            raise UserError(
                f"{name} decodes latents as they are, and data.scale = {scaling.scale}, data.shift = {scaling.shift}; "
                "valid: one number, and 0"
            )
    elif not scaling.per_channel:
        for what, own, given in (("scale", module.scale, scaling.scale), ("shift", module.shift, scaling.shift)):
            if not np.allclose(own, given, rtol=1e-9, atol=0):
                raise UserError(f"{name} {what}s latents by {own}, and data.{what} = {given}")


def decode(module: Any, input_range: tuple[float, ...], tile: int, params: Any, latents: jax.Array) -> jax.Array:
    """Images in [-1, 1] of latents, in memory for a few at a time; every device decodes its own part of the batch.

    Args:
        input_range: of the pixels that the autoencoder was given, and gives back.
        tile: images of more than tile x tile pixels are decoded one by one, in strips of no more; 0: none are.
    """
    mesh = jax.sharding.get_abstract_mesh()
    devices = 1 if mesh.empty else math.prod(mesh.shape[axis] for axis in BATCH_AXES)
    own = len(latents) // devices if len(latents) % devices == 0 else len(latents)
    pixels = latents.shape[1] * latents.shape[2] * module.factor**2
    middle, half = sum(input_range) / 2, (input_range[1] - input_range[0]) / 2
    rows = latents.shape[1]
    strips = min(n for n in range(1, rows + 1) if rows % n == 0 and (n == rows or not tile or pixels <= n * tile**2))
    at_once = AT_ONCE if strips == 1 else pixels
    together = max(n for n in range(1, own + 1) if own % n == 0 and (n == 1 or n * pixels <= at_once))

    def images(latents: jax.Array) -> jax.Array:
        with jax.default_matmul_precision("highest"):
            made = module.apply({"params": params}, module.from_latent(latents), strips, method="decode")
            return (made - middle) / half

    # Rows of one device lie together, so that each step takes `together` of every device's own.
    steps = jax.lax.map(images, rearrange(latents, "(b steps) ... -> steps b ...", steps=own // together))
    return rearrange(steps, "steps b ... -> (b steps) ...")
