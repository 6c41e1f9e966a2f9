"""Every leaf of a config: its type, default, meaning, valid values and kind, and the sections as frozen dataclasses.

A section is a dataclass. Its fields are leaves (annotated with `Leaf`), sections within it, or the options of a
component that another leaf names (`Chosen`), which stand where the component does: the options of sampler "ddim" in
diffusion/tables.py are the leaves `sampling.ddim.*`. `leaves` lists all of them and `resolve` makes a `Config` of plain
values, refusing those that nothing reads. docs/config.md is generated from here.
"""

import dataclasses
import difflib
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Annotated, Any, TypeGuard

from diffjax import models
from diffjax.data.sources import SOURCES
from diffjax.errors import UserError
from diffjax.evaluation.evaluators import EVALUATORS, JUDGES
from diffjax.files import local_path
from diffjax.methods import METHODS
from diffjax.options import (
    REQUIRED,
    Chosen,
    Each,
    Leaf,
    Option,
    Options,
    Value,
    at_least,
    between,
    check,
    one_of,
    options,
    type_hints,
)
from diffjax.parallel.rules import STRATEGIES
from diffjax.training.ema import Ema
from diffjax.training.optimizer import Optim
from diffjax.weights.autoencoders import Autoencoder

COUNT = at_least(1)


class MethodTable(Mapping[str, Any]):
    """One attribute of every method, looked up when it is asked for, so that a method may still be added."""

    def __init__(self, attribute: str):
        self._attribute = attribute

    def __getitem__(self, name: str) -> Any:
        return getattr(METHODS[name], self._attribute)

    def __iter__(self) -> Iterator[str]:
        return iter(METHODS)

    def __len__(self) -> int:
        return len(METHODS)


OF_SOURCES = {"images": ("latents", "tokens"), "autoencoder": ("latents",)}  # sections that these alone have
IMAGE_SOURCES = {name: SOURCES[name] for name in ("digits", "emoji32", "folder", "tfds", "records")}


@dataclass(frozen=True)
class Init:
    """Where the parameters start: fresh, or from others (fine-tuning)."""

    from_: Annotated[str, Leaf("parameters to start from: a run folder, or one that `convert` wrote", "place")] = ""
    new: Annotated[
        tuple[str, ...], Leaf("what starts fresh nevertheless: labels, head, positions, null_class, or starts of paths")
    ] = ()

    def unread(self) -> dict[str, str]:
        return {} if self.from_ else {"new": "without init.from"}


@dataclass(frozen=True)
class Model:
    """The backbone: its name, and the options of its family."""

    name: str
    options: Options


@dataclass(frozen=True)
class Data:
    """What is trained on."""

    name: Annotated[str, Leaf("data source", valid=one_of(SOURCES), fixed=True)]
    size: Annotated[int, Leaf("side of an image, a latent or a grid of tokens", valid=COUNT, fixed=True)] = 32
    channels: Annotated[int, Leaf("of an image or latent; tokens: how many codebooks", valid=COUNT, fixed=True)] = 3
    num_classes: Annotated[int, Leaf("labels, or tokens of a condition", valid=at_least(0, "none"), fixed=True)] = 0
    condition: Annotated[
        str, Leaf("what an example is conditioned on", valid=one_of(("labels", "tokens", "vectors")), fixed=True)
    ] = "labels"
    condition_size: Annotated[
        int, Leaf("tokens or numbers of a condition; labels: 0", valid=at_least(0), fixed=True)
    ] = 0
    flip: Annotated[bool, Leaf("mirror images left-right with probability 1/2", fixed=True)] = False
    augment: Annotated[
        float,
        Leaf("probability of EDM's augmentations, given to the model", valid=between(0, 1, "none"), fixed=True),
    ] = 0.0
    workers: Annotated[int, Leaf("processes that read; 0: threads of this one", "layout", at_least(0))] = 0
    threads: Annotated[int, Leaf("threads per process that read ahead", "layout", at_least(0))] = 4
    options: Annotated[Options, Chosen("name", SOURCES, flat=True)] = field(default_factory=dict)


