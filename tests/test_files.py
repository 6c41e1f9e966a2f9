"""Files are complete or absent, and arrays in them are what numpy writes and reads."""

import errno
import json
import os
import subprocess
import sys
import zipfile
from pathlib import Path

import numpy as np
import pytest

from diffjax import files
from diffjax.errors import UserError

ARRAYS = {"arr_0": np.arange(24, dtype=np.uint8).reshape(2, 3, 4), "arr_1": np.array([7, 8], np.int32)}


def test_a_file_appears_when_it_is_complete(tmp_path):
    path = tmp_path / "f"
    path.write_text("old")
    with files.atomic(path) as file:
        file.write(b"new")
        file.flush()
        assert path.read_text() == "old"
        (temporary,) = set(tmp_path.iterdir()) - {path}
        assert temporary.name.startswith(".f.file-")
    assert path.read_text() == "new"
    assert list(tmp_path.iterdir()) == [path]
    (tmp_path / "plain").touch()
    assert path.stat().st_mode == (tmp_path / "plain").stat().st_mode


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt, SystemExit])
def test_nothing_is_left_of_a_failed_writing(tmp_path, error):
    path = tmp_path / "f"
    path.write_text("old")

    def fail():
        with files.atomic(path) as file:
            file.write(b"new")
            raise error

    with pytest.raises(error):
        fail()
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]


def test_a_refused_write_names_the_file(tmp_path, monkeypatch):
    def full(descriptor):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with pytest.raises(FileNotFoundError) as missing:  # a folder that nobody made is a fault of the program
        files.write_bytes(tmp_path / "no" / "f", b"")
    assert missing.value.filename == str(tmp_path / "no" / "f")
    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(UserError, match=f"cannot write {tmp_path}/f: No space left on device"):
        files.write_text(tmp_path / "f", "text")
    assert not list(tmp_path.iterdir())


def test_temporaries_are_removed_by_owner_and_name(tmp_path):
    names = [".a.p1-00.tmp", ".a.p11-00.tmp", ".b[1].p1-00.tmp", "a.p1-00.tmp", "a"]
    for name in names:
        (tmp_path / name).touch()
    files.remove_temporaries(tmp_path, "p1", "b[1]")
    assert {path.name for path in tmp_path.iterdir()} == set(names) - {".b[1].p1-00.tmp"}
    files.remove_temporaries(tmp_path, "p1")
    assert {path.name for path in tmp_path.iterdir()} == {".a.p11-00.tmp", "a.p1-00.tmp", "a"}


def test_json(tmp_path):
    files.write_json(tmp_path / "f.json", {"b": [1, None], "a": "ä"})
    assert json.loads((tmp_path / "f.json").read_text()) == {"b": [1, None], "a": "ä"}
    with pytest.raises(TypeError):
        files.write_json(tmp_path / "f.json", {"b": object()})
    assert json.loads((tmp_path / "f.json").read_text())["b"] == [1, None]


def test_npz_is_that_of_numpy(tmp_path):
    arrays = ARRAYS | {"empty": np.zeros((0, 3)), "number": np.float32(1.5).reshape(())}
    in_pieces = arrays | {"arr_0": files.Blocks((2, 3, 4), np.dtype(np.uint8), iter(np.split(ARRAYS["arr_0"], 2)))}
    files.write_npz(tmp_path / "a.npz", in_pieces)
    np.savez(tmp_path / "b.npz", **arrays)
    assert (tmp_path / "a.npz").read_bytes() == (tmp_path / "b.npz").read_bytes()
    files.write_npz(tmp_path / "c.npz", {"turned": np.asfortranarray(ARRAYS["arr_0"])})
    np.testing.assert_array_equal(files.read_npz(tmp_path / "c.npz", ["turned"])["turned"], ARRAYS["arr_0"])


@pytest.mark.parametrize(
    "array",
    [
        np.array([None]),
        np.array(["text"]),
        files.Blocks((2,), np.dtype(np.int32), [np.zeros(1, np.int32)]),
        files.Blocks((2,), np.dtype(np.int32), [np.zeros(2, np.int64)]),
        files.Blocks((1, 2), np.dtype(np.int32), [np.zeros((1, 3), np.int32)]),
    ],
    ids=["objects", "text", "too few rows", "another dtype", "another shape"],
)
def test_npz_of_something_else(tmp_path, array):
    with pytest.raises(ValueError, match="arrays of|piece"):
        files.write_npz(tmp_path / "f.npz", {"a": array})
    assert not list(tmp_path.iterdir())


