"""Numbered ArrayRecord shards of a folder, and the json manifest beside them that says what their bytes mean."""

import hashlib
import json
from collections.abc import Iterable
from itertools import groupby
from pathlib import Path
from typing import Any

from array_record.python.array_record_module import ArrayRecordWriter

from diffjax.errors import UserError


def write(out: Path, name: str, records: Iterable[bytes], size: int) -> dict[str, Any]:
    """Write `records` to shards `name-00000.array_record`, ... of `size` each; returns what a manifest says of them."""
    digest, shards, count = hashlib.sha256(), [], 0
    for shard, members in groupby(enumerate(records), lambda numbered: numbered[0] // size):
        shards.append(f"{name}-{shard:05d}.array_record")
        writer = ArrayRecordWriter(str(out / shards[-1]), "group_size:1")
        for _, record in members:
            digest.update(record)
            writer.write(record)
            count += 1
        writer.close()
    if not count:
        raise UserError(f"no {name} to write to {out}")
    return {"count": count, "shards": shards, "records_sha256": digest.hexdigest()}


def make_folder(out: Path, manifest: str) -> None:
    """The folder `out`, which must not hold a manifest yet."""
    if (out / manifest).exists():
        raise UserError(f"{out} already holds a {manifest}; remove it or choose another folder")
    out.mkdir(parents=True, exist_ok=True)


def write_manifest(path: Path, contents: dict[str, Any]) -> dict[str, Any]:
    """Last of all, so that a folder with a manifest is complete; returns it as it will be read."""
    manifest = json.loads(json.dumps(contents))
    path.write_text(json.dumps(manifest, indent=1) + "\n")
    return manifest


def read_manifest(path: Path, what: str, command: str) -> dict[str, Any]:
    """A manifest as it was written. `UserError` with the command that makes the folder when there is none."""
    if not path.is_file():
        folder = path.parent
        raise UserError(f"no {what} in {str(folder)!r}: {path.name} is missing; make them with: {command}{folder}")
    try:
        return json.loads(path.read_text())
    except ValueError as error:
        raise UserError(f"{path}: not valid json ({error}); make them again with: {command}DIR") from error


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
