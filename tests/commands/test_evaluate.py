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
        (["--samples=s.npz", "--reference=digits"], "s.npz: no such samples file"),
        (["--samples={samples}", "--reference=imagenet"], "--reference=imagenet: valid: digits, emoji32, or an .npz"),
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
    assert "the covariance of 1 images of the reference is undefined; at least 2" in capsys.readouterr().err


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
        method=method, conditions=lambda *_: np.zeros(3), seed=0, model=None, size=8, decoder_protocol=dict
    )
    run = SimpleNamespace(experiment=experiment, params={}, origin={"sha256": "0"}, caveat="", describe=str)
    monkeypatch.setattr(evaluate, "open_run", lambda folder, overrides: run)
    monkeypatch.setattr(evaluate, "describe_form", lambda *_, **__: "as trained")
    monkeypatch.setattr(evaluate, "describe", lambda *_, **settings: settings)
    monkeypatch.setattr(experiment, "images", draw, raising=False)
    flags = ["evaluate", f"--workdir={tmp_path}", "--num=3"]
    assert main([*flags, "--reference=imagenet"]) == 2
    assert "--reference=imagenet: valid: digits, emoji32" in capsys.readouterr().err
    assert main([*flags, "--reference=emoji32"]) == 2
    assert "the images are 8 x 8 and those of the reference 32 x 32" in capsys.readouterr().err
    (tmp_path / "scores.json").write_text('{"values": {}, "protocol": {"num": 500}, "subject": {}}')
    assert main([*flags, "--reference=digits"]) == 2
    assert "num (500, now 3)" in capsys.readouterr().err
