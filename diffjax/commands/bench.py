"""Time a config on this machine: the bare jitted step, and a pass of the training loop around it.

python -m diffjax bench --config=configs/quickstart.py:model=dit --steps=50

Both run in turns in one process, so that other load on the machine falls on both alike. `loop_over_step` is what
reading data, feeding devices and reporting cost: 1.00 is nothing.
"""

import contextlib
import json
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import jax
import numpy as np
from absl import flags

from diffjax.commands import define_distributed
from diffjax.config import Config, load
from diffjax.experiment import build
from diffjax.parallel import hosts
from diffjax.training.loop import Pending, advance
from diffjax.training.metrics import Reporter, peak_flops

REQUIRED = ("config",)


def define_flags(values: flags.FlagValues) -> None:
    flags.DEFINE_string("config", None, "recipe and its argument", flag_values=values)
    flags.DEFINE_integer("steps", 40, "steps of each kind per turn", lower_bound=2, flag_values=values)
    flags.DEFINE_integer("turns", 5, "turns of bare steps and loop passes", lower_bound=1, flag_values=values)
    define_distributed(values)


def run(values: flags.FlagValues, overrides: list[str]) -> None:
    with contextlib.redirect_stdout(sys.stderr):  # lines of the run; the report alone goes to stdout
        hosts.start(values.distributed)
        report = bench(load(values.config, overrides), values.steps, values.turns)
    print(json.dumps(report, indent=2))


def bench(config: Config, steps: int, turns: int) -> dict[str, Any]:
    """Medians over `turns` of the seconds per step, bare and in the loop, and what follows from them."""
    experiment = build(config)
    batches = experiment.stream()
    frozen, flops = experiment.frozen, experiment.step_flops()
    with contextlib.ExitStack() as stack:
        stack.enter_context(contextlib.closing(batches))
        stack.enter_context(jax.set_mesh(experiment.mesh))
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        reporter = Reporter(
            folder,
            total_steps=steps * turns,
            batch_size=experiment.batch_size,
            every_steps=experiment.schedule.report_every,
            flops_per_step=flops,
            tensorboard=experiment.tensorboard,
        )
        stack.enter_context(contextlib.closing(reporter))
        fixed = experiment.put(next(batches))
        started = time.perf_counter()
        state, _ = jax.block_until_ready(experiment.step(experiment.init(), frozen, fixed, experiment.key))
        first_seconds = time.perf_counter() - started
        bare, loop = [], []
        for turn in range(turns):
            started = time.perf_counter()
            for _ in range(steps):
                state, _ = experiment.step(state, frozen, fixed, experiment.key)
            jax.block_until_ready(state)
            bare.append((time.perf_counter() - started) / steps)

            pending = Pending()
            started = time.perf_counter()
            for step in range(turn * steps, (turn + 1) * steps):
                state, pending = advance(experiment, state, step, batches, pending, reporter)
            pending.flush(reporter)
            jax.block_until_ready(state)
            loop.append((time.perf_counter() - started) / steps)
    peak = peak_flops(jax.devices()[0])
    step_seconds, loop_seconds = float(np.median(bare)), float(np.median(loop))
    return {
        "device": jax.devices()[0].device_kind,
        "devices": jax.device_count(),
        "model": experiment.name,
        "batch_size": experiment.batch_size,
        "first_step_seconds": round(first_seconds, 2),
        "step_seconds": step_seconds,
        "loop_seconds": loop_seconds,
        "loop_over_step": float(np.median(np.array(loop) / np.array(bare))),
        "steps_per_second": 1 / loop_seconds,
        "images_per_second": experiment.batch_size / loop_seconds,
        "tflops_per_second": flops / loop_seconds / 1e12,
        "mfu": flops / loop_seconds / (peak * jax.device_count()) if peak else None,
    }
