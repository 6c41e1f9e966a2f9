"""Feature folders that others published, in files as their programs write them, become latents of the right scale."""

import io
import json
import os
import pickle
import struct
import tracemalloc
import zipfile

import numpy as np
import pytest
from safetensors.numpy import save_file

from diffjax.__main__ import main
from diffjax.data import features, latents, layouts, records, sources
from diffjax.data.features import EDM2_MEAN, EDM2_STD, convert
from diffjax.data.latents import read_manifest
from diffjax.errors import UserError
from tests.data import configs
from tests.data.seen import Batches
from tests.weights.torch_writer import tensor, write_zip

SD = 0.18215
H, W, C = 4, 6, 4  # unequal, so that exchanged axes are seen


def unit(count, *shape, seed=0):
    """Normal numbers, float32 [count, *shape]."""
    return np.random.default_rng(seed).normal(size=(count, *shape)).astype(np.float32)


def saved(path, array):
    path.parent.mkdir(parents=True, exist_ok=True)
    np.save(path, array)


def npy(array, **options):
    file = io.BytesIO()
    np.save(file, array, **options)
    return file.getvalue()


def frozen(root, count=12):
    """As fast-DiT writes it; the scale is applied. Twelve, so that names sorted as strings would misplace 10 and 11."""
    samples = unit(count, 1, C, H, W)
    for i, sample in enumerate(samples):
        saved(root / f"imagenet256_features/{i}.npy", sample)
        saved(root / f"imagenet256_labels/{i}.npy", np.array([i % 5]))
    return samples[:, 0]


def udit(root, count=24):
    samples = unit(count, 1, C, H, W)
    for i, sample in enumerate(samples):
        for part, array in (("features", sample), ("labels", np.array([i % 5]))):
            saved(root / f"imagenet_{part}/{i // 8}_rank{i % 8}.npy", array)
    return samples[:, 0]


def pair(moments, label):
    """An npy file of an object array, as numpy before 1.24 made one of a tuple."""
    array = np.empty(2, object)
    array[:] = moments, label
    return npy(array, allow_pickle=True)


def u_vit(root, count=5, label=np.int64):
    """Batches of `layouts.BATCH` images and then their mirrors; z of deviation 1 / 0.18215, log-variance not cut."""
    mean = unit(count, 2, C, H, W) / SD  # both views
    log_variance = np.full((count, 2, C, H, W), -4.0, np.float32)
    log_variance[:, :, 0], log_variance[:, :, 1] = -50.0, -2.0
    root.mkdir()
    number = 0
    for first in range(0, count, layouts.BATCH):
        for view in (0, 1):
            for i in range(first, min(first + layouts.BATCH, count)):
                moments = np.concatenate([mean[i, view], log_variance[i, view]])
                (root / f"{number}.npy").write_bytes(pair(moments, label(i % 5)))
                number += 1
    return mean


def edm2(root, count=12, zipped=True):
    mean = unit(count, C, H, W) * np.reshape(EDM2_STD, (C, 1, 1)) + np.reshape(EDM2_MEAN, (C, 1, 1))
    std = np.full_like(mean, 0.25)
    names = [f"00000/img-mean-std-{i:08d}.npy" for i in range(count)]
    files = {name: npy(np.concatenate(each).astype(np.float32)) for name, *each in zip(names, mean, std)}
    files["dataset.json"] = json.dumps({"labels": [[name, i % 5] for i, name in enumerate(names)][::-1]}).encode()
    write_members(root, files, zipped)
    return mean


def write_members(root, files, zipped=True, **options):
    if not zipped:
        for name, data in files.items():
            (root / name).parent.mkdir(parents=True, exist_ok=True)
            (root / name).write_bytes(data)
        return
    with zipfile.ZipFile(root, "w", **options) as archive:
        for name, data in files.items():
            archive.writestr(name, data)


STATISTICS = np.array([1.0, -2.0, 0.5, 3.0]), np.array([2.0, 4.0, 0.5, 1.0])


def va_vae(root, count=11):
    """Two shards and a third of another process; the numbers have the mean and deviation of STATISTICS."""
    mean, std = (each.reshape(C, 1, 1) for each in STATISTICS)
    both = (unit(count, 2, C, H, W) * std + mean).astype(np.float32)
    root.mkdir()
    for name, rows in (("00_shard000", slice(0, 4)), ("00_shard001", slice(4, 7)), ("01_shard000", slice(7, count))):
        shard = {"latents": both[rows, 0], "latents_flip": both[rows, 1], "labels": np.arange(count)[rows] % 5}
        save_file({k: np.ascontiguousarray(v) for k, v in shard.items()}, root / f"latents_rank{name}.safetensors")
    write_statistics(root, **{k: each.reshape(1, C, 1, 1) for k, each in zip(("mean", "std"), STATISTICS)})
    return both


