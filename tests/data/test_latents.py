"""Latent folders: what is written is read, sampled anew at each visit, and scaled exactly once."""

import json
from dataclasses import replace

import numpy as np
import pytest

from diffjax import rng
from diffjax.data import latents, records, sources
from diffjax.data.latents import Origin, read_manifest, write_latents
from diffjax.data.pipeline import Stream
from diffjax.errors import UserError
from tests.data import configs
from tests.data.seen import Batches, seen

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
    assert decoded.dtype == np.float16
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
    with pytest.raises(UserError, match=r"latents\.json is missing; .* python -m diffjax encode"):
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
        ({"scale": [0.25, "1"]}, r"scale is \[0.25"),
        ({"scale": [0.25, 0.25, 0.25]}, "scale, shift, input_range of 3, 1, 2 numbers; valid: 1 or 4"),
        ({"shift": [0.0, 0.0]}, "of 1, 2, 2 numbers"),
        ({"input_range": [0.0]}, "of 1, 1, 1 numbers"),
        ({"image": "none"}, 'image is "none"'),
        ({"fingerprint": 1}, "fingerprint is 1"),
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


CHANNELS = {"scale": (0.25, 0.5, 1.0, 2.0), "shift": (1.0, 0.0, -1.0, 0.5)}


def test_channels_are_shifted_and_scaled_each_by_its_own(tmp_path):
    """Latent 3 of channels 0 to 3: (4 - 1) / 4, 4 / 2, (4 + 1) 1, (4 - 0.5) 2."""
    write_latents(tmp_path, examples(views=1, std=0.0), replace(ORIGIN, **CHANNELS))
    source = sources.load(**section(tmp_path, **CHANNELS, flip=False))
    batches = Batches(source, batch_size=COUNT, seed=0, flip=False)
    image = next(batches).x
    batches.close()
    assert image.dtype == np.float32
    (fourth,) = image[np.isclose(image[:, 0, 0, 0], 0.75)]
    np.testing.assert_array_equal(fourth, np.broadcast_to(np.float32([0.75, 2.0, 5.0, 7.0]), SHAPE))
    manifest = read_manifest(tmp_path)
    np.testing.assert_allclose(manifest["mean"], [(5.5 - 1) / 4, 5.5 / 2, 6.5, 10], rtol=1e-6)
    assert source.fingerprint["scale"] == [0.25, 0.5, 1.0, 2.0]
    assert source.fingerprint["shift"] == [1.0, 0.0, -1.0, 0.5]


def test_the_spread_of_scaled_latents_is_in_the_manifest(tmp_path):
    """Means 1 to 10 with std 0.5: variance 8.25 + 0.25, times the scale; nothing is scaled that was already."""
    plain = write_latents(tmp_path / "a", examples(views=1), ORIGIN)
    np.testing.assert_allclose([plain["mean"], plain["std"]], [[5.5 / 4] * 4, [8.5**0.5 / 4] * 4])
    applied = write_latents(tmp_path / "b", examples(views=1), replace(ORIGIN, scale_applied=True))
    np.testing.assert_allclose([applied["mean"], applied["std"]], [[5.5] * 4, [8.5**0.5] * 4])


def test_one_number_for_all_channels_leaves_fingerprints_as_they_were(stored):
    """Those of runs that began before latents could be shifted."""
    fingerprint = sources.load(**section(stored)).fingerprint
    assert fingerprint.keys() == {"name", "split", "classes", "count", "records_sha256", "scale"}
    assert fingerprint["scale"] == 0.25


def test_a_sample_by_hand(stored):
    """Drawn for the number of the batch and the index of the example."""
    source = sources.load(**section(stored))
    given = Stream(source, 5, 7, True, 0, 1)[3]
    assert (given.raw.dtype, given.raw.shape) == (np.float16, (5, 2, *SHAPE))
    key = rng.fold(rng.stream(7, "data"), 3)
    eps = np.asarray(rng.normal(rng.per_example(key, np.arange(5)), SHAPE))
    mean, std = np.moveaxis(given.raw.astype(np.float32), 1, 0)
    np.testing.assert_allclose(seen(source, given, seed=7).x, (mean + std * eps) * 0.25, rtol=1e-6)


def test_manifests_of_earlier_versions_are_read(stored):
    manifest = read_manifest(stored)
    earlier = {
        name: value for name, value in manifest.items() if name not in ("shift", "input_range", "image", "fingerprint")
    }
    (stored / "latents.json").write_text(json.dumps(earlier))
    assert read_manifest(stored) == manifest
    assert len(sources.load(**section(stored)).examples) == COUNT


@pytest.mark.parametrize(
    "leaves, message",
    [
        ({"shift": 0.5}, r"data\.shift=0\.5, but the latents in .* have shift=0\.0"),
        ({"scale": (0.25, 0.25, 0.25, 0.5)}, r"data\.scale=\(0\.25, 0\.25, 0\.25, 0\.5\), but"),
        ({"scale": (0.25, 0.25)}, "data.scale has 2 numbers; valid: 1, or one for each of 4 channels"),
        (
            {"input_range": (0.0, 1.0)},
            r"data\.input_range=\(0\.0, 1\.0\), but .* input_range=\[-1\.0, 1\.0\]",
        ),
        ({"input_range": (1.0, -1.0)}, "valid: the lowest and the highest value"),
        ({"images": True}, "have no images beside them; make them with encode --keep_images"),
    ],
)
def test_leaves_that_contradict_the_manifest(stored, leaves, message):
    with pytest.raises(UserError, match=message):
        sources.load(**section(stored, **leaves))


def test_one_number_means_the_same_for_every_channel(stored):
    assert sources.load(**section(stored, scale=(0.25,) * 4)).fingerprint == sources.load(**section(stored)).fingerprint


def test_records_with_images_round_trip():
    image = np.arange(5 * 7 * 3, dtype=np.uint8).reshape(5, 7, 3)
    record = records.encode(moments(3), 7, image)
    assert len(record) == len(records.encode(moments(3), 7)) + image.size
    decoded, label = records.decode(record, SHAPE, image.shape)
    np.testing.assert_array_equal(decoded, moments(3))
    assert label == 7
    np.testing.assert_array_equal(records.decode_image(record, image.shape), image)
    for other in (None, (5, 7, 1)):
        with pytest.raises(UserError, match="not a latent record"):
            records.decode(record, SHAPE, other)


def test_records_without_images_are_those_of_the_first_version():
    record = records.encode(np.full((1, 2, 1, 1, 1), 1.5, np.float32), 258)
    assert record == b"DJXL" + bytes([1, 0, 1, 0, 2, 1, 0, 0, 0, 0x3E, 0, 0x3E])


def test_a_run_that_drew_its_samples_otherwise_continues_and_says_so(stored, caplog):
    """Earlier versions drew them on the host, and said nothing of how."""
    source = sources.load(**section(stored))
    batches, pixels = (Batches(each, batch_size=4, seed=0, flip=False) for each in (source, sources.digits()))
    fingerprint = dict(batches.get_state()["fingerprint"])
    assert fingerprint.pop("draws") == "threefry"
    with caplog.at_level("INFO"):
        batches.set_state({"next_batch": 2, "fingerprint": fingerprint})
    assert "it continues with new draws" in caplog.text
    assert "draws" not in pixels.get_state()["fingerprint"]
    batches.close()
    pixels.close()
