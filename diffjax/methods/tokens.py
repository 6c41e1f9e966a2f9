"""Training of token models (DiGIT, arXiv 2410.12490): tokens are predicted, drawn, and turned into pixels.

    stage 1    tokens of image features, one after the other, of a class or of none
    stage 2    tokens of a decoder to pixels, given those of the features: one after the other, or in a few rounds

The backbone is `apply(params, tokens, y, source, train=False, keys=None)`; in training it gets one key per example.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import jax
import jax.numpy as jnp
from jax.tree_util import Partial

from diffjax import rng
from diffjax.contracts import (
    Apply,
    Batch,
    Condition,
    DataSpec,
    Decoder,
    MakeModel,
    Method,
    MethodRecord,
    Metrics,
    Sampler,
    Tree,
)
from diffjax.data import tokens as records
from diffjax.errors import UserError
from diffjax.methods.diffusion import dropped, mean_of
from diffjax.methods.encoders import load_vqgan_decoder
from diffjax.ops.vocabulary import NO_TOKEN
from diffjax.options import Leaf, at_least, between, fraction, one_of
from diffjax.tokens import decoding, losses, pixels
from diffjax.tokens.codebooks import read_codebook
from diffjax.tokens.kmeans import INITS


@dataclass(frozen=True)
class Tokens:
    """Section `tokens`: how images become tokens, and how these are learned."""

    label_drop: Annotated[float, Leaf("probability of the null class in training", valid=fraction("no null"))] = 0.0
    smoothing: Annotated[float, Leaf("of the target distribution", valid=fraction())] = 0.0
    patch: Annotated[int, Leaf("encoder pixels: side of a patch", valid=at_least(0))] = 0
    weights: Annotated[str, Leaf("encoders dinov2 and vqgan: folder that `convert` wrote", "place")] = ""
    layer: Annotated[int, Leaf("encoder dinov2: whose output the features are, from the last", valid=at_least(1))] = 3
    decoder: Annotated[str, Leaf("VQGAN that decodes tokens to pixels: folder that `convert` wrote", "place")] = ""
    mirrored: Annotated[bool, Leaf("also make tokens of the mirrored images, for data.flip")] = False
    fit_images: Annotated[int, Leaf("images that the codebook is fitted to", valid=at_least(0, "all"))] = 0
    init: Annotated[str, Leaf("how k-means begins", valid=one_of(INITS))] = "random"
    iterations: Annotated[int, Leaf("of k-means", valid=at_least(1))] = 20
    seed: Annotated[int, Leaf("of k-means", valid=between(0, 2**31 - 1))] = 1234


@dataclass(frozen=True)
class Decoding:
    """Section `sampling.tokens`."""

    temperature: Annotated[float, Leaf("logits are divided by it; 0: the most probable", "watch", at_least(0))] = 1.0
    top_k: Annotated[int, Leaf("only so many most probable tokens", "watch", at_least(0, "all"))] = 0
    top_p: Annotated[float, Leaf("only the most probable tokens up to this probability", "watch", between(0, 1))] = 1.0
    rounds: Annotated[int, Leaf("masked models: rounds in which all tokens are drawn", "watch", at_least(0))] = 0
    choice_temperature: Annotated[
        float, Leaf("masked models: of the noise on which tokens to keep", "watch", at_least(0))
    ] = 4.5


@dataclass(frozen=True)
class Guidance:
    """Section `sampling.guidance` of tokens."""

    scale: Annotated[float, Leaf("weight; 1: none", "watch")] = 1.0


@dataclass(frozen=True)
class Sampling:
    """Section `sampling` of tokens."""

    tokens: Decoding = field(default_factory=Decoding)
    guidance: Guidance = field(default_factory=Guidance)


def build(make_model: MakeModel, data: DataSpec, options: Tokens) -> Method:
    """The method of a config. Raises UserError for options that contradict each other."""
    if data.name != "tokens":
        raise UserError(f"data.name = {data.name!r}: method 'tokens' is trained on tokens; valid: tokens")
    if data.channels not in (1, 2):
        raise UserError(f"data.channels = {data.channels} codebooks; valid: 1, or 2 for a second stage")
    second = data.channels == 2
    features, decoder_tokens = (int(str(data.options[leaf])) for leaf in ("vocabulary", "decoder_vocabulary"))
    vocabulary, source_vocabulary = (decoder_tokens, features) if second else (features, 0)
    num_classes = data.condition.count if data.condition and data.condition.kind == "labels" else 0
    null = options.label_drop > 0
    model: Any = make_model(
        vocabulary=vocabulary, source_vocabulary=source_vocabulary, num_classes=num_classes, null_class=null
    )
    model.check_input(data.size, data.size)
    terms = training_terms(data, second, options, model.causal)
    blank = jnp.zeros((1, data.size**2), jnp.int32)
    decoder = decoder_of(data, options, second)
    return Method(
        model=model,
        inputs=(blank, jnp.zeros((1,), jnp.int32) if num_classes else None, blank if second else None),
        condition=Condition("tokens", source_vocabulary, (data.size**2,)) if second else data.condition,
        loss=mean_of(terms),
        terms=terms,
        sampler=partial(make_sampler, data, second, null, model),
        makes="pictures" if decoder else f"tokens of {'a decoder' if second else data.options['encoder']}",
        decoder=decoder,
        takes_source=second,
    )


def training_terms(data: DataSpec, second: bool, options: Tokens, causal: bool) -> Any:
    """`contracts.Terms`: of a causal model the next tokens, of a masked one those that are hidden."""
    null = data.condition.null() if data.condition and not second else None
    drop, smoothing = options.label_drop, options.smoothing

    def terms(
        apply: Apply, params: Tree, frozen: Tree, batch: Batch, key: jax.Array, train: bool = True
    ) -> tuple[Metrics, jax.Array]:
        def keys(stream: str) -> jax.Array:
            return rng.per_example(rng.fold_name(key, stream), batch.index)

        tokens, source = batch.x, batch.condition if second else None
        y = None if null is None else batch.condition
        if y is not None and train:
            y = dropped(y, null, rng.uniform(keys("label_drop")) < drop)
        if causal:
            logits = apply(params, tokens, y, source, train=train, keys=keys("dropout"))
            smoothed, nll = losses.next_token(logits, tokens, smoothing)
            return {"loss": smoothed, "nll": nll}, jnp.zeros(len(tokens))
        hidden = losses.hide(rng.uniform(keys("hidden")), rng.uniform(keys("place"), tokens.shape[1:]))
        seen = jnp.where(hidden, NO_TOKEN, tokens)
        logits = apply(params, seen, y, source, train=train, keys=keys("dropout"))
        smoothed, nll = losses.hidden_tokens(logits, tokens, hidden, smoothing)
        return {"loss": smoothed, "nll": nll}, jnp.mean(hidden, axis=1)

    return terms


def make_sampler(
    data: DataSpec,
    second: bool,
    null: bool,
    model: Any,
    sampling: Sampling,
    *,
    autoguided: bool = False,
    max_steps: int | None = None,
) -> Sampler:
    """The sampler of a token model. UserError for options that contradict each other."""
    if autoguided:
        raise UserError("autoguidance is for diffusion backbones, and this is a token model")
    given, scale = sampling.tokens, sampling.guidance.scale
    check_decoding(given, scale, null, model.causal)
    params = decoding.sampling_params(
        model.vocabulary, temperature=given.temperature, top_k=given.top_k, top_p=given.top_p, guidance=scale
    )
    return Sampler(sample_function(data, second, model, given, scale), params)


def check_decoding(given: Decoding, scale: float, null: bool, causal: bool) -> None:
    if scale != 1.0 and not null:
        raise UserError("sampling.guidance.scale needs a null class: data.num_classes and tokens.label_drop above 0")
    if causal and given.rounds:
        raise UserError(f"sampling.tokens.rounds = {given.rounds} is for masked models (causal = false); valid: 0")
    if causal and given.choice_temperature != Decoding.choice_temperature:
        raise UserError("sampling.tokens.choice_temperature is for masked models (causal = false)")
    if not causal and (given.rounds < 1 or (given.top_k, given.top_p) != (0, 1.0)):
        raise UserError(
            "a masked model (causal = false) draws from all tokens in sampling.tokens.rounds of 1 or more; valid with "
            "sampling.tokens.top_k = 0 and sampling.tokens.top_p = 1"
        )
    if not causal and given.temperature == 0:
        raise UserError("sampling.tokens.temperature = 0.0: a masked model (causal = false) draws; valid: above 0")


def sample_function(data: DataSpec, second: bool, model: Any, given: Decoding, scale: float) -> Callable[..., Any]:
    """`contracts.Sampler.sample`."""
    length, num_classes = data.size**2, model.num_classes

    def in_order(
        apply: Apply, params: Tree, y: Any, source: Any, keys: jax.Array, how: decoding.SamplingParams
    ) -> jax.Array:
        rows = len(keys)
        if scale != 1.0:  # every example twice, with its label and with none
            rows, y = 2 * rows, jnp.stack([y, jnp.full_like(y, num_classes)], axis=1).reshape(-1)
        cache = apply(params, rows, length, length if second else 0, method="init_cache")
        logits, cache = apply(params, cache, y, source, method="prefill")
        step = Partial(apply, params, method="step")
        return decoding.generate(step, logits, cache, keys, length, how)

    def in_rounds(
        apply: Apply, params: Tree, y: Any, source: Any, keys: jax.Array, how: decoding.SamplingParams
    ) -> jax.Array:
        predict = lambda tokens: apply(params, tokens, y, source)  # noqa: E731
        return decoding.fill(
            predict, keys, length, given.rounds, how.temperature, choice_temperature=given.choice_temperature
        )

    def sample(
        apply: Apply,
        params: Tree,
        sampling: decoding.SamplingParams,
        conditions: jax.Array,
        keys: jax.Array,
        guide: None = None,
    ) -> jax.Array:
        y, source = (None, conditions) if second else (conditions if num_classes else None, None)
        draw = in_order if model.causal else in_rounds
        return draw(apply, params, y, source, keys, sampling)

    return sample


def decoder_of(data: DataSpec, options: Tokens, second: bool) -> Decoder | None:
    """The decoder from the model's tokens to images; None where there is none."""
    if not second and data.options["encoder"] == "pixels":
        return Decoder(lambda: load_centroids(data))
    leaf = "tokens.decoder" if second else "tokens.weights"
    folder = options.decoder if second else options.weights if data.options["encoder"] == "vqgan" else ""
    return Decoder(lambda: load_vqgan(data, folder, leaf)) if folder else None


def load_vqgan(data: DataSpec, folder: str, leaf: str) -> Partial:
    decode, sha256 = load_vqgan_decoder(folder, leaf)
    stream = records.read_manifest(Path(str(data.options["dir"])))["streams"][-1]
    if stream["encoder"].get("weights_sha256") != sha256:
        raise UserError(f"the tokens in {data.options['dir']} were not made with the weights in {folder}")
    return decode


def load_centroids(data: DataSpec) -> Partial:
    """Tokens of patches of pixels become the centroids of their clusters, which are patches, too."""
    folder = Path(str(data.options["dir"]))
    stream = records.read_manifest(folder)["streams"][0]
    codebook = read_codebook(folder / records.CODEBOOK)
    if records.codebook_sha256(codebook) != stream["codebook_sha256"]:
        raise UserError(f"{folder / records.CODEBOOK} is not the codebook that the tokens beside it were made with")
    return Partial(pixels.Decode(stream["encoder"]["patch"], data.size), codebook)


RECORD = MethodRecord(
    build, Tokens, Sampling, unread=("data.augment", "data.condition", "data.condition_size"), images=True
)
