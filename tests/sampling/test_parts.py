"""Parts of samples: however often the writing dies and whatever the batches, the files are those of one writing."""

import itertools
import json
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from diffjax import files
from diffjax.errors import UserError
from diffjax.sampling import parts as parts_module
from diffjax.sampling.parts import open_parts
from diffjax.sampling.samples import grid, read_samples, write_samples
from tests.programs import ROOT
from tests.sampling.death import DESCRIPTION, IDENTITY, forever, labels, pictures, sample

NAMES = ["s.json", "s.npz", "s.png"]


def program(*arguments: object, **options) -> subprocess.Popen:
    command = [sys.executable, "-m", "tests.sampling.death", *map(str, arguments)]
    return subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True, **options)


def run(*arguments: object) -> str:
    process = program(*arguments)
    output, _ = process.communicate(timeout=120)
    assert process.returncode == 0
    return output


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def at_once(folder: Path, num: int) -> dict[str, bytes]:
    """The files of a writing without parts."""
    write_samples(folder / "s.npz", pictures(np.arange(num)), labels(num), DESCRIPTION)
    return contents(folder)


class Died(BaseException):
    """In the place of a signal."""


def sizes(draw: random.Random, largest: int) -> Iterator[int]:
    while True:
        yield draw.randint(1, largest)


def test_the_files_are_those_of_one_writing(tmp_path):
    parts = sample(tmp_path / "s.npz", 130, forever(32))
    written = contents(tmp_path)
    assert sorted(written) == NAMES
    assert not parts.folder.exists()
    images, classes, protocol = read_samples(tmp_path / "s.npz")
    np.testing.assert_array_equal(images, pictures(np.arange(130)))
    np.testing.assert_array_equal(classes, labels(130))
    assert protocol == DESCRIPTION
    np.testing.assert_array_equal(np.asarray(Image.open(tmp_path / "s.png")), grid(images))
    (tmp_path / "once").mkdir()
    assert written == at_once(tmp_path / "once", 130)


@pytest.mark.parametrize("seed", range(12))
def test_random_deaths_and_batches(tmp_path, monkeypatch, seed):
    """Deaths while parts or results are written: temporaries stay, parts are cut or of any size."""
    draw, num = random.Random(seed), random.Random(seed).randint(1, 150)
    folder = tmp_path / "parts"
    folder.mkdir()
    deaths = 0
    while True:
        with monkeypatch.context() as patched:
            left = itertools.count(draw.randint(1, 8), -1)

            def mortal(call, left=left):
                def counted(*args, **kwargs):
                    if next(left) <= 0:
                        raise Died
                    return call(*args, **kwargs)

                return counted

            for name in draw.sample(("fsync", "replace"), draw.randint(1, 2)) if deaths < 8 else ():
                patched.setattr(os, name, mortal(getattr(os, name)))
            patched.setattr(Path, "unlink", lambda path, missing_ok=False: None)  # the dead remove nothing
            try:
                sample(folder / "s.npz", num, sizes(draw, draw.choice((2, 20, 200))))
            except Died:
                deaths += 1
            else:
                break
        complete = sorted(folder.glob("s.npz.parts/part-*"))
        if complete and draw.random() < 0.3:
            cut = draw.choice(complete)
            os.truncate(cut, draw.randrange(cut.stat().st_size))
    assert deaths
    (tmp_path / "once").mkdir()
    left_over = {name for name in contents(folder) if name not in NAMES}
    assert all(name.endswith(".tmp") for name in left_over)
    once = at_once(tmp_path / "once", num)
    assert {name: data for name, data in contents(folder).items() if name in NAMES} == once
    sample(folder / "s.npz", num, forever(50))
    assert contents(folder) == once  # temporaries are gone too


def test_killed_at_every_touch_of_the_file_system(tmp_path):
    """SIGKILL just before each flush, rename and removal; the same command again ends with the same files alone."""
    run("everywhere", tmp_path, 8)
    (tmp_path / "once").mkdir()
    once = at_once(tmp_path / "once", 8)
    folders = sorted(tmp_path.glob("[0-9]*"))
    assert len(folders) > 20
    for folder in folders:
        assert contents(folder) == once, folder.name


def test_killed_from_outside(tmp_path):
    folder = tmp_path / "parts"
    folder.mkdir()
    held = 0
    for _ in range(3):
        process = program("slowly", folder, 120)
        deadline = time.monotonic() + 60
        while len(list(folder.glob("s.npz.parts/part-*"))) < held + 3 and time.monotonic() < deadline:
            time.sleep(0.005)
        process.kill()
        process.communicate()
        assert process.returncode == -signal.SIGKILL
        held = len(list(folder.glob("s.npz.parts/part-*")))
    parts = open_parts(folder / "s.npz", IDENTITY, 120)
    assert held >= 9
    assert len(parts.missing()) == 120 - 2 * held
    run("slowly", folder, 120)
    (tmp_path / "once").mkdir()
    assert contents(folder) == at_once(tmp_path / "once", 120)


