"""ImageNet from each layout of its originals: the same records, labels by the rank of the synset id."""

import io
from pathlib import Path

import numpy as np
import pytest
from scipy.io import savemat

from diffjax.data.preparation import imagenet, originals
from diffjax.data.preparation.imagenet import synsets
from diffjax.data.transforms import adm_center_crop, edm_center_crop
from diffjax.data.transforms import stored as decoded
from diffjax.errors import UserError
from tests.data.preparation.originals import (
    RANKS,
    imagenet_files,
    imagenet_tar,
    prepare,
    publish,
    refusal,
    stored,
    tar_of,
    write_tree,
)

IDS = synsets()
FILES = imagenet_files()
ORDER = [name for _, name in sorted((IDS.index(name[:9]), name) for name in FILES)]
VALIDATION = {f"ILSVRC2012_val_{i:08d}.JPEG": data for i, data in enumerate(FILES.values(), 1)}
TRUTH = [3, 3, 1, 2, 2, 2, 1, 1, 3]  # the devkit's numbers
SYNSET_OF = {1: IDS[999], 2: IDS[0], 3: IDS[281]}  # whose order is not that of the ids


def devkit(truth: list[int] = TRUTH) -> dict[str, bytes]:
    rows = [(number, synset, "words") for number, synset in SYNSET_OF.items()]
    rows.append((1001, "n00000000", "an inner node"))
    table = np.array(rows, [("ILSVRC2012_ID", object), ("WNID", object), ("words", object)])
    meta = io.BytesIO()
    savemat(meta, {"synsets": table.reshape(-1, 1)})
    folder = "ILSVRC2012_devkit_t12/data"
    return {
        f"{folder}/meta.mat": meta.getvalue(),
        f"{folder}/ILSVRC2012_validation_ground_truth.txt": "".join(f"{number}\n" for number in truth).encode(),
    }


def tars(root: Path) -> Path:
    return write_tree(root, {"ILSVRC2012_img_train.tar": imagenet_tar(FILES)})


def tree(root: Path) -> Path:
    return write_tree(root, {f"train/{name}": data for name, data in FILES.items()})


LAYOUTS = {
    "tars": tars,
    "one tar": lambda root: tars(root) / "ILSVRC2012_img_train.tar",
    "tree": tree,
    "class folders": lambda root: tree(root) / "train",
}


@pytest.fixture(scope="module")
def expected(tmp_path_factory):
    root = tmp_path_factory.mktemp("imagenet")
    return prepare("imagenet64", tars(root / "tars"), root / "out", "--partial")


def test_records_are_the_published_preparation(expected):
    images, labels, manifest = stored(expected)
    assert labels == [0] * 3 + [281] * 3 + [999] * 3
    for image, name in zip(images, ORDER):
        np.testing.assert_array_equal(image, adm_center_crop(decoded(io.BytesIO(FILES[name])), 64))
    assert manifest["num_classes"] == 1000
    assert tuple(manifest["classes"]) == IDS
    assert manifest["label_table_sha256"] == imagenet.SYNSETS_SHA256
    assert [manifest["images_per_class"][rank] for rank in RANKS] == [3, 3, 3]
    assert sum(manifest["images_per_class"]) == manifest["count"] == 9
    assert manifest["converted"] == {"grey": 1, "cmyk": 1}
    assert (manifest["rule"], manifest["decode"], manifest["partial"]) == ("adm", "stored", True)
    [file] = manifest["source"]["files"]
    assert file["name"] == "ILSVRC2012_img_train.tar"
    assert manifest["source"]["not_as_published"] == ["ILSVRC2012_img_train.tar"]


@pytest.mark.parametrize("layout", list(LAYOUTS)[1:])
def test_every_layout_gives_the_same_records(expected, tmp_path, layout):
    out = prepare("imagenet64", LAYOUTS[layout](tmp_path / "in"), tmp_path / "out", "--partial")
    for path in expected.glob("*.array_record"):
        assert (out / path.name).read_bytes() == path.read_bytes()
    ours, theirs = stored(out)[2], stored(expected)[2]
    assert ours["source"]["index_sha256"] == theirs["source"]["index_sha256"]
    assert {**ours, "source": None} == {**theirs, "source": None}


