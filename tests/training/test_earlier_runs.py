"""Run folders of the first version go on: resumed they end as their twins did, and the finished ones are sampled alike.

See tests/golden/runs/README.md. On the kind of CPU that made them, with the same jax, every bit is equal; elsewhere the
values are compared to 1e-5.
"""

import hashlib
import json
import os
import platform
import subprocess
import sys
import tarfile
from pathlib import Path

import jax
import numpy as np
import pytest

from diffjax.training.checkpoint import Checkpoints
from tests.programs import ROOT

# Softmax does not depend on it, so its gradient is rounding alone, which Adam scales to steps of the learning rate.
KEY_BIAS = "['attention']['key']['bias']"
FOLDER = ROOT / "tests/golden/runs"
pytestmark = pytest.mark.slow


def made_here() -> bool:
    """Whether this is the kind of machine that made the runs: their bits hold here."""
    lines = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").is_file() else []
    flags = next((line.split(":")[1].split() for line in lines if line.startswith("flags")), [])
    digest = hashlib.sha256(" ".join(sorted(flags)).encode()).hexdigest()
    return json.loads((FOLDER / "cpu.json").read_text()) == {
        "machine": platform.machine(),
        "flags_sha256": digest,
        "jax": jax.__version__,
    }


def diffjax(arguments: list[str], cwd: Path) -> str:
    """`python -m diffjax ...` on one CPU device as a user has it, without the options of these tests."""
    variables = {name: value for name, value in os.environ.items() if name not in ("XLA_FLAGS", "NPROC")}
    result = subprocess.run(
        [sys.executable, "-m", "diffjax", *arguments],
        cwd=cwd,
        env={**variables, "JAX_PLATFORMS": "cpu", "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
    )
    assert result.returncode == 0, result.stderr
    return result.stdout


@pytest.fixture(params=["dit", "digit", "diffit"])
def runs(request, tmp_path) -> tuple[str, Path]:
    """The name of a model, and a folder with its stopped and its finished run."""
    with tarfile.open(FOLDER / f"{request.param}.tar.xz") as archive:
        archive.extractall(tmp_path, filter="data")
    return request.param, tmp_path


def trees(workdir: Path, step: int) -> dict[str, np.ndarray]:
    checkpoints = Checkpoints(workdir, read_only=True)
    found = {item: checkpoints.restore_arrays(item, step) for item in ("state", "ema")}
    return {jax.tree_util.keystr(path): leaf for path, leaf in jax.tree_util.tree_leaves_with_path(found)}


def test_a_stopped_run_ends_as_its_twin(runs):
    name, folder = runs
    moved = []
    if name == "digit":  # its data may have moved since
        (folder / "tokens").rename(folder / "elsewhere")
        moved = ["--config.data.dir=elsewhere"]
    if name == "diffit":  # the recipe's leaf, which an average by half-life does not read
        moved = ["--config.ema.decay=0.9999"]
    recipe, *overrides = json.loads((folder / f"{name}.command.json").read_text())
    recipe = recipe.replace("configs/", f"{ROOT}/configs/")
    diffjax(["train", recipe, f"--workdir={name}-stopped", *overrides, *moved], folder)
    if made_here():
        twin = json.loads((folder / f"{name}-finished/inspect.json").read_text())
        report = json.loads(diffjax(["inspect", f"--workdir={name}-stopped"], folder))
        assert report["sha256"] == twin["sha256"]
        assert report["steps"] == twin["steps"]
    found, expected = (trees(folder / f"{name}-{kind}", 12) for kind in ("stopped", "finished"))
    assert found.keys() == expected.keys()
    for path, leaf in found.items():
        if not path.endswith(KEY_BIAS):
            np.testing.assert_allclose(leaf, expected[path], atol=1e-5, err_msg=path)


def test_a_finished_run_is_sampled_alike(runs):
    name, folder = runs
    diffjax(["sample", f"--workdir={name}-finished", "--num=20", "--out=again.npz"], folder)
    with np.load(folder / f"{name}-finished/samples.npz") as expected, np.load(folder / "again.npz") as found:
        np.testing.assert_array_equal(found["arr_1"], expected["arr_1"])
        difference = np.abs(found["arr_0"].astype(int) - expected["arr_0"])
    assert difference.max() <= (0 if made_here() else 1)  # a grey level is 8e-3
