"""Parameters on disk with the model they belong to: OUT/params (Orbax) and OUT/model.json."""

import dataclasses
import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import flax.linen as nn
import jax
import numpy as np

from diffjax import archive, frozen, models
from diffjax.errors import UserError
from diffjax.parallel.hosts import fetch_whole
from diffjax.parallel.rules import key_path


def save(out: Path, module: nn.Module, params: Any, meta: Mapping[str, Any]) -> dict[str, Any]:
    """Write `params` and model.json; returns what model.json holds.

    Args:
        out: a folder that is new or empty (UserError otherwise).
        meta: json-able, said of the parameters besides: where they come from.
    """
    out = Path(out)
    refuse_full(out)
    [name] = [name for name, family in (models.FAMILIES | frozen.FAMILIES).items() if type(module) is family]
    fields = [field.name for field in dataclasses.fields(module) if field.name not in ("parent", "name")]
    model = {
        "name": name,
        "kwargs": {field: getattr(module, field) for field in fields},
        "parameters": sum(np.size(leaf) for leaf in jax.tree.leaves(params)),
        "sha256": tree_sha256(params),
        **meta,
    }
    out.mkdir(parents=True, exist_ok=True)
    archive.save_arrays(out / "params", params)
    (out / "model.json").write_text(json.dumps(model, indent=2) + "\n")  # last: it says that the rest is complete
    return model


def load(out: Path) -> tuple[nn.Module, Any, dict[str, Any]]:
    """(module, parameters as numpy arrays, model.json) of a folder that `save` wrote."""
    model = read_model(Path(out))
    params = archive.load_arrays(Path(out) / "params")
    create = frozen.create if model["name"] in frozen.FAMILIES else models.create
    return create(model["name"], **model["kwargs"]), params, model


def load_params(out: Path, abstract: Any) -> Any:
    """The parameters that `save` wrote, in the shapes, dtypes and shardings of `abstract`.

    Raises UserError when the folder holds none, or the parameters of another model; names the differing arrays.
    """
    model = read_model(Path(out))
    folder = Path(out) / "params"
    if differing := archive.differing(archive.stored_shapes(folder), archive.shapes(abstract)):
        kwargs = ", ".join(f"{name}={value}" for name, value in model["kwargs"].items())
        raise UserError(f"{out} holds {model['name']}({kwargs}), another model than asked for: {differing}")
    return archive.load_arrays(folder, abstract)


def tree_sha256(tree: Any) -> str:
    """sha256 over path, dtype, shape and bytes of every array, in the order of the paths.

    Equal values give equal hashes on any machine and mesh. With several processes all of them call it.
    """
    digest = hashlib.sha256()
    for path, leaf in sorted(_leaves(tree).items()):
        array = np.ascontiguousarray(fetch_whole(leaf))
        digest.update(f"{path} {array.dtype.name} {np.shape(leaf)}\n".encode())
        digest.update(array.reshape(-1).view(np.uint8).data)
    return digest.hexdigest()


def refuse_full(out: Path) -> None:
    """Raise UserError unless `out` is new or an empty folder, where arrays can be kept."""
    archive.check_place(out)
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise UserError(f"{out} exists and is not an empty folder; name a new one")


def _leaves(tree: Any) -> dict[str, Any]:
    return {key_path(path): leaf for path, leaf in jax.tree_util.tree_leaves_with_path(tree)}


def read_model(out: Path) -> dict[str, Any]:
    """model.json of a folder that `save` wrote."""
    path = out / "model.json"
    if not path.is_file() or not (out / "params").is_dir():
        raise UserError(
            f"{out} holds no converted parameters (params/ and model.json); `convert --out={out}` writes them"
        )
    try:
        model = json.loads(path.read_text())
        kwargs = {name: tuple(value) if isinstance(value, list) else value for name, value in model["kwargs"].items()}
        return {**model, "name": model["name"], "kwargs": kwargs}
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise UserError(f"{path}: damaged ({type(error).__name__}: {error})") from error
