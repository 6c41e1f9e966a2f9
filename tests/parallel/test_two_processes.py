"""Two programs on one machine, joined by jax.distributed, train as one program does."""

import json
import socket

import numpy as np
import pytest

from diffjax.commands.inspect import inspect
from tests.programs import start, train_arguments


def free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


def losses(workdir):
    rows = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    return [row["loss"] for row in rows if "evaluation" not in row]


def finish(arguments, folder, name, processes=2):
    """Run a command as one program, or as two that are joined; all of them have to end well."""
    address = {"JAX_COORDINATOR_ADDRESS": f"127.0.0.1:{free_port()}", "JAX_NUM_PROCESSES": "2"}
    each = [address | {"JAX_PROCESS_ID": str(i)} for i in range(2)] if processes == 2 else [{}]
    logs = [folder / f"{name}-{i}.log" for i in range(processes)]
    started = [start(arguments, log, **variables) for log, variables in zip(logs, each)]
    for process, log in zip(started, logs):
        assert process.wait(timeout=300) == 0, log.read_text()


def results(workdir):
    found = sorted((workdir / "evals").glob("*.json"))
    return {path.stem: json.loads(path.read_text())["values"] for path in found}


# Snapshots and checkpoints at the same steps and at others.
TRACKS = ("ema.sigma_rel=0.05,0.1", "ema.snapshot_every_steps=2")


@pytest.mark.slow
def test_two_processes_train_as_one(tmp_path):
    arguments = ("total_steps=6", "log.every_steps=1", "checkpoint.every_steps=3", *TRACKS)
    alone = start(train_arguments(tmp_path / "alone", *arguments), tmp_path / "alone.log")
    assert alone.wait(timeout=300) == 0, (tmp_path / "alone.log").read_text()

    address = {"JAX_COORDINATOR_ADDRESS": f"127.0.0.1:{free_port()}", "JAX_NUM_PROCESSES": "2"}
    together = train_arguments(tmp_path / "together", *arguments)
    pair = [start(together, tmp_path / f"{i}.log", **address, JAX_PROCESS_ID=str(i)) for i in (0, 1)]
    for i, process in enumerate(pair):
        assert process.wait(timeout=300) == 0, (tmp_path / f"{i}.log").read_text()

    np.testing.assert_allclose(losses(tmp_path / "together"), losses(tmp_path / "alone"), rtol=1e-5)
    report = inspect(tmp_path / "together")
    assert (report["steps"], report["snapshots"]) == ([3, 6], [2, 4, 6])
    assert report["meta"]["processes"] == 2
    assert "step 6/6" not in (tmp_path / "1.log").read_text(), "only the first process speaks"


# More samples than a batch of the evaluators, and a last batch of examples that is not full.
EVALUATED = ("evals.loss.every_steps=4", "evals.loss.num=41", "evals.scores.every_steps=4", "evals.scores.num=150")
SPREAD = ("parallel.strategy=fsdp", "parallel.mesh.data=1", "parallel.mesh.fsdp=-1", "parallel.replicate_below=0")


@pytest.mark.slow
def test_two_processes_evaluate_and_sample_as_one(tmp_path):
    for processes in (1, 2):
        run = tmp_path / f"run-{processes}"
        finish(train_arguments(run, *EVALUATED, *SPREAD, "total_steps=4"), tmp_path, f"train-{processes}", processes)
        # The parameters lie on both processes.
        sample = ["sample", f"--workdir={run}", "--num=50", "--batch_size=16", f"--out={tmp_path}/{processes}.npz"]
        finish(sample, tmp_path, f"sample-{processes}", processes)
    alone, together = (results(tmp_path / f"run-{processes}") for processes in (1, 2))
    assert alone.keys() == together.keys() == {"loss_00000004", "scores_00000004"}
    for name, value in alone["loss_00000004"].items():
        np.testing.assert_allclose(together["loss_00000004"][name], value, rtol=1e-4, err_msg=name)
    assert together["scores_00000004"].keys() == alone["scores_00000004"].keys()
    with np.load(tmp_path / "1.npz") as one, np.load(tmp_path / "2.npz") as two:
        assert np.abs(one["arr_0"].astype(int) - two["arr_0"]).max() <= 1
        np.testing.assert_array_equal(one["arr_1"], two["arr_1"])
