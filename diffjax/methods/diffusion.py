"""Training by the loss of a diffusion process, and its samplers with guidance.

The backbone is `apply(params, x, t, y, train=False, keys=None, augment=None)`, with one key per example in training and
`augment` [b, k], the augmentation parameters of each example, where images are augmented.
"""

import dataclasses
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import jax
import jax.numpy as jnp
import numpy as np

from diffjax import models, rng
from diffjax.contracts import Apply, Batch, DataSpec, Decoder, MakeModel, Method, MethodRecord, Metrics, Sampler, Tree
from diffjax.data.latents import scaling
from diffjax.diffusion import PROCESSES, create_process, guidance, samplers, weighting
from diffjax.diffusion.gaussian import GaussianDiffusion
from diffjax.diffusion.samplers import AdaptiveSchedule, SamplerSchedule
from diffjax.diffusion.sigma_grids import AnyProcess
from diffjax.errors import UserError
from diffjax.methods import latents
from diffjax.ops import augment
from diffjax.options import Chosen, Leaf, Options, at_least, fraction, one_of, options


@dataclasses.dataclass(frozen=True)
class Diffusion:
    """Section `diffusion`: what is learned."""

    process: Annotated[str, Leaf("how data and noise mix", valid=one_of(PROCESSES))] = "gaussian"
    label_drop: Annotated[float, Leaf("probability of the null condition in training", valid=fraction("no null"))] = 0.1
    options: Annotated[Options, Chosen("process", PROCESSES)] = dataclasses.field(default_factory=dict)


@dataclasses.dataclass(frozen=True)
class Guidance:
    """Section `sampling.guidance`: of the null condition, or of another network with `sample --guide`."""

    scale: Annotated[float, Leaf("weight; 1: none", "watch")] = 1.0
    schedule: Annotated[str, Leaf("how the weight changes over the steps", "watch", one_of(guidance.SCHEDULES))] = (
        "constant"
    )
    channels: Annotated[int, Leaf("guided channels; 0: all; 3: DiT's published setting", "watch", at_least(0))] = 0
    calls: Annotated[
        str,
        Leaf(
            "one, on a doubled batch; two, with less memory; '': one, two with a guide",
            "watch",
            one_of(("", "one", "two")),
        ),
    ] = ""
    options: Annotated[Options, Chosen("schedule", guidance.SCHEDULES)] = dataclasses.field(default_factory=dict)


@dataclasses.dataclass(frozen=True)
class Sampling:
    """Section `sampling` of diffusion."""

    sampler: Annotated[str, Leaf("how samples are drawn", "watch", one_of(samplers.SAMPLERS))] = "ddpm"
    steps: Annotated[int, Leaf("number of sampler steps; 0 for the adaptive dopri5", "watch", at_least(0))] = 250
    clip: Annotated[bool, Leaf("limit predicted data to [-1, 1]: for pixels, never for latents", "watch")] = False
    guidance: Guidance = dataclasses.field(default_factory=Guidance)
    options: Annotated[Options, Chosen("sampler", samplers.SAMPLERS)] = dataclasses.field(default_factory=dict)


def build(make_model: MakeModel, data: DataSpec, diffusion: Diffusion) -> Method:
    """The method of a config. Raises UserError for options that contradict each other."""
    process = create_process(diffusion.process, **diffusion.options)
    learned = isinstance(process, GaussianDiffusion) and process.variance == "learned_range"
    null = diffusion.label_drop > 0
    model: Any = make_model(
        channels=data.channels,
        learn_sigma=learned,
        **condition_arguments(data, null),
        optional={"label_drop": diffusion.label_drop},
    )
    model.check_input(data.size, data.size)
    check_augment(data, model)
    # Some backbones drop labels by themselves in training, in several places; of the others the loss does, once.
    drop = 0.0 if getattr(model, "label_drop_per_level", False) else diffusion.label_drop
    terms = training_terms(process, data, drop)
    x = jnp.zeros((1, data.size, data.size, data.channels))
    decoder = decoder_of(data)
    pictures = decoder is not None or (data.channels in (1, 3) and data.name != "latents")
    return Method(
        model=model,
        inputs=(x, jnp.zeros((1,)), None if data.condition is None else jnp.asarray(data.condition.blank())),
        condition=data.condition,
        loss=mean_of(terms),
        terms=terms,
        sampler=partial(make_sampler, process, data, null),
        makes="pictures" if pictures else f"latents of {data.channels} channels",
        decoder=decoder,
        extra=lambda key: {"uncertainty": weighting.init_uncertainty()} if process.uncertainty else {},
        extra_axes=(("uncertainty/kernel", (None,)),),
    )


