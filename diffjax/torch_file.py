"""Read weight files without torch: .safetensors, torch's zip archives (.pt, .pth) and its older single stream.

A torch file is a pickle whose tensors are views of raw storages kept beside it. Pickles can call anything they can
name, so this reader resolves names through one short table of inert stand-ins and refuses every other name.

    zip (torch >= 1.6):  NAME/data.pkl, NAME/data/<key> raw storages, NAME/version, NAME/byteorder
    stream (before):     pickles of a magic number, 1001, system facts, the object, the storage keys in order;
                         then per key an 8-byte element count and the raw elements
"""

import json
import math
import mmap
import pickle
import struct
import zipfile
import zlib
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, BinaryIO

import ml_dtypes
import numpy as np
from safetensors import safe_open

from diffjax.errors import UserError

MAGIC = 0x1950A86A20F9469CFC6C
STREAM_PROTOCOL = 1001
STREAM_START = 32  # bytes among which a stream has its magic number

# torch's storage class -> numpy's name of the elements
STORAGES = {
    "DoubleStorage": "float64",
    "FloatStorage": "float32",
    "HalfStorage": "float16",
    "BFloat16Storage": "bfloat16",
    "LongStorage": "int64",
    "IntStorage": "int32",
    "ShortStorage": "int16",
    "CharStorage": "int8",
    "ByteStorage": "uint8",
    "BoolStorage": "bool",
}

# safetensors' name of a dtype -> numpy's
SAFETENSORS = {
    **{f"F{bits}": f"float{bits}" for bits in (16, 32, 64)},
    **{f"I{bits}": f"int{bits}" for bits in (8, 16, 32, 64)},
    **{f"U{bits}": f"uint{bits}" for bits in (8, 16, 32, 64)},
    "BF16": "bfloat16",
    "BOOL": "bool",
}

# Packages whose settings and records lie beside the weights in a training checkpoint, and the names that these use.
# What they name becomes an empty stand-in; their code is not imported.
IGNORED_PACKAGES = ("fairseq", "lightning", "lightning_fabric", "omegaconf", "pytorch_lightning", "torchmetrics")
IGNORED_NAMES = {
    *(
        ("builtins", name)
        for name in ("bool", "dict", "float", "int", "list", "long", "set", "str", "tuple", "unicode")
    ),
    ("numpy._core.multiarray", "scalar"),
    ("numpy.core.multiarray", "scalar"),
    *(("pathlib", name) for name in ("Path", "PosixPath", "PurePosixPath", "WindowsPath")),
    ("_codecs", "encode"),
    ("collections", "defaultdict"),
    ("numpy", "dtype"),
    ("typing", "Any"),
}

MODULES = {"__builtin__": "builtins", "pathlib._local": "pathlib"}  # names in other versions of Python and of pickles

Names = Mapping[tuple[str, str], Any]  # (module, name) -> what stands in for it
Storage = Callable[[str, str, int], np.ndarray]  # key, element type, element count -> the elements, [count]


def read(path: str | Path, more: Mapping[tuple[str, str], Any] = {}) -> Any:
    """The content of the file: nested dicts and lists of numpy arrays and plain Python values.

    Arrays are read-only views of the mapped file, bfloat16 as `ml_dtypes.bfloat16`; tensors that share a storage share
    memory. An `argparse.Namespace` becomes the dict of its attributes.
    more: names besides those of the table that the file may use, and what stands in for them.
    Raises UserError when the file is missing, damaged, of another format, or names anything outside the table.
    """
    path = Path(path)
    if not path.is_file():
        raise UserError(f"{path}: no such file; expected a .safetensors, .pt or .pth file")
    try:
        with path.open("rb") as file:
            start = file.read(9)
            if start.startswith(b"PK\x03\x04"):
                return _read_zip(path, file, more)
            if start.startswith(b"\x80"):
                return _read_stream(path, file, more)
        if start[8:] == b"{":
            return _read_safetensors(path)
    except UserError:
        raise
    except Exception as error:  # a damaged or crafted file can break the parsers in any way
        raise UserError(f"{path}: damaged or not a weight file ({type(error).__name__}: {_line(error)})") from error
    raise UserError(f"{path}: not a weight file; expected safetensors, a torch zip archive or a torch stream")


def is_stream(start: bytes) -> bool:
    """Whether the first STREAM_START bytes of a pickle are those of torch's stream."""
    return MAGIC.to_bytes(10, "little") in start


def _read_safetensors(path: Path) -> dict[str, np.ndarray]:
    """Views of the mapped file: 8 bytes with the length of a json header, which says where each array lies after it."""
    with safe_open(path, "np"):  # refuses places that overlap or lie outside
        pass
    with path.open("rb") as file:
        mapped = _map(file)
    (length,) = struct.unpack_from("<Q", mapped)
    header = json.loads(mapped[8 : 8 + length])
    return {name: _array(path, mapped, 8 + length, entry) for name, entry in header.items() if name != "__metadata__"}


