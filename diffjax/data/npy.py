"""Read npy files of unknown origin: arrays of numbers, and pairs of an array and a label that were pickled.

numpy allocates what a header asks for before it looks at how much there is, and unpickles by importing whatever a file
names. Here a file is in memory before it is looked at, its header is compared with its size, and pickles are read by
`numpy_pickle`.
"""

import io
import math

import numpy as np

from diffjax import numpy_pickle
from diffjax.errors import UserError

HEADERS = {
    (1, 0): np.lib.format.read_array_header_1_0,
    (2, 0): np.lib.format.read_array_header_2_0,
}
PICKLED = ("float32", "int32", "int64", "uint8")  # dtypes of arrays in pairs


def read_array(data: bytes, name: str, shape: tuple[int | None, ...], dtype: str) -> np.ndarray:
    """The array of an npy file. UserError, naming the file, for a damaged one and for another dtype or shape.

    shape: None stands for any size.
    """
    found, stored, fortran, start = header(data, name)
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
    found, shape, _, start = header(data, name)
    if not found.hasobject or shape != (2,):
        raise UserError(f"{name}: {found} of shape {shape}; valid: a pickled pair of an array and a label")
    match numpy_pickle.load(data[start:], name):
        case [np.ndarray() as array, int() | np.integer() | np.ndarray(shape=()) as label]:
            if array.dtype not in PICKLED:
                raise UserError(f"{name}: an array of {array.dtype}; valid: {', '.join(PICKLED)}")
            return array, int(label)
    raise UserError(f"{name}: holds other objects than an array and a label")


def header(data: bytes, name: str) -> tuple[np.dtype, tuple[int, ...], bool, int]:
    """(dtype, shape, whether in Fortran order, where the elements begin) of an npy file."""
    file = io.BytesIO(data)
    try:
        shape, fortran, dtype = HEADERS[np.lib.format.read_magic(file)](file)
    except (ValueError, KeyError, EOFError, SyntaxError) as error:
        raise UserError(f"{name}: damaged or no npy file ({' '.join(str(error).split())[:100]})") from error
    if any(size < 0 for size in shape):
        raise UserError(f"{name}: {dtype} of shape {shape}; valid: sizes from 0 on; damaged")
    return dtype, shape, fortran, file.tell()