def decoder_of(data: DataSpec) -> Decoder | None:
    """The decoder from latents to pictures; None where the config names none."""
    if not data.autoencoder.weights:
        return None
    folder, split = (str(data.options[leaf]) for leaf in ("dir", "split"))
    scaled = scaling(data.options)
    load = partial(latents.load_decoder, data.autoencoder, str(Path(folder) / split), data.channels, scaled)
    own = options(data.autoencoder)
    changed = {name: getattr(data.autoencoder, name) for name in ("dtype", "tile")}
    return Decoder(load, {name: value for name, value in changed.items() if value != own[name].default})


def condition_arguments(data: DataSpec, null: bool) -> dict[str, Any]:
    """Constructor arguments of a backbone that follow from what it is conditioned on."""
    condition = data.condition
    if condition is None or condition.kind == "labels":
        return {"num_classes": condition.count if condition else 0, "null_class": null}
    size = condition.shape[0]
    none = {"num_classes": 0, "null_class": False}
    if condition.kind == "vectors":
        return {**none, "condition_width": size}
    return {**none, "condition_tokens": (condition.count, size)}


def check_augment(data: DataSpec, model: Any) -> None:
    """Raise UserError unless the images can be augmented as asked, and the backbone be given how."""
    given = f"data.augment = {data.augment}"
    if not data.augment:
        return
    if data.name == "latents":
        raise UserError(f"{given} is for pixels, and data.name = 'latents' has none; valid: 0")
    if data.flip:
        raise UserError(
            f"{given} mirrors half of the images by itself, and conditions the model on it; valid: data.flip=false"
        )
    if getattr(model, "augment_labels", 0) != augment.LABELS:
        able = [name for name, family in models.FAMILIES.items() if hasattr(family, "augment_labels")]
        raise UserError(
            f"{given} needs a model conditioned on the augmentation, which {type(model).__name__} as configured is "
            f"not; valid: 0, or a {', '.join(able)} with augment_labels = {augment.LABELS}"
        )


def training_terms(process: Any, data: DataSpec, drop: float) -> Any:
    """`contracts.Terms` of a process; conditions are dropped with probability `drop`."""
    null = None if data.condition is None else data.condition.null()

    def terms(
        apply: Apply, params: Tree, frozen: Tree, batch: Batch, key: jax.Array, train: bool = True
    ) -> tuple[Metrics, jax.Array]:
        def keys(stream: str) -> jax.Array:
            return rng.per_example(rng.fold_name(key, stream), batch.index)

        x0, given = batch.x, {}
        if data.augment and train:
            x0, given["augment"] = augment.augment(x0, keys("augment"), data.augment)
        t = process.sample_times(keys("time"))
        eps = rng.normal(keys("noise"), x0.shape[1:])
        y = None if null is None else batch.condition
        if y is not None and train:
            y = dropped(y, null, rng.uniform(keys("label_drop")) < drop)
        xt = process.q_sample(x0, t, eps)
        scale = process.c_in(t).reshape(-1, 1, 1, 1)
        output = apply(params, scale * xt, process.c_noise(t), y, train=train, keys=keys("dropout"), **given)
        losses = process.losses(output, x0, xt, t, eps, **log_variance(process, params, t))
        return losses, process.noise_fraction(t)

    return terms


def dropped(condition: jax.Array, null: Any, where: jax.Array) -> jax.Array:
    """Conditions [b, ...] with the null one where `where` bool [b]."""
    return jnp.where(where.reshape(-1, *(1,) * (condition.ndim - 1)), jnp.asarray(null), condition)


def mean_of(terms: Any) -> Any:
    """`contracts.Loss`: the means of what `terms` gives of each example."""

    def loss(apply: Apply, params: Tree, frozen: Tree, batch: Batch, key: jax.Array) -> tuple[jax.Array, Metrics]:
        values, _ = terms(apply, params, frozen, batch, key, train=True)
        means = {name: jnp.mean(value) for name, value in values.items()}
        return means.pop("loss"), means

    return loss


def log_variance(process: Any, params: Tree, t: jax.Array) -> Mapping[str, jax.Array]:
    """The log variance that the loss of some processes asks for."""
    if not process.uncertainty:
        return {}
    return {"log_variance": weighting.uncertainty(params["uncertainty"], process.log_sigma(t))}


