import jax
import jax.numpy as jnp
import numpy as np
import pytest

from diffjax.errors import UserError
from diffjax.ops.attention import attention
from diffjax.ops.macs import count_macs


def test_matches_the_formula_in_float64():
    q, k, v = (np.random.default_rng(i).normal(size=(2, n, 3, 8)) for i, n in enumerate((5, 7, 7)))
    logits = np.einsum("bnhk,bmhk->bhnm", q, k) / np.sqrt(8)
    weights = np.exp(logits) / np.exp(logits).sum(-1, keepdims=True)
    expected = np.einsum("bhnm,bmhk->bnhk", weights, v)
    with jax.default_matmul_precision("highest"):
        actual = attention(*(jnp.asarray(a, jnp.float32) for a in (q, k, v)))
    np.testing.assert_allclose(actual, expected, atol=2e-6)


def test_softmax_is_float32_for_bfloat16_inputs():
    q = jnp.full((1, 300, 1, 4), 3.0, jnp.bfloat16)
    out = attention(q, q, jnp.ones_like(q))
    assert out.dtype == jnp.bfloat16
    np.testing.assert_allclose(out.astype(jnp.float32), 1.0, rtol=1e-2)


def test_unknown_implementation_is_an_error():
    x = jnp.zeros((1, 2, 1, 4))
    with pytest.raises(UserError, match="valid: xla, cudnn"):
        attention(x, x, x, implementation="flash")


def test_macs_of_products_convolutions_and_scans():
    a, b = jnp.zeros((3, 5)), jnp.zeros((5, 7))
    assert count_macs(jnp.dot, a, b) == 3 * 5 * 7
    image, kernel = jnp.zeros((1, 8, 8, 4)), jnp.zeros((3, 3, 2, 6))  # two groups of 2 -> 3 channels

    def convolve(x, w):
        dimensions = ("NHWC", "HWIO", "NHWC")
        return jax.lax.conv_general_dilated(x, w, (1, 1), "SAME", dimension_numbers=dimensions, feature_group_count=2)

    assert count_macs(convolve, image, kernel) == 8 * 8 * 6 * 9 * 2

    def ten_times(x, w):
        return jax.lax.scan(lambda c, _: (jax.checkpoint(jnp.dot)(c, w), None), x, length=10)[0]

    assert count_macs(jax.jit(ten_times), jnp.zeros((3, 5)), jnp.zeros((5, 5))) == 10 * 3 * 5 * 5


def test_a_loop_of_unknown_length_cannot_be_counted():
    with pytest.raises(ValueError, match="trip count"):
        count_macs(lambda x: jax.lax.while_loop(lambda c: c[0, 0] < 1, lambda c: c @ c, x), jnp.zeros((2, 2)))
