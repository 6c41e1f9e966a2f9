"""Records of prepared images and the source that reads them."""

import json
import pickle

import numpy as np
import pytest

from diffjax.data import image_records, shards, sources
from diffjax.data.source import Source
from diffjax.errors import UserError
from tests.data import configs
from tests.data.seen import Batches

NAMES = ["cat", "dog", "newt"]
COUNT = 7


def images(size: int) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (COUNT, size, size, 3), np.uint8)


def write(out, size=8, classes=NAMES, **stated):
    """A folder of images with labels 0, 1, 2, 0, ..., as `prepare` leaves it."""
    out.mkdir()
    pairs = enumerate(images(size))
    encoded = [image_records.encode(image, i % max(len(classes), 1), "rgb") for i, image in pairs]
    shards.write(out, image_records.NAME, encoded, image_records.shard_size(size))
    stated = {"dataset": "mine", "split": "train", "rule": "adm"} | stated
    image_records.finish(out, COUNT, size, classes, stated)
    return out


def load(out, **leaves) -> Source:
    section = {"size": 8, "channels": 3, "num_classes": 3, "dir": str(out), "split": "train"} | leaves
    return sources.load(**configs.section("records", **section))


@pytest.mark.parametrize("size, encoding", [(8, "raw"), (64, "raw"), (65, "png"), (256, "png")])
@pytest.mark.parametrize("label", [0, 999])
def test_a_record_is_the_image(size, encoding, label):
    image = images(size)[0]
    record = image_records.encode(image, label, "cmyk")
    found, stored_label = image_records.decode(record)
    np.testing.assert_array_equal(found, image)
    assert (found.dtype, stored_label) == (np.uint8, label)
    parsed = image_records.parse(record)
    assert parsed.colours == "cmyk"
    assert (parsed.encoding == image_records.PNG) == (encoding == "png")
    assert record[:6] == b"DJXI\x01\x00"
    if encoding == "raw":
        assert record[18:] == image.tobytes()


def test_what_is_no_record():
    raw, png = (image_records.encode(images(size)[0], 3, "rgb") for size in (8, 65))
    other_encoding = raw[:15] + b"\x07" + raw[16:]
    for wrong in (b"", raw[:17], b"XXXX" + raw[4:], raw[:4] + b"\x02" + raw[5:], other_encoding):
        with pytest.raises(UserError, match=r"not an image record of version 1: \d+ bytes that start with"):
            image_records.decode(wrong)
    for wrong in (raw[:-1], raw + b"1", png[:-30], png[:40], raw[:15] + b"\x01" + raw[16:]):
        with pytest.raises(UserError, match="a damaged record of an image of"):
            image_records.decode(wrong)


@pytest.mark.parametrize("size", [8, 72])
def test_the_source(tmp_path, size):
    source = load(write(tmp_path / "out", size), size=size)
    found, labels = sources.arrays(source)
    np.testing.assert_array_equal(found, images(size))
    assert list(labels) == [0, 1, 2, 0, 1, 2, 0]
    assert source.classes == tuple(NAMES)
    assert source.describe() == "7 images of records, 3 classes: cat, dog, newt"
    manifest = json.loads((tmp_path / "out" / "images.json").read_text())
    identity = {"dataset": "mine", "split": "train", "classes": 3, "size": size, "count": 7, "name": "records"}
    assert source.fingerprint == identity | {"records_sha256": manifest["records_sha256"]}
    assert manifest["images_per_class"] == [3, 2, 2]


def test_without_labels(tmp_path):
    source = load(write(tmp_path / "out"), num_classes=0)
    assert set(sources.arrays(source)[1]) == {0}
    assert (source.classes, source.fingerprint["classes"]) == ((), 0)
    unlabelled = load(write(tmp_path / "unlabelled", classes=[]), num_classes=0)
    assert set(sources.arrays(unlabelled)[1]) == {0}


def test_it_is_given_to_worker_processes(tmp_path):
    source = load(write(tmp_path / "out"))
    copy = pickle.loads(pickle.dumps(source.examples))
    np.testing.assert_array_equal(copy[3]["image"], images(8)[3])
    batches = Batches(source, batch_size=4, seed=0, flip=False)
    assert next(batches).x.shape == (4, 8, 8, 3)
    batches.close()


@pytest.mark.parametrize("leaf, wrong, found", [("size", 16, 8), ("channels", 1, 3), ("num_classes", 10, 3)])
def test_contradictions(tmp_path, leaf, wrong, found):
    with pytest.raises(UserError, match=f"data.{leaf}={wrong}, but records has {leaf}={found}"):
        load(write(tmp_path / "out"), **{leaf: wrong})


def test_another_split(tmp_path):
    out = write(tmp_path / "out", split="validation")
    with pytest.raises(UserError, match=r"data.split='train', but the images in .* are of split 'validation'"):
        load(out)
    assert len(load(out, split="validation").examples) == COUNT


CHANGES = {
    "version": ({"version": 2}, "images.json has version 2; valid: 1"),
    "no classes": ({"classes": None}, "no names of 3 classes"),
    "fewer classes": ({"classes": ["cat"]}, "no names of 3 classes"),
    "no size": ({"size": "8"}, 'is no manifest of prepared images: size is "8"'),
    "fewer records": ({"count": 6}, "holds 7 records, its manifest says 6"),
    "another shard": ({"shards": ["../a.array_record"]}, "names the shard"),
}


@pytest.mark.parametrize("name", CHANGES)
def test_manifests_of_something_else(tmp_path, name):
    change, words = CHANGES[name]
    out = write(tmp_path / "out")
    manifest = json.loads((out / "images.json").read_text())
    (out / "images.json").write_text(json.dumps(manifest | change))
    with pytest.raises(UserError, match=words):
        load(out)


def test_no_records_name_the_command(tmp_path):
    with pytest.raises(UserError, match=r"images.json is missing; make them with: python -m diffjax prepare NAME --f"):
        load(tmp_path)


@pytest.mark.parametrize("shape, label", [((9, 9, 3), 0), ((8, 8, 1), 0), ((8, 8, 3), 3), ((8, 8, 3), -1)])
def test_a_manifest_is_of_records_of_one_kind(tmp_path, shape, label):
    (tmp_path / "out").mkdir()
    record = image_records.encode(np.zeros(shape, np.uint8), label, "rgb")
    shards.write(tmp_path / "out", image_records.NAME, [record], 10)
    with pytest.raises(UserError, match="remove its shards"):
        image_records.finish(tmp_path / "out", 1, 8, NAMES, {})
