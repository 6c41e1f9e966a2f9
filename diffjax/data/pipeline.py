"""The training stream: host-local batches as a pure function of (source, seed, batch size, batch number).

Position p = 0, 1, 2, ... of the endless global stream shows example order_e[p mod n] of epoch e = p // n, where order_e
is a random permutation of the n examples drawn for (seed, e); its flip is drawn for (seed, p). Batch k is the positions
k b .. (k + 1) b - 1, and host i of h takes every h-th of them from the i-th on. Batches are read as data are stored;
what is computed of them is computed on the devices (training/batches.py). So the stream depends neither on hosts nor on
workers nor threads, and resuming at batch k is asking for batch k.

The order is computed for whole batches rather than by one Grain node per example, which costs tens of microseconds
per example; Grain does the reading ahead, in threads and in worker processes.
"""

import contextlib
import dataclasses
import json
import logging
import multiprocessing
import os
import signal
import threading
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import lru_cache
from multiprocessing import resource_tracker
from typing import Any

import grain
import numpy as np
from absl import flags

from diffjax.contracts import Stored
from diffjax.data import draws
from diffjax.data.source import Source
from diffjax.errors import UserError
from diffjax.trees import leaves

# Entries of a source's fingerprint that follow from what lies in its place; the others are how it is read.
CONTENTS = ("length", "count", "classes", "files_sha256", "records_sha256", "sha256")


class Batches:
    """An iterator of host-local batches, resumable at any batch number.

    Each is a `contracts.Stored`; (batch number, index) names an example whatever the number of hosts.

    batch_size  examples of all hosts together; divisible by `process_count`
    flip        mirror left-right with probability 1/2
    workers     processes that prepare batches; 0: this process
    threads     threads per process that prepare batches ahead; 0: each batch is prepared when asked for
    start       number of the first batch
    """

    def __init__(
        self,
        source: Source,
        *,
        batch_size: int,
        seed: int,
        flip: bool,
        workers: int = 0,
        threads: int = 2,
        process_index: int = 0,
        process_count: int = 1,
        start: int = 0,
    ):
        if batch_size < 1 or batch_size % process_count:
            raise UserError(f"batch_size={batch_size} cannot be divided among {process_count} processes")
        if workers < 0 or threads < 0:
            raise UserError(f"data.workers={workers} and data.threads={threads} must not be negative")
        self._stream = Stream(source, batch_size, seed, flip, process_index, process_count)
        fingerprint = {"seed": seed, "batch_size": batch_size, "flip": flip, "source": source.fingerprint}
        if source.draws:
            fingerprint["draws"] = source.draws
        self._fingerprint = json.loads(json.dumps(fingerprint))  # as it will be read back: tuples are lists
        self._workers, self._threads = workers, threads
        self._started, self._next_batch = False, start
        self._open(start)

    def __iter__(self) -> Iterator[Stored]:
        return self

    def __next__(self) -> Stored:
        if self._started:
            batch = next(self._iterator)
        else:  # here Grain starts its processes
            with _signals_for_parent():
                batch = next(self._iterator)
            self._started = True
        self._next_batch += 1
        return batch

    def get_state(self) -> dict[str, Any]:
        """Json-able: the number of the next batch, and what else the stream depends on."""
        return {"next_batch": self._next_batch, "fingerprint": self._fingerprint}

    def set_state(self, state: dict[str, Any]) -> None:
        """Continue where `get_state` was called. `UserError` naming what differs when it was another stream's."""
        stored = dict(state["fingerprint"])
        if "draws" in self._fingerprint and "draws" not in stored:
            logging.getLogger("diffjax").info(
                "this run began with a version that drew the samples of latents otherwise: it continues with new draws"
            )
            stored["draws"] = self._fingerprint["draws"]
        if differing := _differing(stored, self._fingerprint, self._stream.source):
            advice = "restore what the run had, or start a new --workdir with --config.init.from set to this one"
            raise UserError(f"{differing}; {advice}")
        self.close()
        self._open(state["next_batch"])

    def examples(self, number: int) -> list[int]:
        """The numbers of the examples of the global batch `number`, as the source counts them."""
        return self._stream.numbers(number)

    def not_finite(self, number: int) -> list[int]:
        """Those examples of the global batch `number` that hold values which are not finite; reads all of them."""
        batch = dataclasses.replace(self._stream, process_index=0, process_count=1)[number]
        finite = np.ones(self._stream.batch_size, bool)
        for values in (batch.raw, batch.condition, *batch.aux.values()):
            if np.issubdtype(values.dtype, np.inexact):
                finite &= np.isfinite(values.reshape(len(values), -1)).all(1)
        return [example for example, good in zip(self.examples(number), finite) if not good]

    def close(self) -> None:
        """Stop the threads and workers."""
        self._iterator.close()

    def _open(self, start: int) -> None:
        batches = grain.MapDataset.source(self._stream)[start:]
        ahead = 2 * self._threads
        stream = batches.to_iter_dataset(grain.ReadOptions(num_threads=self._threads, prefetch_buffer_size=ahead))
        if self._workers:
            if not flags.FLAGS.is_parsed():  # Grain reads its flags, also in programs that never parse any
                flags.FLAGS.mark_as_parsed()
            options = grain.MultiprocessingOptions(num_workers=self._workers, per_worker_buffer_size=2)
            stream = stream.mp_prefetch(options, worker_init_fn=_exit_with_parent)
        self._iterator = iter(stream)
        self._started = False
        self._next_batch = start


