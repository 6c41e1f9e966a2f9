"""Cubic interpolation: PyTorch's numbers, its borders, and places that the scale alone decides."""

import jax.numpy as jnp
import numpy as np

from diffjax.ops.resize import cubic_matrix, resize


def test_taps_and_borders():
    """Half way between samples, where the taps are -3/32 and 19/32; the end samples repeat."""
    rows = np.array([[16, 19, -3, 0, 0, 0], [0, -3, 19, 19, -3, 0], [0, 0, 0, -3, 19, 16]]) / 32
    np.testing.assert_array_equal(cubic_matrix(6, 3, 0.5), rows.astype(np.float32))


def test_of_size_one_and_of_the_same_size():
    np.testing.assert_array_equal(cubic_matrix(5, 5, 1.0), np.eye(5))
    np.testing.assert_allclose(cubic_matrix(1, 3, 2.7), np.ones((3, 1)), atol=1e-6)


def test_the_scale_sets_the_places_whatever_the_size():
    np.testing.assert_array_equal(cubic_matrix(37, 12, 16.1 / 37), cubic_matrix(37, 16, 16.1 / 37)[:12])
    assert np.abs(cubic_matrix(37, 16, 16.1 / 37) - cubic_matrix(37, 16, 16 / 37)).max() > 0.01
    np.testing.assert_allclose(cubic_matrix(37, 16, 16.1 / 37).sum(axis=1), 1, atol=1e-6)


def test_resize_works_on_rows_and_columns():
    x = np.random.default_rng(0).standard_normal((2, 8, 6, 3), np.float32)
    rows, columns = cubic_matrix(8, 4, 0.5), cubic_matrix(6, 9, 1.5)
    found = resize(jnp.asarray(x), rows, columns)
    assert found.shape == (2, 4, 9, 3)
    assert found.dtype == jnp.float32
    np.testing.assert_allclose(found[1, :, :, 2], rows @ x[1, :, :, 2] @ columns.T, atol=1e-5)
