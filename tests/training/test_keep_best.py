"""checkpoint.keep_best: the best step by an evaluator stays beside the latest ones, and the curve is drawn."""

import contextlib
import json
import re
from types import SimpleNamespace

import numpy as np
import pytest
from PIL import Image

from diffjax.__main__ import main
from diffjax.archive import Archive, stored_steps
from diffjax.contracts import Result
from diffjax.errors import UserError
from diffjax.evaluation import plot
from diffjax.experiment import Experiment, schedule
from diffjax.training.evaluations import Evaluations
from tests.programs import complete_steps, tiny_config, train_arguments

VALUES = {"loss": [3.0, 1.0, 2.0, 4.0, 5.0]}
RUN = (
    "total_steps=5",
    "checkpoint.every_steps=1",
    "checkpoint.keep=1",
    "checkpoint.keep_best=loss",
    "evals.loss.every_steps=1",
)


@pytest.mark.parametrize(
    "saved, judged", [(1, 0), (2, 0), (2, 3), (4, 2)], ids=["never", "never_of_few", "between", "more_often"]
)
def test_an_evaluator_that_judges_no_checkpoint_is_refused(saved, judged):
    leaves = (f"checkpoint.every_steps={saved}", f"evals.loss.every_steps={judged}")
    config = tiny_config("checkpoint.keep_best=loss", *leaves)
    words = f"valid with evals.loss.every_steps a multiple of checkpoint.every_steps = {saved}, so that the steps it"
    with pytest.raises(UserError, match=re.escape(f"checkpoint.keep_best = 'loss': {words}")):
        schedule(config)


@pytest.mark.parametrize("saved, judged", [(1, 1), (2, 2), (2, 6)])
def test_an_evaluator_at_steps_that_are_saved(saved, judged):
    leaves = (f"checkpoint.every_steps={saved}", f"evals.fid.every_steps={judged}", "checkpoint.keep_best=fid")
    assert schedule(tiny_config(*leaves)).keep_best == "fid"
    assert schedule(tiny_config()).keep_best == ""


def test_an_evaluator_without_a_judgement_is_refused():
    with pytest.raises(UserError, match="checkpoint.keep_best = 'samples': valid: '', loss, scores, fid"):
        tiny_config("checkpoint.keep_best=samples", "evals.samples.every_steps=2")


def evaluations(workdir, judge):
    given = {"evaluate_every": {judge: 1}, "keep_best": judge, "total_steps": 9}
    return Evaluations(workdir, SimpleNamespace(schedule=SimpleNamespace(**given)))


def write(workdir, name, results):
    """The files of results, by step."""
    (workdir / "evals").mkdir()
    for step, values in results.items():
        judge = {"judge": name} if name in values else {}
        found = {"step": step, "evaluator": name, "values": values, "protocol": {"num": 9}, **judge}
        (workdir / "evals" / f"{name}_{step:08d}.json").write_text(json.dumps(found))


@pytest.mark.parametrize(
    "judge, results, best",
    [
        ("loss", {1: {"mse": 0.0, "loss": 3.0}, 2: {"mse": 9.0, "loss": 1.0}, 3: {"mse": 1.0, "loss": 2.0}}, {2}),
        ("fid", {1: {"fid": 3.0, "precision": 0.1}, 2: {"fid": 4.0, "precision": 0.0}}, {1}),
        ("fid", {1: {"not_finite": 0.0}, 2: {"fid": 4.0}}, {2}),
        ("loss", {1: {"loss": float("nan")}, 2: {"loss": 2.0}, 3: {"loss": 1.0}, 4: {"loss": float("nan")}}, {3}),
        ("loss", {1: {"loss": 2.0}, 3: {"loss": 2.0}}, {1}),  # of equals the first
        ("loss", {7: {"loss": 2.0}}, set()),  # a step that is gone
        ("loss", {}, set()),
    ],
)
def test_the_best_of_the_steps_that_are_there(tmp_path, judge, results, best):
    write(tmp_path, judge, results)
    assert evaluations(tmp_path, judge).best([1, 2, 3, 4]) == best


def test_results_that_do_not_compare_are_left_out(tmp_path):
    """Of another protocol than the latest; of an earlier version, which does not say what judges; of no result."""
    write(tmp_path, "fid", {step: {"fid": float(step)} for step in (1, 2, 3, 4, 5)})
    folder = tmp_path / "evals"
    for step, changes in ((1, {"protocol": {"num": 8}}), (2, {"judge": None})):
        path = folder / f"fid_{step:08d}.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | changes))
    (folder / "fid_00000003.json").write_text("[")
    assert evaluations(tmp_path, "fid").best([1, 2, 3, 4, 5]) == {4}


def test_an_archive_keeps_what_is_chosen_beside_the_latest(tmp_path):
    """The best of the steps whose results are there when the next one is saved."""
    found = evaluations(tmp_path, "loss")
    (tmp_path / "evals").mkdir()
    with contextlib.closing(Archive(tmp_path / "steps", "step", ("meta",), keep=1, keep_also=found.best)) as archive:
        for step, value in enumerate(VALUES["loss"], start=1):
            archive.save_items(step, {}, {"meta": {"step": step}})
            archive.wait()
            result = {"step": step, "values": {"loss": value}, "protocol": {}, "judge": "loss"}
            (tmp_path / "evals" / f"loss_{step:08d}.json").write_text(json.dumps(result))
    assert stored_steps(tmp_path / "steps") == [2, 5]


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A run whose averages have the losses VALUES."""
    workdir = tmp_path_factory.mktemp("best") / "run"
    left = {name: iter(values) for name, values in VALUES.items()}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            Experiment, "evaluators", lambda _: {"loss": lambda _: Result({"loss": next(left["loss"])}, judge="loss")}
        )
        assert main(train_arguments(workdir, *RUN)) == 0
    return workdir


@pytest.mark.slow
def test_the_best_step_stays_beside_the_latest(run):
    assert complete_steps(run) == [2, 5]


@pytest.mark.slow
def test_the_curve_of_the_value_is_drawn(run):
    picture = np.asarray(Image.open(run / "evals/loss.png"))
    found = list(enumerate(VALUES["loss"], start=1))
    np.testing.assert_array_equal(picture, plot.curve(found, "", "step", "loss"))


def test_the_lowest_value_of_a_curve_is_named():
    low = plot.curve([(1, 3.0), (2, 1.0), (3, 2.0)], "", "step", "fid")
    assert (low.dtype, low.shape) == (np.uint8, (450, 720, 3))
    below = plot.curve([(1, 3.0), (2, -1.0), (3, 2.0)], "", "step", "fid")  # no logarithm of it
    assert (low != below).any()
