"""The schema: every leaf is read by something or refused, defaults are valid, and nothing else reads a config."""

import ast
import dataclasses
import itertools
import subprocess
import sys
from collections.abc import Iterator, Mapping
from typing import Any

import pytest

from diffjax import experiment, inputs, models
from diffjax.config import describe, earlier, schema
from diffjax.config.load import base, load, nested, override, stored_values
from diffjax.config.schema import Config, is_read, leaves, resolve, unread_leaves
from diffjax.data import sources
from diffjax.data.source import Source
from diffjax.diffusion import PROCESSES, samplers
from diffjax.errors import UserError
from diffjax.methods import METHODS
from diffjax.options import KINDS, REQUIRED, check
from diffjax.trees import leaves as flat
from tests import slow
from tests.programs import ROOT

TINY = {"model.name": "DiT", "model.patch": 2, "model.depth": 1, "model.width": 16, "model.heads": 2}
TOKENS = {"model.name": "DiGIT", "model.depth": 1, "model.width": 16, "model.heads": 2}
TOKENS |= {"method": "tokens", "data.channels": 1, "data.size": 4, "data.encoder": "pixels", "data.vocabulary": 8}
SMALL = {"batch_size": 8, "data.size": 8, "data.channels": 1, "data.num_classes": 3, "parallel.mesh.data": -1}


EVALS = {"evals.samples.every_steps": 1, "evals.loss.every_steps": 1, "evals.scores.every_steps": 1}


def values(**overrides: Any) -> dict[str, Any]:
    """Leaves of a tiny diffusion config on the digits."""
    return {"data.name": "digits", **TINY, **SMALL, **EVALS, **overrides}


class Spy(Mapping[str, Any]):
    """Options that note which of them are looked up."""

    def __init__(self, options: Mapping[str, Any], prefix: str, seen: set[str]):
        self._options, self._prefix, self._seen = options, prefix, seen

    def __getitem__(self, name: str) -> Any:
        value = self._options[name]
        self._seen.add(f"{self._prefix}{name}")
        return Spy(value, f"{self._prefix}{name}.", self._seen) if isinstance(value, Mapping) else value

    def __iter__(self) -> Iterator[str]:
        return iter(self._options)

    def __len__(self) -> int:
        return len(self._options)


def spied(section: Any, prefix: str, seen: set[str]) -> Any:
    """A copy of a section that notes which of its leaves are read."""
    replaced = {}
    for path, inner in schema._sections(section, prefix):
        if inner is not section and path.count(".") == prefix.count(".") + 1:
            name = next(f.name for f in dataclasses.fields(section) if getattr(section, f.name) is inner)
            replaced[name] = spied(inner, path, seen)
    hints = {entry.name: schema._slot(hint) for entry, hint in _hints(type(section))}
    for entry in dataclasses.fields(section):
        value, slot = getattr(section, entry.name), hints[entry.name]
        if isinstance(value, Mapping) and slot is not None:
            inside = f"{prefix}{entry.name}." if isinstance(slot, schema.Each) else prefix
            if isinstance(slot, schema.Chosen) and not slot.flat:
                inside = f"{prefix}{getattr(section, slot.by)}."
            replaced[entry.name] = Spy(value, inside, seen)
    if isinstance(section, Config):
        replaced["model"] = spied_model(section.model, seen)
    own = set(schema.options(type(section)))

    class Noting(type(section)):  # type: ignore[misc]
        def __getattribute__(self, name: str) -> Any:
            if name in own:
                seen.add(prefix + name.rstrip("_"))
            return super().__getattribute__(name)

    Noting.__name__ = type(section).__name__
    current = {f.name: getattr(section, f.name) for f in dataclasses.fields(section)}
    return Noting(**{**current, **replaced})


def _hints(section: type) -> list[tuple[Any, Any]]:
    import typing

    hints = typing.get_type_hints(section, include_extras=True)
    return [(entry, hints[entry.name]) for entry in dataclasses.fields(section)]


def spied_model(model: schema.Model, seen: set[str]) -> schema.Model:
    class Noting(schema.Model):
        def __getattribute__(self, name: str) -> Any:
            if name == "name":
                seen.add("model.name")
            return super().__getattribute__(name)

    return Noting(model.name, Spy(model.options, "model.", seen))


