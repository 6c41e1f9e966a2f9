"""What a config's sections `tokens` and `sampling` become: losses, draws of tokens, pictures, and invalid options."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from diffjax import rng
from diffjax.contracts import Batch, bind
from diffjax.data.tokens import CODEBOOK, Codebook, Origin, codebook_sha256, write_tokens
from diffjax.errors import UserError
from diffjax.ops.vocabulary import END, NO_TOKEN, SPECIALS
from diffjax.tokens import losses
from tests import slow
from tests.programs import method_of, tiny_config

VOCABULARY, DECODER_VOCABULARY, GRID, CLASSES = 12, 20, 3, 5
PLACES = GRID**2
STAGES = ("features", "decoder", "rounds")  # stage 1; stage 2, one after the other; stage 2, in rounds


def config(stage: str, *leaves: str, **model):
    """Two blocks of width 16, without dropout, of an encoder whose tokens have no pixels."""
    data = ("data.encoder=other", f"data.vocabulary={VOCABULARY}", f"data.size={GRID}", f"data.num_classes={CLASSES}")
    if stage != "features":
        second = ("data.channels=2", f"data.decoder_vocabulary={DECODER_VOCABULARY}", "tokens.label_drop=0.0")
        data = (*data, *second, "data.num_classes=0")
    if stage == "rounds":
        data = (*data, "sampling.tokens.rounds=4")
    sizes = ("model.width=16", "model.heads=2", "model.dropout=0.0", "sampling.guidance.scale=1.0")
    own = {"causal": stage != "rounds"} | ({"norm": "pre"} if stage != "features" else {}) | model
    shapes = (f"model.{name}={value}" for name, value in own.items())
    return tiny_config(*data, *sizes, *leaves, *shapes, model="digit")


def batch(stage: str, n: int = 6) -> Batch:
    """Tokens to learn, and what they are conditioned on: labels, or the tokens of the first stage."""
    generator = np.random.default_rng(0)
    counts = (VOCABULARY,) if stage == "features" else (VOCABULARY, DECODER_VOCABULARY)
    tokens = np.stack([generator.integers(count, size=(n, PLACES)) for count in counts], axis=1)
    labels = generator.integers(CLASSES, size=n)
    condition = labels if stage == "features" else tokens[:, 0]
    return Batch(tokens[:, -1].astype(np.int32), condition.astype(np.int32), np.arange(n, dtype=np.int32))


def drawn_params(c):
    """Parameters larger than fresh ones, so that what a model is given matters."""
    method = method_of(c)
    params = method.model.init(jax.random.key(1), *method.inputs)["params"]
    return jax.tree.map(lambda leaf: 2 * leaf, params)


@pytest.fixture(scope="module", params=slow.but(["features", "rounds"], STAGES))
def stage(request):
    c = config(request.param)
    return request.param, c, drawn_params(c)


def size(stage: str) -> int:
    return SPECIALS + (VOCABULARY if stage == "features" else DECODER_VOCABULARY)


# Losses


def test_the_loss_of_each_kind(stage):
    name, c, params = stage
    given, method = batch(name), method_of(c)
    loss = jax.jit(lambda given: method.loss(bind(method.model), params, {}, given, jax.random.key(0)))
    value, terms = loss(given)
    assert set(terms) == {"nll"}
    assert value == terms["nll"]  # nothing is smoothed
    assert 0.5 * np.log(size(name)) < value < 3 * np.log(size(name))
    order = np.random.default_rng(1).permutation(6)
    shuffled, _ = loss(jax.tree.map(lambda array: array[order], given))
    np.testing.assert_allclose(shuffled, value, rtol=1e-5)


def seen_by_the_model(c, given, logits):
    """The arguments of the one call of the model that a loss makes, and the loss for its `logits`(tokens)."""
    seen = {}

    def apply(params, tokens, y, source, train=False, keys=None):
        seen.update(tokens=tokens, y=y, source=source, train=train, keys=keys)
        return logits(tokens)

    loss, terms = method_of(c).loss(apply, None, {}, given, jax.random.key(3))
    return seen, loss, terms


@pytest.mark.parametrize("name", ["features", "decoder"])
def test_the_next_token_is_predicted(name):
    """The last stream is what is predicted; the first is the source of a second stage."""
    c, given = config(name, "tokens.smoothing=0.1", "tokens.label_drop=0.0"), batch(name)
    logits = jax.random.normal(jax.random.key(4), (6, PLACES + 1, size(name)))
    seen, loss, terms = seen_by_the_model(c, given, lambda tokens: logits)
    np.testing.assert_array_equal(seen["tokens"], given.x)
    if name == "decoder":
        np.testing.assert_array_equal(seen["source"], given.condition)
        assert seen["y"] is None
    else:
        assert seen["source"] is None
        np.testing.assert_array_equal(seen["y"], given.condition)
    assert seen["train"]
    smoothed, nll = losses.next_token(logits, given.x, 0.1)
    assert loss == smoothed.mean() != nll.mean() == terms["nll"]
    targets = np.concatenate([SPECIALS + given.x, np.full((6, 1), END)], axis=1)
    plain = -np.take_along_axis(np.asarray(jax.nn.log_softmax(logits)), targets[..., None], axis=-1).mean()
    np.testing.assert_allclose(terms["nll"], plain, rtol=1e-5)


def test_hidden_tokens_are_predicted_and_no_others():
    c, given = config("rounds"), batch("rounds", n=50)
    tokens = given.x
    right = 50.0 * jax.nn.one_hot(SPECIALS + tokens, size("rounds"))

    def right_where_hidden(seen):
        return jnp.where((seen == NO_TOKEN)[..., None], right, -right)

    seen, loss, _ = seen_by_the_model(c, given, right_where_hidden)
    hidden = np.asarray(seen["tokens"] == NO_TOKEN)
    np.testing.assert_array_equal(np.where(hidden, tokens, seen["tokens"]), tokens)
    np.testing.assert_array_equal(seen["source"], given.condition)
    assert hidden.any(axis=1).all()
    assert len(np.unique(hidden.sum(axis=1))) > 4
    np.testing.assert_allclose(loss, 0, atol=1e-6)
    _, wrong, _ = seen_by_the_model(c, given, lambda seen: -right_where_hidden(seen))
    assert wrong > 10


def test_labels_are_dropped_by_so_many():
    given = batch("features", n=1000)
    logits = lambda tokens: jnp.zeros((len(tokens), PLACES + 1, size("features")))  # noqa: E731
    seen, _, _ = seen_by_the_model(config("features", "tokens.label_drop=0.4"), given, logits)
    dropped = np.asarray(seen["y"] == CLASSES)
    assert np.mean(dropped) == pytest.approx(0.4, abs=0.05)
    np.testing.assert_array_equal(np.where(dropped, given.condition, seen["y"]), given.condition)
    none = config("features", "tokens.label_drop=0.0", "data.num_classes=0")
    assert seen_by_the_model(none, given, logits)[0]["y"] is None


def test_the_null_class_has_a_row_where_labels_are_dropped():
    for leaves, rows in (((), CLASSES + 1), (("tokens.label_drop=0.0",), CLASSES)):
        method = method_of(config("features", *leaves))
        assert method.model.null_class == (rows > CLASSES)
        shapes = jax.eval_shape(method.model.init, jax.random.key(0), *method.inputs)
        assert shapes["params"]["token_embed"].shape[0] == SPECIALS + VOCABULARY + rows


def test_what_is_dropped_out_belongs_to_the_example():
    c = config("features", dropout=0.5)
    params, given = drawn_params(c), batch("features", n=2)
    given = jax.tree.map(lambda array: np.repeat(array[:1], 2, axis=0), given)

    @jax.jit
    def loss(given):
        method = method_of(c)
        return method.loss(bind(method.model), params, {}, given, jax.random.key(0))[0]

    at = lambda *index: float(loss(given._replace(index=np.array(index))))  # noqa: E731
    assert abs(at(0, 0) - at(1, 1)) > 1e-3
    assert at(0, 1) == pytest.approx((at(0, 0) + at(1, 1)) / 2, rel=1e-5)


# Draws


def given_to_draw(name: str, n: int = 4):
    """Labels of stage 1, source tokens of stage 2; and keys."""
    return batch(name, n).condition, keys(n)


def keys(n: int):
    return rng.per_example(rng.stream(5, "sample"), jnp.arange(n))


def draw(c, params, labels, keys):
    method = method_of(c)
    sampler, decode = method.sampler(c.sampling), method.decoder.load() if method.decoder else None

    def sample(labels, keys, schedule, decode):
        tokens = sampler.sample(bind(method.model), params, schedule, labels, keys)
        return decode(tokens) if decode else tokens

    return np.asarray(jax.jit(sample)(labels, keys, sampler.schedule, decode))


def test_tokens_are_drawn_each_for_itself(stage):
    name, c, params = stage
    labels, keys = given_to_draw(name)
    tokens = draw(c, params, labels, keys)
    assert (tokens.shape, tokens.dtype) == ((4, PLACES), np.int32)
    assert tokens.min() >= 0
    assert tokens.max() < size(name) - SPECIALS
    assert len(np.unique(tokens)) > 4
    np.testing.assert_array_equal(draw(c, params, labels[1:3], keys[1:3]), tokens[1:3])


def test_a_draw_depends_on_what_it_is_given(stage):
    name, c, params = stage
    labels, keys = given_to_draw(name)
    tokens = draw(c, params, labels, keys)
    assert (draw(c, params, (labels + 1) % CLASSES, keys) != tokens).any()
    assert (draw(c, params, labels, keys[::-1]) != tokens).any()


@pytest.mark.slow
def test_options_reach_the_draw():
    c = config("features")
    params, (labels, keys) = drawn_params(c), given_to_draw("features")
    surest = draw(config("features", "sampling.tokens.temperature=0.0"), params, labels, keys)
    np.testing.assert_array_equal(surest, draw(config("features", "sampling.tokens.top_k=1"), params, labels, keys))
    np.testing.assert_array_equal(surest, draw(config("features", "sampling.tokens.top_p=0.001"), params, labels, keys))
    assert (surest != draw(c, params, labels, keys)).any()
    rounds = [config("rounds", f"sampling.tokens.rounds={count}") for count in (1, 4)]
    params, (source, keys) = drawn_params(rounds[0]), given_to_draw("rounds")
    one, four = (draw(c, params, source, keys) for c in rounds)
    assert (one != four).any()


@pytest.mark.slow
def test_guidance_of_zero_is_the_null_class():
    c = config("features")
    params, (labels, keys) = drawn_params(c), given_to_draw("features")
    null = draw(c, params, np.full_like(labels, CLASSES), keys)
    np.testing.assert_array_equal(draw(config("features", "sampling.guidance.scale=0.0"), params, labels, keys), null)
    guided = draw(config("features", "sampling.guidance.scale=3.0"), params, labels, keys)
    assert (guided != draw(c, params, labels, keys)).any()


# Pictures


def test_what_a_model_makes():
    assert method_of(config("features", "data.encoder=pixels")).makes == "pictures"
    assert method_of(config("features")).makes == "tokens of other"
    assert method_of(config("decoder")).makes == method_of(config("rounds")).makes == "tokens of a decoder"


@pytest.fixture
def pixels(tmp_path):
    """A folder of tokens of 2 x 2 patches, and its codebook."""
    codebook = np.random.default_rng(0).uniform(-1, 1, (VOCABULARY, 4)).astype(np.float32)
    stream = Codebook({"name": "pixels", "patch": 2}, VOCABULARY, codebook_sha256(codebook), GRID)
    write_tokens(tmp_path, [(np.zeros((1, 1, PLACES), int), 0)], Origin((stream,), {"name": "none"}, CLASSES))
    np.save(tmp_path / CODEBOOK, codebook)
    return tmp_path, codebook


def test_tokens_of_pixels_become_the_patches_of_their_centroids(pixels):
    folder, codebook = pixels
    c = config("features", "data.encoder=pixels", f"data.dir={folder}")
    params, (labels, keys) = drawn_params(c), given_to_draw("features")
    tokens, images = draw(config("features"), params, labels, keys), draw(c, params, labels, keys)
    assert (images.shape, images.dtype) == ((4, 6, 6, 1), np.float32)
    patches = images.reshape(4, GRID, 2, GRID, 2).transpose(0, 1, 3, 2, 4).reshape(4, PLACES, 4)
    np.testing.assert_array_equal(patches, codebook[tokens])


def test_pictures_of_another_codebook_are_refused(pixels):
    folder, codebook = pixels
    np.save(folder / CODEBOOK, codebook[::-1])
    method = method_of(config("features", "data.encoder=pixels", f"data.dir={folder}"))
    with pytest.raises(UserError, match="is not the codebook that the tokens beside it were made with"):
        method.decoder.load()
    with pytest.raises(UserError, match=r"tokens.json is missing; make them with: python -m diffjax tokenize"):
        method_of(config("features", "data.encoder=pixels", f"data.dir={folder / 'gone'}")).decoder.load()


# What has no meaning

REFUSED = {
    "guidance": (
        "features",
        ("sampling.guidance.scale=2", "tokens.label_drop=0"),
        "sampling.guidance.scale needs a null class",
    ),
    "guidance-stage-2": ("decoder", ("sampling.guidance.scale=2",), "sampling.guidance.scale needs a null class"),
    "null-without-classes": ("features", ("data.num_classes=0",), "null_class = True needs num_classes above 0"),
    "classes-of-stage-2": ("decoder", ("data.num_classes=5",), "a model with a source takes no labels"),
    "rounds-causal": ("features", ("sampling.tokens.rounds=8",), "sampling.tokens.rounds = 8 is for masked models"),
    "no-rounds": (
        "rounds",
        ("sampling.tokens.rounds=0",),
        "draws from all tokens in sampling.tokens.rounds of 1 or more",
    ),
    "top-k-masked": (
        "rounds",
        ("sampling.tokens.top_k=5",),
        "valid with sampling.tokens.top_k = 0 and sampling.tokens.top_p = 1",
    ),
    "top-p-masked": (
        "rounds",
        ("sampling.tokens.top_p=0.8",),
        "valid with sampling.tokens.top_k = 0 and sampling.tokens.top_p = 1",
    ),
    "top-k": (
        "features",
        ("sampling.tokens.top_k=13",),
        "top_k = 13; valid: 0 (all) to the size of the vocabulary, 12",
    ),
    "top-k-stage-2": ("decoder", ("sampling.tokens.top_k=21",), "to the size of the vocabulary, 20"),
    "top-p": ("features", ("sampling.tokens.top_p=0",), "top_p = 0.0; valid: above 0, to 1"),
    "temperature": (
        "features",
        ("sampling.tokens.temperature=-1",),
        "sampling.tokens.temperature = -1.0: valid: 0 or more",
    ),
    "temperature-masked": (
        "rounds",
        ("sampling.tokens.temperature=0",),
        "a masked model (causal = false) draws; valid: above",
    ),
    "guidance-nan": (
        "features",
        ("sampling.guidance.scale=nan",),
        "sampling.guidance.scale = nan: valid: a finite number",
    ),
    "smoothing": ("features", ("tokens.smoothing=1",), "tokens.smoothing = 1.0: valid: 0 to below 1"),
    "smoothing-negative": ("rounds", ("tokens.smoothing=-0.1",), "tokens.smoothing = -0.1: valid"),
    "label-drop": ("features", ("tokens.label_drop=1",), "tokens.label_drop = 1.0: valid: 0 (no null) to below 1"),
    "positions": ("features", ("data.size=6",), "6 x 6 tokens and their start need 37 positions; length = 32"),
}


@pytest.mark.parametrize("name, leaves, reason", REFUSED.values(), ids=REFUSED)
def test_what_has_no_meaning_is_refused(name, leaves, reason):
    def sampler():
        c = config(name, *leaves)
        return method_of(c).sampler(c.sampling)

    with pytest.raises(UserError) as raised:
        sampler()
    assert reason in str(raised.value)
    assert "\n" not in str(raised.value)


def test_a_guide_is_for_diffusion():
    c = config("features")
    with pytest.raises(UserError, match="autoguidance is for diffusion backbones"):
        method_of(c).sampler(c.sampling, autoguided=True)
