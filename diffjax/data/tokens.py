"""Folders of tokens: ArrayRecord shards and a manifest, `tokens.json`, that says how images became tokens.

A record is a header of twelve bytes, little-endian (magic "DJXT", version uint16, views uint16, label int32), and
uint16 tokens [views, codebooks, n], row by row of an image's grid. The second view, if there is one, is the mirrored
image. The first codebook is of image features; the second, if there is one, of a decoder to pixels.
"""

import hashlib
import struct
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from diffjax.contracts import Device
from diffjax.data import shards
from diffjax.errors import UserError
from diffjax.trees import leaves

MANIFEST = "tokens.json"
CODEBOOK = "codebook.npy"
HEADER = struct.Struct("<4sHHi")
MAGIC, VERSION = b"DJXT", 1
LARGEST = np.iinfo(np.uint16).max + 1
SHARD_SIZE = 65536  # records; 34 MB of 16 x 16 tokens in one view
COMMAND = "python -m diffjax tokenize --config=RECIPE --out="


@dataclass(frozen=True)
class Codebook:
    """How the tokens of one codebook are made of an image."""

    encoder: dict[str, Any]  # its name, and all that its output depends on: weights, layer, patch, ...
    vocabulary: int  # number of centroids
    codebook_sha256: str  # of the centroids, float32 [vocabulary, d]
    grid: int  # tokens along a side

    def stored(self) -> dict[str, Any]:
        """The entry of the manifest, which calls the size of the vocabulary `codes`."""
        return {
            "encoder": self.encoder,
            "codes": self.vocabulary,
            "codebook_sha256": self.codebook_sha256,
            "grid": self.grid,
        }


@dataclass(frozen=True)
class Origin:
    """The origin of tokens, which is written to the manifest."""

    codebooks: tuple[Codebook, ...]
    images: dict[str, Any]  # the identity of the image source: its name, split, size and crop
    num_classes: int  # 0: unlabelled

    def stored(self) -> dict[str, Any]:
        """The part of the manifest that says it, where the codebooks are `streams`."""
        streams = tuple(codebook.stored() for codebook in self.codebooks)
        return {"streams": streams, "images": self.images, "num_classes": self.num_classes}


def write_tokens(out: Path, examples: Iterable[tuple[np.ndarray, int]], origin: Origin) -> dict[str, Any]:
    """Write (tokens int [views, codebooks, n], label) pairs to the folder `out`; returns the manifest, written last."""
    views = 0

    def encoded() -> Iterator[bytes]:
        nonlocal views
        for tokens, label in examples:
            views = views or len(tokens)
            yield encode(tokens, label, views, origin)

    contents = shards.write(out, "tokens", encoded(), SHARD_SIZE)
    return shards.write_manifest(out / MANIFEST, {"version": VERSION, "views": views} | contents | origin.stored())


def encode(tokens: np.ndarray, label: int, views: int, origin: Origin) -> bytes:
    """The record of tokens [views, codebooks, n]. `UserError` for tokens or labels out of range, and other shapes."""
    expected = (views, len(origin.codebooks), origin.codebooks[0].grid ** 2)
    if tokens.shape != expected or views not in (1, 2):
        raise UserError(f"tokens have shape {tokens.shape}; expected [1 or 2 views, codebooks, n] = {expected}")
    for codebook, values in zip(origin.codebooks, tokens.swapaxes(0, 1)):
        if values.min() < 0 or values.max() >= min(codebook.vocabulary, LARGEST):
            raise UserError(
                f"token {values.min() if values.min() < 0 else values.max()} is outside the vocabulary of "
                f"{codebook.vocabulary} (at most {LARGEST})"
            )
    if not 0 <= label < max(origin.num_classes, 1):
        raise UserError(f"label {label} is outside the {origin.num_classes} classes")
    return HEADER.pack(MAGIC, VERSION, views, label) + tokens.astype("<u2").tobytes()


