"""Rotary positions of images (RoPE2D)."""

import math

import jax
import jax.numpy as jnp
import numpy as np
from einops import rearrange


def rope_angles(height: int, width: int, k: int, rows: str) -> np.ndarray:
    """The rotation angles of RoPE2D for a map of tokens, float32 [height * width, k / 2].

    They alternate x f_0, y f_0, x f_1, ... with f_j = 10000^(-4 j / k). `rows` is the length of a row by which a token
    number becomes (x, y): "sqrt" = floor(sqrt(height * width)), as published, which is the true one of square maps
    only; "width" = the true one of any map.
    """
    frequencies = np.float32(10000.0) ** (-np.arange(0, k, 4, dtype=np.float32) / np.float32(k))
    number = np.arange(height * width)
    row_length = width if rows == "width" else math.isqrt(height * width)
    positions = np.stack([number % row_length, number // row_length], axis=-1).astype(np.float32)
    return rearrange(positions[:, None] * frequencies[:, None], "n k xy -> n (k xy)")


def rotate(x: jax.Array, angles: np.ndarray) -> jax.Array:
    """Rotates the pairs (x_j, x_(j + k/2)) by the angles [n, k / 2]; x [b, n, heads, k] float32.

    The references pair neighbours instead; their weights are reordered when read, since halves need no shuffling.
    """
    a, b = jnp.split(x, 2, axis=-1)
    cos, sin = np.cos(angles)[:, None], np.sin(angles)[:, None]
    return jnp.concatenate([a * cos - b * sin, a * sin + b * cos], axis=-1)
