"""Scaled dot-product attention."""

import jax
import jax.numpy as jnp
from einops import rearrange

from diffjax.errors import UserError
from diffjax.parallel.mesh import platform

IMPLEMENTATIONS = ("xla", "cudnn")


def attention(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    *,
    bias: jax.Array | None = None,
    scale: float | None = None,
    causal: bool = False,
    implementation: str = "xla",
) -> jax.Array:
    """softmax(scale q k^T + bias) v (Vaswani et al., arXiv 1706.03762, eq. 1).

    Args:
        q: [b, n, heads, k]. k, v: [b, m, heads, k], same dtype.
        bias: [heads, n, m], the same for all examples; has a gradient.
        scale: of the logits; None: 1 / sqrt(width).
        causal: query i sees keys 0 .. i alone.
        implementation: "xla" (any backend; logits and softmax in float32) or "cudnn" (fused, CUDA, 16-bit types, to
            which it rounds the bias and its gradient).

    Returns:
        [b, n, heads, k] in the dtype of v.

    Raises:
        UserError: unknown implementation; a bias for an odd number of tokens, which cudnn has no gradient of.
    """
    if implementation not in IMPLEMENTATIONS:
        raise UserError(f"attention implementation {implementation!r} is unknown; valid: {', '.join(IMPLEMENTATIONS)}")
    if implementation == "cudnn":
        return _cudnn(q, k, v, bias, scale, causal)
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    # Heads go in front of tokens once: a CPU else takes the products apart, 36 / 78 against 7 / 57 ms (forward / with
    # gradients) at q, k, v [32, 256, 4, 24] on two cores. A TPU's compiler makes the same program of both.
    q, k, v = (rearrange(x, "b n heads k -> b heads n k") for x in (q * scale, k, v))
    seen = jnp.arange(k.shape[2]) <= jnp.arange(q.shape[2])[:, None] if causal else None
    return rearrange(_attend(q, k, v, bias, seen), "b heads n k -> b n heads k")


def cached_attention(q: jax.Array, keys: jax.Array, values: jax.Array, first: jax.Array) -> jax.Array:
    """Causal attention to keys and values that are kept from before.

    Args:
        q: [b, n, heads, k], of the positions first .. first + n - 1 of a sequence.
        keys, values: [b, heads, m, k]; position first + i sees the positions 0 .. first + i, and what is kept after
            them is not looked at.
        first: int32 scalar.

    Returns:
        [b, n, heads, k] in the dtype of `values`.
    """
    q = rearrange(q * q.shape[-1] ** -0.5, "b n heads k -> b heads n k")
    seen = jnp.arange(keys.shape[2]) <= first + jnp.arange(q.shape[2])[:, None]
    return rearrange(_attend(q, keys, values, None, seen), "b heads n k -> b n heads k")


def _attend(q: jax.Array, k: jax.Array, v: jax.Array, bias: jax.Array | None, seen: jax.Array | None) -> jax.Array:
    """softmax(q k^T + bias) v with heads in front: q [b, heads, n, k], k and v [b, heads, m, k], seen [n, m]."""
    logits = jnp.einsum("bhnk,bhmk->bhnm", q, k, preferred_element_type=jnp.float32)
    if bias is not None:
        logits = logits + bias.astype(jnp.float32)
    if seen is not None:
        logits = jnp.where(seen, logits, -jnp.inf)
    # The division of softmax waits until after the weighted sum, which is smaller than the weights.
    weights = jnp.exp(logits - jax.lax.stop_gradient(jnp.max(logits, axis=-1, keepdims=True)))
    total = jnp.sum(weights, axis=-1, keepdims=True)
    values = jnp.einsum("bhnm,bhmk->bhnk", weights.astype(v.dtype), v, preferred_element_type=jnp.float32)
    return (values / total).astype(v.dtype)


def _cudnn(
    q: jax.Array, k: jax.Array, v: jax.Array, bias: jax.Array | None, scale: float | None, causal: bool
) -> jax.Array:
    if platform() != "gpu" or q.dtype.itemsize != 2:
        raise UserError(
            f"attention 'cudnn' is for 16-bit types on a CUDA GPU, and this is {q.dtype} on a {platform()}; use 'xla', "
            "or model.dtype='bfloat16' on a GPU"
        )
    if bias is not None:
        if bias.shape[1] % 2 or bias.shape[2] % 2:
            raise UserError(
                f"attention 'cudnn' with a bias needs even numbers of tokens, not {bias.shape[1]} and {bias.shape[2]}; "
                "use 'xla'"
            )
        bias = bias[None].astype(q.dtype)
    return jax.nn.dot_product_attention(q, k, v, bias, scale=scale, is_causal=causal, implementation="cudnn")
