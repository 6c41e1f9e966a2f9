"""Records per second of the training stream, and what crosses to the device, beside preparing batches on the host.

    JAX_PLATFORMS=cpu python -m tests.benchmarks.loader [--records 8192] [--batch 256] [--threads 2] [--turns 3]

The data are random moments of 32 x 32 x 4 with both views, and random images of 64 x 64 x 3. The alternative does on
the host what the device does: it mirrors and scales pixels, and draws posteriors with numpy, in the same threads. Then
`bench` times the step of DiT-S/2 on such latents, bare and in the loop, with a smaller batch: what share of the time a
step waits for data.
"""

import argparse
import json
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from diffjax.commands.bench import bench
from diffjax.config import load
from diffjax.contracts import Stored
from diffjax.data import sources
from diffjax.data.arrays import ArrayExamples
from diffjax.data.latents import Origin, write_latents
from diffjax.data.pipeline import Batches, Stream
from diffjax.data.source import OnHost, Source

ORIGIN = Origin(
    source="random",
    autoencoder="none",
    weights_sha256="",
    scale=0.18215,
    scale_applied=False,
    num_classes=1000,
    label_table_sha256="",
)


class Moments:
    """Random moments, made when they are asked for."""

    def __init__(self, count: int):
        self._count = count

    def __len__(self) -> int:
        return self._count

    def __getitem__(self, index: int) -> tuple[np.ndarray, int]:
        return np.random.default_rng(index).random((2, 2, 32, 32, 4), np.float32), index % 1000


class HostDevice(OnHost):
    def __init__(self, count: int):
        self._count = count

    def normal(self, shape: tuple[int, ...]) -> np.ndarray:
        return np.random.default_rng().standard_normal((self._count, *shape), np.float32)


class OnTheHost(Stream):
    """The stream whose batches are float32 before they cross."""

    def __getitem__(self, number: int) -> Any:
        stored = super().__getitem__(number)
        x = self.source.draw(stored.raw, stored.mirrored, HostDevice(len(stored.raw)))
        return stored._replace(raw=x)


def records_per_second(source: Source, stream: type[Stream], args: argparse.Namespace) -> tuple[float, float]:
    """(records per second, bytes per record that cross)."""
    batches = Batches(source, batch_size=args.batch, seed=0, flip=True, threads=args.threads)
    batches._stream = stream(source, args.batch, 0, True, 0, 1)
    batches._open(0)
    first: Stored = next(batches)
    crossing = sum(array.nbytes for array in first[:5]) / args.batch
    count = max(2, args.records // args.batch)
    started = time.perf_counter()
    for _ in range(count):
        next(batches)
    seconds = time.perf_counter() - started
    batches.close()
    return count * args.batch / seconds, crossing


def compare(name: str, source: Source, args: argparse.Namespace) -> None:
    turns = [[records_per_second(source, stream, args) for stream in (Stream, OnTheHost)] for _ in range(args.turns)]
    rate: Callable[[int], float] = lambda which: statistics.median(turn[which][0] for turn in turns)  # noqa: E731
    print(
        f"{name}: {rate(0):,.0f} records/s as stored, {rate(1):,.0f} prepared on the host "
        f"({rate(0) / rate(1):.2f} times as many); {turns[0][0][1]:,.0f} and {turns[0][1][1]:,.0f} bytes of each cross"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, default in (("records", 8192), ("batch", 256), ("threads", 2), ("turns", 3), ("step-batch", 4)):
        parser.add_argument(f"--{name}", type=int, default=default)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "latents"
        write_latents(out, Moments(args.records), ORIGIN)
        options: dict[str, Any] = {"size": 32, "channels": 4, "num_classes": 1000, "flip": True}
        compare("latents", sources.load("latents", dir=str(out), split="", **options), args)
        r = np.random.default_rng(0)
        images = r.integers(0, 256, (min(args.records, 4096), 64, 64, 3), np.uint8)
        pixels = Source("random", ArrayExamples(images, np.zeros(len(images), np.int32)), 64, 3, 1, {})
        compare("pixels", pixels, args)
        leaves = (f"data.dir={out}", f"batch_size={args.step_batch}", "model.dtype=float32", "model.remat=none")
        config = load(
            "configs/imagenet256.py:model=dit-s-2",
            [f"--config.{leaf}" for leaf in (*leaves, "data.workers=0", "parallel.strategy=dp")],
        )
        report = bench(config, steps=4, turns=args.turns)
        print(json.dumps({name: report[name] for name in ("batch_size", "step_seconds", "loop_over_step")}))


if __name__ == "__main__":
    main()
