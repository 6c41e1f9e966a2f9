"""Tables between a reference's state_dict and our parameters, usable in both directions.

A row is (reference key, our path, einops pattern from their axes to ours). "{l}" in the key stands for 0 .. l-1 and
"{j1}" for 1 .. j: those arrays become one, stacked on a leading axis in the order of the numbers. Every axis has a
name; the sizes of the names say which shape each array must have, and can be read off the arrays. A trailing digit
tells apart axes of one size: "d2 d" is a square.
"""

import functools
import itertools
import math
import re
from collections import Counter, defaultdict
from collections.abc import Collection, Mapping, Sequence
from typing import Any

import ml_dtypes
import numpy as np
from einops import rearrange
from flax.traverse_util import flatten_dict, unflatten_dict

from diffjax import torch_file
from diffjax.errors import UserError

Table = Sequence[tuple[str, str, str]]
Sizes = Mapping[str, int]

LISTED = 6  # keys named in an error, per kind
ALIGNMENT = 64  # bytes, of arrays that JAX's CPU backend takes without a copy


def infer(table: Table, state_dict: Mapping[str, Any], known: Sizes) -> dict[str, int]:
    """The sizes of the table's axes: `known`, and what the shapes and the numbers in the keys tell.

    The size that most arrays agree on is settled first, and arrays that contradict a settled size are not asked for
    others: so one wrong array does not make all others look wrong. An axis that nothing tells (two unknown factors of
    one dimension, all keys missing) is left out.
    """
    sizes = dict(known)
    counted: dict[str, Counter[int]] = defaultdict(Counter)
    arrays = []
    for template, _, pattern in table:
        matches = {key: match for key in state_dict if (match := _regex(template).fullmatch(key))}
        arrays += [(_groups(pattern), getattr(state_dict[key], "shape", ())) for key in matches]
        for name in _placeholders(template) if matches else []:
            numbers = [int(match[name]) for match in matches.values()]
            counted[_base(name)][1 + max(numbers) - _first(name)] += 1
    sizes |= {axis: counts.most_common(1)[0][0] for axis, counts in counted.items() if axis not in known}
    while votes := Counter(vote for groups, shape in arrays for vote in _solve(groups, shape, sizes)):
        axis, size = votes.most_common(1)[0][0]
        sizes[axis] = size
    return sizes


def check(table: Table, sizes: Sizes, state_dict: Mapping[str, Any], family: str) -> None:
    """Raise one UserError that names all unexpected, missing and wrongly shaped keys; unknown sizes match any."""
    expected = {key: _shape(pattern, sizes) for template, _, pattern in table for key in _keys(template, sizes)}
    wrong = []
    for key in expected.keys() & state_dict.keys():
        shape, wanted = getattr(state_dict[key], "shape", None), expected[key]
        if shape is None:
            wrong.append(f"{key} is no array but of type {type(state_dict[key]).__name__}")
        elif len(shape) != len(wanted) or any(b not in (a, None) for a, b in zip(shape, wanted)):
            wrong.append(f"{key} is {_text(shape)}, expected {_text(wanted)}")
    problems = {
        "unexpected keys": state_dict.keys() - expected.keys(),
        "missing keys": expected.keys() - state_dict.keys(),
        "wrong shapes": wrong,
    }
    if any(problems.values()):
        listed = "; ".join(f"{kind}: {_some(names)}" for kind, names in problems.items() if names)
        raise UserError(f"these are not the weights of a {family} model: {listed}")


def to_params(table: Table, sizes: Sizes, state_dict: Mapping[str, Any], family: str) -> dict[str, Any]:
    """Our parameters, nested dicts of float32 numpy arrays. UserError as of `check`, and for values not finite.

    They are copies, made one by one, so that of mapped files little is in memory beside them.
    """
    check(table, sizes, state_dict, family)
    wrong: list[str] = []
    flat = {path: _leaf(template, pattern, sizes, state_dict, wrong) for template, path, pattern in table}
    if wrong:
        raise UserError(
            f"{family}: values that are not finite in {len(wrong)} of {len(state_dict)} arrays: {_some(wrong)}"
        )
    return unflatten_dict(flat, sep="/")


def _leaf(template: str, pattern: str, sizes: Sizes, state_dict: Mapping[str, Any], wrong: list[str]) -> np.ndarray:
    """One of our parameters; keys with values that are not finite are added to `wrong`."""
    keys, lengths = _keys(template, sizes), _lengths(pattern, sizes)
    leaf = np.empty(0, np.float32)
    for number, key in enumerate(keys):
        with np.errstate(over="ignore"):
            array = rearrange(np.asarray(state_dict[key], np.float32), pattern, **lengths)
        if not number:
            leaf = aligned((len(keys), *array.shape))
        leaf[number] = array
        if not np.isfinite(leaf[number]).all():
            wrong.append(key)
        torch_file.release(state_dict[key])
    return leaf if _placeholders(template) else leaf[0]


def aligned(shape: Sequence[int]) -> np.ndarray:
    """An empty float32 array that JAX on a CPU takes as it is, without a copy."""
    size = 4 * math.prod(shape)
    buffer = np.empty(size + ALIGNMENT, np.uint8)
    start = -buffer.ctypes.data % ALIGNMENT
    return buffer[start : start + size].view(np.float32).reshape(shape)


def to_state_dict(table: Table, sizes: Sizes, params: Mapping[str, Any]) -> dict[str, np.ndarray]:
    """The inverse of `to_params`: the reference's key names to float32 arrays in its layout."""
    flat = flatten_dict(params, sep="/")
    state_dict = {}
    for template, path, pattern in table:
        theirs, ours = pattern.split(" -> ")
        array = np.asarray(flat[path], np.float32)
        layers = array if _placeholders(template) else [array]
        for key, layer in zip(_keys(template, sizes), layers):
            layer = rearrange(layer, f"{ours} -> {theirs}", **_lengths(pattern, sizes))
            state_dict[key] = np.asarray(layer, order="C")  # safetensors writes the memory as it lies
    return state_dict