def make_sampler(
    process: AnyProcess,
    data: DataSpec,
    null: bool,
    sampling: Sampling,
    *,
    autoguided: bool = False,
    max_steps: int | None = None,
) -> Sampler:
    """The sampler of a config. UserError for options that contradict each other.

    autoguided: the guidance scale is the weight of a guide that `sample` is given, not of the null condition.
    max_steps: room in the schedule, so that samplers of fewer steps share a compilation.
    """
    check_guidance(data, null, sampling.guidance, autoguided)
    schedule = sampler_schedule(process, sampling, max_steps)
    if sampling.clip and data.name == "latents":
        raise UserError("sampling.clip limits pixels, and data.name = 'latents' has none; valid: false")
    if sampling.clip and isinstance(schedule, AdaptiveSchedule):
        raise UserError(
            f"sampling.clip limits x0, which the adaptive sampler {sampling.sampler!r} does not know; valid: false, or "
            f"sampling.sampler of {', '.join(samplers.known_steps())}"
        )
    return Sampler(sample_function(data, sampling), schedule)


def sampler_schedule(
    process: AnyProcess, sampling: Sampling, max_steps: int | None = None
) -> SamplerSchedule | AdaptiveSchedule:
    """The schedule of a sampler and its guidance, with room for `max_steps`."""
    given = sampling.guidance
    weight = guidance.weights(given.schedule, given.scale, **dict(given.options))
    return samplers.schedule(
        process, sampling.sampler, sampling.steps, max_steps=max_steps, weight=weight, **sampling.options
    )


def check_guidance(data: DataSpec, null: bool, given: Guidance, autoguided: bool) -> None:
    if autoguided and given.scale == 1.0:
        raise UserError("sampling.guidance.scale = 1.0 leaves a guide without effect; valid: another weight, such as 2")
    if not autoguided and given.scale != 1.0 and not (null and data.condition):
        raise UserError(
            "sampling.guidance.scale needs a null condition: data.num_classes (or other conditions) and "
            "diffusion.label_drop above 0"
        )
    if given.schedule != "constant" and given.scale == 1.0:
        raise UserError(f"sampling.guidance.schedule = {given.schedule!r} needs a sampling.guidance.scale beside 1")
    if given.channels > data.channels:
        raise UserError(f"sampling.guidance.channels = {given.channels}: valid: 0 (all) to {data.channels}")
    if autoguided and given.calls == "one":
        raise UserError(
            "sampling.guidance.calls = 'one': a guide is another network with a call of its own; valid: two"
        )


def sample_function(data: DataSpec, sampling: Sampling) -> Any:
    """`contracts.Sampler.sample`."""
    given, shape = sampling.guidance, (data.size, data.size, data.channels)
    channels, calls = given.channels or None, given.calls or "one"
    skip = given.schedule == "interval"  # the weight is 1 in many steps
    condition = data.condition

    def sample(
        apply: Apply,
        params: Tree,
        schedule: SamplerSchedule | AdaptiveSchedule,
        conditions: jax.Array,
        keys: jax.Array,
        guide: Any = None,
    ) -> jax.Array:
        def network(x: jax.Array, t: jax.Array, y: jax.Array) -> jax.Array:
            return apply(params, x, t, None if condition is None else y)

        def plain(x: jax.Array, t: jax.Array, weight: Any = None) -> jax.Array:
            return network(x, t, conditions)

        denoise: samplers.Denoise = plain
        if guide is not None:
            worse = lambda x, t: guide(x, t, None if condition is None else conditions)  # noqa: E731
            denoise = guidance.autoguidance(plain, worse, channels=channels, skip=skip)
        elif given.scale != 1.0 and condition is not None:
            denoise = guidance.classifier_free(
                network, conditions, condition.null(), channels=channels, calls=calls, skip=skip
            )
        x, noise = samplers.initial_noise(keys, shape), samplers.step_noise(keys, shape)
        return samplers.sample(schedule, denoise, x, noise, sampling.clip)

    return sample


def same_process(a: Diffusion, b: Diffusion) -> bool:
    """Whether two networks predict the same quantity of the same input at the same times.

    How their outputs enter a sampler is compared, not the options: weightings and losses of training may differ.
    """
    schedules = [jax.tree.leaves(samplers.schedule(create_process(x.process, **x.options), "edm", 4)) for x in (a, b)]
    return all(np.array_equal(*pair) for pair in zip(*schedules))


RECORD = MethodRecord(build, Diffusion, Sampling)
