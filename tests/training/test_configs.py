"""Recipes: their resolved values, that each of them runs, and that nothing in them is without effect.

`DIFFJAX_WRITE_GOLDEN=1 pytest tests/training/test_configs.py` writes the stored values anew, to be reviewed.
"""

import ast
import dataclasses
import functools
import inspect
import json
import os
import re
import sys
from pathlib import Path

import pytest

from configs import common, udit_imagenet
from diffjax.__main__ import main
from diffjax.config import base, leaves
from diffjax.config import load as load_config
from diffjax.config.load import nested, stored_values
from diffjax.data.sources import SOURCES
from diffjax.diffusion import PROCESSES
from diffjax.diffusion.guidance import SCHEDULES
from diffjax.diffusion.samplers import SAMPLERS
from diffjax.errors import UserError
from diffjax.evaluation.evaluators import EVALUATORS
from diffjax.experiment import build
from diffjax.models import FAMILIES
from diffjax.options import REQUIRED, options
from diffjax.trees import leaves as flat
from tests.programs import BACKBONES, ROOT, complete_steps, method_of

RECIPES = sorted(path.stem for path in (ROOT / "configs").glob("*.py") if path.stem not in ("__init__", "common"))
GOLDEN, VERSION_1 = ROOT / "tests/golden/configs", ROOT / "tests/golden/configs_v1"
EMBEDDED = ("digits", "emoji32")
UNPREPARED = [name for name in BACKBONES if name != "digit"]  # which needs tokens first: tests/commands/test_probe.py


def load(recipe: str, *overrides: str):
    return load_config(f"{ROOT}/configs/{recipe}", list(overrides))


RECIPES_OF_EMBEDDED_IMAGES = [n for n in RECIPES if n != "quickstart" and load(f"{n}.py").data.name in EMBEDDED]


# What a recipe can be asked for besides.
VARIANTS = {
    "quickstart": [
        *(f"model={name}" for name in ("dis", "udit", "diffit", "diffit,process=gaussian", "diffit-latent", "digit")),
        *("process=edm", "process=flow_linear", "model=digit,runlocal"),
    ],
    "emoji32": [f"model={name}" for name in ("dis", "udit", "diffit", "diffit-latent")],
    "imagenet256": ["model=udit-b", "model=DiS-B/2", "model=udit-l,runlocal"],
    "udit_imagenet": ["pixels=512", "vanilla"],
    "dis_cifar10": ["labels"],
    "dis_imagenet": ["pixels=512"],
    "diffit_imagenet": ["pixels=512", "pixels=512,runlocal", "guidance=4.6", "guidance=1"],
    "diffit_cifar10": ["model=diffit-cifar10_l2", "model=DiffiT-CIFAR10_w256", "batch=64"],
    "digit_stage1": ["model=digit-l", "classes", "vocabulary=2048", "model=digit-b-vq"],
    "digit_stage2": ["decoding=nar", "decoding=nar,runlocal", "model=digit-l"],
    "diffit_ffhq64": ["model=diffit-ffhq64_l2"],
}


def arguments(recipe: str) -> list[str]:
    return ["", "runlocal", *VARIANTS.get(recipe, [])]


def plain(values) -> dict:
    return json.loads(json.dumps(values))


def chosen(values) -> dict:
    """The leaves that are not at their defaults, which for sizes of a backbone are those of its name."""
    specs = leaves(values["model.name"])
    defaults = plain({path: None if s.option.default is REQUIRED else s.option.default for path, s in specs.items()})
    return {path: value for path, value in plain(values).items() if value != defaults[path]}


