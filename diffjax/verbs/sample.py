"""Draw images and write them as npz (ADM layout), json (the protocol) and png (a grid).

python -m diffjax sample --workdir=runs/a --num=50000 --out=runs/a/samples.npz
python -m diffjax sample --params=params/dit-xl --config=configs/imagenet256.py --num=8 --out=samples.npz
python -m diffjax sample --workdir=runs/stage1 --num=500 --raw --out=codes.npz
python -m diffjax sample --workdir=runs/stage2 --source=codes.npz --num=500 --out=samples.npz
python -m diffjax sample --workdir=runs/a --guide=runs/small --config.sampling.guidance=2 --num=500 --out=samples.npz

Image i depends on (seed, i), its label and the parameters alone: not on the batch size or the number of devices.
With --guide the images are pushed away from those of a worse network (autoguidance, arXiv 2406.02507), given the same
labels, with `sampling.guidance` as the weight; there is no classifier-free guidance then.
"""

import json
import math
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import flax.linen as nn
import jax
import numpy as np
from absl import flags
from ml_collections import ConfigDict
from tqdm import tqdm

from diffjax import models
from diffjax.data import tokens
from diffjax.diffusion import samplers
from diffjax.errors import UserError
from diffjax.evaluation import protocol
from diffjax.parallel import hosts
from diffjax.parallel.mesh import make_mesh, replicated
from diffjax.sampling import samples
from diffjax.training import config as configs
from diffjax.training import generate
from diffjax.training.checkpoint import Checkpoints
from diffjax.training.objective import build_model, build_objective, codes
from diffjax.training.objective.diffusion import build_process
from diffjax.training.setup import abstract_params
from diffjax.verbs import local_path
from diffjax.weights import store

PLACES = ("data.dir", "tokens.weights", "tokens.decoder")  # what lies there is known by its hash


def define_flags(values: flags.FlagValues) -> None:
    text, number = flags.DEFINE_string, flags.DEFINE_integer
    text("workdir", None, "run folder: its config and its checkpoint", flag_values=values)
    text("params", None, "folder written by `convert`, instead of --workdir; needs --config", flag_values=values)
    text("config", None, "recipe, with --params", flag_values=values)
    number("step", None, "which checkpoint; the latest by default", flag_values=values)
    flags.DEFINE_enum("weights", "ema", ["ema", "params"], "average or last parameters", flag_values=values)
    number("num", None, "how many images", lower_bound=1, flag_values=values)
    number("first", 0, "number of the first image", lower_bound=0, flag_values=values)
    number("seed", 0, "seed of the images", lower_bound=0, upper_bound=2**32 - 1, flag_values=values)
    number("batch_size", 128, "images at a time on all devices", lower_bound=1, flag_values=values)
    flags.DEFINE_enum(
        "labels", "interleaved", ["interleaved", "uniform"], "classes in equal parts, or drawn", flag_values=values
    )
    flags.DEFINE_bool(
        "raw",
        False,
        "write what the model makes as it is (arr_0): float32 values, or codes",
        flag_values=values,
    )
    flags.DEFINE_bool("fused", True, "sample the fused form of a backbone that has one (U-DiT)", flag_values=values)
    text("guide", None, "worse network: a run folder, or one written by `convert` or `ema`", flag_values=values)
    text("source", None, "codes to start from, .npz, of a second stage: what --raw wrote", flag_values=values)
    text("out", None, "samples file, .npz", flag_values=values)
    flags.mark_flags_as_required(["num", "out"], values)


def run(values: flags.FlagValues, overrides: list[str]) -> None:
    out = local_path("out", values.out)
    if out.suffix != ".npz" or out.is_dir():
        raise UserError(f"--out={out}: give a file that ends in .npz")
    mesh = make_mesh({"data": -1})
    config, params, origin = _load(values, overrides, mesh)
    model, objective = build_model(config), build_objective(config, autoguided=bool(values.guide))
    if objective.makes != "pictures" and not values.raw:
        raise UserError(f"sample: this model makes {objective.makes}, not pictures; --raw writes them as they are")
    guide = load_guide(local_path("guide", values.guide), config, mesh) if values.guide else None
    guided = {"guide": guide[2]} if guide else {}
    labels, given, source = _labels_and_conditions(values, config, origin)
    make_folder(out)
    form = describe_form(model, params, values.fused)
    sampler = generate.compile_sampler(objective, model, mesh, values.seed, values.fused, guide and guide[:2])
    if values.raw and "tokens" in config:
        sampler = partial(sampler, plan=codes.plan(config, decoded=False))
    batches = generate.generate(sampler, params, given, mesh, values.batch_size, values.first)
    images = _collect(batches, len(labels), math.ceil(len(labels) / values.batch_size), values.raw)
    if hosts.is_lead():
        settings = {"labels": values.labels, "seed": values.seed, "first": values.first, "num": values.num}
        described = describe(config, origin, form, **guided, **(settings | source))
        if values.raw:
            np.savez(out, arr_0=images, arr_1=labels)
            out.with_suffix(".json").write_text(json.dumps(described, indent=2) + "\n")
        else:
            samples.write_samples(out, images, labels, described)
        made = "images" if objective.makes == "pictures" and not values.raw else "raw results"
        print(f"wrote {len(labels)} {made} of {_describe(origin)}, {form}, to {out}")


