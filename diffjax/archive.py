"""Write and read arrays and json in folders that are complete or absent. The only module that imports Orbax.

`save_arrays` and `load_arrays` keep one tree of arrays; `Archive` keeps steps of several named items. Errors are
classified by type where they arise: `Damaged` for a file that does not hold what was written; a plain `UserError` for
another tree than the one asked for and for a path that the system refuses; anything else is a fault of the program.
"""

import contextlib
import glob
import os
import re
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
from absl import logging
from orbax.checkpoint import checkpoint_managers

from diffjax.errors import REFUSALS, UserError
from diffjax.parallel.rules import key_path

_DAMAGE = (ValueError, KeyError, FileNotFoundError, NotADirectoryError, EOFError)  # of files that are not as written
AT_ONCE = 10**8  # bytes that are written at a time, where no array has more
# Devices that hold copies of an array share in writing it where the slice of each has at least this many bytes. Orbax
# has no such limit, and compiles a program for every slice of every shape: longer than writing small arrays takes.
SLICE = 2**20


def _share_large_arrays_alone() -> None:
    """Replace Orbax's writer of arrays, which warns of it."""
    writer = ocp.type_handlers.ArrayHandler(min_slice_bytes_for_replica_parallel=SLICE)
    verbosity = logging.get_verbosity()
    logging.set_verbosity(logging.ERROR)
    ocp.type_handlers.register_type_handler(jax.Array, writer, override=True)
    logging.set_verbosity(verbosity)


_share_large_arrays_alone()


class Damaged(UserError):
    """Stored data are damaged or missing."""


def stored_steps(folder: Path) -> list[int]:
    """The complete steps of an archive's folder, which have their number as a name; [] where there is no folder.

    `Archive` asks the other processes when it is made; processes that see the folder at different times use this.
    """
    if not folder.is_dir():
        return []
    return sorted(int(entry.name) for entry in folder.iterdir() if entry.name.isdecimal() and entry.is_dir())


def check_place(folder: Path) -> None:
    """Raise UserError for a folder below which nobody can read what Orbax writes: it takes such names for patterns."""
    name = str(folder.absolute())
    if glob.has_magic(name) or "\\" in name:
        raise UserError(f"{name}: arrays cannot be kept below a name with *, ?, [ or a backslash; choose another name")


def save_arrays(folder: Path, tree: Any) -> None:
    """Write a tree of arrays into a new folder."""
    check_place(folder)
    arrays = _on_cpu(tree)
    at_once = max([AT_ONCE, *(1.01 * leaf.nbytes for leaf in jax.tree.leaves(arrays))])
    handler: Any = ocp.PyTreeCheckpointHandler
    with _refusals(f"cannot write {folder}"), ocp.Checkpointer(handler(save_concurrent_gb=at_once / 1e9)) as writer:
        writer.save(folder.absolute(), args=ocp.args.PyTreeSave(arrays))


def _on_cpu(tree: Any) -> Any:
    """The tree with numpy arrays as JAX's, of which Orbax makes no copies; aligned ones become so without one."""
    try:
        cpu = jax.local_devices(backend="cpu")[0]
    except RuntimeError:  # JAX_PLATFORMS names others alone
        return tree
    return jax.tree.map(lambda leaf: jax.device_put(leaf, cpu) if isinstance(leaf, np.ndarray) else leaf, tree)


def load_arrays(folder: Path, abstract: Any = None) -> Any:
    """The tree in a folder: in the shapes, dtypes and shardings of `abstract`, by default as numpy arrays.

    Raises:
        Damaged: the folder does not hold what was written.
    """
    with _readable(folder):
        return _load(folder) if abstract is None else _restore(folder, abstract, as_numpy=False)


def shapes(tree: Any) -> dict[str, tuple[int, ...]]:
    """The shape of every leaf by its path."""
    return {key_path(path): tuple(leaf.shape) for path, leaf in jax.tree_util.tree_leaves_with_path(tree)}


def stored_shapes(folder: Path) -> dict[str, tuple[int, ...]]:
    """The shape of every array in a folder by its path, without reading the arrays."""
    with _readable(folder):
        return shapes(_stored_tree(folder))


