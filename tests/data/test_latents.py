"""Latent folders: what is written is read, sampled anew at each visit, and scaled exactly once."""

import json
import subprocess
import sys
from dataclasses import replace

import numpy as np
import pytest

from diffjax.data import latents, records, sources
from diffjax.data.latents import Origin, read_manifest, write_latents
from diffjax.data.pipeline import Batches
from diffjax.errors import UserError
from tests.data import configs

COUNT, SHAPE = 10, (6, 6, 4)
ORIGIN = Origin(
    source="synthetic",
    autoencoder="none",
    weights_sha256="0" * 64,
    input_range=(-1.0, 1.0),
    scale=0.25,
    scale_applied=False,
    num_classes=5,
    label_table_sha256="",
)


def moments(number: int, views: int = 2, std: float = 0.5) -> np.ndarray:
    """Mean = number + 1 (negative for the mirror), standard deviation `std`: all exact in float16."""
    means = np.stack([np.full(SHAPE, number + 1.0), np.full(SHAPE, -number - 1.0)])[:views]
    return np.stack([means, np.full_like(means, std)], axis=1).astype(np.float32)


def examples(views: int = 2, std: float = 0.5):
    return [(moments(number, views, std), number % 5) for number in range(COUNT)]


def section(root, **leaves):
    common = {"size": 6, "channels": 4, "num_classes": 5, "dir": str(root), "split": "", "scale": 0.25, "flip": True}
    return configs.section("latents", **(common | leaves))


@pytest.fixture
def stored(tmp_path, monkeypatch):
    monkeypatch.setattr(latents, "SHARD_SIZE", 4)
    write_latents(tmp_path / "latents", examples(), ORIGIN)
    return tmp_path / "latents"


def test_records_round_trip():
    record = records.encode(moments(3), 7)
    assert len(record) == 12 + 2 * 2 * 6 * 6 * 4 * 2
    decoded, label = records.decode(record, SHAPE)
    np.testing.assert_array_equal(decoded, moments(3))
    assert decoded.dtype == np.float32
    assert label == 7


def test_records_refuse_what_they_cannot_hold_or_read():
    for wrong in (70_000, np.nan):
        with pytest.raises(UserError, match="65504"):
            records.encode(np.full((1, 2, 1, 1, 1), wrong), 0)
    with pytest.raises(UserError, match=r"not a latent record .* starts with b'DJXL'"):
        records.decode(records.encode(moments(0), 0), (3, 3, 4))
    with pytest.raises(UserError, match=r"starts with b'JUNK'"):
        records.decode(b"JUNK" + records.encode(moments(0), 0)[4:], SHAPE)


def test_shards_and_manifest(stored):
    manifest = read_manifest(stored)
    assert manifest["shards"] == [f"latents-0000{i}.array_record" for i in range(3)]
    assert (manifest["count"], manifest["views"], manifest["shape"]) == (COUNT, 2, list(SHAPE))
    assert (manifest["scale"], manifest["scale_applied"], manifest["autoencoder"]) == (0.25, False, "none")
    source = sources.load(**section(stored))
    for number in range(COUNT):
        np.testing.assert_array_equal(source.examples[number]["image"], moments(number))
        assert source.examples[number]["label"] == number % 5


def test_samples_have_the_stored_moments_and_are_new_at_each_visit(stored):
    batches = Batches(sources.load(**section(stored)), batch_size=COUNT, seed=0, flip=False)
    visits = [next(batches) for _ in range(40)]
    batches.close()
    eps: dict[int, list[np.ndarray]] = {number: [] for number in range(COUNT)}
    for visit in visits:
        assert visit.x.dtype == np.float32
        for image in visit.x:
            number = round(image.mean() / 0.25) - 1
            eps[number].append((image / 0.25 - (number + 1)) / 0.5)
    values = np.array(list(eps.values()))  # [example, visit, h, w, c]: one visit of each example per epoch
    assert values.shape == (COUNT, 40, *SHAPE)
    assert abs(values.mean()) < 4 / np.sqrt(values.size)
    assert abs(values.std() - 1) < 4 / np.sqrt(2 * values.size)
    assert len(np.unique(values[..., 0, 0, 0])) > 0.99 * COUNT * 40