def _array(path: Path, mapped: mmap.mmap, begin: int, entry: dict[str, Any]) -> np.ndarray:
    if entry["dtype"] not in SAFETENSORS:
        raise UserError(f"{path}: arrays of {entry['dtype']} are not read; valid: {', '.join(SAFETENSORS)}")
    count, dtype = math.prod(entry["shape"]), _dtype(SAFETENSORS[entry["dtype"]])
    if not count:
        return np.empty(entry["shape"], dtype)
    return np.frombuffer(mapped, dtype, count, begin + entry["data_offsets"][0]).reshape(entry["shape"])


def release(array: Any) -> None:
    """Let go of the memory that a view of a mapped file has read; whoever reads it later reads the file again."""
    while array is not None and not isinstance(array, memoryview | mmap.mmap):
        array = getattr(array, "base", None)  # also of the object between a strided view and its array
    mapped = array.obj if isinstance(array, memoryview) else array
    if isinstance(mapped, mmap.mmap) and hasattr(mmap, "MADV_DONTNEED"):
        mapped.madvise(mmap.MADV_DONTNEED)


def _read_zip(path: Path, file: BinaryIO, more: Names) -> Any:
    mapped = _map(file)
    with zipfile.ZipFile(file) as archive:
        members = {info.filename: info for info in archive.infolist()}
    pickles = [name for name in members if name.rsplit("/", 1)[-1] == "data.pkl"]
    if len(pickles) != 1:
        raise UserError(f"{path}: a zip archive with {len(pickles)} members data.pkl, a torch file has one")
    folder = pickles[0].removesuffix("data.pkl")

    def member(name: str) -> tuple[int, int]:
        if folder + name not in members:
            raise UserError(f"{path}: the archive has no member {folder + name}; the file is incomplete")
        return _locate(path, mapped, members[folder + name])

    def storage(key: str, dtype: str, count: int) -> np.ndarray:
        start, size = member(f"data/{key}")
        return _elements(path, mapped, dtype, count, start, size)

    if folder + "byteorder" in members:
        start, size = member("byteorder")
        if mapped[start : start + size] != b"little":
            raise UserError(f"{path}: byte order {mapped[start : start + size]!r}; only little-endian files are read")
    start, size = member("data.pkl")
    mapped.seek(start)
    return _Unpickler(path, mapped, storage, more).load()


def _locate(path: Path, mapped: mmap.mmap, info: zipfile.ZipInfo) -> tuple[int, int]:
    """The location of an uncompressed member in the file: (start, size); checks its checksum."""
    if info.compress_type != zipfile.ZIP_STORED:
        raise UserError(f"{path}: member {info.filename} is compressed, torch never does that; not a torch file")
    name_size, extra_size = struct.unpack_from("<HH", mapped, info.header_offset + 26)
    start = info.header_offset + 30 + name_size + extra_size
    with memoryview(mapped) as view:
        if start + info.file_size > len(view):
            raise UserError(f"{path}: member {info.filename} ends beyond the file; the file is incomplete")
        if zlib.crc32(view[start : start + info.file_size]) != info.CRC:
            raise UserError(f"{path}: the checksum of member {info.filename} differs; the file is damaged")
    return start, info.file_size


def _read_stream(path: Path, file: BinaryIO, more: Names) -> Any:
    mapped = _map(file)
    wanted: dict[str, str] = {}

    def declare(key: str, dtype: str, count: int) -> np.ndarray:
        wanted[key] = dtype
        return np.empty(0)

    magic, protocol, facts = (_Unpickler(path, mapped, declare, more).load() for _ in range(3))
    if magic != MAGIC or protocol != STREAM_PROTOCOL:
        raise UserError(f"{path}: a pickle but not a torch file; save the weights as safetensors instead")
    if not facts["little_endian"]:
        raise UserError(f"{path}: big-endian; only little-endian files are read")
    # The storages follow the object that uses them: walk it once to learn their types, and again to build it.
    begin = mapped.tell()
    _Unpickler(path, mapped, declare, more, views=False).load()
    keys = _Unpickler(path, mapped, declare, more).load()

    places: dict[str, tuple[int, int]] = {}
    offset = mapped.tell()
    for key in keys:
        (count,) = struct.unpack_from("<q", mapped, offset)
        if count < 0:
            raise UserError(f"{path}: storage {key} has {count} elements; the file is damaged")
        size = count * _dtype(wanted[key]).itemsize
        places[key] = (offset + 8, size)
        offset += 8 + size
    if offset > len(mapped):
        raise UserError(f"{path}: needs {offset} bytes and has {len(mapped)}; the file is incomplete")

    def storage(key: str, dtype: str, count: int) -> np.ndarray:
        return _elements(path, mapped, dtype, count, *places[key])

    mapped.seek(begin)
    return _Unpickler(path, mapped, storage, more).load()


