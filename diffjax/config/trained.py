"""Build the config that samples, or fine-tunes, given parameters: their backbone; their process has to match."""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from diffjax import models
from diffjax.config.earlier import modern
from diffjax.config.load import nested, override
from diffjax.config.schema import Config, resolve
from diffjax.errors import UserError
from diffjax.methods import METHODS
from diffjax.methods.diffusion import Diffusion, same_process
from diffjax.options import Options
from diffjax.trees import leaves as flat


def with_model(config: Config, folder: Path, made: dict[str, Any]) -> Config:
    """The config with the backbone that `convert` wrote. UserError when it does not fit the data of the config."""
    arguments = made["kwargs"]
    facts = {"channels": config.data.channels, "num_classes": config.data.num_classes}
    if wrong := [f"{n} = {arguments[n]}, not {facts[n]}" for n in facts if n in arguments and arguments[n] != facts[n]]:
        raise UserError(f"{folder} holds a {made['name']} with {', '.join(wrong)}, as the config's data says")
    return with_backbone(config, made["name"], arguments)


def with_backbone(config: Config, name: str, options: Mapping[str, Any]) -> Config:
    """The config with another backbone. How it is computed (dtype, recomputation, kernels) stays as in the config.

    options: of the backbone; those that are no leaves of its section are passed over.
    """
    values = {path: value for path, value in config.values.items() if not path.startswith("model.")}
    given: dict[str, Any] = {"name": name}
    for option, spec in models.option_table(name).items():
        own = options if spec.leaf.fixed else config.model.options
        given |= {option: own[option]} if option in own else {}
    return resolve({**values, **{f"model.{option}": value for option, value in given.items()}})


def names_model(recipe: str, overrides: list[str]) -> bool:
    """Whether a command line chooses the backbone, by the recipe's argument or as a leaf."""
    given = (*recipe.partition(":")[2].split(","), *(each.lstrip("-") for each in overrides))
    return any(each.startswith(("model=", "config.model.name=")) for each in given)


def of_start(
    config: Config, overrides: list[str], old: Config | None, model_of: Callable[[Path], tuple[str, Options]]
) -> Config:
    """The config with the backbone of the parameters that it starts from, and given leaves on top; else as it is.

    Args:
        old: of the run that is resumed, which may outlive what it started from.
        model_of: the name and options of the backbone in a folder; ("", {}) where it does not say.
    """
    if not config.init.from_:
        return config
    name, options = (old.model.name, old.model.options) if old else model_of(Path(config.init.from_))
    if not name:
        return config
    return override(
        with_backbone(config, name, options),
        [each for each in overrides if each.lstrip("-").startswith("config.model.")],
    )


def with_process(config: Config, process: dict[str, Any]) -> Config:
    """The config with the process that parameters were trained with, as earlier versions recorded it."""
    section = "diffusion" if "process" in process else "tokens"
    given = {f"{section}.{name}": value for name, value in flat(process).items()}
    replaced_sections = {*METHODS, "sampling"}
    kept = {path: value for path, value in config.values.items() if path.partition(".")[0] not in replaced_sections}
    values = {**kept, **modern(given, given), "method": section}
    return resolve(values, forget=values)


def check_same_process(folder: Path, own: Config, config: Config, flag: str) -> None:
    """UserError unless samplers would call the network of `folder` and read its output as those of `config`."""
    specs = {"method": (own.values["method"], config.values["method"])}
    prefix = f"{own.values['method']}."
    specs |= {
        path: (value, config.values[path])
        for path, value in own.values.items()
        if path.startswith(prefix) and path in config.values
    }
    differing = {path: value for path, (value, other) in specs.items() if value != other}
    if not differing:
        return
    both = own.settings, config.settings
    if all(isinstance(each, Diffusion) for each in both) and same_process(*both):
        return
    raise UserError(f"--{flag}={folder} was trained with another process: {nested(differing)}")
