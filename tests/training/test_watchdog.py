"""A step that hangs ends its process with the stacks of its threads; other waits do not."""

import subprocess
import sys

from diffjax.__main__ import main
from diffjax.training import watchdog
from tests.programs import ROOT, train_arguments

HANGING = """
import ctypes, sys, threading
from diffjax.training.watchdog import Watchdog
watchdog = Watchdog(minutes=0.5 / 60)
watchdog.restart()
def a_step_that_hangs():
    ctypes.PyDLL(None).sleep(60)  # and keeps the interpreter's lock
{}
"""


def run(last):
    program = [sys.executable, "-c", HANGING.format(last)]
    return subprocess.run(program, cwd=ROOT, capture_output=True, text=True, timeout=50)


def test_a_hung_step_ends_the_process_with_its_stacks():
    done = run("a_step_that_hangs()")
    assert done.returncode == 1
    assert "Timeout (0:00:00.500000)!" in done.stderr
    assert "in a_step_that_hangs" in done.stderr


def test_a_pause_is_no_hang():
    done = run("watchdog.pause(); import time; time.sleep(1); print('alive')")
    assert (done.returncode, done.stdout, done.stderr) == (0, "alive\n", "")


def test_steps_are_watched_but_compiling_saving_and_evaluating_are_not(tmp_path, monkeypatch):
    calls = []
    monkeypatch.setattr(watchdog.Watchdog, "restart", lambda self: calls.append("step"))
    monkeypatch.setattr(watchdog.Watchdog, "pause", lambda self: calls.append("pause"))
    assert main(train_arguments(tmp_path, "total_steps=4", "checkpoint.every_steps=2")) == 0
    # The first step compiles; a pause before each of the four, and at two checkpoints.
    assert calls.count("step") == 3
    assert calls[:9] == ["pause", "pause", "step", "pause", "pause", "step", "pause", "step", "pause"]
    assert set(calls[9:]) <= {"pause"}