class Ignored:
    """An object of a training program, left empty: whatever is done to it while reading has no effect."""

    def __new__(cls, *args: Any, **kwargs: Any) -> "Ignored":
        return object.__new__(cls)

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        pass

    def __setstate__(self, state: Any) -> None:
        pass

    def __setitem__(self, key: Any, value: Any) -> None:
        pass

    def append(self, value: Any) -> None:
        pass

    def extend(self, values: Any) -> None:
        pass

    def add(self, value: Any) -> None:
        pass


class _Unpickler(pickle._Unpickler):
    """Resolves names through a table and nothing else.

    The pure Python class: its memo is a dict, where the C one allocates whatever index a file asks for.
    """

    def __init__(self, path: Path, file: mmap.mmap, storage: Storage, more: Names, views: bool = True):
        super().__init__(file)
        self.path, self.storage, self.more, self.names = path, storage, more, _names(views)

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) in self.more:
            return self.more[module, name]
        module = MODULES.get(module, module)
        if (module, name) in IGNORED_NAMES or module.partition(".")[0] in IGNORED_PACKAGES:
            return type("Ignored", (Ignored,), {})
        if (module, name) not in self.names:
            raise UserError(
                f"{self.path}: refused to load {module}.{name}: only tensors and plain values are read; "
                "save the state_dict alone (or as safetensors) and pass that file"
            )
        return self.names[module, name]

    def persistent_load(self, pid: Any) -> np.ndarray:
        match pid:
            case ("storage", str(dtype), str(key), str(), int(count), *view):
                if dtype in STORAGES.values() and view in ([], [None]):
                    return self.storage(key, dtype, count)
        raise UserError(f"{self.path}: reference {str(pid)[:80]} is not to a plain storage; save the state_dict again")


def _names(views: bool) -> dict[tuple[str, str], Any]:
    """The names that a file may use. Built anew for each file, so that none can change them for the next."""

    class Dict(dict):  # OrderedDict; the attributes that torch hangs on a state_dict are left behind
        def __setstate__(self, state: Any) -> None:
            pass

    class Namespace(dict):
        def __setstate__(self, state: dict) -> None:
            self.update(state)

    def rebuild_tensor(storage: np.ndarray, offset: int, shape: tuple, strides: tuple, *_: Any) -> np.ndarray:
        return _view(storage, offset, shape, strides) if views else storage

    return {
        ("collections", "OrderedDict"): Dict,
        ("argparse", "Namespace"): Namespace,
        ("torch._utils", "_rebuild_tensor_v2"): rebuild_tensor,
        ("torch._utils", "_rebuild_parameter"): lambda data, *_: data,
        ("torch", "Size"): tuple,
        **{("torch", storage): dtype for storage, dtype in STORAGES.items()},
        **{("torch", dtype): dtype for dtype in STORAGES.values()},
    }


def _view(storage: np.ndarray, offset: int, shape: tuple, strides: tuple) -> np.ndarray:
    """The strided view of `storage` [count]; offset and strides count elements. Never reaches outside."""
    numbers = (offset, *shape, *strides)
    if len(shape) != len(strides) or not all(type(number) is int and number >= 0 for number in numbers):
        raise ValueError(f"tensor of shape {shape}, strides {strides}, offset {offset}")
    if math.prod(shape) > storage.size:  # a stride of 0 makes any size out of one element
        raise ValueError(f"tensor of {math.prod(shape)} elements on a storage of {storage.size}")
    last = offset + sum((size - 1) * stride for size, stride in zip(shape, strides))
    if 0 not in shape and last >= storage.size:
        raise ValueError(f"tensor reaches element {last} of a storage of {storage.size}")
    if 0 in shape:
        return np.empty(shape, storage.dtype)
    byte_strides = [stride * storage.itemsize for stride in strides]
    return np.lib.stride_tricks.as_strided(storage[offset:], shape, byte_strides, writeable=False)


def _elements(path: Path, mapped: mmap.mmap, dtype: str, count: int, start: int, size: int) -> np.ndarray:
    if count < 0 or count * _dtype(dtype).itemsize > size:
        raise UserError(f"{path}: a storage of {count} {dtype} where the file holds {size} bytes; the file is damaged")
    return np.frombuffer(mapped, _dtype(dtype), count, start)


def _dtype(name: str) -> np.dtype:
    return np.dtype(ml_dtypes.bfloat16) if name == "bfloat16" else np.dtype(name)


def _map(file: BinaryIO) -> mmap.mmap:
    return mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)


def _line(error: Exception) -> str:
    return " ".join(str(error).split())[:200]