def write_statistics(root, **arrays):
    stats = {name: tensor(array.astype(np.float32), name) for name, array in arrays.items()}
    write_zip(root / "latents_stats.pt", stats)


def last(array):
    """[..., c, h, w] -> [..., h, w, c], as float16 keeps it."""
    return np.moveaxis(array, -3, -1).astype(np.float16)


def opened(out, **leaves):
    manifest = read_manifest(out)
    spread = {leaf: manifest[leaf] for leaf in ("scale", "shift", "input_range")}
    spread = {leaf: tuple(value) if isinstance(value, list) else value for leaf, value in spread.items()}
    common = {"size": H, "channels": C, "num_classes": 5, "dir": str(out), "split": "", "flip": False}
    return sources.load(**configs.section("latents", **(common | spread | leaves)))


def moments_of(out):
    """Moments [n, views, 2, h, w, c] and labels as stored, and the manifest."""
    source = opened(out)
    examples = [source.examples[i] for i in range(len(source.examples))]
    return np.stack([e["image"] for e in examples]), [e["label"] for e in examples], read_manifest(out)


def drawn(out, **leaves):
    """What training sees of all examples, once each, and their labels."""
    source = opened(out, **leaves)
    batches = Batches(source, batch_size=len(source.examples), seed=0, flip=leaves.get("flip", False))
    batch = next(batches)
    batches.close()
    return batch.x


@pytest.mark.parametrize("layout, make, count", [("fast-dit", frozen, 12), ("udit", udit, 24)])
def test_frozen_samples_are_not_scaled_again(tmp_path, layout, make, count):
    samples = make(tmp_path / "in", count)
    convert(layout, tmp_path / "in", tmp_path / "out", num_classes=5)
    moments, labels, manifest = moments_of(tmp_path / "out")
    np.testing.assert_array_equal(moments[:, 0, 0], last(samples))
    assert not moments[:, 0, 1].any()
    assert labels == [i % 5 for i in range(count)]
    assert (manifest["scale"], manifest["scale_applied"], manifest["input_range"]) == (SD, True, [-1.0, 1.0])
    np.testing.assert_allclose(manifest["std"], last(samples).astype(float).std((0, 1, 2)), rtol=1e-3)
    assert sorted(drawn(tmp_path / "out")[:, 0, 0, 0]) == sorted(last(samples)[:, 0, 0, 0].astype(np.float32))


@pytest.mark.parametrize("padded, kept", [(24, 23), (32, 24)])
def test_the_padding_of_udit_is_dropped_at_its_count_alone(tmp_path, monkeypatch, padded, kept):
    monkeypatch.setattr(layouts, "PADDED", padded)
    samples = udit(tmp_path / "in")
    assert convert("udit", tmp_path / "in", tmp_path / "out", num_classes=5)["count"] == kept
    np.testing.assert_array_equal(moments_of(tmp_path / "out")[0][-1, 0, 0], last(samples)[kept - 1])


@pytest.mark.parametrize("count", [1, 3, 4, 8, 11])
@pytest.mark.parametrize("label", [int, np.int64])
def test_both_mirrors_of_u_vit_are_views_of_an_image(tmp_path, monkeypatch, count, label):
    monkeypatch.setattr(layouts, "BATCH", 4)
    mean = u_vit(tmp_path / "in", count, label)
    convert("u-vit", tmp_path / "in", tmp_path / "out", num_classes=5)
    moments, labels, manifest = moments_of(tmp_path / "out")
    np.testing.assert_array_equal(moments[:, :, 0], last(mean))
    # exp(-30 / 2), exp(-2 / 2), exp(-4 / 2)
    np.testing.assert_allclose(moments[0, 0, 1, 0, 0], [3.059e-7, 0.367879, 0.135335, 0.135335], rtol=1e-3, atol=6e-8)
    assert labels == [i % 5 for i in range(count)]
    assert (manifest["views"], manifest["scale"], manifest["scale_applied"]) == (2, SD, False)
    assert opened(tmp_path / "out", flip=True)