@pytest.mark.parametrize("recipe", RECIPES)
def test_values_are_the_stored_ones(recipe):
    """Of the plain recipe the leaves that it chooses; of a variant what differs, null: back at its default."""
    first = chosen(load(f"{recipe}.py").values)
    resolved = {"": first}
    for argument in arguments(recipe)[1:]:
        values = chosen(load(f"{recipe}.py:{argument}").values)
        names = sorted(name for name in first | values if first.get(name) != values.get(name))
        resolved[argument] = {name: values.get(name) for name in names}
    path = GOLDEN / f"{recipe}.json"
    if os.environ.get("DIFFJAX_WRITE_GOLDEN"):
        path.parent.mkdir(exist_ok=True)
        path.write_text(json.dumps(resolved, indent=1, sort_keys=True) + "\n")
    assert resolved == json.loads(path.read_text())


def test_every_stored_recipe_exists():
    assert sorted(path.stem for path in GOLDEN.glob("*.json")) == RECIPES


# Overrides that undo what recipes choose otherwise since version 1.
CHOSEN_SINCE = {name: ["--config.ema.decay_rampup=0"] for name in ("quickstart", "emoji32")}


def stored_by_version_1(recipe: str) -> dict[str, dict]:
    """All leaves by argument of the recipe, as version 1 resolved and stored them."""
    first, *variants = (stored := json.loads((VERSION_1 / f"{recipe}.json").read_text())).items()
    found = {"": first[1]}
    for argument, changes in variants:  # null: a leaf that is gone
        found[argument] = {name: value for name, value in (first[1] | changes).items() if value is not None}
    assert first[0] == ""
    assert found.keys() == stored.keys()
    return found


@pytest.mark.parametrize("recipe", sorted(path.stem for path in VERSION_1.glob("*.json")))
def test_configs_of_version_1_are_those_of_today(recipe):
    """What config.json of that version held becomes the config of the recipe today, but for leaves it chose since."""
    for argument, values in stored_by_version_1(recipe).items():
        argument = argument.replace("codes=", "vocabulary=")
        today = load(f"{recipe}.py:{argument}", *CHOSEN_SINCE.get(recipe, []))
        assert stored_values(nested(values)) == today, argument


@pytest.mark.parametrize(
    "recipe, argument", [(recipe, argument) for recipe in RECIPES for argument in arguments(recipe)]
)
def test_recipes_describe_a_model_and_a_method(recipe, argument):
    config = load(f"{recipe}.py:{argument}")
    assert method_of(config).sampler(config.sampling).schedule is not None
    assert config.data.name in SOURCES


@pytest.mark.slow
@pytest.mark.parametrize(
    "recipe",
    [
        *(f"quickstart.py:model={name},runlocal" for name in UNPREPARED),
        *(f"{name}.py:runlocal" for name in RECIPES_OF_EMBEDDED_IMAGES),
    ],
)
def test_embedded_recipes_run_with_pictures_and_tensorboard(recipe, tmp_path, capsys):
    arguments = [f"--config={ROOT}/configs/{recipe}", f"--workdir={tmp_path}", "--config.total_steps=2"]
    assert main(["train", *arguments]) == 0
    assert complete_steps(tmp_path) == [2]
    assert list((tmp_path / "samples").glob("step_*.png"))
    assert list((tmp_path / "tensorboard").iterdir())
    printed = capsys.readouterr().out
    assert printed.index("compiling the step (once)") < printed.index("step 2/2")


@pytest.mark.parametrize("recipe", RECIPES)
def test_recipes_are_short_and_say_their_command(recipe):
    text = (ROOT / f"configs/{recipe}.py").read_text()
    assert len(text.splitlines()) <= 95
    tree = ast.parse(text)
    assert f"python -m diffjax train --config=configs/{recipe}.py" in re.sub(" +", " ", ast.get_docstring(tree))


def test_the_vanilla_recipe_is_the_vanilla_model():
    config = load("udit_imagenet.py:vanilla")
    assert {switch: config.model.options[switch] for switch in udit_imagenet.VANILLA} == udit_imagenet.VANILLA


def test_a_recipe_refuses_models_it_does_not_know():
    with pytest.raises(
        UserError,
        match="model='unet': valid: published names, of digit, dit, dis, udit, diffitxl2, diffitcifar10",
    ):
        load("imagenet256.py:model=unet")


