"""Patches of pixels as features: the encoder that needs no weights, and its inverse."""

from dataclasses import dataclass

import jax
from einops import rearrange


def encode(images: jax.Array, patch: int) -> jax.Array:
    """Images [b, h, w, c] -> their patches, row by row, [b, n, patch * patch * c]."""
    return rearrange(images, "b (h ph) (w pw) c -> b (h w) (ph pw c)", ph=patch, pw=patch)


@dataclass(frozen=True)
class Decode:
    """Tokens int32 [b, grid * grid] -> images [b, grid * patch, grid * patch, c] of a codebook's patches [k, d]."""

    patch: int
    grid: int

    def __call__(self, codebook: jax.Array, tokens: jax.Array) -> jax.Array:
        sizes = {"h": self.grid, "ph": self.patch, "pw": self.patch}
        return rearrange(codebook[tokens], "b (h w) (ph pw c) -> b (h ph) (w pw) c", **sizes)
