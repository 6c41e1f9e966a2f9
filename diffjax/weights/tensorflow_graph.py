"""Read the constants of a frozen TensorFlow graph (.pb) without TensorFlow.

The file is one message of protocol buffers: fields, each a number, a kind and a value (see developers.google.com/
protocol-buffers, encoding). Of GraphDef and what it holds these are read, by number:

    GraphDef     1 node, repeated
    NodeDef      1 name, 2 op, 5 attr: entries of 1 key, 2 value
    AttrValue    8 tensor
    TensorProto  1 dtype, 2 tensor_shape, 4 tensor_content, 5 float_val
    TensorShape  2 dim, repeated: 1 size
"""

import mmap
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from diffjax.errors import UserError

FLOAT = 1  # number of the dtype
VARINT, EIGHT_BYTES, BYTES, FOUR_BYTES = 0, 1, 2, 5  # kinds of fields
LONGEST = 10  # bytes of a varint
FIRST = b"\x0a"  # a field of number 1, of bytes: a graph begins with it, and so does a node
EMPTY = memoryview(b"")


def is_graph(start: bytes) -> bool:
    """Whether a file that begins so can be a graph; safetensors may begin so, too, with a brace after 8 bytes."""
    return start.startswith(FIRST) and start[8:9] != b"{"


def read(path: Path) -> dict[str, np.ndarray]:
    """Names of nodes to their float32 arrays, views of the mapped file; numbers that stand alone are left out.

    UserError for a damaged file and for one that holds no such arrays.
    """
    try:
        with path.open("rb") as file:
            graph = memoryview(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ))
        found = dict(_constants(graph))
    except (ValueError, IndexError, TypeError) as error:
        raise UserError(f"{path}: damaged or no TensorFlow graph ({' '.join(str(error).split())[:200]})") from error
    if not found:
        raise UserError(f"{path}: a TensorFlow graph without constants; the weights are not frozen into it")
    return found


def _constants(graph: memoryview) -> Iterator[tuple[str, np.ndarray]]:
    for number, node in _fields(graph):
        if number != 1:
            continue
        fields = list(_fields(_message(node)))
        first = dict(reversed(fields))
        if _text(first.get(2)) != "Const":
            continue
        entries = (dict(_fields(_message(entry))) for number, entry in fields if number == 5)
        attributes = {_text(entry.get(1)): _message(entry.get(2)) for entry in entries}
        tensor = dict(_fields(attributes.get("value", EMPTY))).get(8)
        array = None if tensor is None else _array(_message(tensor))
        if array is not None:
            yield _text(first.get(1)), array


def _array(tensor: memoryview) -> np.ndarray | None:
    """None for other dtypes and numbers that stand alone."""
    fields = list(_fields(tensor))
    last: dict[int, Any] = dict(fields)
    if last.get(1) != FLOAT:
        return None
    dims = [dict(_fields(_message(dim))) for number, dim in _fields(_message(last.get(2))) if number == 2]
    shape = tuple(dim.get(1, 0) for dim in dims)
    if not shape:
        return None
    content = _message(last.get(4)) or b"".join(_message(value) for number, value in fields if number == 5)
    values = np.frombuffer(content, "<f4")
    return np.broadcast_to(values, shape) if values.size == 1 else values.reshape(shape)  # one value stands for all


def _message(value: Any) -> memoryview:
    """The bytes of a field; of one that is not there, none."""
    if value is None:
        return EMPTY
    if not isinstance(value, memoryview):
        raise ValueError("a number in place of bytes")
    return value


def _text(value: Any) -> str:
    return bytes(_message(value)).decode()


def _fields(message: memoryview) -> Iterator[tuple[int, Any]]:
    """(number, value) of each field: an int of varints, a view of the bytes of others."""
    at = 0
    while at < len(message):
        key, at = _varint(message, at)
        kind = key & 7
        if kind == VARINT:
            value, at = _varint(message, at)
            yield key >> 3, value
            continue
        if kind == BYTES:
            size, at = _varint(message, at)
        elif kind in (EIGHT_BYTES, FOUR_BYTES):
            size = 8 if kind == EIGHT_BYTES else 4
        else:
            raise ValueError(f"a field of kind {kind}")
        if at + size > len(message):
            raise ValueError(f"a field of {size} bytes, and {len(message) - at} there")
        yield key >> 3, message[at : at + size]
        at += size


def _varint(message: memoryview, at: int) -> tuple[int, int]:
    """(number, where it ends): 7 bits in a byte, the lowest first; the eighth says that more follow."""
    number = 0
    for count in range(LONGEST):
        byte = message[at + count]
        number |= (byte & 127) << 7 * count
        if byte < 128:
            return number, at + count + 1
    raise ValueError("a number without end")
