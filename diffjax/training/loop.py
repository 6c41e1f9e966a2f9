"""The one training loop, which every backbone and every objective goes through.

The order of a pass is a contract:

    snapshot the averages -> save the state -> evaluate it -> draw a batch -> step -> report the step before

Saving precedes drawing, so the position of the data that is saved is the one the state has seen, and evaluation, so
that nothing that goes wrong there costs a step. Snapshots precede saving, which waits for them: a run that goes on from
a checkpoint has all snapshots before it; later ones it passes again, with the same values. The scalars of a step are
fetched after the next one has been dispatched, so that reporting never makes a device wait; before a snapshot or a save
they are all fetched, so that a state that came from a non-finite gradient is never written.
"""

import contextlib
import hashlib
import json
import platform
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import numpy as np
from absl import logging
from clu import parameter_overview
from ml_collections import ConfigDict

import diffjax
from diffjax.data import pipeline, sources
from diffjax.errors import UserError, writing
from diffjax.ops.macs import count_macs
from diffjax.parallel import hosts
from diffjax.sampling import samples
from diffjax.training import config as configs
from diffjax.training import ema, generate
from diffjax.training.checkpoint import Checkpoints, Snapshots, latest_step
from diffjax.training.interrupt import StopRequest
from diffjax.training.metrics import NonFiniteError, Reporter
from diffjax.training.objective import example
from diffjax.training.objective.codes import check_made_as_stated
from diffjax.training.setup import Setup, averages, build
from diffjax.training.state import TrainState

# Sections that change what is said and kept of a run, not its values.
WATCHING = ("checkpoint.", "log.", "evals.", "sampling.")


@dataclass
class Pending:
    """The scalars of the last dispatched step, not fetched yet."""

    step: int = 0
    values: dict[str, jax.Array] | None = None

    def flush(self, reporter: Reporter) -> None:
        if self.values is not None:
            reporter.step(self.step, self.values)
        self.values = None


def train(config: ConfigDict, workdir: Path, accepted: tuple[str, ...] = ()) -> None:
    """Train as `config` says in `workdir`; an existing folder is resumed, a finished run is left as it is.

    Args:
        accepted: leaves in which `config` may differ from the folder's own.

    Raises:
        UserError: anything the user can mend; what can be known beforehand, before anything is written.
        NonFiniteError: the run diverged.
    """
    with contextlib.ExitStack() as stack:
        stop = stack.enter_context(contextlib.closing(StopRequest(alone=jax.process_count() == 1)))
        changed = _check_folder(config, workdir, accepted)
        latest = latest_step(workdir)
        if latest is not None and latest > config.total_steps:
            raise UserError(f"{workdir} is at step {latest}, beyond total_steps = {config.total_steps}")
        if latest == config.total_steps:
            if hosts.is_lead():
                print(f"{workdir} is finished: step {config.total_steps} of {config.total_steps}", flush=True)
            return
        setup = build(config)
        draw_samples = SampleGrid(setup, workdir)
        batches = stack.enter_context(contextlib.closing(open_batches(config)))
        _make_folder(config, workdir)
        checkpoints = stack.enter_context(contextlib.closing(_open_checkpoints(config, workdir)))
        stack.enter_context(jax.set_mesh(setup.mesh))
        state, start = _initial_or_restored(setup, checkpoints, batches)
        if checkpoints.snapshots and not all(line.startswith((*configs.LAYOUT_LEAVES, *WATCHING)) for line in changed):
            checkpoints.snapshots.refuse_after(start)
        _keep_config(config, workdir)
        reporter = stack.enter_context(contextlib.closing(_reporter(setup, workdir, start)))
        _announce(setup, reporter, start, changed)
        _loop(setup, state, start, workdir, checkpoints, batches, draw_samples, reporter, stop)


def _open_checkpoints(config: ConfigDict, workdir: Path) -> Checkpoints:
    return Checkpoints(
        workdir,
        keep=config.checkpoint.keep,
        keep_every_steps=config.checkpoint.keep_every_steps,
        snapshots=Snapshots(workdir) if config.ema.tracks else None,
    )


