"""Tokens from logits: one after the other, and all at once in a few rounds.

Nothing here knows a network: `generate` takes one step of it (with a cache of what it has seen), `fill` a prediction of
all positions. Both are pure functions of their keys, one per example, so that an example does not depend on its batch,
and the numbers in `Choice` are arguments of the compiled program.
"""

import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from diffjax import rng
from diffjax.errors import UserError
from diffjax.ops.vocabulary import END, NO_TOKEN, SPECIALS

Step = Callable[[Any, jax.Array], tuple[jax.Array, Any]]
Predict = Callable[[jax.Array], jax.Array]


class Choice(NamedTuple):
    """How a token is drawn from logits; make it with `choice`, which checks.

    Attributes:
        temperature: the logits are divided by it; 0: the most probable token, without a draw.
        top_k: only that many most probable tokens; 0: all.
        top_p: only the most probable tokens up to the one with which their probabilities reach it; 1: all.
        guidance: weight of classifier-free guidance; 1: none.
    """

    temperature: jax.Array
    top_k: jax.Array
    top_p: jax.Array
    guidance: jax.Array


def choice(
    vocabulary: int, *, temperature: float = 1.0, top_k: int = 0, top_p: float = 1.0, guidance: float = 1.0
) -> Choice:
    """A checked `Choice` for a vocabulary of that size. Raises UserError."""
    if not 0 <= temperature < math.inf:
        raise UserError(f"temperature = {temperature}; valid: 0 (the most probable token) or more")
    if not isinstance(top_k, int) or not 0 <= top_k <= vocabulary:
        raise UserError(f"top_k = {top_k}; valid: 0 (all) to the size of the vocabulary, {vocabulary}")
    if not 0 < top_p <= 1:
        raise UserError(f"top_p = {top_p}; valid: above 0, to 1 (all)")
    if not math.isfinite(guidance):
        raise UserError(f"guidance = {guidance}; valid: a number, 1 for none")
    return Choice(jnp.float32(temperature), jnp.int32(top_k), jnp.float32(top_p), jnp.float32(guidance))


def generate(
    step: Step,
    logits: jax.Array,
    cache: Any,
    keys: jax.Array,
    length: int,
    how: Choice,
    *,
    end_from: int | None = None,
) -> jax.Array:
    """Draw `length` tokens one after the other.

    Args:
        step: (cache, tokens int32 [b]) -> (logits of the next token, cache), of static shapes.
        logits: [b, SPECIALS + vocabulary] of the first token. For guidance [2 b, ...]: an example's row, then its row
            without a label; `step` then gets every token twice.
        cache: any tree, handed through, with room for `length` tokens.
        keys: typed keys [b]; token i of an example is drawn with fold(key, i).
        end_from: the number of tokens from which a sequence may end; None: it has all `length`.

    Returns:
        int32 [b, length]; `NO_TOKEN` from where a sequence has ended.
    """
    batch = keys.shape[0]
    if logits.shape[0] not in (batch, 2 * batch):
        raise UserError(f"{logits.shape[0]} rows of logits for {batch} keys; valid: one, or with guidance two, per key")
    doubled = logits.shape[0] == 2 * batch

    def draw(i: Any, logits: jax.Array, ended: jax.Array) -> tuple[jax.Array, jax.Array]:
        if doubled:
            logits = guided(logits[0::2], logits[1::2], how.guidance)
        may_end = False if end_from is None else i >= end_from
        entry = draw_entry(log_probabilities(logits, how.temperature, may_end), rng.fold(keys, i), how)
        ended = ended | (entry == END)
        return jnp.where(ended, NO_TOKEN, entry - SPECIALS), ended

    def body(i: jax.Array, carry: Any) -> Any:
        tokens, last, ended, cache = carry
        fed = jnp.where(ended, 0, last)  # what follows an end is not looked at
        logits, cache = step(cache, jnp.repeat(fed, 2) if doubled else fed)
        last, ended = draw(i, logits, ended)
        return tokens.at[:, i].set(last), last, ended, cache

    first, ended = draw(0, logits, jnp.zeros(batch, bool))
    carry = jnp.full((batch, length), NO_TOKEN).at[:, 0].set(first), first, ended, cache
    return jax.lax.fori_loop(1, length, body, carry)[0]


def guided(conditional: jax.Array, null: jax.Array, weight: jax.Array) -> jax.Array:
    """null + weight (conditional - null), of logits (classifier-free guidance, arXiv 2207.12598 eq. 6)."""
    return null + weight * (conditional - null)


def log_probabilities(logits: jax.Array, temperature: Any = 1.0, may_end: Any = False) -> jax.Array:
    """log softmax(logits / temperature), -inf where no token is; what remains is not normalised again, as in fairseq.

    logits [b, SPECIALS + vocabulary] -> float32 of the same shape. Temperature 0 is treated as 1. may_end: whether
    `END` remains too.
    """
    logits = logits.astype(jnp.float32) / jnp.where(temperature == 0, 1.0, temperature)
    entries = jnp.arange(logits.shape[-1])
    valid = (entries >= SPECIALS) | ((entries == END) & may_end)
    return jnp.where(valid, jax.nn.log_softmax(logits, axis=-1), -jnp.inf)


