"""Scaled dot-product attention."""

import jax
import jax.numpy as jnp
from einops import rearrange

from diffjax.errors import UserError

IMPLEMENTATIONS = ("xla", "cudnn")


def attention(
    q: jax.Array, k: jax.Array, v: jax.Array, *, scale: float | None = None, implementation: str = "xla"
) -> jax.Array:
    """softmax(scale q k^T) v, bidirectional (Vaswani et al., arXiv 1706.03762, eq. 1).

    Args:
        q: [b, n, heads, k]. k, v: [b, m, heads, k], same dtype.
        scale: of the logits; None: 1 / sqrt(width).
        implementation: "xla" (any backend; logits and softmax in float32) or "cudnn" (fused, CUDA, 16-bit types).

    Returns:
        [b, n, heads, k] in the dtype of v.
    """
    if implementation not in IMPLEMENTATIONS:
        raise UserError(f"attention implementation {implementation!r} is unknown; valid: {', '.join(IMPLEMENTATIONS)}")
    if implementation == "cudnn":
        return jax.nn.dot_product_attention(q, k, v, scale=scale, implementation="cudnn")
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    logits = jnp.einsum("bnhk,bmhk->bhnm", q * scale, k, preferred_element_type=jnp.float32)
    # The division of softmax waits until after the weighted sum, which is smaller than the weights.
    weights = jnp.exp(logits - jax.lax.stop_gradient(jnp.max(logits, axis=-1, keepdims=True)))
    total = rearrange(jnp.sum(weights, axis=-1), "b heads n -> b n heads 1")
    values = jnp.einsum("bhnm,bmhk->bnhk", weights.astype(v.dtype), v, preferred_element_type=jnp.float32)
    return (values / total).astype(v.dtype)
