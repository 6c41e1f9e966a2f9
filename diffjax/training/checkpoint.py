"""Checkpoints and snapshots of a run folder, written by Orbax.

    checkpoints/<step>/   items state, ema, tracks (where the run has them), data and meta: what the run goes on from
    snapshots/<step>/     items tracks and meta: the power-function averages alone, from which others are made

Saving is asynchronous and atomic: a step is written under a temporary name and renamed when complete, so a killed
process leaves the earlier steps as they were. A checkpoint is begun only when the snapshots before it are complete, so
that a run which goes on from it lacks none. Nothing here ever deletes a step but the retention rule of checkpoints;
snapshots stay for good.
"""

import contextlib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
from absl import logging
from orbax.checkpoint import checkpoint_managers

from diffjax.errors import UserError, refused_write
from diffjax.training.state import TrainState


def latest_step(workdir: Path) -> int | None:
    """The latest complete checkpoint of a run folder, None when there is none yet."""
    if not (workdir / "checkpoints").is_dir():
        return None
    with contextlib.closing(Checkpoints(workdir, read_only=True)) as checkpoints:
        return checkpoints.latest()


class Steps:
    """A folder of steps, each with the same items: what checkpoints and snapshots share."""

    def __init__(self, directory: Path, noun: str, items: tuple[str, ...], read_only: bool, policy: Any = None):
        """`noun` is what a step is called in messages; `policy` says which steps are kept (None: all)."""
        self.directory = directory.absolute()
        options = ocp.CheckpointManagerOptions(
            preservation_policy=policy,
            create=not read_only,
            cleanup_tmp_directories=not read_only,  # what killed saves left behind
            read_only=read_only,
            multiprocessing_options=ocp.options.MultiprocessingOptions(barrier_sync_key_prefix=noun),
        )
        self._manager = ocp.CheckpointManager(self.directory, options=options, item_names=items)
        self._noun = noun
        self._saving: int | None = None

    def steps(self) -> list[int]:
        """Complete steps, ascending."""
        return sorted(self._manager.all_steps())

    def latest(self) -> int | None:
        return max(self.steps(), default=None)

    def restore_arrays(self, item: str, step: int) -> Any:
        """One item as nested containers of numpy arrays, whatever mesh it was saved from."""
        return self._read(item, step)

    def meta(self, step: int) -> dict[str, Any]:
        return self._restore(step, {"meta": ocp.args.JsonRestore()})["meta"]

    def check_for_errors(self) -> None:
        """Raise what went wrong in a save that runs in the background."""
        with self._writing():
            self._manager.check_for_errors()

    def wait(self) -> None:
        """Until the save under way is complete."""
        with self._writing():
            self._manager.wait_until_finished()

    def close(self) -> None:
        with self._writing():
            self._manager.close()

    def _save(self, step: int, items: Mapping[str, Any]) -> None:
        """Start writing; returns as soon as the values have left the devices."""
        with self._writing():
            self._manager.wait_until_finished()
            self._saving = step
            self._manager.save(step, args=ocp.args.Composite(**items), force=True)

    def _read(self, item: str, step: int, shapes: Any = None, arguments: Any = None) -> Any:
        folder = self.directory / str(step) / item
        try:
            with ocp.PyTreeCheckpointer() as reader:
                if shapes is None:
                    shapes = reader.metadata(folder).item_metadata.tree
                    arguments = jax.tree.map(lambda leaf: ocp.RestoreArgs(restore_type=np.ndarray), shapes)
                return reader.restore(folder, item=shapes, restore_args=arguments, partial_restore=True)
        except Exception as error:
            raise self._unreadable(step, error) from error

    def _restore(self, step: int, items: dict[str, Any]) -> Any:
        try:
            self._check_items(step, items)
            return self._manager.restore(step, args=ocp.args.Composite(**items))
        except Exception as error:
            raise self._unreadable(step, error) from error

    def _unreadable(self, step: int, error: Exception) -> UserError:
        if isinstance(error, MemoryError) or "RESOURCE_EXHAUSTED" in str(error):
            raise error  # nothing is wrong with the checkpoint
        logging.debug("restoring step %d failed", step, exc_info=True)
        reason = " ".join(str(error).split())[:300]
        return UserError(f"{self._noun} {self.directory / str(step)} cannot be read: {reason}")

    def _check_items(self, step: int, items: Mapping[str, Any]) -> None:
        folder = self.directory / str(step)
        if missing := [item for item in items if not (folder / item).is_dir()]:
            raise ValueError(f"item {', '.join(missing)} is missing")

    @contextlib.contextmanager
    def _writing(self) -> Iterator[None]:
        """A write that the system refuses is a UserError that says what is left to go on from."""
        try:
            yield
        except Exception as error:
            if not (reason := refused_write(error)):
                raise
            self._manager.reload()
            last = self.latest()
            raise UserError(
                f"cannot write {self._noun} {self._saving} in {self.directory}: {reason}; the last complete "
                f"{self._noun} is {'none' if last is None else last}; make room and run the same command again"
            ) from error


