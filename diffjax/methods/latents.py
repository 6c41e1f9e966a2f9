"""Latents of images by an autoencoder, and pictures of latents."""

import math
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from einops import rearrange
from jax.tree_util import Partial

from diffjax.data.latents import MANIFEST, read_manifest
from diffjax.data.source import Source
from diffjax.errors import UserError
from diffjax.parallel.mesh import BATCH_AXES
from diffjax.weights import autoencoders

AT_ONCE = 2**19  # pixels that a device decodes at a time: two images of 512 pixels


@dataclass(frozen=True)
class Encoding:
    """The settings of `encode`: images, autoencoder, and what latents a config expects.

    Attributes:
        weights: of the autoencoder, see `autoencoders.read`.
        size, channels, scale, num_classes: of the latents.
        mirrored: whether the encoding of the mirrored image is stored, too.
        threads: that read images.
    """

    images: Source
    weights: str
    size: int
    channels: int
    scale: float
    num_classes: int
    mirrored: bool
    threads: int


def load_decoder(weights: str, data_folder: str, channels: int, scale: float) -> Partial:
    """Latents float32 [b, h, w, channels], as models train on them -> images float32 [b, f h, f w, c].

    Args:
        weights: a file or folder, see `autoencoders.read`.
        data_folder: of the latents that the model was trained on; if it is there, its manifest has to have `scale`.

    Raises:
        UserError: the autoencoder is one of other latents.
    """
    module, params, _ = autoencoders.read(Path(weights))
    if module.latent_channels != channels:
        raise UserError(
            f"autoencoder.weights = {weights!r} is for latents of {module.latent_channels} channels, not {channels}"
        )
    check_shift(module)
    own = getattr(module, "scale", None)
    if own is not None and not math.isclose(own, scale):
        raise UserError(f"autoencoder.weights = {weights!r} scales latents by {own}, and data.scale = {scale}")
    if (Path(data_folder) / MANIFEST).is_file() and (stored := read_manifest(Path(data_folder))["scale"]) != scale:
        raise UserError(f"data.scale = {scale}, but the latents in {data_folder} have scale = {stored}")
    return Partial(partial(decode, module), jax.tree.map(jnp.asarray, params))


def check_shift(module: Any) -> None:
    """UserError for an autoencoder whose latents are shifted, as those here are not."""
    if shift := getattr(module, "shift", 0.0):
        raise UserError(f"the autoencoder shifts its latents by {shift}, which is not supported; valid: 0")


def decode(module: Any, params: Any, latents: jax.Array) -> jax.Array:
    """Images of latents in memory for a few at a time; every device decodes its own part of the batch."""
    mesh = jax.sharding.get_abstract_mesh()
    devices = 1 if mesh.empty else math.prod(mesh.shape[axis] for axis in BATCH_AXES)
    own = len(latents) // devices if len(latents) % devices == 0 else len(latents)
    pixels = latents.shape[1] * latents.shape[2] * module.factor**2
    together = max(n for n in range(1, own + 1) if own % n == 0 and (n == 1 or n * pixels <= AT_ONCE))

    def images(latents: jax.Array) -> jax.Array:
        with jax.default_matmul_precision("highest"):
            return module.apply({"params": params}, module.from_latent(latents), method="decode")

    # Rows of one device lie together, so that each step takes `together` of every device's own.
    steps = jax.lax.map(images, rearrange(latents, "(b steps) ... -> steps b ...", steps=own // together))
    return rearrange(steps, "steps b ... -> (b steps) ...")
