"""How a program starts and ends: help, signals, pipes nobody reads, threads that wait."""

import asyncio
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import NamedTuple

import pytest

from diffjax import __main__ as program
from diffjax import archive, usage
from diffjax.commands import inspect, sample
from diffjax.training.checkpoint import Checkpoints
from tests.programs import ROOT


def test_help_of_the_program_has_examples(capsys):
    assert program.main(["--help"]) == 0
    printed = capsys.readouterr().out
    assert all(f"  {command}" in printed for command in program.COMMANDS)
    assert "python -m diffjax train    --config=configs/quickstart.py:model=dit" in printed


@pytest.mark.parametrize("command", program.COMMANDS)
def test_help_of_a_command(command, monkeypatch, capsys):
    """Its examples and its flags, each on a line of its own, and what --config can be; none of absl's words."""
    monkeypatch.chdir(ROOT)
    assert program.main([command, "--help"]) == 0
    printed = capsys.readouterr().out
    assert re.search(rf"\npython -m diffjax {command} (\w+ )?--", printed) or command == "fetch"  # prepare NAME
    assert "(default: " not in printed
    assert "repeat this option" not in printed
    assert ("--config=TEXT" in printed) == ("model=dit,process=,runlocal" in printed) == ("DiT-XL/2" in printed)


def test_arguments_of_recipes_are_read_without_running_them(tmp_path):
    assert usage.recipe_arguments(ROOT / "configs/digit_stage1.py") == "model=digit-b,vocabulary=0,classes,runlocal"
    for text in ("", "def get_config(", "parse(arg, **defaults)"):
        (tmp_path / "recipe.py").write_text(text)
        assert usage.recipe_arguments(tmp_path / "recipe.py") == ""


@pytest.mark.parametrize("name, code", [("SIGINT", 130), ("SIGTERM", 143)])
def test_a_command_that_is_stopped_says_what_is_left(monkeypatch, capsys, name, code):
    def stop(values, overrides):
        os.kill(os.getpid(), getattr(signal, name))
        time.sleep(10)

    before = signal.getsignal(signal.SIGTERM)
    for module, arguments, left in (
        (inspect, ["inspect", "--workdir=a"], "nothing was written"),
        (sample, ["sample", "--num=1", "--out=a.npz"], "what is drawn is kept, the same command resumes"),
    ):
        monkeypatch.setattr(module, "run", stop)
        assert program.main(arguments) == code
        assert capsys.readouterr().err == f"diffjax: {arguments[0]}: {name}: stopped; {left}\n"
    assert signal.getsignal(signal.SIGTERM) is before


def test_a_folder_that_may_not_be_read_is_not_one_that_cannot_be_written(monkeypatch, capsys, tmp_path):
    def refuse(path):
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr(Path, "is_file", refuse)
    assert program.main(["inspect", f"--workdir={tmp_path}"]) == 2
    assert capsys.readouterr().err == f"diffjax: cannot use {tmp_path}/config.json: Permission denied\n"


def test_a_fault_of_the_program_is_no_mistake_of_the_user(monkeypatch, tmp_path):
    """A system error without a file, one that is no refusal, and an error of our own while a checkpoint is read."""
    for error in (OSError(28, "No space left on device"), FileNotFoundError(2, "No such file", "a")):
        monkeypatch.setattr(inspect, "run", lambda values, overrides, error=error: (_ for _ in ()).throw(error))
        with pytest.raises(OSError, match=error.strerror):
            program.main(["inspect", "--workdir=a"])

    def fail(*arguments, **named):
        raise TypeError("a fault of the program")

    (tmp_path / "checkpoints/3/ema").mkdir(parents=True)
    monkeypatch.setattr(archive, "_restore", fail)
    monkeypatch.setattr(archive, "_stored_tree", lambda folder: {})
    with pytest.raises(TypeError, match="a fault of the program"):
        Checkpoints(tmp_path, read_only=True).restore_arrays("ema", 3)


def ended(code, **streams):
    started = time.monotonic()
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, stderr=subprocess.PIPE, timeout=60, **streams)
    return done.returncode, done.stderr.decode(), time.monotonic() - started


WAITING = """
import sys, threading
from diffjax import __main__ as program
threading.Thread(target=threading.Event().wait).start()
program.LAST_SECONDS = 0.1
sys.argv = ["diffjax", "{argument}"]
{more}
program.program()
"""


@pytest.mark.parametrize("argument, code", [("--help", 0), ("trian", 2), ("fail", 1)])
def test_a_process_ends_whatever_its_threads_wait_for(argument, code):
    more = "program.main = lambda argv: 1 / 0" if argument == "fail" else ""
    returned, error, _ = ended(WAITING.format(argument=argument, more=more), stdout=subprocess.DEVNULL)
    assert returned == code
    assert ("ZeroDivisionError" in error) == (code == 1)


def test_nobody_reads_what_is_printed():
    reader, writer = os.pipe()
    os.close(reader)
    code = "import sys; sys.argv = ['diffjax', '--help']; from diffjax import __main__ as p; p.program()"
    returned, error, _ = ended(code, stdout=writer)
    os.close(writer)
    assert (returned, error) == (141, "")


class Unraisable(NamedTuple):
    exc_type: type
    exc_value: Exception
    exc_traceback: object
    err_msg: str | None = None
    object: object = None


def test_only_writes_that_were_given_up_end_in_silence(monkeypatch):
    shown = []
    monkeypatch.setattr(sys, "__unraisablehook__", shown.append)
    loop = asyncio.new_event_loop()
    loop.close()

    def fail():
        raise RuntimeError("Event loop is closed")

    for act in (lambda: loop.call_soon_threadsafe(print), fail, lambda: 1 / 0):
        try:
            act()
        except Exception as error:
            program.show_unraisable(Unraisable(type(error), error, error.__traceback__))
    assert [each.exc_type for each in shown] == [RuntimeError, ZeroDivisionError]
