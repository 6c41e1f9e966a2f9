"""Trees of arrays in folders: rejected input, and the type of each error."""

import errno
import re
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec
from orbax.checkpoint._src.serialization import replica_slices

from diffjax import archive
from diffjax.errors import UserError
from diffjax.parallel.mesh import make_mesh

ROOT = Path(__file__).parent.parent

TREE = {"a": {"b": np.arange(3, dtype=np.float32)}, "c": np.ones((2, 2), np.float32)}
ABSTRACT = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype), TREE)


@pytest.mark.parametrize("name", ["a[b]", "a]b", "a b", "ü'$,%20#{}&", "~a", "a\\b", "a*b", "a?b", "[", "**"])
def test_a_name_that_is_taken_is_read_again(tmp_path, name):
    """Any name works, or it is refused before anything is written."""
    folder = tmp_path / name / "params"
    try:
        archive.check_place(folder)
    except UserError as error:
        assert re.search(r"[*?[\\]", name)
        with pytest.raises(UserError, match=re.escape(str(error))):
            archive.save_arrays(folder, TREE)
        with pytest.raises(UserError, match="arrays cannot be kept below a name with"):
            archive.Archive(folder, "checkpoint", ("state",))
        assert not list(tmp_path.iterdir())
        return
    archive.save_arrays(folder, TREE)
    folder.parent.rename(tmp_path / "moved")
    jax.tree.map(np.testing.assert_array_equal, archive.load_arrays(tmp_path / "moved/params"), TREE)


def test_arrays_in_other_shapes_are_named(tmp_path):
    archive.save_arrays(tmp_path / "params", TREE)
    stored = archive.stored_shapes(tmp_path / "params")
    assert archive.differing(stored, archive.shapes(ABSTRACT)) == ""
    other = {"a": ABSTRACT["a"], "c": jax.ShapeDtypeStruct((2, 3), np.float32), "d": ABSTRACT["c"]}
    expected = "c (2, 2) not (2, 3), d None not (2, 2)"
    assert archive.differing(stored, archive.shapes(other)) == expected
    with pytest.raises(archive.Damaged, match=f"^{tmp_path}/nothing cannot be read: "):
        archive.stored_shapes(tmp_path / "nothing")


def test_a_step_of_another_model_is_not_damaged(tmp_path):
    """Nothing is to be moved away then: the stored step is as it was written."""
    steps = archive.Archive(tmp_path, "checkpoint", ("state", "meta"))
    steps.save_items(3, {"state": TREE}, {"meta": {"x": 1}})
    steps.wait()
    assert steps.meta(3) == {"x": 1}
    with pytest.raises(UserError, match="checkpoint .*/3 is of another model or optimizer: state has c") as raised:
        steps.restore_items(3, {"state": {"a": ABSTRACT["a"]}})
    assert not isinstance(raised.value, archive.Damaged)
    jax.tree.map(np.testing.assert_array_equal, steps.restore_items(3, {"state": ABSTRACT})["state"], TREE)
    with pytest.raises(archive.Damaged, match="item ema is missing"):
        steps.restore_items(3, {"ema": ABSTRACT})
    steps.close()


LIBRARY = "OUT_OF_RANGE: Failed writing: \"/a/b\": Failed to write 9 bytes to file 11: {} [os_error_code='{}']"


@pytest.mark.parametrize(
    "error, reason",
    [
        (OSError(errno.ENOSPC, "in any language"), "No space left on device"),
        (NotADirectoryError(errno.ENOTDIR, "x", "/a/b"), "Not a directory"),
        (ValueError(LIBRARY.format("x", errno.EFBIG)), "File too large"),
        (ValueError("No space left on device, says a message"), None),
        (OSError(errno.EBADF, "Bad file descriptor"), None),
        (TypeError("a fault of the program"), None),
    ],
    ids=lambda value: type(value).__name__,
)
def test_a_write_is_refused_by_its_number(error, reason):
    def write():
        with archive._refusals("cannot write a", lambda: "; advice"):
            raise error

    with pytest.raises(UserError if reason else type(error)) as raised:
        write()
    assert str(raised.value) == (f"cannot write a: {reason}; advice" if reason else str(error))


@pytest.mark.parametrize(
    "error, kind",
    [
        (ValueError("DATA_LOSS: checksum"), archive.Damaged),
        (FileNotFoundError(errno.ENOENT, "No such file or directory"), archive.Damaged),
        (PermissionError(errno.EACCES, "x"), UserError),
        (ValueError(LIBRARY.format("x", errno.EACCES)), UserError),
        (MemoryError(), MemoryError),
        (RuntimeError("RESOURCE_EXHAUSTED: of a device"), RuntimeError),
        (AttributeError("a fault of the program"), AttributeError),
    ],
    ids=lambda value: getattr(value, "__name__", type(value).__name__),
)
def test_what_cannot_be_read_is_damaged_only_where_the_file_is(error, kind):
    def read():
        with archive._readable(Path("a")):
            raise error

    with pytest.raises(kind) as raised:
        read()
    assert type(raised.value) is kind
    assert ("a cannot be read: " in str(raised.value)) == issubclass(kind, UserError)


def test_devices_share_in_writing_large_arrays_alone(tmp_path, monkeypatch):
    """Eight devices hold a copy each: slices of exactly the limit, a small array, one of no eight parts."""
    mesh = make_mesh({"data": 8})
    sizes = {"shared": (8 * archive.SLICE // 4,), "small": (8, 16), "odd": (archive.SLICE + 1, 3)}
    tree = {name: np.arange(np.prod(size), dtype=np.float32).reshape(size) for name, size in sizes.items()}
    slices = []
    pick = replica_slices.get_replica_slices

    def seen(array, *arguments, **options):
        found = pick(array, *arguments, **options)
        slices.append((array.shape, len(found.replica_slices)))
        return found

    monkeypatch.setattr(replica_slices, "get_replica_slices", seen)
    archive.save_arrays(tmp_path / "params", jax.device_put(tree, NamedSharding(mesh, PartitionSpec())))
    assert dict(slices) == {sizes["shared"]: 8, sizes["small"]: 1, sizes["odd"]: 1}
    jax.tree.map(np.testing.assert_array_equal, archive.load_arrays(tmp_path / "params"), tree)


def test_importing_it_prints_nothing():
    code = [sys.executable, "-c", "import diffjax.archive"]
    run = subprocess.run(code, check=True, capture_output=True, text=True, cwd=ROOT)
    assert (run.stdout, run.stderr) == ("", "")
