"""The initial state of a run: fresh parameters, or those of another model (fine-tuning).

Of the latter everything must fit but what `init.new` names, by a part of the model (PARTS) or by the start of paths.
"""

import logging
import re
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np

from diffjax import config, frozen, models
from diffjax.config.load import argument
from diffjax.errors import UserError
from diffjax.experiment import Experiment
from diffjax.options import Options
from diffjax.parallel import hosts
from diffjax.parallel.rules import key_path
from diffjax.training.checkpoint import Checkpoints
from diffjax.training.state import TrainState
from diffjax.weights import outputs, store

# Parts of a model that another data set or image size may need anew: patterns of their parameters' paths.
PARTS = {
    "labels": r"(^|/)label_embed[^/]*/",
    "head": r"^final/",
    "positions": r"(^|/)(\w*positions|relative_bias)$",
}
NULL_CLASS = "null_class"  # one more row of every table of labels; the others are kept


class Start(NamedTuple):
    """The initial parameters of a run.

    Attributes:
        source: where the parameters come from.
        stored: all of them, by path.
        fresh: the paths that start fresh nevertheless.
    """

    source: str
    stored: dict[str, np.ndarray]
    fresh: set[str]


def find_start(experiment: Experiment) -> Start | None:
    """The parameters that a config names; None for fresh ones. UserError when they do not fit."""
    source, new = experiment.initial
    if not source:
        return None
    stored = read(Path(source))
    abstract = experiment.abstract.params
    leaves = {key_path(path): leaf for path, leaf in jax.tree_util.tree_leaves_with_path(abstract)}
    stored |= _without_variance(source, stored, leaves, experiment.channels)
    try:
        return Start(source, stored, fresh_paths(source, stored, leaves, new))
    except UserError as error:
        raise UserError(f"{_other_model(Path(source), experiment) or error}") from error


def _other_model(folder: Path, experiment: Experiment) -> str:
    """In which leaves the model of a folder is another one; "" where it is not or the folder does not say."""
    name, options = model_of(folder)
    if not name:
        return ""
    begin, model = f"init.from = {str(folder)!r} holds another model", experiment.model
    if models.family_of(name) != models.family_of(experiment.name):
        return f"{begin}, a {name} and not a {experiment.name}; give --config.model.name={name}"
    sizes = {name for name, option in models.option_table(name).items() if option.leaf.fixed}
    other = {name: value for name, value in options.items() if name in sizes and value != getattr(model, name)}
    if not other:
        return ""
    words = ", ".join(f"{name} {value} not {getattr(model, name)}" for name, value in other.items())
    if models.published_sizes(name):
        return f"{begin} ({words}); give --config.model.name={name}"
    family = {"name": models.family_of(name)} if models.published_sizes(experiment.name) else {}
    given = " ".join(argument(f"model.{leaf}", value) for leaf, value in {**family, **other}.items())
    return f"{begin} ({words}); give {given}"


def model_of(folder: Path) -> tuple[str, Options]:
    """Name and options of the backbone of a run, or of a folder that `convert` or `ema` wrote; ("", {}): not known."""
    try:
        if _is_run(folder):
            model = config.read(folder / "config.json").model
            return model.name, model.options
        made = store.read_model(folder)
    except UserError:
        return "", {}
    return ("", {}) if made["name"] in frozen.FAMILIES else (made["name"], made["kwargs"])


def _is_run(folder: Path) -> bool:
    return (folder / "checkpoints").is_dir()


def _without_variance(
    source: str, stored: dict[str, np.ndarray], leaves: dict[str, Any], channels: int
) -> dict[str, np.ndarray]:
    """The stored last layer without the output channels of a variance that the model has no room for, as SiT's has."""
    shapes = ({path: tuple(leaf.shape) for path, leaf in tree.items()} for tree in (stored, leaves))
    if found := outputs.twice(*shapes):
        logging.getLogger("diffjax").info(outputs.said(source, channels))
    return {path: outputs.first_half(stored[path], channels) for path in found}


def initial_state(experiment: Experiment, start: Start | None) -> TrainState:
    """The state at step 0, and a printed list of what is new in it when it starts from other parameters."""
    if start is None:
        return experiment.init()
    fresh = experiment.fresh()
    leaves = {key_path(path): leaf for path, leaf in jax.tree_util.tree_leaves_with_path(fresh)}
    kept = {path: extended(start.stored[path], leaf) for path, leaf in leaves.items() if path not in start.fresh}
    if hosts.is_lead():
        print_kept(start, kept, {path: leaves[path] for path in start.fresh})

    def place(path: tuple, leaf: jax.Array) -> jax.Array:
        found = kept.get(key_path(path))
        return leaf if found is None else jax.device_put(found.astype(leaf.dtype), leaf.sharding)

    return experiment.start(jax.tree_util.tree_map_with_path(place, fresh))


