"""The scripts for a fresh machine."""

import re

import pytest

from tests.programs import ROOT

SOURCING = [path for path in sorted((ROOT / "launch").glob("*.sh")) if "environment.sh" in path.read_text()]


@pytest.mark.parametrize("script", [path for path in SOURCING if path.name != "environment.sh"], ids=lambda p: p.name)
def test_scripts_say_which_extras_they_need(script):
    """Sourced without an argument environment.sh would see the script's own: a model's name, say."""
    lines = re.findall(r'^\. "\$\(dirname "\$0"\)/environment\.sh"(.*)$', script.read_text(), re.MULTILINE)
    assert len(lines) == 1
    assert lines[0].strip().startswith('"')
