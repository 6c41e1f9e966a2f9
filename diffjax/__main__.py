"""`python -m diffjax COMMAND --flag=value ...`: flags, start-up of several hosts, dispatch to a command.

Exit codes: 0 done; 2 the user's mistake, one line on stderr; 1 anything else, with its traceback.
"""

import importlib
import logging as python_logging
import os
import sys

from absl import flags, logging

from diffjax.errors import UserError, refused_write

COMMANDS = {
    "train": "train a config in a run folder; the same command again resumes",
    "sample": "images from a run folder or from converted parameters",
    "evaluate": "score a samples file, or compare two result files",
    "sweep": "score a grid of samplers, steps and guidance on runs: a table and a plot",
    "ema": "an average of any length from the snapshots of a run",
    "tokenize": "images -> codes of their features, for models of codes",
    "probe": "linear classifiers of what each block of a model of codes sees",
    "convert": "public weights -> diffjax parameters",
    "inspect": "steps, sizes and sha256 of a run's parameters, average and optimizer state, as json",
    "bench": "steps/s, images/s and MFU of a config, and what the loop adds to the bare step",
}
LOG_LEVELS = ("debug", "info", "warning", "error", "fatal")


def main(argv: list[str]) -> int:
    """Run the command that `argv` (without the program's name) asks for; returns the exit code."""
    try:
        _set_logging(os.environ.get("DIFFJAX_LOG", "fatal"))
        _run(argv)
        sys.stdout.flush()
    except UserError as error:
        print(f"diffjax: {error}", file=sys.stderr)
        return 2
    except BrokenPipeError:  # whoever read has seen enough: `inspect | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except OSError as error:
        if reason := refused_write(error):
            print(f"diffjax: cannot write {error.filename or 'a file'}: {reason}", file=sys.stderr)
        elif isinstance(error, FileExistsError | IsADirectoryError | NotADirectoryError) and error.filename:
            print(f"diffjax: cannot use {error.filename}: {error.strerror}", file=sys.stderr)
        else:
            raise
        return 2
    return 0


def _set_logging(level: str) -> None:
    """Our own log lines are printed. Libraries are silent by default: what fails in one of their threads is logged
    there and also raised, and one line reports it."""
    if level not in LOG_LEVELS:
        raise UserError(f"DIFFJAX_LOG={level} is unknown; valid: {', '.join(LOG_LEVELS)}")
    logging.set_verbosity(level)
    for name in ("asyncio", "orbax"):
        python_logging.getLogger(name).setLevel(logging.get_absl_logger().level)
    own = python_logging.getLogger("diffjax")
    own.setLevel(python_logging.INFO)
    own.handlers, own.propagate = [_Printer()], False


class _Printer(python_logging.Handler):
    """Writes to what sys.stdout is at the time, which a command may have redirected."""

    def emit(self, record: python_logging.LogRecord) -> None:
        print(record.getMessage(), flush=True)


def _run(argv: list[str]) -> None:
    if not argv or argv[0] in ("-h", "--help", "--helpfull"):
        print("python -m diffjax COMMAND --flag=value ...\n")
        print("\n".join(f"  {name:<10} {text}" for name, text in COMMANDS.items()))
        print("\nCOMMAND --help lists its flags, train --help-config all leaves of a config")
        return
    command, rest = argv[0], argv[1:]
    if command not in COMMANDS:
        raise UserError(f"command {command!r} is unknown; valid: {', '.join(COMMANDS)}")
    module = importlib.import_module(f"diffjax.commands.{command}")
    values = flags.FlagValues()
    flags.DEFINE_enum(
        "distributed", "auto", ["auto", "on", "off"], "join the other processes of this job", flag_values=values
    )
    module.define_flags(values)
    if "--help-config" in rest:
        print_leaves(rest)
        return
    if "--help" in rest:
        print(f"{module.__doc__}\n{values.get_help()}")
        return
    own = [argument for argument in rest if not argument.lstrip("-").startswith(("config.", "noconfig."))]
    try:
        positional = values(["diffjax", *(_underscored(argument, values) for argument in own)])[1:]
    except flags.Error as error:
        raise UserError(
            f"{command}: {' '.join(str(error).split())}; see `python -m diffjax {command} --help`"
        ) from error
    if positional and (name := getattr(module, "REST", None)) and values[name].present:
        values[name].value = getattr(values, name) + positional
    elif positional:
        raise UserError(f"{command}: {positional[0]!r} is not a flag; write --name=value")
    overrides = [argument for argument in rest if argument not in own]
    if overrides and "config" not in values:
        raise UserError(f"{command}: {overrides[0]} has no effect, {command} takes no --config")
    flags.FLAGS(["diffjax"], known_only=True)  # libraries read their own flags from the global table

    from diffjax.parallel import hosts

    hosts.start(values.distributed)
    module.run(values, overrides)


def print_leaves(arguments: list[str]) -> None:
    """All leaves of a config; of the backbone of --config where it is given."""
    from diffjax.config import describe, load

    recipe = next((text.partition("=")[2] for text in arguments if text.startswith("--config=")), "")
    overrides = [text for text in arguments if text.lstrip("-").startswith(("config.", "noconfig."))]
    config = load(recipe, overrides) if recipe else None
    print(describe.text(config))


def _underscored(argument: str, values: flags.FlagValues) -> str:
    """--sigma-rel=0.1 as --sigma_rel=0.1, where there is such a flag."""
    name, equals, value = argument.partition("=")
    flag = name.lstrip("-").replace("-", "_")
    return f"--{flag}{equals}{value}" if name.startswith("-") and flag in values else argument


if __name__ == "__main__":
    if "DIFFJAX_LOG" not in os.environ:
        # Writes that Orbax gives up complain from C++ when they end; the error that made it give up is reported.
        sys.unraisablehook = lambda unraisable: None
    sys.exit(main(sys.argv[1:]))
