"""Read npy files of unknown origin: arrays of numbers, and pairs of an array and a label that were pickled.

numpy allocates what a header asks for before it looks at how much there is, and unpickles by importing whatever a file
names. Here a file is in memory before it is looked at, its header is compared with its size, and a pickle can name
nothing but what numpy writes for arrays, for which inert stand-ins do the work.
"""

import io
import math
import pickle
from typing import Any

import numpy as np

from diffjax.errors import UserError

HEADERS = {
    (1, 0): np.lib.format.read_array_header_1_0,
    (2, 0): np.lib.format.read_array_header_2_0,
}
PICKLED = ("f4", "i4", "i8", "u1", "O8")  # dtypes of arrays in pickles
MODULES = ("numpy.core.multiarray", "numpy._core.multiarray")  # before and since numpy 2


def read_array(data: bytes, name: str, shape: tuple[int | None, ...], dtype: str) -> np.ndarray:
    """The array of an npy file. UserError, naming the file, for a damaged one and for another dtype or shape.

    shape: None stands for any size.
    """
    found, stored, fortran, start = _header(data, name)
    alike = len(stored) == len(shape) and all(want in (None, size) for want, size in zip(shape, stored))
    if found != np.dtype(dtype) or not alike:
        words = ", ".join("any" if size is None else str(size) for size in shape)
        raise UserError(f"{name}: {found} of shape {stored}; valid: {dtype} of shape ({words})")
    if len(data) - start != found.itemsize * math.prod(stored):
        size = found.itemsize * math.prod(stored)
        raise UserError(f"{name}: {len(data) - start} bytes where {found} of shape {stored} takes {size}; damaged")
    return np.frombuffer(data, found, offset=start).reshape(stored, order="F" if fortran else "C")


def read_pair(data: bytes, name: str) -> tuple[np.ndarray, int]:
    """The array and the label of an npy file that holds both as pickled objects.

    UserError, naming the file, for a damaged one, for other contents, and for a pickle that names anything else than
    arrays and numbers of numpy.
    """
    found, shape, _, start = _header(data, name)
    if not found.hasobject or shape != (2,):
        raise UserError(f"{name}: {found} of shape {shape}; valid: a pickled pair of an array and a label")
    try:
        pair = _Unpickler(name, io.BytesIO(data[start:])).load()
        array, label = pair.value if isinstance(pair, _Array) else pair
        array, label = (each.value if isinstance(each, _Array) else each for each in (array, label))
        if isinstance(array, np.ndarray) and np.ndim(label) == 0:
            return array, int(label)
    except UserError:
        raise
    except Exception as error:  # a damaged or crafted file can break the reader in any way
        raise UserError(f"{name}: damaged ({type(error).__name__}: {' '.join(str(error).split())[:100]})") from error
    raise UserError(f"{name}: holds other objects than an array and a label")


def _header(data: bytes, name: str) -> tuple[np.dtype, tuple[int, ...], bool, int]:
    """(dtype, shape, whether in Fortran order, where the elements begin) of an npy file."""
    file = io.BytesIO(data)
    try:
        shape, fortran, dtype = HEADERS[np.lib.format.read_magic(file)](file)
    except (ValueError, KeyError, EOFError, SyntaxError) as error:
        raise UserError(f"{name}: damaged or no npy file ({' '.join(str(error).split())[:100]})") from error
    if any(size < 0 for size in shape):
        raise UserError(f"{name}: {dtype} of shape {shape}; valid: sizes from 0 on; damaged")
    return dtype, shape, fortran, file.tell()


class _Unpickler(pickle._Unpickler):  # type: ignore[name-defined]
    """Resolves the names that numpy writes for arrays and nothing else.

    The pure Python class: its memo is a dict, where the C one allocates whatever index a file asks for.
    """

    def __init__(self, name: str, file: io.BytesIO):
        super().__init__(file)
        self.name = name

    def find_class(self, module: str, name: str) -> Any:
        known: dict[tuple[str, str], Any] = {("numpy", "ndarray"): _Array, ("numpy", "dtype"): _Dtype}
        for each in MODULES:
            known |= {(each, "_reconstruct"): lambda *_: _Array(), (each, "scalar"): _scalar}
        if (module, name) not in known:
            raise UserError(f"{self.name}: refused to load {module}.{name}: only arrays and numbers are read")
        return known[module, name]


class _Dtype:
    """Stands in for numpy.dtype, of a little-endian or an object type."""

    def __init__(self, code: str, *_: Any):
        if code not in PICKLED:
            raise ValueError(f"dtype {str(code)[:20]!r}; valid: {', '.join(PICKLED)}")
        self.value = np.dtype(code)

    def __setstate__(self, state: tuple[Any, ...]) -> None:
        if state[1] not in ("<", "|"):
            raise ValueError(f"byte order {str(state[1])[:20]!r}; valid: little-endian")


class _Array:
    """Stands in for numpy.ndarray; `value` is a plain array, or the list of the objects of an object array."""

    value: Any = None

    def __setstate__(self, state: tuple[Any, ...]) -> None:
        _, shape, dtype, fortran, data = state
        if dtype.value.hasobject:
            if not isinstance(data, list) or math.prod(shape) != len(data):
                raise ValueError(f"an array of shape {shape} with other contents")
            self.value = data
        else:
            self.value = np.frombuffer(data, dtype.value).reshape(shape, order="F" if fortran else "C")


def _scalar(dtype: _Dtype, data: bytes) -> Any:
    return np.frombuffer(data, dtype.value, 1)[0]