def _collect(batches: Iterator[np.ndarray], num: int, count: int, raw: bool) -> np.ndarray:
    """All images in one array, uint8 or (raw) float32, on the lead process; the others only compute theirs."""
    images = np.empty(0)
    done = 0
    for batch in tqdm(batches, total=count, unit="batch", disable=None if hosts.is_lead() else True):
        if not hosts.is_lead():
            continue
        part = batch if raw else samples.to_uint8(batch)
        if done == 0:
            images = np.empty((num, *part.shape[1:]), part.dtype)
        images[done : done + len(part)] = part
        done += len(part)
    return images


def _load(values: flags.FlagValues, overrides: list[str], mesh: Any) -> tuple[ConfigDict, Any, dict[str, Any]]:
    """Config, parameters replicated over the mesh, and where they came from."""
    if bool(values.workdir) == bool(values.params):
        raise UserError("sample: give either --workdir or --params (with --config)")
    if values.params:
        if not values.config:
            raise UserError("sample: --params needs --config, the recipe to sample with")
        if values["step"].present or values["weights"].present:
            raise UserError("sample: --step and --weights choose within a run folder; they have no effect on --params")
        config = configs.load(values.config, overrides)
        check_process("params", Path(values.params), store.read_model(Path(values.params)).get("process"), config)
        params = store.load_params(Path(values.params), abstract_params(config, mesh))
        return config, params, {"params": values.params, "sha256": store.tree_sha256(params)}
    if values.config:
        raise UserError("sample: --workdir has its own config; give only leaves, such as --config.sampling.steps=50")
    return load_run(local_path("workdir", values.workdir), overrides, mesh, values.weights, values.step)


def load_run(
    workdir: Path, overrides: list[str], mesh: Any, weights: str = "ema", step: int | None = None
) -> tuple[ConfigDict, Any, dict[str, Any]]:
    """Config, parameters replicated over the mesh, and where they came from, of a run folder."""
    stored = configs.read(workdir / "config.json")
    config = configs.override(stored.copy_and_resolve_references(), overrides)
    changed = [line.partition(":")[0] for line in configs.differences(stored, config)]
    if refused := [name for name in changed if not name.startswith(("sampling.", *PLACES, *configs.COMPUTE_LEAVES))]:
        raise UserError(f"sample: {', '.join(refused)} cannot change what a run was trained for; give sampling leaves")
    abstract = abstract_params(config, mesh)
    checkpoints = Checkpoints(workdir, read_only=True)
    step = checkpoints.latest() if step is None else step
    if step is None or step not in checkpoints.steps():
        raise UserError(f"no checkpoint {'' if step is None else step} in {workdir}; complete: {checkpoints.steps()}")
    folder = Path(config.data.dir)
    kinds = {}
    if "tokens" in config:
        kinds["codes"] = checkpoints.data_fingerprint(step)["source"]["codes"]
        if (folder / tokens.MANIFEST).is_file():  # a missing one is missed where it is needed
            tokens.check_kinds(folder, kinds["codes"])
    if weights == "ema":
        params = checkpoints.restore_item("ema", step, abstract)
    else:
        params = checkpoints.restore_params(step, abstract)
    origin = {"workdir": str(workdir), "step": step, "weights": weights, "sha256": store.tree_sha256(params)}
    return config, params, origin | kinds


def load_guide(folder: Path, config: ConfigDict, mesh: Any) -> tuple[nn.Module, Any, dict[str, Any]]:
    """A network, its parameters, replicated over the mesh, and their origin, that can guide the model of `config`."""
    if (folder / "config.json").is_file():
        other, params, origin = load_run(folder, [], mesh)
        check_process("guide", folder, configs.trained_for(other), config)
        model: Any = build_model(other)
    else:
        model, arrays, made = store.load(folder)
        check_process("guide", folder, made.get("process"), config)
        params = jax.device_put(arrays, replicated(mesh))
        origin = {"params": str(folder), "sha256": made["sha256"]}
    wanted = {"channels": config.data.channels, "num_classes": config.data.num_classes}
    found = {name: getattr(model, name) for name in wanted}
    if found != wanted:
        raise UserError(f"--guide={folder} does not fit: it has {found}, the guided model {wanted}")
    model.check_input(config.data.size, config.data.size)
    return model, params, origin


def check_process(flag: str, folder: Path, process: dict[str, Any] | None, config: ConfigDict) -> None:
    """UserError unless samplers would call the network of `folder` and read its output as those of `config`.

    process: the `diffusion` section it was trained with; None where nobody recorded it, as with public checkpoints.
    """
    if process is None or process == configs.trained_for(config):
        return
    if "tokens" in config or "process" not in process:
        raise UserError(f"--{flag}={folder} was trained for something else: {process}")
    other = ConfigDict({"diffusion": process})
    plans = [jax.tree.leaves(samplers.plan(build_process(each), "edm", 4)) for each in (config, other)]
    if not all(np.array_equal(*pair) for pair in zip(*plans)):
        trained = {name: value for name, value in process.items() if value != config.diffusion[name]}
        raise UserError(f"--{flag}={folder} was trained with another process: diffusion of {trained}")


