"""The grid of samplers, steps and guidance on a tiny run."""

import dataclasses
import json

import jax
import numpy as np
import pytest

from diffjax.__main__ import main
from diffjax.commands import sweep
from diffjax.commands.ema import combined
from diffjax.commands.inspect import inspect
from diffjax.commands.scoring import Scoring
from diffjax.errors import UserError
from diffjax.evaluation import networks, plot, protocol, standard
from diffjax.experiment import build
from diffjax.runs import Run
from diffjax.sampling import generate
from diffjax.sampling.samples import read_samples
from diffjax.weights.store import tree_sha256
from tests.evaluation import projection
from tests.programs import tiny_config, train_arguments

GRID = ("--sampler=ddim,edm", "--steps=2,4", "--guidance=2", "--num=12", "--batch_size=8", "--reference=digits")


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs")
    options = ("total_steps=2", "optim.warmup_steps=0", "ema.decay=0.0")
    power_emas = ("ema.sigma_rel=0.05,0.1", "ema.snapshot_every_steps=1")
    assert main(train_arguments(folder / "gaussian", *options, *power_emas)) == 0
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
            values = np.rint(255 * result[0]["pixels"]).reshape(-1, 8, 8, 3)
            images[sampling.sampler, sampling.steps, sampling.guidance.scale] = values.astype(int)
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
    alone = read_samples(tmp_path / "s.npz")[0].astype(int)
    np.testing.assert_allclose(images["edm", 4, 2.0], alone, atol=1)
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


def scoring(*scores, network=None):
    found = standard.open_source("digits")
    return Scoring(found, network or networks.load("pixels"), scores)


def test_the_score_that_is_plotted_is_a_distance_that_is_computed():
    assert sweep.metric_of(None, scoring()) == "frechet_distance_pixels"
    inception = projection.inception()
    assert sweep.metric_of(None, scoring(network=inception)) == "fid"
    assert sweep.metric_of("sfid", scoring(network=inception)) == "sfid"
    assert sweep.metric_of(None, scoring("kid", "precision", network=inception)) == "kid"
    for name, scores, valid in (
        ("fdi", (), "fid, sfid"),
        ("kid", (), "fid, sfid"),
        ("precision", (), "fid, sfid"),
        ("fid", ("kid",), "kid"),
        (None, ("precision",), "none"),
    ):
        with pytest.raises(UserError, match=f"--metric={name or 'fid'} is not computed, or more .*; valid: {valid}; "):
            sweep.metric_of(name, scoring(*scores, network=inception))


def test_scores_that_some_rows_lack(capsys):
    """Of an unconditional run beside a conditional one."""
    distance, agreement = ({"value": value, "held_out_real": value / 2} for value in (1.5, 0.5))
    given = {"run": "a", "average": "ema", "sampler": "edm", "steps": 2, "evaluations": 4, "guidance": 1.0}
    given |= {"seconds_per_image": 0.5, "protocol": {"num": 12, "reference": {"name": "digits", "count": 9}}}
    rows = [{**given, "values": {"fid": distance}}, {**given, "values": {"fid": distance, "agreement": agreement}}]
    for results in (rows, rows[::-1]):
        sweep.print_table(results, scoring())
        printed = [line.split() for line in capsys.readouterr().out.splitlines()]
        assert printed[1] == ["run", "sampler", "steps", "NFE", "guidance", "fid", "agreement", "s/image"]
        found = {tuple(line[5:]) for line in printed[2:4]}
        assert found == {("1.5000", "-", "0.5000"), ("1.5000", "0.5000", "0.5000")}
        assert printed[4] == ["held-out", "real", "images", "0.7500", "0.2500"]


@pytest.mark.slow
def test_further_scores_join_those_that_are_there(runs, swept, capsys, monkeypatch):
    out = runs / "further.json"
    flags = ["sweep", f"--workdir={runs / 'gaussian'}", *GRID, f"--out={out}"]
    assert main([*flags, "--scores=frechet_distance_pixels"]) == 0
    rows = json.loads(out.read_text())["results"]
    assert {tuple(row["values"]) for row in rows} == {("frechet_distance_pixels",)}
    assert main(flags) == 0  # all the usual scores
    assert [row["values"] for row in json.loads(out.read_text())["results"]] == [
        row["values"] for row in swept[0]["results"]
    ]
    monkeypatch.setattr(sweep, "drawn", None)  # nothing is drawn again
    assert main([*flags, "--scores=label_agreement_pixels,frechet_distance_pixels"]) == 0
    capsys.readouterr()


@pytest.mark.slow
def test_averages_of_several_lengths(runs, capsys, monkeypatch):
    """Each with its own weights in one compilation, by the metric that is asked for."""
    drawn, compiled = [], []
    scatter, compile_sampler = plot.scatter, generate.compile_sampler
    monkeypatch.setattr(plot, "scatter", lambda *given: drawn.append(given) or scatter(*given))
    monkeypatch.setattr(generate, "compile_sampler", lambda *a, **b: compiled.append(a) or compile_sampler(*a, **b))
    out = runs / "lengths.json"
    flags = ("--sampler=ddim:2", "--guidance=1", "--ema=0.05,0.1", "--num=12", "--reference=digits", f"--out={out}")
    folder = runs / "gaussian"
    assert main(["sweep", f"--workdir={folder}", *flags, "--metric=frechet_distance_pixels"]) == 0
    printed = capsys.readouterr().out
    rows = json.loads(out.read_text())["results"]
    assert [row["average"] for row in rows] == ["ema 0.05", "ema 0.1"]
    assert len(compiled) == 1
    values = [row["values"]["frechet_distance_pixels"]["value"] for row in rows]
    assert values[0] != values[1]
    for row, length in zip(rows, (0.05, 0.1)):
        origin = row["subject"]["origin"]
        assert (origin["sigma_rel"], origin["snapshots"], origin["tracks"]) == (length, [1, 2], ["0.050", "0.100"])
        assert origin["sha256"] == tree_sha256(combined(folder, length)[0])
        assert row["protocol"]["ema"] == f"ema {length:g}"
        assert f"{folder} (ema {length:g})" in printed
    [(points, _, x_name, y_name)] = drawn
    assert (x_name, y_name) == ("NFE per image", "frechet_distance_pixels")
    assert [(point.series, point.y) for point in points] == [
        (f"ddim, ema {length:g}", value) for length, value in zip((0.05, 0.1), values)
    ]
    assert main(["sweep", f"--workdir={folder}", *flags, "--ema=0.005", "--overwrite"]) == 2
    assert "the profile would be off by" in capsys.readouterr().err
    assert main(["sweep", f"--workdir={runs / 'flow'}", *flags, "--overwrite"]) == 2
    assert "has no snapshots; a run with ema.sigma_rel and ema.snapshot_every_steps" in capsys.readouterr().err


@pytest.mark.slow
def test_an_unknown_metric_is_refused_before_anything_is_drawn(runs, capsys):
    out = runs / "metric.json"
    flags = ("--sampler=ddim:2", "--num=12", "--reference=digits", f"--out={out}", "--metric=fid")
    assert main(["sweep", f"--workdir={runs / 'gaussian'}", *flags]) == 2
    error = capsys.readouterr().err
    assert "--metric=fid is not computed, or more of it is better; valid: frechet_distance_pixels; " in error
    assert error.count("\n") == 1
    assert not out.exists()