@dataclass(frozen=True)
class Images:
    """The images that latents or tokens are made of, by `encode` or `tokenize`; leaves as in `data`."""

    name: Annotated[str, Leaf("data source", valid=one_of(IMAGE_SOURCES))] = "digits"
    size: Annotated[int, Leaf("side of an image", valid=COUNT)] = 32
    channels: Annotated[int, Leaf("of an image", valid=COUNT)] = 3
    num_classes: Annotated[int, Leaf("labels", valid=at_least(0, "none"))] = 0
    options: Annotated[Options, Chosen("name", IMAGE_SOURCES, flat=True)] = field(default_factory=dict)


@dataclass(frozen=True)
class MeshShape:
    """Devices along each axis of the mesh; -1 takes what is left."""

    data: Annotated[int, Leaf("copies of the parameters, each with a part of the batch", "layout")] = -1
    fsdp: Annotated[int, Leaf("devices that share parameters and batch", "layout")] = 1
    tensor: Annotated[int, Leaf("devices that share heads and hidden channels", "layout")] = 1


@dataclass(frozen=True)
class Parallel:
    """How a run is spread over devices."""

    strategy: Annotated[str, Leaf("which logical axes are split", "layout", one_of(STRATEGIES))] = "dp"
    replicate_below: Annotated[
        int, Leaf("bytes; smaller parameters stay whole on each device", "layout", at_least(0))
    ] = 2**20
    mesh: MeshShape = field(default_factory=MeshShape)


@dataclass(frozen=True)
class Checkpoint:
    """What of a run is kept."""

    every_steps: Annotated[int, Leaf("steps between checkpoints", "watch", COUNT)] = 10_000
    every_minutes: Annotated[
        float,
        Leaf("also after so many minutes without one, at the next step that is reported", "watch", at_least(0, "none")),
    ] = 0.0
    keep: Annotated[int, Leaf("how many of the latest stay", "watch", COUNT)] = 3
    keep_every_steps: Annotated[int, Leaf("multiples of it stay for good", "watch", at_least(0, "none"))] = 0
    keep_best: Annotated[
        str, Leaf("evaluator whose best step stays for good; '': none", "watch", one_of(("", *JUDGES)))
    ] = ""


@dataclass(frozen=True)
class Log:
    """What of a run is reported."""

    every_steps: Annotated[int, Leaf("steps that a report averages over", "watch", COUNT)] = 100
    tensorboard: Annotated[bool, Leaf("also write events for TensorBoard", "watch")] = True
    hang_minutes: Annotated[
        float,
        Leaf(
            "a step that takes longer ends the process, with the stacks of its threads",
            "watch",
            between(0, 10_000, "never"),
        ),
    ] = 30.0


@dataclass(frozen=True)
class Config:
    """A resolved config. `values` are all its leaves by name; every section is checked and of its own type."""

    method: Annotated[str, Leaf("how the backbone is trained", valid=one_of(METHODS), fixed=True)] = "diffusion"
    seed: Annotated[int, Leaf("random seed of the run", valid=between(0, 2**32 - 1), fixed=True)] = 0
    total_steps: Annotated[int, Leaf("number of updates", valid=COUNT)] = 400_000
    batch_size: Annotated[int, Leaf("examples per update, on all devices together", valid=COUNT, fixed=True)] = 256
    init: Init = field(default_factory=Init)
    model: Model = field(default_factory=lambda: Model("", {}))
    data: Data = field(default_factory=lambda: Data("digits"))
    autoencoder: Autoencoder = field(default_factory=Autoencoder)
    images: Images = field(default_factory=Images)
    settings: Annotated[Any, Chosen("method", MethodTable("section"))] = None
    sampling: Annotated[Any, Chosen("method", MethodTable("sampling"), flat=True)] = None
    optim: Optim = field(default_factory=Optim)
    ema: Ema = field(default_factory=Ema)
    parallel: Parallel = field(default_factory=Parallel)
    checkpoint: Checkpoint = field(default_factory=Checkpoint)
    log: Log = field(default_factory=Log)
    evals: Annotated[Mapping[str, Options], Each(EVALUATORS)] = field(default_factory=dict)
    values: Mapping[str, Value] = field(default_factory=dict)


