"""A trace of some steps, for TensorBoard's profiler or Perfetto."""

from pathlib import Path
from typing import Any

import jax

from diffjax.errors import UserError


def parse(text: str) -> tuple[int, int]:
    """(first, last) of "FIRST:LAST", the steps of which a trace is written."""
    first, _, last = text.partition(":")
    if not (first.isdecimal() and last.isdecimal() and int(first) <= int(last)):
        raise UserError(f"--profile={text}: valid: FIRST:LAST, two step numbers, such as 20:25")
    return int(first), int(last)


class Profile:
    """Writes a trace of the steps first, ..., last into a folder; of none without `steps`.

    UserError for steps that the run will not make: it resumes from `start` and ends before `total`.
    """

    def __init__(self, folder: Path, steps: tuple[int, int] | None, start: int, total: int):
        self._folder, self._steps, self._running = folder, steps, False
        if steps and (steps[1] < start or steps[0] >= total):
            asked = f"--profile={steps[0]}:{steps[1]}"
            raise UserError(f"{asked}: this start makes steps {start} to {total - 1}; valid: some of them")

    def before(self, step: int, state: Any) -> None:
        """To be called before each step is dispatched."""
        if self._steps is None:
            return
        first, last = self._steps
        if first <= step <= last and not self._running:
            jax.block_until_ready(state)
            jax.profiler.start_trace(str(self._folder))
            self._running = True
        elif step > last and self._running:
            jax.block_until_ready(state)
            self.close()

    def close(self) -> None:
        """Write the trace if one is being made."""
        if self._running:
            self._running = False
            jax.profiler.stop_trace()
