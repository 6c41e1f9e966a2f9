"""What the environment is made from: the constraints fit the requirements, the extras and jax's own requirements."""

import subprocess
import sys
import tomllib
from importlib.metadata import requires

import pytest
from packaging.requirements import Requirement

from tests.programs import ROOT

PYTHONS = ("3.11", "3.12", "3.13")


def constraints(python: str) -> dict[str, str]:
    """Versions by package for a version of Python."""
    lines = (ROOT / "constraints.txt").read_text().splitlines()
    rows = [Requirement(line) for line in lines if not line.startswith("#")]
    here = [row for row in rows if row.marker is None or row.marker.evaluate({"python_version": python})]
    names = [row.name.lower().replace("_", "-") for row in here]
    assert len(names) == len(set(names))
    return {name: str(row.specifier).removeprefix("==") for name, row in zip(names, here)}


@pytest.mark.parametrize("python", PYTHONS)
def test_constraints_are_within_the_requirements_and_the_extras(python):
    versions = constraints(python)
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    lines = (ROOT / "requirements.txt").read_text().splitlines()
    wanted = [Requirement(line) for line in lines if not line.startswith("#")]
    wanted += [Requirement(line) for name in ("dev", "compile") for line in extras[name]]
    for row in wanted:
        assert row.specifier.contains(versions[row.name.lower().replace("_", "-")]), row


def test_constraints_fit_what_this_jax_needs_on_accelerators():
    """`pip install -c constraints.txt -e .[tpu]` can be resolved: jax pins the compiler that it was built for."""
    versions = constraints(f"{sys.version_info[0]}.{sys.version_info[1]}")
    for extra, package in (("tpu", "libtpu"), ("cuda12", "jax-cuda12-plugin")):
        [pinned] = [
            row
            for row in map(Requirement, requires("jax") or [])
            if row.name == package and row.marker and row.marker.evaluate({"extra": extra})
        ]
        assert pinned.specifier.contains(versions[package]), pinned


def test_the_python_of_a_new_environment_is_the_newest_that_runs(tmp_path):
    """Of pyenv's versions too, whose shims are on PATH and fail."""

    def interpreter(path, version: str) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        # run as: interpreter -c PROGRAM; succeeds when the program asks for its own version
        path.write_text(f'#!/bin/sh\ncase "$2" in *"\'{version}\'"*) exit 0;; esac\nexit 1\n')
        path.chmod(0o755)

    bin_, pyenv = tmp_path / "bin", tmp_path / "pyenv"
    interpreter(bin_ / "python3.13", "none: a shim of a version that is not active")
    interpreter(bin_ / "python3.11", "3.11")
    interpreter(pyenv / "versions/3.12.1/bin/python", "3.12")

    def found(*versions: str) -> tuple[int, str]:
        done = subprocess.run(
            ["/bin/bash", ROOT / "launch/find_python.sh", *versions],
            env={"PATH": str(bin_), "PYENV_ROOT": str(pyenv)},
            capture_output=True,
            text=True,
        )
        return done.returncode, done.stdout.strip()

    assert found("3.13", "3.12", "3.11") == (0, str(pyenv / "versions/3.12.1/bin/python"))
    assert found("3.11") == (0, str(bin_ / "python3.11"))
    assert found("3.13") == (1, "")
