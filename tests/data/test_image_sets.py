"""Images to be scored: the same pixels from every container, little in memory, and one line for what is wrong."""

import io
import json
import tarfile
import tracemalloc
import zipfile

import numpy as np
import pytest
from PIL import Image

from diffjax.data import image_records, image_sets, shards, sources
from diffjax.data.image_sets import open_image_set
from diffjax.errors import UserError
from diffjax.files import Blocks, write_npz
from diffjax.sampling.samples import write_samples

COUNT, SIZE = 7, 12
IMAGES = np.random.default_rng(0).integers(0, 256, (COUNT, SIZE, SIZE, 3), np.uint8)
LABELS = np.array([0, 0, 0, 1, 1, 2, 2], np.int32)
CLASSES = ("cat", "dog", "newt")


def png(image, **options):
    file = io.BytesIO()
    (image if isinstance(image, Image.Image) else Image.fromarray(image)).save(file, "png", **options)
    return file.getvalue()


def files(images=IMAGES, labels=LABELS):
    """Image files by name, in the folders of their classes where they have labels."""
    folders = [""] * len(images) if labels is None else [f"{CLASSES[label]}/" for label in labels]
    return {f"{folder}{i:03d}.png": png(image) for i, (folder, image) in enumerate(zip(folders, images))}


def in_folder(root, members=None):
    for name, data in (files() if members is None else members).items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(data)
    return root


def in_zip(path, members=None):
    with zipfile.ZipFile(path, "w") as archive:
        for name, data in (files() if members is None else members).items():
            archive.writestr(name, data)
    return path


def in_tar(path):
    with tarfile.open(path, "w") as archive:
        for name, data in files().items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            archive.addfile(info, io.BytesIO(data))
    return path


def records(out):
    out.mkdir()
    encoded = [image_records.encode(image, label, "rgb") for image, label in zip(IMAGES, LABELS)]
    shards.write(out, image_records.NAME, encoded, image_records.shard_size(SIZE))
    stated = {"dataset": "mine", "split": "train", "rule": "adm", "decode": "stored", "partial": False}
    image_records.finish(out, COUNT, SIZE, CLASSES, stated)
    return out


def npz(path, save=np.savez, **arrays):
    save(path, **(arrays or {"arr_0": IMAGES, "arr_1": LABELS}))
    return path


def npy(path, array=IMAGES):
    np.save(path, array)
    return path


MAKERS = {
    "npz": lambda folder: npz(folder / "a.npz"),
    "compressed npz": lambda folder: npz(folder / "a.npz", np.savez_compressed),
    "npy": lambda folder: npy(folder / "a.npy"),
    "folder": lambda folder: in_folder(folder / "a"),
    "zip": lambda folder: in_zip(folder / "a.zip"),
    "tar": lambda folder: in_tar(folder / "a.tar"),
    "records": lambda folder: records(folder / "a"),
}


@pytest.mark.parametrize("kind", MAKERS)
def test_the_same_images_from_every_container(tmp_path, kind):
    path = MAKERS[kind](tmp_path)
    found = open_image_set(path)
    assert (found.name, found.count, found.shape, found.made) == (path.name, COUNT, (SIZE, SIZE, 3), {})
    for numbers in (np.arange(COUNT), np.array([5, 0, 0, 6, 3]), np.array([2]), np.array([], np.int64)):
        images = found.read(numbers)
        assert images.dtype == np.uint8
        np.testing.assert_array_equal(images, IMAGES[numbers])
    if kind == "npy":
        assert found.labels is None
    else:
        assert found.labels.dtype == np.int32
        np.testing.assert_array_equal(found.labels, LABELS)
    assert [len(block) for block in found.blocks(size=3)] == [3, 3, 1]
    np.testing.assert_array_equal(np.concatenate(list(found.blocks(np.array([4, 1, 2]), 2))), IMAGES[[4, 1, 2]])
    assert open_image_set(path).fingerprint == found.fingerprint == json.loads(json.dumps(found.fingerprint))
    for wrong in (COUNT, -1):
        with pytest.raises(IndexError, match=f"of {COUNT}"):
            found.read(np.array([0, wrong]))


def test_fingerprints_are_of_the_content(tmp_path):
    folder, archive = in_folder(tmp_path / "a"), in_zip(tmp_path / "a.zip")
    before = open_image_set(folder).fingerprint
    assert before == open_image_set(archive).fingerprint
    name = next(iter(files()))
    (folder / name).write_bytes(png(255 - IMAGES[0]))
    assert open_image_set(folder).fingerprint != before
    made = open_image_set(records(tmp_path / "records")).fingerprint
    assert (made["of"], made["rule"], made["decode"]) == ("the records", "adm", "stored")