@dataclass(frozen=True)
class Spec:
    """A leaf of the whole config: its path, what is known of it, and (leaf, values) with which alone it is read."""

    path: str
    option: Option
    when: tuple[tuple[str, tuple[str, ...]], ...] = ()

    @property
    def kind(self) -> str:
        return self.option.leaf.kind


def leaves(model: str = "") -> dict[str, Spec]:
    """All leaves of a config whose backbone is `model`, by path; UserError for an unknown backbone."""
    found: dict[str, Spec] = {}
    for spec in _of_section(Config, "", ()):
        found[spec.path] = _merged(found[spec.path], spec) if spec.path in found else spec
    found |= {spec.path: spec for spec in model_leaves(model)}
    for path, spec in found.items():
        if sources := OF_SOURCES.get(path.partition(".")[0]):
            found[path] = dataclasses.replace(spec, when=(("data.name", sources), *spec.when))
    for name, record in METHODS.items():
        for path in record.unread:
            found[path] = _without(found[path], name)
    return found


def model_leaves(model: str) -> list[Spec]:
    """The leaves of section `model`: those of the backbone's family, with the sizes of a published name as defaults."""
    name = Option("name", str, "", Leaf("a published name, such as DiT-XL/2, or a family with sizes", fixed=True))
    table = models.option_table(model) if model else {}
    return [Spec("model.name", name), *(Spec(f"model.{each}", option) for each, option in table.items())]


def _of_section(section: type, prefix: str, when: tuple) -> Iterator[Spec]:
    """The leaves of a section, a dataclass, whose names begin with `prefix`."""
    own = options(section)
    hints = type_hints(section)
    for entry in dataclasses.fields(section):
        hint = hints[entry.name]
        if entry.name in own:
            yield Spec(prefix + entry.name.rstrip("_"), own[entry.name], when)
        elif is_section(hint):
            yield from _of_section(hint, f"{prefix}{entry.name}.", when)
        elif slot := _slot(hint):
            for inner, component, conditions in _components(slot, entry.name, prefix):
                yield from _of_component(component, inner, (*when, *conditions))


def is_section(hint: Any) -> TypeGuard[type]:
    """Whether a field's annotation is another section; that of the backbone has leaves of its own (`model_leaves`)."""
    return isinstance(hint, type) and dataclasses.is_dataclass(hint) and hint is not Model


def _slot(hint: Any) -> Chosen | Each | None:
    """What a field's annotation says of the components whose options it holds."""
    return next((each for each in getattr(hint, "__metadata__", ()) if isinstance(each, Chosen | Each)), None)


def _components(slot: Chosen | Each, field_name: str, prefix: str) -> Iterator[tuple[str, Any, tuple]]:
    """(prefix of its leaves, component, when it is read) of every component of a slot."""
    for name, component in slot.table.items():
        if isinstance(slot, Each):
            yield f"{prefix}{field_name}.{name}.", component, ()
        elif slot.flat:
            own = "" if field_name == "options" else f"{field_name}."
            yield prefix + own, component, ((prefix + slot.by, (name,)),)
        else:
            yield f"{prefix}{name}.", component, ((prefix + slot.by, (name,)),)


def _of_component(component: Any, prefix: str, when: tuple) -> Iterator[Spec]:
    if isinstance(component, type) and dataclasses.is_dataclass(component):
        yield from _of_section(component, prefix, when)
    else:
        yield from (Spec(prefix + option.name, option, when) for option in options(component).values())


def _merged(a: Spec, b: Spec) -> Spec:
    """A leaf that several components of one table share: read with each of them."""
    if (a.option.type, a.option.default) != (b.option.type, b.option.default):
        raise TypeError(f"{a.path} has two types or defaults: {a.option}, {b.option}")
    if [leaf for leaf, _ in a.when] != [leaf for leaf, _ in b.when]:
        raise TypeError(f"{a.path} is read under conditions of two kinds: {a.when}, {b.when}")
    both = ((leaf, tuple(dict.fromkeys((*names, *more)))) for (leaf, names), (_, more) in zip(a.when, b.when))
    return dataclasses.replace(a, when=tuple(both))


