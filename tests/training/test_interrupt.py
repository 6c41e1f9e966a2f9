"""A first signal asks a run to stop; whether a second one ends the program at once."""

import contextlib
import signal

import pytest

from diffjax.training import interrupt
from diffjax.training.interrupt import StopRequest


@pytest.fixture
def ended(monkeypatch):
    """Signals that would have ended the program."""
    found = []
    send = signal.raise_signal
    monkeypatch.setattr(
        interrupt.signal,
        "raise_signal",
        lambda number: found.append(number) if signal.getsignal(number) == signal.SIG_DFL else send(number),
    )
    return found


@pytest.mark.parametrize(
    "numbers, seconds, ends",
    [
        ([signal.SIGTERM], 0, []),
        ([signal.SIGTERM, signal.SIGTERM], 0.2, []),  # of the scheduler, and passed on by a supervisor
        ([signal.SIGTERM, signal.SIGTERM], 6, [signal.SIGTERM]),
        ([signal.SIGINT, signal.SIGINT], 0.2, [signal.SIGINT]),
        ([signal.SIGTERM, signal.SIGINT], 0.2, [signal.SIGINT]),
    ],
)
def test_a_second_signal_ends_the_program_but_for_a_sigterm_that_is_repeated(
    monkeypatch, ended, numbers, seconds, ends
):
    now = [100.0]
    monkeypatch.setattr(interrupt.time, "monotonic", lambda: now[0])
    with contextlib.closing(StopRequest()) as stop:
        for number in numbers:
            signal.raise_signal(number)
            now[0] += seconds
    assert stop.asked
    assert stop.reason == numbers[0].name
    assert ended == ends
