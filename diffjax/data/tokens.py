"""Folders of codes: ArrayRecord shards and a manifest, `tokens.json`, that says how images became codes.

A record is a header of twelve bytes, little-endian (magic "DJXT", version uint16, views uint16, label int32), and
uint16 codes [views, streams, n], row by row of an image's grid. The second view, if there is one, is the mirrored
image. The first stream are the codes of image features; the second, if there is one, those of a decoder to pixels.
"""

import hashlib
import struct
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from diffjax.data import shards
from diffjax.errors import UserError
from diffjax.trees import leaves

MANIFEST = "tokens.json"
CODEBOOK = "codebook.npy"
HEADER = struct.Struct("<4sHHi")
MAGIC, VERSION = b"DJXT", 1
LARGEST = np.iinfo(np.uint16).max + 1
SHARD_SIZE = 65536  # records; 34 MB of 16 x 16 codes in one view
COMMAND = "python -m diffjax tokenize --config=RECIPE --out="


@dataclass(frozen=True)
class Stream:
    """How codes of one kind are made of an image."""

    encoder: dict[str, Any]  # its name, and all that its output depends on: weights, layer, patch, ...
    codes: int  # how many there are
    codebook_sha256: str  # of the centroids, float32 [codes, d]
    grid: int  # codes along a side


@dataclass(frozen=True)
class Origin:
    """Where codes come from; all of it is written to the manifest."""

    streams: tuple[Stream, ...]
    images: dict[str, Any]  # the identity of the image source: its name, split, size and crop
    num_classes: int  # 0: unlabelled


def write_tokens(out: Path, examples: Iterable[tuple[np.ndarray, int]], origin: Origin) -> dict[str, Any]:
    """Write (codes int [views, streams, n], label) pairs to the folder `out`; returns the manifest, written last."""
    views = 0

    def encoded() -> Iterator[bytes]:
        nonlocal views
        for codes, label in examples:
            views = views or len(codes)
            yield encode(codes, label, views, origin)

    contents = shards.write(out, "tokens", encoded(), SHARD_SIZE)
    return shards.write_manifest(out / MANIFEST, {"version": VERSION, "views": views} | contents | asdict(origin))


def encode(codes: np.ndarray, label: int, views: int, origin: Origin) -> bytes:
    """The record of codes [views, streams, n]. `UserError` for codes or labels out of range, and other shapes."""
    expected = (views, len(origin.streams), origin.streams[0].grid ** 2)
    if codes.shape != expected or views not in (1, 2):
        raise UserError(f"codes have shape {codes.shape}; expected [1 or 2 views, streams, n] = {expected}")
    for stream, values in zip(origin.streams, codes.swapaxes(0, 1)):
        if values.min() < 0 or values.max() >= min(stream.codes, LARGEST):
            raise UserError(
                f"code {values.min() if values.min() < 0 else values.max()} is outside the {stream.codes} codes "
                f"(at most {LARGEST})"
            )
    if not 0 <= label < max(origin.num_classes, 1):
        raise UserError(f"label {label} is outside the {origin.num_classes} classes")
    return HEADER.pack(MAGIC, VERSION, views, label) + codes.astype("<u2").tobytes()


def decode(record: bytes, shape: tuple[int, int, int]) -> tuple[np.ndarray, int]:
    """The codes int32 [views, streams, n] and the label of a record. `UserError` when it is not one."""
    magic, version, views, label = HEADER.unpack(record[: HEADER.size].ljust(HEADER.size, b"\0"))
    if (magic, version, views) != (MAGIC, VERSION, shape[0]) or len(record) != HEADER.size + 2 * int(np.prod(shape)):
        raise UserError(
            f"not a record of codes of version {VERSION} and shape {shape}: starts with {magic!r}, version {version}, "
            f"{len(record)} bytes"
        )
    return np.frombuffer(record, "<u2", offset=HEADER.size).astype(np.int32).reshape(shape), label


def codebook_sha256(codebook: np.ndarray) -> str:
    """Of centroids float32 [codes, d]."""
    return hashlib.sha256(np.ascontiguousarray(codebook, "<f4").tobytes()).hexdigest()


def read_manifest(folder: Path) -> dict[str, Any]:
    """The manifest of the codes in `folder`. `UserError` with the command that makes them when there are none."""
    stream = {"encoder": {"name": str}, "codes": int, "codebook_sha256": str, "grid": int}
    fields = {"views": int, "streams": [stream], "images": {"name": str}, "num_classes": int}
    return shards.read_manifest(folder / MANIFEST, "codes", COMMAND, fields)


def kinds(manifest: Mapping[str, Any], streams: int = 1) -> dict[str, Any]:
    """What codes of the first streams in a manifest mean, by the part they play: {"features": ..., "decoder": ...}."""
    return dict(zip(("features", "decoder"), manifest["streams"][:streams]))


def check_kinds(folder: Path, trained: Mapping[str, Any]) -> dict[str, Any]:
    """The manifest of `folder`. `UserError` unless its codes are made as those, `kinds`, that a run was trained on."""
    manifest = read_manifest(folder)
    stored, found = leaves(trained), leaves(kinds(manifest, len(trained)))
    if differing := [name for name in sorted(stored | found) if stored.get(name) != found.get(name)]:
        pairs = ", ".join(f"{name} was {stored.get(name)} and is {found.get(name)}" for name in differing)
        raise UserError(
            f"the codes in {folder} are not made as those that the run was trained on: {pairs}; make them with the "
            f"run's own codebook: {COMMAND}DIR --codebook=NPY"
        )
    return manifest


@dataclass(frozen=True)
class TokenExamples:
    """{"image": codes int32 [views, streams, n], "label": int} from ArrayRecord shards."""

    records: Any = field(repr=False)
    shape: tuple[int, int, int]
    counts: tuple[int, ...]  # codes of each of the first streams; as many are read
    labelled: bool

    def __len__(self) -> int:
        return len(self.records)

    def __getitem__(self, index: int) -> dict[str, Any]:
        codes, label = decode(self.records[index], self.shape)
        read = codes[:, : len(self.counts)]
        for values, count in zip(read.swapaxes(0, 1), self.counts):
            if values.max() >= count:
                raise UserError(f"record {index} holds code {values.max()}, and its manifest says {count} codes")
        return {"image": read, "label": label if self.labelled else 0}


def choose_view(stored: np.ndarray, mirrored: np.ndarray, positions: np.ndarray, seed: int) -> np.ndarray:
    """Codes [b, views, streams, n], mirrored bool [b] -> int32 [b, streams, n]; nothing else is random here."""
    return stored[np.arange(len(stored)), mirrored.astype(int)]
