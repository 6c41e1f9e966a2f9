"""Tracks and snapshots of a run: the same bits however often it was interrupted, and averages made of them."""

import os
import re
import shutil
import signal
import subprocess

import jax
import numpy as np
import pytest

from diffjax.__main__ import main
from diffjax.commands.ema import reconstruct
from diffjax.commands.inspect import inspect
from diffjax.errors import UserError
from diffjax.sampling.samples import read_samples
from diffjax.training.checkpoint import Checkpoints, Snapshots
from diffjax.weights.store import load, tree_sha256
from tests.programs import TINY, complete_steps, kill, start, train_arguments, wait_for
from tests.training.test_resume import Cut, at_batch, cut

pytestmark = pytest.mark.slow

POWER_EMAS = ("ema.sigma_rel=0.05,0.1", "ema.snapshot_every_steps=3")
RUN = ("total_steps=11", "checkpoint.every_steps=4", "checkpoint.keep=9", "log.every_steps=4", *POWER_EMAS)
SNAPSHOTS = [3, 6, 9, 11]


@pytest.fixture(scope="module")
def straight(tmp_path_factory):
    workdir = tmp_path_factory.mktemp("straight") / "run"
    assert main(train_arguments(workdir, *RUN)) == 0
    return workdir


@pytest.fixture
def copied(straight, tmp_path):
    """The run as if it had been killed at step 10: checkpoints 4 and 8, snapshots up to 9."""
    shutil.copytree(straight, tmp_path / "run")
    shutil.rmtree(tmp_path / "run/checkpoints/11")
    shutil.rmtree(tmp_path / "run/snapshots/11")
    return tmp_path / "run"


def snapshot_hashes(workdir):
    snapshots = Snapshots(workdir, read_only=True)
    return {step: tree_sha256(snapshots.restore_arrays("tracks", step)) for step in snapshots.steps()}


def test_an_interrupted_run_has_the_power_emas_snapshots_and_averages_of_one_left_alone(
    straight, tmp_path, monkeypatch, capsys
):
    again = train_arguments(tmp_path / "again", *RUN)
    with monkeypatch.context() as patched:
        at_batch(patched, 2, lambda: os.kill(os.getpid(), signal.SIGTERM))
        assert main(again) == 143
    with monkeypatch.context() as patched:
        at_batch(patched, 7, cut)
        with pytest.raises(Cut):
            main(again)
    assert complete_steps(tmp_path / "again") == [3, 4]  # stopped at 3, where a snapshot is due
    assert list(snapshot_hashes(tmp_path / "again")) == [3, 6]
    assert main(again) == 0

    reports = [inspect(folder) for folder in (straight, tmp_path / "again")]
    assert reports[0]["sha256"] == reports[1]["sha256"]
    assert len(set(reports[0]["sha256"].values())) == 4
    assert reports[0]["snapshots"] == SNAPSHOTS
    assert snapshot_hashes(straight) == snapshot_hashes(tmp_path / "again")
    last = Checkpoints(straight, read_only=True).restore_arrays("tracks", 11)
    assert snapshot_hashes(straight)[11] == tree_sha256(last)
    made = [reconstruct(folder, 0.08, tmp_path / f"ema-{i}") for i, folder in enumerate((straight, tmp_path / "again"))]
    assert made[0]["sha256"] == made[1]["sha256"]


def test_snapshots_that_are_passed_again_stay_as_they_are(straight, copied):
    shutil.rmtree(copied / "checkpoints/8")
    (copied / "snapshots/10.orbax-checkpoint-tmp").mkdir()  # what a kill leaves of one under way
    assert inspect(copied)["snapshots"] == [3, 6, 9]
    before = {path: path.stat().st_mtime_ns for path in copied.glob("snapshots/[369]/**/*")}
    assert main(train_arguments(copied, *RUN)) == 0
    assert inspect(copied)["sha256"] == inspect(straight)["sha256"]
    assert snapshot_hashes(copied) == snapshot_hashes(straight)
    assert {path: path.stat().st_mtime_ns for path in before} == before
    assert sorted(path.name for path in (copied / "snapshots").iterdir()) == ["11", "3", "6", "9"]


def test_snapshots_of_old_values_do_not_mix_with_new_ones(copied, capsys):
    shutil.rmtree(copied / "checkpoints/8")
    changed = [*train_arguments(copied, *RUN, "ema.snapshot_every_steps=5"), "--accept=ema.snapshot_every_steps"]
    assert main(changed) == 2
    error = capsys.readouterr().err
    assert "holds snapshots [6, 9] from before the config changed, beyond the checkpoint of step 4" in error
    assert error.count("\n") == 1
    subprocess.run(re.search(r"to go on: (.*), and run", error).group(1), shell=True, check=True)
    assert main(changed) == 0
    assert inspect(copied)["snapshots"] == [3, 5, 10, 11]


