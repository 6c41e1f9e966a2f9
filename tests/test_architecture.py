"""The import levels of the package, and what importing it must not do."""

import ast
import re
import subprocess
import sys

from tests.programs import ROOT


def test_import_contracts_hold():
    """In a program of its own: the linter turns off the loggers of the one that it runs in."""
    script = "import sys; from importlinter.cli import lint_imports; sys.exit(lint_imports(no_cache=True))"
    subprocess.run([sys.executable, "-c", script], cwd=ROOT, check=True, timeout=120)


def test_importing_the_package_touches_no_device_and_no_heavy_library():
    script = (
        "import importlib, pkgutil, sys, jax, diffjax.__main__, diffjax.commands as commands;"
        "names = [m.name for m in pkgutil.iter_modules(commands.__path__, 'diffjax.commands.')];"
        "[importlib.import_module(name) for name in names];"
        "assert {'diffjax.commands.train', 'diffjax.commands.sample', 'diffjax.commands.evaluate'} < set(names), names;"
        "bad = [m for m in ('tensorflow', 'tensorflow_datasets', 'torch') if m in sys.modules];"
        "from jax._src import xla_bridge;"
        "assert not bad, bad; assert not xla_bridge._backends, 'a backend was started'"
    )
    subprocess.run([sys.executable, "-c", script], cwd=ROOT, check=True, timeout=120)


def test_nothing_in_the_package_imports_the_recipes():
    offenders = [p for p in (ROOT / "diffjax").rglob("*.py") if "from configs" in p.read_text()]
    assert not offenders


def test_one_module_knows_orbax():
    users = [p.name for p in (ROOT / "diffjax").rglob("*.py") if "orbax" in imported(p)]
    assert users == ["archive.py"]


def test_files_are_written_whole_by_one_module():
    """But for what is appended to, metrics and parts of downloads, and the program that makes the embedded sets."""
    writes = re.compile(r"""\.write_(text|bytes)\(|np\.savez?\w*\(|open\([^)]*["'][wax]b?\+?["']""")
    found = {
        str(path.relative_to(ROOT / "diffjax"))
        for path in (ROOT / "diffjax").rglob("*.py")
        for line in path.read_text().splitlines()
        if writes.search(line)
    }
    assert found - {"files.py"} == {"training/metrics.py", "download.py", "data/embedded/rebuild.py"}


def imported(path):
    """The packages that a file imports."""
    nodes = list(ast.walk(ast.parse(path.read_text())))
    names = [alias.name for node in nodes if isinstance(node, ast.Import) for alias in node.names]
    names += [node.module or "" for node in nodes if isinstance(node, ast.ImportFrom)]
    return {name.partition(".")[0] for name in names}
