import re
from pathlib import Path

import diffjax
from diffjax.evaluation import protocol


def test_it_names_the_commit_of_a_checkout_and_else_the_package(tmp_path, monkeypatch):
    checkout = (Path(diffjax.__file__).parent.parent / ".git").exists()
    expected = rf"{re.escape(diffjax.__version__)}" + (r"\+[0-9a-f]{12}(-dirty)?" if checkout else "")
    assert re.fullmatch(expected, protocol.code_version())
    monkeypatch.setattr(diffjax, "__file__", str(tmp_path / "diffjax" / "__init__.py"))
    assert protocol.code_version() == diffjax.__version__
