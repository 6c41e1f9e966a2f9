"""`bench`: both times of a report."""

import json

import pytest

from diffjax.__main__ import main
from diffjax.ops.selective_scan import _default
from tests.programs import TINY


@pytest.mark.parametrize("model", ["dit", pytest.param("dis", marks=pytest.mark.slow)])  # it logs its kind of scan
def test_bench_reports_both_times(capsys, model):
    _default.cache_clear()  # what is logged once is logged now
    recipe = TINY.replace("=dit", f"={model}")
    assert main(["bench", f"--config={recipe}", "--steps=2", "--turns=1", "--config.log.tensorboard=false"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["loop_over_step"] == pytest.approx(report["loop_seconds"] / report["step_seconds"])
    assert report["images_per_second"] == pytest.approx(16 / report["loop_seconds"])
