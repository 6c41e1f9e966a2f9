"""Save and load parameters together with their model: OUT/params (Orbax) and OUT/model.json."""

import dataclasses
import functools
import hashlib
import json
import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from diffjax import archive, frozen, models
from diffjax.errors import UserError
from diffjax.files import write_json
from diffjax.parallel.hosts import fetch_whole
from diffjax.parallel.rules import key_path
from diffjax.weights import outputs

# Options of a model that were called otherwise in model.json of earlier versions.
RENAMED = {"codes": "vocabulary", "source_codes": "source_vocabulary"}


def save(out: Path, module: nn.Module, params: Any, meta: Mapping[str, Any]) -> dict[str, Any]:
    """Write `params` and model.json; returns what model.json holds.

    Args:
        out: a folder that is new or empty (UserError otherwise).
        meta: json-able, further entries of model.json: where the parameters come from.
    """
    out = Path(out)
    refuse_full(out)
    name, arguments = describe(module)
    model = {
        "name": name,
        "kwargs": arguments,
        "parameters": sum(np.size(leaf) for leaf in jax.tree.leaves(params)),
        "sha256": tree_sha256(params),
        **meta,
    }
    out.mkdir(parents=True, exist_ok=True)
    archive.save_arrays(out / "params", params)
    write_json(out / "model.json", model)  # last: it says that the rest is complete
    return model


def describe(module: nn.Module) -> tuple[str, dict[str, Any]]:
    """The family and the constructor arguments of a backbone or a frozen network."""
    [name] = [name for name, family in (models.FAMILIES | frozen.FAMILIES).items() if type(module) is family]
    fields = [field.name for field in dataclasses.fields(module) if field.name not in ("parent", "name")]
    return name, {field: getattr(module, field) for field in fields}


def load(out: Path) -> tuple[nn.Module, Any, dict[str, Any]]:
    """(module, parameters as numpy arrays, model.json) of a folder that `save` wrote."""
    model = read_model(Path(out))
    params = _finite(Path(out), archive.load_arrays(Path(out) / "params"))
    create = frozen.create if model["name"] in frozen.FAMILIES else models.create
    return create(model["name"], **model["kwargs"]), params, model


def load_params(out: Path, abstract: Any) -> Any:
    """The parameters that `save` wrote, in the shapes, dtypes and shardings of `abstract`.

    Output channels of a variance that `abstract` has no room for are left out, which the log says: SiT's weights have
    them, and no flow process uses them.

    Raises UserError when the folder holds none, those of another model, or values that are not finite; names them.
    """
    model = read_model(Path(out))
    folder = Path(out) / "params"
    stored, wanted = archive.stored_shapes(folder), archive.shapes(abstract)
    if unused := outputs.unused(stored, wanted):
        shapes = {path: stored[path] for path in unused}
        return _without_variance(folder, abstract, shapes, model["kwargs"]["channels"])
    if differing := archive.differing(stored, wanted):
        kwargs = ", ".join(f"{name}={value}" for name, value in model["kwargs"].items())
        raise UserError(f"{out} holds {model['name']}({kwargs}), another model than asked for: {differing}")
    return _finite(out, archive.load_arrays(folder, abstract))


def _without_variance(folder: Path, abstract: Any, shapes: Mapping[str, tuple[int, ...]], channels: int) -> Any:
    """The parameters of `abstract`, of stored ones with twice the output channels in the arrays `shapes`."""
    logging.getLogger("diffjax").info(outputs.said(str(folder.parent), channels))

    def as_stored(path: Any, leaf: Any) -> Any:
        shape = shapes.get(key_path(path), leaf.shape)
        return jax.ShapeDtypeStruct(shape, leaf.dtype, sharding=getattr(leaf, "sharding", None))

    def cut(path: Any, leaf: jax.Array, wanted: Any) -> jax.Array:
        if key_path(path) not in shapes:
            return leaf
        halve = functools.partial(outputs.first_half, channels=channels)
        return jax.jit(halve, out_shardings=getattr(wanted, "sharding", None))(leaf)

    restored = archive.load_arrays(folder, jax.tree_util.tree_map_with_path(as_stored, abstract))
    return jax.tree_util.tree_map_with_path(cut, _finite(folder.parent, restored), abstract)


def _finite(out: Path, params: Any) -> Any:
    """The parameters. UserError that names those with values that are not finite."""
    on_host = all(isinstance(leaf, np.ndarray) for leaf in jax.tree.leaves(params))
    check: Any = _all_finite if on_host else jax.jit(_all_finite)
    finite = check(params)
    if wrong := sorted(path for path, each in _leaves(finite).items() if not each):
        rest = f" and {len(wrong) - 4} more" if len(wrong) > 4 else ""
        raise UserError(f"{out}: values that are not finite in {', '.join(wrong[:4])}{rest}")
    return params


def _all_finite(tree: Any) -> Any:
    return jax.tree.map(lambda leaf: (np if isinstance(leaf, np.ndarray) else jnp).isfinite(leaf).all(), tree)


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
        kwargs = {
            RENAMED.get(name, name): tuple(value) if isinstance(value, list) else value
            for name, value in model["kwargs"].items()
        }
        return {**model, "name": model["name"], "kwargs": kwargs}
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise UserError(f"{path}: damaged ({type(error).__name__}: {error})") from error
