"""Bicubic resizing without antialiasing, as two small matrices that are made on the host."""

import jax
import jax.numpy as jnp
import numpy as np

A = -0.75  # the free number of Keys' cubic (IEEE TASSP 29, 1981), here PyTorch's


def cubic_matrix(size: int, out: int, scale: float) -> np.ndarray:
    """The map from `size` samples of a line to `out` samples, float32 [out, size].

    Sample i of the result lies at (i + 0.5) / scale - 0.5 of the source, whatever `out` is, and is the cubic through
    the four samples around it; beyond the ends the end samples repeat. So does PyTorch with a given scale factor, in
    float32, whose rounding of the positions is visible: it moves pixels of deviation 1 by 5e-5.
    """
    x = (np.arange(out, dtype=np.float32) + 0.5) * (1 / scale) - 0.5
    before = np.floor(x).astype(int)
    matrix = np.zeros((out, size))
    for tap in range(-1, 3):
        index = before + tap
        np.add.at(matrix, (np.arange(out), np.clip(index, 0, size - 1)), _cubic(np.abs(x - index)))
    return matrix.astype(np.float32)


def _cubic(distance: np.ndarray) -> np.ndarray:
    """Keys' kernel at distances 0 .. 2."""
    near = ((A + 2) * distance - (A + 3)) * distance**2 + 1
    far = A * (((distance - 5) * distance + 8) * distance - 4)
    return np.where(distance <= 1, near, far)


def resize(x: jax.Array, rows: np.ndarray, columns: np.ndarray) -> jax.Array:
    """x [..., h, w, c] with the matrices rows [i, h] and columns [j, w] -> float32 [..., i, j, c]."""
    x = x.astype(jnp.float32)
    return jnp.einsum("ih,jw,...hwc->...ijc", rows, columns, x, precision=jax.lax.Precision.HIGHEST)
