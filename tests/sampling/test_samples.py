"""Sample files: layout, rounding, the three files together, and every way in which they can be wrong."""

import json

import numpy as np
import pytest
from PIL import Image

from diffjax.errors import UserError
from diffjax.evaluation.pixels import to_rgb
from diffjax.sampling.samples import (
    TITLE,
    Classes,
    NotFiniteError,
    check_finite,
    grid,
    read_samples,
    to_uint8,
    write_samples,
)

rng = np.random.default_rng(0)
IMAGES = rng.integers(0, 256, (12, 8, 8, 3), np.uint8)
LABELS = np.arange(12) % 5


def test_rounding():
    x = np.array([-2, -1, -1 + 0.9 / 255, -1 + 1.1 / 255, 0, 1 - 1.1 / 255, 1 - 0.9 / 255, 1, 3])
    np.testing.assert_array_equal(to_uint8(x), [0, 0, 0, 1, 128, 254, 255, 255, 255])
    levels = np.arange(256, dtype=np.uint8)
    np.testing.assert_array_equal(to_uint8(levels.astype(np.float32) / np.float32(127.5) - 1), levels)
    with pytest.raises(FloatingPointError, match="1 of 2"):
        to_uint8(np.array([0.0, np.nan]))


def test_three_files(tmp_path):
    path = tmp_path / "new" / "s.npz"
    write_samples(path, IMAGES, LABELS, {"seed": 3, "sampling": {"steps": 5}})
    assert sorted(file.name for file in path.parent.iterdir()) == ["s.json", "s.npz", "s.png"]
    with np.load(path) as arrays:
        assert sorted(arrays) == ["arr_0", "arr_1"]
        assert arrays["arr_0"].dtype == np.uint8
        assert arrays["arr_1"].dtype == np.int32
    images, labels, protocol = read_samples(path)
    np.testing.assert_array_equal(images, IMAGES)
    np.testing.assert_array_equal(labels, LABELS)
    assert protocol == {"seed": 3, "sampling": {"steps": 5}}
    assert json.loads(path.with_suffix(".json").read_text())["seed"] == 3
    np.testing.assert_array_equal(np.asarray(Image.open(path.with_suffix(".png"))), grid(IMAGES))


def test_equal_samples_give_equal_files(tmp_path):
    for name in ("a", "b"):
        write_samples(tmp_path / f"{name}.npz", IMAGES, LABELS, {})
    assert (tmp_path / "a.npz").read_bytes() == (tmp_path / "b.npz").read_bytes()


def test_grey_is_repeated(tmp_path):
    write_samples(tmp_path / "s.npz", IMAGES[..., :1], LABELS, {})
    np.testing.assert_array_equal(read_samples(tmp_path / "s.npz")[0], np.repeat(IMAGES[..., :1], 3, axis=-1))
    with pytest.raises(UserError, match="expected"):
        to_rgb(np.zeros((2, 8, 8, 4)))


def test_grid():
    """12 images of 8 pixels: 3 rows of 4, each enlarged 8 times inside a white frame."""
    picture = grid(IMAGES)
    assert picture.shape == (3 * 66, 4 * 66, 3)
    np.testing.assert_array_equal(picture[66 + 1 : 66 + 65 : 8, 2 * 66 + 1 : 2 * 66 + 65 : 8], IMAGES[6])
    assert (picture[0] == 255).all()
    assert grid(np.zeros((500, 64, 64, 1), np.uint8)).shape == (660, 660, 3)
    assert grid(np.zeros((1, 300, 300, 3), np.uint8)).shape == (302, 302, 3)
    assert (grid(IMAGES[:3])[66:, 66:] == 255).all()


def test_a_grid_has_one_class_per_column_under_its_name():
    """12 images of 5 classes, interleaved: 5 columns of 3 and 2 below their names, whatever their order."""
    names = ("a", "b", "c", "d", "a long name that does not fit")
    picture = grid(IMAGES, Classes(LABELS, names))
    assert picture.shape == (TITLE + 3 * 66, 5 * 66, 3)
    cells = picture[TITLE + 1 :: 66][:, 1::66]
    np.testing.assert_array_equal(cells[:2], IMAGES[:10, 0, 0].reshape(2, 5, 3))
    np.testing.assert_array_equal(cells[2, :2], IMAGES[10:, 0, 0])
    assert (picture[TITLE + 2 * 66 :, 2 * 66 :] == 255).all()
    for column in range(5):
        assert (picture[:TITLE, column * 66 : (column + 1) * 66] < 255).any()
    order = np.argsort(LABELS, kind="stable")
    np.testing.assert_array_equal(grid(IMAGES[order], Classes(LABELS[order], names)), picture)
    assert (grid(IMAGES, Classes(LABELS)) != picture).any()  # numbers for names
    two = grid(np.repeat(IMAGES, 9, axis=0), Classes(np.arange(108) % 2 + 3))
    assert two.shape == (TITLE + 10 * 66, 2 * 66, 3)


