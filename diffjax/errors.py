"""The one exception that means "the caller asked for something impossible"."""


class UserError(ValueError):
    """A mistake in what the user gave: a name, a path, a number, a file.

    The message is one line that says what is wrong, where, and what would be valid. The command line prints it
    without a traceback and exits with 2.
    """