def test_the_rule_of_edm(tmp_path):
    images, _, manifest = stored(prepare("imagenet64-edm", tree(tmp_path / "in"), tmp_path / "out", "--partial"))
    for image, name in zip(images, ORDER):
        np.testing.assert_array_equal(image, edm_center_crop(decoded(io.BytesIO(FILES[name])), 64))
    assert manifest["rule"] == "edm-crop"


def test_large_images_are_stored_without_loss(tmp_path):
    images, _, _ = stored(prepare("imagenet256", tree(tmp_path / "in"), tmp_path / "out", "--partial"))
    for image, name in zip(images, ORDER):
        np.testing.assert_array_equal(image, adm_center_crop(decoded(io.BytesIO(FILES[name])), 256))


VALIDATION_LAYOUTS = {
    "tar, devkit": {
        "ILSVRC2012_img_val.tar": tar_of(VALIDATION),
        "ILSVRC2012_devkit_t12.tar.gz": tar_of(devkit(), "w:gz"),
    },
    "flat folder, extracted devkit": {**{f"val/{name}": data for name, data in VALIDATION.items()}, **devkit()},
    "class folders": {f"val/{SYNSET_OF[number]}/{name}": VALIDATION[name] for number, name in zip(TRUTH, VALIDATION)},
}


@pytest.mark.parametrize("layout", VALIDATION_LAYOUTS)
def test_validation_labels_are_ranks_and_not_numbers_of_the_devkit(tmp_path, layout):
    origin = write_tree(tmp_path / "in", VALIDATION_LAYOUTS[layout])
    images, labels, _ = stored(prepare("imagenet64", origin, tmp_path / "out", "--partial", "--split=validation"))
    pairs = sorted((IDS.index(SYNSET_OF[number]), name) for number, name in zip(TRUTH, VALIDATION))
    assert labels == [rank for rank, _ in pairs]
    for image, (_, name) in zip(images, pairs):
        np.testing.assert_array_equal(image, adm_center_crop(decoded(io.BytesIO(VALIDATION[name])), 64))


@pytest.mark.parametrize("place", ["val", "ILSVRC2012_img_val.tar"])
def test_the_devkit_beside_what_was_named(tmp_path, place):
    files = VALIDATION_LAYOUTS["flat folder, extracted devkit" if place == "val" else "tar, devkit"]
    origin = write_tree(tmp_path / "in", files) / place
    labels = stored(prepare("imagenet64", origin, tmp_path / "out", "--partial", "--split=validation"))[1]
    assert labels == sorted(IDS.index(SYNSET_OF[number]) for number in TRUTH)


def test_the_devkit_beside_a_folder_of_a_tar_is_not_taken(tmp_path, capsys):
    write_tree(tmp_path, devkit())
    origin = write_tree(tmp_path / "in", {"ILSVRC2012_img_val.tar": tar_of(VALIDATION)})
    line = refusal(capsys, "imagenet64", origin, tmp_path / "out", "--partial", "--split=validation")
    assert "in does not hold the devkit" in line


def shard(rows: list[tuple[bytes, str | None, int]], row_group_size: int = 2) -> bytes:
    import pyarrow as pa
    from pyarrow import parquet

    images = [{"bytes": data, "path": path} for data, path, _ in rows]
    out = io.BytesIO()
    table = pa.table({"image": images, "label": [label for _, _, label in rows]})
    parquet.write_table(table, out, row_group_size=row_group_size)
    return out.getvalue()


ROWS = [(data, name.split("/")[1], IDS.index(name[:9])) for name, data in FILES.items()]
PARQUET = {f"data/train-0000{i}-of-00002.parquet": shard(ROWS[start : start + 5]) for i, start in enumerate((0, 5))}


