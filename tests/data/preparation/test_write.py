"""Writing of records: whole or not there, the same bytes after an interruption, no mixture of requests."""

import json
import shutil
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import PIL
import pytest

from diffjax.data import image_records, shards
from diffjax.data.preparation import datasets, originals, write
from diffjax.errors import UserError
from tests.data.preparation.originals import encoded, picture, prepare, publish, refusal, stored, write_tree
from tests.data.preparation.test_containers import zip_of

FLAGS = ("--size=8", "--rule=adm", "--decode=stored")
COUNT, SHARD = 10, 4


@pytest.fixture
def origin(tmp_path, monkeypatch):
    monkeypatch.setattr(image_records, "SHARD_BYTES", SHARD * 8 * 8 * 3)
    return write_tree(tmp_path / "in", {f"{i % 2}/{i}.png": encoded(picture(i, 9, 9), "png") for i in range(COUNT)})


def contents(out):
    return {path.name: path.read_bytes() for path in out.iterdir() if path.name != ".lock"}


class Cut(Exception):
    pass


def test_an_interrupted_preparation_goes_on(origin, tmp_path, monkeypatch):
    """Whole shards stay, the others are made: the same files, manifest included, as without the interruption."""
    whole = prepare("images", origin, tmp_path / "whole", *FLAGS)
    assert sorted(contents(whole)) == [f"images-0000{i}.array_record" for i in range(3)] + ["images.json"]
    made, written = write.record, shards.write_shard

    def cut_in_the_second(*given):
        if given[-1] == SHARD + 2:
            raise Cut
        return made(*given)

    out = tmp_path / "out"
    with monkeypatch.context() as patch:
        patch.setattr(write, "record", cut_in_the_second)
        with pytest.raises(Cut):
            prepare("images", origin, out, *FLAGS)
    assert (out / "images-00000.array_record").exists()
    assert not (out / "images-00001.array_record").exists()
    assert not (out / "images.json").exists()
    paths = []

    def noted(path, *rest):
        paths.append(path.name)
        return written(path, *rest)

    monkeypatch.setattr(shards, "write_shard", noted)
    prepare("images", origin, out, *FLAGS)
    assert paths == ["images-00001.array_record", "images-00002.array_record"]
    assert contents(out) == contents(whole)


def test_the_number_of_threads_changes_nothing(origin, tmp_path):
    one = prepare("images", origin, tmp_path / "one", *FLAGS, "--threads=1")
    many = prepare("images", origin, tmp_path / "many", *FLAGS, "--threads=16")
    assert contents(one) == contents(many)


def begun(origin, tmp_path, monkeypatch):
    """A folder in which the first shard is there."""
    out = tmp_path / "begun"

    def stop(*_):
        raise Cut

    with monkeypatch.context() as patch:
        patch.setattr(image_records, "finish", stop)
        with pytest.raises(Cut):
            prepare("images", origin, out, *FLAGS)
    (out / "images-00001.array_record").unlink()
    return out


def test_another_request_is_not_mixed_in(origin, tmp_path, capsys, monkeypatch):
    out = begun(origin, tmp_path, monkeypatch)
    line = refusal(capsys, "images", origin, out, "--size=8", "--rule=edm-crop", "--decode=stored")
    assert "holds shards of another request (rule differ); choose another folder" in line
    with monkeypatch.context() as patch:
        patch.setattr(PIL, "__version__", "9.5.0")
        assert "(pillow differ)" in refusal(capsys, "images", origin, out, *FLAGS)
    changed = next(iter(sorted(origin.rglob("*.png"))))
    before = changed.read_bytes()
    changed.write_bytes(before + b"more")
    assert "(source differ)" in refusal(capsys, "images", origin, out, *FLAGS)
    changed.write_bytes(before)
    (tmp_path / "none").mkdir()
    (tmp_path / "none" / write.REQUEST).write_text("{}")  # of another request, of which no shard is there
    prepare("images", origin, tmp_path / "none", *FLAGS)
    moved = shutil.move(origin, tmp_path / "moved")  # which is no other request
    prepare("images", moved, out, *FLAGS)


def test_folders_that_do_not_say_of_what(origin, tmp_path, capsys, monkeypatch):
    out = begun(origin, tmp_path, monkeypatch)
    (out / write.REQUEST).write_text("{")
    assert "prepare.json is damaged" in refusal(capsys, "images", origin, out, *FLAGS)
    (out / write.REQUEST).unlink()
    line = refusal(capsys, "images", origin, out, *FLAGS)
    assert "holds images-00000.array_record and does not say of what; remove such files" in line


