"""The objective of models of codes (DiGIT, arXiv 2410.12490): codes are predicted, drawn, and turned into pixels.

    stage 1    codes of image features, one after the other, of a class or of none
    stage 2    codes of a decoder to pixels, given those of the features: one after the other, or in a few rounds

The backbone is `apply(params, codes, y, source, train=False, keys=None)`; in training it gets one key per example.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.tree_util import Partial
from ml_collections import ConfigDict

from diffjax import models, rng
from diffjax.data import tokens as records
from diffjax.errors import UserError
from diffjax.ops.dictionary import NO_CODE
from diffjax.tokens import decoding, losses, pixels
from diffjax.tokens.kmeans import read_codebook
from diffjax.training.encoders import load_vqgan_decoder, stated
from diffjax.training.objective.base import Apply, Objective
from diffjax.training.step import Batch, Metrics


class Plan(NamedTuple):
    """How codes are drawn, and the function, with its parameters, that makes images of them; None: nothing does."""

    how: decoding.Choice
    decode: Partial | None


def has_source(config: ConfigDict) -> bool:
    """Whether this is a second stage."""
    if config.data.channels not in (1, 2):
        raise UserError(f"data.channels = {config.data.channels} kinds of codes; valid: 1, or 2 for a second stage")
    return config.data.channels == 2


def check_made_as_stated(config: ConfigDict) -> None:
    """Raise UserError unless the codes in `data.dir` were made of images as the config says."""
    found = records.read_manifest(Path(config.data.dir))["streams"][0]["encoder"]
    differing = {name: value for name, value in stated(config).items() if found.get(name) != value}
    if wrong := [f"{name} = {found.get(name)}, not {value}" for name, value in differing.items()]:
        raise UserError(f"the codes in {config.data.dir} were made with {'; '.join(wrong)}, as the config says")


def build_model(config: ConfigDict) -> nn.Module:
    """The backbone of a config; its dictionary and label table follow from the data."""
    data = config.data
    sizes = {"codes": data.decoder_codes, "source_codes": data.codes} if has_source(config) else {"codes": data.codes}
    null_class = config.tokens.label_drop > 0
    model: Any = models.create(**config.model, **sizes, num_classes=data.num_classes, null_class=null_class)
    model.check_input(data.size, data.size)
    return model


def build_objective(config: ConfigDict) -> Objective:
    """The objective of a config. Raises UserError for options that contradict each other."""
    model: Any = build_model(config)
    _check(config, model.causal)
    decodes = _decoder(config) is not None
    makes = "pictures" if decodes else f"codes of {'a decoder' if has_source(config) else config.data.encoder}"
    return Objective(_training_loss(config, model), _sampler(config, model), lambda: plan(config), makes)


def _check(config: ConfigDict, causal: bool) -> None:
    tokens, sampling = config.tokens, config.sampling
    for leaf, value in (("tokens.label_drop", tokens.label_drop), ("tokens.smoothing", tokens.smoothing)):
        if not 0 <= value < 1:
            raise UserError(f"{leaf} = {value}: valid: 0 to below 1")
    if sampling.guidance != 1.0 and not tokens.label_drop:
        raise UserError("sampling.guidance needs a null class: data.num_classes and tokens.label_drop above 0")
    if causal and sampling.rounds:
        raise UserError(f"sampling.rounds = {sampling.rounds} is for masked models (causal = false); valid: 0")
    if not causal and (sampling.rounds < 1 or (sampling.top_k, sampling.top_p) != (0, 1.0)):
        raise UserError(
            "a masked model (causal = false) draws from all codes in sampling.rounds of 1 or more; valid with "
            "sampling.top_k = 0 and sampling.top_p = 1"
        )
    if not causal and sampling.temperature == 0:
        raise UserError("sampling.temperature = 0.0: a masked model (causal = false) draws; valid: above 0")
    _choice(config)


def _choice(config: ConfigDict) -> decoding.Choice:
    data, sampling = config.data, config.sampling
    return decoding.choice(
        data.decoder_codes if has_source(config) else data.codes,
        temperature=sampling.temperature,
        top_k=sampling.top_k,
        top_p=sampling.top_p,
        guidance=sampling.guidance,
    )


def plan(config: ConfigDict, decoded: bool = True) -> Plan:
    """How a config draws codes, and what they are `decoded` with, read from its files."""
    read = _decoder(config) if decoded else None
    return Plan(_choice(config), read(config) if read else None)


def _decoder(config: ConfigDict) -> Callable[[ConfigDict], Partial] | None:
    """What reads the function that makes images of the model's codes; None where there is none."""
    if not has_source(config) and config.data.encoder == "pixels":
        return _centroids
    return _vqgan if _vqgan_folder(config) else None


