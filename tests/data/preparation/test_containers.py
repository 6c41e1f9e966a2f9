"""Folders, zips and tars: the same images; what an archive claims cannot hurt."""

import io
import tarfile
import tracemalloc
import zipfile
from pathlib import Path

import pytest

from diffjax.data.preparation import containers
from diffjax.data.preparation.containers import open_container
from diffjax.errors import UserError
from tests.data.preparation.originals import encoded, picture, tar_of, write_tree

FILES = {f"{name}.png": encoded(picture(i, 8, 8), "png") for i, name in enumerate(["b b/1", "b/10", "b/9", "a"])}
OTHERS = {"notes.txt": b"text", ".hidden.png": b"x", "__MACOSX/._a.png": b"x"}


def zip_of(files: dict[str, bytes], kind: int = zipfile.ZIP_STORED) -> bytes:
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w", kind) as archive:
        for name, data in files.items():
            archive.writestr(name, data)
    return out.getvalue()


PLACES = {
    "folder": lambda root: write_tree(root / "f", FILES | {"notes.txt": b"", ".hidden.png": b""}),
    "stored.zip": lambda root: write_tree(root, {"stored.zip": zip_of(FILES | OTHERS)}) / "stored.zip",
    "deflated.zip": lambda root: (
        write_tree(root, {"deflated.zip": zip_of(FILES | OTHERS, zipfile.ZIP_DEFLATED)}) / "deflated.zip"
    ),
    "images.tar": lambda root: write_tree(root, {"images.tar": tar_of(FILES | OTHERS)}) / "images.tar",
}


@pytest.mark.parametrize("place", PLACES)
def test_containers_are_alike(tmp_path, place):
    found = open_container(PLACES[place](tmp_path))
    assert list(found.sizes) == ["a.png", "b/10.png", "b/9.png", "b b/1.png"]  # folder after folder
    assert {name: found.read(name) for name in found.sizes} == FILES
    assert dict(found.sizes) == {name: len(data) for name, data in FILES.items()}
    assert "notes.txt" in found
    assert "other.txt" not in found


def test_names_are_no_paths(tmp_path):
    """Nothing is written or read beside an archive, whatever its entries are called."""
    names = ["../../evil.png", "/etc/evil.png", "a/../../evil.png"]
    path = write_tree(tmp_path / "in", {"a.zip": zip_of(dict.fromkeys(names, b"x"))}) / "a.zip"
    found = open_container(path)
    assert {found.read(name) for name in found.sizes} == {b"x"}
    assert [each.name for each in tmp_path.rglob("*")] == ["in", "a.zip"]


def claim(data: bytes, size: int) -> bytes:
    """The zip with another size of its one entry, in both of its headers."""
    local, central = data.index(b"PK\x03\x04") + 22, data.index(b"PK\x01\x02") + 24
    for where in (local, central):
        data = data[:where] + size.to_bytes(4, "little") + data[where + 4 :]
    return data


def flipped(data: bytes, where: int) -> bytes:
    return data[:where] + bytes([data[where] ^ 1]) + data[where + 1 :]


def twice() -> bytes:
    return zip_of({"a.png": b"1", "b.png": b"2"}).replace(b"b.png", b"a.png")


