"""Run the evaluators of a run when they are due, and write their results.

    evals/<name>_<step>.json     {"step": ..., "evaluator": ..., "values": {...}, "protocol": {...}}
    samples/step_<step>.png      the picture of the evaluator `samples`; of any other evals/<name>_<step>.png
    evals/<name>.png             the value over steps by which an evaluator judges, where matplotlib is installed

The json is written last: an evaluation without one has not been made, and is run when the run resumes. Earlier versions
wrote the picture of `samples` alone, which counts, too.
"""

import json
from collections.abc import Collection
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils

from diffjax.contracts import Evaluator, Result
from diffjax.errors import writing
from diffjax.evaluation import plot
from diffjax.experiment import Experiment
from diffjax.files import write_json
from diffjax.parallel import hosts
from diffjax.sampling import samples
from diffjax.training.metrics import Reporter


class Evaluations:
    """See the module docstring."""

    def __init__(self, workdir: Path, experiment: Experiment):
        self._workdir, self._experiment = workdir, experiment
        self._every = experiment.schedule.evaluate_every
        self._judge = experiment.schedule.keep_best
        self._total = experiment.schedule.total_steps
        self._evaluators: dict[str, Evaluator] = {}
        self._compiled: set[str] = set()

    def prepare(self) -> None:
        """Make the evaluators. UserError for one that this experiment cannot have."""
        self._evaluators = self._experiment.evaluators()

    def due(self, step: int) -> list[str]:
        """The evaluators that run at a step; at the last one all of them do."""
        return [name for name, every in self._every.items() if step and (step % every == 0 or step == self._total)]

    def missing(self, step: int) -> list[str]:
        """Those that are due at a step and have no result; every process gets what the lead finds."""
        due = self.due(step)
        absent = np.array([not self._is_made(name, step) for name in due], bool)
        if jax.process_count() > 1 and due:
            absent = multihost_utils.broadcast_one_to_all(absent)
        return [name for name, is_absent in zip(due, absent) if is_absent]

    def best(self, steps: Collection[int]) -> set[int]:
        """The one of these steps that the evaluator of checkpoint.keep_best finds best; none where it has no result."""
        found = {step: value for step, (_, value) in self._judged(self._judge).items() if step in steps}
        return {min(found, key=lambda step: found[step])} if found else set()

    def _judged(self, name: str) -> dict[int, tuple[str, float]]:
        """By step, the value by which an evaluator judges, and its name.

        Left out are values that are not finite, and those made otherwise than the latest, which do not compare.
        """
        results = [_read(path) for path in sorted((self._workdir / "evals").glob(f"{name}_*.json"))]
        judging = [result for result in results if result.get("judge") in result.get("values", {})]
        return {
            result["step"]: (result["judge"], result["values"][result["judge"]])
            for result in judging
            if _made(result) == _made(judging[-1]) and np.isfinite(result["values"][result["judge"]])
        }

    def _draw_curve(self, name: str) -> None:
        found = self._judged(name)
        if len(found) > 1 and plot.missing() is None:
            [*_, (score, _)] = found.values()
            points = [(step, value) for step, (_, value) in found.items()]
            samples.write_png(self._path(name, 0).with_name(f"{name}.png"), plot.curve(points, "", "step", score))

    def _is_made(self, name: str, step: int) -> bool:
        # Earlier versions wrote the picture alone.
        pictured = name == "samples" and self._picture(name, step).is_file()
        return pictured or self._path(name, step).is_file()

    def run(self, names: list[str], step: int, params: Any, reporter: Reporter) -> None:
        """Evaluate averaged parameters, and write and report the results; every process calls it."""
        for name in names:
            if name not in self._compiled:
                reporter.say(f"compiling evaluator {name} (once)")
                self._compiled.add(name)
            result = self._evaluators[name](params)
            if "not_finite" in result.values:
                reporter.say(f"step {step}: sampled values are not finite; {name} has no result")
            reporter.evaluation(name, step, result.values)
            if result.picture is not None:
                reporter.image(name, step, result.picture)
            if hosts.is_lead():
                self._write(name, step, result)

    def _write(self, name: str, step: int, result: Result) -> None:
        path = self._path(name, step)
        with writing(path):
            path.parent.mkdir(exist_ok=True)
            if result.picture is not None:
                picture = self._picture(name, step)
                picture.parent.mkdir(exist_ok=True)
                samples.write_png(picture, result.picture)
            found = {"step": step, "evaluator": name, "values": dict(result.values), "protocol": dict(result.protocol)}
            write_json(path, {**found, **({"judge": result.judge} if result.judge else {})})
            if result.judge:
                self._draw_curve(name)

    def _picture(self, name: str, step: int) -> Path:
        if name == "samples":
            return self._workdir / "samples" / f"step_{step:08d}.png"
        return self._path(name, step).with_suffix(".png")

    def _path(self, name: str, step: int) -> Path:
        return self._workdir / "evals" / f"{name}_{step:08d}.json"


def _read(path: Path) -> dict[str, Any]:
    """A result; {} of a file that holds something else."""
    try:
        result = json.loads(path.read_text())
    except ValueError:
        return {}
    return result if isinstance(result, dict) and isinstance(result.get("values"), dict) else {}


def _made(result: dict[str, Any]) -> tuple[str, dict[str, Any]]:
    """What has to be equal of two results that are compared; the code may be another."""
    return result["judge"], {name: value for name, value in result["protocol"].items() if name != "code_version"}
