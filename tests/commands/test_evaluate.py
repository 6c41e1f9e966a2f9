"""Scoring and comparing through the command line."""

import json
from types import SimpleNamespace

import numpy as np
import pytest

from diffjax.__main__ import main
from diffjax.commands import evaluate
from diffjax.data import sources
from diffjax.sampling.samples import write_samples
from tests.evaluation.test_protocol import SAMPLES
from tests.programs import train_arguments


@pytest.fixture(scope="module")
def samples(tmp_path_factory):
    """Real held-out digits as if a model had drawn them."""
    path = tmp_path_factory.mktemp("samples") / "samples.npz"
    source = sources.load("digits", size=8, channels=1, num_classes=10, split="test")
    write_samples(path, *sources.arrays(source), SAMPLES)
    return path


def test_scores_and_their_comparison(samples, capsys):
    assert main(["evaluate", f"--samples={samples}", "--reference=digits"]) == 0
    printed = capsys.readouterr().out
    out = samples.with_suffix(".scores.json")
    result = json.loads(out.read_text())
    for score, columns in result["values"].items():
        assert columns["value"] == columns["held_out_real"], score
        assert f"{columns['value']:.4f}" in printed
    assert result["protocol"]["reference"]["name"] == "digits"
    assert result["protocol"]["num"] == 297
    assert "FID" not in json.dumps(result)

    assert main(["evaluate", "--compare", str(out), str(out)]) == 0
    assert "+0.0000" in capsys.readouterr().out
    assert main(["evaluate", f"--compare={out},{out}"]) == 0
    other = out.with_name("other.json")
    result["protocol"]["sampling"]["steps"] = 250
    other.write_text(json.dumps(result))
    capsys.readouterr()
    assert main(["evaluate", "--compare", str(out), str(other)]) == 2
    assert "differ in sampling.steps (50 and 250)" in capsys.readouterr().err


def test_a_file_as_reference(samples, capsys):
    out = samples.with_name("self.json")
    assert main(["evaluate", f"--samples={samples}", f"--reference={samples}", f"--out={out}"]) == 0
    values = json.loads(out.read_text())["values"]
    assert values["frechet_distance_pixels"]["value"] < 1e-6
    assert list(values["frechet_distance_pixels"]) == ["value"]


@pytest.mark.parametrize(
    "flags, message",
    [
        ([], "give --reference with either --samples or --workdir, or --compare"),
        (["--samples=s.npz", "--reference=digits"], "s.npz: no such file or folder; valid: an .npz or .npy of images"),
        (
            ["--samples={samples}", "--reference=imagenet"],
            "--reference=imagenet: valid: digits, emoji32, npz with mu and sigma",
        ),
        (
            ["--samples={samples}", "--reference=emoji32", "--out=new"],
            "are 8 x 8 and those of the reference 32 x 32",
        ),
        (["--compare", "a.json"], "--compare takes two result files"),
        (["--compare", "a.json", "b.json", "c.json"], "--compare takes two result files"),
        (["--compare", "a.json", "b.json"], "a.json: no such result file"),
        (["a.json"], "'a.json' is not a flag"),
    ],
)
def test_mistakes(samples, capsys, flags, message):
    assert main(["evaluate", *(flag.format(samples=samples) for flag in flags)]) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1


def test_files_of_others_without_labels(samples, tmp_path, capsys):
    """arr_0 alone, as many references have it: the distance is scored, and what is not is said."""
    images = np.load(samples)["arr_0"]
    np.savez(tmp_path / "bare.npz", arr_0=images)
    assert main(["evaluate", f"--samples={tmp_path / 'bare.npz'}", "--reference=digits"]) == 0
    printed = capsys.readouterr().out
    assert "have no labels, so their agreement is not scored" in printed
    assert "warning" not in printed
    values = json.loads((tmp_path / "bare.scores.json").read_text())["values"]
    assert list(values) == ["frechet_distance_pixels"]
    np.savez(tmp_path / "few.npz", arr_0=images[:10])
    few = ["evaluate", f"--samples={samples}", f"--reference={tmp_path / 'few.npz'}", f"--out={tmp_path / 'few.json'}"]
    assert main(few) == 0
    assert "warning: 10 of the reference are no more than the 64 dimensions" in capsys.readouterr().out


