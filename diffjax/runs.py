"""Open trained parameters together with their experiment, for sample, evaluate, sweep and probe."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
from jax.sharding import Mesh

from diffjax import archive, models, weights
from diffjax.config import Config, override, read, recipes
from diffjax.config.load import of_recipe, sampling_leaves, stored_values
from diffjax.config.trained import check_same_process, with_model, with_process
from diffjax.contracts import Tree
from diffjax.data import tokens
from diffjax.errors import UserError
from diffjax.experiment import Experiment, build, mesh_sizes
from diffjax.parallel.mesh import make_mesh
from diffjax.training import ema
from diffjax.training.checkpoint import Checkpoints
from diffjax.weights import store


@dataclass(frozen=True)
class Run:
    """An experiment, its parameters, sharded as the config says, and where these came from, json-able.

    classes: the names of the classes by label, where the run knows them. caveat: what a user of the parameters should
    know of them, one line; "" for nothing.
    """

    experiment: Experiment
    params: Tree
    origin: dict[str, Any]
    classes: tuple[str, ...] = ()
    caveat: str = ""

    def describe(self) -> str:
        if found := self.origin.get("params") or self.origin.get("checkpoint"):
            return str(found)
        return f"{self.origin['workdir']} step {self.origin['step']} ({self.origin['weights']})"


def open_run(
    path: str | Path,
    overrides: list[str] | tuple[str, ...] = (),
    *,
    config: Config | None = None,
    weights: str = "ema",
    step: int | None = None,
    mesh: Mesh | None = None,
) -> Run:
    """The run of a run folder, or of a folder that `convert` or `ema` wrote.

    Args:
        overrides: leaves as on the command line: those of sampling, layout, compute and paths.
        config: of parameters that no run made; the backbone is the folder's own.
        weights: "ema", the average, or "params", the last parameters; of a run folder.
        step: which checkpoint; the latest by default. mesh: in place of the config's.

    Raises:
        UserError: no such folder or step, a leaf that would change what was trained, parameters that do not fit.
    """
    folder = Path(path)
    if (folder / "model.json").is_file():
        return _open_parameters(folder, list(overrides), config, mesh)
    if config is not None:
        raise UserError(f"{folder}: a run has its own config; give only leaves, such as --config.sampling.steps=50")
    return _open_folder(folder, list(overrides), weights, step, mesh)


def open_experiment(folder: Path, overrides: list[str] | tuple[str, ...] = (), mesh: Mesh | None = None) -> Experiment:
    """The experiment of a run folder, without its parameters; see `open_run`."""
    stored = read(folder / "config.json")
    config = override(stored, list(overrides))
    sampling_leaves(stored, config)
    return build(config, mesh or devices_mesh(config), training=False)


def _open_folder(folder: Path, overrides: list[str], weights: str, step: int | None, mesh: Mesh | None) -> Run:
    experiment = open_experiment(folder, overrides, mesh)
    checkpoints = Checkpoints(folder, read_only=True)
    step = checkpoints.latest() if step is None else step
    if step is None or step not in checkpoints.steps():
        raise UserError(
            f"no checkpoint{'' if step is None else f' {step}'} in {folder}; complete: {checkpoints.steps()}"
        )
    kinds = _token_kinds(checkpoints.data_fingerprint(step), experiment)
    abstract = experiment.abstract.params
    if weights == "ema":
        params = checkpoints.restore_item("ema", step, abstract)
        caveat = ema.initial_share_caveat(experiment.averages.ema, step)
    else:
        params, caveat = checkpoints.restore_params(step, abstract), ""
    origin = {"workdir": str(folder), "step": step, "weights": weights, "sha256": store.tree_sha256(params)}
    return Run(experiment, params, origin | kinds, tuple(checkpoints.meta(step).get("classes", ())), caveat)


def _token_kinds(fingerprint: dict[str, Any], experiment: Experiment) -> dict[str, Any]:
    """How a run's tokens were made; UserError when those in its data folder were made otherwise."""
    kinds = fingerprint["source"].get("codes")
    if not kinds:
        return {}
    folder = Path(experiment.data_folder)
    if (folder / tokens.MANIFEST).is_file():  # if the manifest is missing, the decoder reports it where it needs it
        tokens.check_kinds(folder, kinds)
    return {"codes": kinds}


