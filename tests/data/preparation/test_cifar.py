"""CIFAR from both versions of its archives: the same records; pickles that ask for more than arrays are refused."""

import pickle
from pathlib import Path

import numpy as np
import pytest

from tests.data.preparation.originals import prepare, publish, refusal, stored, tar_of, write_tree

RNG = np.random.default_rng(0)
PLANES = RNG.integers(0, 256, (12, 3072), np.uint8)
FINE = [3, 1, 0, 2, 9, 9, 4, 5, 6, 7, 8, 2]
CLASSES = [f"class{i}" for i in range(10)]


def text_pickle(data: np.ndarray, **values: object) -> bytes:
    """As Python 2 wrote them: protocol 2, keys and texts as bytes."""
    return pickle.dumps({b"data": data, **{key.encode(): value for key, value in values.items()}}, protocol=2)


def binary10() -> dict[str, bytes]:
    rows = [bytes([label]) + planes.tobytes() for label, planes in zip(FINE, PLANES)]
    files = {f"data_batch_{i + 1}.bin": b"".join(rows[2 * i : 2 * i + 2]) for i in range(5)}
    files |= {"test_batch.bin": b"".join(rows[10:]), "batches.meta.txt": "\n".join([*CLASSES, ""]).encode()}
    return {f"cifar-10-batches-bin/{name}": data for name, data in files.items()}


def python10() -> dict[str, bytes]:
    parts = {f"data_batch_{i + 1}": slice(2 * i, 2 * i + 2) for i in range(5)} | {"test_batch": slice(10, 12)}
    files = {name: text_pickle(PLANES[part], labels=FINE[part]) for name, part in parts.items()}
    files["batches.meta"] = pickle.dumps({b"label_names": [name.encode() for name in CLASSES]}, protocol=2)
    return {f"cifar-10-batches-py/{name}": data for name, data in files.items()}


def binary100() -> dict[str, bytes]:
    rows = [bytes([19 - label, label]) + planes.tobytes() for label, planes in zip(FINE, PLANES)]
    files = {"train.bin": b"".join(rows[:10]), "test.bin": b"".join(rows[10:])}
    files["fine_label_names.txt"] = "\n".join([*CLASSES, ""]).encode()
    return {f"cifar-100-binary/{name}": data for name, data in files.items()}


def python100() -> dict[str, bytes]:
    """Written by Python 3, with an array in Fortran order."""
    parts = {"train": slice(0, 10), "test": slice(10, 12)}
    files = {
        name: pickle.dumps({"data": np.asfortranarray(PLANES[part]), "fine_labels": FINE[part]}, protocol=2)
        for name, part in parts.items()
    }
    files["meta"] = pickle.dumps({"fine_label_names": CLASSES}, protocol=2)
    return {f"cifar-100-python/{name}": data for name, data in files.items()}


ARCHIVES = {
    "cifar-10-binary.tar.gz": binary10,
    "cifar-10-python.tar.gz": python10,
    "cifar-100-binary.tar.gz": binary100,
    "cifar-100-python.tar.gz": python100,
}


def name_of(archive: str) -> str:
    return "cifar10" if archive.startswith("cifar-10-") else "cifar100"


def place(root: Path, archive: str, files: dict[str, bytes]) -> Path:
    return write_tree(root, {archive: tar_of(files, "w:gz")})


@pytest.mark.parametrize("archive", ARCHIVES)
@pytest.mark.parametrize("split, part", [("train", slice(0, 10)), ("test", slice(10, 12))])
def test_images_labels_and_names(tmp_path, monkeypatch, archive, split, part):
    name = name_of(archive)
    publish(monkeypatch, name, counts={"train": 10, "test": 2}, classes=0)
    origin = place(tmp_path / "in", archive, ARCHIVES[archive]())
    images, labels, manifest = stored(prepare(name, origin / archive, tmp_path / "out", f"--split={split}"))
    np.testing.assert_array_equal(images.transpose(0, 3, 1, 2).reshape(-1, 3072), PLANES[part])
    assert labels == FINE[part]
    assert manifest["classes"] == CLASSES
    assert manifest["source"]["not_as_published"] == [archive]
    assert manifest["split"] == split


