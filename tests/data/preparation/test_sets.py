"""CelebA, FFHQ, AFHQ v2, LSUN, and images of one's own: order, labels, and what is refused."""

import io
import json
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from diffjax.data.preparation import lsun
from diffjax.data.transforms import RULES
from diffjax.data.transforms import stored as decoded
from tests.data.preparation.originals import encoded, picture, prepare, publish, refusal, stored, write_tree
from tests.data.preparation.test_containers import zip_of

FACES = {f"00000{i}.jpg": encoded(picture(i, 178, 218)) for i in range(1, 6)}
PARTITION = "".join(f"{name} {split}\n" for name, split in zip(FACES, (0, 0, 1, 2, 0))).encode()
CELEBA = {
    "zip": {
        "img_align_celeba.zip": zip_of({f"img_align_celeba/{name}": data for name, data in FACES.items()}),
        "list_eval_partition.txt": PARTITION,
    },
    "folders": {
        **{f"Img/img_align_celeba/{name}": data for name, data in FACES.items()},
        "Eval/list_eval_partition.txt": PARTITION,
    },
}


@pytest.mark.parametrize("layout", CELEBA)
@pytest.mark.parametrize("split, numbers", [("train", (1, 2, 5)), ("validation", (3,)), ("test", (4,))])
def test_celeba(tmp_path, monkeypatch, layout, split, numbers):
    publish(monkeypatch, "celeba64", counts={split: len(numbers)})
    origin = write_tree(tmp_path / "in", CELEBA[layout])
    images, labels, manifest = stored(prepare("celeba64", origin, tmp_path / "out", f"--split={split}"))
    for image, number in zip(images, numbers):
        expected = RULES["celeba"](decoded(io.BytesIO(FACES[f"00000{number}.jpg"])), 64)
        np.testing.assert_array_equal(image, expected)
    assert len(images) == len(numbers)
    assert set(labels) == {0}
    assert (manifest["num_classes"], manifest["classes"]) == (0, [])
    assert manifest["source"]["files"][-1]["name"] == "list_eval_partition.txt"


@pytest.mark.parametrize("place", ["faces.zip", "img_align_celeba"])
def test_the_images_of_celeba_that_were_named_are_taken(tmp_path, monkeypatch, place):
    """And the partition beside them; another archive there is not read."""
    publish(monkeypatch, "celeba64", counts={"test": 1})
    files = {"img_align_celeba.zip": b"another", "list_eval_partition.txt": PARTITION, "faces.zip": zip_of(FACES)}
    origin = write_tree(tmp_path / "in", files | {f"img_align_celeba/{name}": data for name, data in FACES.items()})
    assert stored(prepare("celeba64", origin / place, tmp_path / "out", "--split=test"))[2]["count"] == 1


def test_celeba_that_is_not_whole(tmp_path, capsys):
    def line(**changes: bytes) -> str:
        files = CELEBA["zip"] | {name.replace("_txt", ".txt").replace("_zip", ".zip"): d for name, d in changes.items()}
        origin = write_tree(tmp_path / "in", files)
        return refusal(capsys, "celeba64", origin, tmp_path / "out", "--partial")

    assert "'000001.jpg 7'; valid: lines of a file name and 0, 1 or 2" in line(
        list_eval_partition_txt=b"000001.jpg 7\n"
    )
    assert "a.jpg of list_eval_partition.txt is missing, and 0 more" in line(list_eval_partition_txt=b"a.jpg 0\n")
    assert "img_align_celeba.zip cannot be read" in line(img_align_celeba_zip=b"<html>too many users</html>")
    plain = zip_of({"000001.jpg": encoded(picture(1, 128, 128))})
    files = {"img_align_celeba_zip": plain, "list_eval_partition_txt": b"000001.jpg 0\n"}
    assert "000001.jpg: 128x128 pixels; an aligned CelebA image has 178x218" in line(**files)
    (tmp_path / "in" / "list_eval_partition.txt").unlink()
    assert "does not hold the partition into splits" in refusal(capsys, "celeba64", tmp_path / "in", tmp_path / "out")


SQUARES = {"ffhq64": 1024, "ffhq256": 1024, "afhqv2-64": 512}