def _open_parameters(folder: Path, overrides: list[str], config: Config | None, mesh: Mesh | None) -> Run:
    made = store.read_model(folder)
    if "config" in made:  # of a run: `ema` keeps it
        own = stored_values(made["config"])
        given = override(own if config is None else config, overrides)
        if config is None:
            sampling_leaves(own, given)
        else:
            check_same_process(folder, own, given, "params")
        config = given
    elif config is None:
        raise UserError(f"{folder}: no run made these parameters; --config says how to sample them, a recipe")
    else:
        config = override(config, overrides)
        if made.get("process"):
            check_same_process(folder, with_process(config, made["process"]), config, "params")
    config = with_model(config, folder, made)
    experiment = build(config, mesh or devices_mesh(config), training=False)
    params = store.load_params(folder, experiment.abstract.params)
    averaged = {"weights": f"ema {made['sigma_rel']:g}"} if "sigma_rel" in made else {}
    return Run(experiment, params, {"params": str(folder), **averaged, "sha256": store.tree_sha256(params)})


def open_checkpoint(
    found: weights.Read,
    overrides: list[str] | tuple[str, ...] = (),
    *,
    config: Config | None = None,
    mesh: Mesh | None = None,
) -> Run:
    """The run of a model that `weights.read` found in a public file.

    config: how to sample it; by default as its family was published. The backbone is that of the file.
    """
    name, made = store.describe(found.module)
    file, family = found.origin["checkpoint"], found.origin["family"]
    if name not in models.FAMILIES:
        raise UserError(f"{file} is a {name}, which draws nothing by itself; valid: the weights of a backbone")
    if config is None and name == "DiGIT":
        raise UserError(f"{file} draws tokens, whose decoder only a recipe says: give --config")
    given = of_recipe(recipes.public(family, name, made, found.size), []) if config is None else config
    config = with_model(override(given, list(overrides)), Path(file), {"name": name, "kwargs": made})
    experiment = build(config, mesh or devices_mesh(config), training=False)
    abstract = experiment.abstract.params
    if differing := archive.differing(archive.shapes(found.params), archive.shapes(abstract)):
        raise UserError(f"{file} does not fit the config: {differing}")
    params = jax.tree.map(lambda leaf, where: jax.device_put(leaf, where.sharding), found.params, abstract)
    return Run(experiment, params, {**found.origin, "sha256": store.tree_sha256(params)})


def open_guide(folder: Path, guided: Experiment) -> Run:
    """A network that can guide that of an experiment, from a run folder or one that `convert` or `ema` wrote."""
    if not any((folder / name).is_file() for name in ("config.json", "model.json")):
        raise UserError(f"--guide={folder} is neither a run folder nor one that `convert` or `ema` wrote")
    made = store.read_model(folder) if (folder / "model.json").is_file() else {}
    own = "config" in made or not made
    run = open_run(folder, config=None if own else guided.config, mesh=guided.mesh)
    check_same_process(folder, run.experiment.config, guided.config, "guide")
    wanted, found = (
        {"channels": each.channels, "condition": each.method.condition} for each in (guided, run.experiment)
    )
    if found != wanted:
        raise UserError(f"--guide={folder} does not fit: it has {found}, the guided model {wanted}")
    run.experiment.model.check_input(guided.size, guided.size)
    return run


def devices_mesh(config: Config) -> Mesh:
    """The mesh of a config, where the devices that are here make one; else all of them along `data`, which is said."""
    sizes = mesh_sizes(config)
    try:
        return make_mesh(sizes)
    except UserError:
        shape = ", ".join(f"{axis} {size}" for axis, size in sizes.items())
        print(f"mesh ({shape}) does not fit {jax.device_count()} devices: parameters are whole on each", flush=True)
        return make_mesh({"data": -1})