def _without(spec: Spec, method: str) -> Spec:
    """A leaf that one of the methods does not read."""
    others = tuple(name for name in dict(spec.when).get("method", tuple(METHODS)) if name != method)
    rest = tuple(each for each in spec.when if each[0] != "method")
    return dataclasses.replace(spec, when=(*rest, ("method", others)))


def resolve(values: Mapping[str, Value], *, forget: Collection[str] = ()) -> Config:
    """The checked, typed config of leaves by name; those that are missing have their defaults.

    forget: leaves that go back to their defaults where nothing reads them.

    Raises:
        UserError: an unknown leaf, a value of another type or that is not valid, a leaf that has to be given, and one
            that nothing reads, that is not at its default and not to be forgotten.
    """
    if not values.get("model.name"):
        raise UserError(f"model.name is not given; valid: {', '.join(models.FAMILIES)}, or a published name")
    specs = leaves(str(values["model.name"]))
    if unknown := [path for path in values if path not in specs]:
        raise UserError(f"the config has no leaf {unknown[0]!r}{hint(unknown[0], specs)}")
    given = {path: values.get(path, spec.option.default) for path, spec in specs.items()}
    if missing := [path for path, value in given.items() if value is REQUIRED and is_read(specs[path], given)]:
        raise UserError(f"{missing[0]} is not given: {specs[missing[0]].option.leaf.doc}")
    checked = {path: checked_value(specs[path], value) for path, value in given.items()}
    unread = unread_leaves(specs, checked)
    checked |= {path: specs[path].option.default for path in unread if path in forget}
    if refused := {path: reason for path, reason in unread.items() if path not in forget}:
        path, reason = next(iter(refused.items()))
        raise UserError(f"{path} = {checked[path]!r} is not read {reason}; valid: {specs[path].option.default!r}")
    check_published(checked)
    return _make(Config, "", checked, values=checked, model=_model(checked))


def checked_value(spec: Spec, value: Value) -> Value:
    """A value in the type of its leaf; of a place with ~ for the home folder. UserError for one that is not valid."""
    found = check(spec.path, spec.option, value)
    if spec.kind != "place" or not found:
        return found
    try:
        return str(local_path(found))
    except UserError as error:
        raise UserError(f"{spec.path} = {found!r}: {error}") from error


def read_leaves(values: Mapping[str, Value]) -> set[str]:
    """The leaves that something reads, or that are at their defaults; those that are missing have them."""
    specs = leaves(str(values["model.name"]))
    known = {path: checked_value(spec, values[path]) for path, spec in specs.items() if path in values}
    return set(specs) - set(unread_leaves(specs, {path: spec.option.default for path, spec in specs.items()} | known))


def unread_leaves(specs: Mapping[str, Spec], values: Mapping[str, Value]) -> dict[str, str]:
    """The leaves that nothing reads although they are not at their defaults, and why."""
    found = {}
    for path, spec in specs.items():
        if values[path] == spec.option.default or is_read(spec, values):
            continue
        leaf, names = next((leaf, names) for leaf, names in spec.when if values[leaf] not in names)
        found[path] = f"with {leaf} = {values[leaf]}, only with {' or '.join(names) or 'no method'}"
    config = _make(Config, "", values)
    for prefix, section in _sections(config):
        for name, reason in section.unread().items() if hasattr(section, "unread") else ():
            path = f"{prefix}{name.rstrip('_')}"
            if values[path] != specs[path].option.default:
                found[path] = reason
    return found


def is_read(spec: Spec, values: Mapping[str, Value]) -> bool:
    return all(values.get(leaf) in names for leaf, names in spec.when)


