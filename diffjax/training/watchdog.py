"""Ends a process whose step hangs, so that a supervisor can start it again."""

import faulthandler


class Watchdog:
    """After `minutes` without a call the stacks of all threads go to stderr, and the process ends with 1; 0: never.

    The timer is a thread of C code that needs no lock of the interpreter: it also sees a call of a library that never
    returns.
    """

    def __init__(self, minutes: float):
        self._seconds = 60 * minutes

    def restart(self) -> None:
        """Count from now on."""
        if self._seconds:
            faulthandler.dump_traceback_later(self._seconds, exit=True, file=2)

    def pause(self) -> None:
        """Count no more, until `restart`."""
        if self._seconds:
            faulthandler.cancel_dump_traceback_later()

    close = pause