def test_damaged_shards_are_named(origin, tmp_path, capsys, monkeypatch):
    out = begun(origin, tmp_path, monkeypatch)
    path = out / "images-00000.array_record"
    before = path.read_bytes()
    path.write_bytes(before[:-10])
    line = refusal(capsys, "images", origin, out, *FLAGS)
    assert "images-00000.array_record is damaged; remove it and make it again" in line
    shutil.copy(out / "images-00002.array_record", path)
    assert "holds 8 of 10 images; remove its shards and make them again" in refusal(
        capsys, "images", origin, out, *FLAGS
    )


def test_a_finished_folder_is_left_alone(origin, tmp_path, capsys):
    out = prepare("images", origin, tmp_path / "out", *FLAGS)
    before = contents(out)
    with pytest.raises(UserError, match="already holds images.json; remove it or choose another folder"):
        shards.make_folder(out, image_records.MANIFEST)
    assert contents(out) == before


def test_a_full_disk_is_one_line(origin, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(image_records, "SHARD_BYTES", 2**28)
    flags = ("--size=64", "--rule=adm", "--decode=stored")
    out = tmp_path / "out"
    out.mkdir()
    (out / "images-00000.unfinished").symlink_to("/dev/full")
    assert "images-00000.array_record cannot be written: " in refusal(capsys, "images", origin, out, *flags)
    assert not (out / "images-00000.array_record").exists()


def test_what_is_under_way_ends_with_an_error():
    """An error of one image cancels what was waiting: no later one is begun."""
    begun = []

    def fail(number):
        begun.append(number)
        if number == 3:
            raise UserError("damaged")
        return b""

    with pytest.raises(UserError, match="damaged"), ThreadPoolExecutor(1) as pool:
        list(write.in_turn(pool, fail, range(10_000), ahead=8))
    assert max(begun) < 30


def test_the_manifest_says_what_was_done(origin, tmp_path):
    manifest = stored(prepare("images", origin, tmp_path / "out", *FLAGS))[2]
    described = {"dataset": "images", "split": "train", "size": 8, "rule": "adm", "decode": "stored", "partial": False}
    assert {**manifest, **described} == manifest
    assert manifest["pillow"] == PIL.__version__
    assert json.loads((tmp_path / "out" / "images.json").read_text()) == manifest


def test_large_archives_are_known_by_their_images(tmp_path, monkeypatch):
    path = tmp_path / "a.tar"
    path.write_bytes(b"some")
    monkeypatch.setattr(originals, "HASHED", 7)
    hashed = {
        "name": "a.tar",
        "bytes": 4,
        "sha256": "a6b46dd0d1ae5e86cbc8f37e75ceeb6760230c1ca4ffbcb0c97b96dd7d9c464b",
        "md5": "03d59e663c1af9ac33a9949d1193505a",
    }
    assert originals.describe([path]) == [hashed]
    assert originals.describe([path, path]) == 2 * [hashed | {"sha256": None, "md5": None}]  # 8 bytes together
    digests = {
        originals.index_sha256(names, np.array(labels), sizes)
        for names, labels, sizes in (
            (["a", "b"], [0, 1], [5, 6]),
            (["a", "c"], [0, 1], [5, 6]),
            (["a", "b"], [0, 2], [5, 6]),
            (["a", "b"], [0, 1], [5, 7]),
            (["b", "a"], [1, 0], [6, 5]),
        )
    }
    assert len(digests) == 5


@pytest.mark.parametrize("change", ["none", "bytes", "sha256"])
def test_files_that_are_not_the_published_ones_are_named(origin, tmp_path, monkeypatch, capsys, change):
    archive = tmp_path / "in.zip"
    archive.write_bytes(zip_of({path.name: path.read_bytes() for path in origin.rglob("*.png")}))
    [found] = originals.describe([archive])
    file = datasets.File("in.zip", found["bytes"] + (change == "bytes"), found["sha256"], found["md5"])
    if change == "sha256":
        file = file._replace(sha256="0" * 64)
    publish(monkeypatch, "images", files=(file,))
    manifest = stored(prepare("images", archive, tmp_path / "out", *FLAGS))[2]
    assert manifest["source"]["not_as_published"] == ([] if change == "none" else ["in.zip"])
    line = "in.zip is not the published file, by its size or hash"
    assert (line in capsys.readouterr().out) == (change != "none")