def _sections(config: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Every section that a resolved config consists of, with the prefix of its leaves."""
    yield prefix, config
    hints = type_hints(type(config))
    for entry in dataclasses.fields(config):
        value, slot = getattr(config, entry.name), _slot(hints[entry.name])
        if not dataclasses.is_dataclass(value) or isinstance(value, Model):
            continue
        if isinstance(slot, Chosen) and not slot.flat:
            yield from _sections(value, f"{prefix}{getattr(config, slot.by)}.")
        else:
            yield from _sections(value, f"{prefix}{entry.name}.")


def _make(section: type, prefix: str, values: Mapping[str, Value], /, **given: Any) -> Any:
    """An instance of a section dataclass, of the leaves whose names begin with `prefix`."""
    own = options(section)
    hints = type_hints(section)
    for entry in dataclasses.fields(section):
        hint = hints[entry.name]
        if entry.name in given:
            continue
        if entry.name in own:
            given[entry.name] = values[prefix + entry.name.rstrip("_")]
        elif is_section(hint):
            given[entry.name] = _make(hint, f"{prefix}{entry.name}.", values)
        elif slot := _slot(hint):
            made = {}
            for inner, component, conditions in _components(slot, entry.name, prefix):
                if all(values[leaf] in names for leaf, names in conditions):
                    name = conditions[0][1][0] if conditions else inner.split(".")[-2]
                    made[name] = _of_values(component, inner, values)
            given[entry.name] = made if isinstance(slot, Each) else next(iter(made.values()), {})
    return section(**given)


def _of_values(component: Any, prefix: str, values: Mapping[str, Value]) -> Any:
    if isinstance(component, type) and dataclasses.is_dataclass(component):
        return _make(component, prefix, values)
    return {name: values[prefix + name] for name in options(component)}


def _model(values: Mapping[str, Value]) -> Model:
    inside = {path.removeprefix("model."): value for path, value in values.items() if path.startswith("model.")}
    return Model(str(inside.pop("name")), inside)


def check_published(values: Mapping[str, Value]) -> None:
    """Raise UserError for a published name with other sizes than it has."""
    name = str(values["model.name"])
    for size, published in models.published_sizes(name).items():
        if values.get(f"model.{size}", published) != published:
            family = models.family_of(name)
            raise UserError(
                f"model.{size} = {values[f'model.{size}']!r}, but {name} has {published!r}; valid: model.name = "
                f"{family!r} with sizes of your own"
            )


def hint(leaf: str, specs: Mapping[str, Spec]) -> str:
    """What an unknown leaf may have been meant to be: "; did you mean ...?", or what its section has."""
    if near := near_leaves(leaf, specs):
        return f"; did you mean {', '.join(near[:5])}?"
    section = f"{leaf.rpartition('.')[0]}."
    if inside := [path.removeprefix(section) for path in specs if path.startswith(section)]:
        return f"; leaves of {section[:-1]}: {', '.join(inside)}"
    return f"; sections: {', '.join(sorted({path.partition('.')[0] for path in specs if '.' in path}))}"


def near_leaves(leaf: str, specs: Mapping[str, Spec]) -> list[str]:
    """Leaves with a similar path, with the same last name or with its initials (learning_rate: lr), nearest first."""
    if leaf in specs:
        return [leaf]
    section, _, last = leaf.rpartition(".")
    near = difflib.get_close_matches(leaf, specs, n=3, cutoff=0.75)
    alike = [path for path in specs if path.rpartition(".")[2] in (last, _initials(last))]
    own = [path for path in alike if path.rpartition(".")[0] == section]
    return list(dict.fromkeys([*own, *near, *alike]))


def _initials(name: str) -> str:
    words = name.split("_")
    return "".join(word[:1] for word in words) if len(words) > 1 else name


def section_values(prefix: str, section: Any) -> dict[str, Value]:
    """The leaves by path of a section whose names begin with `prefix`; of options those that are given."""
    found: dict[str, Value] = {}
    hints = type_hints(type(section))
    for entry in dataclasses.fields(section):
        value, slot = getattr(section, entry.name), _slot(hints[entry.name])
        if dataclasses.is_dataclass(value):
            found |= section_values(f"{prefix}{entry.name}.", value)
        elif isinstance(slot, Chosen):
            inner = prefix if slot.flat else f"{prefix}{getattr(section, slot.by)}."
            found |= {inner + name: option for name, option in value.items()}
        else:
            found[prefix + entry.name.rstrip("_")] = value
    return found
