import jax
import jax.numpy as jnp
import numpy as np
import pytest

from diffjax.errors import UserError
from diffjax.ops import attention as ops_attention
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


def test_a_bias_and_its_gradient_match_the_formula_in_float64():
    """The gradient of the bias is the sum over the batch of those of the logits, w (dw - sum w dw)."""
    q, k, v, g = (np.random.default_rng(i).normal(size=(2, n, 3, 8)) for i, n in enumerate((5, 7, 7, 5)))
    bias = np.random.default_rng(4).normal(size=(3, 5, 7))
    logits = np.einsum("bnhk,bmhk->bhnm", q, k) / np.sqrt(8) + bias
    weights = np.exp(logits) / np.exp(logits).sum(-1, keepdims=True)
    back = np.einsum("bnhk,bmhk->bhnm", g, v)
    expected = (weights * (back - (weights * back).sum(-1, keepdims=True))).sum(0)
    q, k, v, g, bias = (jnp.asarray(a, jnp.float32) for a in (q, k, v, g, bias))
    with jax.default_matmul_precision("highest"):
        out, pull = jax.vjp(lambda bias: attention(q, k, v, bias=bias), bias)
        (grad,) = pull(g)
    np.testing.assert_allclose(out, np.einsum("bhnm,bmhk->bnhk", weights, v), atol=2e-6)
    np.testing.assert_allclose(grad, expected, atol=5e-6)


def test_cudnn_gets_the_bias_in_the_type_of_the_queries(monkeypatch):
    """What cuDNN makes of it needs a GPU; here, that it is handed over as jax wants it."""
    seen = {}

    def record(q, k, v, bias, **options):
        seen.update(options, bias=bias)
        return q

    monkeypatch.setattr(jax.nn, "dot_product_attention", record)
    monkeypatch.setattr(ops_attention, "platform", lambda: "gpu")
    x, bias = jnp.zeros((1, 2, 3, 8), jnp.bfloat16), jnp.ones((3, 2, 2))
    attention(x, x, x, bias=bias, implementation="cudnn")
    assert seen["bias"].shape == (1, 3, 2, 2)
    assert (seen["bias"].dtype, seen["implementation"]) == (jnp.bfloat16, "cudnn")
    attention(x, x, x, implementation="cudnn")
    assert seen["bias"] is None
    with pytest.raises(UserError, match="needs even numbers of tokens, not 3 and 3; use 'xla'"):
        attention(x, x, x, bias=jnp.ones((3, 3, 3)), implementation="cudnn")


@pytest.mark.parametrize("dtype, platform", [(jnp.bfloat16, "cpu"), (jnp.float32, "gpu")])
def test_cudnn_is_refused_where_it_is_not(monkeypatch, dtype, platform):
    monkeypatch.setattr(ops_attention, "platform", lambda: platform)
    x = jnp.zeros((1, 2, 3, 8), dtype)
    with pytest.raises(UserError, match=f"this is {jnp.dtype(dtype)} on a {platform}; use 'xla'"):
        attention(x, x, x, implementation="cudnn")


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