def fake_source(name: str, **given: Any) -> Source:
    """In the place of data that are not here; a source takes exactly the options that it has."""
    known = sources.SOURCES[name].__kwdefaults__ or {}
    assert not set(given) - set(known) - {"size", "channels", "num_classes", "condition", "condition_size", "flip"}
    return DIGITS


DIGITS = sources.digits()


def read_leaves(config: Config, monkeypatch: pytest.MonkeyPatch) -> set[str]:
    """The leaves that are read when a run is built, its data opened, trained, evaluated and sampled."""
    seen: set[str] = set()
    monkeypatch.setattr(inputs.sources, "load", fake_source)
    monkeypatch.setattr(experiment.encoders, "check_made_as_stated", lambda folder, made: None)
    watched = spied(config, "", seen)
    seen.clear()
    built = experiment.build(watched)
    _ = built.sampler, built.source, built.initial, built.tensorboard, built.seed, built.evaluators()
    built.stream().close()
    if config.method == "tokens":
        inputs.tokenization(built.config)
    if config.data.name == "latents":
        inputs.encoding(built.config)
    return seen & set(leaves(config.model.name))


# Leaves that the loop and the commands use by way of the experiment; and the shape of the mesh, read as a whole.
MESH = {f"parallel.mesh.{axis}" for axis in ("data", "fsdp", "tensor")}
SAMPLERS_OF = {
    "gaussian": ("ddpm", "ddim", "edm", "dpmpp_2m"),
    "flow_linear": ("ddim", "edm", "dpmpp_2m", "euler", "heun", "dopri5", "euler_maruyama", "sde_heun"),
}
COMBINATIONS = [
    *(("diffusion", source, process, sampler) for source in sources.SOURCES if source != "tokens"
      for process, each in SAMPLERS_OF.items() for sampler in each),
    ("tokens", "tokens", "", ""),
]  # fmt: skip
OTHERS = [
    *({"diffusion.process": process, "sampling.sampler": "edm", "sampling.steps": 4} for process in PROCESSES),
    *({"optim.name": name} for name in ("fairseq_adam", "adafactor")),
    {"optim.schedule": "inverse_sqrt", "optim.decay_after_steps": 5},
    {"ema.kind": "halflife", "ema.halflife_images": 100.0},
    *({"sampling.guidance.scale": 2.0, "sampling.guidance.schedule": kind} for kind in ("power_cosine", "interval")),
]


def combination(method: str, source: str, process: str, sampler: str) -> dict[str, Any]:
    if method == "tokens":
        return {**SMALL, **TOKENS, "data.name": source}
    steps = 0 if sampler == "dopri5" else 3
    latents = {"evals.samples.every_steps": 0, "evals.scores.every_steps": 0, "autoencoder.weights": "vae"}
    pictures = latents if source == "latents" else {}
    return values(
        **pictures,
        **{"data.name": source, "diffusion.process": process, "sampling.sampler": sampler, "sampling.steps": steps},
    )


def declared(config: Config) -> set[str]:
    """The leaves that the schema says are read."""
    specs = leaves(config.model.name)
    idle = {f"{prefix}{name.rstrip('_')}" for prefix, section in schema._sections(config)
            if hasattr(section, "unread") for name in section.unread()}  # fmt: skip
    idle |= {  # an evaluator that never runs
        path
        for path in specs
        if path.startswith("evals.") and not path.endswith(".every_steps")
        and not config.values[f"{path.rpartition('.')[0]}.every_steps"]
    }  # fmt: skip
    return {path for path, spec in specs.items() if is_read(spec, config.values) and path not in idle}


def another(spec: schema.Spec, default: Any) -> Any:
    """A valid value beside the default."""
    kind = spec.option.type
    candidates: list[Any] = [True, False, 1, 2, 3, 4, 0, 100, 0.5, 0.25, 1.5, 5.0, "x", (0.1,), ("labels",)]
    for table in (sources.SOURCES, samplers.SAMPLERS, PROCESSES):
        candidates += list(table)
    words = spec.option.leaf.valid.words.split(", ") if spec.option.leaf.valid else []
    for candidate in [*words, *candidates]:
        try:
            value = check(spec.path, spec.option, candidate)
        except UserError:
            continue
        if value != default:
            return value
    raise AssertionError(f"{spec.path}: no other value than {default!r} of {kind} found")


