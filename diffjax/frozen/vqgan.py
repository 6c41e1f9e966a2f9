"""The VQGAN of MaskGIT (arXiv 2202.04200), in MAGE's conversion: images to 16 x 16 tokens of DiGIT's stage 2 and back.

    z = encoder(image),  token = argmin_k |z - c_k|^2 at each of h/16 x w/16 positions,  image = decoder(c_code)

Both halves are residual blocks at five resolutions, without attention, and images lie in [0, 1] on either side:

    h = conv(silu(GN(conv(silu(GN(x))))));  out = x + h, where the channels change h + W h
"""

import math
from collections.abc import Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from einops import rearrange

from diffjax.errors import UserError
from diffjax.frozen.layers import check_sizes, conv, norm_silu, twice
from diffjax.ops.dtypes import DTYPES
from diffjax.parallel.rules import constrain

GROUPS = 32


def encode(module: "VQGAN", params: Mapping[str, Any], images: jax.Array) -> jax.Array:
    """The tokens of images, row by row: int32 [b, h/f * w/f], f = 16.

    Args:
        images: float [b, h, w, 3], RGB in [0, 1], sides divisible by f.
    """
    if images.ndim != 4 or images.shape[-1] != 3 or not jnp.issubdtype(images.dtype, jnp.floating):
        raise UserError(
            f"VQGAN: images are {images.dtype} {images.shape}; valid: floats in [0, 1] of shape [b, h, w, 3]"
        )

    def tokens(module: VQGAN, images: jax.Array) -> jax.Array:
        return module.quantise(module.encode(images))

    return rearrange(nn.apply(tokens, module)({"params": params}, images), "b h w -> b (h w)")


def decode(module: "VQGAN", params: Mapping[str, Any], tokens: jax.Array) -> jax.Array:
    """Images in [0, 1], float32 [b, f * g, f * g, 3], of tokens [b, g * g], row by row.

    What lies outside [0, 1] is cut off; the published images are 255 times this, *truncated* to uint8. A token that is
    none makes its image NaN.
    """
    side = math.isqrt(tokens.shape[1]) if tokens.ndim == 2 else 0
    if not side or side**2 != tokens.shape[1] or not jnp.issubdtype(tokens.dtype, jnp.integer):
        raise UserError(f"VQGAN: tokens are {tokens.dtype} {tokens.shape}; valid: integers [b, n], n a square")
    grid = rearrange(tokens, "b (h w) -> b h w", h=side)
    images: Any = module.apply({"params": params}, grid, method="decode")
    return jnp.clip(images, 0, 1)


class ResBlock(nn.Module):
    """[b, h, w, c] -> [b, h, w, features]; the shortcut is a map of the result, not of x, as in the published net."""

    features: int
    dtype: Any

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        x = constrain(x, "batch")
        h = conv(self.features, 3, False, self.dtype, "conv1")(norm_silu(x, GROUPS, self.dtype, "norm1"))
        h = conv(self.features, 3, False, self.dtype, "conv2")(norm_silu(h, GROUPS, self.dtype, "norm2"))
        if x.shape[-1] != self.features:
            x = conv(self.features, 1, False, self.dtype, "shortcut")(h)
        return x + h


class Encoder(nn.Module):
    """Images [b, h, w, 3] -> [b, h/f, w/f, features]; widths are those of the levels, from the largest map down."""

    width: int
    widths: tuple[int, ...]
    depth: int
    features: int
    dtype: Any

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        x = conv(self.width, 3, False, self.dtype, "conv_in")(x)
        for level, width in enumerate(self.widths):
            for block in range(self.depth):
                x = ResBlock(width, self.dtype, name=f"level_{level}_block_{block}")(x)
            if level < len(self.widths) - 1:
                x = nn.avg_pool(x, (2, 2), strides=(2, 2))
        for block in (1, 2):
            x = ResBlock(x.shape[-1], self.dtype, name=f"middle_{block}")(x)
        return conv(self.features, 1, True, self.dtype, "conv_out")(norm_silu(x, GROUPS, self.dtype, "norm_out"))


