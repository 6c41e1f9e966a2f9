"""Differences between a run's config and the given one: how they are reported and undone."""

import json
import re
import shlex

import pytest

from diffjax import commands
from diffjax.config import check_same_run
from diffjax.config.load import check_same_on_all, stored
from diffjax.errors import UserError
from tests.programs import tiny_config


@pytest.mark.parametrize("leaves", [("optim.lr=0.5", "model.depth=3", "ema.sigma_rel=0.1,0.2"), ("seed=7",)])
def test_the_leaves_of_the_run_can_be_pasted(leaves):
    stored = tiny_config(*leaves)
    with pytest.raises(UserError) as refused:
        check_same_run(stored, tiny_config())
    given = re.search(" or give (.*) to continue as before", str(refused.value)).group(1)
    assert tiny_config(*(each.removeprefix("--config.") for each in shlex.split(given))) == stored


def test_of_many_leaves_none_is_spelled_out():
    stored = tiny_config("optim.lr=0.5", "optim.warmup_steps=1", "batch_size=8", "total_steps=3")
    other = tiny_config(*(f"model.{leaf}" for leaf in ("depth=3", "width=96", "heads=2", "patch=4", "mlp_ratio=2")))
    with pytest.raises(UserError, match="use another --workdir, or leave out --config, which"):
        check_same_run(stored, other)


def test_a_moved_run_asks_for_the_same(tmp_path):
    old, new = ({"labels": "2", "origin": {"workdir": name, "sha256": "1"}, "code_version": name} for name in "ab")
    commands.refuse_other(tmp_path, old, new)
    with pytest.raises(UserError, match=r'labels \("2", now "1"\); choose'):
        commands.refuse_other(tmp_path, old, new | {"labels": "1"})


def test_processes_may_differ_in_where_files_lie_alone():
    def text(*overrides, model="dit"):
        return json.dumps(stored(tiny_config(*overrides, model=model)))

    check_same_on_all([text()] * 3)
    elsewhere = [text(f"init.from={place}") for place in ("/mnt/a", "/mnt/b")]
    check_same_on_all(elsewhere)
    with pytest.raises(UserError, match=r"process 2 .* process 0: optim.lr: 0.1 -> 0.2; seed: 0 -> 3 \(0 -> 2\); "):
        check_same_on_all([text("optim.lr=0.1")] * 2 + [text("optim.lr=0.2", "seed=3")])
    with pytest.raises(UserError, match="process 1 .*init.from: '' -> '/mnt/a'"):
        check_same_on_all([text(), elsewhere[0]])
    with pytest.raises(UserError, match="process 1 .*model.name: 'DiT' -> 'DiS'"):
        check_same_on_all([text(), text(model="dis")])
