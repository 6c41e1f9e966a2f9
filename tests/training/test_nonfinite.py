"""A run that diverges says where, with exit code 1, and writes nothing of it."""

import json
import math
import subprocess
import sys

import jax
import numpy as np
import pytest

from diffjax.__main__ import main
from diffjax.experiment import Experiment
from diffjax.training import loop
from diffjax.training.checkpoint import Checkpoints
from diffjax.training.metrics import NonFiniteError
from tests import slow
from tests.programs import ROOT, complete_steps, train_arguments

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
