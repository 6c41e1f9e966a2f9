"""LSUN from the lmdb folders that its zips hold: each value is the file of an image (JPEG or WebP)."""

import hashlib
from pathlib import Path
from typing import Any

import numpy as np

from diffjax.data.preparation.containers import LARGEST, reading
from diffjax.data.preparation.originals import Originals, describe
from diffjax.errors import UserError

SUFFIX = {"train": "train", "validation": "val"}


def read(category: str, path: Path, split: str) -> Originals:
    """The images of a category in the order of their keys. There are no classes."""
    folder = _folder(path, f"{category}_{SUFFIX[split]}_lmdb")
    lmdb = _lmdb()
    try:
        environment = lmdb.open(str(folder), readonly=True, lock=False, readahead=False, create=False, max_readers=512)
        with environment.begin() as transaction, transaction.cursor() as cursor:
            keys = list(cursor.iternext(keys=True, values=False))
    except lmdb.Error as error:
        raise UserError(f"{folder} cannot be read: {error}; extract the zip again") from error

    def load(number: int) -> bytes:
        with reading(folder, names[number]):
            try:
                with environment.begin() as transaction:
                    value = transaction.get(keys[number])
            except lmdb.Error as error:
                raise ValueError(str(error)) from error
            if value is None or len(value) > LARGEST:
                raise ValueError("no image")
            return value

    names = [key.decode("latin1") for key in keys]
    digest = hashlib.sha256(b"\n".join(keys)).hexdigest()
    return Originals(
        names, np.zeros(len(keys), np.int32), load, describe([folder / "data.mdb"]), digest, close=environment.close
    )


def _folder(path: Path, name: str) -> Path:
    for folder in (path, path / name):
        if (folder / "data.mdb").is_file():
            return folder
    extract = f"; extract {name}.zip" if (path / f"{name}.zip").exists() or path.suffix == ".zip" else ""
    raise UserError(f"{path} holds no lmdb, {name}/data.mdb{extract}")


def _lmdb() -> Any:
    try:
        import lmdb
    except ImportError as error:
        raise UserError("LSUN is read with the package lmdb; install it with: pip install -e '.[prepare]'") from error
    return lmdb
