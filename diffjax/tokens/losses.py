"""Losses over tokens: the next one, and the hidden ones.

    (1)  loss = (1 - s) nll - s mean_v log p_v,      nll = -log p_target           label smoothing s, over all v columns

The mean runs over the whole dictionary, its special entries included (the criterion of fairseq); computed in float32,
in nats.
"""

import jax
import jax.numpy as jnp

from diffjax.ops.vocabulary import END, SPECIALS


def next_token(logits: jax.Array, tokens: jax.Array, smoothing: float = 0.0) -> tuple[jax.Array, jax.Array]:
    """Equation (1) of the tokens and the end that follows them, for a causal model.

    Args:
        logits: [b, n + 1, SPECIALS + vocabulary], row i for token i and the last for the end.
        tokens: int32 [b, n].

    Returns:
        loss and nll, float32 [b]: means over the n + 1 predictions of each example.
    """
    end = jnp.full((tokens.shape[0], 1), END)
    loss, nll = smoothed(logits, jnp.concatenate([SPECIALS + tokens, end], axis=1), smoothing)
    return jnp.mean(loss, axis=1), jnp.mean(nll, axis=1)


def hidden_tokens(
    logits: jax.Array, tokens: jax.Array, hidden: jax.Array, smoothing: float = 0.0
) -> tuple[jax.Array, jax.Array]:
    """Equation (1) of the hidden tokens, for a masked model.

    Args:
        logits: [b, n, SPECIALS + vocabulary], row i for token i. tokens: int32 [b, n]. hidden: bool [b, n].

    Returns:
        loss and nll, float32 [b]: of each example the sum over its hidden tokens, divided by the
        batch mean of their number; so the mean over the batch is the mean over all its hidden tokens.
    """
    loss, nll = smoothed(logits, SPECIALS + tokens, smoothing)
    average = jnp.mean(jnp.sum(hidden, axis=1, dtype=jnp.float32))

    def per_example(term: jax.Array) -> jax.Array:
        return jnp.sum(jnp.where(hidden, term, 0.0), axis=1) / average

    return per_example(loss), per_example(nll)


def smoothed(logits: jax.Array, target: jax.Array, smoothing: float) -> tuple[jax.Array, jax.Array]:
    """Equation (1) and its nll at every place: logits [..., v], target int32 [...] -> float32 [...] each."""
    logits = logits.astype(jnp.float32)
    total = jax.nn.logsumexp(logits, axis=-1)
    nll = total - jnp.take_along_axis(logits, target[..., None], axis=-1)[..., 0]
    return (1 - smoothing) * nll + smoothing * (total - jnp.mean(logits, axis=-1)), nll


def hide(u: jax.Array, scores: jax.Array) -> jax.Array:
    """Which tokens to hide in training: the floor(n cos(pi u / 2) + 1) of smallest score (the schedule of MaskGIT).

    u [b] and scores [b, n] are uniform in [0, 1); returns bool [b, n], at least one per example.
    """
    n = scores.shape[1]
    count = jnp.floor(n * jnp.cos(jnp.pi / 2 * u) + 1)
    rank = jnp.argsort(jnp.argsort(scores, axis=1), axis=1)
    return rank < count[:, None]
