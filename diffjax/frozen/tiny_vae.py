"""The tiny autoencoder of Stable Diffusion's latents (madebyollin/taesd), as `AutoencoderTiny` of the public files.

    latent = encoder((image + 1) / 2);  image = 2 decoder(3 tanh(latent / 3)) - 1

It has no posterior, and its latents are those of the diffusion model: nothing is to be scaled. Blocks are three 3 x 3
convolutions beside the identity, relu(f(x) + x).
"""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from diffjax.errors import UserError
from diffjax.frozen.layers import check_sizes, conv, enlarged
from diffjax.frozen.strips import Inside, in_strips
from diffjax.frozen.vae import LOWEST
from diffjax.ops.dtypes import DTYPES
from diffjax.parallel.rules import constrain

MAGNITUDE = 3.0  # the decoder bounds latents to it


class Block(nn.Module):
    """[b, h, w, c] -> [b, h, w, c]."""

    dtype: Any

    @nn.compact
    def __call__(self, x: jax.Array, strips: int = 1) -> jax.Array:
        x = constrain(x, "batch")
        convolutions = [conv(x.shape[-1], 3, True, self.dtype, f"conv{number}") for number in (1, 2, 3)]

        def layer(inside: Inside, *given: Any) -> jax.Array:
            *convolutions, x = given
            h = x
            for number, convolution in enumerate(convolutions):
                h = convolution(inside(nn.relu(h) if number else h))
            return nn.relu(x + h)

        return in_strips(layer, strips, 3, convolutions, x)


class Encoder(nn.Module):
    """Images [b, h, w, 3] in [0, 1] -> [b, h/f, w/f, features]; blocks: how many of a level, from the largest map."""

    width: int
    blocks: tuple[int, ...]
    features: int
    dtype: Any

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        x = conv(self.width, 3, True, self.dtype, "conv_in")(x)
        for level, blocks in enumerate(self.blocks):
            if level:
                down = nn.Conv(self.width, (3, 3), 2, 1, use_bias=False, dtype=self.dtype, name=f"level_{level}_down")
                x = down(x)
            for block in range(blocks):
                x = Block(self.dtype, name=f"level_{level}_block_{block}")(x)
        return conv(self.features, 3, True, self.dtype, "conv_out")(x)


class Decoder(nn.Module):
    """[b, h/f, w/f, c] -> images [b, h, w, channels] in [0, 1]; blocks: how many of a level, from the smallest map."""

    width: int
    blocks: tuple[int, ...]
    channels: int
    dtype: Any

    @nn.compact
    def __call__(self, x: jax.Array, strips: int = 1) -> jax.Array:
        x = nn.relu(conv(self.width, 3, True, self.dtype, "conv_in")(x))
        for level, blocks in enumerate(self.blocks):
            for block in range(blocks):
                x = Block(self.dtype, name=f"level_{level}_block_{block}")(x, strips)
            if level < len(self.blocks) - 1:
                x = enlarged(x, conv(self.width, 3, False, self.dtype, f"level_{level}_up"), strips)
        return conv(self.channels, 3, True, self.dtype, "conv_out")(x)


class TinyVAE(nn.Module):
    """The network; see the module docstring. The defaults are the published sizes.

    Attributes:
        channels: of images. latent_channels: of latents.
        width: channels inside.
        encoder_blocks, decoder_blocks: how many each level has, in the order in which it runs.
        dtype: compute dtype, "float32" or "bfloat16"; what is returned is float32.
    """

    channels: int = 3
    latent_channels: int = 4
    width: int = 64
    encoder_blocks: tuple[int, ...] = (1, 3, 3, 3)
    decoder_blocks: tuple[int, ...] = (3, 3, 3, 1)
    dtype: str = "float32"

    @property
    def factor(self) -> int:
        """How many pixels of a side become one of a latent's."""
        return 2 ** (len(self.encoder_blocks) - 1)

    def validate(self) -> None:
        """Raise UserError for sizes that exclude each other, before anything is traced."""
        check_sizes(self, "channels", "latent_channels", "width")
        blocks = self.encoder_blocks, self.decoder_blocks
        if len(blocks[0]) != len(blocks[1]) or not blocks[0] or min(map(min, blocks)) < 1:
            raise UserError(
                f"TinyVAE: encoder_blocks, decoder_blocks = {blocks[0]}, {blocks[1]}; valid: as many levels in both, "
                "of a positive number of blocks each"
            )

    def setup(self) -> None:
        dtype = DTYPES[self.dtype]
        self.encoder = Encoder(self.width, self.encoder_blocks, self.latent_channels, dtype)
        self.decoder = Decoder(self.width, self.decoder_blocks, self.channels, dtype)

    def __call__(self, images: jax.Array) -> jax.Array:
        """Images [b, h, w, c] reconstructed from their latents, of the same shape, not cut."""
        return self.decode(self.encode(images)[0])

    def encode(self, images: jax.Array) -> tuple[jax.Array, jax.Array]:
        """Latents and the smallest log-variance, float32 [b, h/f, w/f, latent channels] each, of images in [-1, 1]."""
        height, width = images.shape[1:3]
        if height % self.factor or width % self.factor:
            raise UserError(f"TinyVAE: images of {height} x {width} pixels; valid: sides divisible by {self.factor}")
        latents = self.encoder((images + 1) / 2).astype(jnp.float32)
        return latents, jnp.full_like(latents, LOWEST)

    def decode(self, z: jax.Array, strips: int = 1) -> jax.Array:
        """Latents [b, h, w, latent channels] -> images float32 [b, f h, f w, c] in about [-1, 1], not cut.

        strips: a divisor of h; into how many every map is divided on the way, see strips.py.
        """
        return 2 * self.decoder(MAGNITUDE * jnp.tanh(z / MAGNITUDE), strips).astype(jnp.float32) - 1

    def from_latent(self, latent: jax.Array) -> jax.Array:
        """Nothing is to be done, see the module docstring."""
        return latent