@functools.cache
def reads() -> set[tuple[str, str]]:
    """(owner, attribute) for every `owner.attribute` in the package: ("data", "size") for `config.data.size`."""
    found = set()
    for path in Path(ROOT / "diffjax").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name | ast.Attribute):
                owner = node.value.id if isinstance(node.value, ast.Name) else node.value.attr
                found.add((owner, node.attr))
    return found


def functions() -> list:
    """Every function whose parameters are leaves."""
    tables = (SAMPLERS, PROCESSES, SCHEDULES, SOURCES, EVALUATORS)
    found = {}
    for table in tables:
        for name, row in table.items():
            for each in (row, *(getattr(row, field.name) for field in fields_of(row))):
                each = each.func if isinstance(each, functools.partial) else each
                if inspect.isfunction(each) and options(each):
                    found[f"{name}-{each.__name__}"] = each
    return [pytest.param(each, id=name) for name, each in found.items()]


def fields_of(row) -> tuple:
    return dataclasses.fields(row) if dataclasses.is_dataclass(row) else ()


@pytest.mark.parametrize("function", functions())
def test_every_leaf_of_a_component_is_read(function):
    tree = ast.parse(inspect.cleandoc("\n" + inspect.getsource(function)))
    body = tree.body[0].body
    used = {node.id for statement in body for node in ast.walk(statement) if isinstance(node, ast.Name)}
    assert [name for name in options(function) if name not in used] == []


@pytest.mark.parametrize("family", FAMILIES)
def test_every_leaf_of_a_backbone_is_read(family):
    source = inspect.getsource(sys.modules[FAMILIES[family].__module__])
    assert [name for name in options(FAMILIES[family]) if not re.search(rf"\bself\.{name}\b", source)] == []


def test_leaves_have_a_place_of_their_own():
    """Every leaf of every component is a leaf of the config, and `base` has them all that have a default."""
    for family in FAMILIES:
        specs = leaves(family)
        assert all(spec.option.leaf.doc for spec in specs.values())
        given = [path for path, spec in specs.items() if spec.option.default is not REQUIRED]
        assert sorted(given) == sorted(flat(base(family).to_dict()))


def test_arguments_are_parsed_by_the_type_of_their_default():
    options = common.parse("size=3,name=x,fast", size=1, name="y", fast=False, rate=0.5)
    assert options.to_dict() == {"size": 3, "name": "x", "fast": True, "rate": 0.5}
    assert common.parse("fast=false", fast=True).fast is False
    for argument in ("size=x", "sise=3", "fast=perhaps"):
        with pytest.raises(ValueError, match="config argument"):
            common.parse(argument, size=1, fast=False)


def test_overrides_take_the_type_of_the_leaf():
    config = load(
        "quickstart.py",
        "--config.optim.lr=1",
        "--config.data.flip",
        "--noconfig.log.tensorboard",
        "--config.model.depth=3",
        "--config.ema.sigma_rel=0.05,0.1",
        "--config.ema.snapshot_every_steps=5",
    )
    assert isinstance(config.optim.lr, float)
    assert (config.data.flip, config.log.tensorboard, config.model.options["depth"]) == (True, False, 3)
    assert config.ema.sigma_rel == (0.05, 0.1)
    assert build(config).model.depth == 3


def test_no_entry_of_the_path_outlives_a_recipe():
    before, modules = list(sys.path), sys.modules.get("configs")
    load("emoji32.py")
    assert sys.path == before
    assert sys.modules.get("configs") is modules
    with pytest.raises(UserError):
        load("emoji32.py:nothing=1")
    assert sys.path == before


OWN_COMMON = """
from configs.more import SEED
from diffjax.config import base, model_defaults

def tiny():
    c = base("DiT")
    c.model.update(model_defaults("DiT"), name="DiT", patch=2, depth=1, width=8, heads=1)
    c.data.name, c.seed = "digits", SEED
    return c
"""


