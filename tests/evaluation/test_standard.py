"""A reference as a network sees it: which of its statistics and images serve, and which are refused."""

import re

import numpy as np
import pytest

from diffjax.data import sources
from diffjax.errors import UserError
from diffjax.evaluation import metrics, networks, references, standard, statistics
from diffjax.files import Blocks
from tests.evaluation import projection
from tests.evaluation.test_references import FEATS, IMAGES, MU, POOL3, SIGMA, SPATIAL

PIXELS = networks.load("pixels")
DINOV2 = {"name": "dinov2", "kinds": {"dinov2": 1024}, "moments": ("dinov2",), "suffix": "dinov2"}


@pytest.fixture(scope="module")
def network():
    """Its features have few numbers; see `made`, whose files they are of."""
    return projection.network()


@pytest.fixture
def made(tmp_path, network):
    """A reference file of the network, of six images and with four of them."""
    path = tmp_path / "ref.npz"
    found = statistics.of(network.compute(IMAGES)["tiny"])
    description = {"count": 6, "network": network.identity()}
    references.write(path, {"tiny": found}, description, Blocks((4, 8, 8, 3), IMAGES.dtype, iter([IMAGES[:4]])))
    return path


def npz(path, **arrays):
    np.savez(path, **arrays)
    return standard.open_source(str(path))


def test_scores_that_stored_features_do_not_give_are_refused_before_any_sample(tmp_path):
    """clean-fid and torch-fidelity keep the means of the images, not what sFID is of."""
    network = projection.inception()
    available = npz(tmp_path / "a_kid.npz", feats=FEATS).available(network, labels=False)
    assert (available.images, list(available.kinds)) == (5, ["pool3"])
    usual = metrics.computable(network, 50, available)
    assert "sfd" not in [score for metric in usual for score in metric.scores]
    assert {"fd", "precision"} <= {score for metric in usual for score in metric.scores}
    with pytest.raises(UserError, match="sfid cannot be computed: the reference has no mean and covariance of spatial"):
        metrics.computable(network, 50, available, ["fid", "sfid"])


def test_the_size_of_images_that_a_reference_does_not_keep(tmp_path, network):
    found = {"tiny": statistics.of(network.compute(IMAGES)["tiny"])}
    references.write(tmp_path / "ref.npz", found, {"count": 6, "network": network.identity(), "size": [8, 8]})
    assert standard.open_source(str(tmp_path / "ref.npz")).shape == (8, 8)


def test_statistics_of_two_commits_are_one_file(tmp_path, network):
    found = {"tiny": statistics.of(network.compute(IMAGES)["tiny"])}
    for version in ("a", "b"):
        made = {"count": 6, "network": network.identity(), "code_version": version}
        (tmp_path / version).mkdir()
        references.write(tmp_path / version / "ref.npz", found, made)
    assert (tmp_path / "a/ref.npz").read_bytes() == (tmp_path / "b/ref.npz").read_bytes()


def test_single_images_are_not_kept_where_no_score_takes_them(network):
    source = standard.open_source("digits")
    assert standard.of_source(source, network, single=False).images is None
    assert standard.of_source(source, network, single=True).images.count == 1500


@pytest.mark.parametrize("values", [(0, 1), (1, 1)])
def test_zeros_and_ones_are_no_pixels(tmp_path, values):
    images = np.random.default_rng(0).choice(np.array(values, np.uint8), (20, 8, 8, 3))
    with pytest.raises(UserError, match="a.npz: the first images hold 0 and 1 alone; valid: uint8 pixels from 0 to"):
        npz(tmp_path / "a.npz", arr_0=images)


def test_a_reference_of_the_network_itself(made, network):
    source = standard.open_source(str(made))
    found = standard.of_source(source, network, single=False)
    assert (found.count, found.images, found.held_out) == (6, None, None)
    assert found.identity == {"name": "ref.npz", "sha256": source.file.sha256, "count": 6, "held_out_count": 0}
    expected = statistics.of(network.compute(IMAGES)["tiny"])
    np.testing.assert_allclose(found.moments["tiny"].mean, expected.mean, rtol=1e-12)
    single = standard.of_source(source, network, single=True)
    np.testing.assert_allclose(single.images.features["tiny"], network.compute(IMAGES[:4])["tiny"], rtol=1e-6)
    assert single.count == 6  # of the statistics
    np.testing.assert_array_equal(single.moments["tiny"].mean, found.moments["tiny"].mean)


