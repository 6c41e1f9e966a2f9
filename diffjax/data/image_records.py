"""Folders of images as `prepare` writes them: ArrayRecord shards, and a manifest, `images.json`, that describes them.

One record per image: a header of eighteen bytes, and the pixels, of images up to 64 pixels as they are, of larger ones
as png, which loses nothing and takes about half the space.

header (little-endian): magic "DJXI", version uint16, label int32, height uint16, width uint16, channels uint8,
                        encoding uint8 (0 raw, 1 png), colours uint8 (of the original, see COLOURS), a zero byte
body: uint8 [h, w, c], or the png
"""

import hashlib
import io
import struct
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from PIL import Image
from tqdm import tqdm

from diffjax.data import shards
from diffjax.errors import UserError

MANIFEST = "images.json"
NAME = "images"  # of the shards
COMMAND = "python -m diffjax prepare NAME --from=PATH --out="
HEADER = struct.Struct("<4sHiHHBBBx")
MAGIC, VERSION = b"DJXI", 1
RAW, PNG = 0, 1
RAW_SIZE = 64  # side of the largest image that is stored as it is
PNG_LEVEL = 1  # of a photograph four times as fast as Pillow's 6, and a sixth larger
SHARD_BYTES = 2**28  # of the pixels of a shard, before they are encoded
COLOURS = ("rgb", "grey", "palette", "cmyk", "alpha", "other")  # what an original is converted to rgb from


class Record(NamedTuple):
    """The header of a record, and the pixels as they are stored."""

    label: int
    shape: tuple[int, int, int]
    encoding: int
    colours: str
    body: bytes


def shard_size(size: int) -> int:
    """The number of records in a shard of images of `size` x `size` x 3."""
    return max(1, SHARD_BYTES // (size * size * 3))


def encode(pixels: np.ndarray, label: int, colours: str) -> bytes:
    """The record of an image uint8 [h, w, c] whose original had `colours`, one of COLOURS."""
    if max(pixels.shape) <= RAW_SIZE:
        encoding, body = RAW, pixels.tobytes()
    else:
        file = io.BytesIO()
        Image.fromarray(pixels).save(file, "png", compress_level=PNG_LEVEL)
        encoding, body = PNG, file.getvalue()
    return HEADER.pack(MAGIC, VERSION, label, *pixels.shape, encoding, COLOURS.index(colours)) + body


def parse(record: bytes) -> Record:
    """The parts of a record. `UserError` when it is not one."""
    start = record[: HEADER.size]
    if len(start) == HEADER.size:
        magic, version, label, height, width, channels, encoding, colours = HEADER.unpack(start)
        known = encoding in (RAW, PNG) and colours < len(COLOURS)
        if (magic, version) == (MAGIC, VERSION) and known:
            return Record(label, (height, width, channels), encoding, COLOURS[colours], record[HEADER.size :])
    raise UserError(f"not an image record of version {VERSION}: {len(record)} bytes that start with {record[:6]!r}")


def decode(record: bytes) -> tuple[np.ndarray, int]:
    """The image uint8 [h, w, c] and the label of a record. `UserError` when it is not one."""
    parsed = parse(record)
    try:
        if parsed.encoding == RAW:
            return np.frombuffer(parsed.body, np.uint8).reshape(parsed.shape), parsed.label
        with Image.open(io.BytesIO(parsed.body), formats=["png"]) as image:
            return np.asarray(image).reshape(parsed.shape), parsed.label
    except Exception as error:  # a damaged png can break Pillow in any way
        raise UserError(f"a damaged record of an image of {parsed.shape}: {' '.join(str(error).split())}") from error


def finish(out: Path, count: int, size: int, classes: Sequence[str], stated: Mapping[str, Any]) -> dict[str, Any]:
    """Write the manifest of shards that are there, of `count` records in all; returns it. UserError for others.

    stated: what else it says: the data set, split, rule, decoding, source.
    """
    names = shards.file_names(NAME, count, shard_size(size))
    labels: Counter[int] = Counter()
    colours: Counter[str] = Counter()

    def look(record: bytes) -> None:
        parsed = parse(record)
        if parsed.shape != (size, size, 3) or not 0 <= parsed.label < max(len(classes), 1):
            raise UserError(f"{out} holds an image of {parsed.shape}, label {parsed.label}; remove its shards")
        labels[parsed.label] += 1
        colours[parsed.colours] += 1
        bar.update()

    with tqdm(total=count, desc="checking", unit="image", disable=None) as bar:
        contents = shards.contents(out, names, look)
    if contents["count"] != count:
        raise UserError(f"{out} holds {contents['count']} of {count} images; remove its shards and make them again")
    described = {
        "version": VERSION,
        **stated,
        "size": size,
        "channels": 3,
        "num_classes": len(classes),
        "classes": list(classes),
        "label_table_sha256": table_sha256(classes),
        "images_per_class": [labels[label] for label in range(len(classes))],
        "converted": {name: colours[name] for name in COLOURS[1:] if colours[name]},
    }
    return shards.write_manifest(out / MANIFEST, described | contents)


def table_sha256(classes: Sequence[str]) -> str:
    """The sha256 of the names of classes, joined by "\\n", in the order of their labels."""
    return hashlib.sha256("\n".join(classes).encode()).hexdigest()


def read_manifest(folder: Path) -> dict[str, Any]:
    """The manifest of the images in `folder`. `UserError` with the command that makes them when there are none."""
    fields = {"version": int, "dataset": str, "split": str, "size": int, "channels": int, "num_classes": int}
    manifest = shards.read_manifest(folder / MANIFEST, "prepared images", COMMAND, fields)
    classes = manifest.get("classes", "")
    if manifest["version"] != VERSION:
        raise UserError(f"{folder / MANIFEST} has version {manifest['version']}; valid: {VERSION}")
    named = isinstance(classes, list) and all(isinstance(name, str) for name in classes)
    if not named or len(classes) != manifest["num_classes"]:
        raise UserError(f"{folder / MANIFEST}: no names of {manifest['num_classes']} classes; make the images again")
    return manifest


@dataclass(frozen=True)
class ImageRecords:
    """{"image": uint8 [size, size, channels], "label": int} from ArrayRecord shards."""

    records: Any = field(repr=False)  # random access to bytes
    labelled: bool

    def __len__(self) -> int:
        return len(self.records)

    def __getitem__(self, index: int) -> dict[str, Any]:
        image, label = decode(self.records[index])
        return {"image": image, "label": label if self.labelled else 0}
