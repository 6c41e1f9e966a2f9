"""What a run leaves behind besides its checkpoints: rows of metrics, evaluations, a trace; also after interruptions."""

import json
import shutil

import jax
import numpy as np
import pytest

from diffjax.__main__ import main
from diffjax.config import read
from diffjax.evaluation.evaluators import by_bin
from diffjax.parallel.mesh import make_mesh
from diffjax.runs import open_run
from diffjax.training import loop
from diffjax.training.optimizer import schedule
from tests.programs import complete_steps, start, train_arguments

EVALS = ("evals.loss.every_steps=2", "evals.loss.num=40", "evals.scores.every_steps=4", "evals.scores.num=20")
RUN = (
    "total_steps=4",
    "checkpoint.every_steps=2",
    "log.every_steps=1",
    "optim.warmup_steps=0",
    "ema.decay=0.5",
    *EVALS,
)


@pytest.fixture(scope="module")
def straight(tmp_path_factory):
    workdir = tmp_path_factory.mktemp("straight") / "run"
    assert main(train_arguments(workdir, *RUN)) == 0
    return workdir


@pytest.fixture
def copied(straight, tmp_path):
    return shutil.copytree(straight, tmp_path / "run")


def killed_at_3(workdir):
    """The run as a kill in step 4 leaves it: the checkpoint of step 2, rows up to step 3, and half of one."""
    shutil.rmtree(workdir / "checkpoints/4")
    for path in workdir.glob("evals/*_00000004.json"):
        path.unlink()
    rows = [line for line in lines(workdir) if json.loads(line)["step"] <= 3]
    (workdir / "metrics.jsonl").write_text("".join(rows) + '{"step": 4, "lo')


def lines(workdir):
    return (workdir / "metrics.jsonl").read_text().splitlines(keepends=True)


def rows(workdir):
    """(rows of training, rows of evaluations)."""
    every = [json.loads(line) for line in lines(workdir)]
    return [row for row in every if "evaluation" not in row], [row for row in every if "evaluation" in row]


def evaluations(workdir):
    return {path.stem: json.loads(path.read_text()) for path in workdir.glob("evals/*.json")}


def test_rows_of_metrics(straight):
    training, _ = rows(straight)
    config = read(straight / "config.json")
    rate = schedule(config.optim, config.total_steps)
    assert [row["step"] for row in training] == [1, 2, 3, 4]
    for row in training:
        assert row["images_seen"] == 16 * row["step"]
        assert row["learning_rate"] == pytest.approx(float(rate(row["step"] - 1)), rel=1e-6)
        assert 0 <= row["input_wait_seconds"] < row["seconds"]
    assert len({row["learning_rate"] for row in training}) == 4
    seconds = [row["seconds"] for row in training]
    assert seconds == sorted(seconds)


def test_every_evaluation_is_a_file_and_a_row(straight):
    found, (_, written) = evaluations(straight), rows(straight)
    assert found.keys() == {"loss_00000002", "loss_00000004", "scores_00000004"}
    for name, result in found.items():
        evaluator, _, step = name.partition("_")
        assert (result["evaluator"], result["step"]) == (evaluator, int(step))
        [row] = [row for row in written if (row["evaluation"], row["step"]) == (evaluator, int(step))]
        assert row == {"step": int(step), "evaluation": evaluator, **result["values"]}
        assert np.isfinite(list(result["values"].values())).all()
    loss, scores = found["loss_00000004"], found["scores_00000004"]
    assert (loss["protocol"]["num"], loss["protocol"]["data"]["split"]) == (40, "test")
    assert {"loss", "mse", "loss_0", "loss_1", "loss_2", "loss_3"} <= loss["values"].keys()
    assert loss["values"]["loss_0"] > loss["values"]["loss_3"]  # noise is easier to see where there is more of it
    assert loss["values"] != found["loss_00000002"]["values"]
    assert scores["protocol"]["num"] == 20
    assert scores["values"]["frechet_distance_pixels"] > 0


def test_a_loss_by_parts_of_the_time():
    loss, fraction = np.array([1.0, 2.0, 4.0, 8.0, 16.0]), np.array([0.0, 0.2, 0.3, 0.8, 1.0])
    assert by_bin(loss, fraction, 4) == {"loss_0": 1.5, "loss_1": 4.0, "loss_3": 12.0}
    assert by_bin(loss, fraction, 1) == {}
    assert by_bin(loss, np.zeros(5), 4) == {}


