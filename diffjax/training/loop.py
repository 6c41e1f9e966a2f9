"""The training loop of all backbones and methods.

The order of a pass is a contract:

    snapshot the averages -> save the state -> evaluate it -> draw a batch -> step -> report the step before

Saving precedes drawing, so the position of the data that is saved is the one the state has seen, and evaluation, so
that nothing that goes wrong there costs a step. Snapshots precede saving, which waits for them: a run that resumes from
a checkpoint has all snapshots before it; later ones it passes again, with the same values. The scalars of a step are
fetched after the next one has been dispatched, so that reporting never makes a device wait; before a snapshot or a save
they are all fetched, so that a state that came from a non-finite gradient is never written. An evaluation that a kill
left out, the last one too, is made up for when the run goes on.
"""

import contextlib
import json
import platform
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

import jax
import numpy as np
from absl import logging
from clu import parameter_overview

import diffjax
from diffjax import archive
from diffjax.config import Config, check_same_run, read, write
from diffjax.config.load import check_same_on_all, differences, same_values, stored
from diffjax.data import pipeline
from diffjax.errors import Interrupted, UserError
from diffjax.experiment import Experiment, build
from diffjax.files import only_writer
from diffjax.parallel import hosts
from diffjax.training import ema, finetune, nonfinite
from diffjax.training.checkpoint import Checkpoints, Snapshots, latest_step
from diffjax.training.evaluations import Evaluations
from diffjax.training.interrupt import StopRequest
from diffjax.training.metrics import NonFiniteError, Reporter, Spent
from diffjax.training.profile import Profile
from diffjax.training.state import TrainState
from diffjax.training.step import SQUARED_NORMS
from diffjax.training.watchdog import Watchdog


@dataclass
class Pending:
    """The metrics of the last dispatched step, not fetched yet.

    asked: when it asked for its batch, by `time.perf_counter`. waited: the seconds that it waited for it.
    """

    step: int = 0
    values: dict[str, jax.Array] | None = None
    asked: float = 0.0
    waited: float = 0.0

    def flush(self, reporter: Reporter) -> None:
        if self.values is not None:
            reporter.waited(self.waited)
            scalars = {name: value for name, value in self.values.items() if name not in SQUARED_NORMS}
            reporter.step(self.step, scalars, self.asked)
        self.values = None


def train(
    config: Config, workdir: Path, accepted: tuple[str, ...] = (), profile: tuple[int, int] | None = None
) -> None:
    """Train as `config` says in `workdir`; an existing folder is resumed, a finished run is left as it is.

    Args:
        accepted: leaves in which `config` may differ from the folder's own.
        profile: first and last step of which a trace is written.

    Raises:
        UserError: anything the user can mend; what can be known beforehand, before anything is written.
        Interrupted: a signal stopped the run, after a checkpoint; the message says at which step.
        NonFiniteError: the run diverged.
    """
    with contextlib.ExitStack() as stack:
        stop = stack.enter_context(contextlib.closing(StopRequest(alone=jax.process_count() == 1)))
        archive.check_place(workdir)
        check_same_on_all(hosts.texts(json.dumps(stored(config))))
        changed = _check_folder(config, workdir, accepted)
        latest = latest_step(workdir)
        experiment = build(config)
        total = experiment.schedule.total_steps
        if latest is not None and latest > total:
            raise UserError(f"{workdir} is at step {latest}, beyond total_steps = {total}")
        evaluations = Evaluations(workdir, experiment)
        if latest == total and not evaluations.missing(total) and not profile:
            if hosts.is_lead():
                print(f"{workdir} is finished: step {total} of {total}", flush=True)
            return
        tracer = stack.enter_context(contextlib.closing(Profile(workdir / "profile", profile, latest or 0, total)))
        _ = experiment.method.sampler and experiment.sampler, experiment.frozen  # what cannot be is found now
        evaluations.prepare()
        begin = finetune.find_start(experiment) if latest is None else None
        batches = stack.enter_context(contextlib.closing(experiment.stream()))
        _make_folder(workdir)
        if hosts.is_lead():
            stack.enter_context(only_writer(workdir))
        _check_folder(config, workdir, accepted)  # another process may have been here before the lock
        _keep_first_config(config, workdir)
        checkpoints = stack.enter_context(contextlib.closing(_open_checkpoints(experiment, workdir, evaluations)))
        stack.enter_context(jax.set_mesh(experiment.mesh))
        state, start, spent = _initial_or_restored(experiment, checkpoints, batches, begin)
        if checkpoints.snapshots and not same_values(config, changed):
            checkpoints.snapshots.refuse_after(start)
        _keep_config(config, workdir)
        missing = evaluations.missing(start)
        reporter = stack.enter_context(contextlib.closing(_reporter(experiment, workdir, start, spent, missing)))
        _announce(experiment, reporter, start, {} if latest is None else changed)
        watchdog = stack.enter_context(contextlib.closing(Watchdog(experiment.schedule.hang_minutes)))
        run = Run(experiment, checkpoints, batches, evaluations, reporter, stop, tracer, watchdog, workdir)
        run.loop(state, start, missing, keep_start=begin is not None)


