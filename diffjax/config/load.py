"""Resolve a recipe and overrides, or a run folder's config.json, to a `Config`."""

import contextlib
import importlib
import importlib.util
import json
import shlex
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

from ml_collections import ConfigDict

from diffjax import models
from diffjax.config.earlier import DEFAULTS, VERSION, modern
from diffjax.config.schema import Config, Spec, hint, is_read, leaves, model_leaves, read_leaves, resolve
from diffjax.errors import UserError
from diffjax.files import local_path, write_json
from diffjax.options import REQUIRED, Value, parse
from diffjax.trees import leaves as flat

FREE = ("place", "layout", "watch")  # kinds of leaves that may change between two starts of a run
GIVEN_BACK = 8  # leaves that a message spells out as arguments


def base(model: str = "") -> ConfigDict:
    """All leaves at their defaults, as a recipe's starting point; `model`: a published name or a family.

    Of any type until `resolve` checks them: some leaves, such as data.scale, take a number or several.
    """
    return ConfigDict(nested(_defaults(leaves(model))), type_safe=False)


def _defaults(specs: Mapping[str, Spec]) -> dict[str, Value]:
    return {path: spec.option.default for path, spec in specs.items() if spec.option.default is not REQUIRED}


def model_defaults(name: str) -> dict[str, Value]:
    """The leaves of section `model` for a backbone, those without a default left out."""
    specs = {spec.path: spec for spec in model_leaves(name)}
    return {path.removeprefix("model."): value for path, value in _defaults(specs).items()}


def nested(values: Mapping[str, Value]) -> dict[str, Any]:
    """{"a.b": 1} -> {"a": {"b": 1}}."""
    tree: dict[str, Any] = {}
    for path, value in values.items():
        *sections, leaf = path.split(".")
        inner = tree
        for section in sections:
            inner = inner.setdefault(section, {})
        inner[leaf] = value
    return tree


def load(path_and_argument: str, overrides: list[str] | None = None) -> Config:
    """The config of "configs/recipe.py:argument", with overrides such as "--config.optim.lr=2e-4".

    Raises:
        UserError: no such file, an argument the recipe refuses, an unknown leaf, or a value that is not valid.
    """
    text, _, argument = path_and_argument.partition(":")
    try:
        path = local_path(path_and_argument if "://" in path_and_argument else text)
    except UserError as error:
        raise UserError(f"--config={path_and_argument}: {error}") from error
    try:
        with _importable(path):
            recipe = _module(path).get_config(argument or None)
    except UserError:
        raise
    except (ValueError, TypeError, AttributeError, KeyError) as error:
        raise UserError(f"--config={path_and_argument}: {' '.join(str(error).split())}") from error
    return of_recipe(recipe, overrides or [])


def of_recipe(recipe: ConfigDict, overrides: list[str]) -> Config:
    """The config of what a recipe returned, with overrides as of `load`."""
    return _overridden(flat(recipe.to_dict()), overrides)


def override(config: Config, arguments: list[str]) -> Config:
    """The config with leaves set from command-line arguments, each parsed as the type of the leaf."""
    return _overridden(dict(config.values), arguments)


def _overridden(values: dict[str, Value], arguments: list[str]) -> Config:
    """The config of leaves with others set, each parsed as the type of the leaf.

    Leaves that were read before and no longer are, for instance since another sampler was chosen, go back to their
    defaults; a given leaf that is not read is refused.
    """
    if not arguments:
        return resolve(values)
    before = read_leaves(values) if values.get("model.name") else set()
    given = dict(_split(argument) for argument in arguments)
    if "model.name" in given:
        values = _other_model(values, str(given["model.name"]))
    specs = leaves(str(values.get("model.name", "")))
    today = modern(given, values)
    for leaf, text in today.items():
        if inside := [known.removeprefix(f"{leaf}.") for known in specs if known.startswith(f"{leaf}.")]:
            raise UserError(f"--config.{leaf}: {leaf!r} is a section; its leaves: {', '.join(inside)}")
        if leaf not in specs:
            raise UserError(f"the config has no leaf {leaf!r}{hint(leaf, specs)}")
        option = specs[leaf].option
        if isinstance(text, bool) and option.type is not bool:
            raise UserError(f"--config.{leaf}: write --config.{leaf}=VALUE")
        values[leaf] = parse(f"--config.{leaf}", option, text) if isinstance(text, str) else text
    for leaf in today:
        interval = f"{leaf.rpartition('.')[0]}.every_steps"
        if leaf.startswith("evals.") and leaf != interval and not values[interval]:
            raise UserError(f"--config.{leaf} is not read with {interval} = 0")
    return resolve(values, forget=before - set(today))


def _split(argument: str) -> tuple[str, str | bool]:
    """--config.LEAF=VALUE as (leaf, text); a bare --config.LEAF or --noconfig.LEAF as (leaf, True or False)."""
    name, equals, text = argument.lstrip("-").partition("=")
    leaf = name.removeprefix("no").removeprefix("config.")
    if name.startswith("no") and equals:
        raise UserError(f"--{name}: takes no value; write --config.{leaf}=VALUE")
    return leaf, text if equals else not name.startswith("no")


