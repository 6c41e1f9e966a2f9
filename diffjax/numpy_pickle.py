"""Read pickles of numpy arrays, numbers and plain values without running anything that they name.

A pickle can call anything it can name. Here the names that numpy and JAX write for arrays are answered by inert
stand-ins, and every other name is refused. The modules themselves are neither imported nor called.
"""

import io
import math
import mmap
import pickle
import re
from collections.abc import Mapping
from typing import Any

import numpy as np

from diffjax.errors import UserError

DTYPE = re.compile("[biuf][1248]|O8")  # as numpy writes them, their byte order apart


def load(data: bytes | mmap.mmap, name: str) -> Any:
    """The content of a pickle: dicts, lists and tuples of numpy arrays, numbers and plain values.

    Arrays of objects become the lists of these; text and bytes of Python 2 become text.

    data: all of the file. UserError, with `name` in front, for a damaged pickle and for one of other things.
    """
    try:
        return plain(_Unpickler(io.BytesIO(data) if isinstance(data, bytes) else data, name).load())
    except UserError:
        raise
    except Exception as error:  # a damaged or crafted pickle can break the parser in any way
        reason = " ".join(str(error).split())[:200]
        raise UserError(f"{name}: a damaged pickle ({type(error).__name__}: {reason})") from error


def flat(tree: Mapping[Any, Any], name: str) -> dict[str, Any]:
    """Nested tables as one, the names joined by "."; UserError for a table that is in it twice."""
    found: dict[str, Any] = {}
    tables: set[int] = set()

    def add(table: Mapping[Any, Any], path: tuple[str, ...]) -> None:
        if id(table) in tables:  # few bytes could hold any number of names
            raise UserError(f"{name}: the table {'.'.join(path)[:200]!r} is in it twice")
        tables.add(id(table))
        for key, value in table.items():
            if isinstance(value, Mapping):
                add(value, (*path, str(key)))
            else:
                found[".".join((*path, str(key)))] = value

    add(tree, ())
    return found


def plain(tree: Any) -> Any:
    """A tree of an unpickler that uses `names`, with arrays in place of their stand-ins."""
    return _plain(tree, {})


def _plain(tree: Any, done: dict[int, Any]) -> Any:
    """The same; what the tree holds several times is visited once."""
    if id(tree) not in done:
        match tree:
            case _Array():
                done[id(tree)] = _plain(tree.value, done) if isinstance(tree.value, list) else tree.value
            case dict():
                done[id(tree)] = {key: _plain(value, done) for key, value in tree.items()}
            case list() | tuple():
                done[id(tree)] = type(tree)([_plain(value, done) for value in tree])
            case _:
                return tree
    return done[id(tree)]


class _Array:
    """Stands in for an array; `value` is a plain one, or the list of the objects of an array of objects."""

    value: Any = None

    def __setstate__(self, state: tuple[Any, ...]) -> None:
        _, shape, dtype, fortran, data = state
        self.value = _elements(data, dtype.value, shape, "F" if fortran else "C")


class _Dtype:
    """Stands in for numpy.dtype, of numbers or objects."""

    def __init__(self, code: str, *_: Any):
        if not DTYPE.fullmatch(code):
            raise ValueError(f"dtype {code[:20]!r}; valid: numbers")
        self.value = np.dtype(code)

    def __setstate__(self, state: tuple[Any, ...]) -> None:
        self.value = self.value.newbyteorder(state[1])


def _elements(data: Any, dtype: np.dtype, shape: tuple[int, ...], order: Any) -> Any:
    if not all(type(size) is int and size >= 0 for size in shape):
        raise ValueError(f"an array of shape {shape}")
    if dtype.hasobject:
        if not isinstance(data, list) or math.prod(shape) != len(data):
            raise ValueError(f"an array of shape {shape} with other contents")
        return data
    content = data.encode("latin1") if isinstance(data, str) else data
    return np.frombuffer(content, dtype).reshape(shape, order=order)


def _from_buffer(data: Any, dtype: _Dtype, shape: tuple[int, ...], order: str) -> _Array:
    array = _Array()
    array.value = _elements(data, dtype.value, shape, order)
    return array


def _from_jax(function: Any, arguments: tuple[Any, ...], state: tuple[Any, ...], *_: Any) -> _Array:
    """An array of JAX, which is pickled as numpy's function, its arguments, the array's state and what JAX adds."""
    array = _Array()
    array.__setstate__(state)
    return array


def _scalar(dtype: _Dtype, data: Any) -> Any:
    return np.frombuffer(data.encode("latin1") if isinstance(data, str) else data, dtype.value, 1)[0]


class _Unpickler(pickle._Unpickler):  # type: ignore[name-defined]
    """Resolves names through a table and nothing else.

    The pure Python class: its memo is a dict, where the C one allocates whatever index a file asks for.
    """

    def __init__(self, file: io.BytesIO | mmap.mmap, name: str):
        super().__init__(file, encoding="latin1")
        self.name = name

    def find_class(self, module: str, name: str) -> Any:
        known = names()
        if (module, name) not in known:
            raise UserError(f"{self.name}: refused to load {module}.{name}: only arrays and plain values are read")
        return known[module, name]


def names() -> dict[tuple[str, str], Any]:
    """What stands in for the names of numpy before and since version 2, and of JAX.

    The table is built anew, so that no file changes it.
    """
    found: dict[tuple[str, str], Any] = {
        ("numpy", "ndarray"): None,
        ("numpy", "dtype"): lambda code, *_: _Dtype(code),
        ("jax._src.array", "_reconstruct_array"): lambda *arguments: _from_jax(*arguments),
        ("jax._src.device_array", "reconstruct_device_array"): lambda *arguments: _from_jax(*arguments),
        ("_codecs", "encode"): lambda text, encoding: text.encode("latin1"),
        ("__builtin__", "bytes"): lambda: b"",  # as protocol 2 has them
    }
    for package in ("numpy.core", "numpy._core"):
        found |= {
            (f"{package}.multiarray", "_reconstruct"): lambda *_: _Array(),
            (f"{package}.multiarray", "scalar"): lambda *arguments: _scalar(*arguments),
            (f"{package}.numeric", "_frombuffer"): lambda *arguments: _from_buffer(*arguments),
        }
    return found