def truncate(log_p: jax.Array, top_k: jax.Array, top_p: jax.Array) -> jax.Array:
    """log_p [b, v], -inf outside the most probable entries that `Choice` says; of equal ones those in front remain."""
    order = jnp.argsort(log_p, axis=-1, descending=True)
    p = jnp.exp(jnp.take_along_axis(log_p, order, axis=-1))
    before = jnp.pad(jnp.cumsum(p, axis=-1)[:, :-1], ((0, 0), (1, 0)))
    kept = ((top_k == 0) | (jnp.arange(p.shape[-1]) < top_k)) & ((top_p >= 1) | (before < top_p))
    # What is kept is the front of this order, and so all that does not come after the last of it.
    last = jnp.take_along_axis(order, jnp.sum(kept, axis=-1, keepdims=True) - 1, axis=-1)
    least, entries = jnp.take_along_axis(log_p, last, axis=-1), jnp.arange(log_p.shape[-1])
    return jnp.where((log_p > least) | ((log_p == least) & (entries <= last)), log_p, -jnp.inf)


def draw_entry(log_p: jax.Array, keys: jax.Array, how: Choice) -> jax.Array:
    """One entry per example, int32 [b], with weights exp(log_p [b, v]) as `how` truncates them."""
    # Sorting costs more than the rest: it is skipped where nothing is truncated.
    truncates = (how.top_k > 0) | (how.top_p < 1)
    log_p = jax.lax.cond(truncates, lambda: truncate(log_p, how.top_k, how.top_p), lambda: log_p)
    noise = jnp.where(how.temperature == 0, 0.0, gumbel(keys, log_p.shape[1:]))
    return jnp.argmax(log_p + noise, axis=-1).astype(jnp.int32)


def gumbel(keys: jax.Array, shape: Sequence[int]) -> jax.Array:
    """Standard Gumbel noise, float32 [b, *shape], one key [b] per example; the argmax of it + log weights is a draw."""
    return jax.vmap(lambda key: jax.random.gumbel(key, tuple(shape), jnp.float32))(keys)


def fill(
    predict: Predict,
    keys: jax.Array,
    length: int,
    steps: int = 8,
    temperature: float | jax.Array = 1.0,
    choice_temperature: float | jax.Array = 4.5,
) -> jax.Array:
    """Draw all tokens in a few rounds, keeping in each the ones the network is surest of (MaskGIT, arXiv 2202.04200).

    Args:
        predict: tokens int32 [b, length], `NO_TOKEN` where hidden -> logits [b, length, SPECIALS + vocabulary].
        keys: typed keys [b].
        temperature: of the draws. choice_temperature: of the noise on how sure it is, which falls to 0 over the rounds.

    Returns:
        int32 [b, length].
    """
    if steps < 1:
        raise UserError(f"steps = {steps}; valid: 1 or more")

    def body(s: jax.Array, tokens: jax.Array) -> jax.Array:
        log_p = token_log_probabilities(predict(tokens), temperature)
        draws = jnp.argmax(log_p + gumbel(fold_round(keys, "draws", s), log_p.shape[1:]), axis=-1)
        noise = gumbel(fold_round(keys, "confidence", s), (length,))
        scale = choice_temperature * (1 - (s + 1) / steps)
        return refine(tokens, log_p, draws, scale * noise, counts[s])

    counts = jnp.asarray(hidden_counts(length, steps))
    return jax.lax.fori_loop(0, steps, body, jnp.full((keys.shape[0], length), NO_TOKEN))


def fold_round(keys: jax.Array, stream: str, number: jax.Array) -> jax.Array:
    return rng.fold(rng.fold_name(keys, stream), number)


def token_log_probabilities(logits: jax.Array, temperature: float | jax.Array = 1.0) -> jax.Array:
    """Log-probabilities of the tokens: logits [..., SPECIALS + vocabulary] -> float32 [..., vocabulary]."""
    return jax.nn.log_softmax(logits[..., SPECIALS:].astype(jnp.float32) / temperature, axis=-1)


def hidden_counts(length: int, steps: int) -> np.ndarray:
    """How many tokens are to be hidden after each round: floor(length cos(pi r / 2)), r = (s + 1) / steps; int32."""
    r = np.arange(1, steps + 1) / steps
    return np.append(np.floor(length * np.cos(np.pi / 2 * r[:-1])), 0).astype(np.int32)


def refine(tokens: jax.Array, log_p: jax.Array, draws: jax.Array, noise: jax.Array, count: jax.Array) -> jax.Array:
    """One round: hidden tokens take their draws, and the least sure of these are hidden again.

    Args:
        tokens: int32 [b, n], `NO_TOKEN` where hidden. log_p: [b, n, vocabulary].
        draws: int32 [b, n], tokens for all positions.
        noise: [b, n], added to the log probability of each draw.
        count: how many to hide again, 0 in the last round; else at least one, and fewer than there were. Of the
            reference's batches the first image says how many there were, for all alike; here each example for itself.
    """
    hidden = tokens == NO_TOKEN
    filled = jnp.where(hidden, draws, tokens)
    confidence = jnp.take_along_axis(log_p, filled[..., None], axis=-1)[..., 0] + noise
    confidence = jnp.where(hidden, confidence, jnp.inf)
    rank = jnp.argsort(jnp.argsort(confidence, axis=1), axis=1)
    again = jnp.where(count > 0, jnp.clip(count, 1, jnp.sum(hidden, axis=1) - 1), 0)
    return jnp.where(rank < again[:, None], NO_TOKEN, filled)
