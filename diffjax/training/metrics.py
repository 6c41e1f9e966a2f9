"""Report metrics averaged over a window of steps to the console, metrics.jsonl and TensorBoard."""

import json
import math
import sys
import time
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import numpy as np
from clu import metrics as clu_metrics
from tqdm import tqdm

from diffjax.errors import UserError, writing
from diffjax.files import write_text

# Peak dense bfloat16 FLOP/s of one device, from the makers' data sheets, by the start of jax's device_kind.
LAST = ("learning_rate", "skipped_steps")  # of a window the last value is reported, of all others the mean
PEAK_FLOPS = {
    "TPU v4": 275e12,
    "TPU v5 lite": 197e12,
    "TPU v5e": 197e12,
    "TPU v5": 459e12,
    "TPU v6 lite": 918e12,
    "NVIDIA A100": 312e12,
    "NVIDIA H100": 989e12,
    "NVIDIA H200": 989e12,
}


def peak_flops(device: jax.Device) -> float | None:
    """Peak bfloat16 FLOP/s of a device, None where no data sheet figure is known (a CPU)."""
    kinds = [kind for kind in PEAK_FLOPS if device.device_kind.startswith(kind)]
    return PEAK_FLOPS[max(kinds, key=len)] if kinds else None


@dataclass(frozen=True)
class Spent:
    """The time that a run has taken up to a step, in seconds, as its checkpoints keep it.

    Attributes:
        seconds: of the processes that made the steps up to this one, without what was lost or stood still.
        useful: of these steps themselves, without start-up, compiling, saving, evaluating and skipped steps.
        elapsed: since the run began to train, with lost steps and the time between starts.
        starts: how often it began or went on; those that ended before the first checkpoint are forgotten.
    """

    seconds: float = 0.0
    useful: float = 0.0
    elapsed: float = 0.0
    starts: int = 0

    @classmethod
    def of_meta(cls, meta: Mapping[str, Any]) -> "Spent":
        """From a checkpoint; the time since it was written has passed, unless the clock went back."""
        if "elapsed_seconds" not in meta:  # of an earlier version: goodput counts from now on
            return cls(seconds=float(meta.get("seconds", 0.0)))
        since = max(0.0, time.time() - meta["saved_at"])
        return cls(meta["seconds"], meta["useful_seconds"], meta["elapsed_seconds"] + since, meta["starts"])

    def to_meta(self) -> dict[str, float]:
        return {
            "seconds": self.seconds,
            "useful_seconds": self.useful,
            "elapsed_seconds": self.elapsed,
            "starts": self.starts,
            "goodput": self.goodput,
            "saved_at": time.time(),
        }

    @property
    def goodput(self) -> float:
        """The part of the elapsed time that went into steps that were kept."""
        return self.useful / self.elapsed if self.elapsed else 0.0


def memory(devices: Sequence[jax.Device]) -> dict[str, float]:
    """GiB in use on the fullest of these devices, now and at most so far; {} where they do not say (a CPU)."""
    found = [stats for device in devices if (stats := device.memory_stats())]
    names = {"memory_gib": "bytes_in_use", "memory_peak_gib": "peak_bytes_in_use"}
    return {name: max(stats[key] for stats in found) / 2**30 for name, key in names.items() if found}


class NonFiniteError(RuntimeError):
    """A loss, gradient or parameter that is not a number; names the step."""


