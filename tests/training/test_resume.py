"""Exact resume: a run that was stopped, cut or killed ends with the same bits as one that was left alone."""

import contextlib
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from diffjax.__main__ import main
from diffjax.commands.inspect import inspect
from diffjax.training import loop
from tests.programs import complete_steps, kill, start, train_arguments, wait_for

RUN = ("total_steps=12", "checkpoint.every_steps=4", "log.every_steps=4")


def final_hashes(workdir, step=12):
    report = inspect(workdir)
    assert report["latest"] == step
    return report["sha256"]


def at_batch(monkeypatch, number, action):
    """Call `action` when the loop asks for the batch of this number."""
    draw = loop.pipeline.Batches.__next__

    def draw_or_act(self):
        if self.get_state()["next_batch"] == number:
            action()
        return draw(self)

    monkeypatch.setattr(loop.pipeline.Batches, "__next__", draw_or_act)


class Cut(Exception):
    """The program ends without warning."""


def cut():
    raise Cut


ALL_RANDOM = ("optim.accumulate=2", "optim.clip=1.0", "data.flip=true", "diffusion.label_drop=0.5")


@pytest.mark.parametrize(
    "options", [(), pytest.param(ALL_RANDOM, marks=pytest.mark.slow)], ids=["plain", "accumulate-flip-label-drop"]
)
def test_a_stopped_or_cut_run_ends_as_one_left_alone(tmp_path, monkeypatch, capsys, options):
    assert main(train_arguments(tmp_path / "straight", *RUN, *options)) == 0
    again = train_arguments(tmp_path / "again", *RUN, *options)
    with monkeypatch.context() as patched:
        at_batch(patched, 2, lambda: os.kill(os.getpid(), signal.SIGTERM))
        assert main(again) == 143
    assert capsys.readouterr().err.endswith(
        "diffjax: SIGTERM: checkpoint written, stopped at step 3; the same command resumes\n"
    )
    assert complete_steps(tmp_path / "again") == [3]
    ends_as_the_straight_run_after_a_cut(tmp_path, monkeypatch, capsys, again, complete=[3, 4])


OWN_RANDOM = {
    "dis": ("model.drop_path=0.3", "optim.accumulate=2"),
    "udit": ("diffusion.label_drop=0.5",),  # per level
    "diffit": ("model.dropout=0.3", "data.augment=0.5"),
    "diffit-latent": (),
    "digit": ("tokens.label_drop=0.5",),  # and dropout
}


@pytest.mark.slow
@pytest.mark.parametrize("model", OWN_RANDOM)
def test_what_a_backbone_draws_is_drawn_again_after_a_cut(tmp_path, monkeypatch, capsys, model):
    straight, again = (
        train_arguments(tmp_path / name, *RUN, *OWN_RANDOM[model], model=model) for name in ("straight", "again")
    )
    assert main(straight) == 0
    ends_as_the_straight_run_after_a_cut(tmp_path, monkeypatch, capsys, again, complete=[4])


def ends_as_the_straight_run_after_a_cut(folder, monkeypatch, capsys, again, complete):
    """The run `again` is cut at step 6, when it has the checkpoints `complete`, and resumed."""
    with monkeypatch.context() as patched:
        at_batch(patched, 6, cut)
        with pytest.raises(Cut):
            main(again)
    assert complete_steps(folder / "again") == complete
    assert main(again) == 0
    assert "resuming at step 4" in capsys.readouterr().out
    assert final_hashes(folder / "again") == final_hashes(folder / "straight")
    assert len(set(final_hashes(folder / "again").values())) == 3


@pytest.mark.slow
def test_a_run_stopped_before_its_first_step_goes_on(tmp_path, monkeypatch, capsys):
    assert main(train_arguments(tmp_path / "straight", *RUN)) == 0
    again = train_arguments(tmp_path / "again", *RUN)
    announce = loop._announce
    for _ in range(2):  # the second time with the checkpoint of step 0 already there
        with monkeypatch.context() as patched:
            patched.setattr(loop, "_announce", lambda *a: (announce(*a), os.kill(os.getpid(), signal.SIGINT)))
            assert main(again) == 130
        assert "SIGINT: checkpoint written, stopped at step 0" in capsys.readouterr().err
        assert complete_steps(tmp_path / "again") == [0]
    assert main(again) == 0
    assert final_hashes(tmp_path / "again") == final_hashes(tmp_path / "straight")


def test_a_finished_run_says_so_and_changes_nothing(tmp_path, capsys):
    arguments = train_arguments(tmp_path, *RUN)
    assert main(arguments) == 0
    before = contents(tmp_path)
    capsys.readouterr()
    assert main(arguments) == 0
    assert capsys.readouterr().out == f"{tmp_path} is finished: step 12 of 12\n"
    assert contents(tmp_path) == before


def contents(folder):
    return {path: (path.stat().st_mtime_ns, path.read_bytes()) for path in folder.rglob("*") if path.is_file()}


