"""Checkpoints of a run folder: `checkpoints/<step>/` with the items state, ema, data and meta, written by Orbax.

Saving is asynchronous and atomic: a step is written under a temporary name and renamed when complete, so a killed
process leaves the earlier steps as they were. Nothing here ever deletes a step but the retention rule.
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

ITEMS = ("state", "ema", "data", "meta")


def latest_step(workdir: Path) -> int | None:
    """The latest complete checkpoint of a run folder, None when there is none yet."""
    if not (workdir / "checkpoints").is_dir():
        return None
    with contextlib.closing(Checkpoints(workdir, read_only=True)) as checkpoints:
        return checkpoints.latest()


class Checkpoints:
    """The checkpoints of one run folder."""

    def __init__(self, workdir: Path, *, keep: int = 1, keep_every_steps: int = 0, read_only: bool = False):
        """Keeps the latest `keep` steps, and every multiple of `keep_every_steps` (0: none) for good.

        Args:
            read_only: never write, make or delete anything.
        """
        self.directory = (workdir / "checkpoints").absolute()
        policies: list[Any] = [checkpoint_managers.LatestN(keep)]
        if keep_every_steps:
            policies.append(checkpoint_managers.EveryNSteps(keep_every_steps))
        options = ocp.CheckpointManagerOptions(
            preservation_policy=checkpoint_managers.AnyPreservationPolicy(policies),
            create=not read_only,
            cleanup_tmp_directories=not read_only,  # what killed saves left behind
            read_only=read_only,
        )
        self._manager = ocp.CheckpointManager(self.directory, options=options, item_names=ITEMS)
        self._saving: int | None = None

    def steps(self) -> list[int]:
        """Complete checkpoints, ascending."""
        return sorted(self._manager.all_steps())

    def latest(self) -> int | None:
        return max(self.steps(), default=None)

    def save(self, state: TrainState, step: int, data: Mapping[str, Any], meta: Mapping[str, Any]) -> None:
        """Start writing `step`; returns as soon as the values have left the devices."""
        arrays = {"params": state.params, "opt_state": state.opt_state, "step": state.step}
        items = ocp.args.Composite(
            state=ocp.args.StandardSave(arrays),
            ema=ocp.args.StandardSave(state.ema),
            data=ocp.args.JsonSave(dict(data)),
            meta=ocp.args.JsonSave(dict(meta)),
        )
        with self._writing():
            self._manager.wait_until_finished()
            self._saving = step
            self._manager.save(step, args=items, force=True)

    def restore(self, abstract: TrainState, step: int) -> tuple[TrainState, dict[str, Any]]:
        """State and data position at `step`, laid out as `abstract` says, whatever mesh they were saved from."""
        arrays = {"params": abstract.params, "opt_state": abstract.opt_state, "step": abstract.step}
        items = {
            "state": ocp.args.StandardRestore(arrays),
            "ema": ocp.args.StandardRestore(abstract.ema),
            "data": ocp.args.JsonRestore(),
        }
        restored = self._restore(step, items)
        state = TrainState(ema=restored["ema"], **restored["state"])
        return state, restored["data"]

    def restore_or_advise(self, abstract: TrainState, step: int) -> tuple[TrainState, dict[str, Any]]:
        """`restore`; a step that cannot be read is a UserError that names the last good one and how to use it."""
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

    def restore_params(self, step: int, abstract: Any) -> Any:
        """The parameters out of the state, without the optimizer's."""
        shapes = {"params": abstract}
        arguments = ocp.checkpoint_utils.construct_restore_args(shapes)
        return self._read("state", step, shapes, arguments)["params"]

    def restore_arrays(self, item: str, step: int) -> Any:
        """One item as nested containers of numpy arrays, whatever mesh it was saved from."""
        return self._read(item, step)

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

    def meta(self, step: int) -> dict[str, Any]:
        return self._restore(step, {"meta": ocp.args.JsonRestore()})["meta"]

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
        return UserError(f"checkpoint {self.directory / str(step)} cannot be read: {reason}")

    def _check_items(self, step: int, items: Mapping[str, Any]) -> None:
        folder = self.directory / str(step)
        if missing := [item for item in items if not (folder / item).is_dir()]:
            raise ValueError(f"item {', '.join(missing)} is missing")

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
                f"cannot write checkpoint {self._saving} in {self.directory}: {reason}; the last complete checkpoint "
                f"is {'none' if last is None else last}; make room and run the same command again"
            ) from error
