"""Numbered ArrayRecord shards of a folder, and the json manifest beside them that says what their bytes mean."""

import contextlib
import hashlib
import json
import os
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from itertools import groupby
from pathlib import Path
from typing import Any

from array_record.python.array_record_module import ArrayRecordWriter

from diffjax.errors import UserError
from diffjax.files import write_json

SHARD = re.compile(r"\w[\w.-]*\.array_record")  # no folder in it
CONTENTS = {"count": int, "shards": [str], "records_sha256": str}  # what `write` says


def write(out: Path, name: str, records: Iterable[bytes], size: int) -> dict[str, Any]:
    """Write `records` to shards `name-00000.array_record`, ... of `size` each; returns what a manifest says of them."""
    digest, shards, count = hashlib.sha256(), [], 0
    for shard, members in groupby(enumerate(records), lambda numbered: numbered[0] // size):
        shards.append(file_name(name, shard))
        count += write_shard(out / shards[-1], (record for _, record in members), digest)
    if not count:
        raise UserError(f"no {name} to write to {out}")
    return {"count": count, "shards": shards, "records_sha256": digest.hexdigest()}


def file_name(name: str, shard: int) -> str:
    return f"{name}-{shard:05d}.array_record"


def file_names(name: str, count: int, size: int) -> list[str]:
    """The shards of `count` records, `size` in each but the last."""
    return [file_name(name, shard) for shard in range(-(-count // size))]


def every(out: Path, name: str, count: int, size: int) -> list[tuple[Path, range]]:
    """The shards of `count` records in the folder `out`, each with the numbers of its records."""
    numbers = [range(start, min(start + size, count)) for start in range(0, count, size)]
    return [(out / each, records) for each, records in zip(file_names(name, count, size), numbers)]


def missing(out: Path, name: str, count: int, size: int) -> list[tuple[Path, range]]:
    """Those of `every` that are not there yet."""
    return [(path, records) for path, records in every(out, name, count, size) if not path.is_file()]


def agree(
    out: Path, file: str, request: Mapping[str, Any], name: str, earlier: Mapping[str, Any] | None = None
) -> None:
    """Leave the request, json-able, as `file` in the folder `out`, whose shards `name-*` are made by several calls.

    earlier: entries that earlier versions did not write, and what they meant.

    UserError where the folder holds shards of another request, or does not say of which.
    """
    path, left = out / file, sorted(out.glob(file_name(name, 0).replace("00000", "*")))
    if not left:
        write_json(path, request)
        return
    if not path.is_file():
        raise UserError(
            f"{out} holds {left[0].name} and does not say of what; remove such files, or choose another folder"
        )
    try:
        stored = {**(earlier or {}), **json.loads(path.read_text())}
    except ValueError as error:
        raise UserError(f"{path} is damaged ({error}); remove it and the shards, or choose another folder") from error
    wanted = {**(earlier or {}), **json.loads(json.dumps(request))}
    if found := sorted(field for field in wanted.keys() | stored.keys() if wanted.get(field) != stored.get(field)):
        raise UserError(f"{out} holds shards of another request ({', '.join(found)} differ); choose another folder")


def write_shard(path: Path, records: Iterable[bytes], digest: Any = None) -> int:
    """Write one shard, which has its name when it is whole; returns how many records. digest: takes them all."""
    unfinished, count = path.with_suffix(".unfinished"), 0
    with _in_words(path, "cannot be written"):
        writer = ArrayRecordWriter(str(unfinished), "group_size:1")
    for record in records:
        if digest is not None:
            digest.update(record)
        with _in_words(path, "cannot be written"):
            writer.write(record)
        count += 1
    with _in_words(path, "cannot be written"):
        writer.close()
        with unfinished.open("rb") as file:
            os.fsync(file.fileno())
        os.replace(unfinished, path)
    return count


@contextlib.contextmanager
def _in_words(path: Path, what: str) -> Iterator[None]:
    """UserError for what ArrayRecord and the system say of a file."""
    try:
        yield
    except (RuntimeError, ValueError, OSError) as error:
        raise UserError(f"{path} {what}: {' '.join(str(error).split())[:200]}") from error


def contents(root: Path, names: Sequence[str], look: Callable[[bytes], None]) -> dict[str, Any]:
    """What `write` returns, of shards that are there. look: called with every record, in order."""
    import grain  # heavy, and of no use where records are written

    digest, count = hashlib.sha256(), 0
    for name in names:
        with _in_words(root / name, "is damaged; remove it and make it again"):
            records = grain.sources.ArrayRecordDataSource(str(root / name))
            number = len(records)
        for i in range(number):
            with _in_words(root / name, "is damaged; remove it and make it again"):
                record = records[i]
            digest.update(record)
            look(record)
        count += number
    return {"count": count, "shards": list(names), "records_sha256": digest.hexdigest()}


def check_unfinished(out: Path, manifest: str) -> None:
    """UserError where the folder `out` holds a manifest: what it describes is whole."""
    if (out / manifest).exists():
        raise UserError(f"{out} already holds {manifest}; remove it or choose another folder")


def make_folder(out: Path, manifest: str) -> None:
    """The folder `out`, which must not hold a manifest yet."""
    check_unfinished(out, manifest)
    out.mkdir(parents=True, exist_ok=True)


def write_manifest(path: Path, contents: dict[str, Any]) -> dict[str, Any]:
    """Last of all, so that a folder with a manifest is complete; returns it as it will be read."""
    write_json(path, contents)
    return json.loads(json.dumps(contents))


def read_manifest(
    path: Path, what: str, command: str, fields: Mapping[str, Any], defaults: Mapping[str, Any] = {}
) -> dict[str, Any]:
    """A manifest as it was written.

    fields: required entries other than count, shards and records_sha256, with the types or an example of the values: of
    lists and tables the first item stands for all; of a tuple any item will do. defaults: of entries among them that
    earlier versions did not write.

    `UserError` with the command that makes the folder when it is missing or not a manifest.
    """
    if not path.is_file():
        folder = path.parent
        raise UserError(f"no {what} in {str(folder)!r}: {path.name} is missing; make them with: {command}{folder}")
    try:
        manifest = json.loads(path.read_text())
    except ValueError as error:
        raise UserError(f"{path}: not valid json ({error}); make them again with: {command}DIR") from error
    if isinstance(manifest, dict):
        manifest = {**defaults, **manifest}
    if wrong := _wrong(manifest, {**CONTENTS, **fields}, "it"):
        raise UserError(f"{path} is no manifest of {what}: {wrong}; make them again with: {command}DIR")
    if strange := [name for name in manifest["shards"] if not SHARD.fullmatch(name)]:
        raise UserError(f"{path} names the shard {strange[0]!r}; valid: names of files beside it, as {what} have them")
    return manifest


def _wrong(value: Any, kind: Any, name: str) -> str:
    """Why a value of json is not of a kind, in words; "" if it is.

    kind: a type, {field: kind}, [kind of every item] or (one kind, another).
    """
    if isinstance(kind, tuple):
        reasons = [_wrong(value, each, name) for each in kind]
        return reasons[0] if all(reasons) else ""
    if isinstance(kind, Mapping):
        if not isinstance(value, dict):
            return f"{name} is no table of fields"
        missing = [field for field in kind if field not in value]
        inside = (_wrong(value[field], each, field) for field, each in kind.items() if field in value)
        return f"{missing[0]} is missing" if missing else next(filter(None, inside), "")
    if isinstance(kind, list):
        if not isinstance(value, list) or not value:
            return f"{name} is no list of values"
        return next(filter(None, (_wrong(item, kind[0], f"{name}[{i}]") for i, item in enumerate(value))), "")
    right = isinstance(value, kind) and (kind is bool or not isinstance(value, bool))
    if right and kind is int and value < 0:
        right = False
    return "" if right else f"{name} is {json.dumps(value)[:60]}"


def open_records(root: Path, manifest: dict[str, Any]) -> Any:
    """Random access to the records of a manifest. `UserError` when the folder holds fewer or more."""
    import grain  # heavy, and of no use where records are written

    missing = [shard for shard in manifest["shards"] if not (root / shard).is_file()]
    if missing:
        raise UserError(f"{root} lacks {missing[0]}, which its manifest names")
    records = grain.sources.ArrayRecordDataSource([str(root / shard) for shard in manifest["shards"]])
    if len(records) != manifest["count"]:
        raise UserError(f"{root} holds {len(records)} records, its manifest says {manifest['count']}")
    return records
