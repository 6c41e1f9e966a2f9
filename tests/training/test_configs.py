"""Recipes: their resolved values, that each of them runs, and that nothing in them is without effect.

`DIFFJAX_WRITE_GOLDEN=1 pytest tests/training/test_configs.py` writes the stored values anew, to be reviewed.
"""

import ast
import dataclasses
import json
import os
import re
from pathlib import Path

import pytest

from configs import common
from diffjax.__main__ import main
from diffjax.data.sources import SOURCES
from diffjax.errors import UserError
from diffjax.models import FAMILIES, create
from diffjax.models.udit import VANILLA
from diffjax.parallel.mesh import AXES
from diffjax.training import config as configs
from diffjax.training.objective import build_model, build_objective
from tests.programs import BACKBONES, ROOT, complete_steps

RECIPES = sorted(path.stem for path in (ROOT / "configs").glob("*.py") if path.stem not in ("__init__", "common"))
GOLDEN = ROOT / "tests/golden/configs"
EMBEDDED = ("digits", "emoji32")
UNPREPARED = [name for name in BACKBONES if name != "digit"]  # which needs codes first: tests/verbs/test_probe.py


def load(recipe: str, *overrides: str):
    return configs.load(f"{ROOT}/configs/{recipe}", list(overrides))


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
    "digit_stage1": ["model=digit-l", "classes", "codes=2048", "model=digit-b-vq"],
    "digit_stage2": ["decoding=nar", "decoding=nar,runlocal", "model=digit-l"],
    "diffit_ffhq64": ["model=diffit-ffhq64_l2"],
}


def arguments(recipe: str) -> list[str]:
    return ["", "runlocal", *VARIANTS.get(recipe, [])]


@pytest.mark.parametrize("recipe", RECIPES)
def test_values_are_the_stored_ones(recipe):
    plain = configs.flatten(load(f"{recipe}.py"))
    resolved = {"": plain}
    for argument in arguments(recipe)[1:]:  # of these what differs; null: a leaf that is gone
        values = configs.flatten(load(f"{recipe}.py:{argument}"))
        names = sorted(name for name in plain | values if plain.get(name) != values.get(name))
        resolved[argument] = {name: values.get(name) for name in names}
    path = GOLDEN / f"{recipe}.json"
    if os.environ.get("DIFFJAX_WRITE_GOLDEN"):
        path.parent.mkdir(exist_ok=True)
        path.write_text(json.dumps(resolved, indent=1, sort_keys=True) + "\n")
    assert resolved == json.loads(path.read_text())


def test_every_stored_recipe_exists():
    assert sorted(path.stem for path in GOLDEN.glob("*.json")) == RECIPES


@pytest.mark.parametrize(
    "recipe, argument", [(recipe, argument) for recipe in RECIPES for argument in arguments(recipe)]
)
def test_recipes_describe_a_model_and_an_objective(recipe, argument):
    config = load(f"{recipe}.py:{argument}")
    build_model(config)
    build_objective(config)
    assert config.data.name in SOURCES


@pytest.mark.parametrize(
    "recipe",
    [
        *(f"{name}.py:runlocal" for name in RECIPES if load(f"{name}.py").data.name in EMBEDDED),
        *(pytest.param(f"quickstart.py:model={name},runlocal", marks=pytest.mark.slow) for name in UNPREPARED[1:]),
    ],
)
def test_embedded_recipes_run_with_pictures_and_tensorboard(recipe, tmp_path, capsys):
    arguments = [f"--config={ROOT}/configs/{recipe}", f"--workdir={tmp_path}", "--config.total_steps=2"]
    assert main(["train", *arguments]) == 0
    assert complete_steps(tmp_path) == [2]
    assert list((tmp_path / "samples").glob("step_*.png"))
    assert list((tmp_path / "tensorboard").iterdir())
    assert "step 2/2" in capsys.readouterr().out


@pytest.mark.parametrize("recipe", RECIPES)
def test_recipes_are_short_and_say_their_command(recipe):
    text = (ROOT / f"configs/{recipe}.py").read_text()
    assert len(text.splitlines()) <= 95
    tree = ast.parse(text)
    assert f"python -m diffjax train --config=configs/{recipe}.py" in re.sub(" +", " ", ast.get_docstring(tree))


def test_the_vanilla_recipe_is_the_vanilla_model():
    config = load("udit_imagenet.py:vanilla")
    assert {switch: config.model[switch] for switch in VANILLA} == VANILLA


def test_a_recipe_refuses_models_it_does_not_know():
    with pytest.raises(
        UserError,
        match="model='unet': valid: published names, of digit, dit, dis, udit, diffitxl2, diffitcifar10",
    ):
        load("imagenet256.py:model=unet")


def reads() -> set[tuple[str, str]]:
    """(owner, attribute) for every `owner.attribute` in the package: ("data", "size") for `config.data.size`."""
    found = set()
    for path in Path(ROOT / "diffjax").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name | ast.Attribute):
                owner = node.value.id if isinstance(node.value, ast.Name) else node.value.attr
                found.add((owner, node.attr))
    return found


def test_every_leaf_is_read():
    used = reads()
    used |= {("mesh", axis) for axis in AXES}
    # `create` passes the section as arguments; the name is its own.
    used |= {("images", leaf) for section, leaf in used if section == "data"}  # sources are loaded of either
    used |= {("model", field.name) for family in FAMILIES.values() for field in dataclasses.fields(family)}
    every = configs.flatten(common.base()) | configs.flatten(load("quickstart.py:model=digit"))
    unread = [leaf for leaf in every if tuple(f"config.{leaf}".rsplit(".", 2)[-2:]) not in used]
    assert unread == []


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
    )
    assert isinstance(config.optim.lr, float)
    assert (config.data.flip, config.log.tensorboard, config.model.depth) == (True, False, 3)
    assert create(**config.model, channels=1, num_classes=10, null_class=True, learn_sigma=True).depth == 3
