"""Score a grid of samplers x steps x guidance on one or several runs: a table, OUT (json) and beside it a plot (png).

python -m diffjax sweep --workdir=runs/a --sampler=ddim,edm --steps=10,25,50 --guidance=1,1.5,2 \\
  --reference=digits --num=500 --out=runs/a/sweep.json
python -m diffjax sweep --workdir=runs/a,runs/b --sampler=ddpm:250,ddim:25,edm:18,dpmpp_2m:12 \\
  --reference=digits --num=500 --out=sweep.json

A sampler written as name:steps has these steps, all others have each of --steps. All images are of the same seed and
numbers, so that what differs is the method alone. Samplers have their default options; guidance options other than the
weight, and the clip, are those of the run's config. NFE (`evaluations` in the json) counts network calls per image, a
guided call as two. The plot is of the Frechet distance; it needs matplotlib (pip install -e '.[plot]'). Scores on
pixels are for small images and are not FID.
"""

import functools
import itertools
import time
from dataclasses import replace
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
from diffjax.commands.evaluate import Reference, reference_set, result_of
from diffjax.commands.sample import describe, describe_form
from diffjax.contracts import Sampler
from diffjax.diffusion import samplers
from diffjax.errors import UserError
from diffjax.evaluation import pixels, plot, protocol
from diffjax.evaluation.scorers import PIXELS
from diffjax.experiment import with_sampling
from diffjax.methods import diffusion
from diffjax.parallel import hosts
from diffjax.runs import Run, open_run
from diffjax.sampling import generate, samples

PLOTTED = "frechet_distance_pixels"
REQUIRED = ("workdir", "sampler", "reference", "out")


def define_flags(values: flags.FlagValues) -> None:
    define_paths("workdir", None, "run folders; of each the averaged weights of the latest step", values)
    flags.DEFINE_list("sampler", None, "samplers, each by its name or as name:steps", flag_values=values)
    flags.DEFINE_list("steps", [], "numbers of steps, for the samplers without their own", flag_values=values)
    flags.DEFINE_list("guidance", [], "guidance weights; that of each run's config by default", flag_values=values)
    flags.DEFINE_string("reference", None, "digits, emoji32, or an .npz file like samples", flag_values=values)
    flags.DEFINE_integer("num", 500, "images per cell of the grid", lower_bound=2, flag_values=values)
    flags.DEFINE_integer("seed", 0, "of the images", lower_bound=0, upper_bound=2**32 - 1, flag_values=values)
    flags.DEFINE_integer("batch_size", 128, "images at a time on all devices", lower_bound=1, flag_values=values)
    define_path("out", None, "result file, .json", values)
    define_overwrite(values)
    define_distributed(values)


class Cell(NamedTuple):
    """One cell of the grid: the run, another sampling of it, and the sampler of that."""

    run: Run
    sampling: diffusion.Sampling
    sampler: Sampler

    @property
    def folder(self) -> str:
        return str(self.run.origin["workdir"])

    @property
    def name(self) -> str:
        method = f"{self.sampling.sampler} {self.sampling.steps} steps, guidance {self.sampling.guidance.scale:g}"
        return f"{self.folder} {method}"


def run(values: flags.FlagValues, overrides: list[str]) -> None:
    hosts.start(values.distributed)
    out = values.out
    if out.suffix != ".json" or out.is_dir():
        raise UserError(f"--out={out}: give a file that ends in .json")
    wanted = parse_samplers(values.sampler, parse_numbers("steps", values.steps, int))
    weights = parse_numbers("guidance", values.guidance, float)
    reference = reference_set(values.reference)
    runs = [open_run(folder) for folder in dict.fromkeys(values.workdir)]
    check_pictures(runs, values.reference, reference[0])
    groups, left_out = cells_of_grid(runs, wanted, weights)
    request = {
        "weights_sha256": [run.origin["sha256"] for run in runs],
        "samplers": dict(wanted),
        "guidance": weights,
        "reference": reference.identity,
        "num": values.num,
        "seed": values.seed,
    }
    refuse_other_result(out, {"request": request}, values.overwrite)
    make_folder(out)
    without_plot = plot.missing()
    caveats = [f"left out: {line}" for line in left_out] + [run.caveat for run in runs]
    for line in filter(None, [*caveats, without_plot]):
        hosts.say(line)
    results: list[dict[str, Any]] = []
    for cells in groups:
        labels = generate.interleaved_labels(values.num, cells[0].run.experiment.num_classes)
        compiled = compile_group(cells, values.seed, labels[: values.batch_size])
        for cell in cells:
            try:
                images, seconds = drawn(cell, compiled, labels, values.batch_size)
            except FloatingPointError as error:
                left_out.append(f"{cell.name}: {error}")
                hosts.say(f"left out: {left_out[-1]}")
                continue
            results.append(row_of(cell, images, labels, seconds, values.seed, reference))
            scores = ", ".join(f"{score} {columns['value']:.4f}" for score, columns in results[-1]["values"].items())
            hosts.say(f"{cell.name}: {scores}")
    if not results:
        raise UserError(f"the sweep has no cell with a result: {'; '.join(left_out)}")
    if hosts.is_lead():
        protocol.write(out, {"request": request, "results": results, "left_out": left_out})
        print_table(results)
        if caveat := pixels.caveat(values.num, len(reference[0][0]), reference[0][0]):
            print(caveat)
        drawn_to = out.with_suffix(".png")
        if without_plot:
            drawn_to.unlink(missing_ok=True)  # that of other results
        else:
            samples.write_png(drawn_to, picture(results))
        print(f"wrote {out}" + ("" if without_plot else f" and {drawn_to}"))


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