@pytest.mark.parametrize(
    "method, source, process, sampler",
    slow.but([each for each in COMBINATIONS if "digits" in each or each[3] in ("", "ddpm")], COMBINATIONS),
)
def test_every_leaf_is_read_or_refused(method, source, process, sampler, monkeypatch):
    check_leaves(resolve(combination(method, source, process, sampler)), monkeypatch)


@pytest.mark.parametrize("overrides", OTHERS, ids=lambda each: " ".join(map(str, each.values())))
def test_leaves_of_other_components_are_read_or_refused(overrides, monkeypatch):
    check_leaves(resolve(values(**overrides)), monkeypatch)


def check_leaves(config: Config, monkeypatch: pytest.MonkeyPatch) -> None:
    specs = leaves(config.model.name)
    read = read_leaves(config, monkeypatch)
    if read & MESH or "parallel.mesh" in read:
        read |= MESH
    said = declared(config)
    assert said - read - MESH == set(), "the schema says that they are read"
    handed_on = {
        *METHODS[config.method].unread,
        "autoencoder.weights",
    }  # facts of the data, which every method is given
    assert read - said - handed_on == set(), "the schema says that they are not read"
    idle = [path for path in specs if path not in said and not path.startswith("evals.")]
    changed = {path: another(specs[path], specs[path].option.default) for path in idle}
    assert set(unread_leaves(specs, {**config.values, **changed})) == set(idle)


def test_a_leaf_without_effect_is_refused_by_name():
    with pytest.raises(UserError, match="data.scale = 0.5 is not read with data.name = digits, only with latents"):
        resolve(values(**{"data.scale": 0.5}))
    with pytest.raises(UserError, match="sampling.ddim.eta = 1.0 is not read with sampling.sampler = ddpm"):
        resolve(values(**{"sampling.ddim.eta": 1.0}))
    with pytest.raises(UserError, match="tokens.smoothing = 0.1 is not read with method = diffusion, only with tokens"):
        resolve(values(**{"tokens.smoothing": 0.1}))
    with pytest.raises(UserError, match="ema.halflife_images = 9.0 is not read with ema.kind = constant"):
        resolve(values(**{"ema.halflife_images": 9.0}))
    with pytest.raises(UserError, match="optim.decay_after_steps = 5 is not read with .* optim.schedule = constant"):
        resolve(values(**{"optim.decay_after_steps": 5}))


def test_what_an_override_leaves_unread_goes_back_to_its_default():
    """The recipe sets the decay of a constant average, which one with a half-life does not read."""
    recipe = f"{ROOT}/configs/quickstart.py:model=dit"
    config = load(recipe, ["--config.ema.kind=halflife", "--config.ema.halflife_images=100"])
    assert (config.values["ema.decay"], config.values["ema.decay_rampup"]) == (0.9999, 0.0)
    again = override(load(recipe), ["--config.ema.kind=halflife", "--config.ema.halflife_images=100"])
    assert again == config
    with pytest.raises(UserError, match="ema.decay = 0.9 is not read with ema.kind = halflife"):
        load(recipe, ["--config.ema.kind=halflife", "--config.ema.halflife_images=100", "--config.ema.decay=0.9"])


def test_another_backbone_takes_what_it_knows_of_the_sizes_before():
    recipe = f"{ROOT}/configs/folder.py:size=32,classes=3"
    other = load(recipe, ["--config.model.name=DiS"]).values  # which has no heads
    assert (other["model.depth"], other["model.width"]) == (4, 128)
    assert "model.heads" not in other
    published = load(recipe, ["--config.model.name=dis-s-4"]).values
    assert published["model.width"] == 368
    own = load(f"{recipe},model=dis-s-4", ["--config.model.name=DiS", "--config.model.depth=4"]).values
    assert (own["model.depth"], own["model.width"], own["model.patch"]) == (4, 368, 4)


