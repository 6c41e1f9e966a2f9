"""Resizing of maps: bicubic without antialiasing, as two small matrices, and the bilinear rule of TensorFlow 1."""

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


def legacy_bilinear(x: jax.Array, height: int, width: int) -> jax.Array:
    """x [b, h, w, c] -> float32 [b, height, width, c] by TensorFlow 1's bilinear rule.

    (ResizeBilinear with align_corners and half_pixel_centers off.) Row i of the result lies at i h / height of the
    source, without the shift by half a pixel, and no antialiasing is done. On a CPU it equals TensorFlow's CPU kernel
    bit for bit: columns first, then rows, each a + (b - a) f in float32.
    """
    x = x.astype(jnp.float32)
    (top, bottom, down), (left, right, along) = (
        _between(*sizes) for sizes in ((x.shape[1], height), (x.shape[2], width))
    )

    def mixed(a: jax.Array, b: jax.Array, fraction: np.ndarray) -> jax.Array:
        product = (b - a) * fraction
        # The comparison is false of NaN alone, so it changes no value. It keeps compilers from fusing product and sum
        # into one operation, which does not round the product.
        return a + jnp.where(product == product, product, jnp.nan)

    rows = mixed(x[:, :, left], x[:, :, right], along[:, None])
    return mixed(rows[:, top], rows[:, bottom], down[:, None, None])


def _between(size: int, out: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Of `out` samples of a line of `size`: those before and after in the source, int [out], and float32 fractions."""
    position = np.arange(out, dtype=np.float32) * np.float32(size / out)
    before = position.astype(int)
    return before, np.minimum(before + 1, size - 1), position - before.astype(np.float32)