class Snapshots(Steps):
    """The snapshots of one run folder."""

    def __init__(self, workdir: Path, *, read_only: bool = False):
        super().__init__(workdir / "snapshots", "snapshot", ("tracks", "meta"), read_only)

    def save(self, tracks: Mapping[str, Any], step: int, meta: Mapping[str, Any]) -> None:
        """Start writing `step`; one that is there already is the same, from before the run was interrupted."""
        if step not in self.steps():
            self._save(step, {"tracks": ocp.args.StandardSave(tracks), "meta": ocp.args.JsonSave(dict(meta))})

    def refuse_after(self, step: int) -> None:
        """Raise UserError for snapshots of a future that will not be: the run goes on from `step` another way."""
        if later := [s for s in self.steps() if s > step]:
            aside = self.directory.parent / "snapshots-aside"
            moved = " ".join(str(self.directory / str(s)) for s in later)
            raise UserError(
                f"{self.directory} holds snapshots {later} from before the config changed, beyond the checkpoint of "
                f"step {step}; to go on: mkdir {aside} && mv {moved} {aside}, and run the same command again; "
                "nothing was deleted"
            )


class Checkpoints(Steps):
    """The checkpoints of one run folder, and the snapshots that the run writes beside them."""

    def __init__(
        self,
        workdir: Path,
        *,
        keep: int = 1,
        keep_every_steps: int = 0,
        snapshots: Snapshots | None = None,
        read_only: bool = False,
    ):
        """Keeps the latest `keep` steps, and every multiple of `keep_every_steps` (0: none) for good.

        Args:
            snapshots: those of the run, if it makes any: waited for, checked and closed with the checkpoints.
            read_only: never write, make or delete anything.
        """
        policies: list[Any] = [checkpoint_managers.LatestN(keep)]
        if keep_every_steps:
            policies.append(checkpoint_managers.EveryNSteps(keep_every_steps))
        policy = checkpoint_managers.AnyPreservationPolicy(policies)
        super().__init__(
            workdir / "checkpoints", "checkpoint", ("state", "ema", "tracks", "data", "meta"), read_only, policy
        )
        self.snapshots = snapshots

    def save(self, state: TrainState, step: int, data: Mapping[str, Any], meta: Mapping[str, Any]) -> None:
        """Start writing `step` when the snapshots are complete; returns as soon as the values have left the devices."""
        if self.snapshots:
            self.snapshots.wait()
        arrays = {"params": state.params, "opt_state": state.opt_state, "step": state.step}
        items = {"state": ocp.args.StandardSave(arrays), "ema": ocp.args.StandardSave(state.ema)}
        if state.tracks:
            items["tracks"] = ocp.args.StandardSave(state.tracks)
        json = {"data": ocp.args.JsonSave(dict(data)), "meta": ocp.args.JsonSave(dict(meta))}
        self._save(step, items | json)

    def check_for_errors(self) -> None:
        if self.snapshots:
            self.snapshots.check_for_errors()
        super().check_for_errors()

    def wait(self) -> None:
        if self.snapshots:
            self.snapshots.wait()
        super().wait()

    def close(self) -> None:
        if self.snapshots:
            self.snapshots.close()
        super().close()

    def restore(self, abstract: TrainState, step: int) -> tuple[TrainState, dict[str, Any]]:
        """State and data position at `step`, laid out as `abstract` says, whatever mesh they were saved from."""
        arrays = {"params": abstract.params, "opt_state": abstract.opt_state, "step": abstract.step}
        items = {"state": ocp.args.StandardRestore(arrays), "ema": ocp.args.StandardRestore(abstract.ema)}
        if abstract.tracks:
            items["tracks"] = ocp.args.StandardRestore(abstract.tracks)
        restored = self._restore(step, {**items, "data": ocp.args.JsonRestore()})
        state = TrainState(ema=restored["ema"], tracks=restored.get("tracks") or {}, **restored["state"])
        return state, restored["data"]

    def restore_or_advise(self, abstract: TrainState, step: int) -> tuple[TrainState, dict[str, Any]]:
        """`restore`; a step that cannot be read is a UserError that names the last good one and how to use it."""
        self._check_tracks(abstract, step)
        try:
            self._check_incomplete(step)
            return self.restore(abstract, step)
        except UserError as error:
            earlier = [s for s in reversed(self.steps()) if s < max(self._step_folders())]
            good = next((s for s in earlier if self._readable(abstract, s)), None)
            raise UserError(f"{error}; {self._advice(good)}") from error

    def restore_item(self, item: str, step: int, abstract: Any) -> Any:
        """One item alone, for instance the average without the optimizer's state."""
        return self._restore(step, {item: ocp.args.StandardRestore(abstract)})[item]

    def data_fingerprint(self, step: int) -> dict[str, Any]:
        """What the run was trained on, and in which order: `fingerprint` of the data position (data/pipeline.py)."""
        return self._restore(step, {"data": ocp.args.JsonRestore()})["data"]["fingerprint"]

    def restore_params(self, step: int, abstract: Any) -> Any:
        """The parameters out of the state, without the optimizer's."""
        shapes = {"params": abstract}
        arguments = ocp.checkpoint_utils.construct_restore_args(shapes)
        return self._read("state", step, shapes, arguments)["params"]

    def has(self, item: str, step: int) -> bool:
        return (self.directory / str(step) / item).is_dir()

    def _check_tracks(self, abstract: TrainState, step: int) -> None:
        """Raise UserError when the run was one with other tracks or none: they cannot begin in its middle."""
        if not abstract.tracks:
            return
        stored = self._track_names(step)
        if stored is not None and stored != sorted(abstract.tracks):
            raise UserError(
                f"checkpoint {self.directory / str(step)} holds {', '.join(stored) or 'no tracks'}, but ema.tracks "
                f"asks for {', '.join(abstract.tracks)}: tracks begin with their run; use another --workdir, or leave "
                "ema.tracks as it was"
            )

    def _track_names(self, step: int) -> list[str] | None:
        """None when they cannot be read, which the restore reports."""
        if not any(self.has("tracks", other) for other in self.steps()):
            return []
        try:
            with ocp.PyTreeCheckpointer() as reader:
                return sorted(reader.metadata(self.directory / str(step) / "tracks").item_metadata.tree)
        except Exception:
            return None

    def _step_folders(self) -> list[int]:
        return sorted(int(path.name) for path in self.directory.iterdir() if path.name.isdecimal())

    def _check_incomplete(self, latest: int) -> None:
        """Raise UserError for a later step that is there under its final name but not complete: someone damaged it."""
        if incomplete := [step for step in self._step_folders() if step > latest]:
            raise UserError(f"checkpoint {self.directory / str(incomplete[-1])} is not complete")

    def _readable(self, abstract: TrainState, step: int) -> bool:
        try:
            self.restore(abstract, step)
        except UserError:
            return False
        return True

    def _advice(self, good: int | None) -> str:
        if good is None:
            return "no other step can be read; nothing was deleted"
        later = " ".join(str(self.directory / str(step)) for step in self._step_folders() if step > good)
        aside = self.directory.parent / "damaged"
        return (
            f"the last good step is {good}; to go on from it: mkdir {aside} && mv {later} {aside}, and run the same "
            "command again; nothing was deleted"
        )

    def reached_preemption(self, step: int) -> bool:
        """True on every process at the same step, once one of them was told to stop."""
        return self._manager.reached_preemption(step)