def differing(stored: Mapping[str, tuple[int, ...]], wanted: Mapping[str, tuple[int, ...]]) -> str:
    """The paths whose shapes differ from the wanted ones, in words; "" where none does."""
    paths = [path for path in sorted({*stored, *wanted}) if stored.get(path) != wanted.get(path)]
    listed = ", ".join(f"{path} {stored.get(path)} not {wanted.get(path)}" for path in paths[:4])
    return f"{listed} and {len(paths) - 4} more" if len(paths) > 4 else listed


def _stored_tree(folder: Path) -> Any:
    """Metadata of the arrays in a folder, without reading the arrays."""
    with ocp.PyTreeCheckpointer() as reader:
        found = reader.metadata(folder.absolute()).item_metadata
    if found is None:
        raise ValueError("the list of its arrays is missing or damaged")
    return found.tree


def _load(folder: Path) -> Any:
    return _restore(folder, _stored_tree(folder), as_numpy=True)


def _restore(folder: Path, tree: Any, as_numpy: bool, partial: bool = False) -> Any:
    arguments = (
        jax.tree.map(lambda leaf: ocp.RestoreArgs(restore_type=np.ndarray), tree)
        if as_numpy
        else ocp.checkpoint_utils.construct_restore_args(tree)
    )
    with ocp.PyTreeCheckpointer() as reader:
        return reader.restore(folder.absolute(), item=tree, restore_args=arguments, partial_restore=partial)


@contextlib.contextmanager
def _readable(what: Any) -> Iterator[None]:
    """Turn read errors into one-line errors; the module docstring lists the types."""
    try:
        yield
    except UserError:
        raise
    except Exception as error:
        logging.debug("reading %s failed", what, exc_info=True)
        absent = isinstance(error, FileNotFoundError | NotADirectoryError)
        if not absent and (reason := _refusal(error)):
            raise UserError(f"{what} cannot be read: {reason}") from error
        # Of an array that it cannot read Orbax says so in a bare Exception.
        if not isinstance(error.__cause__ if type(error) is Exception else error, _DAMAGE):
            raise
        raise Damaged(f"{what} cannot be read: {' '.join(str(error).split())[:300]}") from error


def _refusal(error: Exception) -> str | None:
    """The operating system's reason for refusing a file; None for any other error.

    Errors of the library below Orbax are a ValueError that ends in the number of the system's error.
    """
    number = error.errno if isinstance(error, OSError) else None
    if found := re.search(r"\[os_error_code='(\d+)'", str(error)):
        number = int(found.group(1))
    return os.strerror(number) if number in REFUSALS else None


@contextlib.contextmanager
def _refusals(line: str, advice: Callable[[], str] = str) -> Iterator[None]:
    """A write that the system refuses is a UserError: `line`, the reason and what can be done."""
    try:
        yield
    except UserError:
        raise
    except Exception as error:
        if reason := _refusal(error):
            raise UserError(f"{line}: {reason}{advice()}") from error
        raise


@dataclass(frozen=True)
class _Also:
    """A policy of Orbax: the steps that a function chooses stay."""

    chosen: Callable[[Collection[int]], Collection[int]]

    def should_preserve(self, checkpoints: Sequence[Any], *, context: Any) -> Sequence[bool]:
        steps = [checkpoint.step for checkpoint in checkpoints]
        kept = self.chosen(steps)
        return [step in kept for step in steps]


