"""Score a grid of samplers x steps x guidance x averages on one or several runs: a table, OUT (json) and a plot (png).

python -m diffjax sweep --workdir=runs/a --sampler=ddim,edm --steps=10,25,50 --guidance=1,1.5,2 \\
  --reference=digits --num=500 --out=runs/a/sweep.json
python -m diffjax sweep --workdir=runs/a,runs/b --sampler=ddpm:250,ddim:25,edm:18,dpmpp_2m:12 \\
  --reference=digits --num=500 --out=sweep.json

python -m diffjax sweep --workdir=runs/a --sampler=dpmpp_2m --steps=20 --guidance=1,1.5,2 --ema=0.05,0.1 --metric=fid \
  --reference=VIRTUAL_imagenet256_labeled.npz --num=10000 --out=runs/a/sweep.json

A sampler written as name:steps has these steps, all others have each of --steps. All images are of the same seed and
numbers, so that what differs is the method alone. Samplers have their default options; guidance options other than the
weight, and the clip, are those of the run's config. NFE (`evaluations` in the json) counts network calls per image, a
guided call as two. --ema are lengths of averages that the snapshots of the runs give (see `ema`). Images are scored as
by `evaluate`: the plot is of --metric, by default the Frechet distance of the network that the reference is of; it
needs matplotlib (pip install -e '.[plot]'). Scores of pixels are for small images and are not FID.
"""

import functools
import itertools
import json
import time
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import jax
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
from diffjax.commands import ema as averages
from diffjax.commands.sample import describe, describe_form
from diffjax.commands.scoring import Scoring, define_scoring, scoring_of
from diffjax.contracts import Sampler
from diffjax.diffusion import samplers
from diffjax.errors import UserError
from diffjax.evaluation import metrics, plot, protocol
from diffjax.evaluation.networks import Features, Network
from diffjax.evaluation.standard import Images
from diffjax.experiment import with_sampling
from diffjax.files import NO_LABELS
from diffjax.methods import diffusion
from diffjax.parallel import hosts
from diffjax.runs import Run, open_run
from diffjax.sampling import features, generate, samples
from diffjax.weights.store import tree_sha256

REQUIRED = ("workdir", "sampler", "reference", "out")


def define_flags(values: flags.FlagValues) -> None:
    define_paths("workdir", None, "run folders; of each the averaged weights of the latest step", values)
    flags.DEFINE_list("sampler", None, "samplers, each by its name or as name:steps", flag_values=values)
    flags.DEFINE_list("steps", [], "numbers of steps, for the samplers without their own", flag_values=values)
    flags.DEFINE_list("guidance", [], "guidance weights; that of each run's config by default", flag_values=values)
    flags.DEFINE_list("ema", [], "relative lengths of averages; the run's own average by default", flag_values=values)
    define_scoring(values)
    flags.DEFINE_string("metric", None, "score that is plotted; the Frechet distance by default", flag_values=values)
    flags.DEFINE_integer("num", 500, "images per cell of the grid", lower_bound=2, flag_values=values)
    flags.DEFINE_integer("seed", 0, "of the images", lower_bound=0, upper_bound=2**32 - 1, flag_values=values)
    flags.DEFINE_integer("batch_size", 128, "images at a time on all devices", lower_bound=1, flag_values=values)
    define_path("out", None, "result file, .json", values)
    define_overwrite(values)
    define_distributed(values)


Key = tuple[str, str, str, int, float]  # of a row: run, average, sampler, steps, guidance weight
INTERRUPTED = "the cells that are done are kept, the same command resumes"


class Cell(NamedTuple):
    """One cell of the grid: the run, another sampling of it, and the sampler of that."""

    run: Run
    sampling: diffusion.Sampling
    sampler: Sampler

    @property
    def folder(self) -> str:
        return str(self.run.origin["workdir"])

    @property
    def key(self) -> Key:
        own = self.sampling
        return self.folder, str(self.run.origin["weights"]), own.sampler, own.steps, own.guidance.scale

    @property
    def name(self) -> str:
        method = f"{self.sampling.sampler} {self.sampling.steps} steps, guidance {self.sampling.guidance.scale:g}"
        return f"{called(self.folder, self.run.origin['weights'])} {method}"


def called(folder: str, average: str) -> str:
    """A run in the table; its own average goes without saying."""
    return folder if average == "ema" else f"{folder} ({average})"


