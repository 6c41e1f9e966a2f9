"""The one exception that means "the caller asked for something impossible"."""

import contextlib
import errno
import os
from collections.abc import Iterator
from pathlib import Path

# What the system says to a write when the place is at fault and not the program.
_REFUSALS = [
    os.strerror(code) for code in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EACCES, errno.EPERM)
]


class UserError(ValueError):
    """A mistake in what the user gave: a name, a path, a number, a file.

    The message is one line that says what is wrong, where, and what would be valid. The command line prints it
    without a traceback and exits with 2.
    """


def refused_write(error: BaseException) -> str | None:
    """What the system said to a write that it refused ("No space left on device"); None for any other error.

    Errors of Orbax's threads and of its C++ part come as exceptions of many types, so their text decides.
    """
    return next((text for text in _REFUSALS if text in str(error)), None)


@contextlib.contextmanager
def writing(path: Path) -> Iterator[None]:
    """An OSError in here names `path`: of a failed write the system names no file."""
    try:
        yield
    except OSError as error:
        error.filename = str(path)
        raise
