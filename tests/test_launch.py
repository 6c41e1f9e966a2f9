"""The scripts for a fresh machine."""

import os
import re
import shutil
import subprocess

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