def _check_folder(config: ConfigDict, workdir: Path, accepted: tuple[str, ...]) -> list[str]:
    """Raise UserError unless the folder is new or belongs to this config; return the differences that may be."""
    path = workdir / "config.json"
    stored = configs.read(path) if path.is_file() else None
    known = configs.flatten(config) | configs.flatten(stored or config)
    if unknown := [name for name in accepted if name not in known]:
        raise UserError(f"--accept={','.join(unknown)}: the config has no such leaf")
    if stored is not None:
        return configs.check_same_run(stored, config, accepted)
    if (workdir / "checkpoints").exists():
        raise UserError(f"{workdir} has checkpoints but no config.json: not a run folder; use another --workdir")
    return []


def _make_folder(config: ConfigDict, workdir: Path) -> None:
    if not hosts.is_lead():
        return
    try:
        workdir.mkdir(parents=True, exist_ok=True)
        if not (workdir / "config.json").is_file():
            configs.write(config, workdir / "config.json")
    except OSError as error:
        raise UserError(f"--workdir={workdir} cannot be written: {error.strerror}; give a writable folder") from error


def _keep_config(config: ConfigDict, workdir: Path) -> None:
    """Accepted changes become the run's own once its state could be restored under them."""
    if hosts.is_lead():
        configs.write(config, workdir / "config.json")


def _reporter(setup: Setup, workdir: Path, start: int) -> Reporter:
    config = setup.config
    return Reporter(
        workdir,
        total_steps=config.total_steps,
        batch_size=config.batch_size,
        every_steps=config.log.every_steps,
        flops_per_step=step_flops(setup),
        tensorboard=config.log.tensorboard,
        start=start,
        lead=hosts.is_lead(),
    )


def _loop(
    setup: Setup,
    state: TrainState,
    start: int,
    workdir: Path,
    checkpoints: Checkpoints,
    batches: pipeline.Batches,
    draw_samples: "SampleGrid",
    reporter: Reporter,
    stop: StopRequest,
) -> None:
    config = setup.config
    pending = Pending()
    saved = checkpoints.latest()
    meta = _meta(setup)

    def progress(step: int) -> dict[str, int]:
        return {"step": step, "images_seen": step * config.batch_size}

    def snapshot(step: int) -> None:
        if checkpoints.snapshots:
            pending.flush(reporter)
            reporter.pause()
            lengths = {"sigma_rel": ema.track_lengths(averages(config).tracks)}
            checkpoints.snapshots.save(state.tracks, step, {**lengths, **progress(step)})

    def save(step: int) -> None:
        nonlocal saved
        pending.flush(reporter)
        if step != saved:
            reporter.pause()
            checkpoints.save(state, step, batches.get_state(), {**meta, **progress(step)})
            saved = step

    try:
        with jax.transfer_guard("disallow"):
            for step in range(start, config.total_steps):
                if step > start and _due(step, config.ema.snapshot_every_steps):
                    snapshot(step)
                if step > start and _due(step, config.checkpoint.every_steps):
                    save(step)
                if step > start and _due(step, config.evals.samples.every_steps):
                    pending.flush(reporter)
                    draw_samples(step, state, reporter)
                if stop.signal_name or checkpoints.reached_preemption(step):
                    save(step)
                    checkpoints.wait()
                    reporter.say(f"{stop.signal_name or 'preemption'}: checkpoint written, stopped at step {step}")
                    return
                checkpoints.check_for_errors()
                state, pending = advance(setup, state, step, batches, pending, reporter)
            snapshot(config.total_steps)
            save(config.total_steps)
            draw_samples(config.total_steps, state, reporter)
        checkpoints.wait()
    except NonFiniteError as error:
        checkpoints.wait()
        last = checkpoints.latest()
        kept = f"the last checkpoint is step {last}" if last is not None else "no checkpoint was written"
        raise NonFiniteError(f"{error}; {kept}; nothing was written after it") from error
    reporter.say(f"finished: step {config.total_steps} of {config.total_steps} in {workdir}")