def test_the_mirror_is_the_stored_one(stored):
    batches = Batches(sources.load(**section(stored)), batch_size=100, seed=0, flip=True)
    batch = next(batches)
    batches.close()
    means = np.rint(batch.x.mean((1, 2, 3)) / 0.25).astype(int)
    assert 20 < (means < 0).sum() < 80
    np.testing.assert_array_equal(batch.condition, (np.abs(means) - 1) % 5)


@pytest.mark.parametrize("hosts, workers", [(2, 0), (1, 1)])
def test_samples_depend_on_neither_hosts_nor_workers(stored, hosts, workers):
    source = sources.load(**section(stored))

    def first(index: int, count: int, workers: int) -> np.ndarray:
        batches = Batches(
            source, batch_size=8, seed=0, flip=True, workers=workers, process_index=index, process_count=count, start=3
        )
        image = next(batches).x
        batches.close()
        return image

    straight = first(0, 1, 0)
    for index in range(hosts):
        np.testing.assert_array_equal(first(index, hosts, workers), straight[index::hosts])


def test_an_applied_scale_is_not_applied_again(tmp_path):
    write_latents(tmp_path, examples(std=0.0), replace(ORIGIN, scale_applied=True))
    batches = Batches(sources.load(**section(tmp_path)), batch_size=COUNT, seed=0, flip=False)
    image = next(batches).x
    batches.close()
    assert sorted(image[:, 0, 0, 0]) == list(range(1, COUNT + 1))


def test_unlabelled_and_fingerprint(stored, tmp_path):
    source = sources.load(**section(stored, num_classes=0))
    assert {source.examples[i]["label"] for i in range(COUNT)} == {0}
    write_latents(tmp_path / "other", examples()[::-1], ORIGIN)
    assert sources.load(**section(tmp_path / "other")).fingerprint != sources.load(**section(stored)).fingerprint
    with pytest.raises(UserError, match="holds no pixels"):
        sources.arrays(source)


def test_refusals_when_reading(stored, tmp_path):
    with pytest.raises(UserError, match=r"latents\.json is missing; .* python -m diffjax\.data\.latents --features"):
        sources.load(**section(tmp_path / "missing"))
    with pytest.raises(UserError, match=r"data\.scale=0\.18215, but the latents .* scale=0\.25"):
        sources.load(**section(stored, scale=0.18215))
    with pytest.raises(UserError, match=r"data\.size=32, but latents has size=6"):
        sources.load(**section(stored, size=32))
    write_latents(tmp_path / "plain", examples(views=1), ORIGIN)
    with pytest.raises(UserError, match="hold no mirror images"):
        sources.load(**section(tmp_path / "plain"))
    manifest = read_manifest(stored)
    (stored / "latents.json").write_text(json.dumps(manifest | {"shards": manifest["shards"][:2]}))
    with pytest.raises(UserError, match="holds 8 records, its manifest says 10"):
        sources.load(**section(stored))


@pytest.mark.parametrize("name", ["../elsewhere/latents-00000.array_record", "/etc/latents.array_record", "..", ""])
def test_shards_lie_beside_their_manifest(stored, name):
    manifest = read_manifest(stored)
    (stored / "latents.json").write_text(json.dumps(manifest | {"shards": [name]}))
    with pytest.raises(UserError, match=r"latents\.json names the shard .*; valid: names of files beside it"):
        sources.load(**section(stored))


@pytest.mark.parametrize(
    "change, message",
    [
        ({"count": "10"}, 'count is "10"'),
        ({"count": -1}, "count is -1"),
        ({"shards": "latents-00000.array_record"}, "shards is no list of values"),
        ({"shards": [3]}, r"shards\[0\] is 3"),
        ({"scale": None}, "scale is null"),
        ({"views": 3}, "views 3, shape"),
        ({"shape": [6, 6]}, r"shape \[6, 6\]; valid: 1 or 2, and \[h, w, c\]"),
        ({"num_classes": True}, "num_classes is true"),
    ],
)
def test_a_manifest_of_other_contents_is_refused(stored, change, message):
    (stored / "latents.json").write_text(json.dumps(read_manifest(stored) | change))
    with pytest.raises(UserError, match=rf"latents\.json.*{message}"):
        sources.load(**section(stored))