@pytest.mark.parametrize(
    "line, message",
    [
        ("c.data.scale = 0.5", "data.scale = 0.5 is not read with data.name = digits"),
        ("c.ema.kind = 'halflfe'", "ema.kind = 'halflfe'"),
    ],
)
def test_a_mistake_in_a_recipe_is_named_whatever_is_overridden(tmp_path, line, message):
    recipe = tmp_path / "mine.py"
    text = (ROOT / "configs/quickstart.py").read_text()
    recipe.write_text(text.replace("    return c\n", f"    {line}\n    return c\n"))
    with pytest.raises(UserError, match=message):
        load(f"{recipe}:model=dit", ["--config.optim.lr=1e-4"])


def test_a_stored_config_gets_the_defaults_of_its_version(monkeypatch):
    stored = {"version": 2, **nested({path: value for path, value in values().items() if path != "data.flip"})}
    assert stored_values(stored).data.flip is False
    monkeypatch.setitem(earlier.DEFAULTS, 2, {"data.flip": True})
    assert stored_values(stored).data.flip is True
    for version in ("2", None, 0, earlier.VERSION + 1):
        with pytest.raises(UserError, match="version"):
            stored_values({**stored, "version": version})


def test_every_default_is_valid_and_every_leaf_is_said():
    for family in ("", *models.FAMILIES):
        for path, spec in leaves(family).items():
            assert spec.kind in KINDS, path
            assert spec.option.leaf.doc, path
            assert "\n" not in spec.option.leaf.doc, path
            if spec.option.default is not REQUIRED and path != "model.name":
                assert check(path, spec.option, spec.option.default) == spec.option.default, path


def test_the_config_of_a_recipe_has_all_leaves():
    assert set(flat(base("DiT").to_dict())) | {"data.name"} >= {
        path for path, spec in leaves("DiT").items() if spec.option.default is not REQUIRED
    }


def test_the_page_of_leaves_is_up_to_date():
    assert (ROOT / "docs/config.md").read_text() == describe.markdown()


def attributes() -> Iterator[tuple[str, int, str]]:
    """(file, line, attribute) of every `config.ATTRIBUTE` and `x.config.ATTRIBUTE` outside the places that may."""
    for path in sorted((ROOT / "diffjax").rglob("*.py")):
        place = path.relative_to(ROOT / "diffjax").as_posix()
        if place.startswith("config/") or place in ("experiment.py", "inputs.py"):
            continue
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Attribute):
                owner = node.value
                name = owner.id if isinstance(owner, ast.Name) else getattr(owner, "attr", "")
                if name in ("config", "stored", "given_config"):
                    yield place, node.lineno, node.attr


def test_a_config_is_read_in_one_place():
    fields = {field.name for field in dataclasses.fields(Config)}
    assert [each for each in attributes() if each[2] in fields] == []


def test_only_the_config_package_knows_config_dicts():
    for path in (ROOT / "diffjax").rglob("*.py"):
        if "config" not in path.parts:
            assert "ml_collections" not in path.read_text(), path
        assert '"tokens" in config' not in path.read_text(), path


def test_lists_of_prefixes_of_leaves_are_gone():
    """What a leaf is, the schema says; no second list of names."""
    prefixes = {f"{section}." for section in {path.partition(".")[0] for path in leaves("") if "." in path}}
    for path in (ROOT / "diffjax").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Tuple | ast.List | ast.Set):
                texts = [each.value for each in node.elts if isinstance(each, ast.Constant)]
                free = path.name == "runs.py" or path.parent.name == "weights"  # whose prefixes are those of others
                assert free or not [text for text in texts if text in prefixes], (path, texts)


def test_no_entry_of_sys_path_outlives_the_loading_of_a_recipe():
    script = (
        "import sys; before = list(sys.path)\n"
        "from diffjax.config import load\n"
        f"load({str(ROOT / 'configs/quickstart.py')!r})\n"
        "assert sys.path == before, set(sys.path) - set(before)\n"
    )
    subprocess.run([sys.executable, "-c", script], cwd="/", env={**_environment(), "PYTHONPATH": str(ROOT)}, check=True)


def _environment() -> dict[str, str]:
    import os

    return dict(os.environ)


def test_combinations_are_all_of_them():
    assert {each[1] for each in COMBINATIONS} == set(sources.SOURCES)
    assert {each[3] for each in COMBINATIONS} - {""} == set(samplers.SAMPLERS)
    assert len(list(itertools.chain(COMBINATIONS))) > 60
