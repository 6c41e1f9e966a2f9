"""The text of `--help`, and suggestions for unknown flags."""

import ast
import difflib
import textwrap
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import ModuleType
from typing import Any

from absl import flags

RECIPES = Path("configs")  # where a checkout has them; a recipe may lie anywhere
EXAMPLES = """\
python -m diffjax train    --config=configs/quickstart.py:model=dit --workdir=runs/a      the same command resumes
python -m diffjax sample   --workdir=runs/a --num=500 --out=runs/a/samples.npz
python -m diffjax evaluate --samples=runs/a/samples.npz --reference=digits
"""
WIDTH = 110


def of_program(commands: Mapping[str, str]) -> str:
    lines = ["python -m diffjax COMMAND --flag=value ...\n"]
    lines += [f"  {name:<10} {text}" for name, text in commands.items()]
    lines += ["", *(f"  {line}" for line in EXAMPLES.splitlines()), ""]
    lines.append("COMMAND --help lists its flags, train --help-config all leaves of a config")
    return "\n".join(lines)


def of_command(module: ModuleType, values: flags.FlagValues) -> str:
    """The help of a command: its examples, its flags, and the choices for --config."""
    parts = [(module.__doc__ or "").strip(), "Flags:\n" + "\n".join(_flags(values))]
    if "config" in values:
        parts.append(_recipes())
        parts.append(_models())
    return "\n\n".join(parts)


def meant(name: str, values: flags.FlagValues) -> str:
    """Suggestions for an unknown flag: "; did you mean ...?" with flags and leaves, or all flags."""
    near = [f"--{each}" for each in difflib.get_close_matches(name, list(values), n=2, cutoff=0.7)]
    if "config" in values:
        from diffjax.config import leaves
        from diffjax.config.schema import near_leaves

        near += [f"--config.{leaf}" for leaf in near_leaves(name, leaves())]
    if near:
        return f"; did you mean {' or '.join(near[:4])}?"
    return f"; valid: {', '.join(f'--{each}' for each in values)}"


def _flags(values: flags.FlagValues) -> Iterator[str]:
    for name in values:
        flag = values[name]
        head = f"--[no]{name}" if isinstance(flag, flags.BooleanFlag) else f"--{name}={_kind(flag)}"
        default = "" if flag.default in (None, "", [], False) else f" (default {_shown(flag.default)})"
        help = flag.help.rpartition(">: ")[2]  # absl puts the words of an enumeration first
        text = textwrap.wrap(f"{help}{default}", WIDTH - 34)
        yield f"  {head:<30}  {text[0]}"
        yield from (" " * 34 + line for line in text[1:])


def _kind(flag: Any) -> str:
    if isinstance(flag, flags.EnumFlag):
        return "|".join(flag.parser.enum_values)
    kinds = {"int": "N", "float": "X", "path": "PATH", "paths": "PATH,PATH"}
    kind = flag.flag_type()
    return kinds.get(kind, "ITEM,ITEM" if "list" in kind else "TEXT")


def _shown(value: Any) -> str:
    return str(value).lower() if isinstance(value, bool) else str(value)


def _recipes() -> str:
    """The recipes of a checkout, each with what may stand after the colon."""
    lines = ["Recipes: --config=FILE:NAME=VALUE,SWITCH, then any leaf, --config.optim.lr=2e-4 (train --help-config)"]
    for path in sorted(RECIPES.glob("*.py")):
        if arguments := recipe_arguments(path):
            lines.append(f"  {path!s:<28} {arguments}")
    return "\n".join(lines)


def recipe_arguments(path: Path) -> str:
    """ "model=dit,runlocal" of a recipe that calls `parse(arg, model="dit", runlocal=False)`; "" of any other file.

    The file is read, not run.
    """
    try:
        tree = ast.parse(path.read_text())
    except (OSError, SyntaxError, ValueError):
        return ""
    calls = (node for node in ast.walk(tree) if isinstance(node, ast.Call))
    parses = [call for call in calls if getattr(call.func, "attr", getattr(call.func, "id", "")) == "parse"]
    words = parses[0].keywords if parses else []
    named = [(word.arg, word.value.value) for word in words if isinstance(word.value, ast.Constant)]
    return ",".join(f"{name}" if value is False else f"{name}={value!s}" for name, value in named)


def _models() -> str:
    from diffjax.models import FAMILIES, MODELS

    lines = ["Models, for recipes with model= and for --config.model.name:"]
    for family in FAMILIES:
        names = ", ".join(name for name, row in MODELS.items() if row.family == family)
        lines += textwrap.wrap(
            f"{names}; or {family} with sizes of your own" if names else f"{family}, with sizes of your own",
            WIDTH,
            initial_indent="  ",
            subsequent_indent="    ",
            break_on_hyphens=False,
        )
    return "\n".join(lines)
