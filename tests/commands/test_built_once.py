"""Every command builds its process, backbone and sampler once."""

import collections
import functools
from pathlib import Path

import numpy as np
import pytest

import diffjax.diffusion
from diffjax import models
from diffjax.__main__ import main
from diffjax.diffusion import samplers
from diffjax.methods import diffusion
from tests.programs import train_arguments

pytestmark = pytest.mark.slow

RUN = ("evals.samples.every_steps=2", "evals.samples.num=4", "evals.loss.every_steps=2", "evals.loss.num=16")
RUN += ("ema.sigma_rel=0.05,0.1", "ema.snapshot_every_steps=1", "total_steps=2")
COMMANDS = {
    "train": [],
    "sample": ["--num=4", "--out={0}/samples.npz"],
    "evaluate": ["--num=4", "--reference=digits"],
    "ema": ["--sigma_rel=0.08", "--out={0}/average"],
    "sweep": ["--sampler=ddim:2", "--num=4", "--reference=digits", "--out={0}/sweep.json"],
}


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> Path:
    workdir = tmp_path_factory.mktemp("built-once") / "run"
    assert main(train_arguments(workdir, *RUN)) == 0
    return workdir


@pytest.fixture
def built(monkeypatch) -> collections.Counter:
    """How often each of the three is built."""
    counts: collections.Counter = collections.Counter()

    def counted(name, function):
        @functools.wraps(function)
        def call(*args, **kwargs):
            counts[name] += 1
            return function(*args, **kwargs)

        return call

    monkeypatch.setattr(diffusion, "create_process", counted("process", diffjax.diffusion.create_process))
    monkeypatch.setattr(models, "create", counted("model", models.create))
    monkeypatch.setattr(samplers, "schedule", counted("sampler", samplers.schedule))
    return counts


@pytest.mark.parametrize("command", COMMANDS)
def test_process_model_and_sampler_are_built_once(command, run, built, tmp_path):
    if command == "train":
        arguments = train_arguments(tmp_path / "run", *RUN)
    else:
        arguments = [command, f"--workdir={run}", *(text.format(tmp_path) for text in COMMANDS[command])]
    assert main(arguments) == 0
    sampler = 0 if command == "ema" else 1
    assert built == collections.Counter({"process": 1, "model": 1, "sampler": sampler})


def test_evaluate_draws_what_sample_writes(run, tmp_path, capsys):
    assert main(["sample", f"--workdir={run}", "--num=4", f"--out={tmp_path}/samples.npz"]) == 0
    assert main(["evaluate", f"--samples={tmp_path}/samples.npz", "--reference=digits"]) == 0
    assert main(["evaluate", f"--workdir={run}", "--num=4", "--reference=digits", f"--out={tmp_path}/run.json"]) == 0
    capsys.readouterr()
    assert main(["evaluate", "--compare", f"{tmp_path}/samples.scores.json", f"{tmp_path}/run.json"]) == 0
    lines = capsys.readouterr().out.splitlines()[1:]
    assert lines
    assert all(np.isclose(float(line.split()[-1]), 0, atol=1e-3) for line in lines)
