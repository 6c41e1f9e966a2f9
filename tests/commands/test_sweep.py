"""The grid of samplers, steps and guidance on a tiny run."""

import dataclasses
import json

import jax
import numpy as np
import pytest

from diffjax.__main__ import main
from diffjax.commands import sweep
from diffjax.commands.inspect import inspect
from diffjax.evaluation import plot, protocol
from diffjax.experiment import build
from diffjax.runs import Run
from diffjax.sampling import generate
from diffjax.sampling.samples import read_samples
from tests.programs import tiny_config, train_arguments

GRID = ("--sampler=ddim,edm", "--steps=2,4", "--guidance=2", "--num=12", "--batch_size=8", "--reference=digits")


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs")
    options = ("total_steps=2", "optim.warmup_steps=0", "ema.decay=0.0")
    assert main(train_arguments(folder / "gaussian", *options)) == 0
    flow = ("diffusion.process=flow_linear", "sampling.sampler=heun", "sampling.clip=false")
    assert main(train_arguments(folder / "flow", *options, *flow)) == 0
    return folder


@pytest.fixture(scope="module")
def swept(runs):
    """What a sweep of one run writes and prints, its samplers, and its images by cell."""
    compiled, images = [], {}
    with pytest.MonkeyPatch.context() as patch:
        compile_sampler, drawn = generate.compile_sampler, sweep.drawn

        def remember_sampler(*arguments, **options):
            compiled.append(compile_sampler(*arguments, **options))
            return compiled[-1]

        def remember_images(cell, *arguments):
            sampling = cell.sampling
            result = drawn(cell, *arguments)
            images[sampling.sampler, sampling.steps, sampling.guidance.scale] = result[0]
            return result

        patch.setattr(generate, "compile_sampler", remember_sampler)
        patch.setattr(sweep, "drawn", remember_images)
        out = runs / "sweep.json"
        assert main(["sweep", f"--workdir={runs / 'gaussian'}", *GRID, f"--out={out}"]) == 0
    return json.loads(out.read_text()), compiled, images


@pytest.mark.slow
def test_scores_of_another_grid_are_not_replaced(runs, swept, capsys):
    assert main(["sweep", f"--workdir={runs / 'gaussian'}", *GRID, f"--out={runs / 'sweep.json'}", "--seed=1"]) == 2
    assert "sweep.json was made with other settings: request.seed (0, now 1); choose" in capsys.readouterr().err
    assert json.loads((runs / "sweep.json").read_text()) == swept[0]


@pytest.mark.slow
def test_one_compilation_for_each_sampler(swept):
    _, compiled, _ = swept
    assert [sampler.func._cache_size() for sampler in compiled] == [1, 1]


def test_cells_that_share_a_compilation():
    """Those of one run and sampler, with guidance or without; their schedules have equal shapes."""
    run = Run(build(tiny_config()), None, {"workdir": "a"})
    groups, left_out = sweep.cells_of_grid([run], [("ddim", [2, 4]), ("edm", [3])], [1.0, 2.0, 3.0])
    assert left_out == []
    found = [[(c.sampling.sampler, c.sampling.steps, c.sampling.guidance.scale) for c in g] for g in groups]
    assert found == [
        [("ddim", 2, 1.0), ("ddim", 4, 1.0)],
        [("ddim", 2, 2.0), ("ddim", 2, 3.0), ("ddim", 4, 2.0), ("ddim", 4, 3.0)],
        [("edm", 3, 1.0)],
        [("edm", 3, 2.0), ("edm", 3, 3.0)],
    ]
    for cells in groups:
        assert len({str(jax.tree.map(np.shape, cell.sampler.schedule)) for cell in cells}) == 1
    assert [sweep.nfe(cells[0].sampler.schedule) for cells in groups] == [2, 4, 5, 10]


