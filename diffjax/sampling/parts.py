"""Write many samples part by part: resumable after a kill, in bounded memory.

While `samples.npz` is being made there is a folder `samples.npz.parts` beside it:

    request.json                      what is being sampled (the identity); parts of another identity are not taken
    part-<first>-<count>.npy          rows number first, ..., first + count - 1

Each file appears whole under its name. The steps of a command on one or several hosts that share the folder:

    with opened(out, identity, num) as (parts, missing): every host
        parts.write(own, rows)                           batch by batch; own = its part of the missing numbers
        wait until all have written
        parts.finish({"arr_1": labels}, description)     host 0

`finish` writes the npz, the json and the png, and removes the folder last. A process killed at any
point loses only what it had not yet written: the same command ends with the same bytes, whatever the parts were.
"""

import contextlib
import itertools
import json
import os
import shutil
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import numpy as np

from diffjax import files
from diffjax.errors import UserError
from diffjax.evaluation.pixels import to_rgb
from diffjax.parallel import hosts
from diffjax.sampling import samples
from diffjax.trees import differing

REQUEST = "request.json"
BLOCK_BYTES = 4 << 20  # read at a time, or one row where a row is larger


@dataclass(frozen=True)
class Part:
    """A complete part file, of rows first, ..., stop - 1."""

    first: int
    stop: int
    path: Path
    offset: int  # of the rows in the file, bytes
    row: tuple[int, ...]  # shape of one row
    dtype: np.dtype


@contextlib.contextmanager
def opened(out: Path, identity: Mapping[str, Any], num: int) -> Iterator[tuple["Parts", np.ndarray]]:
    """The folder of parts of the file `out`, and the numbers that it lacks; all processes of a job call it.

    The lead holds the folder against other commands. The numbers are those that the lead finds: the processes list the
    folder at different times. For arguments and errors see `open_parts`.
    """
    with contextlib.ExitStack() as stack:
        with hosts.together():
            if hosts.is_lead():
                stack.enter_context(files.only_writer(make_folder(out)))
            parts = open_parts(out, identity, num, jax.process_index())
        absent = hosts.leads(np.isin(np.arange(num), parts.missing()))
        yield parts, np.flatnonzero(absent)


def open_parts(out: Path, identity: Mapping[str, Any], num: int, process: int = 0) -> "Parts":
    """Make or reopen the folder of parts of the file `out`.

    Args:
        out: the samples file to be, .npz; its folder exists.
        identity: json-able; says what row i is. Rows of an equal identity are taken over, also for another `num`.
        num: how many rows.
        process: number of this process among those that write to the folder. What it left unfinished is removed, so
            unique among the running processes.

    Raises:
        UserError: the folder holds rows of another identity, or is no such folder.
    """
    if out.suffix != ".npz" or num < 1:
        raise ValueError(f"{num} rows in {out}; expected at least one, in a file that ends in .npz")
    parts = Parts(out, num, process)
    if process == 0:
        if parts.removed.exists():
            shutil.rmtree(parts.removed)
        for name in (out.name, *(out.with_suffix(suffix).name for suffix in (".json", ".png"))):
            files.remove_temporaries(out.parent, parts.owner, name)
    make_folder(out)
    files.remove_temporaries(parts.folder, parts.owner)
    request = parts.folder / REQUEST
    if request.exists() or any(parts.folder.glob("part-*.npy")):
        _check_request(request, identity)
    else:
        files.write_json(request, identity, parts.owner)
    return parts


def folder_of(out: Path) -> Path:
    """The folder of parts of the file `out`, which is there while the file is being made."""
    return out.with_name(f"{out.name}.parts")


def make_folder(out: Path) -> Path:
    """The folder of parts of the file `out`, made where it is not there."""
    folder = folder_of(out)
    try:
        folder.mkdir(exist_ok=True)
    except OSError as error:
        raise UserError(f"{folder} cannot be made: {error.strerror}; choose another --out") from error
    return folder