def _other_model(values: Mapping[str, Value], name: str) -> dict[str, Value]:
    """The values with another backbone: what was set for the one before stays where the new one has it."""
    old = str(values.get("model.name", ""))
    before = {spec.path: spec.option.default for spec in model_leaves(old)}
    after = {spec.path: spec.option.default for spec in model_leaves(name)}
    same_family = bool(old) and models.family_of(old) == models.family_of(name)
    stays = after.keys() - {f"model.{size}" for size in models.published_sizes(name)}  # a published name says its sizes

    def is_kept(path: str, value: Value) -> bool:
        return path not in before or (path in stays and (same_family or value != before[path]))

    kept = {path: value for path, value in values.items() if is_kept(path, value)}
    return {**{path: value for path, value in after.items() if value is not REQUIRED}, **kept, "model.name": name}


def _module(path: Path) -> ModuleType:
    if not path.is_file():
        near = ", ".join(sorted(p.stem for p in path.parent.glob("*.py") if p.stem not in ("__init__", "common")))
        raise UserError(f"--config={path}: no such file" + (f"; {path.parent} has {near}" if near else ""))
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


@contextlib.contextmanager
def _importable(recipe: Path) -> Iterator[None]:
    """A recipe can import the package that it lies in and `configs.common`, whatever other modules have these names.

    The latter is diffjax/config/recipes.py, unless it lies in a `configs` that has its own. Modules of these names that
    are imported already are set aside meanwhile, and nothing that is imported here outlives it.
    """
    folder = recipe.resolve().parent
    names = {"configs"} | ({folder.name} if (folder / "__init__.py").is_file() else set())
    before, aside = list(sys.path), {module: sys.modules[module] for name in names for module in _of_package(name)}
    for module in aside:
        del sys.modules[module]
    if len(names) > 1 or folder.name in names:
        sys.path.insert(0, str(folder.parent))
    if folder.name != "configs" or not (folder / "common.py").is_file():
        package, common = ModuleType("configs"), importlib.import_module("diffjax.config.recipes")
        package.__path__ = [str(folder)] if folder.name == "configs" else []
        sys.modules |= {"configs": package, "configs.common": common}
        package.common = common  # type: ignore[attr-defined]
    importlib.invalidate_caches()
    try:
        yield
    finally:
        sys.path[:] = before
        for name in names:
            for module in _of_package(name):
                del sys.modules[module]
        sys.modules.update(aside)


def _of_package(name: str) -> list[str]:
    """The names of the imported modules of a package."""
    return [module for module in list(sys.modules) if module.partition(".")[0] == name]


def differences(old: Config, new: Config) -> dict[str, str]:
    """The leaves that differ, each with "name: old -> new"."""
    absent = "(absent)"
    a, b = old.values, new.values
    names = sorted(set(a) | set(b))
    pairs = {name: (a.get(name, absent), b.get(name, absent)) for name in names}
    return {name: f"{name}: {x!r} -> {y!r}" for name, (x, y) in pairs.items() if x != y}


def write(config: Config, path: Path) -> None:
    """Keep a config as json; complete or not there at all."""
    write_json(path, stored(config))


def stored(config: Config) -> dict[str, Any]:
    """The content of config.json."""
    return {"version": VERSION, **nested(config.values)}


def read(path: Path) -> Config:
    """The config of a run folder's config.json, of this or any earlier version."""
    stored = _read_json(path)
    try:
        return stored_values(stored)
    except UserError as error:
        raise UserError(f"{path}: {error}") from error


def resumed(path: Path, config: Config, arguments: list[str]) -> Config:
    """The config, with the run's own meaning of leaves that its config.json does not know.

    Such a file is of an earlier version, and its recipe may choose a new leaf since; the run continues without it.

    Args:
        path: config.json of the run folder.
        arguments: of the command line; leaves that are given there are taken from there.
    """
    old = read(path)
    _, known = _stored_leaves(_read_json(path))
    given = modern(dict(_split(argument) for argument in arguments), config.values)
    kept = {leaf: old.values[leaf] for leaf in old.values.keys() & config.values.keys() - known.keys() - given.keys()}
    return resolve({**config.values, **kept}, forget=kept)


def _read_json(path: Path) -> dict[str, Any]:
    if not path.is_file():
        raise UserError(f"{path}: no such file; `python -m diffjax train --workdir={path.parent}` makes a run folder")
    try:
        stored = json.loads(path.read_text())
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror}") from error
    except ValueError as error:
        raise UserError(f"{path}: not valid json ({error})") from error
    if not isinstance(stored, dict) or not {"seed", "model", "data"} <= set(stored):
        raise UserError(f"{path}: not the config of a run, which has seed, model, data and more")
    return stored


def stored_values(stored: Mapping[str, Any]) -> Config:
    """The config of what config.json holds."""
    version, values = _stored_leaves(stored)
    return resolve({**_earlier_defaults(version, values), **values}, forget=values if version == 1 else ())