@pytest.mark.parametrize("name", ["configs", "recipes"])
def test_a_recipe_outside_the_checkout_has_its_own_package(tmp_path, monkeypatch, name):
    """Though another `configs` stands on sys.path, and is imported."""
    folder = tmp_path / name
    folder.mkdir()
    (folder / "__init__.py").touch()
    (folder / "more.py").write_text("SEED = 123")
    (folder / "common.py").write_text(OWN_COMMON.replace("from configs", f"from {name}"))
    (folder / "mine.py").write_text(
        f"from {name} import common\n\ndef get_config(arg=None):\n    return common.tiny()\n"
    )
    monkeypatch.syspath_prepend(str(ROOT))
    before = dict(sys.modules)
    assert load_config(str(folder / "mine.py")).seed == 123
    assert sys.modules["configs.common"] is before["configs.common"] is common
    assert load("quickstart.py").seed == 0
    assert load_config(str(folder / "mine.py"), ["--config.seed=3"]).seed == 3


@pytest.mark.parametrize("folder", ["mine", "diffjax", "configs"])
def test_a_recipe_anywhere_finds_what_recipes_share(tmp_path, monkeypatch, folder):
    """Also where another package `configs` comes first, where none is, and in a folder with the name of a package."""
    other = tmp_path / "other/configs"
    other.mkdir(parents=True)
    (other / "__init__.py").touch()
    (tmp_path / folder).mkdir()
    recipe = tmp_path / folder / "recipe.py"
    recipe.write_text((ROOT / "configs/quickstart.py").read_text())
    paths = [path for path in sys.path if not (Path(path) / "configs").is_dir()]
    for path in ([str(tmp_path / "other"), *paths], paths):
        with monkeypatch.context() as patched:
            patched.setattr(sys, "path", path)
            for module in [name for name in sys.modules if name.partition(".")[0] == "configs"]:
                patched.delitem(sys.modules, module)
            assert load_config(f"{recipe}:model=dit,runlocal") == load("quickstart.py:model=dit,runlocal")


def test_a_recipe_in_the_home_folder(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "recipe.py").write_text((ROOT / "configs/emoji32.py").read_text())
    places = ["--config.data.name=folder", "--config.data.dir=~/pictures", "--config.init.from=~/a"]
    config = load_config("~/recipe.py", places)
    assert config.data.options["dir"] == f"{tmp_path}/pictures"
    assert config.init.from_ == f"{tmp_path}/a"


def test_help_prints_all_leaves(capsys):
    assert main(["train", "--help-config"]) == 0
    printed = capsys.readouterr().out
    assert all(f"--config.{path}=" in printed for path in leaves())
    assert "--config.optim.lr=0.0001\n        " in printed
    assert main(["train", "--help-config", f"--config={ROOT}/configs/quickstart.py:model=dis,runlocal"]) == 0
    printed = capsys.readouterr().out
    assert all(f"--config.{path}=" in printed for path in leaves("DiS"))
    assert "--config.model.width=32\n" in printed
    assert "--config.optim.lr=0.003\n" in printed


def test_leaves_that_nothing_reads_are_refused_by_name():
    for override, reason in (
        ("diffusion.edm.p_mean=1", "diffusion.edm.p_mean = 1.0 is not read with diffusion.process = gaussian, only"),
        ("sampling.edm.churn=1", "sampling.edm.churn = 1.0 is not read with sampling.sampler = ddim, only with edm"),
        ("data.vocabulary=5", "data.vocabulary = 5 is not read with data.name = digits, only with tokens"),
        ("tokens.patch=4", "tokens.patch = 4 is not read with method = diffusion, only with tokens"),
        (
            "images.name=emoji32",
            "images.name = 'emoji32' is not read with data.name = digits, only with latents or tokens",
        ),
        ("init.new=head", "init.new = ('head',) is not read without init.from"),
    ):
        with pytest.raises(UserError) as raised:
            load("quickstart.py", f"--config.{override}")
        assert reason in str(raised.value)
    assert load("quickstart.py", "--config.diffusion.process=edm", "--config.diffusion.edm.p_mean=1").seed == 0