def test_a_reference_of_one_image(samples, tmp_path, capsys):
    np.savez(tmp_path / "one.npz", arr_0=np.load(samples)["arr_0"][:1], arr_1=np.zeros(1, int))
    one = ["evaluate", f"--samples={samples}", f"--reference={tmp_path / 'one.npz'}", f"--out={tmp_path / 'one.json'}"]
    assert main(one) == 2
    assert "one.npz holds 1 image; at least 2 are needed" in capsys.readouterr().err


def test_another_result_is_not_replaced(samples, tmp_path, capsys):
    """The same samples and reference give the same file again; another request is refused."""
    out = tmp_path / "scores.json"
    flags = ["evaluate", f"--samples={samples}", f"--out={out}"]
    assert main([*flags, "--reference=digits"]) == 0
    before = out.read_bytes()
    assert main([*flags, "--reference=digits"]) == 0
    capsys.readouterr()
    assert main([*flags, f"--reference={samples}"]) == 2
    error = capsys.readouterr().err
    assert f"{out} was made with other settings: protocol.reference.count (1500, now 297), " in error
    assert "--overwrite replaces it" in error
    assert error.count("\n") == 1
    assert out.read_bytes() == before
    assert main([*flags, f"--reference={samples}", "--overwrite"]) == 0
    assert json.loads(out.read_text())["protocol"]["reference"]["count"] == 297
    assert main([*flags[:2], "--reference=digits", f"--out={samples.with_suffix('.json')}"]) == 2
    assert "is there already and does not say what it is" in capsys.readouterr().err


def test_what_a_run_is_scored_on_is_checked_before_its_images_are_drawn(tmp_path, monkeypatch, capsys):
    """The reference, and whether the file is that of another request."""

    def draw(*_):
        raise AssertionError("images were drawn")

    method = SimpleNamespace(makes="pictures", condition=None, decoder=None)
    experiment = SimpleNamespace(
        method=method, num_classes=0, seed=0, model=None, picture_size=(8, 8), decoder_protocol=dict
    )
    origin = {"sha256": "0"}
    run = SimpleNamespace(experiment=experiment, params={}, origin=origin, caveat="", describe=str, classes=())
    monkeypatch.setattr(evaluate, "open_trained", lambda *_: run)
    monkeypatch.setattr(evaluate, "describe_form", lambda *_, **__: "as trained")
    monkeypatch.setattr(evaluate, "describe", lambda *_, **settings: settings)
    monkeypatch.setattr(evaluate, "draw_and_score", draw)
    flags = ["evaluate", f"--workdir={tmp_path}", "--num=3"]
    assert main([*flags, "--reference=imagenet"]) == 2
    assert "--reference=imagenet: valid: digits, emoji32" in capsys.readouterr().err
    assert main([*flags, "--reference=emoji32"]) == 2
    assert "the images are 8 x 8 and those of the reference 32 x 32" in capsys.readouterr().err
    (tmp_path / "scores.json").write_text('{"values": {}, "protocol": {"num": 500}, "subject": {}}')
    assert main([*flags, "--reference=digits"]) == 2
    assert "num (500, now 3)" in capsys.readouterr().err


def test_the_first_images_of_a_file(samples, tmp_path, capsys):
    out = tmp_path / "first.json"
    flags = ["evaluate", f"--samples={samples}", "--reference=digits", f"--out={out}"]
    assert main([*flags, "--num=120"]) == 0
    result = json.loads(out.read_text())
    assert result["protocol"]["num"] == 120
    with np.load(samples) as file:
        write_samples(tmp_path / "few.npz", file["arr_0"][:120], file["arr_1"][:120], SAMPLES)
    assert main(["evaluate", f"--samples={tmp_path / 'few.npz'}", *flags[2:3], f"--out={tmp_path / 'other.json'}"]) == 0
    assert json.loads((tmp_path / "other.json").read_text())["values"] == result["values"]
    capsys.readouterr()
    assert main([*flags, "--num=298", "--overwrite"]) == 2
    error = capsys.readouterr().err
    assert f"--num=298: {samples} has 297 images" in error
    assert error.count("\n") == 1
    assert json.loads(out.read_text()) == result


