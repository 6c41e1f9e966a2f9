"""Exceptions that are not faults of the program: user errors, paths that the system refuses, requests to stop."""

import contextlib
import difflib
import errno
from collections.abc import Iterable, Iterator
from pathlib import Path

# Numbers of system errors that the path causes and not the program.
REFUSALS = frozenset(
    {
        *(errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO, errno.EROFS, errno.EACCES, errno.EPERM),
        *(errno.EEXIST, errno.EISDIR, errno.ENOTDIR, errno.ENAMETOOLONG, errno.ELOOP, errno.ESTALE),
    }
)


class UserError(ValueError):
    """A mistake in what the user gave: a name, a path, a number, a file.

    The message is one line that says what is wrong, where, and what would be valid. The command line prints it
    without a traceback and exits with 2.
    """


class Interrupted(KeyboardInterrupt):
    """A signal asked the program to stop. The message, one line, says what is left of its work; "" says nothing."""

    def __init__(self, number: int, message: str):
        super().__init__(message)
        self.exit_code = 128 + number


@contextlib.contextmanager
def writing(path: Path) -> Iterator[None]:
    """A write in here that the system refuses is a UserError that names `path`."""
    try:
        yield
    except OSError as error:
        if error.errno not in REFUSALS:
            raise
        raise UserError(f"cannot write {path}: {error.strerror}") from error


def did_you_mean(word: str, valid: Iterable[str]) -> str:
    """The text "; did you mean X?" for the valid words most like `word`; "" where none is like it."""
    names = {name.lower(): name for name in valid}
    near = difflib.get_close_matches(word.lower(), names, n=3, cutoff=0.7)
    return f"; did you mean {' or '.join(names[name] for name in near)}?" if near else ""