def run(values: flags.FlagValues, overrides: list[str]) -> None:
    hosts.start(values.distributed)
    out = values.out
    if out.suffix != ".json" or out.is_dir():
        raise UserError(f"--out={out}: give a file that ends in .json")
    wanted = parse_samplers(values.sampler, parse_numbers("steps", values.steps, int))
    weights = parse_numbers("guidance", values.guidance, float)
    with hosts.together():
        scoring = scoring_of(values)
        metric = metric_of(values.metric, scoring)
    lengths = parse_numbers("ema", values.ema, float)
    runs = [each for folder in dict.fromkeys(values.workdir) for each in opened(folder, lengths)]
    check_pictures(runs, values.num, scoring, metric)
    groups, left_out = cells_of_grid(runs, wanted, weights)
    request = {
        "weights_sha256": [run.origin["sha256"] for run in runs],
        "samplers": dict(wanted),
        "guidance": weights,
        "reference": dict(scoring.source.identity),
        **({} if scoring.network.name == "pixels" else scoring.network.identity()),  # as earlier versions wrote it
        "num": values.num,
        "seed": values.seed,
    }
    refuse_other_result(out, {"request": request}, values.overwrite)
    make_folder(out)
    rows = {} if values.overwrite else rows_of(out)
    without_plot = plot.missing()
    caveats = [f"left out: {line}" for line in left_out] + [run.caveat for run in runs]
    for line in filter(None, [*caveats, without_plot]):
        hosts.say(line)
    for cells in groups:
        cells = [cell for cell in cells if not is_done(rows.get(cell.key), cell, scoring, values.num)]
        if not cells:
            continue
        labels = generate.interleaved_labels(values.num, cells[0].run.experiment.num_classes)
        compiled = compile_group(cells, values.seed, labels[: values.batch_size])
        for cell in cells:
            found, seconds = drawn(cell, compiled, labels, values.batch_size, scoring.network)
            if isinstance(found, int):
                rows.pop(cell.key, None)
                left_out.append(f"{cell.name}: {found} sampled values are not finite")
                hosts.say(f"left out: {left_out[-1]}")
                continue
            with hosts.together():
                row = row_of(cell, found, labels, seconds, values.seed, scoring)
            # With the scores that an earlier command computed.
            rows[cell.key] = {**row, "values": {**rows.get(cell.key, row)["values"], **row["values"]}}
            if hosts.is_lead():  # an interrupted sweep continues with the next cell
                protocol.write(out, {"request": request, "results": list(rows.values()), "left_out": left_out})
            scores = ", ".join(f"{score} {columns['value']:.4f}" for score, columns in row["values"].items())
            hosts.say(f"{cell.name}: {scores}")
    results = [rows[cell.key] for cells in groups for cell in cells if cell.key in rows]
    if not results:
        raise UserError(f"the sweep has no cell with a result: {'; '.join(left_out)}")
    if hosts.is_lead():
        protocol.write(out, {"request": request, "results": results, "left_out": left_out})
        print_table(results, scoring)
        if caveat := scoring.caveat(values.num):
            print(caveat)
        drawn_to = out.with_suffix(".png")
        if without_plot:
            drawn_to.unlink(missing_ok=True)  # that of other results
        else:
            samples.write_png(drawn_to, picture(results, metric))
        print(f"wrote {out}" + ("" if without_plot else f" and {drawn_to}"))


def rows_of(out: Path) -> dict[Key, dict[str, Any]]:
    """The rows that an earlier command with the same request wrote, by their cells."""
    rows = json.loads(out.read_text())["results"] if out.exists() else []
    keys = ("run", "average", "sampler", "steps", "guidance")
    return {tuple(row[key] for key in keys): row for row in rows if "average" in row}


def is_done(row: dict[str, Any] | None, cell: Cell, scoring: Scoring, num: int) -> bool:
    """Whether a row has all the scores of its cell."""
    labelled = cell.run.experiment.num_classes > 0
    return row is not None and scoring.has_all(row["values"], num, labelled)


def metric_of(name: str | None, scoring: Scoring) -> str:
    """The score that is plotted, of which less is better. UserError for one that is not, or that is not computed."""
    network = scoring.network
    falling = [metric for metric in metrics.chosen(network, scoring.scores) if metric.falls]
    known = [network.called(score) for metric in falling for score in metric.scores]
    name = name or next(iter(known), network.called("fd"))
    if name not in known:
        raise UserError(
            f"--metric={name} is not computed, or more of it is better; valid: {', '.join(known) or 'none'}; --scores "
            "computes others, and so does another network as --features"
        )
    return name