@pytest.mark.parametrize(
    "flag, message",
    [
        ("--labels=uniform", "evaluate: --labels is of --workdir; it has no effect on --samples"),
        ("--seed=1", "evaluate: --seed is of --workdir; it has no effect on --samples"),
        ("--keep_images=kept", "evaluate: --keep_images is of --workdir; it has no effect on --samples"),
        ("--config.sampling.steps=2", "--config.sampling.steps=2 is of --workdir; it has no effect on --samples"),
        ("--scores=fid", "score 'fid' is none of pixels; valid: frechet_distance_pixels, label_agreement_pixels"),
        ("--scores=label_agreement_pixel", "is none of pixels; did you mean label_agreement_pixels?; valid: "),
        ("--resize=clean-fid", "--resize=clean-fid is no rule of --features=pixels; valid: to leave it out"),
        ("--workdir=run", "give --reference with either --samples or --workdir"),
    ],
)
def test_flags_that_do_not_go_with_samples(samples, tmp_path, capsys, flag, message):
    out = tmp_path / "scores.json"
    assert main(["evaluate", f"--samples={samples}", "--reference=digits", f"--out={out}", flag]) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1
    assert not list(tmp_path.iterdir())


def test_one_score_alone(samples, tmp_path):
    out = tmp_path / "one.json"
    flags = ["evaluate", f"--samples={samples}", "--reference=digits", f"--out={out}"]
    assert main([*flags, "--scores=label_agreement_pixels"]) == 0
    assert list(json.loads(out.read_text())["values"]) == ["label_agreement_pixels"]


@pytest.mark.slow
def test_kept_images_are_those_of_sample_and_are_in_the_report(tmp_path, capsys, monkeypatch):
    """`sample` finds them finished, and another request refused; and they give the same scores by themselves."""
    run, kept, report = tmp_path / "run", tmp_path / "kept", tmp_path / "report.html"
    assert (
        main(
            train_arguments(
                run, "total_steps=2", "evals.fid.every_steps=1", "evals.fid.network=pixels", "evals.fid.num=9", "seed=3"
            )
        )
        == 0
    )
    flags = [f"--workdir={run}", "--reference=digits", "--num=70", "--labels=uniform", f"--keep_images={kept}"]
    assert main(["evaluate", *flags, "--batch_size=32", f"--report={report}"]) == 0
    result = json.loads((run / "scores.json").read_text())
    text = report.read_text()
    for heading in ("Samples", "nearest by pixels", "In training"):
        assert heading in text
    assert text.count("data:image/png;base64,") == 3
    with monkeypatch.context() as patched:  # what is kept is not drawn again, for a further report or network
        patched.setattr(evaluate, "drawn_samples", None)
        assert main(["evaluate", *flags, f"--report={report}"]) == 0
    assert json.loads((run / "scores.json").read_text())["values"] == result["values"]
    assert not list(tmp_path.rglob("*.parts"))
    capsys.readouterr()
    same = ["sample", f"--workdir={run}", f"--out={kept / 'samples.npz'}", "--num=70", "--labels=uniform", "--seed=3"]
    before = (kept / "samples.npz").read_bytes()
    assert main(same) == 0
    assert "samples.npz is finished: 70 of " in capsys.readouterr().out
    assert main([*same, "--seed=4"]) == 2
    assert "was made with other settings" in capsys.readouterr().err
    assert main([*same, "--overwrite"]) == 0
    assert (kept / "samples.npz").read_bytes() == before
    out = tmp_path / "alone.json"
    assert main(["evaluate", f"--samples={kept / 'samples.npz'}", "--reference=digits", f"--out={out}"]) == 0
    alone = json.loads(out.read_text())
    assert alone["values"] == result["values"]
    assert main(["evaluate", "--compare", str(out), str(run / "scores.json")]) == 0
    assert (
        main(["evaluate", *flags, "--scores=frechet_distance_pixels"]) == 0
    )  # the images are kept, the features drawn
    assert (kept / "samples.npz").read_bytes() == before
    few = [flag.replace("--num=70", "--num=60") for flag in flags]
    capsys.readouterr()
    assert main(["evaluate", *few, f"--out={tmp_path / 'few.json'}"]) == 2
    assert f"{kept / 'samples.npz'} was made with other settings: num (70, now 60)" in capsys.readouterr().err
