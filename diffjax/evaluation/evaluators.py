"""Evaluators that run during training, each at its own interval.

An evaluator is made once, of a `Subject` (the experiment) and its options, and called with averaged parameters. A new
one is a function here, or in a file beside, and a row of EVALUATORS; its keyword parameters are the config's leaves
`evals.<name>.*`.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Annotated, Any

import jax
import numpy as np

from diffjax import rng
from diffjax.contracts import Evaluator, Result, Subject, Tree
from diffjax.data import sources
from diffjax.errors import UserError
from diffjax.evaluation import pixels
from diffjax.options import Leaf, Option, at_least, options
from diffjax.sampling import samples


@dataclass(frozen=True)
class EvaluatorRecord:
    """A row of the table: (subject, options) -> Evaluator, and how often it runs by default, in steps (0: never)."""

    build: Callable[..., Evaluator]
    every_steps: int = 0

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
        return Result(values | bins_of_time, None, {"num": count, "data": source.fingerprint})

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
    check_pictures(subject, "scores")
    if subject.method.condition is not None and subject.method.condition.kind != "labels":
        raise UserError("evals.scores compares labels, which this model has not; valid: evals.scores.every_steps = 0")
    if subject.method.decoder and subject.source.kind != "images":
        raise UserError(
            "evals.scores compares with the training images, and these data are none; set evals.scores.every_steps = 0"
        )
    conditions = subject.conditions(0, num)
    train: Any = None

    def evaluate(params: Tree) -> Result:
        nonlocal train
        train = train or sources.arrays(subject.source)
        values = np.concatenate(list(subject.images(params, conditions)))
        if not np.isfinite(values).all():
            return Result({"not_finite": float(np.sum(~np.isfinite(values)))})
        labels = conditions if subject.method.condition else None
        scores = pixels.score((samples.to_uint8(values), labels), train)
        return Result(
            {name: each["value"] for name, each in scores.items()}, None, {"num": num, "features": pixels.FEATURES}
        )

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
    "loss": EvaluatorRecord(held_out_loss),
    "scores": EvaluatorRecord(pixel_scores),
    "reconstructions": EvaluatorRecord(reconstruction_grid),
}
