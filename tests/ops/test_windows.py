import jax
import jax.numpy as jnp
import numpy as np
import pytest

from diffjax.ops.windows import merge, partition, relative_bias, relative_positions


@pytest.mark.parametrize("height, width, side", [(8, 16, 4), (6, 6, 6), (3, 9, 3), (4, 2, 1)])
def test_windows_are_cut_out_row_by_row_and_put_back(height, width, side):
    x = np.arange(2 * height * width * 3).reshape(2, height, width, 3)
    cut = partition(jnp.asarray(x), side)
    assert cut.shape == (2, height * width // side**2, side**2, 3)
    for number in range(cut.shape[1]):
        y, x0 = side * (number // (width // side)), side * (number % (width // side))
        np.testing.assert_array_equal(cut[:, number], x[:, y : y + side, x0 : x0 + side].reshape(2, side**2, 3))
    np.testing.assert_array_equal(merge(cut, height, width), x)


@pytest.mark.parametrize("side", [1, 2, 3, 8])
def test_relative_positions_by_their_definition(side):
    places = [(y, x) for y in range(side) for x in range(side)]
    expected = [[(yi - yj + side - 1) * (2 * side - 1) + xi - xj + side - 1 for yj, xj in places] for yi, xi in places]
    found = relative_positions(side)
    np.testing.assert_array_equal(found, expected)
    assert set(found.ravel()) == set(range((2 * side - 1) ** 2))


def test_the_bias_and_its_gradient():
    """Every entry of the table gets the sum over the pairs of tokens that use it."""
    table = jax.random.normal(jax.random.key(0), (25, 2))
    index = relative_positions(3)
    bias = relative_bias(table, 3)
    assert bias.shape == (2, 9, 9)
    np.testing.assert_array_equal(bias[1], np.asarray(table)[index, 1])
    weights = np.asarray(jax.random.normal(jax.random.key(1), (2, 9, 9)))
    grad = jax.grad(lambda t: jnp.vdot(relative_bias(t, 3), weights))(table)
    expected = np.stack([np.bincount(index.ravel(), w.ravel()) for w in weights], axis=1)
    np.testing.assert_allclose(grad, expected, rtol=1e-5, atol=1e-6)