def test_two_processes_share_a_folder(tmp_path):
    processes = [program("share", tmp_path, process, 100) for process in (0, 1)]
    for process in processes:
        process.communicate(timeout=60)
        assert process.returncode == 0
    parts = open_parts(tmp_path / "s.npz", IDENTITY, 100)
    assert not len(parts.missing())
    parts.finish({"arr_1": labels(100)}, DESCRIPTION)
    written = contents(tmp_path)
    (tmp_path / "once").mkdir()
    assert written == at_once(tmp_path / "once", 100)


def test_a_process_removes_only_its_own_temporaries(tmp_path):
    first, second = (open_parts(tmp_path / "s.npz", IDENTITY, 4, process) for process in (0, 1))
    with files.atomic(second.folder / "part-000000002-000001.npy", second.owner) as file:
        left = first.folder / f".part-000000000-000001.npy.{first.owner}-0123.tmp"
        left.touch()
        open_parts(tmp_path / "s.npz", IDENTITY, 4, process=0)
        assert not left.exists()
        files.write_npy(file, pictures(np.array([2])))
    np.testing.assert_array_equal(first.missing(), [0, 1, 3])


def test_memory_does_not_grow_with_the_number_of_rows(tmp_path):
    peaks = {}
    for num in (4_000, 40_000):
        (tmp_path / str(num)).mkdir()
        peaks[num] = int(run("memory", tmp_path / str(num), num)) / 1024
    print("peak resident MiB by rows of 32 x 32 x 3:", {num: round(peak, 1) for num, peak in peaks.items()})
    assert (tmp_path / "40000" / "s.npz").stat().st_size > 117 * 2**20
    assert peaks[40_000] - peaks[4_000] < 30


@pytest.mark.parametrize("block_bytes", [1, 500, 1 << 20])
def test_rows_in_order(tmp_path, monkeypatch, block_bytes):
    monkeypatch.setattr(parts_module, "BLOCK_BYTES", block_bytes)
    parts = open_parts(tmp_path / "s.npz", IDENTITY, 20)
    wanted = pictures(np.arange(20))
    for numbers in (np.arange(12, 20), np.array([0, 1, 2, 5, 9, 10, 11]), np.array([3, 4, 6, 7, 8]), np.arange(2, 7)):
        parts.write(numbers, wanted[numbers])
    for start, stop in [(0, None), (0, 1), (3, 13), (19, 20), (5, 5)]:
        blocks = [np.empty((0, *wanted.shape[1:]), np.uint8), *parts.rows(start, stop)]
        assert max(block.nbytes for block in blocks) <= max(block_bytes, 192)
        np.testing.assert_array_equal(np.concatenate(blocks), wanted[start:stop])


@pytest.mark.parametrize(
    "dtype, shape", [("<f4", (4, 4, 1)), ("<i4", (16,)), ("<f2", ()), (">f4", (2,)), ("?", (3,)), ("u1", (2, 2, 1))]
)
def test_raw_rows_are_those_of_savez(tmp_path, dtype, shape):
    rows = (np.random.default_rng(0).normal(size=(11, *shape)) * 50).astype(dtype)
    extra = {"arr_1": labels(11), "conditions": np.linspace(0, 1, 22, dtype=np.float32).reshape(11, 2)}
    parts = open_parts(tmp_path / "s.npz", IDENTITY, 11)
    for numbers in np.array_split(parts.missing(), 5):
        parts.write(numbers, rows[numbers])
    parts.finish(extra, DESCRIPTION, raw=True)
    assert sorted(contents(tmp_path)) == ["s.json", "s.npz"]
    with np.load(tmp_path / "s.npz", allow_pickle=False) as arrays:
        assert list(arrays) == ["arr_0", "arr_1", "conditions"]
        for name, array in {"arr_0": rows, **extra}.items():
            assert arrays[name].dtype == array.dtype
            np.testing.assert_array_equal(arrays[name], array)
    np.savez(tmp_path / "numpy.npz", arr_0=rows, **extra)
    assert (tmp_path / "s.npz").read_bytes() == (tmp_path / "numpy.npz").read_bytes()
    described = json.loads((tmp_path / "s.json").read_text())
    assert described == DESCRIPTION | {"samples_sha256": files.file_sha256(tmp_path / "s.npz")}


def test_grey_pictures_are_repeated(tmp_path):
    grey = pictures(np.arange(5), (8, 8, 1))
    parts = open_parts(tmp_path / "s.npz", IDENTITY, 5)
    parts.write(np.arange(5), grey)
    parts.finish({"arr_1": labels(5)}, DESCRIPTION)
    np.testing.assert_array_equal(read_samples(tmp_path / "s.npz")[0], np.repeat(grey, 3, axis=-1))