@pytest.mark.parametrize("name", image_sets.EMBEDDED)
def test_embedded_sets(name):
    train, test = (image_sets.find(name, split) for split in ("train", "test"))
    images, labels = sources.arrays(sources.SOURCES[name](split="test"))
    np.testing.assert_array_equal(test.read(np.arange(test.count)), np.broadcast_to(images, (*images.shape[:3], 3)))
    np.testing.assert_array_equal(test.labels, labels)
    assert train.count > test.count
    assert train.fingerprint != test.fingerprint
    with pytest.raises(UserError, match="valid: train, test"):
        image_sets.embedded(name, "validation")


def test_a_path_is_found_by_its_name(tmp_path):
    assert image_sets.find(str(npy(tmp_path / "a.npy"))).count == COUNT


@pytest.mark.parametrize("kind", ["npz", "npy", "folder"])
def test_grey_images_become_rgb(tmp_path, kind):
    grey = IMAGES[..., :1]
    path = {
        "npz": lambda: npz(tmp_path / "a.npz", arr_0=grey),
        "npy": lambda: npy(tmp_path / "a.npy", grey),
        "folder": lambda: in_folder(tmp_path / "a", files(grey[..., 0], None)),
    }[kind]()
    found = open_image_set(path)
    assert (found.shape, found.labels) == ((SIZE, SIZE, 3), None)
    np.testing.assert_array_equal(found.read(np.arange(COUNT)), np.repeat(grey, 3, axis=-1))


@pytest.mark.parametrize("save", [np.savez, np.savez_compressed])
def test_images_that_do_not_fit_memory(tmp_path, save):
    """10 MB of images, of which at most a few at a time are there."""
    big = np.random.default_rng(1).integers(0, 8, (800, 64, 64, 3), np.uint8)
    path = npz(tmp_path / "big.npz", save, arr_0=big, arr_1=np.arange(800))
    tracemalloc.start()
    try:
        found = open_image_set(path)
        total = sum(int(block.sum(dtype=np.int64)) for block in found.blocks(size=64))
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert total == big.sum(dtype=np.int64)
    assert peak < 4e6


def test_what_sample_writes(tmp_path):
    path = tmp_path / "samples.npz"
    write_samples(path, IMAGES, LABELS, {"seed": 3})
    assert open_image_set(path).made == {"seed": 3}
    blocks = Blocks(IMAGES.shape, IMAGES.dtype, [IMAGES[:3], IMAGES[3:]])
    write_npz(tmp_path / "blocks.npz", {"arr_0": blocks, "arr_1": LABELS})
    assert open_image_set(path).fingerprint == open_image_set(tmp_path / "blocks.npz").fingerprint
    write_samples(path, IMAGES, LABELS, {"labels": "none"})
    assert open_image_set(path).labels is None
    path.with_suffix(".json").write_text('{"samples_sha256": "other"}')
    with pytest.raises(UserError, match=r"samples\.json does not describe samples\.npz: the hash of the file differs"):
        open_image_set(path)


def test_folders_that_are_no_classes(tmp_path):
    loose = open_image_set(in_folder(tmp_path / "loose", files(labels=None)))
    one = open_image_set(in_zip(tmp_path / "one.zip", {f"out/{name}": data for name, data in files().items()}))
    assert (loose.labels, one.labels) == (None, None)
    np.testing.assert_array_equal(one.read(np.arange(COUNT)), IMAGES)
    stated = {"labels": [[name, i % 3] for i, name in enumerate(files(labels=None))]}
    given = in_zip(tmp_path / "a.zip", files(labels=None) | {"dataset.json": json.dumps(stated).encode()})
    assert list(open_image_set(given).labels) == [i % 3 for i in range(COUNT)]