def test_a_manifest_without_a_field_is_refused(stored):
    manifest = read_manifest(stored)
    for text in (json.dumps({name: value for name, value in manifest.items() if name != "scale"}), "[]"):
        (stored / "latents.json").write_text(text)
        with pytest.raises(UserError, match=r"is no manifest of latents: (scale is missing|it is no table)"):
            sources.load(**section(stored))


def test_refusals_when_writing(stored, tmp_path):
    with pytest.raises(UserError, match="already holds latents.json"):
        write_latents(stored, examples(), ORIGIN)
    with pytest.raises(UserError, match="no latents to write"):
        write_latents(tmp_path / "a", [], ORIGIN)
    with pytest.raises(UserError, match=r"label 3 is outside the 3 classes"):
        write_latents(tmp_path / "b", examples(), replace(ORIGIN, num_classes=3))
    with pytest.raises(UserError, match=r"the same for all: \(2, 2, 6, 6, 4\)"):
        write_latents(tmp_path / "c", examples() + examples(views=1), ORIGIN)
    for folder in "abc":
        assert not (tmp_path / folder / "latents.json").exists()


@pytest.fixture
def fast_dit(tmp_path):
    """Twelve features, so that sorting names as strings would misplace 10 and 11."""
    features, labels = tmp_path / "imagenet256_features", tmp_path / "imagenet256_labels"
    for folder in (features, labels):
        folder.mkdir()
    for number in range(12):
        latent = np.arange(4 * 6 * 6, dtype=np.float32).reshape(1, 4, 6, 6) / 64 + number
        np.save(features / f"{number}.npy", latent)
        np.save(labels / f"{number}.npy", np.array([number % 5]))
    return features, labels


def convert(features, labels, out):
    return latents.main(
        [f"--features={features}", f"--labels={labels}", f"--out={out}", "--num_classes=5", "--scale=0.25"]
    )


def test_fast_dit_layout(fast_dit, tmp_path, capsys):
    features, labels = fast_dit
    assert convert(features, labels, tmp_path / "out") == 0
    assert capsys.readouterr().out.startswith("12 latents of shape [6, 6, 4] in 1 shards")
    source = sources.load(**section(tmp_path / "out", flip=False))
    for number in range(12):
        stored = source.examples[number]
        expected = np.load(features / f"{number}.npy")[0].transpose(1, 2, 0)
        np.testing.assert_array_equal(stored["image"], np.stack([expected, np.zeros_like(expected)])[None])
        assert stored["label"] == number % 5
    batches = Batches(source, batch_size=12, seed=0, flip=False)
    assert sorted(np.floor(next(batches).x[:, 0, 0, 0])) == list(range(12))  # unscaled, no noise
    batches.close()


def test_fast_dit_refusals(fast_dit, tmp_path, capsys):
    features, labels = fast_dit
    (labels / "11.npy").unlink()
    assert convert(features, labels, tmp_path / "out") == 2
    assert "12 features in" in (said := capsys.readouterr().err)
    assert "11.npy is in one folder only" in said
    np.save(labels / "11.npy", np.array([0, 1]))
    with pytest.raises(UserError, match=r"label \(2,\); expected \(1, c, h, w\) and \(1,\)"):
        list(latents.fast_dit(features, labels))
    np.save(labels / "0.npy", np.array([{}], object), allow_pickle=True)
    with pytest.raises(UserError, match=r"0\.npy .* cannot be read"):
        list(latents.fast_dit(features, labels))
    np.save(features / "last.npy", np.zeros(1))
    with pytest.raises(UserError, match=r"last\.npy .* is not named by a number"):
        list(latents.fast_dit(features, labels))
    with pytest.raises(UserError, match="no such folder"):
        list(latents.fast_dit(tmp_path / "missing", labels))


def test_a_url_is_no_folder(fast_dit, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert convert(*fast_dit, "gs://bucket/out") == 2
    assert "only local and mounted paths" in capsys.readouterr().err
    assert not (tmp_path / "gs:").exists()


def test_the_command_runs(fast_dit, tmp_path):
    command = [sys.executable, "-m", "diffjax.data.latents", f"--features={fast_dit[0]}", f"--labels={fast_dit[1]}"]
    result = subprocess.run([*command, f"--out={tmp_path / 'out'}"], capture_output=True, text=True)
    assert (result.returncode, result.stderr) == (0, "")
    assert read_manifest(tmp_path / "out")["scale"] == 0.18215
