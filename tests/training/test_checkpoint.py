"""Checkpoints: what is kept, and what happens when they are damaged or the disk is full."""

import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
from contextlib import contextmanager

import jax
import numpy as np
import pytest

from diffjax.__main__ import main
from diffjax.commands.inspect import inspect
from diffjax.config import read
from diffjax.experiment import build
from diffjax.training import loop
from diffjax.training.checkpoint import Checkpoints
from tests import slow
from tests.programs import ROOT, complete_steps, train_arguments

RUN = ("checkpoint.every_steps=2", "log.every_steps=4")


def listing(folder):
    """{relative path: sha256} of everything below."""
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() if path.is_file() else "folder"
        for path in folder.rglob("*")
    }


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A run of 6 of its 8 steps, with checkpoints 2, 4 and 6; and the hashes at the end of the run never damaged."""
    folder = tmp_path_factory.mktemp("runs")
    assert main(train_arguments(folder / "straight", *RUN, "total_steps=8")) == 0
    shutil.copytree(folder / "straight", folder / "run")
    shutil.rmtree(folder / "run/checkpoints/8")
    assert complete_steps(folder / "run") == [4, 6]
    return folder / "run", inspect(folder / "straight")["sha256"]


@pytest.fixture
def damaged(run, tmp_path):
    shutil.copytree(run[0], tmp_path / "run")
    return tmp_path / "run"


@pytest.mark.slow
def test_the_latest_and_every_mth_are_kept(tmp_path):
    options = ("checkpoint.every_steps=1", "checkpoint.keep=2", "checkpoint.keep_every_steps=5", "total_steps=12")
    assert main(train_arguments(tmp_path, *options)) == 0
    assert complete_steps(tmp_path) == [5, 10, 11, 12]


@pytest.mark.parametrize(
    "minutes, of_lead, complete",
    slow.but([(1e-6, None, [3, 6, 8])], [(1e-6, None, [3, 6, 8]), (60.0, None, [8]), (60.0, True, [3, 6, 8])]),
)
def test_a_checkpoint_after_so_many_minutes_at_the_next_report(tmp_path, monkeypatch, run, minutes, of_lead, complete):
    """By the clock of the lead, whatever the own one says."""
    if of_lead is not None:
        monkeypatch.setattr(loop.hosts, "leads", lambda own: np.array(of_lead))
    watching = ("checkpoint.every_steps=100", f"checkpoint.every_minutes={minutes}", "log.every_steps=3")
    assert main(train_arguments(tmp_path, *watching, "total_steps=8")) == 0
    assert complete_steps(tmp_path) == complete
    assert inspect(tmp_path)["sha256"] == run[1]


def largest(folder, pattern):
    return max((path for path in folder.glob(pattern) if path.is_file()), key=lambda path: path.stat().st_size)


FILES = {
    "state-arrays": "state/ocdbt.process_0/d/*",
    "state-index": "state/d/*",
    "state-manifest": "state/manifest.ocdbt",
    "state-tree": "state/_METADATA",
    "ema-arrays": "ema/ocdbt.process_0/d/*",
    "ema-manifest": "ema/manifest.ocdbt",
    "data": "data/metadata",
}


def truncate(path):
    os.truncate(path, path.stat().st_size // 2)


DAMAGES = {
    **{f"truncated-{name}": (lambda step, p=p: truncate(largest(step, p))) for name, p in FILES.items()},
    # Indexes carry checksums. The bytes of the arrays carry none: there a flipped bit is a changed number.
    "flipped-state-index": lambda step: flip_bit(largest(step, "state/d/*")),
    "flipped-ema-index": lambda step: flip_bit(largest(step, "ema/d/*")),
    "no-state": lambda step: shutil.rmtree(step / "state"),
    "no-ema": lambda step: shutil.rmtree(step / "ema"),
    "no-data": lambda step: shutil.rmtree(step / "data"),
    "empty": lambda step: [shutil.rmtree(step), step.mkdir()],
}


def flip_bit(path):
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 16
    path.write_bytes(content)


@pytest.mark.parametrize("damage", slow.but(["truncated-state-arrays", "no-data"], DAMAGES))
def test_damage_is_named_with_the_way_on(run, damaged, capsys, damage):
    DAMAGES[damage](damaged / "checkpoints/6")
    before = listing(damaged)
    arguments = train_arguments(damaged, *RUN, "total_steps=8")
    assert main(arguments) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert f"checkpoint {damaged}/checkpoints/6 " in error
    assert "the last good step is 4" in error
    assert "nothing was deleted" in error
    assert listing(damaged) == before
    commands = re.search(r"to resume from it: (.*), and run the same command again", error).group(1)
    subprocess.run(commands, shell=True, check=True)
    assert main(arguments) == 0
    assert inspect(damaged)["sha256"] == run[1]
    assert (damaged / "damaged/6").is_dir()


@pytest.mark.slow
def test_damage_is_one_line_of_a_program(damaged):
    for step in (4, 6):
        truncate(largest(damaged / f"checkpoints/{step}", "state/ocdbt.process_0/d/*"))
    code, _, error = program(train_arguments(damaged, *RUN, "total_steps=8"))
    assert (code, error.count("\n")) == (2, 1), error


def test_without_any_good_step_nothing_is_advised_away(run, damaged, capsys):
    for step in (4, 6):
        truncate(damaged / f"checkpoints/{step}/state/manifest.ocdbt")
    before = listing(damaged)
    assert main(train_arguments(damaged, *RUN, "total_steps=8")) == 2
    error = capsys.readouterr().err
    assert "no other step can be read; nothing was deleted" in error
    assert error.count("\n") == 1
    assert listing(damaged) == before


def test_a_damaged_last_checkpoint_is_an_error_of_inspect_and_sample(damaged, tmp_path, capsys):
    truncate(largest(damaged / "checkpoints/6", "ema/ocdbt.process_0/d/*"))
    for arguments in (["inspect"], ["sample", "--num=8", f"--out={tmp_path / 'out/s.npz'}"]):
        assert main([*arguments, f"--workdir={damaged}"]) == 2
        error = capsys.readouterr().err
        assert f"checkpoint {damaged}/checkpoints/6 cannot be read" in error
        assert error.count("\n") == 1
    assert not (tmp_path / "out").exists()


def test_the_average_can_be_read_alone(run, damaged):
    shutil.rmtree(damaged / "checkpoints/6/state")
    abstract = build(read(damaged / "config.json")).abstract.ema
    with_state = Checkpoints(run[0], read_only=True).restore_arrays("ema", 6)
    alone = Checkpoints(damaged, read_only=True).restore_item("ema", 6, abstract)
    jax.tree.map(np.testing.assert_array_equal, jax.device_get(alone), with_state)


def program(arguments, limit="unlimited"):
    """`python -m diffjax ...` on one device, no file larger than `limit` KiB: (exit code, stdout, stderr)."""
    environment = {**os.environ, "JAX_PLATFORMS": "cpu"}
    environment.pop("NPROC", None)
    command = ["bash", "-c", f'ulimit -f {limit} && exec "$@"', "bash", sys.executable, "-m", "diffjax", *arguments]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=240)
    return done.returncode, done.stdout, CUDA_CHATTER.sub("", done.stderr)


# What jax's CUDA plugin, where it is installed, says of a machine without a GPU before anyone can silence it.
CUDA_CHATTER = re.compile(r"^(WARNING: All log messages before absl|I0000 .*cudart_stub).*\n", re.MULTILINE)


def test_hashes_are_the_same_on_one_device(run):
    code, printed, error = program(["inspect", f"--workdir={run[0]}"])
    assert code == 0, error
    on_one, on_eight = json.loads(printed), inspect(run[0])
    assert on_eight["meta"]["mesh"] == {"data": 8, "fsdp": 1, "tensor": 1}
    assert on_one["sha256"] == on_eight["sha256"]


def test_inspect_leaves_a_run_that_is_under_way_alone(damaged):
    (damaged / "checkpoints/8.orbax-checkpoint-tmp").mkdir()
    before = listing(damaged)
    assert inspect(damaged)["steps"] == [4, 6]
    assert listing(damaged) == before


# A full disk. Each checkpoint of the tiny model takes about 0.9 MB, its largest file 0.6 MB.
MANY = ("checkpoint.every_steps=2", "checkpoint.keep=100", "log.every_steps=1", "total_steps=20")


@pytest.fixture(scope="module")
def complete(tmp_path_factory):
    """Hashes of the run that always had room."""
    workdir = tmp_path_factory.mktemp("complete") / "run"
    code, _, error = program(train_arguments(workdir, *MANY))
    assert code == 0, error
    return inspect(workdir)["sha256"]


def check_refused(result, workdir, reason):
    """One line that names what could not be written and what is left; what is left can be read."""
    code, _, error = result
    assert code == 2, error
    assert error.count("\n") == 1, error
    last = max(complete_steps(workdir), default=None)
    named = re.search(r"cannot write checkpoint (\d+) in (\S+): (.*); the last complete checkpoint is (\w+)", error)
    assert named, error
    assert named.groups() == (str((last or 0) + 2), f"{workdir}/checkpoints", reason, str(last).lower())
    for step in complete_steps(workdir):
        assert inspect(workdir, step)["step"] == step


@pytest.mark.slow
def test_files_that_may_not_grow(tmp_path, complete):
    """A limit on the size of files, which stands for a quota: no file of the arrays fits."""
    result = program(train_arguments(tmp_path, *MANY), limit=100)
    check_refused(result, tmp_path, "File too large")
    assert program(train_arguments(tmp_path, *MANY))[0] == 0
    assert inspect(tmp_path)["sha256"] == complete


@contextmanager
def small_disk(folder, size):
    folder.mkdir()
    done = subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", folder], capture_output=True)
    if done.returncode:
        pytest.skip(f"NOT TESTED on a full disk: mounting a tmpfs needs rights: {done.stderr.decode().strip()}")
    try:
        yield
    finally:
        subprocess.run(["umount", "--lazy", folder], check=True)


@pytest.mark.slow
@pytest.mark.parametrize("tensorboard", ["true", "false"])
def test_a_full_disk(tmp_path, complete, tensorboard):
    disk = tmp_path / "disk"
    with small_disk(disk, "4m"):
        workdir = disk / "run"
        arguments = train_arguments(workdir, *MANY, f"log.tensorboard={tensorboard}")
        check_refused(program(arguments), workdir, "No space left on device")
        assert complete_steps(workdir)
        subprocess.run(["mount", "-o", "remount,size=100m", disk], check=True)
        code, printed, error = program(arguments)
        assert code == 0, error
        assert "resuming at step" in printed
        assert inspect(workdir)["sha256"] == complete


@pytest.mark.slow
@pytest.mark.parametrize("tensorboard", ["true", "false"])
def test_a_disk_that_fills_with_metrics(tmp_path, tensorboard):
    disk = tmp_path / "disk"
    with small_disk(disk, "100k"):
        options = (f"log.tensorboard={tensorboard}", "log.every_steps=1", "total_steps=5000")
        code, _, error = program(train_arguments(disk / "run", *options, "checkpoint.every_steps=100000"))
    assert code == 2, error
    assert error.count("\n") == 1, error
    assert f"cannot write {disk}/run" in error
    assert "No space left on device" in error


@pytest.mark.parametrize("place", ["file", "file/below/it", "/proc/diffjax/run"])
def test_a_folder_that_cannot_be_made(tmp_path, capsys, place):
    (tmp_path / "file").write_text("not a folder")
    assert main(train_arguments(tmp_path / place, *RUN)) == 2
    error = capsys.readouterr().err
    assert f"--workdir={tmp_path / place} cannot be written" in error
    assert error.count("\n") == 1
    assert listing(tmp_path) == {"file": hashlib.sha256(b"not a folder").hexdigest()}
