"""The scripts for a fresh machine."""

import os
import re
import shutil
import signal
import subprocess
import time

import pytest

from tests.programs import ROOT

SOURCING = [path for path in sorted((ROOT / "launch").glob("*.sh")) if "environment.sh" in path.read_text()]


@pytest.mark.parametrize("script", [path for path in SOURCING if path.name != "environment.sh"], ids=lambda p: p.name)
def test_scripts_say_which_extras_they_need(script):
    """Sourced without an argument environment.sh would see the script's own: a model's name, say."""
    lines = re.findall(r'^\. "\$\(dirname "\$0"\)/environment\.sh"(.*)$', script.read_text(), re.MULTILINE)
    assert len(lines) == 1
    assert lines[0].strip().startswith('"')


PYTHON = """#!/bin/sh
echo "$3" >> "$CALLS"
[ "$3" = train ] && exit 130
exit 0
"""


def test_an_interrupted_quickstart_ends_there(tmp_path):
    """Nobody wants 500 images of a model that was stopped after its first step."""
    shutil.copytree(ROOT / "launch", tmp_path / "launch")
    python = tmp_path / "venv/bin/python"
    python.parent.mkdir(parents=True)
    python.write_text(PYTHON)
    python.chmod(0o755)
    variables = {**os.environ, "DIFFJAX_VENV": str(tmp_path / "venv"), "CALLS": str(tmp_path / "calls")}
    done = subprocess.run(["bash", tmp_path / "launch/quickstart.sh"], env=variables, capture_output=True, timeout=60)
    assert done.returncode == 130
    assert (tmp_path / "calls").read_text().split() == ["train"]


FAULTY = """
echo "$*" >> "$CALLS"
[ "$(wc -l < "$CALLS")" -ge "$1" ] && exit "$2"
kill -s KILL $$
"""


def supervise(tmp_path, *command, **variables):
    """launch/supervise.sh, waiting no time between restarts; (process, file of calls)."""
    given = {**os.environ, "DIFFJAX_WAIT": "0", "CALLS": str(tmp_path / "calls"), **variables}
    arguments = ["bash", ROOT / "launch/supervise.sh", *command]
    return subprocess.Popen(arguments, env=given, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def faulty(*arguments):
    return ("bash", "-c", FAULTY, "faulty", *map(str, arguments))


@pytest.mark.parametrize("code", [0, 2, 130, 141, 143])
def test_a_supervised_command_runs_until_it_ends_without_a_fault(tmp_path, code):
    process = supervise(tmp_path, *faulty(3, code))
    _, said = process.communicate(timeout=60)
    assert process.returncode == code
    assert len((tmp_path / "calls").read_text().splitlines()) == 3
    lines = [line for line in said.splitlines() if line.startswith("supervise:")]
    assert lines == [f"supervise: ended with 137; restart {n} of at most 20 without progress, in 0 s" for n in (1, 2)]


def test_a_supervised_command_is_given_up_after_so_many_restarts(tmp_path):
    process = supervise(tmp_path, *faulty(3, 1), DIFFJAX_RESTARTS="3")
    _, said = process.communicate(timeout=60)
    assert process.returncode == 1
    assert len((tmp_path / "calls").read_text().splitlines()) == 4
    assert said.splitlines()[-1] == "supervise: ended with 1 after 3 restarts without progress; giving up"


def test_a_new_checkpoint_is_progress(tmp_path):
    """After every second call."""
    checkpointing = FAULTY.replace("kill", 'mkdir -p "$RUN/checkpoints/$(($(wc -l < "$CALLS") / 2 * 50))"; kill')
    command = ("bash", "-c", checkpointing, "faulty", "7", "0", f"--workdir={tmp_path}/run")
    process = supervise(tmp_path, *command, RUN=f"{tmp_path}/run", DIFFJAX_RESTARTS="2")
    _, said = process.communicate(timeout=60)
    assert process.returncode == 0
    counts = re.findall("restart (.) of at most 2", said)
    assert counts == ["1", "1", "2", "1", "2", "1"]  # checkpoints 0, 50, 50, 100, 100, 150


SAVING = """
trap 'sleep $1; echo saved >> "$CALLS"; exit $0' INT TERM
touch "$CALLS"
while true; do sleep 0.1; done
"""


@pytest.mark.parametrize("seconds", ["0", "0.3"])
@pytest.mark.parametrize(
    "number, code",
    [(signal.SIGINT, 130), (signal.SIGTERM, 143), (signal.SIGTERM, 0), (signal.SIGTERM, 7), (signal.SIGHUP, 143)],
)
def test_signals_reach_the_supervised_command_whose_code_counts(tmp_path, number, code, seconds):
    """As `train`, which writes a checkpoint first; it may also finish just then, or fail."""
    process = supervise(tmp_path, "bash", "-c", SAVING, str(code), seconds)
    wait_until((tmp_path / "calls").exists)
    process.send_signal(number)
    process.communicate(timeout=60)
    assert process.returncode == code
    assert (tmp_path / "calls").read_text() == "saved\n"


def test_a_signal_ends_the_wait_for_a_restart(tmp_path):
    process = supervise(tmp_path, *faulty(9, 0), DIFFJAX_WAIT="600")
    assert any("in 600 s" in line for line in process.stderr)  # reads no further
    process.send_signal(signal.SIGTERM)
    process.communicate(timeout=60)
    assert process.returncode == 143


@pytest.mark.parametrize("command, variables", [((), {}), (("true",), {"DIFFJAX_RESTARTS": "many"})])
def test_a_supervisor_without_a_command_or_with_other_numbers_ends_with_2(tmp_path, command, variables):
    process = supervise(tmp_path, *command, **variables)
    _, said = process.communicate(timeout=60)
    assert (process.returncode, len(said.splitlines())) == (2, 1)


def wait_until(condition, seconds=30):
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.02)