@dataclass(frozen=True)
class Parts:
    """The folder of parts of one samples file; made by `open_parts`."""

    out: Path
    num: int
    process: int

    @property
    def folder(self) -> Path:
        return folder_of(self.out)

    @property
    def removed(self) -> Path:
        """The name of the folder while it is being removed."""
        return self.out.with_name(f"{self.out.name}.parts.removed")

    @property
    def owner(self) -> str:
        """In the names of this process's temporary files."""
        return f"p{self.process}"

    def missing(self) -> np.ndarray:
        """The numbers in 0, ..., num - 1 that no complete part holds, ascending, int64."""
        return _absent(self._complete(), 0, self.num)

    def write(self, numbers: np.ndarray, rows: np.ndarray) -> None:
        """Write rows, one per number, as one part for each run of consecutive numbers.

        Args:
            numbers: integers [n], ascending, in 0, ..., num - 1.
            rows: [n, ...], booleans, integers or floats; all rows of a folder are of one shape and dtype.

        Raises:
            UserError: the folder was removed meanwhile.
        """
        numbers, rows = np.asarray(numbers), np.asarray(rows)
        steps = np.diff(numbers)
        if numbers.shape != rows.shape[:1] or (steps < 1).any():
            raise ValueError(f"{numbers.shape} numbers for rows {rows.shape}; expected one per row, ascending")
        if len(numbers) and (numbers[0] < 0 or numbers[-1] >= self.num):
            raise ValueError(f"numbers from {numbers[0]} to {numbers[-1]}; valid: 0 to {self.num - 1}")
        bounds = [0, *(np.flatnonzero(steps > 1) + 1), len(numbers)]
        for start, stop in itertools.pairwise(bounds):
            if start == stop:
                continue
            path = self.folder / f"part-{numbers[start]:09d}-{stop - start:06d}.npy"
            try:
                with files.atomic(path, self.owner) as file:
                    files.write_npy(file, rows[start:stop])
            except FileNotFoundError as error:
                raise UserError(f"{self.folder} was changed by another command; give each its own --out") from error

    def rows(self, start: int = 0, stop: int | None = None) -> Iterator[np.ndarray]:
        """Yields rows start, ..., stop - 1 in order, in blocks of at most BLOCK_BYTES (of one row where that is more).

        Raises:
            UserError: some of them are missing, or rows of different kinds lie in the folder.
        """
        stop = self.num if stop is None else stop
        complete = self._complete()
        if len(absent := _absent(complete, start, stop)):
            raise UserError(
                f"{self.folder} lacks {len(absent)} of {stop - start} rows, the first of them number {absent[0]}; "
                "with several hosts --out must be in a folder they share; the same command again makes them"
            )
        position = start
        for part in complete:
            end = min(part.stop, stop)
            if end <= position:
                continue
            if (part.row, part.dtype) != (complete[0].row, complete[0].dtype):
                raise UserError(f"{part.path} holds other rows than {complete[0].path.name}; remove {self.folder}")
            yield from _blocks(part, position - part.first, end - part.first)
            position = end

    def assemble(self, arrays: Mapping[str, np.ndarray], *, raw: bool = False) -> None:
        """Write the npz: arr_0 [num, ...] and the small `arrays`, one row per number each.

        Args:
            raw: write the rows as they are; otherwise they are pictures uint8 [h, w, 1 or 3], and grey is repeated.

        Raises:
            UserError: rows are missing, or are not pictures where pictures are wanted.
        """
        files.write_npz(self.out, {"arr_0": self._all_rows(arrays, raw), **arrays}, self.owner)

    def _all_rows(self, arrays: Mapping[str, np.ndarray], raw: bool) -> files.Blocks:
        """arr_0, read while it is written; see `assemble`."""
        if "arr_0" in arrays or any(array.shape[:1] != (self.num,) for array in arrays.values()):
            shapes = {name: array.shape for name, array in arrays.items()}
            raise ValueError(f"arrays {shapes}; expected one row for each of {self.num}, and arr_0 for the rows alone")
        blocks = self.rows()
        first = next(blocks)
        if not raw and first.dtype != np.uint8:
            raise UserError(f"{self.folder} holds {first.dtype} rows, not pictures of uint8")
        blocks = itertools.chain([first], blocks)
        pieces = blocks if raw else map(to_rgb, blocks)
        row_shape = first.shape[1:] if raw else to_rgb(first[:1]).shape[1:]
        return files.Blocks((self.num, *row_shape), first.dtype, pieces)

    def finish(
        self,
        arrays: Mapping[str, np.ndarray],
        description: Mapping[str, Any],
        *,
        raw: bool = False,
        classes: samples.Classes | None = None,
    ) -> None:
        """Write the npz (see `assemble`), the json and, for pictures, the png of the first; then remove the folder.

        Args:
            description: json-able, how the rows were made; the hash of the npz is stored with it.
            classes: what the columns of the png stand for, see `samples.grid`.
        """
        if raw:
            self.assemble(arrays, raw=True)
            files.write_protocol(self.out, description, self.owner)
        else:
            more = dict(arrays)
            samples.write_samples(
                self.out,
                self._all_rows(arrays, raw=False),
                more.pop("arr_1"),
                description,
                more=more,
                shown=np.concatenate(list(self.rows(0, min(self.num, samples.GRID_IMAGES)))),
                classes=classes,
                owner=self.owner,
            )
        self.remove()

    def remove(self) -> None:
        """Remove the folder; renamed first, so that half a folder is never taken for one to continue with."""
        os.replace(self.folder, self.removed)
        shutil.rmtree(self.removed)

    def _complete(self) -> list[Part]:
        """The complete parts, by their first number; those that hold more rows before others."""
        found = (_inspect(path) for path in self.folder.glob("part-*.npy"))
        return sorted((part for part in found if part), key=lambda part: (part.first, -part.stop))