def test_parquet_shards(tmp_path):
    """In their own order, over files and row groups."""
    out = prepare("imagenet64", write_tree(tmp_path / "in", PARQUET), tmp_path / "out", "--partial")
    images, labels, manifest = stored(out)
    assert labels == [label for _, _, label in ROWS]
    for image, (data, _, _) in zip(images, ROWS):
        np.testing.assert_array_equal(image, adm_center_crop(decoded(io.BytesIO(data)), 64))
    assert [file["name"] for file in manifest["source"]["files"]] == [name[5:] for name in PARQUET]


def test_many_parquet_shards_are_known_by_their_sizes(tmp_path, monkeypatch):
    """Each is below the limit, together they are above it; images of other sizes are still others."""

    def source(name: str, files: dict[str, bytes]) -> dict:
        origin = write_tree(tmp_path / name, files)
        return stored(prepare("imagenet64", origin, tmp_path / f"{name}-out", "--partial"))[2]["source"]

    monkeypatch.setattr(originals, "HASHED", max(map(len, PARQUET.values())))
    found = source("in", PARQUET)
    assert [(file["bytes"], file["sha256"], file["md5"]) for file in found["files"]] == [
        (len(data), None, None) for data in PARQUET.values()
    ]
    first = next(iter(PARQUET))
    rows = [(data + b"\0", name, label) for data, name, label in ROWS[:5]]
    assert source("same", PARQUET) == found
    assert source("other", PARQUET | {first: shard(rows)})["index_sha256"] != found["index_sha256"]


def test_parquet_labels_that_nothing_confirms_are_said(tmp_path, capsys):
    rows = [(data, None, label) for data, _, label in ROWS]
    origin = write_tree(tmp_path / "in", {"train-0.parquet": shard(rows)})
    assert stored(prepare("imagenet64", origin, tmp_path / "out", "--partial"))[1] == [label for _, _, label in rows]
    assert "labels of 9 images taken as they are: no synset id in their names" in capsys.readouterr().out


def cut(data: bytes, end: int) -> bytes:
    return data[:end]


def damaged_header(data: bytes) -> bytes:
    """Of the second file: its checksum is wrong."""
    where = data.index(b".tar", 513)
    return data[: where + 4] + b"X" + data[where + 5 :]


