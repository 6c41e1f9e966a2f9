"""Two programs on one machine, joined by jax.distributed, train as one program does."""

import json
import socket

import numpy as np
import pytest

from diffjax.commands.inspect import inspect
from diffjax.data import latents
from diffjax.frozen import create
from diffjax.weights import store
from tests.commands import test_encode
from tests.frozen.test_vae import some_params
from tests.programs import kill, start, train_arguments, wait_for


def free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


def losses(workdir):
    rows = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    return [row["loss"] for row in rows if "evaluation" not in row]


def begin(each, folder, name, **given):
    """Start a program for each list of arguments, joined where they are two; (programs, their logs)."""
    address = {"JAX_COORDINATOR_ADDRESS": f"127.0.0.1:{free_port()}", "JAX_NUM_PROCESSES": "2"}
    variables = [address | {"JAX_PROCESS_ID": str(i)} for i in range(2)] if len(each) == 2 else [{}]
    logs = [folder / f"{name}-{i}.log" for i in range(len(each))]
    return [start(arguments, log, **given, **own) for arguments, log, own in zip(each, logs, variables)], logs


def finish(arguments, folder, name, processes=2, **given):
    """Run a command as one program, or as two that are joined; all of them have to end well."""
    for process, log in zip(*begin([arguments] * processes, folder, name, **given)):
        assert process.wait(timeout=300) == 0, log.read_text()


def results(workdir):
    found = sorted((workdir / "evals").glob("*.json"))
    return {path.stem: json.loads(path.read_text())["values"] for path in found}


# Snapshots and checkpoints at the same steps and at others.
TRACKS = ("ema.sigma_rel=0.05,0.1", "ema.snapshot_every_steps=2")


@pytest.mark.slow
def test_two_processes_train_as_one(tmp_path):
    arguments = (
        "total_steps=6",
        "log.every_steps=1",
        "checkpoint.every_steps=100",
        "checkpoint.every_minutes=1e-6",
        *TRACKS,
    )
    alone = start(train_arguments(tmp_path / "alone", *arguments), tmp_path / "alone.log")
    assert alone.wait(timeout=300) == 0, (tmp_path / "alone.log").read_text()

    address = {"JAX_COORDINATOR_ADDRESS": f"127.0.0.1:{free_port()}", "JAX_NUM_PROCESSES": "2"}
    together = train_arguments(tmp_path / "together", *arguments)
    pair = [start(together, tmp_path / f"{i}.log", **address, JAX_PROCESS_ID=str(i)) for i in (0, 1)]
    for i, process in enumerate(pair):
        assert process.wait(timeout=300) == 0, (tmp_path / f"{i}.log").read_text()

    np.testing.assert_allclose(losses(tmp_path / "together"), losses(tmp_path / "alone"), rtol=1e-5)
    report = inspect(tmp_path / "together")
    assert (report["steps"], report["snapshots"]) == ([4, 5, 6], [2, 4, 6])
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


# `encode` in shards of 200 images.
IN_SMALL_SHARDS = """
import sys
from diffjax.__main__ import main
from diffjax.data import latents
latents.SHARD_SIZE = 200
sys.exit(main(sys.argv[1:]))
"""


@pytest.fixture
def encoding(tmp_path):
    """The arguments of `encode` to a folder: 1,500 digits, in eight shards."""
    module = create("VAE", **test_encode.VAE)
    store.save(tmp_path / "vae", module, some_params(module), {})
    given = test_encode.given(f"autoencoder.weights={tmp_path / 'vae'}")
    return lambda out: ["encode", *given, f"--out={out}", "--batch_size=8"]


def files(out):
    return {path.name: path.read_bytes() for path in out.iterdir() if path.name != ".lock"}


@pytest.mark.slow
def test_two_processes_encode_as_one(encoding, tmp_path):
    """The same bytes, also where one was killed and the same command goes on."""
    program = {"program": ("-c", IN_SMALL_SHARDS)}
    for processes in (1, 2):
        finish(encoding(tmp_path / str(processes)), tmp_path, f"encode-{processes}", processes, **program)
    assert files(tmp_path / "1") == files(tmp_path / "2")
    assert len(files(tmp_path / "1")) == 9
    assert "wrote 1500 latents" in (tmp_path / "encode-2-0.log").read_text()
    assert "wrote" not in (tmp_path / "encode-2-1.log").read_text(), "only the first process speaks"

    out = tmp_path / "killed"
    both, logs = begin([encoding(out)] * 2, tmp_path, "killed", **program)
    assert wait_for(lambda: list(out.glob("*.array_record")), both[1], logs[1])
    for process in both:
        kill(process)
    kept = {name: data for name, data in files(out).items() if name.endswith(".array_record")}
    assert 0 < len(kept) < 8
    finish(encoding(out), tmp_path, "again", **program)
    assert files(out) == files(tmp_path / "1")


@pytest.mark.slow
def test_a_folder_that_processes_do_not_share_is_said(encoding, tmp_path):
    both = [encoding(tmp_path / name) for name in ("one", "other")]
    for process, log in zip(*begin(both, tmp_path, "apart")):
        assert process.wait(timeout=300) == 2, log.read_text()
        assert "all processes have to see the same folder" in log.read_text()
    assert not list(tmp_path.glob(f"*/{latents.MANIFEST}"))


@pytest.mark.slow
def test_what_stops_the_first_process_stops_both(encoding, tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / latents.MANIFEST).write_text("{}")
    for process, log in zip(*begin([encoding(tmp_path / "out")] * 2, tmp_path, "stopped")):
        assert process.wait(timeout=300) == 2, log.read_text()
        assert "already holds latents.json" in log.read_text()


@pytest.mark.slow
def test_processes_that_were_given_different_configs_say_so(tmp_path):
    shared = ("total_steps=4", "data.threads=1")
    each = [train_arguments(tmp_path / "run", *shared, f"optim.lr={rate}") for rate in (0.1, 0.2)]
    processes, logs = begin(each, tmp_path, "different")
    for process, log in zip(processes, logs):
        assert process.wait(timeout=300) == 2, log.read_text()
        words = "process 1 was given another config than process 0: optim.lr: 0.1 -> 0.2 (0 -> 1); start all processes"
        assert words in log.read_text().splitlines()[-1]
    assert not (tmp_path / "run").exists()
