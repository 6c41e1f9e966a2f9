"""Where public weights lie: in one file, in several with an index, or in a folder of diffusers with config.json.

What a file is, its first bytes tell, whatever its name.
"""

import hashlib
import json
import mmap
import pickle
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from diffjax import numpy_pickle, torch_file
from diffjax.errors import UserError
from diffjax.files import file_sha256
from diffjax.weights import public, tensorflow_graph

INDEX = ".index.json"  # {"weight_map": {name of an array: file beside it}}
STEM = "diffusion_pytorch_model"
FOLDER = (f"{STEM}.safetensors", f"{STEM}.safetensors{INDEX}", f"{STEM}.bin")  # weights in a folder of diffusers
NAME = re.compile(r"\w[\w.-]*")  # no folder in it


class Checkpoint(NamedTuple):
    """What was found.

    Attributes:
        content: nested dicts of arrays and plain values, see `torch_file.read`, `tensorflow_graph.read` and
            `numpy_pickle.load`; nested tables of a pickle are one, with names joined by ".".
        config: constructor arguments that lie beside; {} for none.
        files: that hold the weights.
    """

    content: Any
    config: dict[str, Any]
    files: tuple[Path, ...]

    def sha256(self) -> str:
        """Of the file; of several, over their names and hashes."""
        if len(self.files) == 1:
            return file_sha256(self.files[0])
        hashes = "".join(f"{file.name} {file_sha256(file)}\n" for file in self.files)
        return hashlib.sha256(hashes.encode()).hexdigest()


def read(path: Path) -> Checkpoint:
    """A file of weights (.safetensors, .pt, .pth, .ckpt, .bin, .pb, .pickle), an index of several, or a folder.

    path: also the name of a public file that was fetched, see `public.find`.
    UserError for what is missing, damaged or of another format.
    """
    path = public.find(path)
    if path.is_dir():
        weights = next((path / name for name in FOLDER if (path / name).is_file()), None)
        if not weights or not (path / "config.json").is_file():
            raise UserError(f"{path} is no folder of diffusers, which holds config.json and {' or '.join(FOLDER)}")
        return read(weights)
    beside = path.parent / "config.json"
    given = _json(beside) if path.name in FOLDER and beside.is_file() else {}
    config = {name: value for name, value in given.items() if not name.startswith("_")}  # those are of the program
    if path.name.endswith(INDEX):
        return _read_several(path)._replace(config=config)
    return Checkpoint(_read_one(path), config, (path,))


def _read_one(path: Path) -> Any:
    """The content of a file of torch, of safetensors, of TensorFlow, or a pickle of arrays."""
    if path.is_file():
        with path.open("rb") as file:
            start = file.read(torch_file.STREAM_START)
            if tensorflow_graph.is_graph(start):
                return tensorflow_graph.read(path)
            if start.startswith(pickle.PROTO) and not torch_file.is_stream(start):
                found = numpy_pickle.load(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ), str(path))
                return numpy_pickle.flat(found, str(path)) if isinstance(found, Mapping) else found
    return torch_file.read(path)


def _read_several(path: Path) -> Checkpoint:
    places = _json(path).get("weight_map")
    if not isinstance(places, Mapping) or not places:
        raise UserError(f"{path} has no table weight_map, which says in which file each array lies")
    if strange := [name for name in places.values() if not isinstance(name, str) or not NAME.fullmatch(name)]:
        raise UserError(f"{path} names the file {strange[0]!r}; valid: names of files beside it")
    names = sorted(set(places.values()))
    if missing := [name for name in names if not (path.parent / name).is_file()]:
        raise UserError(f"{path.parent} lacks {missing[0]}, which {path.name} names")
    content: dict[str, Any] = {}
    for name in names:
        found = torch_file.read(path.parent / name)
        wanted = [key for key, place in places.items() if place == name]
        if lacking := [key for key in wanted if key not in found]:
            raise UserError(f"{path.parent / name} lacks {lacking[0]}, which {path.name} says is in it")
        content |= {key: found[key] for key in wanted}
    return Checkpoint(content, {}, tuple(path.parent / name for name in names))


def _json(path: Path) -> dict[str, Any]:
    try:
        found = json.loads(path.read_text())
    except ValueError as error:
        raise UserError(f"{path}: not valid json ({error})") from error
    if not isinstance(found, dict):
        raise UserError(f"{path}: not a table")
    return found
