"""Public checkpoints: reading their files, and mapping their weights to our parameters and back."""

import math
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

import flax.linen as nn
import numpy as np

from diffjax.errors import UserError
from diffjax.weights import (
    checkpoints,
    diffit,
    digit,
    dinov2,
    dis,
    dit,
    efficientnet_lite,
    inception,
    sit,
    tiny_vae,
    udit,
    vae,
    vqgan,
)

FAMILIES: dict[str, ModuleType | digit.Family] = {
    "dit": dit,
    "sit": sit,
    "dis": dis,
    "udit": udit,
    "diffit": diffit,
    **{family.name: family for family in (digit.STAGE1, digit.STAGE2_AR, digit.STAGE2_NAR)},
    "dinov2": dinov2,
    "vqgan": vqgan,
    "vae": vae,
    "tiny_vae": tiny_vae,
    "inception": inception,
    "efficientnet_lite0": efficientnet_lite,
}

# The backbone or frozen network that a family's weights become.
MODELS = {
    "dit": "DiT",
    "sit": "DiT",
    "dis": "DiS",
    "udit": "U-DiT",
    "diffit": "DiffiT",
    **dict.fromkeys(("digit_stage1", "digit_stage2_ar", "digit_stage2_nar"), "DiGIT"),
    "dinov2": "DINOv2",
    "vqgan": "VQGAN",
    "vae": "VAE",
    "tiny_vae": "TinyVAE",
    "inception": "Inception",
    "efficientnet_lite0": "EfficientNetLite0",
}

# Of models wrapped for data parallelism or averaging, compiled ones, and those inside a Lightning module.
PREFIXES = ("module.", "_orig_mod.", "model.")
AVERAGES = {"ema", "emas", "swa", "avg", "average", "averaged"}  # words in the names of averaged weights
NO_WEIGHTS = re.compile("(last_)?opt|sched|lr_|arg|conf|cfg|hparam|hyper", re.IGNORECASE)  # starts of names
DEPTH = 3  # how far entries of a checkpoint may lie within each other


def from_reference(family: str, state_dict: Mapping[str, Any], **config: Any) -> tuple[nn.Module, dict[str, Any]]:
    """Our module and its float32 parameters out of a reference's weights.

    Args:
        family: a key of FAMILIES.
        state_dict: the reference's key names to arrays in PyTorch layout; also a training checkpoint, see `unwrap`.
        config: the reference's constructor arguments; what the shapes tell need not be given.

    Raises:
        UserError: unknown family or argument; arguments that contradict the shapes or that are needed and missing;
            unexpected, missing and wrongly shaped keys, all in one message; values that are not finite.
    """
    empty = isinstance(state_dict, Mapping) and not any(_entries(state_dict, ()))
    weights = {} if empty else unwrap(state_dict, part=part_of(family))
    return _family(family).from_reference(weights, **config)


def to_reference(
    family: str, module: nn.Module, params: Mapping[str, Any], size: int | None = None
) -> dict[str, np.ndarray]:
    """The reference's weights, its key names to float32 arrays in PyTorch layout, out of our parameters.

    size: side of the input, for families whose files hold arrays that are not trained; None leaves these out.
    """
    found = _family(family)
    return found.to_reference(module, params) | (found.fixed(module, size) if size and hasattr(found, "fixed") else {})


def is_sized(family: str) -> bool:
    """Whether files of a family hold arrays that depend on the side of the input, such as a table of positions."""
    return bool(getattr(_family(family), "SIZED", False))


def reference_config(family: str, module: nn.Module) -> dict[str, Any]:
    """The reference's constructor arguments, where they lie beside the weights in a folder (diffusers); else {}."""
    found = _family(family)
    return found.config_of(module) if hasattr(found, "config_of") else {}


class Read(NamedTuple):
    """A model out of a public file.

    Attributes:
        module, params: see `from_reference`.
        size: side of its input, where the weights tell it.
        origin: json-able: family, name and sha256 of the file, and the entry of a training checkpoint.
        entries: how many arrays were read.
    """

    module: nn.Module
    params: dict[str, Any]
    size: int | None
    origin: dict[str, str]
    entries: int


def read(family: str, path: Path, entry: str = "", **config: Any) -> Read:
    """The model in a file or folder, see `checkpoints.read`.

    entry: of a training checkpoint, see `choose`. config: the reference's constructor arguments, where needed.
    """
    found = checkpoints.read(path)
    name, weights = choose(found.content, entry, part_of(family))
    module, params = from_reference(family, weights, **{**found.config, **config})
    origin = {"family": family, "checkpoint": path.name, "checkpoint_sha256": found.sha256()}
    return Read(module, params, _size(weights, module), origin | ({"entry": name} if name else {}), len(weights))


def _size(weights: Mapping[str, Any], module: Any) -> int | None:
    """The side of a backbone's input, by its table of positions (with tokens beside those of patches) or its length."""
    shape: tuple[int, ...] = getattr(weights.get("pos_embed"), "shape", ())
    if len(shape) == 3 and hasattr(module, "patch"):
        return module.patch * math.isqrt(shape[1])
    return math.isqrt(module.length) if hasattr(module, "length") else None


