"""Atomic file writing, and reading and writing of array files.

A file is written under a temporary name in its own folder, flushed to the disk and renamed: a process killed in
between leaves the file as it was, and a temporary beside it. The name of a temporary, `.<name>.<owner>-<random>.tmp`,
tells whose it is, so that an owner can remove what it left when it was killed.
"""

import contextlib
import errno
import fcntl
import glob
import hashlib
import json
import logging
import os
import platform
import secrets
import zipfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import IO, Any, BinaryIO, NamedTuple

import numpy as np

from diffjax.errors import UserError, writing

CACHE = "DIFFJAX_CACHE"  # of the environment: another folder than the user's cache
LOCK = ".lock"  # in a folder, held by the process that writes there
NO_LABELS = "none"  # what the protocol of a file says of labels that mean nothing
NUMBERS = "biuf"  # kinds of dtype that are written: booleans, integers, floats


def local_path(text: str) -> Path:
    """The path that a user wrote, with ~ for the home folder.

    UserError for an empty one, and for a URL, which would become a local folder of that name.
    """
    if not text:
        raise UserError("valid: a path")
    if "://" in text:
        raise UserError("only local and mounted paths are read and written; mount the bucket")
    try:
        return Path(text).expanduser()
    except RuntimeError as error:  # ~nobody
        raise UserError(f"{error}; write the folder out") from error


def cache_folder() -> Path:
    """Where what can be made or fetched again is kept: DIFFJAX_CACHE, or `diffjax` in the user's cache folder."""
    if own := os.environ.get(CACHE):
        try:
            return local_path(own)
        except UserError as error:
            raise UserError(f"{CACHE}={own}: {error}") from error
    return local_path(os.environ.get("XDG_CACHE_HOME") or "~/.cache") / "diffjax"


@contextlib.contextmanager
def only_writer(folder: Path) -> Iterator[None]:
    """No other process is in here for the same folder: UserError that names the one that is.

    The lock is the system's and ends with the process, however that ends; it holds between processes of one machine,
    and between machines where the file system passes locks on.
    """
    with writing(folder / LOCK):
        file = (folder / LOCK).open("a+")
    with file:
        try:
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            if error.errno in (errno.ENOSYS, errno.ENOTSUP, errno.ENOLCK):
                logging.getLogger("diffjax").info(
                    f"{folder} cannot be locked ({error.strerror}): see to it yourself that one process writes there"
                )
                yield
                return
            if error.errno not in (errno.EACCES, errno.EAGAIN):
                raise UserError(f"{folder / LOCK} cannot be locked: {error.strerror}; choose another place") from error
            file.seek(0)
            other = file.read().strip() or "its name is not known"
            raise UserError(f"another process writes in {folder} ({other}); wait until it ends, or stop it") from error
        file.truncate(0)
        file.write(f"process {os.getpid()} on {platform.node()}\n")
        file.flush()
        yield