class Reporter:
    """Collects the scalars of every step and reports their averages every `every_steps` steps.

    Args:
        flops_per_step: model FLOPs of a training step on all devices (3 x forward, 2 per multiply-accumulate, no
            recomputation: PaLM, arXiv 2204.02311, appendix B), for the MFU.
        start: the step that the run resumes from; rows of later ones are dropped, they will be written again.
        before: what the run has taken before this start. again: evaluators that run again at `start`.
        lead: False on the processes that stay silent.
    """

    def __init__(
        self,
        workdir: Path,
        *,
        total_steps: int,
        batch_size: int,
        every_steps: int,
        flops_per_step: float,
        tensorboard: bool,
        start: int = 0,
        before: Spent = Spent(),  # frozen
        again: Collection[str] = (),
        lead: bool = True,
    ):
        self._workdir = workdir
        self._started, self._before = time.monotonic(), before
        self._useful, self._steps = before.useful, 0
        self._total_steps, self._batch_size, self._every_steps = total_steps, batch_size, every_steps
        self._lead, self._flops = lead, flops_per_step
        peak = peak_flops(jax.devices()[0])
        self._peak = peak * jax.device_count() if peak else None
        self._window: dict[str, Any] = {}
        self._durations: list[float] = []
        self._waits: list[float] = []
        self._last_time: float | None = None
        if lead:
            drop_rows_after(workdir / "metrics.jsonl", start, again)
        self._file = (workdir / "metrics.jsonl").open("a", buffering=1) if lead else None
        self._board = Board(workdir / "tensorboard", start) if tensorboard and lead else None
        self._bar = (
            tqdm(total=total_steps, initial=start, unit="step", dynamic_ncols=True)
            if lead and sys.stderr.isatty()
            else None
        )

    def step(self, step: int, values: Mapping[str, jax.Array], asked: float | None = None) -> None:
        """Take the scalars of the update that led to `step`; blocks until they are there.

        asked: when the step began, by `time.perf_counter`, where it did not follow another one at once. The first step
        of a start, which compiles, counts as no useful time.

        Raises:
            NonFiniteError: one of them is infinite or not a number.
        """
        fetched = {name: float(value) for name, value in jax.device_get(dict(values)).items()}
        skipped = bool(fetched.pop("skipped", 0.0))
        if skipped:
            fetched = {name: fetched[name] for name in LAST}
            total = fetched["skipped_steps"]
            self.say(f"step {step}: the gradient is not finite, the update is left out ({total:.0f} so far)")
        for name, value in fetched.items():
            if not math.isfinite(value):
                raise NonFiniteError(f"{name} is {value} at step {step}")
        now = time.perf_counter()
        if self._last_time is not None:
            self._durations.append(now - self._last_time)
        if self._steps and not skipped:
            self._useful += now - (self._last_time or asked or now)
        self._last_time = now
        self._steps += 1
        for name, value in fetched.items():
            new = clu_metrics.Average(total=np.float64(value), count=np.int64(1))
            mean = name in self._window and name not in LAST
            self._window[name] = self._window[name].merge(new) if mean else new
        if self._bar:
            self._bar.update(1)
        if step % self._every_steps == 0 or step == self._total_steps:
            self._report(step)

    def waited(self, seconds: float) -> None:
        """Take the time that a step waited for its batch."""
        self._waits.append(seconds)

    def spent(self) -> Spent:
        """The time that the run has taken so far, this start and those before it."""
        now, before = time.monotonic() - self._started, self._before
        return Spent(before.seconds + now, self._useful, before.elapsed + now, before.starts + 1)

    def pause(self) -> None:
        """Leave out of the step time what happens until the next step (a checkpoint, a grid of samples)."""
        self._last_time = None

    def say(self, text: str) -> None:
        """One line for the person who watches."""
        if not self._lead:
            return
        if self._bar:
            self._bar.write(text, file=sys.stderr)
        else:
            print(text, flush=True)

    def evaluation(self, name: str, step: int, values: Mapping[str, float]) -> None:
        """A row of what an evaluator found: {"step": ..., "evaluation": name, ...}."""
        if not self._lead or not values:
            return
        self._write({"step": step, "evaluation": name, **values})
        if self._board:
            self._board.scalars(step, {f"{name}/{key}": value for key, value in values.items()})
        self.say(f"step {step}/{self._total_steps}  {name}: {'  '.join(f'{k} {v:.4g}' for k, v in values.items())}")

    def image(self, name: str, step: int, grid: np.ndarray) -> None:
        """A uint8 [h, w, c] picture for TensorBoard."""
        if self._board:
            self._board.image(name, step, grid)

    def close(self) -> None:
        with writing(self._workdir):
            for sink in (self._bar, self._board, self._file):
                if sink:
                    sink.close()

    def _report(self, step: int) -> None:
        values = {name: float(average.compute()) for name, average in self._window.items()}
        if self._durations:
            values |= self._speed()
        spent = self.spent()
        values |= {"images_seen": step * self._batch_size, "seconds": spent.seconds, "goodput": spent.goodput}
        values |= memory(jax.local_devices())
        if self._waits:
            values["input_wait_seconds"] = float(np.mean(self._waits))
        self._window, self._durations, self._waits = {}, [], []
        if not self._lead:
            return
        self._write({"step": step, **values})
        if self._board:
            self._board.scalars(step, values)
        short = {"loss": ".4f", "grad_norm": ".3f", "learning_rate": ".2g", "images_per_second": ".0f", "mfu": ".1%"}
        text = "  ".join(f"{name} {values[name]:{form}}" for name, form in short.items() if name in values)
        if self._bar:
            self._bar.set_postfix_str(text)
        else:
            self.say(f"step {step}/{self._total_steps}  {text}{self._eta(step, values)}")

    def _write(self, row: Mapping[str, Any]) -> None:
        assert self._file is not None
        with writing(self._workdir / "metrics.jsonl"):
            self._file.write(json.dumps(row) + "\n")

    def _speed(self) -> dict[str, float]:
        seconds = float(np.mean(self._durations))
        speed = {
            "step_seconds": seconds,
            "step_seconds_p95": float(np.percentile(self._durations, 95)),
            "images_per_second": self._batch_size / seconds,
            "tflops_per_second": self._flops / seconds / 1e12,
        }
        return speed | ({"mfu": self._flops / seconds / self._peak} if self._peak else {})

    def _eta(self, step: int, values: Mapping[str, float]) -> str:
        if "step_seconds" not in values:
            return ""
        seconds = int((self._total_steps - step) * values["step_seconds"])
        return f"  {seconds // 3600}:{seconds // 60 % 60:02}:{seconds % 60:02} left"