@pytest.mark.parametrize("labels", [np.zeros(12, int), np.arange(12) * 7])
def test_one_class_or_many_make_a_square(labels):
    many = np.concatenate([labels, np.arange(12)]) if labels.any() else labels
    images = np.resize(IMAGES, (len(many), 8, 8, 3))
    np.testing.assert_array_equal(grid(images, Classes(many)), grid(images))


def test_values_that_are_not_finite_name_their_sample():
    values = np.zeros((3, 2, 2), np.float32)
    values[1, 0], values[2, 1, 1] = np.inf, np.nan
    with pytest.raises(NotFiniteError, match="sample 11 and 1 more: 3 of 12 sampled values are not finite"):
        check_finite(values, np.array([10, 11, 12]))
    check_finite(np.arange(3), np.arange(3))


def test_files_without_labels_are_read(tmp_path):
    np.savez(tmp_path / "s.npz", arr_0=IMAGES)
    assert read_samples(tmp_path / "s.npz")[1:] == (None, {})
    write_samples(tmp_path / "t.npz", IMAGES, LABELS, {"labels": "none"})
    assert read_samples(tmp_path / "t.npz")[1] is None


def test_labels_beside_external_files_need_no_json(tmp_path):
    np.savez(tmp_path / "s.npz", arr_0=IMAGES, arr_1=LABELS.astype(np.int64))
    _, labels, protocol = read_samples(tmp_path / "s.npz")
    assert labels.dtype == np.int32
    assert protocol == {}


WRONG = {
    "float images": {"arr_0": IMAGES / 255, "arr_1": LABELS},
    "channels first": {"arr_0": IMAGES.transpose(0, 3, 1, 2), "arr_1": LABELS},
    "one image": {"arr_0": IMAGES[0], "arr_1": LABELS},
    "none": {"arr_0": IMAGES[:0], "arr_1": LABELS[:0]},
    "too few labels": {"arr_0": IMAGES, "arr_1": LABELS[:-1]},
    "float labels": {"arr_0": IMAGES, "arr_1": LABELS.astype(float)},
    "other names": {"images": IMAGES, "labels": LABELS},
    "objects": {"arr_0": IMAGES, "arr_1": np.array([{}] * 12)},
}


@pytest.mark.parametrize("arrays", WRONG.values(), ids=WRONG)
def test_other_layouts(tmp_path, arrays):
    np.savez(tmp_path / "s.npz", **arrays)
    with pytest.raises(UserError, match=r"s\.npz: .*(expected|arr_0 and arr_1)"):
        read_samples(tmp_path / "s.npz")


def test_damaged_files(tmp_path):
    path = tmp_path / "s.npz"
    with pytest.raises(UserError, match="no such samples file"):
        read_samples(path)
    write_samples(path, IMAGES, LABELS, {})
    whole = path.read_bytes()
    damaged = [whole[:size] for size in range(0, len(whole), 97)] + [
        b"text" * 10,
        whole.replace(IMAGES[3].tobytes(), bytes(192)),
    ]
    for data in damaged:
        path.write_bytes(data)
        with pytest.raises(UserError, match=r"s\.npz") as error:
            read_samples(path)
        assert "\n" not in str(error.value)
    np.save(tmp_path / "array.npy", IMAGES)
    with pytest.raises(UserError, match="not a samples file"):
        read_samples(tmp_path / "array.npy")


def test_the_json_of_another_file(tmp_path):
    for name, images in (("a", IMAGES), ("b", IMAGES[::-1])):
        write_samples(tmp_path / f"{name}.npz", images, LABELS, {"seed": 0})
    (tmp_path / "a.json").replace(tmp_path / "b.json")
    with pytest.raises(UserError, match=r"b\.json does not describe b\.npz"):
        read_samples(tmp_path / "b.npz")
    (tmp_path / "b.json").write_text("{")
    with pytest.raises(UserError, match=r"b\.json: not json"):
        read_samples(tmp_path / "b.npz")


@pytest.mark.parametrize(
    "name, images", [("s.npy", IMAGES), ("s", IMAGES), ("s.npz", IMAGES / 255), ("s.npz", IMAGES[:5])]
)
def test_nothing_wrong_is_written(tmp_path, name, images):
    with pytest.raises(UserError):
        write_samples(tmp_path / name, images, LABELS, {})
    assert not list(tmp_path.iterdir())