def test_a_folder_of_either_version(tmp_path):
    for archive in list(ARCHIVES)[:2]:
        origin = place(tmp_path / archive, archive, ARCHIVES[archive]())
        prepare("cifar10", origin, tmp_path / f"{archive}-out", "--partial")
    first, second = (stored(tmp_path / f"{archive}-out")[2] for archive in list(ARCHIVES)[:2])
    assert first["records_sha256"] == second["records_sha256"]


class Call:
    """Pickled as a call of a function."""

    def __reduce__(self) -> tuple:
        return print, ("called",)


def without(files: dict[str, bytes], name: str) -> dict[str, bytes]:
    return {key: data for key, data in files.items() if not key.endswith(name)}


EVIL = python10() | {"cifar-10-batches-py/data_batch_3": pickle.dumps({b"data": Call()}, protocol=2)}
BAD = {
    "a call": ("cifar-10-python.tar.gz", EVIL, "refused to load __builtin__.print: only arrays and plain values"),
    "no pickle": (
        "cifar-10-python.tar.gz",
        python10() | {"cifar-10-batches-py/data_batch_3": b"nothing"},
        "a damaged pickle",
    ),
    "a pickle of other things": (
        "cifar-10-python.tar.gz",
        python10() | {"cifar-10-batches-py/data_batch_3": text_pickle(PLANES[:3], labels=[1])},
        "a batch without data [n, 3072] and labels [n]",
    ),
    "labels that are no list": (
        "cifar-10-python.tar.gz",
        python10() | {"cifar-10-batches-py/data_batch_3": text_pickle(PLANES[:1], labels=3)},
        "a batch without data [n, 3072] and labels [n]",
    ),
    "a label that is none": (
        "cifar-10-python.tar.gz",
        python10() | {"cifar-10-batches-py/data_batch_3": text_pickle(PLANES[:1], labels=[None])},
        "a batch without data [n, 3072] and labels [n]",
    ),
    "a label that is huge": (
        "cifar-10-python.tar.gz",
        python10() | {"cifar-10-batches-py/data_batch_3": text_pickle(PLANES[:1], labels=[2**70])},
        "a batch without data [n, 3072] and labels [n]",
    ),
    "names that are none": (
        "cifar-10-python.tar.gz",
        python10() | {"cifar-10-batches-py/batches.meta": pickle.dumps({b"label_names": None}, protocol=2)},
        "batches.meta without a list label_names",
    ),
    "a missing batch": (
        "cifar-10-binary.tar.gz",
        without(binary10(), "batch_4.bin"),
        "lacks cifar-10-batches-bin/data_b",
    ),
    "half a record": (
        "cifar-10-binary.tar.gz",
        binary10() | {"cifar-10-batches-bin/data_batch_2.bin": bytes(3072)},
        "3072 bytes are no whole number of records of 3073",
    ),
    "a label without a name": (
        "cifar-10-binary.tar.gz",
        binary10() | {"cifar-10-batches-bin/batches.meta.txt": b"cat\ndog\n"},
        "labels from 0 to 9, and 2 names of classes",
    ),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_archives_are_one_line(tmp_path, capsys, name):
    archive, files, words = BAD[name]
    origin = place(tmp_path / "in", archive, files)
    line = refusal(capsys, "cifar10", origin, tmp_path / "out", "--partial")
    assert words in line
    assert archive in line


def test_cut_and_missing_archives(tmp_path, capsys):
    origin = place(tmp_path / "in", "cifar-10-binary.tar.gz", binary10())
    path = origin / "cifar-10-binary.tar.gz"
    path.write_bytes(path.read_bytes()[:-5000])
    assert f"{path} cannot be read: " in refusal(capsys, "cifar10", origin, tmp_path / "out", "--partial")
    line = refusal(capsys, "cifar100", origin, tmp_path / "out", "--partial")
    assert "does not hold an archive of CIFAR: cifar-100-binary.tar.gz or cifar-100-python.tar.gz" in line
    line = refusal(capsys, "cifar100", path, tmp_path / "out", "--partial")
    assert "valid: a folder of cifar-100-binary.tar.gz or cifar-100-python.tar.gz, or that file" in line


def test_an_archive_beside_a_folder_is_not_taken(tmp_path, capsys):
    place(tmp_path, "cifar-10-binary.tar.gz", binary10())
    (tmp_path / "in").mkdir()
    line = refusal(capsys, "cifar10", tmp_path / "in", tmp_path / "out", "--partial")
    assert f"{tmp_path / 'in'} does not hold an archive of CIFAR" in line
