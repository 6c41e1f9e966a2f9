"""A writing of samples that can die at any touch of the file system; run as a program, see test_parts.py."""

import os
import signal
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from diffjax.sampling.parts import Parts, open_parts

IDENTITY = {"seed": 1, "origin": {"sha256": "ab"}}
DESCRIPTION = {"seed": 1, "num": 0}
SHAPE = (8, 8, 3)
CALLS = ("fsync", "mkdir", "replace", "unlink", "rmdir")


def pictures(numbers: np.ndarray, shape: tuple[int, ...] = SHAPE) -> np.ndarray:
    """uint8 [n, *shape]; picture i is a function of i."""
    drawn = [np.random.default_rng(int(number)).integers(0, 256, shape, np.uint8) for number in numbers]
    return np.stack(drawn)


def labels(num: int) -> np.ndarray:
    return (np.arange(num) % 7).astype(np.int32)


def sample(out: Path, num: int, batch_sizes: Iterator[int], pause: float = 0) -> Parts:
    """Write `num` pictures from where an earlier call died, and finish."""
    parts = open_parts(out, IDENTITY, num)
    while len(missing := parts.missing()):
        numbers = missing[: next(batch_sizes)]
        parts.write(numbers, pictures(numbers))
        time.sleep(pause)
    parts.finish({"arr_1": labels(num)}, DESCRIPTION)
    return parts


def forever(batch_size: int) -> Iterator[int]:
    while True:
        yield batch_size


def die_at(count: int) -> None:
    """Let this process kill itself just before its call number `count` of one of CALLS."""
    left = [count]

    def watched(name: str) -> None:
        call = getattr(os, name)

        def counted(*args, **kwargs):
            left[0] -= 1
            if left[0] == 0:
                os.kill(os.getpid(), signal.SIGKILL)
            return call(*args, **kwargs)

        setattr(os, name, counted)

    for name in CALLS:
        watched(name)


def _fork(folder: Path, num: int, count: int) -> bool:
    """Whether a writing in `folder` that dies at call number `count` came to its end before."""
    child = os.fork()
    if child == 0:
        status = 1
        try:
            if count:
                die_at(count)
            sample(folder / "s.npz", num, forever(3))
            status = 0
        finally:
            os._exit(status)
    _, status = os.waitpid(child, 0)
    if not os.WIFSIGNALED(status) and os.WEXITSTATUS(status):
        raise SystemExit(f"a writing to {folder} failed")
    return not os.WIFSIGNALED(status)


def main(mode: str, folder: str, *numbers: str) -> None:
    root = Path(folder)
    if mode == "everywhere":  # one folder for each call at which it dies; then it is run again
        count, done = 0, False
        while not done:
            count += 1
            here = root / f"{count:03d}"
            here.mkdir()
            done = _fork(here, int(numbers[0]), count)
            _fork(here, int(numbers[0]), 0)
    elif mode == "slowly":
        sample(root / "s.npz", int(numbers[0]), forever(2), pause=0.02)
    elif mode == "share":  # blocks of 7 numbers, in turn by two processes
        process, num = int(numbers[0]), int(numbers[1])
        parts = open_parts(root / "s.npz", IDENTITY, num, process)
        own = np.flatnonzero(np.arange(num) // 7 % 2 == process)
        for batch in np.array_split(own, -(-len(own) // 10)):
            parts.write(batch, pictures(batch))
    elif mode == "memory":  # prints the peak resident size in KiB
        num = int(numbers[0])
        parts = open_parts(root / "s.npz", IDENTITY, num)
        for batch in np.array_split(parts.missing(), 8):
            parts.write(batch, np.full((len(batch), 32, 32, 3), batch[0] % 256, np.uint8))
        parts.finish({"arr_1": labels(num)}, DESCRIPTION)
        # Of this program alone: the figure of getrusage includes the process that started it.
        status = Path("/proc/self/status").read_text().split()
        print(status[status.index("VmHWM:") + 1])


if __name__ == "__main__":
    main(*sys.argv[1:])