def _check_request(request: Path, identity: Mapping[str, Any]) -> None:
    """UserError unless the stored request is that of `identity`."""
    advice = f"remove {request.parent} or choose another --out"
    try:
        found = differing(json.loads(request.read_text()), identity)
    except (ValueError, AttributeError, FileNotFoundError) as error:
        raise UserError(f"{request} is missing or damaged; {advice}") from error
    if found:
        raise UserError(f"{request.parent} holds parts of other samples: {', '.join(found)}; {advice}")


def _absent(complete: list[Part], start: int, stop: int) -> np.ndarray:
    """The numbers in start, ..., stop - 1 that none of the parts holds, ascending."""
    absent = np.ones(stop, bool)
    for part in complete:
        absent[part.first : part.stop] = False
    return start + np.flatnonzero(absent[start:])


def _inspect(path: Path) -> Part | None:
    """The part in a file; None when the file is damaged or has gone."""
    try:
        first, count = map(int, path.stem.removeprefix("part-").split("-"))
        with path.open("rb") as file:
            if np.lib.format.read_magic(file) != (1, 0):
                return None
            shape, fortran, dtype = np.lib.format.read_array_header_1_0(file)
            offset = file.tell()
            size = os.fstat(file.fileno()).st_size
    except FileNotFoundError:
        return None
    except OSError:
        raise
    except Exception:  # a damaged header can break its reader in any way
        return None
    part = Part(first, first + count, path, offset, shape[1:], dtype)
    expected = offset + int(np.prod(shape, dtype=np.int64)) * dtype.itemsize
    whole = not fortran and dtype.kind in files.NUMBERS and shape[:1] == (count,) and size == expected
    return part if whole else None


def _blocks(part: Part, start: int, stop: int) -> Iterator[np.ndarray]:
    """Yields rows start, ..., stop - 1 of a part in pieces of about BLOCK_BYTES."""
    row_bytes = int(np.prod(part.row, dtype=np.int64)) * part.dtype.itemsize
    step = max(1, BLOCK_BYTES // max(1, row_bytes))
    with part.path.open("rb") as file:
        file.seek(part.offset + start * row_bytes)
        for position in range(start, stop, step):
            block = np.empty((min(step, stop - position), *part.row), part.dtype)
            if file.readinto(block.data) != block.nbytes:
                raise UserError(f"{part.path} was changed while it was read; run the same command again")
            yield block
