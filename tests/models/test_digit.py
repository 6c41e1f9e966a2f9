"""DiGIT: published sizes, its start, what each position sees, decoding with the cache, invalid tokens, dropout."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from diffjax import models
from diffjax.errors import UserError
from diffjax.models.digit import FIRST_POSITION, SIZES
from diffjax.ops.macs import count_macs
from diffjax.ops.vocabulary import NO_TOKEN, PAD, SPECIALS
from diffjax.parallel.mesh import batch_sharding, make_mesh
from diffjax.parallel.rules import shardings
from tests import slow

NAMES = [name for name, row in models.MODELS.items() if row.family == "DiGIT"]
TINY = {"vocabulary": 11, "depth": 2, "width": 32, "heads": 4, "mlp_ratio": 2.5, "length": 9}
CLASSES = {"num_classes": 3, "null_class": True}
SOURCE = {"source_vocabulary": 7, "norm": "pre"}
B, N, M = 3, 6, 5


def tiny(**kwargs):
    return models.create("DiGIT", **{**TINY, **kwargs})


def inputs(model):
    """tokens, labels, source, as far as the model takes them."""
    keys = jax.random.split(jax.random.key(2), 3)
    tokens = jax.random.randint(keys[0], (B, N), 0, model.vocabulary)
    y = jnp.arange(B) % model.num_classes if model.num_classes else None
    entries = model.source_vocabulary
    return tokens, y, jax.random.randint(keys[2], (B, M), 0, entries) if entries else None


@functools.cache
def some_params(model):
    """Parameters that are all drawn, so that no path is dead."""
    leaves, tree = jax.tree.flatten(jax.eval_shape(model.init, jax.random.key(0), *inputs(model))["params"])
    draw = np.random.default_rng(1).standard_normal
    return tree.unflatten([np.float32(0.2) * draw(leaf.shape, np.float32) for leaf in leaves])


@functools.cache
def apply(model, method="__call__", **keywords):
    keywords = dict(keywords)
    return jax.jit(
        lambda *arguments, keys=None: model.apply(
            {"params": some_params(model)},
            *arguments,
            method=method,
            **keywords,
            **({} if keys is None else {"keys": keys}),
        )
    )


def formula(vocabulary, depth, width, heads, source_vocabulary, norm, num_classes=0, **_):
    """Parameters, with 1026 rows of positions and a feed-forward network four times as wide."""
    embedding = vocabulary + SPECIALS + (SPECIALS + source_vocabulary if source_vocabulary else num_classes)
    tables = embedding + (1 + bool(source_vocabulary)) * 1026 + vocabulary + SPECIALS
    return depth * (12 * width**2 + 13 * width) + (2 * width if norm == "pre" else 0) + tables * width


@pytest.mark.parametrize("name", NAMES)
def test_parameters_and_gmacs(name):
    row, model, tokens = models.MODELS[name], models.create(name), jax.ShapeDtypeStruct((1, 256), jnp.int32)
    source = tokens if model.source_vocabulary else None
    params = jax.eval_shape(model.init, jax.random.key(0), tokens, None, source)["params"]
    total = sum(leaf.size for leaf in jax.tree.leaves(params))
    assert total == row.params == formula(**{"source_vocabulary": 0, **row.kwargs})
    macs = count_macs(lambda p, *x: model.apply({"params": p}, *x), params, tokens, None, source)
    assert macs / 1e9 == pytest.approx(row.gmacs, abs=0.005)


@pytest.mark.parametrize("name, count", [("DiGIT-B", 220_401_664), ("digit-l", 733_415_424)])
def test_parameters_with_classes(name, count):
    model, tokens = models.create(name, num_classes=1000), jax.ShapeDtypeStruct((1, 256), jnp.int32)
    params = jax.eval_shape(model.init, jax.random.key(0), tokens, jax.ShapeDtypeStruct((1,), jnp.int32))["params"]
    assert sum(leaf.size for leaf in jax.tree.leaves(params)) == count


def test_the_start():
    """As the reference draws it: ranges of uniform values, deviations of normal ones, zeros and ones."""
    model = tiny(width=64, depth=3, length=400, vocabulary=300, **SOURCE)
    params = jax.jit(model.init)(jax.random.key(0), *inputs(model))["params"]
    attention, mlp = params["blocks"]["attention"], params["blocks"]["mlp"]
    for name in ("query", "key", "value"):
        check_uniform(attention[name]["kernel"], np.sqrt(6 / 128 / 2))
        check_uniform(attention[name]["bias"], 64**-0.5)
    check_uniform(attention["out"]["kernel"], np.sqrt(6 / 128))
    assert not attention["out"]["bias"].any()
    for name, fan_in in (("fc1", 64), ("fc2", 160)):
        for leaf in mlp[name].values():
            check_uniform(leaf, fan_in**-0.5)
    for leaf in (params["token_embed"], params["positions"], params["source_positions"]):
        assert not leaf[PAD].any()
        np.testing.assert_allclose(np.std(np.delete(leaf, PAD, 0)), 64**-0.5, rtol=0.03)
    np.testing.assert_allclose(np.std(params["output"]["kernel"]), 64**-0.5, rtol=0.03)
    for part in (params["final_norm"], params["blocks"]["attention_norm"], params["blocks"]["mlp_norm"]):
        assert np.all(part["scale"] == 1)
        assert not part["bias"].any()
    layers = attention["query"]["kernel"]
    assert not np.allclose(layers[0], layers[1])


def check_uniform(leaf, bound):
    assert np.abs(leaf).max() <= bound
    np.testing.assert_allclose(np.abs(leaf).max(), bound, rtol=0.05)
    np.testing.assert_allclose(np.std(leaf), bound / np.sqrt(3), rtol=0.1)


@pytest.mark.parametrize("kwargs", [{}, {"norm": "pre"}, CLASSES, SOURCE], ids=str)
def test_a_causal_model_sees_what_precedes_and_the_condition(kwargs):
    model = tiny(**kwargs)
    tokens, y, source = inputs(model)
    out = apply(model)(tokens, y, source)
    assert out.shape == (B, N + 1, model.vocabulary + SPECIALS)
    other = apply(model)(tokens.at[:, 3].set((tokens[:, 3] + 1) % model.vocabulary), y, source)
    differs = np.abs(out - other).max((0, 2)) > 1e-4
    assert differs.tolist() == [False] * 4 + [True] * 3
    changed = (y if y is None else (y + 1) % 3, source if source is None else source.at[:, -1].set(0))
    if kwargs in (CLASSES, SOURCE):
        assert (np.abs(out - apply(model)(tokens, *changed)).max((0, 2)) > 1e-4).all()


def test_a_masked_model_sees_everything_but_what_is_hidden():
    model = tiny(causal=False, **SOURCE)
    tokens, _, source = inputs(model)
    hidden = tokens.at[:, 2].set(NO_TOKEN)
    out = apply(model)(hidden, None, source)
    assert out.shape == (B, N, model.vocabulary + SPECIALS)
    other = apply(model)(hidden.at[:, -1].set((tokens[:, -1] + 1) % model.vocabulary), None, source)
    assert (np.abs(out - other).max((0, 2)) > 1e-4).all()
    with pytest.raises(UserError, match="has no order to decode in"):
        model.init_cache(1, 4)


@pytest.mark.parametrize("kwargs", slow.but([SOURCE], [{}, CLASSES, SOURCE]), ids=str)
def test_decoding_with_the_cache_gives_the_logits_of_the_whole(kwargs):
    model = tiny(**kwargs)
    tokens, y, source = inputs(model)
    with jax.default_matmul_precision("highest"):
        whole = apply(model)(tokens, y, source)
        cache = model.init_cache(B, N + 1, 0 if source is None else M)
        logits, cache = apply(model, "prefill")(cache, y, source)
        found = [logits]
        for token in tokens.T:
            logits, cache = apply(model, "step")(cache, token)
            found.append(logits)
    np.testing.assert_allclose(np.stack(found, 1), whole, rtol=0, atol=1e-5)
    assert apply(model, "step")._cache_size() == 1  # positions are no part of the program


def test_bfloat16_computes_in_it_and_returns_float32():
    model = tiny(dtype="bfloat16", **SOURCE)
    tokens, _, source = inputs(model)
    cache = model.init_cache(B, N, M)
    logits, cache = apply(model, "prefill")(cache, None, source)
    assert (cache.keys.dtype, logits.dtype) == (jnp.bfloat16, jnp.float32)
    out, exact = apply(model)(tokens, None, source), apply(tiny(**SOURCE))(tokens, None, source)
    assert out.dtype == jnp.float32
    np.testing.assert_allclose(out[:, 0], logits, atol=0.1)
    np.testing.assert_allclose(out, exact, atol=0.3)


def test_features_are_means_of_block_inputs():
    model = tiny(**CLASSES)
    tokens, y, _ = inputs(model)
    features = apply(model, "features")(tokens, y)
    assert features.shape == (2, B, 32)
    embedded = apply(model, "embed")(tokens, y)
    np.testing.assert_allclose(features[0], embedded.mean(1), rtol=0, atol=1e-5)


def test_codes_out_of_range_are_an_error_where_they_are_known_and_nan_where_not():
    model = tiny(**CLASSES)
    tokens, y, _ = inputs(model)
    bind = functools.partial(model.apply, {"params": some_params(model)})
    for token in (model.vocabulary, -1):
        with pytest.raises(UserError, match=f"token {token}; valid: 0 to 10"):
            bind(tokens.at[1, 2].set(token), y)
        out = np.asarray(apply(model)(tokens.at[1, 2].set(token), y))
        assert np.isnan(out[1]).all()
        assert np.isfinite(out[[0, 2]]).all()
    with pytest.raises(UserError, match="label 4; valid: 0 to 3"):
        bind(tokens, y + 3)
    masked = tiny(causal=False, **SOURCE)
    with pytest.raises(UserError, match="token -2; valid: 0 to 10, or -1 where hidden"):
        masked.apply({"params": some_params(masked)}, tokens.at[0, 0].set(-2), None, inputs(masked)[2])
    with pytest.raises(UserError, match="source token 7; valid: 0 to 6"):
        masked.apply({"params": some_params(masked)}, tokens, None, jnp.full((B, M), 7))


def test_small_integer_types_do_not_overflow():
    model = tiny(vocabulary=300, **SOURCE)
    tokens, _, source = inputs(model)
    expected = apply(model)(tokens, None, source)
    small = apply(model)(tokens.astype(jnp.uint16), None, source.astype(jnp.uint8))
    np.testing.assert_array_equal(small, expected)


@pytest.mark.parametrize(
    "call, message",
    [
        (lambda: tiny(norm="middle"), "norm = 'middle': valid: post, pre"),
        (lambda: tiny(heads=5), "width = 32 is not divisible by heads = 5"),
        (lambda: tiny(vocabulary=0), "vocabulary = 0; valid: a positive integer"),
        (lambda: tiny(source_vocabulary=-1), "source_vocabulary = -1; valid: 0"),
        (lambda: tiny(dropout=1.0), "dropout = 1.0: valid: 0 to below 1"),
        (lambda: tiny(**SOURCE, num_classes=3), "a model with a source takes no labels; num_classes = 3"),
        (lambda: tiny(null_class=True), "null_class = True needs num_classes"),
        (lambda: tiny().init_cache(1, 10), "a target of 10 positions .* valid: up to 9"),
        (lambda: apply(tiny())(jnp.zeros((1, 9), jnp.int32)), "a target of 10 positions"),
        (lambda: apply(tiny(**SOURCE))(jnp.zeros((1, 2), jnp.int32)), "has a source of 7 tokens: give them"),
        (lambda: apply(tiny(**CLASSES))(jnp.zeros((1, 2), jnp.int32)), "has 3 classes: it needs labels"),
        (lambda: apply(tiny(), train=True)(jnp.zeros((1, 2), jnp.int32)), "needs keys, one per example"),
    ],
)
def test_errors(call, message):
    with pytest.raises(UserError, match=message):
        call()


def test_dropout_is_of_the_example_s_own_key():
    model = tiny(dropout=0.5, **CLASSES)
    tokens, y, _ = inputs(model)
    keys = jax.random.split(jax.random.key(5), B)
    train = apply(model, train=True)
    out = train(tokens, y, keys=keys)
    alone = train(tokens[1:2], y[1:2], keys=keys[1:2])
    np.testing.assert_allclose(out[1:2], alone, rtol=0, atol=1e-5)
    assert np.abs(out - train(tokens, y, keys=keys[::-1])).max() > 0.1
    assert np.abs(out - apply(model)(tokens, y)).max() > 0.1


@pytest.mark.slow
def test_remat_changes_no_gradient():
    tokens = jnp.arange(12).reshape(2, 6) % 11
    keys = jax.random.split(jax.random.key(5), 2)
    found = []
    for remat in ("none", "full"):
        model = tiny(remat=remat)
        run = jax.jit(
            jax.grad(lambda p, m=model: jnp.sum(jnp.square(m.apply({"params": p}, tokens, train=True, keys=keys))))
        )
        found.append(run(some_params(tiny())))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-3), *found)
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(found[0]))
    unused = found[0]["positions"][:FIRST_POSITION]
    assert not unused.any()


@pytest.mark.slow
@pytest.mark.parametrize("kwargs", [CLASSES, SOURCE], ids=str)
def test_a_mesh_changes_nothing_and_splits_the_cache(kwargs):
    model = tiny(**kwargs)
    tokens, y, source = (x if x is None else jnp.resize(x, (8, *x.shape[1:])) for x in inputs(model))
    params = some_params(model)
    logits = apply(model)(tokens, y, source)
    mesh = make_mesh({"data": 2, "fsdp": 2, "tensor": 2})
    placed = jax.device_put(params, shardings(params, mesh, "fsdp_tp", model.logical_axes, 0))
    with jax.set_mesh(mesh):
        batch = [x if x is None else jax.device_put(x, batch_sharding(mesh)) for x in (tokens, y, source)]
        out = jax.jit(lambda p, *x: model.apply({"params": p}, *x))(placed, *batch)

        @jax.jit
        def two_steps(p, tokens, y, source):
            cache = model.init_cache(8, N, 0 if source is None else M)
            _, cache = model.apply({"params": p}, cache, y, source, method="prefill")
            return model.apply({"params": p}, cache, tokens[:, 0], method="step")

        step, cache = two_steps(placed, *batch)
    np.testing.assert_allclose(out, logits, rtol=0, atol=1e-4)
    np.testing.assert_allclose(step, logits[:, 1], rtol=0, atol=1e-4)
    places = cache.keys.shape[3]
    assert cache.keys.sharding.shard_shape(cache.keys.shape) == (2, 2, 2, places, 8)


def test_sizes_are_those_of_the_rows():
    for size, (depth, width, heads, vocabulary) in SIZES.items():
        kwargs = models.MODELS[f"DiGIT-{size}"].kwargs
        assert kwargs == {"vocabulary": vocabulary, "depth": depth, "width": width, "heads": heads, "norm": "post"}