def _differing(stored: Mapping[str, Any], own: Mapping[str, Any], source: Source) -> str:
    """In words, how the data of a run are not those that it began with; "" where they are.

    stored, own: fingerprints of streams, then and now. source: as it is now.
    """
    then, now = leaves(stored), leaves(own)
    differing = [key for key in sorted(then | now) if then.get(key) != now.get(key)]
    if not differing:
        return ""
    if any(key.rpartition(".")[2] not in CONTENTS for key in differing):
        pairs = ", ".join(f"{key} was {then.get(key)} and is {now.get(key)}" for key in differing)
        return f"the data are not those of the run: {pairs}"
    count = next((key for key in ("source.length", "source.count") if key in now), "")
    counted = f"{then[count]:,} {source.kind} then, {now[count]:,} now" if count in differing else "as many, but others"
    return f"the {source.kind} in {source.place} are not those of the run ({counted})"


def collate(
    source: Source, examples: list[dict[str, Any]], index: np.ndarray, mirrored: np.ndarray, number: int
) -> Stored:
    """Examples [b] as they are stored, in one batch; index, mirrored [b] and number as in `Stored`."""
    images = (example["image"] for example in examples)
    raw = np.stack([views[int(one)] for views, one in zip(images, mirrored)] if source.views else list(images))
    dtype = source.condition.dtype if source.condition and not source.separate else np.int32
    condition = np.stack([example["label"] for example in examples]).astype(dtype)
    aux = {name: np.stack([example["aux"][name] for example in examples]) for name in source.aux}
    return Stored(raw, mirrored, condition, index.astype(np.int32), np.full(len(index), number, np.int32), aux)


def conditions(source: Source, numbers: np.ndarray) -> np.ndarray:
    """The conditions [b, ...] of the examples of these numbers."""
    examples = [source.examples[int(i)] for i in numbers]
    stored = collate(source, examples, numbers, np.zeros(len(numbers), bool), 0)
    return source.separate(stored.raw, stored.condition)[1] if source.separate else stored.condition


@dataclass(frozen=True)
class Stream:
    """The endless stream as a random-access list of host-local batches; see the module's docstring."""

    source: Source
    batch_size: int
    seed: int
    flip: bool
    process_index: int
    process_count: int

    def __len__(self) -> int:
        return 2**40  # batches; never reached

    @property
    def rows(self) -> np.ndarray:
        """This host's part of a global batch."""
        return np.arange(self.process_index, self.batch_size, self.process_count)

    def __getitem__(self, number: int) -> Stored:
        rows = self.rows
        mirrored = np.zeros(len(rows), bool)
        if self.flip:
            mirrored = draws.coins(self.seed, "flip", number * self.batch_size, self.batch_size)[rows]
        examples = [self.source.examples[i] for i in self.numbers(number, rows)]
        return collate(self.source, examples, rows, mirrored, number)

    def numbers(self, number: int, rows: np.ndarray | None = None) -> list[int]:
        """The numbers of the examples in the rows of global batch `number`; by default in all of them."""
        length = len(self.source.examples)
        rows = np.arange(self.batch_size) if rows is None else rows
        epochs, places = np.divmod(number * self.batch_size + rows, length)
        return [int(_order(self.seed, int(epoch), length)[place]) for epoch, place in zip(epochs, places)]


@lru_cache(maxsize=4)
def _order(seed: int, epoch: int, length: int) -> np.ndarray:
    return draws.permutation(seed, "order", epoch, length)


@contextlib.contextmanager
def _signals_for_parent() -> Iterator[None]:
    """Processes started in here never take SIGINT and SIGTERM, which terminals and schedulers send to all of them."""
    resource_tracker.ensure_running()  # its start would take the block away again
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT, signal.SIGTERM})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _exit_with_parent(worker: int, workers: int) -> None:
    """Runs in each worker: a killed parent closes no queue, and the worker would wait, and hold its memory, forever."""
    parent = multiprocessing.parent_process()
    assert parent is not None

    def wait() -> None:
        parent.join()
        os._exit(1)

    threading.Thread(target=wait, daemon=True, name=f"exit-with-parent-{worker}-of-{workers}").start()
