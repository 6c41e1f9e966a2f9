"""Reference files: every published layout, our own, and what is refused of each."""

import json
import pickle

import numpy as np
import pytest

from diffjax.data import image_sets
from diffjax.errors import UserError
from diffjax.evaluation import references, statistics
from diffjax.files import Blocks, file_sha256
from tests.weights.torch_writer import pretended, tensor, write_stream, write_zip

IMAGES = np.random.default_rng(0).integers(0, 256, (6, 8, 8, 3), np.uint8)
NETWORK = {"features": "a network", "features_sha256": "abc", "resize": "none"}


def moments(width, seed=0, dtype=np.float64):
    """A mean, and a covariance of rank 3 and a diagonal, of so many features."""
    rng = np.random.default_rng(seed)
    factor = rng.normal(size=(width, 3))
    sigma = factor @ factor.T
    np.fill_diagonal(sigma, sigma.diagonal() + 1)
    return rng.normal(size=width).astype(dtype), sigma.astype(dtype)


MU, SIGMA = moments(2048)
POOL3 = {"mu": MU, "sigma": SIGMA}
SPATIAL = dict(zip(("mu_s", "sigma_s"), moments(2023, seed=1)))
DINOV2 = dict(zip(("mu", "sigma"), moments(1024, seed=2)))
FEATS = np.random.default_rng(3).normal(size=(5, 2048)).astype(np.float32)


def npz(path, **arrays):
    np.savez(path, **arrays)
    return path


def pkl(path, value, protocol=None):
    path.write_bytes(pickle.dumps(value, protocol))
    return path


def same(found, mean, covariance):
    assert found.mean.dtype == found.covariance.dtype == np.float64
    np.testing.assert_array_equal(found.mean, mean)
    np.testing.assert_array_equal(found.covariance, covariance)


def test_the_reference_of_adm(tmp_path):
    path = npz(tmp_path / "VIRTUAL_imagenet256_labeled.npz", arr_0=IMAGES, arr_1=np.arange(6), **POOL3, **SPATIAL)
    found = references.read(path)
    assert (found.name, found.sha256, found.layout) == (path.name, file_sha256(path), "adm")
    assert (found.count, found.network, found.made, found.features) == (None, None, {}, {})
    assert list(found.moments) == ["pool3", "spatial"]
    same(found.moments["pool3"], MU, SIGMA)
    same(found.moments["spatial"], *SPATIAL.values())
    np.testing.assert_array_equal(found.images.read(np.arange(6)), IMAGES)
    np.testing.assert_array_equal(found.images.labels, np.arange(6))


def test_images_alone(tmp_path):
    for path in (npz(tmp_path / "a.npz", arr_0=IMAGES), tmp_path / "a.npy"):
        np.save(tmp_path / "a.npy", IMAGES)
        found = references.read(path)
        assert (found.layout, found.count, found.moments, found.network) == ("images", 6, {}, None)
        assert found.sha256 == file_sha256(path)
        np.testing.assert_array_equal(found.images.read(np.arange(6)), IMAGES)
    found = references.of_images(image_sets.embedded("digits"))
    assert (found.name, found.count, found.layout) == ("digits", 1500, "images")


@pytest.mark.parametrize("dtype", [np.float64, np.float32])
def test_statistics_of_pytorch_fid(tmp_path, dtype):
    path = npz(tmp_path / "stats.npz", mu=MU.astype(dtype), sigma=SIGMA.astype(dtype))
    found = references.read(path)
    assert (found.layout, found.count, found.images, found.network) == ("pytorch-fid", None, None, None)
    same(found.moments["pool3"], MU.astype(dtype), SIGMA.astype(dtype))


def test_features_of_clean_fid(tmp_path):
    found = references.read(npz(tmp_path / "a_kid.npz", feats=FEATS))
    assert (found.layout, found.count, found.moments) == ("clean-fid", 5, {})
    assert found.features["pool3"].dtype == np.float32
    np.testing.assert_array_equal(found.features["pool3"], FEATS)


@pytest.mark.parametrize("protocol", [2, 4, 5])
def test_statistics_of_edm2(tmp_path, protocol):
    path = pkl(tmp_path / "img512.pkl", {"num_images": 1281167, "fid": POOL3, "fd_dinov2": DINOV2}, protocol)
    found = references.read(path)
    assert (found.name, found.sha256, found.layout) == ("img512.pkl", file_sha256(path), "edm2")
    assert (found.count, list(found.moments)) == (1281167, ["pool3", "dinov2"])
    same(found.moments["pool3"], MU, SIGMA)
    same(found.moments["dinov2"], *DINOV2.values())
    one = references.read(pkl(tmp_path / "one.pkl", {"fid": POOL3}))
    assert (one.count, list(one.moments)) == (None, ["pool3"])


