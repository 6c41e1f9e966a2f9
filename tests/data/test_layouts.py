"""What differs from the layout of a published feature folder is refused in a line, however it was crafted."""

import pickle
import struct
import tracemalloc
import zipfile

import numpy as np
import pytest
from safetensors.numpy import save_file

from diffjax.data.features import convert
from diffjax.errors import UserError
from tests.data.released_features import (
    MAKERS,
    SD,
    STD,
    C,
    H,
    W,
    edm2,
    named,
    npy,
    other_zip,
    pair,
    unit,
    write_members,
    write_statistics,
)
from tests.weights.torch_writer import write_zip


class Hostile:
    def __reduce__(self):
        return eval, ("1 / 0",)


def file_of(folder, name, change):
    path = folder / name
    path.write_bytes(change(path.read_bytes()))


def replaced(name, data):
    return lambda root: (root / name).write_bytes(data(root) if callable(data) else data)


def scaled(pattern, factor):
    def change(root):
        for path in root.glob(pattern):
            np.save(path, np.load(path) * np.float32(factor))

    return change


def header(shape, descr="'<f4'"):
    """An npy file of a header alone."""
    text = f"{{'descr': {descr}, 'fortran_order': False, 'shape': {shape}}}\n"
    return b"\x93NUMPY\x01\x00" + struct.pack("<H", len(text)) + text.encode()


FAST, LABEL = "imagenet256_features/3.npy", "imagenet256_labels/3.npy"
WRONG_FILES = {
    "missing-folder": ("fast-dit", lambda root: (root / "imagenet256_labels").rename(root / "gone"), "0 folders"),
    "missing-file": ("fast-dit", lambda root: (root / FAST).unlink(), "holds 11 files, and not number 3"),
    "unpaired": ("fast-dit", lambda root: (root / "imagenet256_labels/11.npy").unlink(), "12 features .* 11 labels"),
    "name": ("fast-dit", lambda root: (root / FAST).rename(root / "imagenet256_features/x.npy"), "not a name of this"),
    "twins": ("fast-dit", replaced("imagenet256_features/03.npy", b""), "are both number 3"),
    "shape": ("fast-dit", replaced(FAST, npy(unit(2, C, H, W))), r"valid: <f4 of shape \(1, any, any, any\)"),
    "other-shape": ("fast-dit", replaced(FAST, npy(unit(1, C, H, H))), "the same for all"),
    "dtype": ("fast-dit", replaced(FAST, npy(unit(1, C, H, W).astype(float))), "3.npy: float64 of shape"),
    "label-dtype": ("fast-dit", replaced(LABEL, npy(np.array([1.0]))), "valid: <i8"),
    "label-range": ("fast-dit", replaced(LABEL, npy(np.array([5]))), "label 5 is outside the 5 classes"),
    "label-negative": ("fast-dit", replaced(LABEL, npy(np.array([-1]))), "label -1 is outside"),
    "truncated": (
        "fast-dit",
        lambda root: file_of(root, FAST, lambda b: b[:-4]),
        "380 bytes where float32 .* takes 384",
    ),
    "no-npy": ("fast-dit", replaced(FAST, b"junk"), "damaged or no npy file"),
    "absurd-header": ("fast-dit", replaced(FAST, header((1, 10**9, 10**9, 10**9))), "0 bytes where float32"),
    "negative": ("fast-dit", replaced(FAST, header((1, -C, -H, W)) + bytes(4 * C * H * W)), "valid: sizes from 0 on"),
    "pickle": ("fast-dit", replaced(FAST, npy(np.array([{}], object), allow_pickle=True)), "object of shape"),
    "not-finite": ("fast-dit", replaced(FAST, npy(np.full((1, C, H, W), np.nan, "f4"))), "standard deviation nan"),
    "large": ("fast-dit", replaced(FAST, bytes(2**24 + 1)), r"has 16777217 bytes; valid: up to"),
    "never-scaled": ("fast-dit", scaled("*features/*", 1 / SD), r"standard deviation 5\.\d+ where 1.0 is expected"),
    "twice-scaled": ("udit", scaled("*features/*", SD), r"deviation 0\.1\d+ where .*; scale applied twice or never"),
    "udit-name": ("udit", replaced("imagenet_features/a.npy", b""), "not a name of this layout"),
    "udit-gap": ("udit", lambda root: (root / "imagenet_features/1_rank3.npy").unlink(), "and not number 11"),
}


@pytest.mark.parametrize("case", WRONG_FILES)
def test_folders_that_differ_from_their_layout(tmp_path, case):
    refused(tmp_path, *WRONG_FILES[case])