@pytest.mark.slow
def test_the_held_out_loss_does_not_depend_on_devices(straight):
    stored = evaluations(straight)["loss_00000004"]["values"]
    for mesh in (make_mesh({"data": 1}, jax.devices()[:1]), make_mesh({"data": 8})):
        run = open_run(straight, mesh=mesh)
        found = run.experiment.evaluators()["loss"](run.params).values
        assert found.keys() == stored.keys()
        for name, value in found.items():
            assert value == pytest.approx(stored[name], rel=1e-5), name


@pytest.mark.slow
def test_rows_beyond_the_step_that_a_run_goes_on_from_are_dropped(straight, copied, monkeypatch):
    killed_at_3(copied)
    meta = loop.Checkpoints.meta
    monkeypatch.setattr(loop.Checkpoints, "meta", lambda self, step: {**meta(self, step), "seconds": 1000.0})
    assert main(train_arguments(copied, *RUN)) == 0
    training, written = rows(copied)
    assert [row["step"] for row in training] == [1, 2, 3, 4]
    assert [row["loss"] for row in training] == [row["loss"] for row in rows(straight)[0]]
    assert [(row["evaluation"], row["step"]) for row in written] == [("loss", 2), ("loss", 4), ("scores", 4)]
    before, after = training[1]["seconds"], training[2]["seconds"]
    assert before < 1000 < after < training[3]["seconds"] < 1300  # the time of the first start is not forgotten
    assert evaluations(copied) == evaluations(straight)


def test_seconds_of_a_checkpoint(straight):
    checkpoints = loop.Checkpoints(straight, read_only=True)
    training, _ = rows(straight)
    first, last = (checkpoints.meta(step)["seconds"] for step in (2, 4))
    assert training[1]["seconds"] <= first <= training[2]["seconds"]
    assert training[3]["seconds"] <= last


@pytest.mark.slow
def test_an_evaluation_that_a_kill_left_out_is_made_up_for(straight, copied):
    killed_at_3(copied)
    (copied / "evals/loss_00000002.json").unlink()
    assert main(train_arguments(copied, *RUN)) == 0
    assert evaluations(copied) == evaluations(straight)


def test_the_last_evaluation_of_a_finished_run_is_made_up_for(straight, copied, capsys):
    (copied / "evals/loss_00000004.json").unlink()
    arguments = train_arguments(copied, *RUN)
    assert main(arguments) == 0
    assert evaluations(copied) == evaluations(straight)
    assert complete_steps(copied) == [2, 4]
    capsys.readouterr()
    assert main(arguments) == 0
    assert capsys.readouterr().out == f"{copied} is finished: step 4 of 4\n"


@pytest.mark.slow
def test_a_trace_of_some_steps(tmp_path, capsys):
    # A program of its own: jax's tracer ended a process that had run hundreds of other programs before.
    traced, log = tmp_path / "traced", tmp_path / "log"
    program = start([*train_arguments(traced, *RUN[:4]), "--profile=2:3"], log)
    assert program.wait(timeout=300) == 0, log.read_text()
    assert list((traced / "profile").rglob("*.xplane.pb"))
    for text in ("3", "3:2", "a:b", "-1:2"):
        assert main([*train_arguments(tmp_path / "run", *RUN), f"--profile={text}"]) == 2
        error = capsys.readouterr().err
        assert f"--profile={text}: valid: FIRST:LAST" in error
        assert error.count("\n") == 1
    assert main([*train_arguments(tmp_path / "run", *RUN), "--profile=4:9"]) == 2
    assert "--profile=4:9: this start makes steps 0 to 3" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


REFUSED = {
    "loss-split": (("evals.loss.every_steps=2", "evals.loss.split=dev"), "is not a split of digits"),
    "bins": (("evals.loss.bins=0",), "evals.loss.bins = 0: valid: 1 or more"),
    "scores": (("evals.scores.every_steps=2", "evals.scores.num=1"), "evals.scores.num = 1: valid: 2 or more"),
}


@pytest.mark.parametrize("leaves, reason", REFUSED.values(), ids=REFUSED)
def test_evaluations_that_cannot_be_made_are_refused_beforehand(tmp_path, capsys, leaves, reason):
    assert main(train_arguments(tmp_path / "run", *leaves)) == 2
    error = capsys.readouterr().err
    assert reason in error
    assert error.count("\n") == 1
    assert not (tmp_path / "run").exists()