@pytest.mark.parametrize("write", [write_zip, write_stream])
def test_caches_of_torch_fidelity(tmp_path, write):
    path = tmp_path / "a-inception-v3-compat-features-2048.pt"
    found = references.read(write(path, tensor(FEATS, "0")))
    assert (found.layout, found.count, found.sha256) == ("torch-fidelity", 5, file_sha256(path))
    np.testing.assert_array_equal(found.features["pool3"], FEATS)
    tensors = {name: tensor(array, name) for name, array in POOL3.items()}
    for value in (tensors, {"mu": MU.astype(np.float32), "sigma": SIGMA}):  # it keeps arrays of numpy
        found = references.read(write(tmp_path / "a-inception-v3-compat-stat-fid-2048.pt", value))
        assert (found.layout, found.count, found.features) == ("torch-fidelity", None, {})
        np.testing.assert_array_equal(found.moments["pool3"].covariance, SIGMA)


def write_own(path, kinds, images=None, **stated):
    rows = {kind: np.random.default_rng(0).normal(size=(9, width)) for kind, width in kinds.items()}
    found = {kind: statistics.of(each) for kind, each in rows.items()}
    made = {"network": NETWORK, "count": 9, "preparation": {"rule": "adm"}, **stated}
    blocks = Blocks(IMAGES.shape, IMAGES.dtype, [IMAGES[:4], IMAGES[4:]]) if images else None
    references.write(path, found, made, blocks, np.arange(6) if images else None)
    return found


@pytest.mark.parametrize("images", [True, False])
@pytest.mark.parametrize("kinds", [{"pool3": 7, "spatial": 5}, {"lite0": 6}, {"dinov2": 4}])
def test_our_own_layout(tmp_path, kinds, images):
    path = tmp_path / "ref.npz"
    written = write_own(path, kinds, images, classes=3)
    found = references.read(path)
    assert (found.layout, found.count, found.network) == ("diffjax", 9, NETWORK)
    assert (found.sha256, found.made["preparation"], found.made["classes"]) == (file_sha256(path), {"rule": "adm"}, 3)
    assert found.moments.keys() == kinds.keys()
    for kind, each in written.items():
        np.testing.assert_array_equal(found.moments[kind].mean, each.mean)
        np.testing.assert_allclose(found.moments[kind].covariance, each.covariance, rtol=1e-12, atol=1e-15)
    if images:
        np.testing.assert_array_equal(found.images.read(np.arange(6)), IMAGES)
        np.testing.assert_array_equal(found.images.labels, np.arange(6))
    else:
        assert found.images is None
    names = {"pool3": ["mu", "sigma"], "spatial": ["mu_s", "sigma_s"], "lite0": ["mu_lite0", "sigma_lite0"]}
    with np.load(path) as stored:
        assert {name for kind in kinds for name in names.get(kind, [])} <= set(stored.files)


def test_our_own_file_without_its_json(tmp_path):
    path = tmp_path / "ref.npz"
    write_own(path, {"lite0": 6})
    path.with_suffix(".json").unlink()
    found = references.read(path)
    assert (found.layout, list(found.moments)) == ("diffjax", ["lite0"])
    assert found.network == {"features": "a network", "features_sha256": "abc", "resize": "none"}  # it is inside, too


def test_the_json_of_another_file(tmp_path):
    path = tmp_path / "ref.npz"
    write_own(path, {"lite0": 6})
    npz(path, **POOL3)
    with pytest.raises(UserError, match=r"ref\.json does not describe ref\.npz: the hash of the file differs"):
        references.read(path)


@pytest.mark.parametrize("stated", [{"network": {"features": "a"}}, {"count": 1}, {"count": "9"}, {"network": None}])
def test_a_json_that_does_not_say_what_the_file_is(tmp_path, stated):
    write_own(tmp_path / "ref.npz", {"lite0": 6}, **stated)
    with pytest.raises(UserError, match=r"ref\.json does not say what ref\.npz is of; make the reference again"):
        references.read(tmp_path / "ref.npz")


def test_the_json_of_samples_is_none_of_a_reference(tmp_path):
    path = npz(tmp_path / "a.npz", arr_0=IMAGES)
    path.with_suffix(".json").write_text(json.dumps({"seed": 1, "samples_sha256": file_sha256(path)}))
    found = references.read(path)
    assert (found.layout, found.made, found.images.made) == ("images", {}, {"seed": 1})


def changed(array, place, value):
    array = array.copy()
    array[place] = value
    return array


class Call:
    def __reduce__(self):
        return print, ("called",)


def torch_call(path):
    with pretended():
        return write_zip(path, None, data=pickle.dumps(Call(), 2))


