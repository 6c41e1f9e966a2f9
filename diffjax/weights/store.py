"""Parameters on disk with the model they belong to: OUT/params (Orbax) and OUT/model.json."""

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
import orbax.checkpoint as ocp

from diffjax import frozen, models
from diffjax.errors import UserError
from diffjax.files import write_json
from diffjax.parallel.hosts import fetch_whole
from diffjax.parallel.rules import key_path
from diffjax.weights import outputs


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
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save((out / "params").absolute(), params)
    write_json(out / "model.json", model)  # last: it says that the rest is complete
    return model


def load(out: Path) -> tuple[nn.Module, Any, dict[str, Any]]:
    """(module, parameters as numpy arrays, model.json) of a folder that `save` wrote."""
    model = read_model(Path(out))
    with ocp.StandardCheckpointer() as checkpointer:
        stored = checkpointer.metadata((Path(out) / "params").absolute()).item_metadata.tree
    params = load_params(out, jax.tree.map(lambda leaf: np.empty(leaf.shape, leaf.dtype), stored))
    create = frozen.create if model["name"] in frozen.FAMILIES else models.create
    return create(model["name"], **model["kwargs"]), params, model


def load_params(out: Path, abstract: Any) -> Any:
    """The parameters that `save` wrote, in the shapes, dtypes and shardings of `abstract`.

    Output channels of a variance that `abstract` has no room for are left out, which the log says: SiT's weights have
    them, and no flow process uses them.

    Raises UserError when the folder holds none, those of another model, or values that are not finite; names them.
    """
    folder = (Path(out) / "params").absolute()
    model = read_model(Path(out))
    with ocp.StandardCheckpointer() as checkpointer:
        stored = _shapes(checkpointer.metadata(folder).item_metadata.tree)
        wanted = _shapes(abstract)
        if unused := outputs.unused(stored, wanted):
            shapes = {path: stored[path] for path in unused}
            return _without_variance(checkpointer, folder, abstract, shapes, model["kwargs"]["channels"])
        differing = [path for path in sorted(stored | wanted) if stored.get(path) != wanted.get(path)]
        if differing:
            listed = ", ".join(f"{path} {stored.get(path)} not {wanted.get(path)}" for path in differing[:4])
            rest = f" and {len(differing) - 4} more" if len(differing) > 4 else ""
            kwargs = ", ".join(f"{name}={value}" for name, value in model["kwargs"].items())
            raise UserError(f"{out} holds {model['name']}({kwargs}), another model than asked for: {listed}{rest}")
        return _finite(out, checkpointer.restore(folder, abstract))


def _without_variance(
    checkpointer: ocp.StandardCheckpointer,
    folder: Path,
    abstract: Any,
    shapes: Mapping[str, tuple[int, ...]],
    channels: int,
) -> Any:
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

    restored = checkpointer.restore(folder, jax.tree_util.tree_map_with_path(as_stored, abstract))
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
    """Raise UserError unless `out` is new or an empty folder."""
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise UserError(f"{out} exists and is not an empty folder; name a new one")


def _leaves(tree: Any) -> dict[str, Any]:
    return {key_path(path): leaf for path, leaf in jax.tree_util.tree_leaves_with_path(tree)}


def _shapes(tree: Any) -> dict[str, tuple[int, ...]]:
    return {path: tuple(leaf.shape) for path, leaf in _leaves(tree).items()}


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
