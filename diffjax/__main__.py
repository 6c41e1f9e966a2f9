"""`python -m diffjax COMMAND --flag=value ...`: flags, and dispatch to a command.

Exit codes: 0 done; 2 the user's mistake, one line on stderr; 130 and 143 interrupted by SIGINT and SIGTERM, one line;
141 nobody reads what is printed; 1 anything else, with its traceback.
"""

import contextlib
import importlib
import logging as python_logging
import os
import select
import signal
import sys
import threading
import traceback
from collections.abc import Iterator
from types import FrameType, ModuleType
from typing import Any

from absl import flags, logging

from diffjax import usage
from diffjax.errors import REFUSALS, Interrupted, UserError, did_you_mean

COMMANDS = {
    "train": "train a config in a run folder; the same command again resumes",
    "sample": "images from a run folder or from converted parameters",
    "evaluate": "score images of a file or of a model (FID and its family), or compare two result files",
    "reference": "images of a data set -> the statistics that generated ones are scored against",
    "sweep": "score a grid of samplers, steps, guidance and averages on runs: a table and a plot",
    "ema": "an average of any length from the snapshots of a run",
    "prepare": "original files of a public data set -> records of its images, by its published preparation",
    "encode": "images -> latents of an autoencoder, for latent models",
    "tokenize": "images -> tokens of their features, for token models",
    "probe": "linear probe of each block of a token model",
    "fetch": "public weights and references by name, from where they are published",
    "convert": "public weights -> diffjax parameters",
    "export": "diffjax parameters -> a file in the layout of a public checkpoint",
    "inspect": "steps, sizes and sha256 of a run's parameters, average and optimizer state, as json",
    "bench": "steps/s, images/s and MFU of a config, and what the loop adds to the bare step",
}
LOG_LEVELS = ("debug", "info", "warning", "error", "fatal")
LAST_SECONDS = 3.0  # how long a process may take to end after its last output


def main(argv: list[str]) -> int:
    """Run the command that `argv` (without the program's name) asks for; returns the exit code."""
    try:
        _set_logging(os.environ.get("DIFFJAX_LOG", "fatal"))
        with _interruptible(argv[0] if argv else "diffjax"):
            _run(argv)
            sys.stdout.flush()
    except UserError as error:
        print(f"diffjax: {error}", file=sys.stderr)
        return 2
    except Interrupted as interrupted:
        if str(interrupted):
            print(f"diffjax: {interrupted}", file=sys.stderr)
        return interrupted.exit_code
    except BrokenPipeError:
        if not _output_is_closed():
            raise
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 128 + signal.SIGPIPE
    except OSError as error:
        if error.errno not in REFUSALS or not error.filename:
            raise
        print(f"diffjax: cannot use {error.filename}: {error.strerror}", file=sys.stderr)
        return 2
    return 0


def _output_is_closed() -> bool:
    """Whether the reader of the standard output has ended, as in `inspect | head`."""
    output = select.poll()
    output.register(sys.stdout.fileno(), 0)
    return any(event & select.POLLERR for _, event in output.poll(0))


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


@contextlib.contextmanager
def _interruptible(command: str) -> Iterator[None]:
    """SIGTERM and Ctrl-C end what runs in here as `Interrupted`; a second one ends the program at once."""

    def take(number: int, frame: FrameType | None) -> None:
        signal.signal(number, signal.SIG_DFL)
        module = sys.modules.get(f"diffjax.commands.{command}")
        left = getattr(module, "INTERRUPTED", "nothing was written")
        raise Interrupted(number, f"{command}: {signal.Signals(number).name}: stopped; {left}")

    if threading.current_thread() is not threading.main_thread():  # which alone may take signals
        yield
        return
    before = {number: signal.signal(number, take) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _run(argv: list[str]) -> None:
    if not argv or argv[0] in ("-h", "--help", "--helpfull"):
        print(usage.of_program(COMMANDS))
        return
    command, rest = argv[0], argv[1:]
    if command not in COMMANDS:
        raise UserError(
            f"command {command!r} is unknown; valid: {', '.join(COMMANDS)}{did_you_mean(command, COMMANDS)}"
        )
    module = importlib.import_module(f"diffjax.commands.{command}")
    values = flags.FlagValues()
    module.define_flags(values)
    if "--help-config" in rest:
        print_leaves(rest)
        return
    if "--help" in rest or "-h" in rest:
        print(usage.of_command(module, values))
        return
    own = [argument for argument in rest if not argument.lstrip("-").startswith(("config.", "noconfig."))]
    _parse(command, module, values, [_underscored(argument, values) for argument in own])
    overrides = [argument for argument in rest if argument not in own]
    if overrides and "config" not in values:
        raise UserError(f"{command}: {overrides[0]} has no effect, {command} takes no --config")
    flags.FLAGS(["diffjax"], known_only=True)  # libraries read their own flags from the global table

    from diffjax.parallel import compilation

    compilation.use_cache()
    module.run(values, overrides)


def _parse(command: str, module: ModuleType, values: flags.FlagValues, arguments: list[str]) -> None:
    """Set the flags of a command from its arguments."""
    see = f"see `python -m diffjax {command} --help`"
    try:
        positional = values(["diffjax", *arguments])[1:]
    except flags.UnrecognizedFlagError as error:
        raise UserError(f"{command}: no flag --{error.flagname}{usage.meant(error.flagname, values)}") from error
    except flags.Error as error:
        raise UserError(f"{command}: {' '.join(str(error).split())}; {see}") from error
    if positional and (name := getattr(module, "FIRST", None)) and not values[name].present:
        values[name].parse(positional.pop(0))
    if missing := [f"--{name}" for name in getattr(module, "REQUIRED", ()) if values[name].value is None]:
        raise UserError(f"{command}: {' and '.join(missing)} {'is' if len(missing) == 1 else 'are'} missing; {see}")
    if positional and (name := getattr(module, "REST", None)) and values[name].present:
        values[name].value = getattr(values, name) + values[name].parser.parse(",".join(positional))
    elif positional:
        raise UserError(f"{command}: {positional[0]!r} is not a flag; write --name=value")


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


def show_unraisable(unraisable: Any) -> None:
    """Python's own report of an error that nobody can catch, but for one kind.

    When Orbax gives up a save it closes its event loop, and each write that was under way then fails to report to it.
    The error that made it give up is raised.
    """
    frames = traceback.extract_tb(unraisable.exc_traceback)
    of_loop = bool(frames) and frames[-1].name == "_check_closed" and "asyncio" in frames[-1].filename
    if not (of_loop and unraisable.exc_type is RuntimeError):
        sys.__unraisablehook__(unraisable)


def program() -> None:
    """`main`, and the end of the process within seconds, whatever threads of libraries still wait for."""
    sys.unraisablehook = show_unraisable
    try:
        code = main(sys.argv[1:])
    except Exception:
        traceback.print_exc()
        code = 1
    sys.stdout.flush()
    sys.stderr.flush()
    if code in (1, 2):  # what failed may have left threads that wait for it, and destructors that complain
        os._exit(code)
    from diffjax.parallel import hosts

    if not hosts.joined():  # several leave together, when the slowest is done
        last = threading.Timer(LAST_SECONDS, os._exit, [code])
        last.daemon = True
        last.start()
    sys.exit(code)


if __name__ == "__main__":
    program()