def _open_checkpoints(experiment: Experiment, workdir: Path, evaluations: Evaluations) -> Checkpoints:
    return Checkpoints(
        workdir,
        keep=experiment.schedule.keep,
        keep_every_steps=experiment.schedule.keep_every,
        keep_also=evaluations.best if experiment.schedule.keep_best else None,
        snapshots=Snapshots(workdir) if experiment.sigma_rel else None,
    )


def _check_folder(config: Config, workdir: Path, accepted: tuple[str, ...]) -> dict[str, str]:
    """Return the differences of a folder's config that may be. UserError for others, once there is a checkpoint."""
    path = workdir / "config.json"
    if path.is_file():
        old = read(path)
        if latest_step(workdir) is None:  # no step was kept: as if the folder were new
            check_same_run(config, config, accepted)
            return differences(old, config)
        return check_same_run(old, config, accepted, lambda: _misfit(old, config))
    if (workdir / "checkpoints").exists():
        raise UserError(f"{workdir} has checkpoints but no config.json: not a run folder; use another --workdir")
    return check_same_run(config, config, accepted)


def _misfit(a: Config, b: Config) -> str:
    """In which arrays the state of a run of one config is not like that of another; "" where they are alike."""
    given = build(b, training=False)
    kept = build(a, given.mesh, training=False)  # whose own mesh the devices here may not make
    return archive.differing(archive.shapes(kept.abstract), archive.shapes(given.abstract))


def _make_folder(workdir: Path) -> None:
    if not hosts.is_lead():
        return
    try:
        workdir.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"--workdir={workdir} cannot be written: {error.strerror}; give a writable folder") from error


def _keep_first_config(config: Config, workdir: Path) -> None:
    if hosts.is_lead() and not (workdir / "config.json").is_file():
        write(config, workdir / "config.json")


def _keep_config(config: Config, workdir: Path) -> None:
    """Accepted changes become the run's own once its state could be restored under them."""
    if hosts.is_lead():
        write(config, workdir / "config.json")


def _reporter(experiment: Experiment, workdir: Path, start: int, spent: Spent, missing: list[str]) -> Reporter:
    return Reporter(
        workdir,
        total_steps=experiment.schedule.total_steps,
        batch_size=experiment.batch_size,
        every_steps=experiment.schedule.report_every,
        flops_per_step=experiment.step_flops(),
        tensorboard=experiment.tensorboard,
        start=start,
        before=spent,
        again=missing,
        lead=hosts.is_lead(),
    )


