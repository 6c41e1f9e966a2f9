"""DiGIT against stored outputs of DAMO-NLP-SG/DiGIT and of the fairseq modules that it is made of."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from diffjax.models.digit import DiGIT
from diffjax.ops.vocabulary import END, MASK, NO_TOKEN, SPECIALS
from diffjax.tokens import decoding, losses
from diffjax.training.optimizer import Optim, make, schedule
from diffjax.weights import from_reference, to_reference
from tests.golden.cases import cases

pytestmark = pytest.mark.golden
ATOL = 1e-4

STAGE1 = pytest.mark.parametrize("case", cases("digit", "sem_tokens"))
CAUSAL = pytest.mark.parametrize("case", [*cases("digit", "sem_tokens"), *cases("digit", "logits_all")])
AUTOREGRESSIVE = pytest.mark.parametrize("case", cases("digit", "logits_all"))
MASKED = pytest.mark.parametrize("case", cases("digit", "decode_init"))
OPTIMIZER = pytest.mark.parametrize("case", cases("digit", "adam_w0"))


def close(found, stored, name=""):
    np.testing.assert_allclose(found, stored, rtol=0, atol=ATOL, err_msg=name)


@functools.cache
def load(case):
    """Module, parameters, family."""
    assert case is not None, "no stored cases"
    family = "digit_stage1" if "sem_tokens" in case.arrays else "digit_stage2_ar"
    family = "digit_stage2_nar" if "decode_init" in case.arrays else family
    return *from_reference(family, case.state_dict, **case.info["config"]), family


@functools.cache
def compiled(case, method):
    module, _, _ = load(case)
    return jax.jit(lambda params, *inputs: module.apply({"params": params}, *inputs, method=method))


def run(case, *inputs, method="__call__"):
    _, params, _ = load(case)
    with jax.default_matmul_precision("highest"):
        return compiled(case, method)(params, *inputs)


def conditions(case, tokens_or_ids):
    """Labels [b] of a class-conditional model: as they are, or out of the entries that sequences start with."""
    module, _, _ = load(case)
    if not module.num_classes:
        return None
    values = np.asarray(tokens_or_ids, np.int32)
    return values[:, 0] - SPECIALS - module.vocabulary if values.ndim == 2 else values


def sequences(case):
    """The short stored sequences as our causal models take them: tokens, labels, source."""
    arrays = case.arrays
    if "tokens" in arrays:
        return arrays["tokens"][:, 1:] - SPECIALS, conditions(case, arrays["tokens"]), None
    return arrays["vq"], None, arrays["sem"]


def smoothed(case, prefix=""):
    """The smoothing of the stored loss, by its name "<prefix>loss_ls<smoothing>", and its value."""
    start = f"{prefix}loss_ls"
    [name] = [name for name in case.arrays if name.startswith(start)]
    return float(name.removeprefix(start)), case.arrays[name]


@STAGE1
def test_logits_and_losses(case):
    """Logits are stored for some of the places."""
    assert case is not None, "no stored cases"
    arrays, (module, _, _) = case.arrays, load(case)
    tokens = arrays["sem_tokens"] - SPECIALS
    logits = run(case, tokens, conditions(case, arrays["cls_ids"]))
    assert logits.shape == (*arrays["tgt"].shape, module.vocabulary + SPECIALS)
    every = -(-logits.shape[1] // arrays["logits_image"].shape[1])
    close(logits[:, ::every], arrays["logits_image"])
    np.testing.assert_array_equal(arrays["tgt"][:, :-1] - SPECIALS, tokens)
    smoothing, stored = smoothed(case)
    loss, nll = losses.next_token(logits, tokens, smoothing)
    close(jnp.mean(loss), stored)
    close(jnp.mean(nll), arrays["nll"])


@STAGE1
def test_gradients(case):
    """Of the smoothed loss: the norm for every parameter of the decoder, and two of them whole."""
    assert case is not None, "no stored cases"
    arrays, (module, params, family) = case.arrays, load(case)
    tokens, y = arrays["sem_tokens"] - SPECIALS, conditions(case, arrays["cls_ids"])

    smoothing, _ = smoothed(case)

    @jax.jit
    def gradient(params):
        def loss(params):
            return jnp.mean(losses.next_token(module.apply({"params": params}, tokens, y), tokens, smoothing)[0])

        return jax.grad(loss)(params)

    with jax.default_matmul_precision("highest"):
        found = to_reference(family, module, gradient(params))
    names = case.info["config"]["grad_names"]
    assert found.keys() == set(names)
    for name, norm in zip(names, arrays["grad_l2"]):
        assert np.linalg.norm(found[name].astype(np.float64)) == pytest.approx(norm, rel=1e-4, abs=1e-6), name
    for key in (key for key in arrays if key.startswith("grad_decoder")):
        name, _, first = key.removeprefix("grad_").partition("_first")
        stored = arrays[key]
        found_here = found[name][: int(first)] if first else found[name]
        np.testing.assert_allclose(found_here, stored, rtol=0, atol=1e-4 * np.abs(stored).max(), err_msg=key)


@STAGE1
def test_short_logits_inner_states_and_features(case):
    assert case is not None, "no stored cases"
    arrays, (module, params, _) = case.arrays, load(case)
    tokens, y, _ = sequences(case)
    close(run(case, tokens, y), arrays["logits"])
    close(run(case, tokens, y, method="features"), arrays["linear_probe_features"])
    with jax.default_matmul_precision("highest"):
        _, captured = module.apply({"params": params}, tokens, y, capture_intermediates=True)
        embedded = module.apply({"params": params}, tokens, y, method="embed")
    (outputs, _), _ = captured["intermediates"]["blocks"]["__call__"][0]
    close(np.concatenate([embedded[None], outputs]), arrays["inner_states"])


@CAUSAL
def test_logits_step_by_step(case):
    assert case is not None, "no stored cases"
    module, _, _ = load(case)
    tokens, y, source = sequences(case)
    cache = module.init_cache(len(tokens), tokens.shape[1] + 1, 0 if source is None else source.shape[1])
    logits, cache = run(case, cache, y, source, method="prefill")
    found = [logits]
    for token in tokens.T:
        logits, cache = run(case, cache, token, method="step")
        found.append(logits)
    close(np.stack(found, axis=1), case.arrays["logits_incremental"])


@CAUSAL
def test_greedy_continuation(case):
    """Their tokens end with `END`, and are -1 after it."""
    assert case is not None, "no stored cases"
    module, params, _ = load(case)
    stored, limits = case.arrays["greedy_tokens"], case.info["config"]["greedy"]
    length, source = limits["max_len_b"], case.arrays.get("sem")
    y = conditions(case, case.arrays["greedy_cls_ids"]) if source is None else None

    @jax.jit
    def generate(params):
        def step(cache, tokens):
            return module.apply({"params": params}, cache, tokens, method="step")

        cache = module.init_cache(len(stored), length, 0 if source is None else source.shape[1])
        logits, cache = module.apply({"params": params}, cache, y, source, method="prefill")
        how, keys = (
            decoding.sampling_params(module.vocabulary, temperature=0),
            jax.random.split(jax.random.key(0), len(stored)),
        )
        return decoding.generate(step, logits, cache, keys, length, how, end_from=limits["min_len"])

    with jax.default_matmul_precision("highest"):
        tokens = np.asarray(generate(params))
    expected = np.where(stored >= SPECIALS, stored - SPECIALS, NO_TOKEN)
    np.testing.assert_array_equal(tokens, expected[:, :length])
    np.testing.assert_array_equal((stored == END).argmax(1), (tokens != NO_TOKEN).sum(1))


@AUTOREGRESSIVE
def test_second_stage(case):
    assert case is not None, "no stored cases"
    arrays = case.arrays
    tokens, _, source = sequences(case)
    logits = run(case, tokens, None, source)
    close(logits, arrays["logits_target"])
    x, _ = run(case, tokens, None, source, method="hidden")
    close(run(case, x, method="logits"), arrays["logits_all"])
    np.testing.assert_array_equal(arrays["tgt"][:, :-1] - SPECIALS, tokens)
    smoothing, stored = smoothed(case)
    loss, nll = losses.next_token(logits, tokens, smoothing)
    close(jnp.mean(loss), stored)
    close(jnp.mean(nll), arrays["nll"])


@MASKED
def test_masked_second_stage(case):
    """Their targets begin with the start, where a masked model predicts nothing that counts."""
    assert case is not None, "no stored cases"
    arrays = case.arrays
    hidden = losses.hide(arrays["mask_len_u"], arrays["mask_score_u"])
    np.testing.assert_array_equal(hidden, arrays["train_src"][:, 1:] == MASK)
    tokens, visible = arrays["vq"], np.where(hidden, NO_TOKEN, arrays["vq"])
    np.testing.assert_array_equal(np.where(visible == NO_TOKEN, MASK, visible + SPECIALS), arrays["train_src"][:, 1:])
    logits = run(case, visible, None, arrays["sem"])
    close(logits, arrays["train_logits_target"][:, 1:])
    x, _ = run(case, visible, None, arrays["sem"], method="hidden")
    start = arrays["sem"].shape[1]
    close(run(case, x, method="logits")[:, start], arrays["train_logits_target"][:, 0])
    smoothing, stored = smoothed(case, "train_")
    loss, nll = losses.hidden_tokens(logits, tokens, hidden, smoothing)
    close(jnp.mean(loss), stored)
    close(jnp.mean(nll), arrays["train_nll"])


@MASKED
def test_masked_decoding(case):
    """Round after round with the stored draws and noise; ours begin where theirs ended, so an error stays in its round
    and is seen there."""
    assert case is not None, "no stored cases"
    arrays, config = case.arrays, case.info["config"]
    steps, b, n = arrays["decode_sampled"].shape
    counts = decoding.hidden_counts(n, steps)
    tokens = np.full((b, n), NO_TOKEN)
    np.testing.assert_array_equal(np.where(tokens == NO_TOKEN, MASK, tokens), arrays["decode_init"][:, -n:])
    for s in range(steps):
        logits = run(case, tokens, None, arrays["sem"])
        if f"decode_logits_step{s}" in arrays:
            close(logits, arrays[f"decode_logits_step{s}"])
        scale = config["choice_temperature"] * (1 - (s + 1) / steps)
        noise = scale * arrays["decode_gumbel"][s] if s < steps - 1 else np.zeros((b, n))
        log_p = decoding.token_log_probabilities(logits, config["temp"])
        tokens = decoding.refine(tokens, log_p, entry_to_token(arrays["decode_sampled"][s]), noise, counts[s])
        np.testing.assert_array_equal(tokens, entry_to_token(arrays["decode_tokens_after_step"][s, :, 1:]), str(s))
        assert (np.asarray(tokens) == NO_TOKEN).sum(1).tolist() == config["masked_after_step"][s]


def entry_to_token(entries):
    return np.where(entries == MASK, NO_TOKEN, entries - SPECIALS)


@OPTIMIZER
def test_top_k_and_top_p(case):
    """Their weights are those of the entries that remain; what they take as log probabilities is not normalised."""
    assert case is not None, "no stored cases"
    log_p = jnp.asarray(case.arrays["lprobs"])
    names = [name for name in case.arrays if name.startswith("top")]
    assert names
    for name in names:
        kind, number = name[:4], float(name[4:].removesuffix("_weights"))
        top_k, top_p = (number, 1.0) if kind == "topk" else (0, number)
        kept = decoding.truncate(log_p, jnp.int32(top_k), jnp.float32(top_p))
        stored = case.arrays[name]
        close(np.exp(kept), stored, name)
        np.testing.assert_array_equal(np.isfinite(kept), stored > 0, name)


def optim(lr, **fields):
    return Optim(**{"name": "fairseq_adam", "lr": lr, "b2": 0.98, "weight_decay": 0.01, **fields})


@OPTIMIZER
def test_adam(case):
    assert case is not None, "no stored cases"
    arrays, adam = case.arrays, case.info["config"]["adam"]
    b1, b2 = adam["betas"]
    section = optim(adam["lr"], b1=b1, b2=b2, eps=adam["eps"], weight_decay=adam["weight_decay"])
    transform, _ = make(section, 1, ())
    w = jnp.asarray(arrays["adam_w0"])
    state = transform.init(w)
    for gradient, stored in zip(arrays["adam_grads"], arrays["adam_w"]):
        updates, state = transform.update(jnp.asarray(gradient), state, w)
        w = optax.apply_updates(w, updates)
        np.testing.assert_allclose(w, stored, rtol=0, atol=5e-6)


@OPTIMIZER
def test_learning_rates(case):
    """The warm-up and length of the published runs: 6,250 of 1e-7 and more, 100,000."""
    assert case is not None, "no stored cases"
    arrays, warmup = case.arrays, {"warmup_steps": 6250, "warmup_from": 1e-7, "decay_after_steps": 6250}
    [inverse] = [name for name in arrays if name.startswith("lr_inverse_sqrt_")]
    [cosine] = [name for name in arrays if name.startswith("lr_cosine_") and name != "lr_cosine_steps"]
    lr = float(inverse.split("_")[-1])
    rate = schedule(optim(lr, schedule="inverse_sqrt", **warmup), 125_000)
    np.testing.assert_allclose([rate(n) for n in arrays["lr_steps"]], arrays[inverse], rtol=1e-5, atol=1e-6 * lr)
    rate = schedule(optim(float(cosine.split("_")[-1]), schedule="cosine"), 100_000)
    np.testing.assert_allclose([rate(step) for step in arrays["lr_cosine_steps"]], arrays[cosine], rtol=1e-5, atol=1e-7)


DECODERS = [case for array in ("sem_tokens", "logits_all", "decode_init") for case in cases("digit", array)]


@pytest.mark.parametrize("case", DECODERS)
def test_what_the_shapes_tell_need_not_be_given(case):
    assert case is not None, "no stored cases"
    module, _, family = load(case)
    heads = case.info["config"]["decoder_attention_heads"]
    assert from_reference(family, case.state_dict, decoder_attention_heads=heads)[0] == module
    assert isinstance(module, DiGIT)