@pytest.mark.parametrize("name", SQUARES)
def test_sets_of_squares(tmp_path, monkeypatch, name):
    """From a folder and from its zip; folders are no classes; by one Lanczos step."""
    side, size = SQUARES[name], 256 if name.endswith("256") else 64
    pictures = {f"{i:05d}/{2 * i:05d}.png": encoded(picture(i, side, side), "png", compress_level=1) for i in (0, 1)}
    publish(monkeypatch, name, counts={"train": 2})
    folder = write_tree(tmp_path / "in", pictures | {"LICENSE.txt": b"", "in.zip": zip_of(pictures)})
    images, labels, manifest = stored(prepare(name, folder, tmp_path / "out"))
    for i, image in enumerate(images):
        resized = picture(i, side, side).resize((size, size), Image.Resampling.LANCZOS)
        np.testing.assert_array_equal(image, np.asarray(resized))
    assert labels == [0, 0]
    assert manifest["num_classes"] == 0
    zipped = stored(prepare(name, folder / "in.zip", tmp_path / "zipped"))[2]
    assert zipped["records_sha256"] == manifest["records_sha256"]


def test_copies_of_another_size_are_refused(tmp_path, capsys):
    origin = write_tree(tmp_path / "in", {"00000.png": encoded(picture(0, 256, 256), "png")})
    line = refusal(capsys, "ffhq64", origin, tmp_path / "out", "--partial")
    assert "00000.png has 256x256 pixels; originals of ffhq64 have 1024x1024" in line
    assert "published are 70,000" in refusal(capsys, "ffhq64", origin, tmp_path / "out")


def environment(folder: Path, values: dict[bytes, bytes]) -> Path:
    lmdb = pytest.importorskip("lmdb", reason="the extra `prepare` is not installed")
    folder.mkdir(parents=True)
    with lmdb.open(str(folder), map_size=2**24) as opened, opened.begin(write=True) as transaction:
        for key, value in values.items():
            transaction.put(key, value)
    return folder


PHOTOS = {
    b"ffff": encoded(picture(1, 300, 256), "webp", lossless=True),
    b"00ab": encoded(picture(2, 256, 341)),
    b"7c00": encoded(picture(3, 512, 300)),
}


@pytest.mark.parametrize("inside", [False, True])
def test_lsun(tmp_path, monkeypatch, inside):
    """In the order of the keys, jpeg and webp."""
    publish(monkeypatch, "lsun-church256", counts={"train": 3})
    folder = environment(tmp_path / "in/church_outdoor_train_lmdb", PHOTOS)
    origin = folder if inside else tmp_path / "in"
    images, labels, manifest = stored(prepare("lsun-church256", origin, tmp_path / "out"))
    for image, key in zip(images, sorted(PHOTOS)):
        np.testing.assert_array_equal(image, RULES["lsun"](decoded(io.BytesIO(PHOTOS[key])), 256))
    assert set(labels) == {0}
    assert manifest["source"]["files"][0]["name"] == "data.mdb"


def test_lsun_that_is_not_whole(tmp_path, capsys, monkeypatch):
    out = tmp_path / "out"
    write_tree(tmp_path, {"in/church_outdoor_train_lmdb.zip": b""})
    line = refusal(capsys, "lsun-church256", tmp_path / "in", out)
    assert "holds no lmdb, church_outdoor_train_lmdb/data.mdb; extract church_outdoor_train_lmdb.zip" in line
    write_tree(tmp_path, {"bad/data.mdb": b"nothing" * 1000})
    with monkeypatch.context() as patch:
        patch.setitem(sys.modules, "lmdb", None)
        line = refusal(capsys, "lsun-church256", tmp_path / "bad", out)
    assert "LSUN is read with the package lmdb; install it with: pip install -e '.[prepare]'" in line
    folder = environment(tmp_path / "some", {b"a": PHOTOS[b"00ab"], b"b": b"no image"})
    assert "b cannot be decoded" in refusal(capsys, "lsun-church256", folder, out, "--partial")
    assert "2 images, published are 126,227" in refusal(capsys, "lsun-church256", folder, tmp_path / "other")
    line = refusal(capsys, "lsun-church256", tmp_path / "bad", out)
    assert f"{tmp_path / 'bad'} cannot be read: " in line
    assert "extract the zip again" in line


def test_lsun_environments_are_read_by_threads(tmp_path):
    folder = environment(tmp_path / "some", {f"{i:03d}".encode(): PHOTOS[b"00ab"] for i in range(50)})
    with lsun.read("cat", folder, "train") as originals:
        assert originals.names == [f"{i:03d}" for i in range(50)]
    prepare("lsun-cat256", folder, tmp_path / "out", "--threads=8")
    assert stored(tmp_path / "out")[2]["count"] == 50


OWN = {f"{name}.png": encoded(picture(i, 20, 16), "png") for i, name in enumerate(["dog/b", "cat/a", "dog/a"])}


def own(files: dict[str, bytes], tmp_path: Path, *flags: str) -> tuple[np.ndarray, list[int], dict]:
    origin = write_tree(tmp_path / "in", files)
    flags = ("--size=8", "--rule=adm", "--decode=shown", *flags)
    return stored(prepare("images", origin, tmp_path / "out", *flags))


