"""A run that diverges says where, with exit code 1, and writes nothing of it."""

import json
import math
import subprocess
import sys

import jax
import numpy as np
import pytest

from diffjax.__main__ import main
from diffjax.data import pipeline, sources
from diffjax.errors import UserError
from diffjax.experiment import Experiment
from diffjax.training import loop, nonfinite
from diffjax.training.checkpoint import Checkpoints
from diffjax.training.metrics import NonFiniteError
from tests import slow
from tests.programs import ROOT, complete_steps, tiny_config, train_arguments

DIVERGING = ("optim.lr=1e12", "optim.warmup_steps=0", "total_steps=20", "log.every_steps=1")


def assert_finite(workdir, step):
    with_state = Checkpoints(workdir, read_only=True)
    for item in ("state", "ema"):
        assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(with_state.restore_arrays(item, step)))


@pytest.mark.parametrize("every", slow.but([100], [1, 100]))
def test_divergence_names_its_step_and_is_not_saved(tmp_path, every):
    with pytest.raises(NonFiniteError, match=r"\w+ is (nan|inf|-inf) at step \d+; ") as caught:
        main(train_arguments(tmp_path, *DIVERGING, f"checkpoint.every_steps={every}"))
    step = int(str(caught.value).split(" at step ")[1].split(";")[0])
    assert 1 < step < 20
    reported = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in reported] == list(range(1, step))
    assert all(math.isfinite(line["loss"]) for line in reported)
    steps = complete_steps(tmp_path)
    if every == 100:
        assert not steps
        assert "no checkpoint was written" in str(caught.value)
    else:
        assert max(steps) < step
        assert f"the last checkpoint is step {max(steps)}; nothing was written after it" in str(caught.value)
        for kept in steps:
            assert_finite(tmp_path, kept)


@pytest.mark.slow
def test_a_checkpoint_that_was_good_stays(tmp_path, monkeypatch):
    """Images that turn infinite after step 5, between the checkpoints 4 and 6."""
    draw = loop.pipeline.Batches.__next__

    def spoil(self):
        batch = draw(self)
        return batch._replace(raw=batch.raw * np.float32(np.inf)) if self.get_state()["next_batch"] > 5 else batch

    monkeypatch.setattr(loop.pipeline.Batches, "__next__", spoil)
    options = ("total_steps=20", "checkpoint.every_steps=2", "optim.warmup_steps=0")
    with pytest.raises(NonFiniteError, match="at step 6; the last checkpoint is step 4"):
        main(train_arguments(tmp_path, *options))
    assert max(complete_steps(tmp_path)) == 4
    assert_finite(tmp_path, 4)


def test_what_was_not_finite_is_named(tmp_path, monkeypatch):
    """Two of the digits turn into infinite values where they are stored."""
    stream = pipeline.Batches(sources.digits(), batch_size=16, seed=tiny_config().seed, flip=False)
    spoilt = stream.examples(2)[3:5]
    get = pipeline.collate

    def spoil(source, examples, index, mirrored, number):
        batch = get(source, examples, index, mirrored, number)
        raw = batch.raw.astype(np.float32)
        return batch._replace(raw=np.where(np.isin(index, (3, 4))[:, None, None, None] & (number == 2), np.inf, raw))

    monkeypatch.setattr(pipeline, "collate", spoil)
    with pytest.raises(NonFiniteError, match="at step 3; the last checkpoint is step 2") as caught:
        main(train_arguments(tmp_path, "total_steps=9", "optim.warmup_steps=0"))
    words = str(caught.value)
    assert "not finite: gradients of all 21 arrays; of its 16 examples as they are stored: " in words
    assert words.count("\n") == 0
    assert f"as they are stored: {spoilt[0]}, {spoilt[1]}; " in words
    found = json.loads((tmp_path / "nonfinite.json").read_text())
    assert found["step"] == 3
    assert found["examples_not_finite"] == spoilt
    assert len(found["examples"]) == 16
    assert "blocks/mlp/fc1/kernel" in found["gradients"]


