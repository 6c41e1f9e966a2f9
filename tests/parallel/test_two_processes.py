"""Two programs on one machine, joined by jax.distributed, train as one program does."""

import json
import socket

import numpy as np
import pytest

from diffjax.verbs.inspect import inspect
from tests.programs import start, train_arguments


def free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


def losses(workdir):
    return [json.loads(line)["loss"] for line in (workdir / "metrics.jsonl").read_text().splitlines()]


# Snapshots and checkpoints at the same steps and at others.
TRACKS = ("ema.tracks=0.05,0.1", "ema.snapshot_every_steps=2")


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
