"""Two small sets of real images included in the package (licences: NOTICE.md; made by rebuild.py).

Each file holds `images` uint8 [n, h, w, c], `labels` uint8 [n] and `names`, the class names in label order. What is
checked is the SHA-256 of the arrays, not of the file: the bytes of a zip archive depend on the compressor.
"""

import hashlib
from importlib import resources

import numpy as np

from diffjax.errors import UserError
from diffjax.files import read_npz

SHA256 = {
    "digits8.npz": "c4d2a2d185398ade99f743a2cb7adf715e57f434d7554fa89f2d9333936382ab",
    "emoji32.npz": "178b4256fbf6599f02efdc74ecd7f2d79df39d516d39c90c679720f7a373adea",
}


def read(file: str) -> dict[str, np.ndarray]:
    """The arrays of the embedded `file`. `UserError` when they are not the ones this version was made with."""
    with resources.as_file(resources.files(__package__) / file) as path:
        arrays = read_npz(path)
    if (found := sha256(arrays)) != SHA256[file]:
        raise UserError(
            f"embedded data {file} is damaged: sha256 of its arrays {found}, expected {SHA256[file]}; reinstall diffjax"
        )
    return arrays


def sha256(arrays: dict[str, np.ndarray]) -> str:
    """Hexadecimal SHA-256 over (name, dtype, shape, C-ordered bytes) of the arrays, sorted by name."""
    digest = hashlib.sha256()
    for name in sorted(arrays):
        array = np.ascontiguousarray(arrays[name])
        digest.update(f"{name} {array.dtype.str} {array.shape} ".encode())
        digest.update(array.tobytes())
    return digest.hexdigest()