def _initial_or_restored(
    experiment: Experiment, checkpoints: Checkpoints, batches: pipeline.Batches, begin: finetune.Start | None
) -> tuple[TrainState, int, Spent]:
    """The state, its step, and the time that the run has taken so far."""
    latest = checkpoints.latest()
    if latest is None:
        return finetune.initial_state(experiment, begin), 0, Spent()
    state, position = checkpoints.restore_or_advise(experiment.abstract, latest)
    batches.set_state(position)
    meta = checkpoints.meta(latest)
    frozen = experiment.frozen_sha256()
    if meta.get("frozen_sha256", frozen) != frozen:
        raise UserError(
            f"the frozen networks of this run had hashes {meta['frozen_sha256']}, and those that the config names have "
            f"{frozen}; give the same weights"
        )
    return state, latest, Spent.of_meta(meta)


def _announce(experiment: Experiment, reporter: Reporter, start: int, changed: dict[str, str]) -> None:
    params = experiment.abstract.params
    logging.info("\n%s", parameter_overview.get_parameter_overview(params, include_stats=False))
    count = sum(leaf.size for leaf in jax.tree.leaves(params))
    mesh = " x ".join(f"{axis} {size}" for axis, size in experiment.mesh.shape.items())
    device = jax.devices()[0].device_kind
    if changed:
        reporter.say(f"continuing with {'; '.join(changed.values())}")
    verb = f"resuming at step {start}" if start else "starting"
    if experiment.caveat:
        reporter.say(experiment.caveat)
    data = experiment.source.describe()
    reporter.say(f"{verb}: {experiment.name}, {count:,} parameters, mesh {mesh} of {device}; {data}")


