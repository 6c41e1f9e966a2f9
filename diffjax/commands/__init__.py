"""The commands of `python -m diffjax`: one file each, named after it.

A command has `define_flags` and `run`; besides, where they are something else than nothing, REQUIRED, the flags that it
cannot do without, INTERRUPTED, what is left when it is stopped, and REST, the flag that arguments without a name belong
to: more items of a list that was begun, or the one value of a required flag.
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from absl import flags

from diffjax.errors import UserError
from diffjax.files import local_path
from diffjax.trees import differing, leaves

# Recorded in results, but no part of what was asked for: the code, where things lie, and what labels are called.
ASIDE = {"code_version", "file", "workdir", "params", "classes"}
SHOWN = 6  # differences of two requests, in a line


class _PathParser(flags.ArgumentParser):
    """Paths of flags: with ~ for the home folder, and no URLs."""

    def flag_type(self) -> str:
        return "path"

    def parse(self, argument: Any) -> Path:
        return argument if isinstance(argument, Path) else local_path(argument)


class _PathsParser(flags.ArgumentParser):
    """Several paths, separated by commas."""

    def flag_type(self) -> str:
        return "paths"

    def parse(self, argument: Any) -> list[Path]:
        return argument if isinstance(argument, list) else [local_path(each) for each in argument.split(",") if each]


def define_path(name: str, default: str | None, help: str, values: flags.FlagValues) -> None:
    """A flag whose value is a `Path`."""
    flags.DEFINE(_PathParser(), name, default, help, flag_values=values)


def define_paths(name: str, default: list[str] | None, help: str, values: flags.FlagValues) -> None:
    """A flag whose value is a list of `Path`."""
    flags.DEFINE(_PathsParser(), name, default, help, flag_values=values)


def define_distributed(values: flags.FlagValues) -> None:
    """The flag of commands that several processes run together; they hand it to `hosts.start`."""
    help = "join the other processes of this job; auto: where a launcher with several is found"
    flags.DEFINE_enum("distributed", "auto", ["auto", "on", "off"], help, flag_values=values)


def make_folder(out: Path) -> None:
    """Create the folder of an output file before the work starts, so that an unwritable path fails early."""
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"--out={out} cannot be written: {error.strerror}; give a writable folder") from error


def define_overwrite(values: flags.FlagValues) -> None:
    """The flag of commands that call `refuse_other`."""
    flags.DEFINE_bool("overwrite", False, "replace --out, whatever it holds", flag_values=values)


def refuse_other(out: Path, stored: Mapping[str, Any] | None, wanted: Mapping[str, Any]) -> None:
    """UserError unless the file `out`, which is there, is of the request `wanted`.

    stored: the request that it was made for; None or empty where the file does not tell. Both are json-able.
    """
    advice = "choose another --out, or --overwrite replaces it"
    if not stored:
        raise UserError(f"{out} is there already and does not say what it is; {advice}")
    found = differing(_asked(stored), _asked(wanted))
    more = f" and {len(found) - SHOWN} more" if len(found) > SHOWN else ""
    if found:
        raise UserError(f"{out} was made with other settings: {', '.join(found[:SHOWN])}{more}; {advice}")


def refuse_other_result(out: Path, wanted: Mapping[str, Any], overwrite: bool) -> None:
    """UserError where the result file `out` is there, is not of the request `wanted`, and is not to be replaced.

    wanted: some entries of the result, by which requests differ: {"protocol": {...}, "subject": {...}}.
    """
    if overwrite or not out.exists():
        return
    try:
        result = json.loads(out.read_text())
        stored = {name: result[name] for name in wanted}
    except (ValueError, TypeError, KeyError):
        stored = {}
    refuse_other(out, stored, wanted)


def _asked(request: Mapping[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in leaves(request).items() if not ASIDE & set(name.split("."))}