ONE = zip_of({"a.png": FILES["a.png"]})
BAD = {
    "claims too much": (lambda: claim(ONE, 2**31), r"a.png claims 2,147,483,648 bytes; valid: at most 268,435,456"),
    "claims less": (
        lambda: claim(zip_of({"a.png": bytes(10_000)}, zipfile.ZIP_DEFLATED), 100),
        "cannot be read: Bad CRC",
    ),
    "claims more": (
        lambda: claim(zip_of({"a.png": b"1234"}, zipfile.ZIP_DEFLATED), 100),
        "a.png cannot be read: 100 bytes claimed, and 4 there",
    ),
    "a flipped bit": (lambda: flipped(ONE, 60), "a.png cannot be read: Bad CRC-32"),
    "cut": (lambda: ONE[:-40], "cannot be read: File is not a zip file"),
    "one name twice": (twice, "holds a.png twice"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_zips(tmp_path, name):
    make, words = BAD[name]
    path = write_tree(tmp_path, {"a.zip": make()}) / "a.zip"
    with pytest.raises(UserError, match=words):
        open_container(path).read("a.png")


def test_a_bomb_is_not_unpacked(tmp_path, monkeypatch):
    """An entry gives no more bytes than it claims, and it may not claim many."""
    monkeypatch.setattr(containers, "LARGEST", 1000)
    path = write_tree(tmp_path, {"a.zip": zip_of({"a.png": bytes(10**6)}, zipfile.ZIP_DEFLATED)}) / "a.zip"
    assert path.stat().st_size < 2000
    with pytest.raises(UserError, match="claims 1,000,000 bytes; valid: at most 1,000 for an image"):
        open_container(path)


def test_a_bomb_that_claims_little_is_not_unpacked(tmp_path):
    data = claim(zip_of({"a.png": bytes(2**25)}, zipfile.ZIP_DEFLATED), 1000)
    found = open_container(write_tree(tmp_path, {"a.zip": data}) / "a.zip")
    tracemalloc.start()
    try:
        with pytest.raises(UserError, match="a.png cannot be read"):
            found.read("a.png")
        assert tracemalloc.get_traced_memory()[1] < 2**20
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize("kind", [zipfile.ZIP_BZIP2, zipfile.ZIP_LZMA])
def test_other_compressions_are_refused(tmp_path, kind):
    path = write_tree(tmp_path, {"a.zip": zip_of({"a.png": b"x"}, kind)}) / "a.zip"
    with pytest.raises(UserError, match=f"a.png is of compression {kind}; valid: stored or deflated"):
        open_container(path)


@pytest.mark.parametrize("name, words", [("none", "no such file or folder"), ("a.rar", "is neither a folder nor")])
def test_what_is_no_container(tmp_path, name, words):
    (tmp_path / "a.rar").touch()
    with pytest.raises(UserError, match=words):
        open_container(tmp_path / name)


def test_a_file_that_vanishes(tmp_path):
    folder = open_container(write_tree(tmp_path, FILES))
    Path(tmp_path / "a.png").unlink()
    with pytest.raises(UserError, match="a.png cannot be read: .*No such file"):
        folder.read("a.png")


def test_other_files_are_limited_too(tmp_path, monkeypatch):
    path = write_tree(tmp_path, {"a.zip": zip_of({"dataset.json": bytes(5000)}, zipfile.ZIP_DEFLATED)}) / "a.zip"
    found = open_container(path)
    monkeypatch.setattr(containers, "LARGEST", 1000)
    with pytest.raises(UserError, match="dataset.json claims 5,000 bytes; valid: at most 1,000"):
        found.read("dataset.json")


@pytest.mark.parametrize("kind", ["sparse", "negative"])
def test_bad_tars(tmp_path, kind):
    """A negative size leads back to its own header, again and again."""
    info = tarfile.TarInfo("a.png")
    info.size = 512
    if kind == "sparse":
        info.type = tarfile.GNUTYPE_SPARSE
    header = bytearray(info.tobuf(tarfile.GNU_FORMAT))
    if kind == "negative":
        header[124:136] = (-512).to_bytes(12, "big", signed=True)
        header[148:156] = b" " * 8
        header[148:156] = f"{sum(header):06o}\0 ".encode()
    path = write_tree(tmp_path, {"a.tar": bytes(header) + bytes(4096)}) / "a.tar"
    with pytest.raises(UserError, match=r"a\.tar cannot be read: "):
        open_container(path)


def linked(kind: bytes, target: str, name: str = "b/2.png") -> bytes:
    """A tar of ./a/1.png and of a link."""
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w") as tar:
        image = tarfile.TarInfo("./a/1.png")
        image.size = 4
        tar.addfile(image, io.BytesIO(b"1234"))
        link = tarfile.TarInfo(name)
        link.type, link.linkname = kind, target
        tar.addfile(link)
    return out.getvalue()


@pytest.mark.parametrize("target", ["./a/1.png", "a/1.png"])
@pytest.mark.parametrize("folder", ["", "set"])
def test_hard_links_in_a_tar_are_files(tmp_path, target, folder):
    data = linked(tarfile.LNKTYPE, target)
    found = open_container(write_tree(tmp_path, {"a.tar": tar_of({"set.tar": data}) if folder else data}) / "a.tar")
    names = [f"{folder}/{name}".lstrip("/") for name in ("a/1.png", "b/2.png")]
    assert {name: found.read(name) for name in found.sizes} == dict.fromkeys(names, b"1234")


LINKS = {
    "symbolic": (tarfile.SYMTYPE, "../a/1.png", r"a\.tar: b/2.png is a symbolic link; valid: .*--dereference"),
    "to nothing": (tarfile.LNKTYPE, "c.png", "b/2.png links to c.png, which is no file before it"),
}


@pytest.mark.parametrize("name", LINKS)
def test_links_that_cannot_be_followed(tmp_path, name):
    kind, target, words = LINKS[name]
    with pytest.raises(UserError, match=words):
        open_container(write_tree(tmp_path, {"a.tar": linked(kind, target)}) / "a.tar")
