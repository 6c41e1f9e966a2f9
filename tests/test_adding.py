"""docs/adding.md, executed: its files and rows are put into a copy of the package, and its commands are run there."""

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from tests.programs import ROOT

PAGE = (ROOT / "docs/adding.md").read_text()
FILE = re.compile(r"[Ff]ile\s+`([\w/.]+)`:\n\n```python\n(.*?)```", re.DOTALL)
ROW = re.compile(r"Row of `(\w+)` in `([\w/.]+)`:\n\n```python\n(.*?)```", re.DOTALL)
DATA = re.compile(r"next section:\n\n```python\n(.*?)```", re.DOTALL)
COMMANDS = re.compile(r"```bash\n(.*?)```", re.DOTALL)
pytestmark = pytest.mark.slow


def commands(word: str) -> list[list[str]]:
    """The arguments of the commands of the page in which a word occurs."""
    text = "\n".join(COMMANDS.findall(PAGE)).replace("\\\n", " ")
    return [line.split()[3:] for line in text.splitlines() if word in line]


@pytest.fixture(scope="module")
def checkout(tmp_path_factory) -> Path:
    """A copy of the package and the recipes with everything of the page added."""
    folder = tmp_path_factory.mktemp("adding")
    for name in ("diffjax", "configs"):
        shutil.copytree(ROOT / name, folder / name, ignore=shutil.ignore_patterns("__pycache__"))
    for path, code in FILE.findall(PAGE):
        (folder / path).write_text(code)
    for table, path, code in ROW.findall(PAGE):
        add_row(folder / path, table, code)
    [script] = DATA.findall(PAGE)
    python(folder, "-c", script)
    return folder


def add_row(path: Path, table: str, code: str) -> None:
    """Put the imports of a row at the end of a file's imports, and the row into its table."""
    imports, row = code.split("\n\n", 1)
    text = path.read_text()
    opened = re.search(rf"^{table}: .* = \{{$", text, re.MULTILINE)
    assert opened, (path, table)
    text = text[: opened.end()] + "\n" + row.rstrip() + text[opened.end() :]
    last = list(re.finditer(r"^(?:from|import) .*?(?:\(\n(?:.*\n)*?\))?$", text[: opened.start()], re.MULTILINE))[-1]
    path.write_text(text[: last.end()] + "\n" + imports + text[last.end() :])


def python(folder: Path, *arguments: str, devices: int = 8) -> str:
    """A program on so many CPU devices, with the copy of the package."""
    variables = {name: value for name, value in os.environ.items() if name not in ("XLA_FLAGS", "NPROC")}
    variables |= {"JAX_PLATFORMS": "cpu", "JAX_NUM_CPU_DEVICES": str(devices), "PYTHONPATH": str(folder)}
    done = subprocess.run([sys.executable, *arguments], cwd=folder, env=variables, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


def diffjax(folder: Path, arguments: list[str], devices: int = 8) -> str:
    return python(folder, "-m", "diffjax", *arguments, devices=devices)


def test_the_page_has_files_and_rows_for_all_of_it():
    assert len(FILE.findall(PAGE)) == 5
    assert [table for table, *_ in ROW.findall(PAGE)] == ["FAMILIES", "METHODS", "EVALUATORS", "SAMPLERS"]


def test_a_backbone_trains_shards_and_samples_also_with_a_new_sampler(checkout):
    train, sample, with_steps = commands("runs/toy")
    assert "finished: step 4 of 4" in diffjax(checkout, train)
    assert (checkout / "runs/toy/samples/step_00000004.png").is_file()
    assert "wrote 20 images" in diffjax(checkout, sample)
    assert "wrote 20 images" in diffjax(checkout, with_steps)
    described = json.loads((checkout / "runs/toy/power.json").read_text())
    assert described["sampling"]["power_steps"] == {"power": 5.0}
    with np.load(checkout / "runs/toy/samples.npz") as a, np.load(checkout / "runs/toy/power.npz") as b:
        assert (a["arr_0"] != b["arr_0"]).any()
    script = (
        "from diffjax.runs import open_run; import jax\n"
        "run = open_run('runs/toy')\n"
        "kernel = run.params['mlp_0']['fc1']['kernel']\n"
        "print(kernel.shape, kernel.sharding.shard_shape(kernel.shape))\n"
    )
    assert python(checkout, "-c", script).strip() == "(32, 64) (4, 64)"


def test_a_method_has_a_frozen_network_a_block_and_an_auxiliary_input(checkout):
    [train] = commands("--config.method=aligned")
    assert "finished: step 3 of 3" in diffjax(checkout, train)
    rows = [json.loads(line) for line in (checkout / "runs/aligned/metrics.jsonl").read_text().splitlines()]
    assert all(row["alignment"] > 0 for row in rows if "loss" in row)
    script = (
        "from diffjax.config import read; from diffjax.experiment import build; from pathlib import Path\n"
        "from diffjax.training.checkpoint import Checkpoints\n"
        "experiment = build(read(Path('runs/aligned/config.json')))\n"
        "kernel = experiment.frozen['encoder']['kernel']\n"
        "stored = Checkpoints(Path('runs/aligned'), read_only=True)\n"
        "state = stored.restore_arrays('state', 3)\n"
        "text = str(list(state['params'])) + str(list(stored.restore_arrays('ema', 3)))\n"
        "print(kernel.sharding.shard_shape(kernel.shape), 'encoder' in text, 'projection' in text)\n"
        "print(experiment.abstract.params['projection']['kernel'].sharding.spec)\n"
    )
    shapes, projection = python(checkout, "-c", script).strip().splitlines()
    assert shapes == "(2, 64) False True"
    assert "fsdp" in projection


def test_float_conditions_go_through_guidance_to_a_samples_file(checkout):
    train, sample = commands("runs/vectors")
    diffjax(checkout, train, devices=1)
    diffjax(checkout, sample, devices=1)
    with np.load(checkout / "runs/vectors/samples.npz") as file, np.load(checkout / "data/wanted.npz") as wanted:
        assert file["arr_0"].shape == (6, 8, 8, 3)
        np.testing.assert_array_equal(file["conditions"], wanted["conditions"])
    unguided = [*sample[:-1], "--out=runs/vectors/plain.npz", "--config.sampling.guidance.scale=1"]
    diffjax(checkout, unguided, devices=1)
    with np.load(checkout / "runs/vectors/samples.npz") as a, np.load(checkout / "runs/vectors/plain.npz") as b:
        assert (a["arr_0"] != b["arr_0"]).any()


def test_an_evaluator_runs_on_its_interval_and_is_made_up_for(checkout):
    [train] = commands("brightness")
    diffjax(checkout, train, devices=1)
    results = checkout / "runs/bright/evals"
    assert sorted(path.name for path in results.glob("brightness*")) == [
        "brightness_00000002.json",
        "brightness_00000004.json",
    ]
    before = json.loads((results / "brightness_00000004.json").read_text())
    (results / "brightness_00000004.json").unlink()  # as if a kill had left it out
    diffjax(checkout, train, devices=1)
    assert json.loads((results / "brightness_00000004.json").read_text()) == before