def check_pictures(runs: list[Run], name: str, train: pixels.Labelled) -> None:
    """UserError where the images of a run cannot be scored against the reference."""
    side = train[0].shape[1]
    for each in runs:
        folder, experiment = each.origin["workdir"], each.experiment
        if not isinstance(experiment.sampling, diffusion.Sampling):
            raise UserError(f"{folder} is a run of a token model, which these samplers do not apply to")
        if experiment.channels not in (1, 3):
            raise UserError(f"{folder} makes latents of {experiment.channels} channels, which pixel scores are not for")
        if experiment.size != side:
            raise UserError(
                f"{folder} makes images of {experiment.size} x {experiment.size}, --reference={name} has {side}"
            )


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
    compiled = generate.compile_sampler(first.sampler, experiment.model, experiment.mesh, seed)
    short = functools.partial(compiled, schedule=replace(first.sampler.schedule, nfe=np.int32(1)))
    numbers = np.arange(len(labels))
    list(generate.generate(short, first.run.params, labels, numbers, experiment.mesh, len(labels)))
    return compiled


def drawn(cell: Cell, compiled: functools.partial, labels: np.ndarray, batch_size: int) -> tuple[np.ndarray, float]:
    """Images uint8 [n, h, w, c] of a cell and the seconds for all of them. FloatingPointError if one is not finite."""
    started = time.perf_counter()
    sampler = functools.partial(compiled, schedule=cell.sampler.schedule)
    numbers, rows, mesh = np.arange(len(labels)), min(batch_size, len(labels)), cell.run.experiment.mesh
    batches = generate.generate_everywhere(sampler, cell.run.params, labels, numbers, mesh, rows)
    values = np.concatenate(list(batches))
    return samples.to_uint8(values), time.perf_counter() - started


def nfe(schedule: samplers.SamplerSchedule) -> int:
    """Calls of the network for one image; one with guidance counts as two."""
    calls = int(schedule.nfe)
    return calls + int(np.count_nonzero(schedule.table.weight[:calls] != 1))


def row_of(
    cell: Cell, images: np.ndarray, labels: np.ndarray, seconds: float, seed: int, reference: Reference
) -> dict[str, Any]:
    """A cell's row of the table, with values, protocol and subject as `evaluate` writes them."""
    train, held_out, identity = reference
    experiment, sampling = cell.run.experiment, cell.sampling
    form = describe_form(experiment.model, cell.run.params, fused=True)
    cell_experiment = with_sampling(experiment, sampling)
    said = "interleaved" if experiment.num_classes else samples.NO_LABELS
    made = describe(cell_experiment, cell.run.origin, form, labels=said, seed=seed, first=0, num=len(images))
    return {
        "run": cell.folder,
        "sampler": sampling.sampler,
        "steps": sampling.steps,
        "evaluations": nfe(cell.sampler.schedule),
        "guidance": sampling.guidance.scale,
        "seconds_per_image": seconds / len(images),
        **result_of(
            pixels.score((images, labels if experiment.num_classes else None), train, held_out),
            made,
            identity,
            len(images),
            PIXELS,
        ),
    }


def print_table(results: list[dict[str, Any]]) -> None:
    scores = list(results[0]["values"])
    longest = max(len("run"), *(len(result["run"]) for result in results))
    heads = [f"{score:>{len(score) + 2}}" for score in scores]
    print(f"\n{'run':<{longest}}  {'sampler':<15}{'steps':>6}{'NFE':>6}{'guidance':>10}{''.join(heads)}  s/image")
    for row in results:
        values = "".join(f"{row['values'][score]['value']:>{len(score) + 2}.4f}" for score in scores)
        method = f"{row['sampler']:<15}{row['steps']:>6}{row['evaluations']:>6}{row['guidance']:>10g}"
        print(f"{row['run']:<{longest}}  {method}{values}{row['seconds_per_image']:>9.4f}")
    if all("held_out_real" in columns for columns in results[0]["values"].values()):
        values = "".join(f"{results[0]['values'][score]['held_out_real']:>{len(score) + 2}.4f}" for score in scores)
        print(f"{'held-out real images':<{longest + 39}}{values}")
    identity = results[0]["protocol"]["reference"]
    print(
        f"{results[0]['protocol']['num']} images per row against {identity['count']} of {identity['name']} (pixel "
        "scores, not FID); a guided network call counts as two"
    )


def picture(results: list[dict[str, Any]]) -> np.ndarray:
    """The plot; runs and guidance weights are named where there are several."""
    several_runs, several_weights = (len({row[what] for row in results}) > 1 for what in ("run", "guidance"))
    points = []
    for row in results:
        names = [row["run"]] * several_runs + [row["sampler"]] + [f"guidance {row['guidance']:g}"] * several_weights
        value = row["values"][PLOTTED]["value"]
        points.append(plot.Point(", ".join(names), row["evaluations"], value, str(row["steps"])))
    recorded = results[0]["protocol"]
    title = f"{recorded['num']} images against {recorded['reference']['name']}, by sampler and steps"
    return plot.scatter(points, title, "NFE per image", PLOTTED)
