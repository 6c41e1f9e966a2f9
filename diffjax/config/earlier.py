"""Earlier spellings of leaves, in config.json of earlier versions and on the command line, and what they are now."""

import math
from collections.abc import Mapping
from typing import Any

from diffjax import models
from diffjax.errors import UserError
from diffjax.options import Value

VERSION = 3  # of config.json; files of version 1 do not say it
# By version: what a leaf that its files lack meant then, where today's default is another and the leaf is read.
DECODE: dict[str, Value] = {"data.decode": "stored", "images.decode": "stored"}
DEFAULTS: dict[int, dict[str, Value]] = {1: DECODE, 2: DECODE}

# Leaves that moved as they are. {process}, {sampler}: the names that the config has for them.
MOVED = {
    "ema.tracks": "ema.sigma_rel",
    "data.codes": "data.vocabulary",
    "data.decoder_codes": "data.decoder_vocabulary",
    "diffusion.prediction": "diffusion.{process}.prediction",
    "diffusion.weighting": "diffusion.{process}.weighting",
    "diffusion.times": "diffusion.{process}.times",
    "diffusion.variance": "diffusion.{process}.variance",
    "diffusion.loss": "diffusion.{process}.loss",
    "diffusion.steps": "diffusion.{process}.steps",
    "sampling.guidance": "sampling.guidance.scale",
    "sampling.guidance_channels": "sampling.guidance.channels",
    "sampling.guidance_calls": "sampling.guidance.calls",
    "sampling.temperature": "sampling.tokens.temperature",
    "sampling.top_k": "sampling.tokens.top_k",
    "sampling.top_p": "sampling.tokens.top_p",
    "sampling.rounds": "sampling.tokens.rounds",
    "sampling.choice_temperature": "sampling.tokens.choice_temperature",
}
# Texts of name=value pairs, and the section that each name is a leaf of now.
PAIRS = {"diffusion.options": "diffusion.{process}", "sampling.options": "sampling.{sampler}"}


def modern(given: Mapping[str, Any], context: Mapping[str, Value], whole: bool = False) -> dict[str, Any]:
    """Leaves by name with today's spellings.

    Args:
        given: leaves, perhaps in an earlier spelling; values, or the texts of a command line.
        context: all leaves of the config, which say which process and sampler are meant.
        whole: whether `given` is a whole config of version 1.
    """
    every = {**context, **given}
    names = {"process": every.get("diffusion.process", ""), "sampler": every.get("sampling.sampler", "")}
    found: dict[str, Any] = {}
    for leaf, value in given.items():
        if leaf in PAIRS:
            found |= {f"{PAIRS[leaf].format(**names)}.{name}": each for name, each in limited(leaf, value).items()}
        elif leaf == "sampling.guidance_weights":
            kind, _, rest = str(value).partition(",")
            found["sampling.guidance.schedule"] = kind or "constant"
            found |= {f"sampling.guidance.{kind}.{name}": each for name, each in limited(leaf, rest).items()}
        elif leaf == "ema.tracks" and whole and isinstance(value, str):
            found["ema.sigma_rel"] = tuple(float(text) for text in value.split(",") if text)
        elif leaf in MOVED:
            if not (leaf.startswith("diffusion.") and value in ("", 0, "0")):  # what belonged to the process
                found[MOVED[leaf].format(**names)] = value
        else:
            found[leaf] = value
    if not whole:
        return found
    if not any(leaf.startswith("diffusion.") for leaf in given):
        found["method"] = "tokens"
    return found | backbone(found)


def backbone(values: Mapping[str, Any]) -> dict[str, Any]:
    """What section `model` of a whole config says otherwise today.

    A published name could stand beside other sizes than it has: it is the family then. What a backend chooses was "".
    """
    name = str(values.get("model.name", ""))
    chosen = [leaf for leaf in ("model.scan", "model.depthwise") if values.get(leaf) == ""]
    found: dict[str, Any] = dict.fromkeys(chosen)
    published = {f"model.{size}": value for size, value in models.published_sizes(name).items()}
    stored = {leaf: as_stored(values[leaf]) for leaf in published if leaf in values}
    if any(stored[leaf] != published[leaf] for leaf in stored):
        found |= {**published, **stored, "model.name": models.family_of(name)}
    return found


def as_stored(value: Any) -> Any:
    """A value of json as the schema has it: tuples for lists."""
    return tuple(value) if isinstance(value, list) else value


def limited(leaf: str, text: str) -> dict[str, Any]:
    """`pairs` with None for an infinite number, which meant no limit: churn_max=inf."""
    return {name: None if value == math.inf else value for name, value in pairs(leaf, text).items()}


def pairs(leaf: str, text: str) -> dict[str, Any]:
    """{"eta": 1, "last_step": "mean"} of "eta=1,last_step=mean": numbers where they read as numbers, else words."""
    found: dict[str, Any] = {}
    for item in str(text).split(",") if text else ():
        name, _, value = item.partition("=")
        if not name.isidentifier() or not value or name in found:
            raise UserError(f"{leaf}: {item!r} is not understood; valid: name=value,name=value, each name once")
        found[name] = number_or_word(value)
    return found


def number_or_word(text: str) -> int | float | str:
    for kind in (int, float):
        try:
            return kind(text)
        except ValueError:
            continue
    return text