@contextlib.contextmanager
def atomic(path: Path, owner: str = "file") -> Iterator[BinaryIO]:
    """Yields a binary file that becomes `path` when the block ends, and is removed when the block raises.

    UserError where the system refuses the file.
    """
    temporary = path.with_name(f".{path.name}.{owner}-{secrets.token_hex(6)}.tmp")
    try:
        with temporary.open("xb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException as error:
        with contextlib.suppress(OSError):
            temporary.unlink()
        if isinstance(error, OSError) and error.filename in (None, str(temporary)):
            error.filename, error.filename2 = str(path), None
            with writing(path):
                raise
        raise
    _flush_folder(path.parent)


def remove_temporaries(folder: Path, owner: str, name: str = "") -> None:
    """Remove temporary files that killed writers of `owner` left in `folder`; with `name`, those of that file only."""
    for left in folder.glob(f".{glob.escape(name) if name else '*'}.{glob.escape(owner)}-*.tmp"):
        left.unlink(missing_ok=True)


def write_bytes(path: Path, data: bytes, owner: str = "file") -> None:
    """Write `data` to `path`, atomically replacing an existing file."""
    with atomic(path, owner) as file:
        file.write(data)


def write_text(path: Path, text: str, owner: str = "file") -> None:
    """Write `text` in UTF-8 to `path`, atomically replacing an existing file."""
    write_bytes(path, text.encode(), owner)


def write_json(path: Path, value: Any, owner: str = "file") -> None:
    """Write `value` as indented json to `path`, atomically replacing an existing file."""
    write_text(path, json.dumps(value, indent=2) + "\n", owner)


def file_sha256(path: Path) -> str:
    """The sha256 of a file in hexadecimal digits, read in pieces."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def write_protocol(path: Path, protocol: Mapping[str, Any], owner: str = "file") -> None:
    """Write the .json beside `path`: how its arrays were made, and the hash of the file."""
    write_json(path.with_suffix(".json"), {**protocol, "samples_sha256": file_sha256(path)}, owner)


def read_protocol(path: Path, sha256: str = "") -> dict[str, Any]:
    """The json of a file of samples, decoded or raw, or of a reference; {} without one.

    sha256: of the file, where it is known.

    UserError when it is no json, or that of another file.
    """
    described = path.with_suffix(".json")
    if not described.exists():
        return {}
    try:
        protocol = json.loads(described.read_text())
    except ValueError as error:
        raise UserError(f"{described}: not json ({error})") from error
    if not isinstance(protocol, dict) or protocol.pop("samples_sha256", None) != (sha256 or file_sha256(path)):
        raise UserError(f"{described} does not describe {path.name}: the hash of the file differs; make it again")
    return protocol


class Blocks(NamedTuple):
    """An array that is written piece by piece."""

    shape: tuple[int, ...]
    dtype: np.dtype
    pieces: Iterable[np.ndarray]  # along the first axis, in order, together of `shape`


def write_npy(file: IO[bytes], array: np.ndarray | Blocks) -> None:
    """Write an array of numbers, in C order, into an open file in the npy format.

    Raises:
        ValueError: values that npy cannot hold without pickle, or pieces that together are not of the stated shape.
    """
    if not isinstance(array, Blocks):
        array = Blocks(array.shape, array.dtype, [array])
    if array.dtype.kind not in NUMBERS:
        raise ValueError(f"arrays of {array.dtype} are not written; valid: booleans, integers, floats")
    described = {"descr": np.lib.format.dtype_to_descr(array.dtype), "fortran_order": False, "shape": array.shape}
    np.lib.format.write_array_header_1_0(file, described)
    count = 0
    for piece in array.pieces:
        if piece.dtype != array.dtype or piece.shape[1:] != array.shape[1:]:
            raise ValueError(f"a piece is {piece.dtype} {piece.shape}, the array {array.dtype} {array.shape}")
        file.write(np.ascontiguousarray(piece).data)
        count += len(piece) if piece.ndim else 1
    if count != (array.shape[0] if array.shape else 1):
        raise ValueError(f"pieces of {count} rows, the array has shape {array.shape}")


def write_npz(path: Path, arrays: Mapping[str, np.ndarray | Blocks], owner: str = "file") -> None:
    """Write arrays by name as an uncompressed npz: the bytes of np.savez, whatever the pieces of an array."""
    with atomic(path, owner) as file, zipfile.ZipFile(file, "w", zipfile.ZIP_STORED) as archive:
        for name, array in arrays.items():
            # By its name alone an entry is dated 1980; more than 4 GiB need the 64-bit form from the start.
            with archive.open(f"{name}.npy", "w", force_zip64=True) as entry:
                write_npy(entry, array)


def read_npz(
    path: Path, names: Sequence[str] | None = None, kind: str = "", *, optional: Sequence[str] = ()
) -> dict[str, np.ndarray]:
    """The arrays `names` of an npz file, by name; without names all of them.

    Args:
        kind: what the file should be, for the message ("a samples file").
        optional: those of the names that may be absent.

    Raises:
        UserError: the file is missing, damaged, lacks one of the arrays, or holds pickled objects under their names.
    """
    if not path.is_file():
        raise UserError(f"{path}: no such file")
    try:
        with np.load(path, allow_pickle=False) as arrays:
            wanted = arrays.files if names is None else names
            return {name: arrays[name] for name in wanted if name in arrays.files or name not in optional}
    except Exception as error:  # a damaged file can break numpy and zipfile in any way
        reason = " ".join(str(error).split())[:200] or type(error).__name__
        layout = "an npz file of arrays" if names is None else f"an npz of {' and '.join(names)}"
        raise UserError(f"{path}: not {f'{kind}, ' if kind else ''}{layout} ({reason})") from error


def _flush_folder(folder: Path) -> None:
    """Make the names in a folder last through a power cut, where the system can."""
    with contextlib.suppress(OSError):
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
