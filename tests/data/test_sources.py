"""Sources: what is embedded, how it is split, and every refusal."""

import numpy as np
import pytest

from diffjax.contracts import Stored
from diffjax.data import embedded, sources
from diffjax.data.source import scaled
from diffjax.errors import UserError
from tests.data import configs
from tests.data.seen import seen


@pytest.mark.parametrize(
    "make, split, count, shape, classes",
    [
        (configs.digits, "train", 1500, (8, 8, 1), 10),
        (configs.digits, "test", 297, (8, 8, 1), 10),
        (configs.emoji32, "train", 1700, (32, 32, 3), 9),
        (configs.emoji32, "test", 206, (32, 32, 3), 9),
    ],
)
def test_embedded_splits(make, split, count, shape, classes):
    source = sources.load(**make(split=split))
    images, labels = sources.arrays(source)
    assert images.shape == (count, *shape)
    assert images.dtype == np.uint8
    assert labels.dtype == np.int32
    assert set(labels) == set(range(classes))
    assert images.min() == 0
    assert images.max() == 255
    assert source.fingerprint["length"] == len(source.examples) == count


@pytest.mark.parametrize("make, file", [(configs.digits, "digits8.npz"), (configs.emoji32, "emoji32.npz")])
def test_splits_are_disjoint_complete_and_stratified(make, file):
    labels = embedded.read(file)["labels"]
    held_out = len(sources.load(**make(split="test")).examples)
    train, test = sources.stratified_split(labels, held_out)
    assert sorted([*train, *test]) == list(range(len(labels)))
    shares = np.bincount(labels[test]) / np.bincount(labels)
    assert np.abs(shares - held_out / len(labels)).max() < 1 / np.bincount(labels).min()


def test_splits_never_change():
    """Scores of one version and references of another must mean the same images."""
    held_out = [
        sources.stratified_split(embedded.read(file)["labels"], count)[1]
        for file, count in (("digits8.npz", 297), ("emoji32.npz", 206))
    ]
    assert [list(each[:5]) for each in held_out] == [[4, 5, 9, 10, 15], [5, 9, 10, 15, 17]]
    assert [int(each.sum()) for each in held_out] == [272395, 192667]


def test_arrays_are_in_stored_order_and_limited():
    source = sources.load(**configs.digits(split="test"))
    images, labels = sources.arrays(source, limit=5)
    assert len(images) == 5
    for i in range(5):
        np.testing.assert_array_equal(images[i], source.examples[i]["image"])
        assert labels[i] == source.examples[i]["label"]
    assert len(sources.arrays(source, limit=10_000)[0]) == 297


def test_pixels_are_scaled_to_minus_one_and_one():
    images = np.arange(256, dtype=np.uint8).reshape(1, 16, 16, 1)
    expected = images.astype(np.float32) / np.float32(127.5) - 1
    on_host = scaled(images)
    assert on_host.dtype == np.float32
    assert (on_host.min(), on_host.max()) == (-1, 1)
    np.testing.assert_array_equal(on_host, expected)
    for mirrored, seen_as in ((False, expected), (True, expected[:, :, ::-1])):
        stored = Stored(images, np.array([mirrored]), np.zeros(1, int), np.zeros(1, int), np.zeros(1, int))
        on_device = seen(sources.digits(), stored).x
        assert on_device.dtype == np.float32
        np.testing.assert_array_equal(on_device, seen_as)


def test_unknown_source_names_the_valid_ones():
    with pytest.raises(UserError, match=r"data.name='mnist' .* digits, emoji32"):
        sources.load(**configs.section("mnist", 28, 1, 10))


def test_unknown_split_names_the_valid_ones():
    with pytest.raises(UserError, match=r"data.split='validation' .* digits; valid: train, test"):
        sources.load(**configs.digits(split="validation"))


@pytest.mark.parametrize("leaf, wrong, found", [("size", 16, 8), ("channels", 3, 1), ("num_classes", 100, 10)])
def test_contradiction_names_both_sides(leaf, wrong, found):
    data = configs.digits()
    data[leaf] = wrong
    with pytest.raises(UserError, match=f"data.{leaf}={wrong}, but digits has {leaf}={found}"):
        sources.load(**data)


def test_damaged_embedded_data_is_refused(monkeypatch):
    monkeypatch.setitem(embedded.SHA256, "digits8.npz", "0" * 64)
    with pytest.raises(UserError, match=r"digits8\.npz is damaged"):
        sources.load(**configs.digits())


def test_array_hash_sees_names_types_shapes_and_values():
    arrays = {"a": np.arange(6, dtype=np.uint8)}
    others = [
        {"b": arrays["a"]},
        {"a": arrays["a"].astype(np.int8)},
        {"a": arrays["a"].reshape(2, 3)},
        {"a": arrays["a"][::-1]},
    ]
    assert len({embedded.sha256(each) for each in [arrays, *others]}) == 5