def test_another_identity_is_refused_and_nothing_is_removed(tmp_path):
    parts = open_parts(tmp_path / "s.npz", IDENTITY, 5)
    parts.write(np.arange(2), pictures(np.arange(2)))
    before = contents(parts.folder)
    other = {"seed": 2, "origin": {"sha256": "ab", "step": 3}}
    with pytest.raises(
        UserError, match=r"step \(not given, now 3\), seed \(1, now 2\); remove .*another --out"
    ) as error:
        open_parts(tmp_path / "s.npz", other, 5)
    assert "\n" not in str(error.value)
    assert contents(parts.folder) == before
    (parts.folder / "request.json").write_text("{")
    with pytest.raises(UserError, match=r"request\.json is missing or damaged; remove"):
        open_parts(tmp_path / "s.npz", IDENTITY, 5)
    (parts.folder / "request.json").unlink()
    with pytest.raises(UserError, match=r"request\.json is missing or damaged; remove"):
        open_parts(tmp_path / "s.npz", IDENTITY, 5)


def test_an_identity_survives_json(tmp_path):
    identity = {"shape": (1, 2), "guidance": 1.5, "range": [None, float("inf")], "nothing": {}}
    for _ in range(2):
        open_parts(tmp_path / "s.npz", identity, 5)


def test_rows_are_taken_over_for_another_number(tmp_path):
    open_parts(tmp_path / "s.npz", IDENTITY, 20).write(np.arange(3, 18), pictures(np.arange(3, 18)))
    np.testing.assert_array_equal(open_parts(tmp_path / "s.npz", IDENTITY, 5).missing(), [0, 1, 2])
    sample(tmp_path / "s.npz", 10, forever(4))
    written = contents(tmp_path)
    (tmp_path / "once").mkdir()
    assert written == at_once(tmp_path / "once", 10)


def test_damaged_parts_count_as_missing(tmp_path):
    parts = open_parts(tmp_path / "s.npz", IDENTITY, 6)
    parts.write(np.arange(6), pictures(np.arange(6)))
    (part,) = parts.folder.glob("part-*")
    whole = part.read_bytes()
    damaged = [whole[:size] for size in (0, 5, 60, 127, 128, len(whole) - 1)] + [whole + b"0", b"text" * 300]
    damaged += [whole.replace(b"(6, 8", b"(5, 8"), whole.replace(b"|u1", b"|O8"), whole.replace(b"|u1", b"\xff\n(")]
    for data in damaged:
        assert data != whole
        part.write_bytes(data)
        np.testing.assert_array_equal(parts.missing(), np.arange(6))
    (parts.folder / "part-of-something.npy").write_bytes(whole)
    sample(tmp_path / "s.npz", 6, forever(4))
    written = contents(tmp_path)
    (tmp_path / "once").mkdir()
    assert written == at_once(tmp_path / "once", 6)


def test_assembling_what_is_incomplete(tmp_path):
    parts = open_parts(tmp_path / "s.npz", IDENTITY, 10)
    with pytest.raises(UserError, match="lacks 10 of 10 rows, the first of them number 0"):
        parts.finish({"arr_1": labels(10)}, DESCRIPTION)
    parts.write(np.array([0, 1, 5]), pictures(np.array([0, 1, 5])))
    with pytest.raises(UserError, match="lacks 7 of 10 rows, the first of them number 2; with several hosts"):
        parts.finish({"arr_1": labels(10)}, DESCRIPTION)
    assert [path.name for path in tmp_path.iterdir()] == ["s.npz.parts"]
    assert len(parts.missing()) == 7


def test_rows_of_different_kinds(tmp_path):
    parts = open_parts(tmp_path / "s.npz", IDENTITY, 2)
    parts.write(np.array([0]), pictures(np.array([0])))
    parts.write(np.array([1]), pictures(np.array([1])).astype(np.float32))
    with pytest.raises(UserError, match="holds other rows"):
        parts.assemble({})
    parts.write(np.array([0]), pictures(np.array([0])).astype(np.float32))
    with pytest.raises(UserError, match="not pictures"):
        parts.assemble({})
    assert [path.name for path in tmp_path.iterdir()] == ["s.npz.parts"]


def test_a_folder_that_is_removed_or_cannot_be_made(tmp_path):
    parts = open_parts(tmp_path / "s.npz", IDENTITY, 2)
    parts.remove()
    with pytest.raises(UserError, match="another command"):
        parts.write(np.array([0]), pictures(np.array([0])))
    (tmp_path / "s.npz.parts").write_text("")
    with pytest.raises(UserError, match="cannot be made"):
        open_parts(tmp_path / "s.npz", IDENTITY, 2)


@pytest.mark.parametrize(
    "numbers, rows", [([0, 1], 1), ([1, 0], 2), ([0, 0], 2), ([9, 10], 2), ([-1], 1)], ids=lambda value: str(value)
)
def test_calls_that_make_no_sense(tmp_path, numbers, rows):
    parts = open_parts(tmp_path / "s.npz", IDENTITY, 10)
    with pytest.raises(ValueError, match="numbers"):
        parts.write(np.array(numbers), np.zeros((rows, 2, 2, 3), np.uint8))
    parts.write(np.arange(0), np.zeros((0, 2, 2, 3), np.uint8))
    assert len(parts.missing()) == 10
    with pytest.raises(ValueError, match="arr_0"):
        parts.assemble({"arr_1": labels(9)})
