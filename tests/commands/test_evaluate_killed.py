"""`evaluate` of a run, killed again and again, ends with the values of a command that was left alone."""

import json
import random

import numpy as np
import pytest

from diffjax.__main__ import main
from diffjax.sampling.samples import read_samples
from tests.parallel.test_two_processes import begin, finish
from tests.programs import kill, train_arguments, wait_for

NUM, BATCH = 2000, 16
KILLS = 5


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    workdir = tmp_path_factory.mktemp("evaluated") / "run"
    assert main(train_arguments(workdir, "total_steps=2")) == 0
    return workdir


@pytest.fixture(scope="module")
def whole(run, tmp_path_factory):
    """The result and the images of one process with two devices, left alone."""
    folder = tmp_path_factory.mktemp("whole")
    finish(arguments(run, folder, "whole"), folder, "whole", 1, XLA_FLAGS="--xla_force_host_platform_device_count=2")
    return result(folder, "whole"), folder


def arguments(run, folder, name):
    flags = (f"--workdir={run}", f"--num={NUM}", "--reference=digits", f"--batch_size={BATCH}")
    return ["evaluate", *flags, f"--out={folder}/{name}.json", f"--keep_images={folder}/{name}"]


def result(folder, name):
    return json.loads((folder / f"{name}.json").read_text())


@pytest.mark.slow
@pytest.mark.parametrize("processes", [1, 2])
def test_kills_change_no_value(run, whole, tmp_path, processes):
    """Killed at five random moments, on one process and on two: the same values, nothing drawn or counted twice."""
    given = {"XLA_FLAGS": "--xla_force_host_platform_device_count=2"} if processes == 1 else {}
    parts = tmp_path / "killed.json.features.npz.parts"
    for wanted in sorted(random.Random(processes).sample(range(processes, processes * NUM // BATCH - 8), KILLS)):
        programs, logs = begin([arguments(run, tmp_path, "killed")] * processes, tmp_path, "killed", **given)
        assert wait_for(lambda: len(list(parts.glob("part-*"))) >= wanted, programs[0], logs[0])  # noqa: B023
        for program in programs:
            kill(program)
    finish(arguments(run, tmp_path, "killed"), tmp_path, "killed", processes, **given)
    expected, folder = whole
    found = result(tmp_path, "killed")
    assert found["protocol"] == expected["protocol"]
    for score, column in expected["values"].items():
        for name, value in column.items():
            if name != "rule":
                np.testing.assert_allclose(found["values"][score][name], value, rtol=1e-9, err_msg=f"{score} {name}")
    images = [read_samples(each / name / "samples.npz")[0] for each, name in ((tmp_path, "killed"), (folder, "whole"))]
    np.testing.assert_array_equal(*images)
    assert not list(tmp_path.rglob("*.parts"))