def refused(tmp_path, layout, change, message):
    MAKERS[layout](tmp_path / "in")
    change(tmp_path / "in")
    with pytest.raises(UserError, match=message):
        convert(layout, tmp_path / "in", tmp_path / "out", num_classes=5)
    assert not (tmp_path / "out/latents.json").exists()


def pickled(value):
    """An npy file with the header of a pair, and any pickle behind it."""
    return header((2,), "'|O'") + pickle.dumps(value, protocol=3)


GOOD = np.zeros((2 * C, H, W), np.float32)
LYING = pickled(np.empty(2, object)).replace(b"K\x02\x85", b"J\xff\xff\xff\x7f\x85", 1)
WRONG_PAIRS = {
    "hostile": (pickled(Hostile()), "refused to load builtins.eval"),
    "hostile-inside": (pair(GOOD, Hostile()), "refused to load builtins.eval"),
    "other-module": (pickled(np.random.default_rng), "refused to load numpy.random"),
    "no-pair": (npy(GOOD), "valid: a pickled pair"),
    "three": (pickled([GOOD, 1, 2]), "other objects"),
    "words": (pair(GOOD, "cat"), "other objects"),
    "exchanged": (pair(1, GOOD), "damaged|other objects"),
    "lying": (LYING, "damaged"),
    "truncated": (pair(GOOD, 1)[:-100], "damaged"),
    "dtype": (pair(GOOD.astype(np.float64), 1), "an array of float64"),
    "integers": (pair(GOOD.astype(np.int32), 1), "int32 of shape"),
    "odd": (pair(GOOD[1:], 1), r"valid: float32 of shape \(2 c, h, w\)"),
    "range": (pair(GOOD, 5), "has label 5, and 7.npy, which should be its mirror, has 2"),
}


@pytest.mark.parametrize("case", WRONG_PAIRS)
def test_pairs_of_u_vit_that_are_none(tmp_path, case):
    data, message = WRONG_PAIRS[case]
    refused(tmp_path, "u-vit", replaced("2.npy", data), message)


def test_u_vit_with_a_file_too_many(tmp_path):
    refused(tmp_path, "u-vit", replaced("10.npy", b""), "holds 11 files; valid: an even number")


def claimed(size, number=4):
    """The directory of the zip says that a member has so many bytes."""

    def change(root):
        data = bytearray(root.read_bytes())
        place = data.rindex(b"PK\x01\x02", 0, data.rindex(f"img-mean-std-{number:08d}".encode()))
        data[place + 24 : place + 28] = struct.pack("<I", size)
        root.write_bytes(data)

    return change


def compressed(method):
    return lambda root: write_members(root, {"dataset.json": b'{"labels": null}'}, compression=method)