# Training code that averages a fixed table like a parameter moves it by rounding: 1.6e-4 in float32 (a decay of 0.9999,
# 5,000 steps and more). Tables that mean something else, of another size or order, are of order 1 apart.
DRIFT = 1e-3


def check_fixed(family: str, key: str, stored: Any, expected: np.ndarray, *, exact: bool = False) -> None:
    """Raise UserError unless a stored table is the one that we compute, to the rounding of its dtype and an average.

    stored, expected: of one shape, values up to 1; exact: whole numbers of any size, which must be equal.
    """
    stored = np.asarray(stored)
    allowed = 0.0 if exact else DRIFT + float(ml_dtypes.finfo(stored.dtype).eps) / 2
    difference = np.abs(stored.astype(np.float64) - expected).max()
    if not difference <= allowed:
        raise UserError(
            f"{family}: {key} differs from the fixed table by up to {difference:.3g}; only checkpoints with that table "
            "are read"
        )


def part(state_dict: Mapping[str, Any], prefix: str, others: tuple[str, ...]) -> dict[str, Any]:
    """The weights of one network: those under `prefix`, without it, where there are any, else all.

    others: what keys of the other networks start with, in a file that has the prefix.
    """
    if not any(key.startswith(prefix) for key in state_dict):
        return dict(state_dict)
    return {key.removeprefix(prefix): value for key, value in state_dict.items() if not key.startswith(others)}


def check_names(family: str, config: Mapping[str, Any], valid: Sequence[str]) -> None:
    """Raise UserError for constructor arguments that the reference does not have."""
    if unknown := sorted(set(config) - set(valid)):
        raise UserError(f"{family} has no argument {', '.join(unknown)}; valid: {', '.join(valid) or 'none'}")


def check_agreement(family: str, inferred: Mapping[str, Any], config: Mapping[str, Any]) -> None:
    """Raise UserError for an argument in `config` that differs from what the weights tell of it."""
    for name, value in inferred.items():
        if name in config and config[name] != value:
            raise UserError(f"{family}: {name} = {config[name]} contradicts the weights, whose shapes say {value}")


def ratio(hidden: int, width: int) -> float:
    """A number that makes `hidden` of `width`: int(width * ratio) == hidden."""
    quotient = hidden / width
    return quotient if int(width * quotient) == hidden else math.nextafter(quotient, math.inf)


def has_null(rows: int, config: Mapping[str, Any]) -> bool:
    """Whether a label table has a row for the null class, which the references of DiT and DiS add when labels are
    dropped in training: their default."""
    if "class_dropout_prob" in config:
        return config["class_dropout_prob"] > 0
    return config.get("num_classes") != rows


def _placeholders(template: str) -> list[str]:
    return re.findall(r"\{(\w+)\}", template)


def _keys(template: str, sizes: Sizes) -> list[str]:
    """The keys that a row stands for; the first alone when their number is unknown."""
    names = _placeholders(template)
    ranges = [range(_first(name), _first(name) + sizes.get(_base(name), 1)) for name in names]
    return [template.format(**dict(zip(names, numbers))) for numbers in itertools.product(*ranges)]


def _first(name: str) -> int:
    """The number at which a placeholder starts: that in its name, else 0."""
    return int(name.removeprefix(_base(name)) or 0)


@functools.cache
def _regex(template: str) -> re.Pattern[str]:
    return re.compile(re.sub(r"\\\{(\w+)\\\}", r"(?P<\1>\\d+)", re.escape(template)))


def _groups(pattern: str) -> list[list[str]]:
    """The dimensions of the reference's array, each a list of its axis names: "(a b) c -> ..." is [[a, b], [c]]."""
    return [re.findall(r"\w+", group) for group in re.findall(r"\([^)]*\)|\w+", pattern.split(" -> ")[0])]


def _base(axis: str) -> str:
    return axis.rstrip("0123456789")


def _lengths(pattern: str, sizes: Sizes) -> dict[str, int]:
    return {axis: sizes[_base(axis)] for group in _groups(pattern) for axis in group}


def _shape(pattern: str, sizes: Sizes) -> tuple[int | None, ...]:
    factors = [[sizes.get(_base(axis)) for axis in group] for group in _groups(pattern)]
    return tuple(None if None in group else math.prod(group) for group in factors)  # type: ignore[arg-type]


def _solve(groups: list[list[str]], shape: Sequence[int], sizes: Sizes) -> list[tuple[str, int]]:
    """The sizes that one array tells, of each dimension with one unknown factor; none if it contradicts `sizes`."""
    if len(groups) != len(shape):
        return []
    inferred = []
    for group, size in zip(groups, shape):
        unknown = [_base(axis) for axis in group if _base(axis) not in sizes]
        rest = math.prod(sizes.get(_base(axis), 1) for axis in group)
        if size % rest or (not unknown and size != rest):
            return []
        if len(unknown) == 1:
            inferred.append((unknown[0], size // rest))
    return inferred


def _text(shape: Sequence[int | None]) -> str:
    return "(" + ", ".join("?" if size is None else str(size) for size in shape) + ")"


def _some(names: Collection[Any]) -> str:
    listed = sorted(map(str, names))
    rest = f" and {len(listed) - LISTED} more" if len(listed) > LISTED else ""
    return ", ".join(listed[:LISTED]) + rest