class Archive:
    """A folder of steps, each with the same named items: trees of arrays, and json.

    Saving is asynchronous: a step is written under a temporary name and renamed when complete.
    """

    def __init__(
        self,
        directory: Path,
        noun: str,
        items: tuple[str, ...],
        *,
        keep: int | None = None,
        keep_every_steps: int = 0,
        keep_also: Callable[[Collection[int]], Collection[int]] | None = None,
        read_only: bool = False,
    ):
        """
        Args:
            noun: what a step is called in messages.
            keep: how many of the latest steps stay; None: all of them. Multiples of `keep_every_steps` stay for good.
            keep_also: which of the steps that are there stay besides, asked at every save.
            read_only: never write, make or delete anything.
        """
        self.directory = directory.absolute()
        if not read_only:
            check_place(self.directory)
        policies: list[Any] = [] if keep is None else [checkpoint_managers.LatestN(keep)]
        if keep is not None and keep_every_steps:
            policies.append(checkpoint_managers.EveryNSteps(keep_every_steps))
        if keep is not None and keep_also:
            policies.append(_Also(keep_also))
        options = ocp.CheckpointManagerOptions(
            preservation_policy=checkpoint_managers.AnyPreservationPolicy(policies) if policies else None,
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

    def has(self, item: str, step: int) -> bool:
        return (self.directory / str(step) / item).is_dir()

    def meta(self, step: int) -> dict[str, Any]:
        """The json item `meta`."""
        return self.restore_json("meta", step)

    def restore_json(self, item: str, step: int) -> dict[str, Any]:
        with _readable(self._named(step)):
            self._check_items(step, [item])
            return self._manager.restore(step, args=ocp.args.Composite(**{item: ocp.args.JsonRestore()}))[item]

    def restore_items(self, step: int, items: Mapping[str, Any]) -> dict[str, Any]:
        """Trees of arrays by item, each in the shapes, dtypes and shardings of the abstract tree that is given."""
        with _readable(self._named(step)):
            self._check_items(step, items)
            for item, abstract in items.items():
                if words := differing(shapes(_stored_tree(self.directory / str(step) / item)), shapes(abstract)):
                    raise UserError(f"{self._named(step)} is of another model or optimizer: {item} has {words}")
            arguments = {item: ocp.args.StandardRestore(abstract) for item, abstract in items.items()}
            return dict(self._manager.restore(step, args=ocp.args.Composite(**arguments)))

    def restore_arrays(self, item: str, step: int) -> Any:
        """One item as nested containers of numpy arrays, whatever mesh it was saved from."""
        with _readable(self._named(step)):
            self._check_items(step, [item])
            return _load(self.directory / str(step) / item)

    def restore_part(self, item: str, step: int, abstract: Any) -> Any:
        """Those arrays of an item that `abstract` has."""
        with _readable(self._named(step)):
            self._check_items(step, [item])
            return _restore(self.directory / str(step) / item, abstract, as_numpy=False, partial=True)

    def reached_preemption(self, step: int) -> bool:
        """True on every process at the same step, once one of them received the signal to stop."""
        return self._manager.reached_preemption(step)

    def check_for_errors(self) -> None:
        """Raise what went wrong in a save that runs in the background."""
        with self._writing():
            self._manager.check_for_errors()

    def wait(self) -> None:
        """Wait until the current save is complete."""
        with self._writing():
            self._manager.wait_until_finished()

    def close(self) -> None:
        with self._writing():
            self._manager.close()

    def save_items(self, step: int, arrays: Mapping[str, Any], json: Mapping[str, Mapping[str, Any]]) -> None:
        """Start writing; returns as soon as the values have left the devices."""
        items = {item: ocp.args.StandardSave(tree) for item, tree in arrays.items()}
        items |= {item: ocp.args.JsonSave(dict(values)) for item, values in json.items()}
        with self._writing():
            self._manager.wait_until_finished()
            self._saving = step
            self._manager.save(step, args=ocp.args.Composite(**items), force=True)

    def _named(self, step: int) -> str:
        return f"{self._noun} {self.directory / str(step)}"

    def _check_items(self, step: int, items: Collection[str]) -> None:
        if missing := [item for item in items if not self.has(item, step)]:
            raise Damaged(f"{self._named(step)} cannot be read: item {', '.join(missing)} is missing")

    def _writing(self) -> contextlib.AbstractContextManager[None]:
        """A write that the system refuses is a UserError that says what is left to resume from."""
        return _refusals(f"cannot write {self._noun} {self._saving} in {self.directory}", self._what_is_left)

    def _what_is_left(self) -> str:
        with contextlib.suppress(OSError):  # the folder itself may be what cannot be read
            self._manager.reload()
        last = self.latest()
        return (
            f"; the last complete {self._noun} is {'none' if last is None else last}; make room or mend the "
            "place, and run the same command again"
        )