def advance(
    setup: Setup, state: TrainState, step: int, batches: pipeline.Batches, pending: Pending, reporter: Reporter
) -> tuple[TrainState, Pending]:
    """Draw a batch, dispatch the step on it, and only then report the step before."""
    state, metrics = setup.step(state, setup.put(next(batches)), setup.key)
    pending.flush(reporter)
    return state, Pending(step + 1, metrics)


class SampleGrid:
    """Draws the same images of the average's model at every call: samples/step_*.png and TensorBoard."""

    def __init__(self, setup: Setup, workdir: Path):
        self._setup, self._folder = setup, workdir / "samples"
        config = setup.config
        self._num = config.evals.samples.num if config.evals.samples.every_steps else 0
        if not self._num:
            return
        if setup.objective.makes != "pictures":
            raise UserError(
                f"evals.samples draws pictures, and this model makes {setup.objective.makes}; "
                "set evals.samples.every_steps=0"
            )
        self._sampler = generate.compile_sampler(setup.objective, setup.model, setup.mesh, config.seed)

    def __call__(self, step: int, state: TrainState, reporter: Reporter) -> None:
        if not self._num:
            return
        reporter.pause()
        labels = generate.interleaved_labels(self._num, self._setup.config.data.num_classes)
        with jax.transfer_guard("allow"):
            batches = generate.generate(self._sampler, state.ema, labels, self._setup.mesh, self._num)
            values = np.concatenate(list(batches))
        if not np.isfinite(values).all():
            reporter.say(f"step {step}: sampled values are not finite, no picture is drawn")
            return
        images = samples.to_uint8(values)
        if hosts.is_lead():
            grid = samples.grid(images)
            path = self._folder / f"step_{step:08d}.png"
            with writing(path):
                self._folder.mkdir(exist_ok=True)
                samples.write_png(path, grid)
            reporter.image("samples", step, grid)


def open_batches(config: ConfigDict, start: int = 0) -> pipeline.Batches:
    """This host's part of the stream of training batches."""
    data = config.data
    if "tokens" in config:
        check_made_as_stated(config)
    return pipeline.Batches(
        sources.load(data),
        batch_size=config.batch_size,
        seed=config.seed,
        flip=data.flip,
        workers=data.workers,
        threads=data.threads,
        process_index=jax.process_index(),
        process_count=jax.process_count(),
        start=start,
    )


def step_flops(setup: Setup) -> float:
    """Model FLOPs of one training step: 3 x the forward pass, 2 per multiply-accumulate, no recomputation."""
    return 6.0 * setup.config.batch_size * count_macs(setup.apply, setup.abstract.params, *example(setup.config))


def _initial_or_restored(setup: Setup, checkpoints: Checkpoints, batches: pipeline.Batches) -> tuple[TrainState, int]:
    latest = checkpoints.latest()
    if latest is None:
        return setup.init(), 0
    state, position = checkpoints.restore_or_advise(setup.abstract, latest)
    batches.set_state(position)
    return state, latest


def _announce(setup: Setup, reporter: Reporter, start: int, changed: list[str]) -> None:
    params = setup.abstract.params
    logging.info("\n%s", parameter_overview.get_parameter_overview(params, include_stats=False))
    count = sum(leaf.size for leaf in jax.tree.leaves(params))
    mesh = " x ".join(f"{axis} {size}" for axis, size in setup.mesh.shape.items())
    device = jax.devices()[0].device_kind
    if changed:
        reporter.say(f"going on with {'; '.join(changed)}")
    verb = f"resuming at step {start}" if start else "starting"
    reporter.say(f"{verb}: {setup.config.model.name}, {count:,} parameters, mesh {mesh} of {device}")


def _due(step: int, every: int) -> bool:
    return every > 0 and step % every == 0


def _meta(setup: Setup) -> dict[str, Any]:
    """What a checkpoint says of its maker."""
    config = json.dumps(setup.config.to_dict(), sort_keys=True)
    return {
        "config_sha256": hashlib.sha256(config.encode()).hexdigest(),
        "mesh": dict(setup.mesh.shape),
        "processes": jax.process_count(),
        "versions": {"diffjax": diffjax.__version__, "jax": jax.__version__, "python": platform.python_version()},
    }
