"""Evaluators that run during training, each at its own interval.

An evaluator is made once, of a `Subject` (the experiment) and its options, and called with averaged parameters. A new
one is a function here, or in a file beside, and a row of EVALUATORS; its keyword parameters are the config's leaves
`evals.<name>.*`.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated

import jax
import numpy as np

from diffjax import rng
from diffjax.contracts import Evaluator, Result, Subject, Tree
from diffjax.data.image_sets import ImageSet
from diffjax.errors import UserError
from diffjax.evaluation import metrics, networks, pixels, protocol, standard
from diffjax.evaluation.networks import Network
from diffjax.evaluation.standard import Images, Standard
from diffjax.options import Leaf, Option, at_least, one_of, options
from diffjax.sampling import features, samples


@dataclass(frozen=True)
class EvaluatorRecord:
    """A row of the table.

    Attributes:
        build: (subject, options) -> Evaluator.
        every_steps: how often it runs by default; 0: never.
        judges: whether one of its values tells which step is best, see `Result.judge`.
    """

    build: Callable[..., Evaluator]
    every_steps: int = 0
    judges: bool = False

    @property
    def options(self) -> dict[str, Option]:
        interval = Leaf("steps between two of them; 0: never", "watch", at_least(0))
        return {"every_steps": Option("every_steps", int, self.every_steps, interval), **options(self.build)}


def sample_grid(
    subject: Subject, *, num: Annotated[int, Leaf("images in the picture", "watch", at_least(1))] = 64
) -> Evaluator:
    """A picture of samples 0, 1, ..., classes in equal parts, of few a column each; the same noise every time."""
    check_pictures(subject, "samples")
    conditions = subject.conditions(0, num)
    condition = subject.method.condition
    labelled = condition is not None and condition.kind == "labels"
    classes = samples.Classes(conditions, subject.source.classes) if labelled else None

    def evaluate(params: Tree) -> Result:
        values = np.concatenate(list(subject.images(params, conditions)))
        if not np.isfinite(values).all():
            return Result({"not_finite": float(np.sum(~np.isfinite(values)))})
        return Result({}, samples.grid(samples.to_uint8(values), classes))

    return evaluate


def held_out_loss(
    subject: Subject,
    *,
    split: Annotated[str, Leaf("part of the data that is not trained on", "watch")] = "test",
    dir: Annotated[str, Leaf("its folder; '': that of the training data", "watch")] = "",
    num: Annotated[int, Leaf("examples", "watch", at_least(0, "all"))] = 0,
    bins: Annotated[
        int, Leaf("parts of the time, from data to noise, with a loss of their own", "watch", at_least(1))
    ] = 4,
) -> Evaluator:
    """The training loss on held-out examples, without dropout, with the same times and noise every time."""
    if subject.method.terms is None:
        raise UserError("evals.loss: this method gives no losses of single examples; valid: evals.loss.every_steps = 0")
    known = subject.source_options
    if "split" not in known and not dir:
        raise UserError("evals.loss: these data have no splits; give the folder of held-out ones as evals.loss.dir")
    source = subject.other_source(**({"split": split} if "split" in known else {}), **({"dir": dir} if dir else {}))
    count = min(num or len(source.examples), len(source.examples))
    key = rng.stream(subject.seed, "held_out")

    def evaluate(params: Tree) -> Result:
        found: dict[str, list[np.ndarray]] = {}
        fractions = []
        for number, (batch, real) in enumerate(subject.batches(source, count)):
            terms, fraction, index = jax.device_get(subject.terms(params, batch, rng.fold(key, number)))
            fractions.append(fraction[index < real])
            for name, values in terms.items():
                found.setdefault(name, []).append(values[index < real])
        terms = {name: np.concatenate(parts).astype(np.float64) for name, parts in found.items()}
        values = {name: float(each.mean()) for name, each in terms.items()}
        bins_of_time = by_bin(terms["loss"], np.concatenate(fractions), bins)
        return Result(values | bins_of_time, None, {"num": count, "data": source.fingerprint}, judge="loss")

    return evaluate


def by_bin(loss: np.ndarray, fraction: np.ndarray, bins: int) -> dict[str, float]:
    """{"loss_0": mean loss of the examples in the first of `bins` equal parts of the time, ...}, without empty ones."""
    if bins == 1 or (fraction == fraction[0]).all():
        return {}
    part = np.minimum((fraction * bins).astype(int), bins - 1)
    return {f"loss_{i}": float(loss[part == i].mean()) for i in range(bins) if (part == i).any()}


def pixel_scores(
    subject: Subject,
    *,
    num: Annotated[int, Leaf("images that are scored", "watch", at_least(2))] = 500,
) -> Evaluator:
    """Scores of samples against the training images on pixels; for small images, and not FID."""
    check_scored(subject, "scores")
    return scorer(subject, networks.load("pixels"), "", num)


def feature_scores(
    subject: Subject,
    *,
    network: Annotated[
        str, Leaf("by whose features samples are compared", "watch", one_of(networks.NETWORKS))
    ] = "inception",
    weights: Annotated[str, Leaf("of the network, a file; '': the published ones, once fetched", "place")] = "",
    reference: Annotated[
        str, Leaf("an embedded set, images or a file of statistics; '': the training images", "place")
    ] = "",
    num: Annotated[int, Leaf("samples that are scored", "watch", at_least(2))] = 5_000,
    sampler: Annotated[str, Leaf("of them; '': that of section sampling", "watch")] = "",
    steps: Annotated[int, Leaf("of the sampler; 0: those of section sampling", "watch", at_least(0))] = 0,
    scores: Annotated[tuple[str, ...], Leaf("besides the Frechet distance, by their names in results", "watch")] = (),
) -> Evaluator:
    """Frechet distance of samples by the features of a network, FID or what it is called, and other scores.

    Samples are drawn and scored on the mesh of the training. The weights of the network are on the devices while it
    runs, and no longer.
    """
    check_scored(subject, "fid", bool(reference))
    try:
        found = networks.load(network, Path(weights) if weights else None)
        wanted = dict.fromkeys([found.called("fd"), *scores])
        return scorer(subject.sampled_by(sampler, steps), found, reference, num, tuple(wanted))
    except UserError as error:  # it may name a flag of `evaluate`
        raise UserError(f"evals.fid: {error}") from error


def check_scored(subject: Subject, name: str, reference: bool = False) -> None:
    """UserError unless a model's samples can be compared with images: those of the training, or a `reference`."""
    check_pictures(subject, name)
    if subject.method.condition is not None and subject.method.condition.kind != "labels":
        raise UserError(
            f"evals.{name} draws samples of labels, which this model has not; set evals.{name}.every_steps=0"
        )
    if subject.method.decoder and subject.source.kind != "images" and not reference:
        other = "; give evals.fid.reference, or set" if name == "fid" else "; set"
        raise UserError(
            f"evals.{name} compares with the training images, and these data are none{other} evals.{name}.every_steps"
            " = 0"
        )