def opened(folder: Path, lengths: list[float]) -> list[Run]:
    """The run of a folder with its own average, or one for each length of an average that its snapshots give."""
    own = open_run(folder)
    found = []
    for length in lengths:
        params, made = averages.combined(folder, length)
        where = jax.tree.map(lambda leaf: leaf.sharding, own.experiment.abstract.params)
        params = jax.device_put(params, where)
        origin = {**own.origin, **made, "weights": f"ema {length:g}", "sha256": tree_sha256(params)}
        found.append(replace(own, params=params, origin=origin, caveat=""))
    return found or [own]


def parse_samplers(texts: list[str], steps: list[Any]) -> list[tuple[str, list[int]]]:
    """[("ddim", [10, 25]), ...] of name:steps, and of names with each of `steps`."""
    wanted: dict[str, list[int]] = {}
    alone = [text for text in texts if ":" not in text]
    if bool(alone) != bool(steps):
        raise UserError(
            f"--sampler={','.join(texts)}: samplers without steps of their own (name:steps) need --steps"
            if alone
            else "--steps has no effect: all samplers have steps of their own"
        )
    for text in texts:
        name, colon, own = text.partition(":")
        if name not in samplers.known_steps():
            reason = "chooses its steps as it goes" if name in samplers.SAMPLERS else "is unknown"
            raise UserError(f"--sampler={text}: {name!r} {reason}; valid: {', '.join(samplers.known_steps())}")
        wanted.setdefault(name, []).extend(parse_numbers("sampler", [own], int) if colon else steps)
    return [(name, sorted(set(counts))) for name, counts in wanted.items()]


def parse_numbers(flag: str, texts: list[str], kind: type) -> list[Any]:
    try:
        return list(dict.fromkeys(kind(text) for text in texts))
    except ValueError:
        needs = "whole numbers" if kind is int else "numbers"
        raise UserError(f"--{flag}={','.join(texts)}: valid: {needs}") from None


def check_pictures(runs: list[Run], num: int, scoring: Scoring, metric: str) -> None:
    """UserError where the images of a run cannot be scored against the reference."""
    for each in runs:
        folder, experiment = each.origin["workdir"], each.experiment
        if not isinstance(experiment.sampling, diffusion.Sampling):
            raise UserError(f"{folder} is a run of a token model, which these samplers do not apply to")
        if experiment.method.makes != "pictures":
            raise UserError(f"{folder} makes {experiment.method.makes}, and scores are of pictures")
        labelled = experiment.num_classes > 0
        scoring.check(num, labelled, experiment.picture_size)
        metrics.computable(scoring.network, num, scoring.source.available(scoring.network, labelled), [metric])


def cells_of_grid(
    runs: list[Run], wanted: list[tuple[str, list[int]]], weights: list[float]
) -> tuple[list[list[Cell]], list[str]]:
    """The cells in groups that share a compilation (run, sampler, with or without guidance), and what is left out.

    A cell without meaning is left out, with the reason, when there are several runs; of a single one it is UserError.
    """
    groups: dict[tuple[str, str, bool], list[Cell]] = {}
    left_out: dict[str, None] = {}
    for each, (sampler, counts) in itertools.product(runs, wanted):
        experiment, folder = each.experiment, str(each.origin["workdir"])
        own = experiment.sampling
        for steps, weight in itertools.product(counts, weights or [own.guidance.scale]):
            sampling = other_sampling(own, sampler, steps, weight)
            try:
                made = with_sampling(experiment, sampling).make_sampler(max_steps=counts[-1])
            except UserError as error:
                if len(runs) == 1:
                    raise
                left_out[f"{folder} {sampler}: {error}"] = None
                continue
            groups.setdefault((folder, sampler, weight != 1), []).append(Cell(each, sampling, made))
    return list(groups.values()), list(left_out)


def other_sampling(own: diffusion.Sampling, sampler: str, steps: int, weight: float) -> diffusion.Sampling:
    """A run's sampling with another sampler, steps and guidance weight."""
    guidance = replace(own.guidance, scale=weight)
    if weight == 1:
        guidance = replace(guidance, schedule="constant", options={})
    return replace(own, sampler=sampler, steps=steps, options={}, guidance=guidance)


def compile_group(cells: list[Cell], seed: int, labels: np.ndarray) -> functools.partial:
    """The sampler of a group, compiled for batches like `labels` by a first trajectory of one call of the network."""
    first, experiment = cells[0], cells[0].run.experiment
    hosts.say(f"compiling sampler {first.sampling.sampler} for {first.folder} (once for all its cells)")
    compiled = generate.compile_sampler(
        first.sampler, experiment.model, experiment.mesh, seed, decode=experiment.decode
    )
    short = functools.partial(compiled, schedule=replace(first.sampler.schedule, nfe=np.int32(1)))
    numbers = np.arange(len(labels))
    list(generate.generate(short, first.run.params, labels, numbers, experiment.mesh, len(labels)))
    return compiled


