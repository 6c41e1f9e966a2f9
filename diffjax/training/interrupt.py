"""A request to stop, made by SIGTERM or Ctrl-C and honoured between two steps."""

import signal
from types import FrameType


class StopRequest:
    """From its making on, the first SIGTERM or SIGINT only sets `signal_name`; a second one ends the program at once.

    With several processes (`alone` False) no signal is taken: jax listens to SIGTERM, so that all of them stop at the
    same step, and one that stopped by itself would leave the others waiting.
    """

    def __init__(self, alone: bool = True):
        self.signal_name = ""
        self._previous = {}
        for number in (signal.SIGINT, signal.SIGTERM) if alone else ():
            self._previous[number] = signal.signal(number, self._take)

    def _take(self, number: int, frame: FrameType | None) -> None:
        self.signal_name = signal.Signals(number).name
        signal.signal(number, signal.SIG_DFL)

    def close(self) -> None:
        """Give the signals back to whoever had them."""
        for number, handler in self._previous.items():
            signal.signal(number, handler)