def infinite_batches(monkeypatch, *numbers):
    """The batches of these numbers are infinite."""
    draw = pipeline.Batches.__next__

    def spoil(self):
        number, batch = self.get_state()["next_batch"], draw(self)
        return batch._replace(raw=batch.raw + np.float32(np.inf if number in numbers else 0))

    monkeypatch.setattr(pipeline.Batches, "__next__", spoil)


SKIPPING = ("total_steps=8", "optim.skip_nonfinite=2", "optim.warmup_steps=100", "log.every_steps=1")


def test_steps_that_are_not_finite_are_left_out_by_option(tmp_path, monkeypatch, capsys):
    infinite_batches(monkeypatch, 2, 4, 5)
    arguments = train_arguments(tmp_path, *SKIPPING, "checkpoint.every_steps=3")
    assert main(arguments) == 0
    assert "step 6: the gradient is not finite, the update is left out (3 so far)\n" in capsys.readouterr().out
    rows = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [row["skipped_steps"] for row in rows] == [0, 0, 1, 1, 2, 3, 3, 3]
    rates = [row["learning_rate"] for row in rows]  # of the warm-up, which stands still meanwhile
    np.testing.assert_allclose(rates, np.array([0, 1, 2, 2, 3, 3, 3, 4]) * rates[1], rtol=1e-5)
    assert ["loss" in row for row in rows] == [True, True, False, True, False, False, True, True]
    assert_finite(tmp_path, 8)
    checkpoints = Checkpoints(tmp_path, read_only=True)
    before, after = (checkpoints.restore_arrays("state", step) for step in (3, 6))
    assert (int(before["step"]), int(after["step"])) == (3, 6)
    counts = after["opt_state"]["inner_state"]
    assert {int(leaf) for leaf in jax.tree.leaves(counts) if leaf.ndim == 0} == {3}  # updates made


def test_a_diagnosis_that_fails_does_not_hide_the_fault(tmp_path, monkeypatch):
    def gone(self, number):
        raise UserError("data/x.array_record is gone")

    infinite_batches(monkeypatch, 1)
    monkeypatch.setattr(pipeline.Batches, "not_finite", gone)
    with pytest.raises(NonFiniteError, match="at step 2; .*could not be found out: data/x.array_record is gone$"):
        main(train_arguments(tmp_path, "total_steps=4"))


def test_one_step_too_many_that_is_not_finite_ends_the_run(tmp_path, monkeypatch):
    infinite_batches(monkeypatch, 1, 3, 4, 5)
    with pytest.raises(NonFiniteError, match="is nan at step 6; no checkpoint was written"):
        main(train_arguments(tmp_path, *SKIPPING, "checkpoint.every_steps=100"))


def test_arrays_that_are_not_finite_are_found_among_others():
    squares = np.array([1.0, np.inf, 0.0, np.nan], np.float32)
    assert nonfinite.arrays(squares, ["a", "b", "c", "d"]) == ["b", "d"]


@pytest.mark.slow
def test_parameters_that_overflow_under_a_finite_gradient_are_not_saved(tmp_path):
    options = ("optim.lr=3e38", "optim.warmup_steps=0", "total_steps=20", "checkpoint.every_steps=1")
    with pytest.raises(NonFiniteError, match="param_norm is (nan|inf) at step 1; no checkpoint was written"):
        main(train_arguments(tmp_path, *options))
    assert not complete_steps(tmp_path)


@pytest.mark.slow
def test_exit_code(tmp_path):
    done = subprocess.run(
        [sys.executable, "-m", "diffjax", *train_arguments(tmp_path, *DIVERGING, "checkpoint.every_steps=1")],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 1
    assert "at step" in done.stderr.splitlines()[-1]


@pytest.mark.slow
def test_a_picture_that_is_not_finite_costs_no_step(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(Experiment, "images", lambda *_: iter([np.full((2, 8, 8, 1), np.nan)]))
    pictures = ("--config.evals.samples.every_steps=2", "--config.evals.samples.num=2")
    assert main([*train_arguments(tmp_path / "run", "total_steps=4"), *pictures]) == 0
    assert "sampled values are not finite" in capsys.readouterr().out
    assert complete_steps(tmp_path / "run") == [2, 4]