TRAIN = imagenet_tar(FILES)
FIRST = next(iter(FILES))
BAD = {
    "cut in an image": ({"ILSVRC2012_img_train.tar": TRAIN[:20_000]}, (), "ILSVRC2012_img_train.tar cannot be read: "),
    "cut after a class": (
        {"ILSVRC2012_img_train.tar": TRAIN[: TRAIN.index(IDS[0].encode() + b".tar")]},
        (),
        "cannot be read: no block of zeros at its end",
    ),
    "header damaged": ({"ILSVRC2012_img_train.tar": damaged_header(TRAIN)}, (), "no block of zeros at its end"),
    "no tar": ({"ILSVRC2012_img_train.tar": b"<html>busy</html>" * 100}, (), "ILSVRC2012_img_train.tar cannot be read"),
    "inner tar damaged": (
        {"ILSVRC2012_img_train.tar": tar_of({f"{IDS[5]}.tar": tar_of({f"{IDS[5]}_1.JPEG": b"x" * 999})[:-10240]})},
        (),
        f"{IDS[5]}.tar: ",
    ),
    "image damaged": ({f"train/{FIRST}": FILES[FIRST][:900]}, (), f"{FIRST} cannot be decoded"),
    "image empty": ({f"train/{FIRST}": b""}, (), f"{FIRST} cannot be decoded"),
    "unknown synset": ({"train/n00000001/a.JPEG": FILES[FIRST]}, (), "does not lie in a folder of a synset"),
    "flat train": ({"train/a.JPEG": FILES[FIRST], **devkit()}, (), "a.JPEG does not lie in a folder of"),
    "flat validation": (
        {"val/a.JPEG": FILES[FIRST], **devkit()},
        ("--split=validation",),
        "a.JPEG is no image of ImageNet's validation set",
    ),
    "nothing": ({"notes.txt": b""}, (), "holds no images of ImageNet's train; valid: a folder of ILSVRC2012"),
    "no devkit": (
        {"ILSVRC2012_img_val.tar": tar_of(VALIDATION)},
        ("--split=validation",),
        "does not hold the devkit, which has the labels of validation images: ILSVRC2012_devkit_t12.tar.gz or",
    ),
    "devkit damaged": (
        {"ILSVRC2012_img_val.tar": tar_of(VALIDATION), "ILSVRC2012_devkit_t12.tar.gz": b"\x1f\x8b" + b"0" * 99},
        ("--split=validation",),
        "ILSVRC2012_devkit_t12.tar.gz cannot be read",
    ),
    "devkit incomplete": (
        {"ILSVRC2012_img_val.tar": tar_of(VALIDATION), "ILSVRC2012_devkit_t12.tar.gz": tar_of({"a": b""}, "w:gz")},
        ("--split=validation",),
        "lacks ILSVRC2012_devkit_t12/data/ILSVRC2012_validation_ground_truth.txt",
    ),
    "devkit of other classes": (
        {"ILSVRC2012_img_val.tar": tar_of(VALIDATION), **devkit([7] * 9)},
        ("--split=validation",),
        "names class 7",
    ),
    "too few truths": (
        {"ILSVRC2012_img_val.tar": tar_of(VALIDATION), **devkit([1] * 5)},
        ("--split=validation",),
        "ILSVRC2012_val_00000006.JPEG is no image of ImageNet's validation set",
    ),
    "parquet cut": ({"train-0.parquet": shard(ROWS)[:5000]}, (), "train-0.parquet cannot be read"),
    "parquet of labels in another order": (
        {"train-0.parquet": shard([(data, path, 448) for data, path, _ in ROWS])},
        (),
        "these labels are in another order",
    ),
    "parquet without labels": (
        {"train-0.parquet": shard([(b"", "a", -1)])},
        (),
        "label -1 of an image; valid: 0 to 999",
    ),
    "parquet without an image": ({"train-0.parquet": shard([(None, "a", 1)])}, (), "a holds no image"),
    "another parquet": ({"train-0.parquet": b""}, (), "train-0.parquet cannot be read"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_originals_are_one_line(tmp_path, capsys, name):
    files, flags, words = BAD[name]
    origin = write_tree(tmp_path / "in", files)
    assert words in refusal(capsys, "imagenet64", origin, tmp_path / "out", "--partial", *flags)


def test_parquet_of_other_columns(tmp_path, capsys):
    import pyarrow as pa
    from pyarrow import parquet

    parquet.write_table(pa.table({"img": [b""], "label": [0]}), tmp_path / "train.parquet")
    words = "has no column image.bytes; valid: image with bytes and path, label"
    assert words in refusal(capsys, "imagenet64", tmp_path, tmp_path / "out", "--partial")


def test_another_number_of_images_or_classes_is_refused(tmp_path, capsys, monkeypatch):
    origin = tree(tmp_path / "in")
    line = refusal(capsys, "imagenet64", origin, tmp_path / "out")
    assert "imagenet64, train: 9 images, published are 1,281,167; --partial prepares them nevertheless" in line
    publish(monkeypatch, "imagenet64", counts={"train": 9})
    line = refusal(capsys, "imagenet64", origin, tmp_path / "out")
    assert "imagenet64, train: 9 images of 3 classes, published are 1,000; --partial" in line
    publish(monkeypatch, "imagenet64", classes=3)
    assert stored(prepare("imagenet64", origin, tmp_path / "out"))[2]["partial"] is False


def test_the_table_of_synsets_is_checked(tmp_path, monkeypatch):
    assert (len(IDS), IDS[0], IDS[281], IDS[999]) == (1000, "n01440764", "n02123045", "n15075141")
    monkeypatch.setattr(imagenet, "SYNSETS_SHA256", "0" * 64)
    with pytest.raises(UserError, match=r"labels\.txt holds other ids"):
        synsets()
    monkeypatch.setattr(imagenet.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match="datasets/imagenet2012/labels.txt of the package tensorflow-datasets, which"):
        synsets()
