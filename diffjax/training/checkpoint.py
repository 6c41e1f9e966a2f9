"""Checkpoints and snapshots of a run folder.

    checkpoints/<step>/   items state, ema, tracks (where the run has them), data and meta: what the run resumes from
    snapshots/<step>/     items tracks and meta: the power-function EMAs only, from which others are made

Saving is asynchronous and atomic: a step is written under a temporary name and renamed when complete, so a killed
process leaves the earlier steps as they were. A checkpoint is begun only when the snapshots before it are complete, so
that a run which resumes from it lacks none. Nothing here ever deletes a step but the retention rule of checkpoints;
snapshots stay for good.
"""

from collections.abc import Callable, Collection, Mapping
from pathlib import Path
from typing import Any

from diffjax.archive import Archive, Damaged, stored_steps
from diffjax.errors import UserError
from diffjax.training.state import TrainState

POWER_EMAS = "tracks"  # the item of the power-function EMAs, as run folders of all versions name it


def latest_step(workdir: Path) -> int | None:
    """The latest complete checkpoint of a run folder; None before the first. Waits for no other process."""
    return max(stored_steps(workdir / "checkpoints"), default=None)


class Snapshots(Archive):
    """The snapshots of one run folder."""

    def __init__(self, workdir: Path, *, read_only: bool = False):
        super().__init__(workdir / "snapshots", "snapshot", (POWER_EMAS, "meta"), read_only=read_only)

    def save(self, power_emas: Mapping[str, Any], step: int, meta: Mapping[str, Any]) -> None:
        """Start writing `step`; one that is there already is the same, from before the run was interrupted."""
        if step not in self.steps():
            self.save_items(step, {POWER_EMAS: power_emas}, {"meta": meta})

    def refuse_after(self, step: int) -> None:
        """Raise UserError for snapshots beyond `step`, from which the run continues with other values."""
        if later := [s for s in self.steps() if s > step]:
            aside = self.directory.parent / "snapshots-aside"
            moved = " ".join(str(self.directory / str(s)) for s in later)
            raise UserError(
                f"{self.directory} holds snapshots {later} from before the config changed, beyond the checkpoint of "
                f"step {step}; to go on: mkdir {aside} && mv {moved} {aside}, and run the same command again; "
                "nothing was deleted"
            )


class Checkpoints(Archive):
    """The checkpoints of one run folder, and the snapshots that the run writes beside them."""

    def __init__(
        self,
        workdir: Path,
        *,
        keep: int = 1,
        keep_every_steps: int = 0,
        keep_also: Callable[[Collection[int]], Collection[int]] | None = None,
        snapshots: Snapshots | None = None,
        read_only: bool = False,
    ):
        """Keeps the latest `keep` steps, and every multiple of `keep_every_steps` (0: none) for good.

        Args:
            keep_also: which of the steps that are there stay besides, asked at every save.
            snapshots: those of the run, if it makes any: waited for, checked and closed with the checkpoints.
            read_only: never write, make or delete anything.
        """
        super().__init__(
            workdir / "checkpoints",
            "checkpoint",
            ("state", "ema", POWER_EMAS, "data", "meta"),
            keep=keep,
            keep_every_steps=keep_every_steps,
            keep_also=keep_also,
            read_only=read_only,
        )
        self.snapshots = snapshots

    def save(self, state: TrainState, step: int, data: Mapping[str, Any], meta: Mapping[str, Any]) -> None:
        """Start writing `step` when the snapshots are complete; returns as soon as the values have left the devices."""
        if self.snapshots:
            self.snapshots.wait()
        self.save_items(step, _items(state), {"data": data, "meta": meta})

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
        data = self.restore_json("data", step)
        restored = self.restore_items(step, _items(abstract))
        state = TrainState(ema=restored["ema"], power_emas=restored.get(POWER_EMAS) or {}, **restored["state"])
        return state, data

    def restore_or_advise(self, abstract: TrainState, step: int) -> tuple[TrainState, dict[str, Any]]:
        """`restore`; a step that cannot be read is a UserError that names the last good one and how to use it."""
        try:
            self._check_incomplete(step)
            return self.restore(abstract, step)
        except Damaged as error:
            earlier = [s for s in reversed(self.steps()) if s < max(self._step_folders())]
            good = next((s for s in earlier if self._readable(abstract, s)), None)
            raise Damaged(f"{error}; {self._advice(good)}") from error

    def restore_item(self, item: str, step: int, abstract: Any) -> Any:
        """Restore one item, for instance the average without the optimizer's state."""
        return self.restore_items(step, {item: abstract})[item]

    def data_fingerprint(self, step: int) -> dict[str, Any]:
        """Identity of the training data and their order: `fingerprint` of the data position (data/pipeline.py)."""
        return self.restore_json("data", step)["fingerprint"]

    def restore_params(self, step: int, abstract: Any) -> Any:
        """The parameters out of the state, without the optimizer's."""
        return self.restore_part("state", step, {"params": abstract})["params"]

    def _step_folders(self) -> list[int]:
        return sorted(int(path.name) for path in self.directory.iterdir() if path.name.isdecimal())

    def _check_incomplete(self, latest: int) -> None:
        """Raise Damaged for a later step that is there under its final name but not complete: someone damaged it."""
        if incomplete := [step for step in self._step_folders() if step > latest]:
            raise Damaged(f"checkpoint {self.directory / str(incomplete[-1])} is not complete")

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
            f"the last good step is {good}; to resume from it: mkdir {aside} && mv {later} {aside}, and run the same "
            "command again; nothing was deleted"
        )


def _items(state: TrainState) -> dict[str, Any]:
    """The trees of a state, or of its shapes, by the item that keeps them."""
    arrays = {"params": state.params, "opt_state": state.opt_state, "step": state.step}
    power_emas = {POWER_EMAS: state.power_emas} if state.power_emas else {}
    return {"state": arrays, "ema": state.ema, **power_emas}
