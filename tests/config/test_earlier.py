"""Earlier spellings of leaves, on the command line and in config.json of versions 1 and 2."""

import json

import pytest

from diffjax.config import load
from diffjax.config.load import resumed, stored, stored_values
from diffjax.errors import UserError
from tests.programs import ROOT

RECIPE = f"{ROOT}/configs/quickstart.py:model=dit"


@pytest.mark.parametrize(
    "options, leaf, value",
    [
        ("churn=40,churn_max=inf", "churn_max", None),
        ("churn=40,churn_max=50", "churn_max", 50.0),
        ("order=1", "order", 1),
    ],
)
def test_options_of_a_sampler_as_one_text(options, leaf, value):
    given = load(RECIPE, ["--config.sampling.sampler=edm", f"--config.sampling.options={options}"])
    assert given.values[f"sampling.edm.{leaf}"] == value


@pytest.mark.parametrize("text, high", [("interval,low=0.5,high=inf", None), ("interval,low=0.5,high=3", 3.0)])
def test_a_guidance_interval_as_one_text(text, high):
    given = load(RECIPE, ["--config.sampling.guidance=2", f"--config.sampling.guidance_weights={text}"])
    assert given.values["sampling.guidance.interval.low"] == 0.5
    assert given.values["sampling.guidance.interval.high"] == high


def test_no_limit_in_a_config_of_version_1():
    tree = stored(load(RECIPE))
    del tree["version"]
    tree["sampling"] |= {"sampler": "edm", "options": "churn=40,churn_max=inf"}
    tree["sampling"] |= {"guidance": 2.0, "guidance_weights": "interval,low=0.5,high=inf"}
    found = stored_values(tree).values
    assert (found["sampling.edm.churn"], found["sampling.edm.churn_max"]) == (40.0, None)
    assert (found["sampling.guidance.scale"], found["sampling.guidance.interval.high"]) == (2.0, None)


@pytest.mark.parametrize("name, decode", [("folder", "stored"), ("digits", "shown")])
def test_files_of_a_config_without_the_leaf_are_decoded_as_they_were(name, decode):
    """Folders of images were read without orientation and transparency; other sources do not read the leaf."""
    tree = {**stored(load(RECIPE)), "version": 2}
    tree["data"] |= {"name": name}
    del tree["data"]["decode"]
    assert stored_values(tree).values["data.decode"] == decode


DIGIT = f"{ROOT}/configs/quickstart.py:model=digit"
RENAMED = [
    (DIGIT, "data.codes", "data.vocabulary", 16),
    (DIGIT, "data.decoder_codes", "data.decoder_vocabulary", 7),
    (RECIPE, "ema.tracks", "ema.sigma_rel", (0.05, 0.1)),
]


@pytest.mark.parametrize("recipe, old, new, value", RENAMED)
def test_a_renamed_leaf_on_the_command_line(recipe, old, new, value):
    text = ",".join(map(str, value)) if isinstance(value, tuple) else value
    assert load(recipe, [f"--config.{old}={text}"]).values[new] == value


@pytest.mark.parametrize("version", [1, 2])
@pytest.mark.parametrize("recipe, old, new, value", RENAMED)
def test_a_renamed_leaf_of_a_stored_config(recipe, old, new, value, version):
    tree = {**stored(load(recipe)), "version": version}
    section, leaf = old.split(".")
    tree[section] = {**tree[section], leaf: value}
    del tree[section][new.split(".")[1]]
    assert stored_values(tree).values[new] == value


def test_a_run_goes_on_with_its_own_meaning_of_leaves_that_came_later(tmp_path):
    """The quickstart ramps its average up since; a run begun before continues as it was, unless the leaf is given."""
    today = load(RECIPE)
    tree = stored(today)
    del tree["ema"]["decay_rampup"]
    path = tmp_path / "config.json"
    path.write_text(json.dumps({**tree, "version": 2}))
    assert today.ema.decay_rampup == 0.1
    assert resumed(path, today, []).ema.decay_rampup == 0.0
    assert resumed(path, today, ["--config.ema.decay_rampup=0.1"]) == today
    path.write_text(json.dumps(stored(today)))
    assert resumed(path, today, []) == today


LATENTS = f"{ROOT}/configs/imagenet256.py:model=dit-s-2"


def test_one_scale_is_written_as_before_and_several_come_back():
    """config.json of runs that began before channels could be scaled each by its own."""
    tree = stored(load(LATENTS))
    assert (tree["data"]["scale"], tree["data"]["shift"]) == (0.18215, 0.0)
    for leaf in ("shift", "input_range", "images"):
        del tree["data"][leaf]
    assert stored_values(json.loads(json.dumps(tree))) == load(LATENTS)
    numbers = load(LATENTS, ["--config.data.scale=0.5,1,2,4", "--config.data.shift=1,0,-1,0.5"])
    assert numbers.values["data.scale"] == (0.5, 1.0, 2.0, 4.0)
    assert stored_values(json.loads(json.dumps(stored(numbers)))) == numbers
    assert load(LATENTS, ["--config.data.scale=0.5"]).values["data.scale"] == 0.5
    with pytest.raises(UserError, match=r"data.scale = \(0.5, 0.0\): valid: above 0"):
        load(LATENTS, ["--config.data.scale=0.5,0"])


def test_a_recipe_may_say_one_scale_or_several(tmp_path):
    for value in (0.5, 1, (0.5, 1.0, 2.0, 4.0)):
        recipe = tmp_path / "mine.py"
        recipe.write_text(
            "from configs import common\n\n\ndef get_config(arg=None):\n    c = common.base()\n"
            "    common.published(c, 'DiT-S/2')\n"
            f"    c.data.name, c.data.scale = 'latents', {value}\n    return c\n"
        )
        assert load(str(recipe)).values["data.scale"] == value
