"""Options as data: type, default, valid values and documentation of a value that a user can set.

An option is a field of a dataclass or a keyword-only parameter of a function, annotated beside its type:

    def ddim(process: Process, steps: int, *, eta: Annotated[float, Leaf("0: deterministic", valid=at_least(0))] = 0.0)

    class DiT(nn.Module):
        patch: Annotated[int, Leaf("side of a patch in pixels")]

`options` reads such annotations; the config's schema, `--help-config` and the generated page are made of them.
"""

import dataclasses
import functools
import inspect
import math
import types
import typing
from collections.abc import Callable, Collection, Mapping
from typing import Any, ParamSpec, TypeVar

from diffjax.errors import UserError

P = ParamSpec("P")
R = TypeVar("R")
Value = bool | int | float | str | tuple[Any, ...] | None
Options = Mapping[str, Value]

# What an option decides: what the parameters are, where files lie, how the work is spread over devices and processes,
# how it is computed, or what is logged, saved, evaluated and sampled.
KINDS = ("identity", "place", "layout", "compute", "watch")


class Required:
    """The default of an option that has none."""

    def __repr__(self) -> str:
        return "required"


REQUIRED = Required()


@dataclasses.dataclass(frozen=True)
class Valid:
    """The valid values of an option: in words ("0 to below 1"), and as a test."""

    describe: Callable[[], str]
    test: Callable[[Any], bool]

    @property
    def words(self) -> str:
        return self.describe()


@dataclasses.dataclass(frozen=True)
class Leaf:
    """The annotation of an option.

    Attributes:
        doc: one line.
        kind: one of KINDS.
        valid: None: any value of its type. Numbers are finite in any case.
        fixed: it cannot change within a run, whose saved state and data position stand on it.
    """

    doc: str
    kind: str = "identity"
    valid: Valid | None = None
    fixed: bool = False


@dataclasses.dataclass(frozen=True)
class Option:
    """An option: its name, its type without the annotation, its default or REQUIRED, and what is said of it."""

    name: str
    type: Any
    default: Any
    leaf: Leaf


def one_of(names: Collection[Any]) -> Valid:
    """One of a collection, which may still grow: a table of components."""
    return Valid(lambda: ", ".join(str(name) or "''" for name in names), lambda value: value in tuple(names))


def at_least(low: float, zero: str = "") -> Valid:
    """Numbers from `low` on; `zero` says in words what 0 means."""
    words = f"0 ({zero}) or more" if zero and low == 0 else f"{low} or more"
    return Valid(lambda: words, lambda value: value >= low)


def above(low: float) -> Valid:
    return Valid(lambda: f"above {low}", lambda value: value > low)


def between(low: float, high: float, zero: str = "") -> Valid:
    """Numbers from `low` to `high`, both included; `zero` says in words what 0 means."""
    first = f"0 ({zero})" if zero and low == 0 else f"{low}"
    return Valid(lambda: f"{first} to {high}", lambda value: low <= value <= high)


def fraction(zero: str = "") -> Valid:
    """Numbers from 0 to below 1; `zero` says in words what 0 means."""
    return Valid(lambda: f"0 ({zero}) to below 1" if zero else "0 to below 1", lambda value: 0 <= value < 1)


@dataclasses.dataclass(frozen=True)
class Chosen:
    """Annotates a field that holds the options of one component of a table, the one that another field names.

    Attributes:
        by: the field beside it that names the component.
        table: name -> a dataclass of options, a function with options, or a record with `options`.
        flat: whether the options are leaves of the section itself; else each component has a sub-section of its name.
    """

    by: str
    table: Mapping[str, Any]
    flat: bool = False


@dataclasses.dataclass(frozen=True)
class Each:
    """Annotates a field that holds the options of every component of a table, by name, each in a sub-section."""

    table: Mapping[str, Any]


def options(owner: Any) -> dict[str, Option]:
    """The options of a dataclass or function, by name and in order; fields without a Leaf annotation are left out."""
    if isinstance(own := getattr(owner, "options", None), dict):  # a record that says it itself
        return own
    kind: Any = type(owner) if dataclasses.is_dataclass(owner) and not isinstance(owner, type) else owner
    return dict(_annotated(kind))


@functools.cache
def _annotated(owner: Any) -> dict[str, Option]:
    hints = type_hints(owner.func if isinstance(owner, functools.partial) else owner)
    found = {}
    for name, default in _defaults(owner).items():
        if name in hints and (leaf := _leaf(hints[name])) is not None:
            found[name] = Option(name, typing.get_args(hints[name])[0], default, leaf)
    return found


def type_hints(owner: Any) -> Mapping[str, Any]:
    """The annotations of a dataclass or function with their `Annotated` parts, evaluated once."""
    return _type_hints(owner)  # which, cached, takes no type[Any] for the type checker