WRONG = {
    "missing": (lambda d: d / "no.npz", "no.npz: no such reference; valid: npz with mu"),
    "another file": (lambda d: text(d / "a.txt"), "a.txt: valid: an .npz or .npy"),
    "not finite": (
        lambda d: npz(d / "a.npz", mu=changed(MU, 3, np.nan), sigma=SIGMA),
        "a.npz: mu is not finite",
    ),
    "infinite": (
        lambda d: npz(d / "a.npz", mu=MU, sigma=changed(SIGMA, (1, 2), np.inf)),
        "a.npz: sigma is not finite",
    ),
    "not symmetric": (
        lambda d: npz(d / "a.npz", mu=MU, sigma=changed(SIGMA, (1, 2), SIGMA[1, 2] + 0.1)),
        r"a.npz: sigma is not symmetric, entries differ by 0\.1",
    ),
    "negative": (
        lambda d: npz(d / "a.npz", mu=MU, sigma=changed(SIGMA, (4, 4), -1e-3)),
        r"a.npz: sigma has a negative variance, -0\.001",
    ),
    "shapes": (
        lambda d: npz(d / "a.npz", mu=MU, sigma=SIGMA[:5]),
        r"a.npz: mu is \[2048\] and sigma \[5, 2048\]; valid: \[d\] and \[d, d\]",
    ),
    "no sigma": (lambda d: npz(d / "a.npz", mu=MU), "a.npz: not a reference, an npz of mu and sigma"),
    "another network": (
        lambda d: npz(d / "a.npz", mu=MU[:768], sigma=SIGMA[:768, :768]),
        r"a.npz: mu has 768 numbers; valid: 2048 \(pool3\) or 1024 \(dinov2\)",
    ),
    "another spatial": (
        lambda d: npz(d / "a.npz", **POOL3, mu_s=MU, sigma_s=SIGMA),
        r"a.npz: mu_s has 2048 numbers; valid: 2023 \(spatial\)",
    ),
    "words": (lambda d: npz(d / "a.npz", mu=np.array(["a"]), sigma=SIGMA), r"a.npz: mu is <U1 \[1\]; valid: numbers"),
    "other arrays": (lambda d: npz(d / "a.npz", reps=FEATS), "a.npz is no reference: it holds reps; valid: npz with"),
    "empty": (lambda d: npz(d / "a.npz"), "is no reference: it holds nothing"),
    "float images": (lambda d: npz(d / "a.npz", arr_0=IMAGES / 255, **POOL3), "arr_0 is float64 .*; valid: uint8"),
    "no npz": (lambda d: text(d / "a.npz"), "a.npz cannot be read: .*zip"),
    "features of another width": (
        lambda d: npz(d / "a.npz", feats=FEATS[:, :512]),
        "a row of feats has 512 numbers; valid: 2048",
    ),
    "features that are none": (lambda d: npz(d / "a.npz", feats=FEATS[0]), r"feats is float32 \[2048\]; valid: floats"),
    "features not finite": (lambda d: npz(d / "a.npz", feats=changed(FEATS, (1, 1), np.nan)), "feats is not finite"),
    "call": (lambda d: pkl(d / "a.pkl", {"fid": Call()}), r"a.pkl: refused to load builtins\.print"),
    "no dict": (lambda d: pkl(d / "a.pkl", [MU]), "a.pkl is no reference of EDM2: a dict with fid or fd_dinov2"),
    "no metric": (lambda d: pkl(d / "a.pkl", POOL3), "a.pkl is no reference of EDM2"),
    "no arrays": (lambda d: pkl(d / "a.pkl", {"fid": {"mu": MU}}), "a.pkl: fid.sigma is NoneType; valid: numbers"),
    "exchanged": (lambda d: pkl(d / "a.pkl", {"fid": DINOV2}), r"fid.mu has 1024 numbers; valid: 2048 \(pool3\)"),
    "count": (lambda d: pkl(d / "a.pkl", {"fid": POOL3, "num_images": "many"}), "num_images is many; valid: a number"),
    "text": (lambda d: text(d / "a.pkl"), "a.pkl: a damaged pickle"),
    "torch call": (lambda d: torch_call(d / "a.pt"), r"a.pt: refused to load builtins\.print|__builtin__\.print"),
    "torch width": (lambda d: write_zip(d / "a.pt", tensor(FEATS[:, :1024], "0")), "the tensor has 1024 numbers"),
    "torch dict": (lambda d: write_zip(d / "a.pt", {"mu": tensor(MU, "0")}), "no file of torch-fidelity: a dict with"),
    "torch value": (lambda d: write_zip(d / "a.pt", 3), "the tensor is int; valid: floats"),
}


def text(path):
    path.write_text("nothing")
    return path


@pytest.mark.parametrize("case", WRONG)
def test_what_is_refused(tmp_path, case):
    make, message = WRONG[case]
    with pytest.raises(UserError, match=message) as caught:
        references.read(make(tmp_path))
    assert "\n" not in str(caught.value)


def test_rounding_makes_no_covariance_asymmetric(tmp_path):
    sigma = changed(SIGMA, (1, 2), SIGMA[1, 2] * (1 + 1e-9))
    found = references.read(npz(tmp_path / "a.npz", mu=MU, sigma=sigma)).moments["pool3"].covariance
    np.testing.assert_array_equal(found, found.T)
    assert abs(found[1, 2] - SIGMA[1, 2]) < 1e-8
