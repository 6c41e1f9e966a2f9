"""ImageNet as hubs carry it: parquet shards with the columns image {bytes, path} and label."""

import re
import threading
from collections import OrderedDict
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from diffjax.data.preparation.containers import LARGEST, reading
from diffjax.data.preparation.originals import Originals, describe, index_sha256
from diffjax.errors import UserError

SYNSET = re.compile(r"n\d{8}")
GROUPS_KEPT = 4  # row groups in memory, which threads read in order


def find_shards(path: Path, split: str) -> list[Path]:
    """The parquet files of a split in a folder or in its folder `data`, by their names; or the file itself."""
    if path.is_file():
        return [path] if path.suffix == ".parquet" else []
    return sorted(path.glob(f"{split}*.parquet")) or sorted((path / "data").glob(f"{split}*.parquet"))


def read(shards: Sequence[Path], classes: Sequence[str]) -> Originals:
    """The images of parquet shards in the order of file names and rows.

    Their labels have to be ranks of synset ids: they are compared with the ids in the names of the images.
    """
    rows = Rows(shards)
    if wrong := [label for label in rows.labels if not 0 <= label < len(classes)]:
        raise UserError(f"{shards[0].parent}: label {wrong[0]} of an image; valid: 0 to {len(classes) - 1}")
    labels = np.array(rows.labels, np.int32)
    ranks = {synset: rank for rank, synset in enumerate(classes)}
    checked = 0
    for name, label in zip(rows.names, labels):
        found = {ranks[synset] for synset in SYNSET.findall(name) if synset in ranks}
        if found and found != {int(label)}:
            raise UserError(
                f"{shards[0].parent}: {name} has label {label}, and its synset has rank {min(found)} among the 1000; "
                "these labels are in another order"
            )
        checked += bool(found)
    note = (
        ""
        if checked == len(labels)
        else f"labels of {len(labels) - checked:,} images taken as they are: no synset id in their names"
    )
    return Originals(
        rows.names,
        labels,
        rows.load,
        describe(shards),
        index_sha256(rows.names, labels, rows.sizes),
        tuple(classes),
        note,
    )


class Rows:
    """Rows of parquet files by number, row group after row group."""

    def __init__(self, shards: Sequence[Path]):
        from pyarrow import parquet

        self.names: list[str] = []
        self.labels: list[int] = []
        self.sizes: list[int] = []  # bytes of the images of the row group, which need not be read
        self._starts: list[int] = []  # number of the first row of each row group
        self._groups: list[tuple[Any, Path, int]] = []
        self._kept: OrderedDict[int, list[bytes]] = OrderedDict()
        self._lock = threading.Lock()
        for path in shards:
            with reading(path):
                file = parquet.ParquetFile(path)
                _check_columns(file, path)
                for group in range(file.num_row_groups):
                    self._starts.append(len(self.names))
                    self._groups.append((file, path, group))
                    table = file.read_row_group(group, columns=["image.path", "label"])
                    paths = [image["path"] for image in table["image"].to_pylist()]
                    first = len(self.names)
                    self.names += [each or f"row {first + i} of {path.name}" for i, each in enumerate(paths)]
                    self.sizes += [_bytes_of_images(file.metadata.row_group(group))] * len(paths)
                    self.labels += [-1 if label is None else label for label in table["label"].to_pylist()]

    def load(self, number: int) -> bytes:
        group = int(np.searchsorted(self._starts, number, side="right")) - 1
        with self._lock:
            if group not in self._kept:
                self._kept[group] = self._read(group)
                while len(self._kept) > GROUPS_KEPT:
                    self._kept.popitem(last=False)
            data = self._kept[group][number - self._starts[group]]
        if data is None or len(data) > LARGEST:
            raise UserError(f"{self._groups[group][1]}: {self.names[number]} holds no image")
        return data

    def _read(self, group: int) -> list[bytes]:
        file, path, number = self._groups[group]
        with reading(path):
            return [
                image["bytes"] for image in file.read_row_group(number, columns=["image.bytes"])["image"].to_pylist()
            ]


def _bytes_of_images(group: Any) -> int:
    columns = (group.column(i) for i in range(group.num_columns))
    return sum(column.total_uncompressed_size for column in columns if column.path_in_schema == "image.bytes")


def _check_columns(file: Any, path: Path) -> None:
    found = {file.schema.column(i).path for i in range(len(file.schema))}
    if missing := {"image.bytes", "image.path", "label"} - found:
        raise UserError(f"{path} has no column {min(missing)}; valid: image with bytes and path, label")
