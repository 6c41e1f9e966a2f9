"""The objective of the diffusion backbones: the loss of a process, and its samplers with guidance.

The backbone is `apply(params, x, t, y, train=False, keys=None, augment=None)`; in training it gets one key per example
and, where the config asks for augmented images, how each of them was.
"""

import inspect
from collections.abc import Callable, Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from ml_collections import ConfigDict

from diffjax import models, rng
from diffjax.diffusion import create_process, guidance, samplers, weighting
from diffjax.diffusion.gaussian import GaussianDiffusion
from diffjax.diffusion.samplers import AdaptivePlan, Plan
from diffjax.diffusion.tables import AnyProcess
from diffjax.errors import UserError
from diffjax.ops import augment
from diffjax.training.objective.base import Apply, Objective
from diffjax.training.step import Batch, Metrics


def build_model(config: ConfigDict) -> nn.Module:
    """The backbone of a config; its input, output and label table follow from the data and the process."""
    process = build_process(config)
    model: Any = models.create(
        **config.model,
        channels=config.data.channels,
        num_classes=config.data.num_classes,
        null_class=config.diffusion.label_drop > 0,
        learn_sigma=isinstance(process, GaussianDiffusion) and process.variance == "learned_range",
    )
    if drops_labels(model):
        model = model.clone(label_drop=config.diffusion.label_drop)
    model.check_input(config.data.size, config.data.size)
    return model


def drops_labels(model: nn.Module) -> bool:
    """Whether the backbone drops labels by itself in training, in several places; else the loss does, once."""
    return getattr(model, "label_drop_per_level", False)


def build_objective(config: ConfigDict, *, autoguided: bool = False) -> Objective:
    """The objective of a config. Raises UserError for unknown or contradictory options.

    autoguided: `sampling.guidance` is the weight of a guide that `sample` will be given, not of the null class.
    """
    diffusion, sampling = config.diffusion, config.sampling
    if not 0 <= diffusion.label_drop < 1:
        raise UserError(f"diffusion.label_drop = {diffusion.label_drop}: valid: 0 (no null class) to below 1")
    if autoguided and sampling.guidance == 1.0:
        raise UserError("sampling.guidance = 1.0 leaves a guide without effect; valid: another weight, such as 2")
    if not autoguided and sampling.guidance != 1.0 and not (diffusion.label_drop and config.data.num_classes):
        raise UserError("sampling.guidance needs a null class: data.num_classes and diffusion.label_drop above 0")
    if not 0 <= sampling.guidance_channels <= config.data.channels:
        raise UserError(
            f"sampling.guidance_channels = {sampling.guidance_channels}: valid: 0 (all) to {config.data.channels}"
        )
    if sampling.guidance_calls not in ("", *guidance.CALLS):
        raise UserError(f"sampling.guidance_calls = {sampling.guidance_calls!r}: valid: {', '.join(guidance.CALLS)}")
    if autoguided and sampling.guidance_calls == "one":
        raise UserError(
            "sampling.guidance_calls = 'one': a guide is another network with a call of its own; valid: two"
        )
    _check_augment(config)
    process = build_process(config)
    plan = sampling_plan(config, process)
    if sampling.clip and not samplers.can_clip(plan):
        raise UserError(
            f"sampling.clip limits x0, which sampler {sampling.sampler!r} does not go through; valid: false, or "
            f"sampling.sampler of {', '.join(samplers.THROUGH_X0)}"
        )
    makes = "pictures" if config.data.channels in (1, 3) else f"latents of {config.data.channels} channels"
    return Objective(_training_loss(config, process), _sampler(config), lambda: plan, makes)


def _check_augment(config: ConfigDict) -> None:
    """Raise UserError unless the images can be augmented as asked, and the backbone be told."""
    data = config.data
    given = f"data.augment = {data.augment}"
    if not 0 <= data.augment <= 1:
        raise UserError(f"{given}: valid: 0 (none) or a probability up to 1")
    if not data.augment:
        return
    if data.name == "latents":
        raise UserError(f"{given} is for pixels, and data.name = 'latents' has none; valid: 0")
    if data.flip:
        raise UserError(f"{given} mirrors half of the images by itself, and tells the model; valid: data.flip=false")
    if getattr(build_model(config), "augment_labels", 0) != augment.LABELS:
        told = [name for name, family in models.FAMILIES.items() if hasattr(family, "augment_labels")]
        raise UserError(
            f"{given} needs a model that is told how an image was augmented, which {config.model.name} as given is "
            f"not; valid: 0, or a {', '.join(told)} with augment_labels = {augment.LABELS}"
        )


def build_process(config: ConfigDict) -> AnyProcess:
    """The diffusion process of a config; what the config leaves at "" and 0 belongs to the process."""
    diffusion = config.diffusion
    named = {
        "prediction": diffusion.prediction,
        "weighting": diffusion.weighting,
        "times": diffusion.times,
        "variance": diffusion.variance,
        "loss": diffusion.loss,
        "steps": diffusion.steps or "",
    }
    numbers = parse_pairs("diffusion.options", diffusion.options)
    if leaves := sorted(named.keys() & numbers.keys()):
        raise UserError(f"diffusion.options = {diffusion.options!r}: diffusion.{leaves[0]} is a leaf of its own")
    return create_process(diffusion.process, **named, **numbers)