@dataclass
class Run:
    """The objects that the loop uses."""

    experiment: Experiment
    checkpoints: Checkpoints
    batches: pipeline.Batches
    evaluations: Evaluations
    reporter: Reporter
    stop: StopRequest
    profile: Profile
    watchdog: Watchdog
    workdir: Path

    def __post_init__(self) -> None:
        self._pending = Pending()
        self._saved, self._saved_at = self.checkpoints.latest(), time.monotonic()
        self._meta = _meta(self.experiment)

    def loop(self, state: TrainState, start: int, missing: list[str], keep_start: bool) -> None:
        """Train from step `start` to the last, or until the run is asked to stop.

        missing: evaluators to make up for at `start`. keep_start: whether the first state is saved, so that a run that
        started from other parameters does not depend on them any more.
        """
        schedule = self.experiment.schedule
        total = schedule.total_steps
        try:
            with jax.transfer_guard("disallow"):
                if keep_start:
                    self._save(state, start)
                self._evaluate(state, start, missing)
                for step in range(start, total):
                    if step > start:
                        self._between(state, step)
                    if self.stop.asked or self.checkpoints.reached_preemption(step):
                        self._stop(state, step)
                    self.checkpoints.check_for_errors()
                    self.watchdog.pause()
                    self.profile.before(step, state)
                    if step == start:
                        self.reporter.say("compiling the step (once); the first one waits for it")
                    else:
                        self.watchdog.restart()
                    state, self._pending = advance(
                        self.experiment, state, step, self.batches, self._pending, self.reporter
                    )
                if start < total:
                    self._snapshot(state, total)
                    self._save(state, total)
                    self._evaluate(state, total, self.evaluations.due(total))
            self.checkpoints.wait()
        except NonFiniteError as error:
            self._pause()
            self.checkpoints.wait()
            last = self.checkpoints.latest()
            kept = f"the last checkpoint is step {last}" if last is not None else "no checkpoint was written"
            raise NonFiniteError(f"{error}; {kept}; nothing was written after it; {self._explain()}") from error
        self.reporter.say(f"finished: step {total} of {total} in {self.workdir}")
        if caveat := ema.initial_share_caveat(self.experiment.averages.ema, total):
            self.reporter.say(caveat)

    def _between(self, state: TrainState, step: int) -> None:
        """Snapshot, save and evaluate as due before a step."""
        schedule = self.experiment.schedule
        if is_due(step, schedule.snapshot_every):
            self._snapshot(state, step)
        if is_due(step, schedule.checkpoint_every) or self._minutes_passed(step):
            self._save(state, step)
        self._evaluate(state, step, self.evaluations.due(step))

    def _minutes_passed(self, step: int) -> bool:
        """Whether the last checkpoint is old enough by the lead's clock, read only at steps that report."""
        schedule = self.experiment.schedule
        if not schedule.checkpoint_minutes or not is_due(step, schedule.report_every):
            return False
        passed = time.monotonic() - self._saved_at >= 60 * schedule.checkpoint_minutes
        with jax.transfer_guard("allow"):
            return bool(hosts.leads(np.array(passed)))

    def _pause(self) -> None:
        """What follows is no part of a step."""
        self.reporter.pause()
        self.watchdog.pause()

    def _explain(self) -> str:
        squares = {
            name: jax.device_get(value) for name, value in (self._pending.values or {}).items() if name in SQUARED_NORMS
        }
        params = self.experiment.abstract.params
        try:
            return nonfinite.explain(self.workdir, self._pending.step, squares, params, self.batches)
        except Exception as error:  # reading the examples again can fail in any way, and must not hide the fault
            return f"what was not finite could not be found out: {' '.join(str(error).split())[:200]}"

    def _snapshot(self, state: TrainState, step: int) -> None:
        if self.checkpoints.snapshots:
            self._pending.flush(self.reporter)
            self._pause()
            meta = {"sigma_rel": dict(self.experiment.sigma_rel), **self._progress(step)}
            self.checkpoints.snapshots.save(state.power_emas, step, meta)

    def _save(self, state: TrainState, step: int) -> None:
        self._pending.flush(self.reporter)
        if step != self._saved:
            self._pause()
            meta = {**self._meta, **self._progress(step), **self.reporter.spent().to_meta()}
            self.checkpoints.save(state, step, self.batches.get_state(), meta)
            self._saved, self._saved_at = step, time.monotonic()

    def _evaluate(self, state: TrainState, step: int, names: list[str]) -> None:
        if names:
            self._pending.flush(self.reporter)
            self._pause()
            with jax.transfer_guard("allow"):
                self.evaluations.run(names, step, state.ema, self.reporter)

    def _stop(self, state: TrainState, step: int) -> NoReturn:
        self._save(state, step)
        self.checkpoints.wait()
        line = f"{self.stop.reason}: checkpoint written, stopped at step {step}; the same command resumes"
        raise Interrupted(self.stop.number, line if hosts.is_lead() else "")

    def _progress(self, step: int) -> dict[str, int]:
        return {"step": step, "images_seen": step * self.experiment.batch_size}


def advance(
    experiment: Experiment,
    state: TrainState,
    step: int,
    batches: pipeline.Batches,
    pending: Pending,
    reporter: Reporter,
) -> tuple[TrainState, Pending]:
    """Draw a batch, dispatch the step on it, and only then report the step before."""
    asked = time.perf_counter()
    batch = next(batches)
    waited = time.perf_counter() - asked
    state, metrics = experiment.step(state, experiment.frozen, experiment.put(batch), experiment.key)
    pending.flush(reporter)
    return state, Pending(step + 1, metrics, asked, waited)


def is_due(step: int, every: int) -> bool:
    return every > 0 and step % every == 0


def _meta(experiment: Experiment) -> dict[str, Any]:
    """The `meta` item of a checkpoint: versions, mesh and hashes."""
    return {
        "config_sha256": experiment.config_sha256(),
        "frozen_sha256": experiment.frozen_sha256(),
        "mesh": dict(experiment.mesh.shape),
        "processes": jax.process_count(),
        "classes": list(experiment.source.classes),
        "versions": {"diffjax": diffjax.__version__, "jax": jax.__version__, "python": platform.python_version()},
    }
