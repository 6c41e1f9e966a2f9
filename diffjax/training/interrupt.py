"""Stop requests by SIGTERM or Ctrl-C, honoured between two steps."""

import signal
import time
from types import FrameType

# Seconds. Schedulers send SIGTERM to a supervisor and to its command, and the supervisor passes it on as well.
REPEATED = 5.0


class StopRequest:
    """Handles signals once created: the first SIGTERM or SIGINT only sets `asked`; a second one ends the program.

    A SIGTERM within `REPEATED` of the first is the same request.

    number: of the signal; None for a preemption, which jax detects by SIGTERM.

    With several processes (`alone` False) no signal is taken: jax listens to SIGTERM, so that all of them stop at the
    same step, and one that stopped by itself would leave the others waiting.
    """

    def __init__(self, alone: bool = True):
        self.asked = False
        self.number = int(signal.SIGTERM)
        self._since = 0.0
        self._previous = {}
        for number in (signal.SIGINT, signal.SIGTERM) if alone else ():
            self._previous[number] = signal.signal(number, self._take)

    def _take(self, number: int, frame: FrameType | None) -> None:
        now = time.monotonic()
        if not self.asked:
            self.asked, self.number, self._since = True, number, now
        elif number == signal.SIGINT or now - self._since > REPEATED:
            signal.signal(number, signal.SIG_DFL)
            signal.raise_signal(number)

    @property
    def reason(self) -> str:
        return signal.Signals(self.number).name if self.asked else "preemption"

    def close(self) -> None:
        """Give the signals back to whoever had them."""
        for number, handler in self._previous.items():
            signal.signal(number, handler)