def drawn(
    cell: Cell, compiled: functools.partial, labels: np.ndarray, batch_size: int, network: Network
) -> tuple[Features | int, float]:
    """Features of the images of a cell, or how many of their values are not finite; and the seconds for all."""
    seconds = 0.0

    def timed(batches: features.Drawn) -> features.Drawn:
        """The same, with the time that the sampler takes: features and the loading of their network do not count."""
        nonlocal seconds
        started = time.perf_counter()
        for batch in batches:
            seconds += time.perf_counter() - started
            yield batch
            started = time.perf_counter()

    sampler = functools.partial(compiled, schedule=cell.sampler.schedule)
    numbers, rows, mesh = np.arange(len(labels)), min(batch_size, len(labels)), cell.run.experiment.mesh
    batches = generate.generate(sampler, cell.run.params, labels, numbers, mesh, rows)
    found = features.collect(timed(batches), network, len(labels))
    return found, seconds


def nfe(schedule: samplers.SamplerSchedule) -> int:
    """Calls of the network for one image; one with guidance counts as two."""
    calls = int(schedule.nfe)
    return calls + int(np.count_nonzero(schedule.table.weight[:calls] != 1))


def row_of(
    cell: Cell, found: Features, labels: np.ndarray, seconds: float, seed: int, scoring: Scoring
) -> dict[str, Any]:
    """A cell's row of the table, with values, protocol and subject as `evaluate` writes them."""
    experiment, sampling = cell.run.experiment, cell.sampling
    form = describe_form(experiment.model, cell.run.params, fused=True)
    cell_experiment = with_sampling(experiment, sampling)
    said = "interleaved" if experiment.num_classes else NO_LABELS
    settings = {"labels": said, "seed": seed, "first": 0, "num": len(labels), **experiment.decoder_protocol()}
    made = describe(cell_experiment, cell.run.origin, form, **settings)
    images = Images(found, labels if experiment.num_classes else None)
    return {
        "run": cell.folder,
        "average": cell.run.origin["weights"],
        "sampler": sampling.sampler,
        "steps": sampling.steps,
        "evaluations": nfe(cell.sampler.schedule),
        "guidance": sampling.guidance.scale,
        "seconds_per_image": seconds / len(labels),
        **scoring.result(scoring.values(images), made, len(labels)),
    }


def print_table(results: list[dict[str, Any]], scoring: Scoring) -> None:
    names = [called(row["run"], row["average"]) for row in results]
    longest = max(len("run"), *map(len, names))
    widths = {score: max(len(score), len("1000.0000")) + 2 for row in results for score in row["values"]}
    heads = [f"{score:>{width}}" for score, width in widths.items()]
    print(f"\n{'run':<{longest}}  {'sampler':<15}{'steps':>6}{'NFE':>6}{'guidance':>10}{''.join(heads)}  s/image")
    for name, row in zip(names, results):
        found = {score: f"{column['value']:.4f}" for score, column in row["values"].items()}
        values = "".join(f"{found.get(score, '-'):>{width}}" for score, width in widths.items())
        method = f"{row['sampler']:<15}{row['steps']:>6}{row['evaluations']:>6}{row['guidance']:>10g}"
        print(f"{name:<{longest}}  {method}{values}{row['seconds_per_image']:>9.4f}")
    columns = {score: column for row in results for score, column in row["values"].items()}
    if all("held_out_real" in column for column in columns.values()):
        values = "".join(f"{columns[score]['held_out_real']:>{width}.4f}" for score, width in widths.items())
        print(f"{'held-out real images':<{longest + 39}}{values}")
    print(
        f"{results[0]['protocol']['num']} images per row against {scoring.source.described} "
        f"({scoring.network.title}); a guided network call counts as two"
    )


def picture(results: list[dict[str, Any]], metric: str) -> np.ndarray:
    """The plot of a score; runs, averages and guidance weights are named where there are several."""
    several = {what for what in ("run", "average", "guidance") if len({row[what] for row in results}) > 1}
    points = []
    for row in results:
        parts = {"run": row["run"], "average": row["average"], "guidance": f"guidance {row['guidance']:g}"}
        names = [row["sampler"], *(text for what, text in parts.items() if what in several)]
        value = row["values"][metric]["value"]
        points.append(plot.Point(", ".join(names), row["evaluations"], value, str(row["steps"])))
    recorded = results[0]["protocol"]
    title = f"{recorded['num']} images against {recorded['reference']['name']}, by sampler and steps"
    return plot.scatter(points, title, "NFE per image", metric)