def test_read_npz(tmp_path):
    path = tmp_path / "f.npz"
    np.savez(path, **ARRAYS, pickled=np.array([None]))
    read = files.read_npz(path, ["arr_1", "arr_0"])  # what else is in the file does not matter
    assert list(read) == ["arr_1", "arr_0"]
    for name, array in read.items():
        np.testing.assert_array_equal(array, ARRAYS[name])
    for names in (["pickled"], ["arr_0", "absent"]):
        with pytest.raises(UserError, match=rf"f\.npz: not an npz of {' and '.join(names)} \(.+\)"):
            files.read_npz(path, names)
    with pytest.raises(UserError, match="no such file"):
        files.read_npz(tmp_path / "g.npz", ["arr_0"])


def test_damaged_npz(tmp_path):
    path = tmp_path / "f.npz"
    np.savez(path, **ARRAYS)
    whole = path.read_bytes()
    npy = tmp_path / "array.npy"
    np.save(npy, ARRAYS["arr_0"])
    other = [b"", b"text" * 20, npy.read_bytes(), whole.replace(ARRAYS["arr_0"].tobytes(), bytes(24))]
    for data in [*other, *(whole[:size] for size in range(0, len(whole), 13))]:
        path.write_bytes(data)
        with pytest.raises(UserError, match=r"f\.npz: not a samples file, an npz of arr_0 and arr_1") as error:
            files.read_npz(path, ["arr_0", "arr_1"], "a samples file")
        assert "\n" not in str(error.value)


def test_entries_have_room_for_more_than_four_gigabytes(tmp_path):
    """The 64-bit form must be chosen before the size is known."""
    files.write_npz(tmp_path / "f.npz", ARRAYS)
    with zipfile.ZipFile(tmp_path / "f.npz") as archive:
        assert {entry.extract_version for entry in archive.infolist()} == {45}


def test_sha256(tmp_path):
    (tmp_path / "f").write_bytes(b"abc")
    assert files.file_sha256(tmp_path / "f").startswith("ba7816bf8f01cfea")


def test_a_refused_read_of_another_file_keeps_its_name(tmp_path):
    """An error of what is read while a file is written is none of the file that is written."""
    with pytest.raises(IsADirectoryError) as error, files.atomic(tmp_path / "f"):
        tmp_path.read_text()
    assert error.value.filename == str(tmp_path)


def test_paths_of_users(monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path))
    assert files.local_path("~/a") == tmp_path / "a"
    assert files.local_path("a~b/[c]") == Path("a~b/[c]")
    for text, reason in {"": "valid: a path", "gs://b/a": "only local", "~no-such-user/a": "home directory"}.items():
        with pytest.raises(UserError, match=reason):
            files.local_path(text)


WRITER = """
import sys, pathlib
from diffjax import files
with files.only_writer(pathlib.Path(sys.argv[1])):
    print("writes", flush=True)
    sys.stdin.read()
"""


def test_one_writer_in_a_folder(tmp_path):
    """Another process is refused while one writes; a killed one leaves no lock behind."""
    for _ in range(2):
        command = [sys.executable, "-c", WRITER, str(tmp_path)]
        with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as other:
            assert other.stdout.readline() == "writes\n"
            with (
                pytest.raises(UserError, match=rf"another process writes in {tmp_path} \(process {other.pid} on "),
                files.only_writer(tmp_path),
            ):
                pass
            other.kill()
    with files.only_writer(tmp_path):
        pass


def test_a_file_system_without_locks_is_said(tmp_path, monkeypatch, caplog):
    def refuse(*_):
        raise OSError(errno.ENOSYS, "Function not implemented")

    monkeypatch.setattr("fcntl.lockf", refuse)
    with caplog.at_level("INFO"), files.only_writer(tmp_path):
        pass
    assert "cannot be locked" in caplog.text
