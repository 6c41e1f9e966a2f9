"""Stop requests by SIGTERM or Ctrl-C, honoured between two steps."""

import signal
from types import FrameType


class StopRequest:
    """Handles signals once created: the first SIGTERM or SIGINT only sets `asked`; a second one ends the program.

    number: of the signal; None for a preemption, which jax detects by SIGTERM.

    With several processes (`alone` False) no signal is taken: jax listens to SIGTERM, so that all of them stop at the
    same step, and one that stopped by itself would leave the others waiting.
    """

    def __init__(self, alone: bool = True):
        self.asked = False
        self.number = int(signal.SIGTERM)
        self._previous = {}
        for number in (signal.SIGINT, signal.SIGTERM) if alone else ():
            self._previous[number] = signal.signal(number, self._take)

    def _take(self, number: int, frame: FrameType | None) -> None:
        self.asked, self.number = True, number
        signal.signal(number, signal.SIG_DFL)

    @property
    def reason(self) -> str:
        return signal.Signals(self.number).name if self.asked else "preemption"

    def close(self) -> None:
        """Give the signals back to whoever had them."""
        for number, handler in self._previous.items():
            signal.signal(number, handler)