def test_class_folders(tmp_path):
    images, labels, manifest = own(OWN, tmp_path)
    assert labels == [0, 1, 1]
    assert (manifest["classes"], manifest["images_per_class"]) == (["cat", "dog"], [1, 2])
    assert (manifest["split"], manifest["rule"], manifest["decode"]) == ("train", "adm", "shown")
    for image, number in zip(images, (1, 2, 0)):
        np.testing.assert_array_equal(image, RULES["adm"](picture(number, 20, 16), 8))


def test_a_flat_folder_has_no_classes(tmp_path):
    assert own({name.replace("/", "-"): data for name, data in OWN.items()}, tmp_path)[2]["num_classes"] == 0


def labelled(value: object) -> dict[str, bytes]:
    return OWN | {"dataset.json": json.dumps({"labels": value}).encode()}


def test_labels_of_a_json(tmp_path):
    _, labels, manifest = own(labelled([["dog/b.png", 2], ["dog/a.png", 0], ["cat/a.png", 2]]), tmp_path)
    assert labels == [2, 0, 2]
    assert (manifest["classes"], manifest["images_per_class"]) == (["0", "1", "2"], [1, 0, 2])


def test_a_json_without_labels(tmp_path):
    _, labels, manifest = own(labelled(None), tmp_path)
    assert labels == [0, 0, 0]
    assert manifest["num_classes"] == 0


PAIRS = [["dog/b.png", 0], ["dog/a.png", 1], ["cat/a.png", 0]]
BAD = {
    "a label for no image": (labelled([*PAIRS, ["x.png", 0]]), "dataset.json: x.png is not among the images"),
    "an image without": (labelled(PAIRS[:2]), "dataset.json: cat/a.png is without a label"),
    "floats": (labelled([["dog/b.png", [0.5, 0.5]]]), "label [0.5, 0.5]; valid: integers from 0"),
    "negative": (labelled([["dog/b.png", -1]]), "label -1; valid: integers from 0"),
    "large": (labelled([*PAIRS[:2], ["cat/a.png", 10**9]]), "class 1000000000 of 3 images"),
    "no json": (OWN | {"dataset.json": b"{"}, 'valid: {"labels": [[name, class], ...]} or {"labels": null}'),
    "another json": (OWN | {"dataset.json": b"[]"}, 'valid: {"labels": [[name, class], ...]}'),
    "beside folders": (OWN | {"a.png": OWN["dog/a.png"]}, "image a.png lies beside class folders; move it into one"),
    "nothing": ({"a.txt": b""}, "images: no images; --from is a folder, .zip or .tar of images"),
    "narrow": (
        {"a.png": encoded(Image.new("L", (60000, 1)), "png")},
        "a.png has 60000x1 pixels, too narrow for a square of 64",
    ),
    "32 bits": ({"a.tif": encoded(Image.new("F", (8, 8)), "tiff")}, "a.tif cannot be decoded: 32 bits of grey"),
    "cut": ({"a.png": OWN["dog/a.png"][:-30]}, "a.png cannot be decoded"),
}


@pytest.mark.parametrize("name", BAD)
def test_what_is_refused_of_ones_own(tmp_path, capsys, name):
    files, words = BAD[name]
    origin = write_tree(tmp_path / "in", files)
    flags = ("--size=64", "--rule=adm", "--decode=stored")
    assert words in refusal(capsys, "images", origin, tmp_path / "out", *flags)


def test_conversions_are_counted(tmp_path):
    """Alpha is dropped, which uncovers the colours under it, or blended with white."""
    clear = Image.new("RGBA", (8, 8), (200, 100, 50, 0))
    files = {
        "alpha.png": encoded(clear, "png"),
        "cmyk.jpg": encoded(Image.new("CMYK", (8, 8))),
        "grey.png": encoded(Image.new("L", (8, 8)), "png"),
        "palette.png": encoded(Image.new("P", (8, 8)), "png"),
        "rgb.png": encoded(Image.new("RGB", (8, 8)), "png"),
        "ycbcr.jpg": encoded(Image.new("RGB", (8, 8))),
    }
    origin = write_tree(tmp_path / "in", files)
    for decode, colour in (("stored", (200, 100, 50)), ("shown", (255, 255, 255))):
        out = tmp_path / decode
        prepare("images", origin, out, "--size=8", "--rule=none", f"--decode={decode}")
        images, _, manifest = stored(out)
        assert tuple(images[0, 0, 0]) == colour
        assert manifest["converted"] == {"grey": 1, "palette": 1, "cmyk": 1, "alpha": 1}