def sampling_plan(config: ConfigDict, process: AnyProcess, max_steps: int | None = None) -> Plan | AdaptivePlan:
    """The plan of a config's sampler and guidance, with room for `max_steps`."""
    sampling = config.sampling
    options = parse_pairs("sampling.options", sampling.options)
    if others := sorted(inspect.signature(samplers.plan).parameters.keys() & options.keys()):
        raise UserError(f"sampling.options = {sampling.options!r}: {others[0]!r} is no option of a sampler")
    weight = guidance_weight(sampling)
    return samplers.plan(process, sampling.sampler, sampling.steps, max_steps=max_steps, weight=weight, **options)


def guidance_weight(sampling: ConfigDict) -> samplers.Weight:
    """The guidance weight of each step that `sampling.guidance` and `sampling.guidance_weights` ask for."""
    kind, _, text = sampling.guidance_weights.partition(",")
    if kind and sampling.guidance == 1.0:
        raise UserError(f"sampling.guidance_weights = {sampling.guidance_weights!r} needs a sampling.guidance beside 1")
    return guidance.weights(kind or "constant", sampling.guidance, **parse_pairs("sampling.guidance_weights", text))


def parse_pairs(leaf: str, text: str) -> dict[str, Any]:
    """{"eta": 1, "last_step": "mean"} of "eta=1,last_step=mean": numbers where they read as numbers, else words."""
    pairs: dict[str, Any] = {}
    for item in text.split(",") if text else ():
        name, _, value = item.partition("=")
        if not name.isidentifier() or not value or name in pairs:
            raise UserError(f"{leaf}: {item!r} is not understood; valid: name=value,name=value, each name once")
        pairs[name] = _number_or_word(value)
    return pairs


def _number_or_word(text: str) -> int | float | str:
    for kind in (int, float):
        try:
            number = kind(text)
        except ValueError:
            continue
        if number != number:
            raise UserError(f"{text!r} is not a number; valid: numbers and words")
        return number
    return text


def example(config: ConfigDict) -> tuple[jax.Array, jax.Array, jax.Array | None]:
    """Blank x, t and y of one example."""
    data = config.data
    y = jnp.zeros((1,), jnp.int32) if data.num_classes else None
    return jnp.zeros((1, data.size, data.size, data.channels)), jnp.zeros((1,)), y


def init_extra(config: ConfigDict) -> dict[str, Any]:
    """Parameters that belong to the loss and not to the backbone, by their place beside those of the backbone."""
    return {"uncertainty": weighting.init_uncertainty()} if build_process(config).uncertainty else {}


EXTRA_AXES = (("uncertainty/kernel", (None,)),)  # their logical axes, as the models' own


def _log_variance(process: Any, params: Any, t: jax.Array) -> Mapping[str, jax.Array]:
    """The log variance that the loss of some processes asks for."""
    if not process.uncertainty:
        return {}
    return {"log_variance": weighting.uncertainty(params["uncertainty"], process.noise_level(t))}


def _training_loss(config: ConfigDict, process: Any) -> Callable:
    drop = 0.0 if drops_labels(build_model(config)) else config.diffusion.label_drop
    null, probability = config.data.num_classes, config.data.augment

    def loss(apply: Apply, params: Any, batch: Batch, key: jax.Array) -> tuple[jax.Array, Metrics]:
        def keys(stream: str) -> jax.Array:
            return rng.per_example(rng.fold_name(key, stream), batch["index"])

        x0, told = batch["image"], {}
        if probability:
            x0, told["augment"] = augment.augment(x0, keys("augment"), probability)
        t = process.sample_times(keys("time"))
        eps = rng.normal(keys("noise"), x0.shape[1:])
        dropped = rng.uniform(keys("label_drop")) < drop
        y = jnp.where(dropped, null, batch["label"]) if null else None
        xt = process.q_sample(x0, t, eps)
        scale = process.input_scale(t).reshape(-1, 1, 1, 1)
        output = apply(params, scale * xt, process.model_time(t), y, train=True, keys=keys("dropout"), **told)
        losses = process.losses(output, x0, xt, t, eps, **_log_variance(process, params, t))
        terms = {name: jnp.mean(value) for name, value in losses.items()}
        return terms.pop("loss"), terms

    return loss


def _sampler(config: ConfigDict) -> Callable:
    sampling, data = config.sampling, config.data
    shape = (data.size, data.size, data.channels)
    channels = sampling.guidance_channels or None
    skip = sampling.guidance_weights.startswith("interval")  # the weight is 1 in many steps

    def sample(
        apply: Apply,
        params: Any,
        labels: jax.Array,
        keys: jax.Array,
        plan: Plan | AdaptivePlan,
        guide: Callable[..., jax.Array] | None = None,
    ) -> jax.Array:
        def network(x: jax.Array, t: jax.Array, y: jax.Array) -> jax.Array:
            return apply(params, x, t, y if data.num_classes else None)

        def plain(x: jax.Array, t: jax.Array, weight: Any = None) -> jax.Array:
            return network(x, t, labels)

        denoise: samplers.Denoise = plain
        if guide is not None:
            worse = lambda x, t: guide(x, t, labels if data.num_classes else None)  # noqa: E731
            denoise = guidance.autoguidance(plain, worse, channels=channels, skip=skip)
        elif sampling.guidance != 1.0:
            denoise = guidance.classifier_free(
                network, labels, data.num_classes, channels=channels, calls=sampling.guidance_calls or "one", skip=skip
            )
        x, noise = samplers.initial_noise(keys, shape), samplers.step_noise(keys, shape)
        return samplers.sample(plan, denoise, x, noise, sampling.clip)

    return sample