def scorer(subject: Subject, network: Network, reference: str, num: int, wanted: tuple[str, ...] = ()) -> Evaluator:
    """Draws samples 0 to num - 1 and scores them against a reference; "": the training images, with their labels."""
    conditions = subject.conditions(0, num)
    labels = conditions if subject.method.condition else None
    source = standard.open_source(reference) if reference else standard.of_training(subject.source, network)
    source = replace(source, held_out=None)
    standard.check_network(source, network)
    metrics.computable(network, num, source.available(network, labels is not None), wanted)
    if source.shape:
        pixels.check_sizes(subject.picture_size, source.shape)
    kinds = metrics.kinds(network, wanted)
    made: Standard | None = None

    def shared(images: ImageSet, _: str) -> Images:
        """Features of images, of which every process computes its part."""
        own = np.arange(jax.process_index(), images.count, jax.process_count())
        read = ((numbers, images.read(numbers)) for numbers in standard.blocks(own))
        found = features.collect(read, network, images.count, kinds)
        assert not isinstance(found, int)  # of images, which are finite
        return Images(found, images.labels)

    def evaluate(params: Tree) -> Result:
        nonlocal made
        if made is None:
            made = standard.of_source(source, network, shared, single=metrics.needs_images(network, wanted))
        found = features.collect(subject.draw(params, conditions), network, num, kinds)
        if isinstance(found, int):
            return Result({"not_finite": float(found)})
        values = metrics.score(Images(found, labels), made, network, wanted)
        drawn = {"labels": "interleaved" if labels is not None else samples.NO_LABELS, "seed": subject.seed, "first": 0}
        origin = {"weights": "ema"}  # an evaluator gets averaged parameters
        sampling = {**drawn, **subject.description(), "rounding": samples.ROUNDING, "origin": origin}
        described = protocol.result(values, **network.identity(), reference=source.identity, num=num, samples=sampling)[
            "protocol"
        ]
        plain = {score: float(column["value"]) for score, column in values.items()}
        return Result(plain, None, described, judge=network.called("fd"))

    return evaluate


def reconstruction_grid(
    subject: Subject,
    *,
    split: Annotated[str, Leaf("part of the data that is not trained on", "watch")] = "test",
    num: Annotated[int, Leaf("images in the picture", "watch", at_least(1))] = 32,
) -> Evaluator:
    """A picture of held-out images, each beside what an autoencoder makes of it."""
    if subject.method.reconstruct is None:
        raise UserError(
            "evals.reconstructions is of autoencoders, and this model is none; set evals.reconstructions.every_steps=0"
        )
    source = subject.other_source(split=split)
    count = min(num, len(source.examples))

    def evaluate(params: Tree) -> Result:
        pairs: list[np.ndarray] = []
        first = 0
        for batch, real in subject.batches(source, count):
            found = samples.to_uint8(subject.reconstructions(params, batch)[:real])
            given = [source.examples[first + i]["image"] for i in range(real)]
            pairs += [np.concatenate([image, made], axis=1) for image, made in zip(given, found)]
            first += real
        return Result({}, samples.grid(np.stack(pairs)))

    return evaluate


def check_pictures(subject: Subject, name: str) -> None:
    if subject.method.makes != "pictures":
        raise UserError(
            f"evals.{name} draws pictures, and this model makes {subject.method.makes}; set evals.{name}.every_steps=0"
        )


EVALUATORS: dict[str, EvaluatorRecord] = {
    "samples": EvaluatorRecord(sample_grid, every_steps=10_000),
    "loss": EvaluatorRecord(held_out_loss, judges=True),
    "scores": EvaluatorRecord(pixel_scores, judges=True),
    "fid": EvaluatorRecord(feature_scores, judges=True),
    "reconstructions": EvaluatorRecord(reconstruction_grid),
}
JUDGES = tuple(name for name, record in EVALUATORS.items() if record.judges)