def decode(record: bytes, shape: tuple[int, int, int]) -> tuple[np.ndarray, int]:
    """The tokens int32 [views, codebooks, n] and the label of a record. `UserError` when it is not one."""
    magic, version, views, label = HEADER.unpack(record[: HEADER.size].ljust(HEADER.size, b"\0"))
    if (magic, version, views) != (MAGIC, VERSION, shape[0]) or len(record) != HEADER.size + 2 * int(np.prod(shape)):
        raise UserError(
            f"not a record of tokens of version {VERSION} and shape {shape}: starts with {magic!r}, version {version}, "
            f"{len(record)} bytes"
        )
    return np.frombuffer(record, "<u2", offset=HEADER.size).astype(np.int32).reshape(shape), label


def codebook_sha256(codebook: np.ndarray) -> str:
    """sha256 of centroids float32 [vocabulary, d]."""
    return hashlib.sha256(np.ascontiguousarray(codebook, "<f4").tobytes()).hexdigest()


def read_manifest(folder: Path) -> dict[str, Any]:
    """The manifest of the tokens in `folder`. `UserError` with the command that makes them when there are none."""
    stream = {"encoder": {"name": str}, "codes": int, "codebook_sha256": str, "grid": int}
    fields = {"views": int, "streams": [stream], "images": {"name": str}, "num_classes": int}
    return shards.read_manifest(folder / MANIFEST, "tokens", COMMAND, fields)


def kinds(manifest: Mapping[str, Any], codebooks: int = 1) -> dict[str, Any]:
    """How the tokens of a manifest's first codebooks are made, by role: {"features": ..., "decoder": ...}."""
    return dict(zip(("features", "decoder"), manifest["streams"][:codebooks]))


def check_kinds(folder: Path, trained: Mapping[str, Any]) -> dict[str, Any]:
    """The manifest of `folder`. `UserError` unless its tokens are made like those of a run, `kinds`."""
    manifest = read_manifest(folder)
    stored, found = leaves(trained), leaves(kinds(manifest, len(trained)))
    if differing := [name for name in sorted(stored | found) if stored.get(name) != found.get(name)]:
        pairs = ", ".join(f"{name} was {stored.get(name)} and is {found.get(name)}" for name in differing)
        raise UserError(
            f"the tokens in {folder} were not made like those that the run was trained on: {pairs}; make them with the "
            f"run's own codebook: {COMMAND}DIR --codebook=NPY"
        )
    return manifest


@dataclass(frozen=True)
class TokenExamples:
    """{"image": tokens int32 [views, codebooks, n], "label": int} from ArrayRecord shards."""

    records: Any = field(repr=False)
    shape: tuple[int, int, int]
    counts: tuple[int, ...]  # vocabularies of the first codebooks; as many are read
    labelled: bool

    def __len__(self) -> int:
        return len(self.records)

    def __getitem__(self, index: int) -> dict[str, Any]:
        tokens, label = decode(self.records[index], self.shape)
        read = tokens[:, : len(self.counts)]
        for values, count in zip(read.swapaxes(0, 1), self.counts):
            if values.max() >= count:
                raise UserError(
                    f"record {index} holds token {values.max()}, but its manifest has a vocabulary of {count}"
                )
        return {"image": read, "label": label if self.labelled else 0}


def of_view(tokens: Any, mirrored: Any, device: Device) -> Any:
    """Tokens int32 [b, codebooks, n] of the view that is seen, as they are."""
    return tokens


def target(drawn: Any, conditions: Any) -> tuple[Any, Any]:
    """Tokens int32 [b, codebooks, n] -> those of the last codebook [b, n], and the unchanged conditions."""
    return drawn[:, -1], conditions


def source_and_target(drawn: Any, conditions: Any) -> tuple[Any, Any]:
    """Tokens int32 [b, 2, n] -> those of the second codebook [b, n], conditioned on those of the first [b, n]."""
    return drawn[:, 1], drawn[:, 0]
