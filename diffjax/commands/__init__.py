"""The commands of `python -m diffjax`: one file each, named after it.

A command has `define_flags` and `run`; besides, where they are something else than nothing, INTERRUPTED, what is left
when it is stopped, and REST, the flag that arguments without a name belong to.
"""

from pathlib import Path
from typing import Any

from absl import flags

from diffjax.errors import UserError
from diffjax.files import local_path


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
