"""`sample`, killed again and again, ends with the file of a command that was left alone, byte for byte."""

import hashlib
from pathlib import Path

import pytest

from diffjax.__main__ import main
from tests.programs import kill, start, train_arguments, wait_for


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> Path:
    workdir = tmp_path_factory.mktemp("sampled") / "run"
    assert main(train_arguments(workdir, "total_steps=2")) == 0
    return workdir


def digest(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


@pytest.mark.slow
@pytest.mark.parametrize("raw", [False, True])
def test_three_kills_change_no_byte(run, tmp_path, raw):
    def arguments(name: str) -> list[str]:
        more = ["--raw"] if raw else []
        return ["sample", f"--workdir={run}", "--num=210", "--batch_size=20", f"--out={tmp_path}/{name}.npz", *more]

    whole = start(arguments("whole"), tmp_path / "whole.log")
    assert whole.wait(timeout=300) == 0, (tmp_path / "whole.log").read_text()
    log, parts = tmp_path / "killed.log", tmp_path / "killed.npz.parts"
    for wanted in (2, 5, 8):
        program = start(arguments("killed"), log)
        assert wait_for(lambda: len(list(parts.glob("part-*"))) >= wanted, program, log)  # noqa: B023
        kill(program)
    last = start(arguments("killed"), log)
    assert last.wait(timeout=300) == 0, log.read_text()
    assert digest(tmp_path / "killed.npz") == digest(tmp_path / "whole.npz")
    assert not parts.exists()