@pytest.mark.parametrize(
    "changed, words",
    [
        ({"features_sha256": "def"}, "features_sha256 abc, not def"),
        ({"resize": "none", "features": "b"}, "features a projection, not b"),
        ({"resize": "to 5 x 5", "features": "b"}, "features a projection, not b, resize none, not to 5 x 5"),
    ],
)
def test_a_reference_of_another_network_is_refused(made, changed, words):
    source = standard.open_source(str(made))
    other = projection.network(**changed)
    for refuse in (standard.check_network, lambda *given: standard.of_source(*given, single=True)):
        with pytest.raises(UserError, match=re.escape(f"ref.npz is a reference of another network: {words}") + "$"):
            refuse(source, other)


@pytest.mark.slow
def test_statistics_of_others_serve_their_network_alone(tmp_path):
    bare = npz(tmp_path / "bare.npz", **POOL3)
    inception = projection.inception()
    found = standard.of_source(bare, inception, single=True)
    assert (list(found.moments), found.images, found.count) == (["pool3"], None, None)
    np.testing.assert_array_equal(found.moments["pool3"].mean, MU)
    for other in (PIXELS, projection.network(), projection.network(**DINOV2)):
        with pytest.raises(UserError, match=f"bare.npz has statistics of pool3 and no images; {other.name} needs "):
            standard.check_network(bare, other)
    with_images = npz(tmp_path / "adm.npz", arr_0=IMAGES, **POOL3, **SPATIAL)
    assert list(standard.of_source(with_images, inception, single=False).moments) == ["pool3", "spatial"]
    pixels = standard.of_source(with_images, PIXELS, single=False)  # of the images that the file holds besides
    assert (pixels.moments, pixels.count, pixels.images.count) == ({}, 6, 6)
    tiny = standard.of_source(with_images, projection.network(), single=False)
    assert (list(tiny.moments), tiny.count) == (["tiny"], 6)


def test_features_of_others_serve_their_network_alone(tmp_path):
    """A file of clean-fid holds neither images nor mean and covariance."""
    source = npz(tmp_path / "feats.npz", feats=FEATS)
    found = standard.of_source(source, projection.inception(), single=True)
    np.testing.assert_array_equal(found.images.features["pool3"], FEATS)
    np.testing.assert_allclose(found.moments["pool3"].mean, FEATS.mean(0), atol=1e-6)
    assert (found.count, list(found.moments)) == (5, ["pool3"])
    for other in (PIXELS, projection.network()):
        with pytest.raises(UserError, match=f"feats.npz has features of pool3 and no images; {other.name} needs "):
            standard.check_network(source, other)


def test_an_embedded_set(network):
    found = standard.of_source(standard.open_source("digits"), network, single=True)
    assert (found.count, found.images.count, found.held_out.count) == (1500, 1500, 297)
    assert found.identity["held_out_count"] == 297
    assert list(found.moments) == ["tiny"]
    values = metrics.score(found.held_out, found, network)
    assert values["fd_tiny"]["value"] == values["fd_tiny"]["held_out_real"] > 0


def test_training_images():
    source = sources.digits(split="train")
    found = standard.of_training(source, PIXELS)
    assert standard.of_training(source, projection.network()).images.labels is None
    assert (found.identity["name"], found.identity["count"], found.held_out, found.file) == ("digits", 1500, None, None)
    assert standard.default_network(found) == "pixels"


def test_the_network_of_a_reference(tmp_path, made):
    dinov2 = dict(zip(("mu", "sigma"), (MU[:1024], SIGMA[:1024, :1024])))
    named = {
        "inception": npz(tmp_path / "adm.npz", arr_0=IMAGES, **POOL3),
        "dinov2": npz(tmp_path / "dinov2.npz", **dinov2),
        "pixels": npz(tmp_path / "images.npz", arr_0=IMAGES),
    }
    for name, source in named.items():
        assert standard.default_network(source) == name
    assert standard.default_network(npz(tmp_path / "feats.npz", feats=FEATS)) == "inception"
    assert standard.default_network(standard.open_source("digits")) == "pixels"
