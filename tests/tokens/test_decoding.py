"""Decoding with networks that are formulas, and with a small DiGIT: what is drawn, from what, by whose key."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from diffjax import models
from diffjax.errors import UserError
from diffjax.ops.vocabulary import END, NO_TOKEN, SPECIALS
from diffjax.tokens import decoding

VOCABULARY, B, N = 12, 4, 10


def keys(count=B, seed=0):
    return jax.vmap(lambda i: jax.random.fold_in(jax.random.key(seed), i))(jnp.arange(count))


@functools.cache
def small_model():
    model = models.create(
        "DiGIT", vocabulary=VOCABULARY, depth=2, width=16, heads=2, num_classes=3, null_class=True, length=16
    )
    shapes = jax.eval_shape(model.init, jax.random.key(0), jnp.zeros((1, 2), jnp.int32), jnp.zeros(1, jnp.int32))
    leaves, tree = jax.tree.flatten(shapes["params"])
    draw = np.random.default_rng(3).standard_normal
    return model, tree.unflatten([np.float32(0.5) * draw(leaf.shape, np.float32) for leaf in leaves])


@functools.partial(jax.jit, static_argnames=("guided",))
def sample(y, keys, how, guided=False):
    model, params = small_model()
    y = jnp.stack([y, jnp.full_like(y, model.num_classes)], axis=1).reshape(-1) if guided else y
    logits, cache = model.apply({"params": params}, model.init_cache(len(y), N), y, method="prefill")
    step = functools.partial(model.apply, {"params": params}, method="step")
    return decoding.generate(step, logits, cache, keys, N, how)


def teacher_forced(tokens, y):
    model, params = small_model()
    with jax.default_matmul_precision("highest"):
        return jax.jit(lambda c, y: model.apply({"params": params}, c, y))(tokens, y)[:, :-1]


LABELS = jnp.array([0, 1, 2, 1])


@pytest.mark.parametrize("weight", [None, 2.5])
def test_greedy_tokens_are_the_most_probable_given_those_before(weight):
    how = decoding.choice(VOCABULARY, temperature=0, guidance=1.0 if weight is None else weight)
    tokens = sample(LABELS, keys(), how, guided=weight is not None)
    assert (tokens.shape, tokens.dtype) == ((B, N), jnp.int32)
    logits = teacher_forced(tokens, LABELS)
    if weight is not None:
        logits = decoding.guided(logits, teacher_forced(tokens, jnp.full(B, 3)), weight)
    np.testing.assert_array_equal(tokens, logits[..., SPECIALS:].argmax(-1))


def test_guided_logits_with_the_cache_are_those_of_the_whole():
    """The two rows of an example lie beside each other, as `generate` feeds them."""
    model, params = small_model()
    tokens = np.random.default_rng(0).integers(0, VOCABULARY, (B, N)).astype(np.int32)
    null = jnp.full(B, model.num_classes)
    whole = decoding.guided(teacher_forced(tokens, LABELS), teacher_forced(tokens, null), 2.5)
    rows = jnp.stack([LABELS, null], axis=1).reshape(-1)
    step = jax.jit(functools.partial(model.apply, {"params": params}, method="step"))
    with jax.default_matmul_precision("highest"):
        logits, cache = model.apply({"params": params}, model.init_cache(2 * B, N), rows, method="prefill")
        found = [decoding.guided(logits[0::2], logits[1::2], 2.5)]
        for token in tokens.T[:-1]:
            logits, cache = step(cache, jnp.repeat(token, 2))
            found.append(decoding.guided(logits[0::2], logits[1::2], 2.5))
    np.testing.assert_allclose(np.stack(found, 1), whole, rtol=0, atol=1e-4)


def test_guidance_of_weight_one_is_none():
    how = decoding.choice(VOCABULARY, temperature=0)
    np.testing.assert_array_equal(sample(LABELS, keys(), how, guided=True), sample(LABELS, keys(), how))


def test_a_sample_depends_on_its_own_key_alone():
    how = decoding.choice(VOCABULARY, top_k=8, top_p=0.95)
    tokens = sample(LABELS, keys(), how)
    np.testing.assert_array_equal(sample(LABELS[2:3], keys()[2:3], how), tokens[2:3])
    np.testing.assert_array_equal(sample(LABELS[::-1], keys()[::-1], how), tokens[::-1])
    assert (np.asarray(sample(LABELS, keys(seed=1), how)) != tokens).any()
    assert len(np.unique(sample(jnp.zeros(B, jnp.int32), keys(), how), axis=0)) > 1


def test_the_numbers_of_a_choice_are_no_part_of_the_program():
    before = None
    for options in ({}, {"temperature": 0.7}, {"top_k": 3}, {"top_p": 0.5}, {"guidance": 3.0}, {"temperature": 0}):
        sample(LABELS, keys(), decoding.choice(VOCABULARY, **options), guided=True)
        before = before or sample._cache_size()
    assert sample._cache_size() == before


def test_draws_follow_the_truncated_distribution():
    """Four thousand draws each; the frequencies of the kept tokens are within five standard deviations."""
    p = np.array([0.4, 0.25, 0.15, 0.1, 0.06, 0.04])
    logits = jnp.concatenate([jnp.full(SPECIALS, -1e9), jnp.log(p)])[None].repeat(4000, 0)
    draw = jax.jit(
        lambda how: decoding.draw_entry(decoding.log_probabilities(logits, how.temperature), keys(4000), how)
    )
    sharp = p**2 / (p**2).sum()
    for options, kept, weights in (
        ({}, 6, p),
        ({"top_k": 3}, 3, p),
        ({"top_p": 0.7}, 3, p),
        ({"top_p": 0.6}, 2, p),
        ({"top_k": 2, "top_p": 0.99}, 2, p),
        ({"temperature": 0.5}, 6, sharp),
        ({"temperature": 0}, 1, p),
    ):
        frequency = np.bincount(draw(decoding.choice(6, **options)) - SPECIALS, minlength=6) / 4000
        expected = np.where(np.arange(6) < kept, weights, 0) / weights[:kept].sum()
        assert (np.abs(frequency - expected) <= 5 * np.sqrt(expected * (1 - expected) / 4000)).all(), options


def test_of_equally_probable_tokens_exactly_k_remain():
    kept = decoding.truncate(jnp.zeros((2, 9)), jnp.int32(4), jnp.float32(1.0))
    np.testing.assert_array_equal(np.isfinite(kept).sum(1), 4)


def test_special_entries_are_never_drawn_and_their_share_is_not_given_away():
    logits = jnp.zeros((1, SPECIALS + VOCABULARY)).at[:, :SPECIALS].set(9.0)
    log_p = decoding.log_probabilities(logits)
    assert np.isneginf(log_p[0, :SPECIALS]).all()
    assert float(jnp.exp(log_p).sum()) < 1e-3
    allowed = decoding.log_probabilities(logits, may_end=True)
    assert np.isfinite(allowed[0, :SPECIALS]).tolist() == [entry == END for entry in range(SPECIALS)]


def test_sequences_end_where_they_may():
    """A network that would end at once: it ends at the first place that allows it, and everything after is no token."""

    def step(cache, tokens):
        return logits, cache

    logits = jnp.zeros((B, SPECIALS + VOCABULARY)).at[:, END].set(50.0)
    run = functools.partial(decoding.generate, step, logits, None, keys(), N, decoding.choice(VOCABULARY))
    assert (np.asarray(run()) >= 0).all()
    ended = np.asarray(run(end_from=4))
    assert (ended[:, :4] >= 0).all()
    assert (ended[:, 4:] == NO_TOKEN).all()


@pytest.mark.parametrize("steps", [1, 8])
def test_fill_keeps_what_it_has_and_hides_by_the_schedule(steps):
    seen = []

    def predict(tokens):
        jax.debug.callback(lambda c: seen.append(np.asarray(c)), tokens, ordered=True)
        return jnp.zeros((*tokens.shape, SPECIALS + VOCABULARY)).at[..., :SPECIALS].set(9.0)

    tokens = np.asarray(decoding.fill(predict, keys(2), 256, steps))
    jax.effects_barrier()
    counts = decoding.hidden_counts(256, steps)
    assert counts.tolist() == ([251, 236, 212, 181, 142, 97, 49, 0] if steps == 8 else [0])
    assert [(c == NO_TOKEN).sum(1).tolist() for c in seen] == [[256, 256], *([n, n] for n in counts[:-1].tolist())]
    for earlier, later in zip(seen, [*seen[1:], tokens]):
        np.testing.assert_array_equal(later[earlier != NO_TOKEN], earlier[earlier != NO_TOKEN])
    assert tokens.min() == 0
    assert tokens.max() == VOCABULARY - 1


def test_fill_depends_on_an_example_s_own_key_alone():
    predict = lambda tokens: jnp.cos(jnp.arange(SPECIALS + VOCABULARY) * (2.0 + tokens[..., None]))  # noqa: E731
    fill = jax.jit(lambda k, t: decoding.fill(predict, k, 32, 4, t))
    whole = fill(keys(), 1.0)
    np.testing.assert_array_equal(jax.jit(lambda k: decoding.fill(predict, k, 32, 4))(keys()[1:2]), whole[1:2])
    assert (np.asarray(fill(keys(), 3.0)) != whole).any()
    assert fill._cache_size() == 1


def test_refine_hides_the_least_sure_and_at_least_one_but_fewer_than_before():
    log_p = jnp.log(jnp.array([[[0.9, 0.1], [0.6, 0.4], [0.7, 0.3], [0.8, 0.2]]]))
    tokens, draws = jnp.array([[NO_TOKEN, NO_TOKEN, NO_TOKEN, 1]]), jnp.zeros((1, 4), int)
    noise = jnp.zeros((1, 4))
    assert decoding.refine(tokens, log_p, draws, noise, 2).tolist() == [[0, NO_TOKEN, NO_TOKEN, 1]]
    assert decoding.refine(tokens, log_p, draws, noise, 4).tolist() == [[0, NO_TOKEN, NO_TOKEN, 1]]
    assert decoding.refine(tokens, log_p, draws, noise, 1).tolist() == [[0, NO_TOKEN, 0, 1]]
    assert decoding.refine(tokens, log_p, draws, noise, 0).tolist() == [[0, 0, 0, 1]]
    assert decoding.refine(tokens, log_p, draws, noise.at[0, 0].set(-9), 1).tolist() == [[NO_TOKEN, 0, 0, 1]]


@pytest.mark.parametrize(
    "options, message",
    [
        ({"top_k": VOCABULARY + 1}, "top_k = 13; valid: 0 .all. to the size of the vocabulary, 12"),
        ({"top_k": -1}, "top_k = -1"),
        ({"top_k": 2.5}, "top_k = 2.5"),
        ({"top_p": 0.0}, "top_p = 0.0; valid: above 0"),
        ({"top_p": 300.0}, "top_p = 300.0; valid: above 0, to 1"),
        ({"temperature": -1.0}, "temperature = -1.0; valid: 0"),
        ({"temperature": float("nan")}, "temperature = nan"),
        ({"guidance": float("inf")}, "guidance = inf"),
    ],
)
def test_choices_that_cannot_be(options, message):
    with pytest.raises(UserError, match=message):
        decoding.choice(VOCABULARY, **options)


def test_other_errors():
    with pytest.raises(UserError, match="3 rows of logits for 4 keys"):
        decoding.generate(None, jnp.zeros((3, 9)), None, keys(), N, decoding.choice(4))
    with pytest.raises(UserError, match="steps = 0; valid: 1 or more"):
        decoding.fill(None, keys(), 4, 0)