def part_of(family: str) -> str:
    """What the keys of a family begin with inside a checkpoint of a larger model; "" for nothing."""
    return str(getattr(_family(family), "PART", ""))


def unwrap(checkpoint: Any, entry: str = "", part: str = "") -> dict[str, Any]:
    """The weights inside a file, without the prefixes that wrappers of a model put before names: see `choose`."""
    return choose(checkpoint, entry, part)[1]


def choose(checkpoint: Any, entry: str = "", part: str = "") -> tuple[str, dict[str, Any]]:
    """(name of the entry of a training checkpoint, "" for all of it; the weights in it).

    The published results use averaged weights: an entry that is named as an average (ema, model_ema, ema_model,
    state_dict_ema, ...) comes first, also within another entry and as the first part of the keys. Weights that are
    named "model" or "state_dict", or stand alone, are taken from a file without an average.

    entry: which one instead, by its name; parts of nested ones are joined by ".".
    part: where keys begin with it, those alone are taken, without it, whatever else the checkpoint holds.

    Raises:
        UserError: no weights; an average without weights; several entries, none of which is the one; no such entry.
    """
    if not isinstance(checkpoint, Mapping):
        raise UserError(f"the checkpoint holds no weights but a {type(checkpoint).__name__}")
    if part and not entry:
        for name, tree in {"": checkpoint, **checkpoint}.items():
            if isinstance(tree, Mapping) and any(str(key).startswith(part) for key in tree):
                inside = {str(key): value for key, value in tree.items() if str(key).startswith(part)}
                return f"{name}.{part}".strip("."), {key.removeprefix(part): value for key, value in inside.items()}
    found = dict(_entries(checkpoint, ()))
    listed = ", ".join(name or "the whole file" for name in found) or "none"
    if entry:
        if entry not in found:
            raise UserError(f"the checkpoint has no weights named {entry!r}; there are: {listed}")
        return entry, _plain(found[entry])
    averages = [name for name in found if is_average(name)]
    if not averages and (without := next(_averages_without_weights(checkpoint, ()), None)):
        raise UserError(
            f"the average {without!r} of the checkpoint holds no weights by name; there are: {listed}; name the one to "
            "take (convert: --weights=NAME; sample: --entry=NAME)"
        )
    usual = [name for name in found if name.rpartition(".")[2] in ("", "model", "state_dict")]
    candidates = averages or (usual if len(usual) == 1 else list(found))
    if not candidates:
        kinds = ", ".join(map(str, checkpoint))[:200] or "nothing"
        raise UserError(f"the checkpoint holds no weights: found {kinds}; expected named arrays, or entries of them")
    if len(candidates) > 1:
        raise UserError(
            f"the checkpoint holds {len(candidates)} sets of weights: {', '.join(candidates)}; name the one to take "
            "(convert: --weights=NAME; sample: --entry=NAME)"
        )
    return candidates[0], _plain(found[candidates[0]])


def is_average(name: str) -> bool:
    """Whether an entry is named as averaged weights."""
    words = set(re.split(r"[._]|(?<=[a-z])(?=[0-9])", name.lower()))
    return bool(words & AVERAGES) and "exp" not in words  # exp_avg: Adam's moments


def _entries(tree: Mapping[str, Any], path: tuple[str, ...]) -> Iterator[tuple[str, Mapping[str, Any]]]:
    """(name, arrays) of every mapping of arrays in a checkpoint, but for settings and the states of optimizers."""
    arrays = {str(key): value for key, value in tree.items() if getattr(value, "shape", ())}
    heads = {key.partition(".")[0] for key in arrays if "." in key}
    if inside := [head for head in sorted(heads) if is_average(head)]:  # a module that holds its own average
        for head in inside:
            part = {key.removeprefix(f"{head}."): value for key, value in arrays.items() if key.startswith(f"{head}.")}
            yield ".".join((*path, head)), part
    elif arrays:
        yield ".".join(path), tree
    if len(path) < DEPTH:
        for key, value in _parts(tree):
            if isinstance(value, Mapping):
                yield from _entries(value, (*path, key))


def _averages_without_weights(tree: Mapping[str, Any], path: tuple[str, ...]) -> Iterator[str]:
    """Names of entries that are named as averages and hold no arrays by name."""
    for key, value in _parts(tree):
        if is_average(key) and isinstance(value, Mapping | list | tuple):
            yield ".".join((*path, key))
        elif isinstance(value, Mapping) and len(path) < DEPTH:
            yield from _averages_without_weights(value, (*path, key))


def _parts(tree: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    """The entries of a checkpoint by name, without settings and optimizer states."""
    return ((str(key), value) for key, value in tree.items() if not NO_WEIGHTS.match(str(key)))


def _plain(weights: Mapping[str, Any]) -> dict[str, Any]:
    """The weights without what a wrapper of the model put before their names, and without its counter."""
    found = {str(key): value for key, value in weights.items() if str(key) != "n_averaged"}
    for prefix in PREFIXES * 2:
        if found and all(key.startswith(prefix) for key in found):
            found = {key.removeprefix(prefix): value for key, value in found.items()}
    return found


def _family(family: str) -> Any:
    if family not in FAMILIES:
        raise UserError(f"weights of family {family!r} are unknown; valid: {', '.join(FAMILIES)}")
    return FAMILIES[family]