@functools.cache
def _type_hints(owner: Any) -> Mapping[str, Any]:
    return types.MappingProxyType(typing.get_type_hints(owner, include_extras=True))


def _defaults(owner: Any) -> dict[str, Any]:
    if dataclasses.is_dataclass(owner):
        return {f.name: REQUIRED if f.default is dataclasses.MISSING else f.default for f in dataclasses.fields(owner)}
    parameters = inspect.signature(owner).parameters.values()
    keywords = [p for p in parameters if p.kind is p.KEYWORD_ONLY]
    return {p.name: REQUIRED if p.default is p.empty else p.default for p in keywords}


def _leaf(hint: Any) -> Leaf | None:
    if typing.get_origin(hint) is not typing.Annotated:
        return None
    return next((each for each in hint.__metadata__ if isinstance(each, Leaf)), None)


def check(path: str, option: Option, value: Any) -> Any:
    """`value` in the type of the option (an int for a float, a list for a tuple). UserError, naming `path`, for another
    type and for a value that is not valid."""
    converted = convert(value, option.type)
    if converted is REQUIRED:
        words = type_in_words(option.type)
        if isinstance(value, float) and not math.isfinite(value):
            words = words.replace("a number", "a finite number")
        raise UserError(f"{path} = {value!r}: valid: {words}")
    valid = option.leaf.valid
    if valid and converted is not None and not valid.test(converted):
        raise UserError(f"{path} = {value!r}: valid: {valid.words}")
    return converted


def checked(function: Callable[P, R]) -> Callable[P, R]:
    """`function`, whose options are checked one by one, as `check` does, before it is called."""
    known = options(function)

    @functools.wraps(function)
    def call(*args: P.args, **kwargs: P.kwargs) -> R:
        for name in known.keys() & kwargs.keys():
            kwargs[name] = check(f"{function.__name__}: {name}", known[name], kwargs[name])
        return function(*args, **kwargs)

    return call


def convert(value: Any, kind: Any) -> Any:
    """`value` as a `kind`; REQUIRED when it is not one."""
    if isinstance(kind, types.UnionType) or typing.get_origin(kind) is typing.Union:
        candidates = (convert(value, each) for each in typing.get_args(kind))
        return next((each for each in candidates if each is not REQUIRED), REQUIRED)
    if kind in (None, type(None)):
        return None if value is None else REQUIRED
    if typing.get_origin(kind) is tuple:
        if not isinstance(value, tuple | list):
            return REQUIRED
        items = [convert(item, typing.get_args(kind)[0]) for item in value]
        return REQUIRED if any(item is REQUIRED for item in items) else tuple(items)
    if kind is float and isinstance(value, int | float) and not isinstance(value, bool):
        return float(value) if math.isfinite(value) else REQUIRED
    if kind is int and isinstance(value, bool):
        return REQUIRED
    return value if isinstance(value, kind) else REQUIRED


def parse(path: str, option: Option, text: str) -> Any:
    """The value that a command line means by `text`: 3, 2e-4, true, word, 1,2,3 or (1, 2, 3), none."""
    value = _parse(text.strip(), option.type)
    if value is REQUIRED:
        raise UserError(f"{path}={text}: valid: {type_in_words(option.type)}")
    return check(path, option, value)


def _parse(text: str, kind: Any) -> Any:
    if isinstance(kind, types.UnionType) or typing.get_origin(kind) is typing.Union:
        kinds = sorted(typing.get_args(kind), key=lambda each: each is not type(None))  # else "none" would be a word
        candidates = (_parse(text, each) for each in kinds)
        return next((each for each in candidates if each is not REQUIRED), REQUIRED)
    if kind in (None, type(None)):
        return None if text.lower() in ("none", "") else REQUIRED
    if typing.get_origin(kind) is tuple:
        inner = text[1:-1] if text[:1] + text[-1:] in ("()", "[]") else text
        items = [
            _parse(item.strip().strip("'\""), typing.get_args(kind)[0]) for item in inner.split(",") if item.strip()
        ]
        return REQUIRED if any(item is REQUIRED for item in items) else tuple(items)
    if kind is bool:
        return {"true": True, "false": False}.get(text.lower(), REQUIRED)
    try:
        return kind(text)
    except ValueError:
        return REQUIRED


def type_in_words(kind: Any) -> str:
    """ "a number", "whole numbers, such as 1,2" ..."""
    words = {bool: "true or false", int: "a whole number", float: "a number", str: "a word", type(None): "none"}
    if isinstance(kind, types.UnionType) or typing.get_origin(kind) is typing.Union:
        return " or ".join(type_in_words(each) for each in typing.get_args(kind))
    if typing.get_origin(kind) is tuple:
        item = typing.get_args(kind)[0]
        return {int: "whole numbers, such as 1,2", float: "numbers, such as 0.1,0.2"}.get(item, "words, such as a,b")
    return words[kind]
