"""Writes torch's two file formats without torch: the same pickles, storages and layouts."""

import io
import pickle
import struct
import sys
import types
import zipfile
from collections import OrderedDict
from collections.abc import Callable
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np

from diffjax.torch_file import MAGIC, STORAGES


@dataclass
class Storage:
    """One-dimensional elements; `key` names them in the file, `count` is what the file claims."""

    data: np.ndarray
    key: str
    count: int | None = None

    @property
    def pid(self) -> tuple:
        names = {dtype: name for name, dtype in STORAGES.items()}
        storage_type = getattr(sys.modules["torch"], names[self.data.dtype.name])
        count = self.data.size if self.count is None else self.count
        return ("storage", storage_type, self.key, "cpu", count)


@dataclass
class Tensor:
    storage: Storage
    offset: int
    shape: tuple
    strides: tuple

    def __reduce__(self) -> tuple:
        rebuild = sys.modules["torch._utils"]._rebuild_tensor_v2
        return rebuild, (self.storage, self.offset, self.shape, self.strides, False, OrderedDict())


def tensor(array: np.ndarray, key: str) -> Tensor:
    array = np.ascontiguousarray(array)
    strides = tuple(stride // array.itemsize for stride in array.strides)
    return Tensor(Storage(array.ravel(), key), 0, array.shape, strides)


@dataclass
class Named:
    """A call of `module.name(*arguments)`, `module` being pretended."""

    module: str
    name: str
    arguments: tuple

    def __reduce__(self) -> tuple:
        return getattr(sys.modules[self.module], self.name), self.arguments


@contextmanager
def pretended(**names: list[str]):
    """Modules `torch`, `torch._utils` and more whose members pickle by name."""
    members = {"torch": [*STORAGES, "Size"], "torch._utils": ["_rebuild_tensor_v2", "_rebuild_parameter"], **names}
    modules = {}
    for module, listed in members.items():
        modules[module] = types.ModuleType(module)
        for name in listed:
            setattr(modules[module], name, type(name, (), {"__module__": module}))
    with mock.patch.dict(sys.modules, modules):
        yield


def dumps(value: Any, storages: dict[str, Storage], pid: Callable[[Storage], Any] = lambda s: s.pid) -> bytes:
    buffer = io.BytesIO()

    class Pickler(pickle.Pickler):
        def persistent_id(self, item: Any) -> Any:
            if not isinstance(item, Storage):
                return None
            storages[item.key] = item
            return pid(item)

    Pickler(buffer, protocol=2).dump(value)
    return buffer.getvalue()


def write_zip(path: Path, value: Any, *, data: bytes | None = None, compression: int = zipfile.ZIP_STORED) -> Path:
    """The layout of torch.save; `data` replaces the pickle."""
    storages: dict[str, Storage] = {}
    with pretended():
        pickled = dumps(value, storages) if data is None else data
    with zipfile.ZipFile(path, "w", compression) as archive:
        archive.writestr(f"{path.stem}/data.pkl", pickled)
        archive.writestr(f"{path.stem}/byteorder", "little")
        for key, storage in storages.items():
            archive.writestr(f"{path.stem}/data/{key}", storage.data.tobytes())
        archive.writestr(f"{path.stem}/version", "3\n")
    return path


def write_stream(path: Path, value: Any) -> Path:
    """The layout before torch 1.6, or of torch.save(..., _use_new_zipfile_serialization=False)."""
    storages: dict[str, Storage] = {}
    facts = {"protocol_version": 1001, "little_endian": True, "type_sizes": {"short": 2, "int": 4, "long": 4}}
    with pretended():
        parts = [pickle.dumps(fact, 2) for fact in (MAGIC, 1001, facts)]
        parts.append(dumps(value, storages, lambda storage: (*storage.pid, None)))
    parts.append(pickle.dumps(list(storages), 2))
    for storage in storages.values():
        parts += [struct.pack("<q", storage.data.size), storage.data.tobytes()]
    path.write_bytes(b"".join(parts))
    return path