WRITER = """
import sys
from pathlib import Path
from diffjax.files import only_writer
with only_writer(Path(sys.argv[1])):
    print("writes", flush=True)
    sys.stdin.read()
"""


@pytest.mark.slow
def test_a_second_process_in_a_folder_is_refused(tmp_path, capsys):
    """Of a run, and of samples under way: in one line, before anything is written there."""
    run, samples = tmp_path / "run", tmp_path / "s.npz"
    assert main(train_arguments(run, "total_steps=2")) == 0
    more = [*train_arguments(run, "total_steps=4"), "--accept=total_steps"]
    sample = ["sample", f"--workdir={run}", "--num=8", f"--out={samples}"]
    for folder, arguments in ((run, more), (samples.with_name("s.npz.parts"), sample)):
        folder.mkdir(exist_ok=True)
        command = [sys.executable, "-c", WRITER, str(folder)]
        with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as other:
            assert other.stdout.readline() == "writes\n"
            before = contents(folder)
            assert main(arguments) == 2
            assert contents(folder) == before
            other.kill()
        error = capsys.readouterr().err
        assert error.startswith(f"diffjax: another process writes in {folder} (process {other.pid} on ")
        assert error.count("\n") == 1
    assert main(more) == 0
    assert main(sample) == 0


# Programs of their own. Large enough, and saved often enough, to be met while a save is under way.
LONG = ("model.width=96", "total_steps=160", "checkpoint.every_steps=4", "log.every_steps=40")


@pytest.fixture(scope="module")
def straight(tmp_path_factory):
    """Hashes of the run never interrupted, read in worker processes or not."""
    workdir = tmp_path_factory.mktemp("straight")
    process = start(train_arguments(workdir, *LONG), workdir.with_suffix(".log"))
    assert process.wait(240) == 0
    return final_hashes(workdir, 160)


def saves_under_way(workdir):
    return list(workdir.glob("checkpoints/*.orbax-checkpoint-tmp*"))


def session_members(pid):
    """Living processes of the session that the program `pid` led, whoever adopted them since."""
    found = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdecimal():
            with contextlib.suppress(OSError):
                state, _, _, session = (entry / "stat").read_text().rpartition(")")[2].split()[:4]
                if int(session) == pid and state != "Z":
                    found.append(int(entry.name))
    return found


def nobody_left(pid, seconds=10):
    """Workers, and Python's tracker of shared memory, end only when they see that the program has."""
    until = time.monotonic() + seconds
    while session_members(pid) and time.monotonic() < until:
        time.sleep(0.05)
    return not session_members(pid)


@pytest.mark.slow
@pytest.mark.parametrize("workers", [0, 2])
def test_killed_at_any_moment(tmp_path, straight, workers):
    workdir, log, moments = tmp_path / "run", tmp_path / "log", random.Random(workers)
    arguments = train_arguments(workdir, *LONG, f"data.workers={workers}")
    kills = hits = most_workers = 0
    for number in range(6):
        before = max(complete_steps(workdir), default=0)
        process = start(arguments, log)
        if number == 0:
            alive = wait_for((workdir / "config.json").exists, process, log)  # about to compile
        else:
            alive = wait_for(lambda least=before: max(complete_steps(workdir), default=0) > least, process, log)
        if number % 2:
            alive = alive and wait_for(lambda: saves_under_way(workdir), process, log)
        else:
            time.sleep(moments.uniform(0, 0.4))
        most_workers = max(most_workers, len(session_members(process.pid)) - 1)
        assert alive, log.read_text()
        kill(process)
        kills += 1
        hits += bool(saves_under_way(workdir))
        assert nobody_left(process.pid), "workers outlive a killed program"
    assert most_workers >= workers
    assert start(arguments, log).wait(240) == 0
    assert final_hashes(workdir, 160) == straight
    assert not saves_under_way(workdir)
    print(f"workers {workers}: {kills} kills, {hits} during a save")
    assert hits >= 2


@pytest.mark.slow
@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("name", ["SIGTERM", "SIGINT"])
def test_asked_to_stop(tmp_path, straight, name, workers):
    """The whole session gets the signal, as from a terminal or a scheduler: workers must not die of it."""
    workdir, log = tmp_path / "run", tmp_path / "log"
    arguments = train_arguments(workdir, *LONG, f"data.workers={workers}")
    for moment in ((workdir / "config.json").exists, lambda: len(complete_steps(workdir)) > 1):
        process = start(arguments, log)
        assert wait_for(moment, process, log)
        os.killpg(process.pid, getattr(signal, name))
        assert process.wait(60) == 128 + getattr(signal, name), log.read_text()
        step = complete_steps(workdir)[-1]
        assert f"{name}: checkpoint written, stopped at step {step}" in log.read_text()
        assert "Traceback" not in log.read_text()
        assert nobody_left(process.pid), "workers outlive the program"
    assert step > 4
    assert start(arguments, log).wait(240) == 0
    assert final_hashes(workdir, 160) == straight
