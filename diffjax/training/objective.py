"""Objectives: what a run optimises and how it makes images, as two pure functions.

    loss(apply, params, batch, key) -> (scalar, metrics)          batch: image [b,h,w,c], label [b], index [b]
    sample(apply, params, labels, keys) -> images [b,h,w,c]       one key per image

`apply(params, x, t, y, train=False, keys=None)` is the backbone; in training it gets one key per example. The training
loop knows nothing else of the method.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from ml_collections import ConfigDict

from diffjax import models, rng
from diffjax.diffusion import gaussian, guidance, samplers
from diffjax.errors import UserError
from diffjax.training.step import Batch, Metrics

Apply = Callable[..., jax.Array]
SAMPLERS = ("ddpm", "ddim")


@dataclass(frozen=True)
class Objective:
    loss: Callable[[Apply, Any, Batch, jax.Array], tuple[jax.Array, Metrics]]
    sample: Callable[[Apply, Any, jax.Array, jax.Array], jax.Array]


def build_model(config: ConfigDict) -> nn.Module:
    """The backbone of a config; its input, output and label table follow from the data and the process."""
    model: Any = models.create(
        **config.model,
        channels=config.data.channels,
        num_classes=config.data.num_classes,
        null_class=config.diffusion.label_drop > 0,
        learn_sigma=config.diffusion.variance == "learned_range",
    )
    if drops_labels(model):
        model = model.clone(label_drop=config.diffusion.label_drop)
    model.check_input(config.data.size, config.data.size)
    return model


def drops_labels(model: nn.Module) -> bool:
    """Whether the backbone drops labels by itself in training, in several places; else the loss does, once."""
    return getattr(model, "label_drop_per_level", False)


def build_objective(config: ConfigDict) -> Objective:
    """The objective of a config. Raises UserError for unknown or contradictory options."""
    diffusion = config.diffusion
    if diffusion.process != "gaussian":
        raise UserError(f"diffusion.process = {diffusion.process!r} is unknown; valid: gaussian")
    if not 0 <= diffusion.label_drop < 1:
        raise UserError(f"diffusion.label_drop = {diffusion.label_drop}: valid: 0 (no null class) to below 1")
    sampling = config.sampling
    if sampling.guidance != 1.0 and not (diffusion.label_drop and config.data.num_classes):
        raise UserError("sampling.guidance needs a null class: data.num_classes and diffusion.label_drop above 0")
    if not 0 <= sampling.guidance_channels <= config.data.channels:
        raise UserError(
            f"sampling.guidance_channels = {sampling.guidance_channels}: valid: 0 (all) to {config.data.channels}"
        )
    if sampling.eta < 0 or (sampling.eta and sampling.sampler != "ddim"):
        raise UserError(f"sampling.eta = {sampling.eta}: it belongs to ddim, and is not negative")
    if sampling.sampler not in SAMPLERS:
        raise UserError(f"sampling.sampler = {sampling.sampler!r} is unknown; valid: {', '.join(SAMPLERS)}")
    return Objective(_training_loss(config), _sampler(config))


def _process(diffusion: ConfigDict, respacing: str = "") -> gaussian.GaussianDiffusion:
    return gaussian.gaussian_diffusion(
        respacing=respacing,
        prediction=diffusion.prediction,
        variance=diffusion.variance,
        loss=diffusion.loss,
        num_steps=diffusion.steps,
    )


def bind(model: nn.Module) -> Apply:
    """`apply(params, x, t, y, train=False, keys=None)` of a model."""

    def apply(
        params: Any,
        x: jax.Array,
        t: jax.Array,
        y: jax.Array | None,
        train: bool = False,
        keys: jax.Array | None = None,
    ) -> Any:
        return model.apply({"params": params}, x, t, y, train=train, keys=keys)

    return apply


def _training_loss(config: ConfigDict) -> Callable:
    process = _process(config.diffusion)
    drop = 0.0 if drops_labels(build_model(config)) else config.diffusion.label_drop
    null = config.data.num_classes

    def loss(apply: Apply, params: Any, batch: Batch, key: jax.Array) -> tuple[jax.Array, Metrics]:
        def keys(stream: str) -> jax.Array:
            return rng.per_example(rng.fold_name(key, stream), batch["index"])

        x0 = batch["image"]
        k = process.sample_times(keys("time"))
        eps = rng.normal(keys("noise"), x0.shape[1:])
        dropped = rng.uniform(keys("label_drop")) < drop
        y = jnp.where(dropped, null, batch["label"]) if null else None
        xt = process.q_sample(x0, k, eps)
        output = apply(params, xt, process.model_time(k), y, train=True, keys=keys("dropout"))
        terms = {name: jnp.mean(value) for name, value in process.losses(output, x0, xt, k, eps).items()}
        return terms.pop("loss"), terms

    return loss


def _sampler(config: ConfigDict) -> Callable:
    sampling, data = config.sampling, config.data
    respacing = f"ddim{sampling.steps}" if sampling.sampler == "ddim" else str(sampling.steps)
    process = _process(config.diffusion, respacing)
    shape = (data.size, data.size, data.channels)

    def sample(apply: Apply, params: Any, labels: jax.Array, keys: jax.Array) -> jax.Array:
        def denoise_labelled(x: jax.Array, t: jax.Array, y: jax.Array) -> jax.Array:
            return apply(params, x, t, y if data.num_classes else None)

        denoise = guidance.classifier_free(
            denoise_labelled,
            labels,
            null_label=data.num_classes,
            scale=sampling.guidance,
            channels=sampling.guidance_channels or None,
        )
        x, noise = samplers.initial_noise(keys, shape), samplers.step_noise(keys, shape)
        if sampling.sampler == "ddpm":
            return samplers.ddpm(process, denoise, x, noise, clip=sampling.clip)
        return samplers.ddim(process, denoise, x, noise, eta=sampling.eta, clip=sampling.clip)

    return sample
