"""Token losses against their formula in float64, and which tokens are hidden."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy.special import log_softmax

from diffjax.ops.vocabulary import END, SPECIALS
from diffjax.tokens import losses

B, N, VOCABULARY = 3, 6, 9


def draw(places):
    generator = np.random.default_rng(0)
    return 3 * generator.standard_normal((B, places, SPECIALS + VOCABULARY)), generator.integers(0, VOCABULARY, (B, N))


def expected(logits, target, smoothing):
    log_p = log_softmax(logits, axis=-1)
    nll = -np.take_along_axis(log_p, target[..., None], -1)[..., 0]
    return (1 - smoothing) * nll - smoothing * log_p.mean(-1), nll


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_next_token_counts_the_end(smoothing):
    logits, tokens = draw(N + 1)
    target = np.concatenate([tokens + SPECIALS, np.full((B, 1), END)], 1)
    found = jax.jit(losses.next_token)(logits.astype(np.float32), tokens, smoothing)
    for term, value in zip(found, expected(logits, target, smoothing)):
        assert (term.shape, term.dtype) == ((B,), jnp.float32)
        np.testing.assert_allclose(term, value.mean(1), rtol=1e-5)


def test_hidden_tokens_are_averaged_over_the_batch_and_nothing_else_counts():
    logits, tokens = draw(N)
    hidden = np.zeros((B, N), bool)
    hidden[0, :5], hidden[1, 2], hidden[2, ::2] = True, True, True
    found = losses.hidden_tokens(logits.astype(np.float32), tokens, hidden, 0.1)
    for term, value in zip(found, expected(logits, tokens + SPECIALS, 0.1)):
        np.testing.assert_allclose(term.mean(), value[hidden].mean(), rtol=1e-5)
    logits[~hidden] = 7.0
    again = losses.hidden_tokens(logits.astype(np.float32), tokens, hidden, 0.1)
    np.testing.assert_array_equal(found[0], again[0])


def test_the_gradient_is_softmax_minus_the_smoothed_target():
    logits, tokens = draw(N + 1)
    gradient = jax.grad(lambda x: losses.next_token(x, tokens, 0.1)[0].sum())(jnp.asarray(logits, jnp.float32))
    target = np.concatenate([tokens + SPECIALS, np.full((B, 1), END)], 1)
    smooth = 0.9 * np.eye(SPECIALS + VOCABULARY)[target] + 0.1 / (SPECIALS + VOCABULARY)
    np.testing.assert_allclose(gradient, (np.exp(log_softmax(logits, -1)) - smooth) / (N + 1), atol=1e-6)


def test_bfloat16_logits_are_summed_in_float32():
    logits, tokens = draw(N + 1)
    rounded = jnp.asarray(logits, jnp.bfloat16)
    found, _ = losses.next_token(rounded, tokens, 0.1)
    wide, _ = losses.next_token(rounded.astype(jnp.float32), tokens, 0.1)
    np.testing.assert_array_equal(found, wide)


def test_how_many_tokens_are_hidden_and_which():
    u = np.array([0.0, 0.5, 0.99999, 0.25], np.float32)
    scores = np.random.default_rng(1).random((4, 256)).astype(np.float32)
    hidden = np.asarray(losses.hide(u, scores))
    assert hidden.sum(1).tolist() == [256, 182, 1, 237]
    for row, score in zip(hidden, scores):
        if not row.all():
            assert score[row].max() < score[~row].min()