@pytest.mark.parametrize("zipped", [True, False])
def test_latents_of_edm2_have_half_the_deviation(tmp_path, zipped):
    mean = edm2(tmp_path / "in", zipped=zipped)
    convert("edm2", tmp_path / "in", tmp_path / "out", num_classes=5)
    moments, labels, manifest = moments_of(tmp_path / "out")
    np.testing.assert_array_equal(moments[:, 0, 0], last(mean))
    assert (moments[:, 0, 1] == 0.25).all()
    assert labels == [i % 5 for i in range(12)]
    assert manifest["input_range"] == [0.0, 1.0]
    np.testing.assert_allclose(manifest["scale"], [0.119904, 0.108225, 0.134771, 0.152439], rtol=1e-5)
    assert manifest["shift"] == [5.81, 3.25, 0.12, -2.15]
    np.testing.assert_allclose(manifest["std"], [0.5] * 4, rtol=0.1)
    x = drawn(tmp_path / "out")
    np.testing.assert_allclose([x.mean(), x.std()], [0, 0.5], atol=0.05)


def test_a_latent_of_edm2_by_hand(tmp_path, monkeypatch):
    """z = 9.98, 7.87, 3.83, 1.13: one deviation above the mean in every channel, 0.5 for the model."""
    monkeypatch.setattr(features, "check_spread", lambda *_: None)
    z = np.array([9.98, 7.87, 3.83, 1.13], np.float32).reshape(C, 1, 1) * np.ones((1, H, H), np.float32)
    files = {"00000/img-mean-std-00000000.npy": npy(np.concatenate([z, np.zeros_like(z)]))}
    write_members(tmp_path / "in", files | {"dataset.json": b'{"labels": null}'})
    convert("edm2", tmp_path / "in", tmp_path / "out", num_classes=0)
    np.testing.assert_allclose(drawn(tmp_path / "out", num_classes=0), np.full((1, H, H, C), 0.5), atol=1e-3)


def test_latents_of_lightningdit_are_normalised_by_the_statistics_beside_them(tmp_path):
    both = va_vae(tmp_path / "in")
    convert("va-vae", tmp_path / "in", tmp_path / "out", num_classes=5)
    moments, labels, manifest = moments_of(tmp_path / "out")
    np.testing.assert_array_equal(moments[:, :, 0], last(both))
    assert not moments[:, :, 1].any()
    assert labels == [i % 5 for i in range(11)]
    assert (manifest["scale"], manifest["shift"]) == ([0.5, 0.25, 2.0, 1.0], [1.0, -2.0, 0.5, 3.0])
    x = drawn(tmp_path / "out", flip=True)
    np.testing.assert_allclose(x.std((0, 1, 2)), [1] * C, rtol=0.15)
    np.testing.assert_allclose(x.mean((0, 1, 2)), [0] * C, atol=0.25)


def interrupted(monkeypatch, layout, source, out):
    """A conversion that ends in its second shard of 5."""
    encode, left = records.encode, iter(range(7))

    def stopped(*arguments):
        if next(left, None) is None:
            raise KeyboardInterrupt
        return encode(*arguments)

    with monkeypatch.context() as patch:
        patch.setattr(records, "encode", stopped)
        with pytest.raises(KeyboardInterrupt):
            convert(layout, source, out, num_classes=5)
    assert (out / "latents-00000.array_record").exists()
    assert not (out / "latents.json").exists()


@pytest.mark.parametrize("layout", ["fast-dit", "udit", "u-vit", "edm2", "va-vae"])
def test_an_interrupted_conversion_goes_on_with_no_other_files(tmp_path, monkeypatch, layout):
    """Of the same name and count elsewhere, and of others put in their place."""
    monkeypatch.setattr(latents, "SHARD_SIZE", 5)
    a, b, out = tmp_path / "a/in", tmp_path / "b/in", tmp_path / "out"
    for source in (a, b):
        source.parent.mkdir()
        MAKERS[layout](source, 11)
        for path in (source, *source.rglob("*")):
            os.utime(path, ns=(10**18, 10**18))
    changed(b)
    interrupted(monkeypatch, layout, a, out)
    with pytest.raises(UserError, match=r"out holds shards of another request \(fingerprint differ\)") as error:
        convert(layout, b, out, num_classes=5)
    assert "\n" not in str(error.value)
    moved = tmp_path / "moved/in"
    moved.parent.mkdir()
    a.rename(moved)
    manifest = convert(layout, moved, out, num_classes=5)
    assert manifest["count"] == 11
    assert len(read_manifest(out)["fingerprint"]) == 64