class Decoder(nn.Module):
    """The way back: [b, h/f, w/f, c] -> images [b, h, w, 3]."""

    widths: tuple[int, ...]
    depth: int
    dtype: Any

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        x = conv(self.widths[-1], 3, True, self.dtype, "conv_in")(x)
        for block in (1, 2):
            x = ResBlock(x.shape[-1], self.dtype, name=f"middle_{block}")(x)
        for level in reversed(range(len(self.widths))):
            for block in range(self.depth):
                x = ResBlock(self.widths[level], self.dtype, name=f"level_{level}_block_{block}")(x)
            if level:
                x = conv(self.widths[level], 3, True, self.dtype, f"level_{level}_up")(twice(x))
        return conv(3, 3, True, self.dtype, "conv_out")(norm_silu(x, GROUPS, self.dtype, "norm_out"))


class VQGAN(nn.Module):
    """The network; see the module docstring. The defaults are the published sizes.

    Attributes:
        vocabulary: entries of the codebook. features: width of an entry.
        width: channels after the first convolution. multipliers: those of the levels, as multiples of that.
        depth: residual blocks of a level, in either half.
        dtype: compute dtype, "float32" or "bfloat16"; norm statistics and distances stay float32.
    """

    vocabulary: int = 1024
    features: int = 256
    width: int = 128
    multipliers: tuple[int, ...] = (1, 1, 2, 2, 4)
    depth: int = 2
    dtype: str = "float32"

    def validate(self) -> None:
        """Raise UserError for sizes that exclude each other, before anything is traced."""
        check_sizes(self, "vocabulary", "features", "width", "depth")
        if not self.multipliers or min(self.multipliers) < 1 or self.width % GROUPS:
            raise UserError(
                f"VQGAN: width = {self.width}, multipliers = {tuple(self.multipliers)}; valid: multiples of {GROUPS}, "
                "and a positive integer per level"
            )

    @property
    def widths(self) -> tuple[int, ...]:
        """Channels of the levels, from the largest map to the smallest."""
        return tuple(self.width * multiplier for multiplier in self.multipliers)

    def setup(self) -> None:
        dtype = DTYPES[self.dtype]
        self.encoder = Encoder(self.width, self.widths, self.depth, self.features, dtype)
        self.decoder = Decoder(self.widths, self.depth, dtype)
        self.codebook = self.param("codebook", nn.initializers.normal(1.0), (self.vocabulary, self.features))

    def __call__(self, images: jax.Array) -> jax.Array:
        """Images [b, h, w, 3] reconstructed from their tokens, of the same shape, not cut to [0, 1]."""
        return self.decode(self.quantise(self.encode(images)))

    def encode(self, images: jax.Array) -> jax.Array:
        """Images [b, h, w, 3] -> z, float32 [b, h/f, w/f, features]."""
        factor = 2 ** (len(self.multipliers) - 1)
        if images.shape[1] % factor or images.shape[2] % factor:
            raise UserError(
                f"VQGAN: images of {images.shape[1]} x {images.shape[2]} pixels; valid: sides divisible by {factor}"
            )
        return self.encoder(images).astype(jnp.float32)

    def quantise(self, z: jax.Array) -> jax.Array:
        """The nearest entry of the codebook, the first of equally near ones: int32 [b, h, w] for z [b, h, w, d]."""
        products = jnp.einsum("bhwd,kd->bhwk", z, self.codebook, precision=jax.lax.Precision.HIGHEST)
        return jnp.argmin(jnp.sum(jnp.square(self.codebook), axis=1) - 2 * products, axis=-1).astype(jnp.int32)

    def lookup(self, tokens: jax.Array) -> jax.Array:
        """Codebook entries of tokens [b, h, w], float32 [b, h, w, features]; NaN for tokens out of range."""
        return jnp.asarray(self.codebook).at[tokens].get(mode="fill", fill_value=jnp.nan, wrap_negative_indices=False)

    def decode(self, tokens: jax.Array) -> jax.Array:
        """Tokens [b, h, w] -> images float32 [b, f h, f w, 3], not cut to [0, 1]."""
        return self.decoder(self.lookup(tokens)).astype(jnp.float32)