def test_weights_that_have_no_meaning_are_dropped_and_a_clip_is_kept():
    leaves = ("diffusion.process=flow_linear", "sampling.sampler=ddim", "sampling.ddim.eta=1")
    interval = (f"sampling.guidance.{leaf}" for leaf in ("schedule=interval", "interval.low=0.28", "interval.high=2.9"))
    config = tiny_config(*leaves, *interval)
    own = config.sampling
    heun, unguided = sweep.other_sampling(own, "heun", 3, 2.0), sweep.other_sampling(own, "edm", 3, 1.0)
    assert (heun.clip, heun.options) == (True, {})
    assert heun.guidance == dataclasses.replace(own.guidance, scale=2.0)
    assert (unguided.clip, unguided.guidance.schedule, unguided.guidance.options) == (True, "constant", {})
    groups, _ = sweep.cells_of_grid([Run(build(config), None, {"workdir": "a"})], [("edm", [8])], [2.0])
    assert 15 < sweep.nfe(groups[0][0].sampler.schedule) < 30
    assert (own.sampler, own.options["eta"], own.guidance.schedule) == ("ddim", 1.0, "interval")


@pytest.mark.slow
def test_every_cell_is_there_with_its_protocol(runs, swept):
    written, _, images = swept
    assert written["left_out"] == []
    found = {(row["sampler"], row["steps"], row["guidance"]): row for row in written["results"]}
    assert found.keys() == images.keys()
    assert len(found) == 4
    evaluations = {(name, steps): row["evaluations"] for (name, steps, _), row in found.items()}
    assert evaluations == {("ddim", 2): 4, ("ddim", 4): 8, ("edm", 2): 6, ("edm", 4): 14}
    for (_, steps, _), row in found.items():
        assert row["seconds_per_image"] > 0
        assert row["run"] == str(runs / "gaussian")
        recorded = row["protocol"]
        assert recorded["sampling"]["steps"] == steps
        assert (recorded["num"], recorded["seed"], recorded["reference"]["name"]) == (12, 0, "digits")
        assert recorded["code_version"] == protocol.code_version()
        assert row["subject"]["origin"]["sha256"] == inspect(runs / "gaussian")["sha256"]["ema"]
    assert (runs / "sweep.png").stat().st_size > 1000


@pytest.mark.slow
def test_a_cell_is_what_sample_and_evaluate_give(runs, swept, tmp_path):
    written, _, images = swept
    leaves = ("sampler=edm", "steps=4", "guidance.scale=2")
    flags = (f"--workdir={runs / 'gaussian'}", "--num=12", "--batch_size=8", f"--out={tmp_path / 's.npz'}")
    assert main(["sample", *flags, *(f"--config.sampling.{leaf}" for leaf in leaves)]) == 0
    alone = read_samples(tmp_path / "s.npz")[0][..., :1]
    np.testing.assert_allclose(images["edm", 4, 2.0].astype(int), alone.astype(int), atol=1)
    assert (images["edm", 2, 2.0] != alone).any()
    assert main(["evaluate", f"--samples={tmp_path / 's.npz'}", "--reference=digits"]) == 0
    [row] = [r for r in written["results"] if (r["sampler"], r["steps"], r["guidance"]) == ("edm", 4, 2.0)]
    for value, other in protocol.compare(row, protocol.read(tmp_path / "s.scores.json")).values():
        assert value == pytest.approx(other, rel=1e-2)


@pytest.mark.slow
def test_several_runs_leave_out_what_is_not_defined_and_are_not_drawn_without_matplotlib(runs, capsys, monkeypatch):
    monkeypatch.setattr(plot, "missing", lambda: "a plot needs a package")
    folders = f"--workdir={runs / 'gaussian'},{runs / 'flow'}"
    out = runs / "both.json"
    flags = ("--sampler=ddpm:2,heun:2", "--num=8", "--reference=digits", f"--out={out}")
    assert main(["sweep", folders, *flags]) == 0
    printed = capsys.readouterr().out
    written = json.loads(out.read_text())
    assert [(row["run"], row["sampler"]) for row in written["results"]] == [
        (str(runs / "gaussian"), "ddpm"),
        (str(runs / "flow"), "heun"),
    ]
    assert {row["guidance"] for row in written["results"]} == {1.5}  # that of the configs
    assert len(written["left_out"]) == 2
    for line in written["left_out"]:
        assert f"left out: {line}\n" in printed
    assert "a guided network call counts as two" in printed
    assert "a plot needs a package\n" in printed
    assert not out.with_suffix(".png").exists()


def test_samplers_with_and_without_steps_of_their_own():
    assert sweep.parse_samplers(["ddim", "edm:18", "ddim:50"], [10, 25]) == [("ddim", [10, 25, 50]), ("edm", [18])]