def changed(source):
    """One number of one file is another; of a folder the time says so, of a zip the checksum."""
    if source.is_dir():
        os.utime(max(path for path in source.rglob("*") if path.is_file()), ns=(10**18, 10**18 + 1))
    else:
        named(4, npy(np.concatenate([STD, STD])))(source)


def test_an_interrupted_conversion_goes_on(tmp_path, monkeypatch):
    monkeypatch.setattr(latents, "SHARD_SIZE", 5)
    frozen(tmp_path / "in")
    whole = convert("fast-dit", tmp_path / "in", tmp_path / "whole", num_classes=5)
    interrupted(monkeypatch, "fast-dit", tmp_path / "in", tmp_path / "out")
    first = tmp_path / "out/latents-00000.array_record"
    written = first.stat().st_mtime_ns
    assert convert("fast-dit", tmp_path / "in", tmp_path / "out", num_classes=5) == whole
    assert first.stat().st_mtime_ns == written
    assert sorted(p.name for p in (tmp_path / "out").iterdir()) == sorted(
        p.name for p in (tmp_path / "whole").iterdir()
    )
    with pytest.raises(UserError, match="already holds latents.json"):
        convert("fast-dit", tmp_path / "in", tmp_path / "out", num_classes=5)


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
MAKERS = {"fast-dit": frozen, "udit": udit, "u-vit": u_vit, "edm2": edm2, "va-vae": va_vae}


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
    "three": (pickled([GOOD, 1, 2]), "damaged"),
    "words": (pair(GOOD, "cat"), "damaged"),
    "exchanged": (pair(1, GOOD), "damaged|other objects"),
    "lying": (LYING, "damaged"),
    "truncated": (pair(GOOD, 1)[:-100], "damaged"),
    "dtype": (pair(GOOD.astype(np.float64), 1), "damaged .*dtype 'f8'"),
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


def other_zip(**changes):
    """A zip of EDM2 with other members; None: without."""

    def change(root):
        with zipfile.ZipFile(root) as archive:
            files = {name: archive.read(name) for name in archive.namelist()}
        files |= {
            name.replace("__", "/").replace("_npy", ".npy").replace("_json", ".json"): data
            for name, data in changes.items()
        }
        write_members(root, {name: data for name, data in files.items() if data is not None})

    return change


def named(number, data):
    return other_zip(**{f"00000__img-mean-std-{number:08d}_npy": data})


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


STD = np.full((C, H, W), 0.5, np.float32)
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
    "statistics-zero": (other_statistics(std=np.zeros((1, C, 1, 1), np.float32)), "std above 0"),
    "statistics-others": (other_statistics(std=np.full((1, C, 1, 1), 99, np.float32)), "twice or never"),
}


@pytest.mark.parametrize("case", WRONG_SHARDS)
def test_shards_of_lightningdit_that_are_none(tmp_path, case):
    refused(tmp_path, "va-vae", *WRONG_SHARDS[case])


def test_labels_may_be_left_out(tmp_path):
    frozen(tmp_path / "in")
    manifest = convert("fast-dit", tmp_path / "in", tmp_path / "out", num_classes=0)
    assert manifest["num_classes"] == 0
    assert opened(tmp_path / "out", num_classes=0).num_classes == 0


def test_the_command_says_how_the_latents_are_read(tmp_path, capsys):
    edm2(tmp_path / "in")
    command = ["prepare", "features-edm2", f"--from={tmp_path / 'in'}", f"--out={tmp_path / 'out'}"]
    assert main([*command, "--size=64"]) == 2
    assert "prepare: --size is of images, and features-edm2 are features" in capsys.readouterr().err
    assert main(["prepare", "features-mar", *command[2:]]) == 2
    assert "'mar' is no layout of features; valid: fast-dit, udit, u-vit, edm2, va-vae" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
    assert main([*command, "--num_classes=5"]) == 0
    first, second = capsys.readouterr().out.splitlines()
    assert first == f"wrote 12 latents of 4 x 6 x 4 to {tmp_path / 'out'}"
    given = dict(each.removeprefix("--config.data.").split("=") for each in second.split()[2:])
    assert given["shift"] == "5.81,3.25,0.12,-2.15"
    assert given["input_range"] == "0.0,1.0"
    leaves = {name: tuple(map(float, text.split(","))) for name, text in given.items()}
    assert len(opened(tmp_path / "out", **leaves).examples) == 12