def _vqgan_folder(config: ConfigDict) -> str:
    """The weights that make pixels of the codes, if the config names them."""
    if has_source(config):
        return config.tokens.decoder
    return config.tokens.weights if config.data.encoder == "vqgan" else ""


def _vqgan(config: ConfigDict) -> Partial:
    folder = _vqgan_folder(config)
    decode, sha256 = load_vqgan_decoder(folder, "tokens.decoder" if has_source(config) else "tokens.weights")
    stream = records.read_manifest(Path(config.data.dir))["streams"][-1]
    if stream["encoder"].get("weights_sha256") != sha256:
        raise UserError(f"the codes in {config.data.dir} were not made with the weights in {folder}")
    return decode


def _centroids(config: ConfigDict) -> Partial:
    """Codes of patches of pixels become the centroids of their clusters, which are patches, too."""
    folder = Path(config.data.dir)
    stream = records.read_manifest(folder)["streams"][0]
    codebook = read_codebook(folder / records.CODEBOOK)
    if records.codebook_sha256(codebook) != stream["codebook_sha256"]:
        raise UserError(f"{folder / records.CODEBOOK} is not the codebook that the codes beside it were made with")
    return Partial(pixels.Decode(stream["encoder"]["patch"], config.data.size), codebook)


def example(config: ConfigDict) -> tuple[jax.Array, jax.Array | None, jax.Array | None]:
    """Blank codes, label and source of one example."""
    codes = jnp.zeros((1, config.data.size**2), jnp.int32)
    y = jnp.zeros((1,), jnp.int32) if config.data.num_classes else None
    return codes, y, codes if has_source(config) else None


def _training_loss(config: ConfigDict, model: Any) -> Callable:
    null, drop, smoothing = config.data.num_classes, config.tokens.label_drop, config.tokens.smoothing

    def loss(apply: Apply, params: Any, batch: Batch, key: jax.Array) -> tuple[jax.Array, Metrics]:
        def keys(stream: str) -> jax.Array:
            return rng.per_example(rng.fold_name(key, stream), batch["index"])

        codes = batch["image"][:, -1]
        source = batch["image"][:, 0] if has_source(config) else None
        dropped = rng.uniform(keys("label_drop")) < drop
        y = jnp.where(dropped, null, batch["label"]) if null else None
        if model.causal:
            logits = apply(params, codes, y, source, train=True, keys=keys("dropout"))
            terms = losses.next_code(logits, codes, smoothing)
        else:
            hidden = losses.hide(rng.uniform(keys("hidden")), rng.uniform(keys("place"), codes.shape[1:]))
            seen = jnp.where(hidden, NO_CODE, codes)
            logits = apply(params, seen, y, source, train=True, keys=keys("dropout"))
            terms = losses.hidden_codes(logits, codes, hidden, smoothing)
        smoothed, nll = (jnp.mean(term) for term in terms)
        return smoothed, {"nll": nll}

    return loss


def _sampler(config: ConfigDict, model: Any) -> Callable:
    data, sampling = config.data, config.sampling
    length = data.size**2

    def in_order(apply: Apply, params: Any, y: Any, source: Any, keys: jax.Array, how: decoding.Choice) -> jax.Array:
        rows = len(keys)
        if sampling.guidance != 1.0:  # every example twice, with its label and with none
            rows, y = 2 * rows, jnp.stack([y, jnp.full_like(y, data.num_classes)], axis=1).reshape(-1)
        cache = apply(params, rows, length, length if has_source(config) else 0, method="init_cache")
        logits, cache = apply(params, cache, y, source, method="prefill")
        step = Partial(apply, params, method="step")
        return decoding.generate(step, logits, cache, keys, length, how)

    def in_rounds(apply: Apply, params: Any, y: Any, source: Any, keys: jax.Array, how: decoding.Choice) -> jax.Array:
        predict = lambda codes: apply(params, codes, y, source)  # noqa: E731
        return decoding.fill(
            predict, keys, length, sampling.rounds, how.temperature, choice_temperature=sampling.choice_temperature
        )

    def sample(
        apply: Apply, params: Any, labels: jax.Array, keys: jax.Array, plan: Plan, guide: None = None
    ) -> jax.Array:
        y, source = (None, labels) if has_source(config) else (labels if data.num_classes else None, None)
        draw = in_order if model.causal else in_rounds
        codes = draw(apply, params, y, source, keys, plan.how)
        return codes if plan.decode is None else plan.decode(codes)

    return sample