def make_folder(out: Path) -> None:
    """Before sampling, so that a place that cannot be written costs no time."""
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"--out={out} cannot be written: {error.strerror}; give a writable folder") from error


def describe_form(model: nn.Module, params: Any, fused: bool) -> str:
    """In which form of the backbone the images are drawn, in words."""
    shapes = jax.eval_shape(lambda params: models.fused(model, params)[1], params)
    count, left = (sum(leaf.size for leaf in jax.tree.leaves(tree)) for tree in (params, shapes))
    return f"fused: {left:,} of {count:,} parameters" if fused and left < count else "as trained"


def _labels_and_conditions(
    values: flags.FlagValues, config: ConfigDict, origin: dict[str, Any]
) -> tuple[np.ndarray, np.ndarray, dict[str, Any]]:
    """The labels [n] to write, what the model draws images of (the same, or codes [n, m] of a first stage), and where
    the latter come from."""
    if not ("tokens" in config and codes.has_source(config)):
        if values.source:
            raise UserError(f"--source={values.source}: only for a second stage, which draws codes of codes")
        labels = _labels(values, config.data.num_classes)
        return labels, labels, {}
    if not values.source:
        raise UserError("sample: this model draws codes of a decoder, given codes of features: give them as --source")
    if values["labels"].present:
        raise UserError("sample: the labels are those of --source; leave out --labels")
    path = local_path("source", values.source)
    made = _made_of(path, origin)
    labels, given = read_source(path, values.first, values.num, config)
    return labels, given, {"labels": "source", "source": {"file_sha256": samples.file_sha256(path), **made}}


def _made_of(path: Path, origin: dict[str, Any]) -> dict[str, Any]:
    """The origin of a file of codes, by the json beside it. UserError unless they are what this run was trained on."""
    beside = path.with_suffix(".json")
    if not path.is_file() or not beside.is_file():
        raise UserError(f"--source={path}: it or {beside.name} is missing; `sample --raw` of a first stage writes both")
    try:
        made: dict[str, Any] = json.loads(beside.read_text())["origin"]
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(f"{beside}: not what `sample --raw` writes ({type(error).__name__})") from error
    wanted, found = (each.get("codes", {}).get("features") for each in (origin, made))
    if wanted and wanted != found:
        raise UserError(f"--source={path} holds codes of {found}, and this run was trained on codes of {wanted}")
    return made


def read_source(path: Path, first: int, num: int, config: ConfigDict) -> tuple[np.ndarray, np.ndarray]:
    """Labels [num] and codes int32 [num, m] number `first` and following, of a file that `sample --raw` wrote."""
    try:
        with np.load(path, allow_pickle=False) as arrays:
            codes, labels = arrays["arr_0"], arrays["arr_1"]
    except Exception as error:  # a damaged file can break numpy and zipfile in any way
        reason = " ".join(str(error).split())[:200]
        raise UserError(f"--source={path}: not an npz of arr_0 and arr_1 ({reason})") from error
    length, count = config.data.size**2, config.data.codes
    if codes.ndim != 2 or codes.shape[1] != length or not np.issubdtype(codes.dtype, np.integer):
        raise UserError(f"--source={path} holds {codes.dtype} {codes.shape}; expected integers [n, {length}]")
    if len(codes) < first + num:
        raise UserError(f"--source={path} has {len(codes)} rows; --first={first} and --num={num} need {first + num}")
    if codes.min() < 0 or codes.max() >= count:
        raise UserError(f"--source={path} holds codes from {codes.min()} to {codes.max()}; valid: 0 to {count - 1}")
    chosen = slice(first, first + num)
    return labels[chosen].astype(np.int32), codes[chosen].astype(np.int32)


def _labels(values: flags.FlagValues, num_classes: int) -> np.ndarray:
    stop = values.first + values.num
    if values.labels == "uniform":
        return generate.uniform_labels(values.seed, stop, num_classes)[values.first :]
    return generate.interleaved_labels(stop, num_classes)[values.first :]


def describe(
    config: ConfigDict, origin: dict[str, Any], form: str, guide: dict[str, Any] | None = None, **settings: Any
) -> dict[str, Any]:
    """How images were made, json-able. guide: its origin. settings: labels, seed, first, num."""
    guided = {"guide_sha256": guide["sha256"]} if guide else {}
    return {
        "model": config.model.to_dict(),
        "form": form,
        "data": config.data.name,
        "origin": origin,
        **({"guide": guide} if guide else {}),
        "process": configs.trained_for(config),
        "sampling": config.sampling.to_dict() | guided,
        **settings,
        "rounding": samples.ROUNDING,
        "precision": config.model.dtype,
        "code_version": protocol.code_version(),
    }


def _describe(origin: dict[str, Any]) -> str:
    if "params" in origin:
        return origin["params"]
    return f"{origin['workdir']} step {origin['step']} ({origin['weights']})"
