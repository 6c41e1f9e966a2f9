"""Configs: a Python file with `get_config(arg)`, overrides of its leaves, and the copy that a run folder keeps."""

import importlib.util
import json
import sys
from pathlib import Path
from typing import Any

from absl import flags
from ml_collections import ConfigDict, config_flags

from diffjax.errors import UserError
from diffjax.trees import leaves

# How a run is laid out on a machine, not what it computes: these may change between two starts of one run.
LAYOUT_LEAVES = ("parallel.", "data.workers", "data.threads")
# What the saved state and data position stand on: these cannot change within a run.
FIXED_LEAVES = ("seed", "batch_size", "model.", "data.")
# What configs of earlier versions lack; their other leaves do not say all that this version needs.
NEWEST_LEAVES = ("ema.kind", "data.augment", "optim.name", "diffusion.weighting")  # the last: not of models of codes
# How a model computes, not what it is.
COMPUTE_LEAVES = ("model.dtype", "model.remat", "model.attention", "model.scan", "model.depthwise")


def load(path_and_argument: str, overrides: list[str] | None = None) -> ConfigDict:
    """The locked config of "configs/recipe.py:argument", with overrides such as "--config.optim.lr=2e-4".

    Raises:
        UserError: no such file, an argument the recipe refuses, an unknown leaf, or a value of another type.
    """
    path, _, argument = path_and_argument.partition(":")
    try:
        config = _module(Path(path)).get_config(argument or None)
    except ValueError as error:
        raise UserError(f"--config={path_and_argument}: {error}") from error
    return override(config.lock(), overrides or [])


def override(config: ConfigDict, arguments: list[str]) -> ConfigDict:
    """Set leaves from command-line arguments, each parsed as the type of the leaf it replaces."""
    known = flatten(config)
    for argument in arguments:
        _check_override(argument, known)
    argv = ["diffjax", *arguments]
    values = flags.FlagValues()
    config_flags.DEFINE_config_dict("config", config, flag_values=values, sys_argv=argv)
    try:
        values(argv)
    except (flags.Error, KeyError, AttributeError, TypeError, ValueError) as error:
        raise UserError(" ".join(str(error).split())) from error
    return config


def _check_override(argument: str, leaves: dict[str, Any]) -> None:
    """Raise UserError unless `argument` is --config.LEAF=VALUE, or --config.LEAF or --noconfig.LEAF for a switch."""
    name, equals, _ = argument.lstrip("-").partition("=")
    leaf = name.removeprefix("no").removeprefix("config.")
    if inside := [known.removeprefix(f"{leaf}.") for known in leaves if known.startswith(f"{leaf}.")]:
        raise UserError(f"--{name}: {leaf!r} is a section; its leaves: {', '.join(inside)}")
    if leaf not in leaves:
        near = [known for known in sorted(leaves) if known.split(".")[-1] == leaf.split(".")[-1] or leaf in known]
        sections = sorted({known.partition(".")[0] for known in leaves})
        hint = f"did you mean {', '.join(near)}?" if near else f"sections: {', '.join(sections)}"
        raise UserError(f"the config has no leaf {leaf!r}; {hint}")
    switch = isinstance(leaves[leaf], bool)
    if name.startswith("no") and (equals or not switch):
        raise UserError(f"--{name}: only for switches, and without a value; write --config.{leaf}=VALUE")
    if not equals and not switch:
        raise UserError(f"--{name}: write --{name}=VALUE")


def _module(path: Path) -> Any:
    if not path.is_file():
        near = ", ".join(sorted(p.stem for p in path.parent.glob("*.py") if p.stem not in ("__init__", "common")))
        raise UserError(f"--config={path}: no such file" + (f"; {path.parent} has {near}" if near else ""))
    root = str(path.resolve().parent.parent)  # recipes import `configs.common`
    if root not in sys.path:
        sys.path.append(root)
    spec = importlib.util.spec_from_file_location(path.stem, path)
    if spec is None or spec.loader is None:
        raise UserError(f"--config={path}: not a Python file")
    module = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
    except (SyntaxError, ImportError) as error:
        place = f"line {error.lineno}: " if isinstance(error, SyntaxError) else ""
        raise UserError(f"--config={path}: {place}{error.msg}") from error
    if not hasattr(module, "get_config"):
        raise UserError(f"--config={path}: the file defines no get_config(arg)")
    return module


def flatten(config: ConfigDict) -> dict[str, Any]:
    """{"optim.lr": 1e-4, ...} with the values that json gives back."""
    return leaves(json.loads(json.dumps(config.to_dict())))


def trained_for(config: ConfigDict) -> dict[str, Any]:
    """The section that says what the parameters of a run mean: its process, or its codes."""
    return (config.tokens if "tokens" in config else config.diffusion).to_dict()


def differences(old: ConfigDict, new: ConfigDict) -> list[str]:
    """The leaves that differ, as "name: old -> new"."""
    a, b = flatten(old), flatten(new)
    absent = "(absent)"
    names = sorted(set(a) | set(b))
    return [f"{n}: {a.get(n, absent)!r} -> {b.get(n, absent)!r}" for n in names if a.get(n, absent) != b.get(n, absent)]


def write(config: ConfigDict, path: Path) -> None:
    """Keep a config as json; complete or not there at all."""
    temporary = path.with_suffix(".tmp")
    temporary.write_text(json.dumps(config.to_dict(), indent=2) + "\n")
    temporary.replace(path)


def read(path: Path) -> ConfigDict:
    """The locked config of a run folder's config.json."""
    if not path.is_file():
        raise UserError(f"{path}: no such file; `python -m diffjax train --workdir={path.parent}` makes a run folder")
    try:
        stored = json.loads(path.read_text())
    except json.JSONDecodeError as error:
        raise UserError(f"{path}: not valid json ({error})") from error
    if not isinstance(stored, dict) or not {"seed", "model", "data"} <= set(stored):
        raise UserError(f"{path}: not the config of a run, which has seed, model, data and more")
    needed = [leaf for leaf in NEWEST_LEAVES if not ("tokens" in stored and leaf.startswith("diffusion."))]
    if missing := [leaf for leaf in needed if leaf not in leaves(stored)]:
        raise UserError(f"{path}: written by an earlier version, which had no {', '.join(missing)}; train it again")
    return ConfigDict(stored).lock()


def check_same_run(stored: ConfigDict, given: ConfigDict, accepted: tuple[str, ...] = ()) -> list[str]:
    """Raise UserError when `given` computes something else than `stored`; return the differences that may be.

    Args:
        accepted: leaves whose change the user has asked for by name.
    """
    if fixed := [name for name in accepted if name.startswith(FIXED_LEAVES) and name not in COMPUTE_LEAVES]:
        raise UserError(f"--accept={','.join(fixed)}: cannot change within a run; use another --workdir")
    found = differences(stored, given)
    allowed = [line for line in found if line.startswith((*LAYOUT_LEAVES, *(f"{name}:" for name in accepted)))]
    refused = [line for line in found if line not in allowed]
    if refused:
        raise UserError(
            f"the folder holds a run with another config: {'; '.join(refused)} (stored -> given); "
            "use another --workdir, or name the leaves in --accept=... to go on with the new values"
        )
    return allowed
