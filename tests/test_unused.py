"""No function or class of the package is there for tests alone.

From what a user calls (`python -m diffjax`, and what the configs, scripts, notebooks and pages of documentation name)
it follows which top-level definitions use which, and lists those that nothing reaches.
"""

import ast
import re
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).parents[1]
TEXTS = ("configs/**/*.py", "launch/**/*", "colab/**/*.ipynb", "docs/**/*.md", "README.md", "pyproject.toml")
# Called by name, from Python: the interfaces that the documentation promises.
ROOTS = {
    "diffjax.models.create",
    "diffjax.weights.from_reference",
    "diffjax.weights.to_reference",
    "diffjax.ops.selective_scan.selective_scan",
    "diffjax.experiment.build",
    "diffjax.runs.open_run",
}
# What stands in the package without a caller there, and why.
ALLOWED = {
    "diffjax.contracts.Backbone": "the interface of a backbone, for whoever adds one",
    "diffjax.contracts.Process": "the interface of a process, for whoever adds one",
    "diffjax.sampling.samples.read_samples": "samples files, from Python",
}


def module_name(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def sources() -> dict[str, ast.Module]:
    """Module name -> syntax tree, of the package."""
    return {module_name(path): ast.parse(path.read_text()) for path in sorted((ROOT / "diffjax").rglob("*.py"))}


def imported(tree: ast.Module) -> dict[str, str]:
    """Local name -> dotted name, of every import in a module, also inside functions."""
    found = {}
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and node.module:
            found |= {alias.asname or alias.name: f"{node.module}.{alias.name}" for alias in node.names}
        elif isinstance(node, ast.Import):
            found |= {alias.asname: alias.name for alias in node.names if alias.asname}
    return found


def defined(statement: ast.stmt) -> list[str]:
    """The names that a top-level statement defines."""
    if isinstance(statement, ast.FunctionDef | ast.ClassDef):
        return [statement.name]
    if isinstance(statement, ast.Assign | ast.AnnAssign | ast.AugAssign):
        targets = statement.targets if isinstance(statement, ast.Assign) else [statement.target]
        return [node.id for target in targets for node in ast.walk(target) if isinstance(node, ast.Name)]
    return []


def local(statement: ast.stmt) -> set[str]:
    """The names of variables inside a function or class, which are no uses of what has the same name outside."""
    if not isinstance(statement, ast.FunctionDef | ast.ClassDef):
        return set()
    stored = {n.id for n in ast.walk(statement) if isinstance(n, ast.Name) and isinstance(n.ctx, ast.Store)}
    return stored | {n.arg for n in ast.walk(statement) if isinstance(n, ast.arg)}


def named(statement: ast.stmt) -> Iterator[str]:
    """Every name, dotted name and string that could be one, in a piece of code."""
    variables = local(statement)
    for each in ast.walk(statement):
        if isinstance(each, ast.Name):
            yield from () if each.id in variables else (each.id,)
        elif isinstance(each, ast.Attribute):
            parts = [each.attr]
            while isinstance(each := each.value, ast.Attribute):
                parts.append(each.attr)
            if isinstance(each, ast.Name) and each.id not in variables:
                yield ".".join([each.id, *reversed(parts)])
        elif isinstance(each, ast.Constant) and isinstance(each.value, str) and each.value.isidentifier():
            yield each.value  # a forward reference


def uses(trees: dict[str, ast.Module]) -> dict[str, set[str]]:
    """Dotted name of every top-level definition -> what it uses; the rest of a module is "<module>."."""
    found: dict[str, set[str]] = {}
    for module, tree in trees.items():
        imports = imported(tree)
        attributes = {node.attr for node in ast.walk(tree) if isinstance(node, ast.Attribute)}
        for statement in tree.body:
            if isinstance(statement, ast.Import | ast.ImportFrom):
                continue
            used = set()
            for name in named(statement):
                first, _, rest = name.partition(".")
                whole = imports.get(first, f"{module}.{first}")
                used.add(f"{module}.{first}")  # which a function may import under the same name
                used |= {whole, f"{whole}.{rest}"} if rest else {whole}
                if whole in trees and not rest:  # a module as a value: whatever its users ask it for
                    used |= {f"{whole}.{attribute}" for attribute in attributes}
            for name in defined(statement) or [""]:
                found.setdefault(f"{module}.{name}", set()).update(used)
    return found


def roots(trees: dict[str, ast.Module], graph: dict[str, set[str]]) -> set[str]:
    texts = [path.read_text(errors="ignore") for pattern in TEXTS for path in ROOT.glob(pattern) if path.is_file()]
    words = {word for text in texts for word in re.findall(r"diffjax(?:\.\w+)+", text)}
    for text in texts:
        for module, names in re.findall(r"from (diffjax[\w.]*) import ([\w, ]+)", text):
            words |= {f"{module}.{name.strip()}" for name in names.split(",")}
    for path in ROOT.glob("configs/**/*.py"):
        words |= set(imported(ast.parse(path.read_text())).values())
    commands = {
        name for name in graph if name.startswith("diffjax.commands.") and name.endswith((".run", ".define_flags"))
    }
    main = {name for name in graph if name.startswith("diffjax.__main__.")}
    statements = {name for name in graph if name.endswith(".")}
    return ROOTS | words | commands | main | statements


def unreached() -> list[str]:
    """The public functions and classes at the top of a module that only tests use."""
    trees = sources()
    graph = uses(trees)
    imports = {f"{module}.{name}": whole for module, tree in trees.items() for name, whole in imported(tree).items()}
    seen, waiting = set(), list(roots(trees, graph))
    while waiting:
        name = waiting.pop()
        if name not in seen:
            seen.add(name)
            waiting += graph.get(name, ())
            waiting += [imports[name]] if name in imports else []
    kinds = ast.FunctionDef | ast.ClassDef
    defined_here = (f"{m}.{node.name}" for m, tree in trees.items() for node in tree.body if isinstance(node, kinds))
    return [name for name in defined_here if name not in seen and not name.rsplit(".", 1)[1].startswith("_")]


def test_nothing_is_there_for_tests_alone():
    found = unreached()
    assert [name for name in found if name not in ALLOWED] == []
    assert [name for name in ALLOWED if name not in found] == []