def _stored_leaves(stored: Mapping[str, Any]) -> tuple[int, dict[str, Value]]:
    """The version of what config.json holds, and its leaves with today's names."""
    tree = dict(stored)
    version = tree.pop("version", 1)
    if version not in range(1, VERSION + 1) and not (isinstance(version, int) and version > VERSION):
        raise UserError(f"version = {version!r}: valid: a whole number")
    if version > VERSION:
        raise UserError(f"written by a later version of diffjax (config version {version}, this one reads {VERSION})")
    values = flat(tree)
    return version, modern(values, values, whole=version == 1) if version < VERSION else values


def _earlier_defaults(version: int, values: Mapping[str, Value]) -> dict[str, Value]:
    """The defaults, in its version, of leaves that a stored config reads and lacks."""
    specs = leaves(str(values.get("model.name", "")))
    given, defaults = {**_defaults(specs), **values}, DEFAULTS.get(version, {})
    return {leaf: value for leaf, value in defaults.items() if leaf not in values and is_read(specs[leaf], given)}


def check_same_run(
    stored: Config, given: Config, accepted: tuple[str, ...] = (), misfit: Callable[[], str] = str
) -> dict[str, str]:
    """Raise UserError when `given` computes something else than `stored`; return `differences`, which may be then.

    Args:
        accepted: leaves whose change the user has asked for by name.
        misfit: says why the state of a run of `stored` does not fit `given`; "" where it fits.
    """
    specs = leaves(str(stored.values["model.name"])) | leaves(str(given.values["model.name"]))
    if unknown := [name for name in accepted if name not in specs]:
        raise UserError(f"--accept={','.join(unknown)}: the config has no such leaf{hint(unknown[0], specs)}")
    # Images that latents were made of: training does not see them.
    unseen = {name for name in specs if name.startswith("images.") and given.data.name == "latents"}
    fixed = {name for name, spec in specs.items() if spec.option.leaf.fixed and name not in unseen}
    if bool(stored.init.from_) != bool(given.init.from_):  # the parameters may have moved, but not come from elsewhere
        fixed |= {"init.from"}
    if wrong := [name for name in accepted if name in fixed]:
        raise UserError(f"--accept={','.join(wrong)}: cannot change within a run; use another --workdir")
    found = differences(stored, given)
    free = {n for n in found if n in unseen or (n not in fixed and (specs[n].kind in FREE or n in accepted))}
    changed = [name for name in found if specs[name].kind not in FREE and name not in unseen]
    reason = misfit() if changed and not fixed & found.keys() else ""
    if reason and all(name in accepted for name in changed):
        raise UserError(f"--accept={','.join(changed)}: the run's state does not fit: {reason}; use another --workdir")
    if refused := {name: line for name, line in found.items() if name not in free}:
        accept = f", or --accept={','.join(refused)} to continue with the new values"
        raise UserError(
            f"the folder holds a run with another config: {'; '.join(refused.values())} (stored -> given); "
            f"use another --workdir{_as_stored(stored, refused)}{'' if fixed & refused.keys() or reason else accept}"
        )
    return found


def _as_stored(stored: Config, refused: Iterable[str]) -> str:
    """How a command line gives the leaves that it may not change, in words; of many, that it may leave out --config."""
    texts = [argument(name, stored.values[name]) for name in refused if name in stored.values]
    if not texts or len(texts) > GIVEN_BACK:
        return ", or leave out --config, which continues with the stored one"
    return f", or give {' '.join(texts)} to continue as before"


def argument(leaf: str, value: Value) -> str:
    """--config.LEAF=VALUE as `parse` understands it, and a shell passes it on."""
    if isinstance(value, tuple | list):
        text = ",".join(map(str, value))
    else:
        text = str(value).lower() if value is None or isinstance(value, bool) else str(value)
    return f"--config.{leaf}={shlex.quote(text) if text else ''}"


def check_same_on_all(texts: Sequence[str]) -> None:
    """Raise UserError where a process has another config than the first; the same files may lie elsewhere.

    Args:
        texts: by process, `stored` as json.
    """
    first, *others = texts
    for number, other in enumerate(others, start=1):
        if other == first:
            continue
        a, b = (stored_values(json.loads(text)) for text in (first, other))
        places = {name for name, spec in leaves(a.model.name).items() if spec.kind == "place"}
        moved = {name for name in places if a.values.get(name) and b.values.get(name)}
        if wrong := [line for name, line in differences(a, b).items() if name not in moved]:
            raise UserError(
                f"process {number} was given another config than process 0: {'; '.join(wrong)} (0 -> {number}); start "
                "all processes with the same command"
            )


def same_values(config: Config, changed: Iterable[str]) -> bool:
    """Whether the changed leaves leave the parameters of every step unchanged."""
    specs = leaves(str(config.values["model.name"]))
    return all(name in specs and specs[name].kind in FREE for name in changed)


def sampling_leaves(stored: Config, given: Config) -> None:
    """Raise UserError for leaves that cannot change what a run was trained for."""
    specs = leaves(str(given.values["model.name"]))
    fixed = [name for name in differences(stored, given) if specs[name].kind not in (*FREE, "compute")]
    if fixed:
        raise UserError(f"{', '.join(fixed)} cannot change what a run was trained for; give sampling leaves")