def drop_rows_after(path: Path, step: int, again: Collection[str] = ()) -> None:
    """Leave out of metrics.jsonl what a killed run wrote beyond the step that it resumes from, and half lines.

    again: evaluators whose rows of that step are left out, too.
    """
    if not path.is_file():
        return
    lines = path.read_text(errors="replace").splitlines(keepends=True)
    kept = [line for line in lines if line.endswith("\n") and _is_kept(line, step, again)]
    if kept != lines:
        write_text(path, "".join(kept))


def _is_kept(line: str, step: int, again: Collection[str]) -> bool:
    try:
        row = json.loads(line)
        return row["step"] < step or (row["step"] == step and row.get("evaluation") not in again)
    except (ValueError, TypeError, KeyError, AttributeError):
        return False


class Board:
    """Events for TensorBoard, written by the caller's thread: a writer thread that fails would leave it waiting."""

    def __init__(self, folder: Path, start: int = 0):
        """start: the step that the run resumes from; TensorBoard forgets what an earlier start wrote beyond it."""
        try:
            from tensorboardX import event_file_writer, summary
            from tensorboardX.proto.event_pb2 import Event, SessionLog
        except ImportError as error:
            raise UserError("log.tensorboard needs the package tensorboardX, or set log.tensorboard=false") from error
        self._folder, self._summary, self._event = folder, summary, Event
        with writing(folder):
            folder.mkdir(exist_ok=True)
            self._writer = event_file_writer.EventsWriter(str(folder / "events"))
            if start:
                begin = SessionLog(status=SessionLog.START)
                self._writer.write_event(Event(wall_time=time.time(), step=start + 1, session_log=begin))

    def scalars(self, step: int, values: Mapping[str, float]) -> None:
        self._write(step, [self._summary.scalar(name, value) for name, value in values.items()])

    def image(self, name: str, step: int, grid: np.ndarray) -> None:
        """A uint8 [h, w, c] picture."""
        self._write(step, [self._summary.image(name, grid, dataformats="HWC")])

    def close(self) -> None:
        self._writer.close()

    def _write(self, step: int, summaries: list[Any]) -> None:
        with writing(self._folder):
            for summary in summaries:
                self._writer.write_event(self._event(wall_time=time.time(), step=step, summary=summary))
            self._writer.flush()