def test_power_emas_begin_with_their_run(copied, tmp_path, capsys):
    plain = train_arguments(tmp_path / "plain", "total_steps=2")
    assert main(plain) == 0
    assert not (tmp_path / "plain/snapshots").exists()
    assert not (tmp_path / "plain/checkpoints/2/tracks").exists()
    assert "tracks" not in inspect(tmp_path / "plain")["sha256"]
    more = train_arguments(tmp_path / "plain", "total_steps=4", *POWER_EMAS)
    capsys.readouterr()
    assert main([*more, "--accept=total_steps,ema.sigma_rel,ema.snapshot_every_steps"]) == 2
    error = capsys.readouterr().err
    assert "the run's state does not fit: power_emas/0.050/" in error
    assert error.count("\n") == 1
    others = train_arguments(copied, *RUN, "ema.sigma_rel=0.05,0.2")
    assert main([*others, "--accept=ema.sigma_rel"]) == 2
    assert "the run's state does not fit: power_emas/0.100/" in capsys.readouterr().err


def test_lost_power_emas_are_damage(copied, capsys):
    shutil.rmtree(copied / "checkpoints/8/tracks")
    assert main(train_arguments(copied, *RUN)) == 2
    error = capsys.readouterr().err
    assert "item tracks is missing; the last good step is 4" in error
    assert error.count("\n") == 1


def test_an_average_is_made_and_sampled(straight, tmp_path, capsys):
    arguments = ["ema", f"--workdir={straight}", "--sigma-rel=0.08", f"--out={tmp_path / 'params'}"]
    assert main(arguments) == 0
    printed = capsys.readouterr().out
    assert re.search(
        r"sigma_rel 0.08 at step 11 of .*, from 4 snapshots of 0.050 and 0.100, profile error 0\.0\d+\n$", printed
    )
    assert printed.count("\n") == 1
    _, params, model = load(tmp_path / "params")
    assert (model["step"], model["sigma_rel"], model["snapshots"]) == (11, 0.08, SNAPSHOTS)
    assert model["sha256"] == tree_sha256(params)
    assert {leaf.dtype for leaf in jax.tree.leaves(params)} == {np.dtype(np.float32)}
    images = []
    for name, recipe in (("own", []), ("given", [f"--config={TINY}"])):  # the folder knows the config of its run
        out = tmp_path / f"{name}.npz"
        assert main(["sample", f"--params={tmp_path / 'params'}", *recipe, "--num=8", f"--out={out}"]) == 0
        assert read_samples(out)[2]["origin"]["sha256"] == model["sha256"]
        images.append(read_samples(out)[0])
    np.testing.assert_array_equal(*images)
    capsys.readouterr()
    process = "--config.diffusion.gaussian.steps=500"
    assert main(["sample", f"--params={tmp_path / 'params'}", process, "--num=8", f"--out={out}"]) == 2
    assert "diffusion.gaussian.steps cannot change what a run was trained for" in capsys.readouterr().err


def test_a_length_that_was_kept_gives_the_power_ema_of_its_step(straight, tmp_path):
    model = reconstruct(straight, 0.1, tmp_path / "params", step=6)
    assert (model["snapshots"], model["profile_error"]) == ([3, 6], pytest.approx(0, abs=1e-6))
    average = Snapshots(straight, read_only=True).restore_arrays("tracks", 6)["0.100"]
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6, atol=1e-8), load(tmp_path / "params")[1], average
    )


@pytest.mark.parametrize(
    "flags, message",
    [
        (("--sigma-rel=0.1", "--step=5"), "--step=5: no such snapshot"),
        (("--sigma-rel=0.3",), "sigma_rel = 0.3: valid: above 0 to 0.2887"),
        (("--sigma_rel=0.005",), "the profile would be off by"),
    ],
)
def test_averages_that_cannot_be_made(straight, tmp_path, capsys, flags, message):
    assert main(["ema", f"--workdir={straight}", *flags, f"--out={tmp_path / 'params'}"]) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1
    assert not (tmp_path / "params").exists()


def test_a_damaged_snapshot_is_named(copied, tmp_path):
    (copied / "snapshots/6/tracks/manifest.ocdbt").write_bytes(b"")
    with pytest.raises(UserError, match=f"snapshot {copied}/snapshots/6 cannot be read"):
        reconstruct(copied, 0.08, tmp_path / "params")


def snapshots_under_way(workdir):
    return list(workdir.glob("snapshots/*.orbax-checkpoint-tmp*"))


def test_killed_while_a_snapshot_is_written(tmp_path):
    """Every kill meets a snapshot under way; none of them leaves one that cannot be read, or that differs."""
    options = ("model.width=96", "total_steps=160", "checkpoint.every_steps=5", "log.every_steps=40", *POWER_EMAS)
    workdir, log = tmp_path / "run", tmp_path / "log"
    assert start(train_arguments(tmp_path / "straight", *options), log).wait(240) == 0
    hits = 0
    for _ in range(5):
        before = max(complete_steps(workdir), default=0)
        process = start(train_arguments(workdir, *options), log)
        assert wait_for(lambda least=before: max(complete_steps(workdir), default=0) > least, process, log)
        assert wait_for(lambda: snapshots_under_way(workdir), process, log), log.read_text()
        kill(process)
        hits += bool(snapshots_under_way(workdir))
        assert list(snapshot_hashes(workdir)) == inspect(workdir)["snapshots"]
    assert hits >= 2
    assert start(train_arguments(workdir, *options), log).wait(240) == 0
    print(f"{hits} of 5 kills while a snapshot was written")
    assert inspect(workdir)["snapshots"] == [*range(3, 160, 3), 160]
    assert snapshot_hashes(workdir) == snapshot_hashes(tmp_path / "straight")