def bomb(root):
    write_members(root, {"dataset.json": b'{"labels": null}'})
    with zipfile.ZipFile(root, "a", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("00000/img-mean-std-00000000.npy", bytes(2**26))


WRONG_ZIPS = {
    "missing": (named(4, None), "not 00000/img-mean-std-00000004.npy"),
    "no-table": (other_zip(dataset_json=None), "lacks dataset.json"),
    "table": (other_zip(dataset_json=b"{"), "dataset.json holds no labels"),
    "list": (other_zip(dataset_json=b"[]"), "dataset.json holds no labels"),
    "unlabelled": (other_zip(dataset_json=b'{"labels": null}'), "has no labels; valid: num_classes = 0"),
    "few": (other_zip(dataset_json=b'{"labels": [["00000/img-mean-std-00000000.npy", 1]]}'), "has no label of .*1.npy"),
    "vectors": (other_zip(dataset_json=b'{"labels": [["00000/img-mean-std-00000000.npy", [0, 1]]]}'), "whole numbers"),
    "log-variance": (named(2, npy(np.concatenate([STD, -STD]))), "standard deviations, from 0 on"),
    "odd": (named(2, npy(np.ones((7, H, W), np.float32))), "as many channels"),
    "dtype": (named(2, npy(np.ones((8, H, W)))), "float64 of shape"),
    "cut": (lambda root: root.write_bytes(root.read_bytes()[:-40]), "damaged or no zip"),
    "junk": (lambda root: root.write_bytes(b"junk"), "damaged or no zip"),
    "damaged": (lambda root: root.write_bytes(root.read_bytes().replace(b"\x93NUMPY", b"\x93NUMPI", 1)), "is damaged"),
    "claims-more": (claimed(1000), r"4.npy is damaged \(896 bytes where the zip says 1000\)"),
    "claims-less": (claimed(800), "4.npy is damaged"),
    "bzip2": (compressed(zipfile.ZIP_BZIP2), "is compressed by method 12; valid: stored or deflated"),
    "absurd": (claimed(2**32 - 2**28), "has 4026531840 bytes; valid: up to 16777216"),
    "gone": (lambda root: root.unlink(), "no such file or folder"),
}


@pytest.mark.parametrize("case", WRONG_ZIPS)
def test_zips_of_edm2_that_are_none(tmp_path, case):
    refused(tmp_path, "edm2", *WRONG_ZIPS[case])


def test_a_bomb_is_not_unpacked(tmp_path):
    bomb(tmp_path / "in")
    with pytest.raises(UserError, match="has 67108864 bytes; valid: up to 16777216"):
        convert("edm2", tmp_path / "in", tmp_path / "out", num_classes=0)


def test_a_bomb_that_lies_about_its_size_is_not_unpacked(tmp_path):
    bomb(tmp_path / "in")
    claimed(896, number=0)(tmp_path / "in")
    tracemalloc.start()
    try:
        with pytest.raises(UserError, match="00000000.npy is damaged"):
            convert("edm2", tmp_path / "in", tmp_path / "out", num_classes=0)
        assert tracemalloc.get_traced_memory()[1] < 2**24
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize(
    "factor, offset, message",
    [(SD, 0.0, r"deviation 0\.\d+ where 0.5"), (1.0, -5.8, "an autoencoder of pixels in \\[0.0, 1.0\\]")],
)
def test_other_numbers_than_those_of_edm2(tmp_path, factor, offset, message):
    """Scaled before, and of pixels in another range."""
    mean = edm2(tmp_path / "a") * factor + np.reshape([offset, 0, 0, 0], (C, 1, 1))
    files = {
        f"00000/img-mean-std-{i:08d}.npy": npy(np.concatenate([each, STD * 0.1]).astype(np.float32))
        for i, each in enumerate(mean)
    }
    write_members(tmp_path / "in", files | {"dataset.json": b'{"labels": null}'})
    with pytest.raises(UserError, match=message):
        convert("edm2", tmp_path / "in", tmp_path / "out", num_classes=0)


def other_shard(**changes):
    def change(root):
        shard = {
            "latents": unit(3, C, H, W),
            "latents_flip": unit(3, C, H, W),
            "labels": np.zeros(3, np.int64),
            **changes,
        }
        save_file(
            {name: each for name, each in shard.items() if each is not None},
            root / "latents_rank00_shard001.safetensors",
        )

    return change


def other_statistics(**changes):
    return lambda root: write_statistics(root, **({name: np.ones((1, C, 1, 1)) for name in ("mean", "std")} | changes))


WRONG_SHARDS = {
    "none": (lambda root: [path.unlink() for path in root.glob("*.safetensors")], "holds no latents_rank00_shard000"),
    "lacks": (other_shard(latents_flip=None), "lacks latents_flip"),
    "dtype": (other_shard(latents=unit(3, C, H, W).astype(np.float16)), "valid: F32"),
    "count": (other_shard(labels=np.zeros(2, np.int64)), r"valid: F32 \[n, c, h, w\] twice and I64 \[n\]"),
    "shape": (other_shard(latents=unit(3, C, H, H), latents_flip=unit(3, C, H, H)), r"and before \[4, 4, 6\]"),
    "label": (other_shard(labels=np.full(3, 5)), "label 5 is outside"),
    "cut": (lambda root: file_of(root, "latents_rank01_shard000.safetensors", lambda b: b[:-4]), "damaged or no saf"),
    "no-statistics": (lambda root: (root / "latents_stats.pt").unlink(), "latents_stats.pt: no such file"),
    "statistics-shape": (other_statistics(std=np.ones((1, 3, 1, 1), np.float32)), r"valid: \(1, 4, 1, 1\)"),
    "statistics-lists": (
        lambda root: write_zip(root / "latents_stats.pt", {"mean": [[1], [1, 2]]}),
        "'list', 'NoneType'",
    ),
    "statistics-zero": (other_statistics(std=np.zeros((1, C, 1, 1), np.float32)), "std above 0"),
    "statistics-others": (other_statistics(std=np.full((1, C, 1, 1), 99, np.float32)), "twice or never"),
}


@pytest.mark.parametrize("case", WRONG_SHARDS)
def test_shards_of_lightningdit_that_are_none(tmp_path, case):
    refused(tmp_path, "va-vae", *WRONG_SHARDS[case])