def test_opaque_images_and_palettes(tmp_path):
    opaque = np.concatenate([IMAGES[1], np.full((SIZE, SIZE, 1), 255, np.uint8)], axis=-1)
    palette = Image.fromarray(IMAGES[2] // 64 * 64).quantize(64)
    found = open_image_set(in_folder(tmp_path / "a", {"1.png": png(opaque), "2.png": png(palette)}))
    images = found.read(np.arange(2))
    np.testing.assert_array_equal(images[0], IMAGES[1])
    np.testing.assert_array_equal(images[1], np.asarray(palette.convert("RGB")))


def changed(name, data):
    return {**files(labels=None), name: data}


def damaged(path, start=-3000):
    """The file with some bytes of its images changed."""
    data = bytearray(path.read_bytes())
    data[start : start + 40] = bytes(255 - value for value in data[start : start + 40])
    path.write_bytes(data)
    return path


def lying(path):
    """A file whose header claims more images than there are."""
    data = path.read_bytes().replace(b"'shape': (7,", b"'shape': (9,")
    path.write_bytes(data)
    return path


MANY = np.random.default_rng(2).integers(0, 256, (100, 32, 32, 3), np.uint8)
CLEAR = np.concatenate([IMAGES[1], np.full((SIZE, SIZE, 1), 200, np.uint8)], axis=-1)
DEEP = Image.fromarray(np.arange(SIZE**2, dtype=np.uint16).reshape(SIZE, SIZE))
WRONG = {
    "missing": (lambda d: d / "no.npz", "no.npz: no such file or folder; valid: an .npz"),
    "another file": (lambda d: in_folder(d, {"a.txt": b"x"}) / "a.txt", "a.txt: valid: an .npz or .npy"),
    "floats": (
        lambda d: npz(d / "a.npz", arr_0=IMAGES / np.float32(255)),
        r"a.npz: arr_0 is float32 \[7, 12, 12, 3\]; valid: uint8",
    ),
    "integers": (lambda d: npy(d / "a.npy", IMAGES.astype(np.int32)), r"a.npy: the array is int32 .* valid: uint8"),
    "channels first": (
        lambda d: npz(d / "a.npz", arr_0=np.ascontiguousarray(IMAGES.transpose(0, 3, 1, 2))),
        r"arr_0 is uint8 \[7, 3, 12, 12\]; valid: \[n, h, w, 3\]",
    ),
    "fortran order": (lambda d: npy(d / "a.npy", np.asfortranarray(IMAGES)), "in Fortran order; valid"),
    "no arr_0": (lambda d: npz(d / "a.npz", mu=LABELS, sigma=LABELS), "holds no images, .* it holds mu, sigma"),
    "labels": (lambda d: npz(d / "a.npz", arr_0=IMAGES, arr_1=LABELS[:5]), r"arr_1 is int32 \[5\]; valid: integers"),
    "float labels": (lambda d: npz(d / "a.npz", arr_0=IMAGES, arr_1=LABELS / 2), "arr_1 is float64"),
    "one image": (lambda d: npz(d / "a.npz", arr_0=IMAGES[:1]), "a.npz holds 1 image; at least 2 are needed"),
    "none in npz": (lambda d: npz(d / "a.npz", arr_0=IMAGES[:0]), "a.npz holds 0 images; at least 2 are needed"),
    "one file": (lambda d: in_folder(d / "a", {"a.png": png(IMAGES[0])}), "a holds 1 image; at least 2"),
    "no files": (lambda d: in_folder(d, {"a/b.txt": b"x"}) / "a", "a holds no images, no .bmp"),
    "sizes": (
        lambda d: in_zip(d / "a.zip", changed("004.png", png(IMAGES[0][:5]))),
        r"a.zip: 000.png is 12x12 and 004.png is 12x5; images of one set have one size",
    ),
    "loose": (lambda d: in_folder(d / "a", {**files(), "x.png": png(IMAGES[0])}), "x.png lies beside class folders"),
    "damaged header": (lambda d: in_folder(d / "a", changed("004.png", b"png")), "004.png cannot be decoded: "),
    "16 bits": (lambda d: in_folder(d / "a", changed("004.png", png(DEEP))), "004.png cannot be decoded: 16 bits"),
    "cut": (lambda d: cut(npz(d / "a.npz")), "a.npz cannot be read: "),
    "stored and damaged": (lambda d: damaged(npz(d / "a.npz", arr_0=MANY)), "the checksum of arr_0 differs"),
    "lying": (lambda d: lying(npy(d / "a.npy")), r"the array is uint8 \[9, 12, 12, 3\] and holds 3,024 bytes"),
    "no npy": (lambda d: in_folder(d, {"a.npy": b"text"}) / "a.npy", "damaged or no npy file"),
    "no zip": (lambda d: in_folder(d, {"a.zip": b"text"}) / "a.zip", "a.zip cannot be read: .*zip"),
    "no npz": (lambda d: in_folder(d, {"a.npz": b"text"}) / "a.npz", "a.npz cannot be read: .*zip"),
    "records": (lambda d: in_folder(d, {"a/images.json": b"{}"}) / "a", "is no manifest of prepared images"),
}


def cut(path):
    path.write_bytes(path.read_bytes()[:2000])
    return path


@pytest.mark.parametrize("case", WRONG)
def test_what_is_refused(tmp_path, case):
    make, message = WRONG[case]
    with pytest.raises(UserError, match=message) as caught:
        open_image_set(make(tmp_path))
    assert "\n" not in str(caught.value)


READ = {
    "transparent": (lambda d: in_folder(d / "a", changed("004.png", png(CLEAR))), "004.png .* it is transparent"),
    "damaged": (
        lambda d: in_folder(d / "a", changed("004.png", png(IMAGES[4])[:200])),
        "004.png cannot be decoded: .*truncated",
    ),
    "compressed": (lambda d: damaged(npz(d / "a.npz", np.savez_compressed, arr_0=MANY)), "arr_0 cannot be read: "),
}


@pytest.mark.parametrize("case", READ)
def test_what_is_found_when_images_are_read(tmp_path, case):
    make, message = READ[case]
    found = open_image_set(make(tmp_path))
    with pytest.raises(UserError, match=message) as caught:
        found.read(np.arange(found.count))
    assert "\n" not in str(caught.value)


def test_a_file_that_shrinks_meanwhile(tmp_path):
    found = open_image_set(npy(tmp_path / "a.npy"))
    cut(tmp_path / "a.npy")
    with pytest.raises(UserError, match="the file ends before its images"):
        found.read(np.array([6]))