def read(folder: Path) -> dict[str, np.ndarray]:
    """Parameters by path of a run folder (the average of its latest step) or of one that `convert` or `ema` wrote."""
    if _is_run(folder):
        checkpoints = Checkpoints(folder, read_only=True)
        latest = checkpoints.latest()
        if latest is None:
            raise UserError(f"init.from = {str(folder)!r}: the run has no checkpoint yet")
        tree: Any = checkpoints.restore_arrays("ema", latest)
    else:
        _, tree, _ = store.load(folder)
    return {key_path(path): leaf for path, leaf in jax.tree_util.tree_leaves_with_path(tree)}


def fresh_paths(source: str, stored: dict[str, np.ndarray], leaves: dict[str, Any], new: tuple[str, ...]) -> set[str]:
    """The parameters that start fresh. UserError for those that do not fit and are not named in `new`."""
    patterns = {name: re.compile(PARTS.get(name, f"^{re.escape(name)}")) for name in new if name != NULL_CLASS}
    every = stored.keys() | leaves.keys()
    if idle := [name for name, pattern in patterns.items() if not any(map(pattern.search, every))]:
        parts = [part for part, pattern in PARTS.items() if any(re.search(pattern, path) for path in every)]
        raise UserError(
            f"init.new = {','.join(new)}: {idle[0]!r} is no part of this model and no path begins with it; valid: "
            f"{', '.join((*parts, NULL_CLASS))}, or starts of paths"
        )
    started = {path for path in every if any(pattern.search(path) for pattern in patterns.values())}
    wrong = [path for path in sorted(every - started) if not fits(stored.get(path), leaves.get(path), path, new)]
    if wrong:
        listed = ", ".join(f"{path} {_shape(stored.get(path))} for {_shape(leaves.get(path))}" for path in wrong[:6])
        rest = f" and {len(wrong) - 6} more" if len(wrong) > 6 else ""
        more = all(_one_row_more(stored.get(path), leaves.get(path)) for path in wrong)
        advice = NULL_CLASS if more else ",".join(sorted({_part(path) for path in wrong}))
        raise UserError(
            f"init.from = {source!r} does not fit this model: {listed}{rest}; name what is to start fresh, for example "
            f"init.new = {advice}"
        )
    return started & leaves.keys()


def _part(path: str) -> str:
    """The part of a model that a parameter belongs to; the start of its path where it has no name."""
    return next((part for part, pattern in PARTS.items() if re.search(pattern, path)), path.split("/")[0])


def fits(stored: np.ndarray | None, leaf: Any, path: str, new: tuple[str, ...]) -> bool:
    if stored is None or leaf is None:
        return False
    if NULL_CLASS in new and re.search(PARTS["labels"], path) and _one_row_more(stored, leaf):
        return True
    return stored.shape == leaf.shape


def _one_row_more(stored: np.ndarray | None, leaf: Any) -> bool:
    if stored is None or leaf is None or stored.ndim != leaf.ndim or stored.ndim < 2:
        return False
    return leaf.shape[-2] == stored.shape[-2] + 1 and (*leaf.shape[:-2], leaf.shape[-1]) == (
        *stored.shape[:-2],
        stored.shape[-1],
    )


def extended(stored: np.ndarray, leaf: jax.Array) -> np.ndarray:
    """Stored values, with the last row of the fresh ones where they have one row more."""
    if stored.shape == leaf.shape:
        return stored
    return np.concatenate([stored, hosts.fetch_whole(leaf)[..., -1:, :]], axis=-2)


def print_kept(start: Start, kept: dict[str, np.ndarray], fresh: dict[str, jax.Array]) -> None:
    count = sum(leaf.size for leaf in kept.values())
    print(f"starting from {start.source}: {len(kept)} arrays with {count:,} parameters are kept", flush=True)
    for path, leaf in sorted(fresh.items()):
        print(f"  new: {path} {_shape(leaf)}", flush=True)
    for path in sorted(path for path in kept if kept[path].shape != start.stored[path].shape):
        print(f"  new: the last row of {path} {_shape(kept[path])}", flush=True)


def _shape(leaf: Any) -> str:
    return "none" if leaf is None else str(list(leaf.shape))
