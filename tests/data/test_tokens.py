"""Folders of tokens: what is written is read, of the view that the draw asks for, and mismatches are refused."""

import json
from dataclasses import replace

import numpy as np
import pytest

from diffjax.contracts import Condition
from diffjax.data import sources, tokens
from diffjax.data.tokens import Codebook, Origin, write_tokens
from diffjax.errors import UserError
from tests.data import configs
from tests.data.seen import Batches

COUNT, GRID = 10, 3
PIXELS = Codebook({"name": "pixels", "patch": 2}, vocabulary=50, codebook_sha256="0" * 64, grid=GRID)
DECODER = Codebook({"name": "vqgan", "weights_sha256": "1" * 64}, vocabulary=1000, codebook_sha256="2" * 64, grid=GRID)
ORIGIN = Origin((PIXELS, DECODER), {"name": "synthetic"}, num_classes=5)


def ids(number: int, views: int = 2) -> np.ndarray:
    """[views, codebooks, n]: token = number, + 10 for the mirrored image, + 100 for the decoder."""
    return np.full((views, 2, GRID**2), number) + 10 * np.arange(views)[:, None, None] + 100 * np.arange(2)[:, None]


def section(root, **leaves):
    common = {"size": GRID, "channels": 1, "num_classes": 5, "dir": str(root), "flip": True}
    return configs.section(
        "tokens", **(common | {"encoder": "pixels", "vocabulary": 50, "decoder_vocabulary": 1000} | leaves)
    )


@pytest.fixture
def stored(tmp_path, monkeypatch):
    monkeypatch.setattr(tokens, "SHARD_SIZE", 4)
    write_tokens(tmp_path, [(ids(number), number % 5) for number in range(COUNT)], ORIGIN)
    return tmp_path


def test_what_is_written_is_read(stored):
    assert len(list(stored.glob("*.array_record"))) == 3
    source = sources.load(**section(stored, channels=2))
    for number in range(COUNT):
        np.testing.assert_array_equal(source.examples[number]["image"], ids(number))
        assert source.examples[number]["label"] == number % 5
    assert source.examples[0]["image"].dtype == np.int32


def test_a_batch_has_the_view_that_was_drawn_and_the_codebooks_asked_for(stored):
    batches = Batches(sources.load(**section(stored)), batch_size=8, seed=0, flip=True)
    batch = next(batches)
    batches.close()
    assert (batch.x.shape, batch.x.dtype) == ((8, GRID**2), np.int32)
    values = batch.x[:, 0]
    np.testing.assert_array_equal(batch.x, values[:, None].repeat(GRID**2, axis=1))
    np.testing.assert_array_equal(values % 10 % 5, batch.condition)
    assert 0 < np.sum(values >= 10) < 8


def test_tokens_of_a_decoder_are_conditioned_on_those_of_features(stored):
    source = sources.load(**section(stored, channels=2))
    assert source.condition == Condition("tokens", 50, (GRID**2,))
    batches = Batches(source, batch_size=8, seed=0, flip=True)
    batch = next(batches)
    batches.close()
    assert (batch.condition.shape, batch.condition.dtype) == ((8, GRID**2), np.int32)
    np.testing.assert_array_equal(batch.x, batch.condition + 100)
    assert 0 < np.sum(batch.condition[:, 0] >= 10) < 8


@pytest.mark.parametrize(
    "leaves, match",
    [
        ({"encoder": "dinov2"}, "data.encoder=dinov2, not pixels"),
        ({"vocabulary": 64}, "data.vocabulary=64, not 50"),
        ({"channels": 2, "decoder_vocabulary": 1024}, "data.decoder_vocabulary=1024, not 1000"),
        ({"channels": 3}, "have 2 codebook"),
        ({"size": 4}, "data.size=4, but tokens has size=3"),
        ({"num_classes": 4}, "data.num_classes=4, but tokens has num_classes=5"),
        ({"dir": "nowhere"}, "python -m diffjax tokenize"),
    ],
)
def test_a_manifest_that_is_not_what_the_config_says(stored, leaves, match):
    with pytest.raises(UserError, match=match):
        sources.load(**section(stored, **leaves))


def test_mirrored_tokens_are_asked_for_and_missing(tmp_path):
    write_tokens(tmp_path, [(ids(0, views=1), 0)], ORIGIN)
    with pytest.raises(UserError, match="no tokens of mirrored images"):
        sources.load(**section(tmp_path))


def test_a_missing_shard_and_a_foreign_record(stored):
    (stored / "tokens-00001.array_record").unlink()
    with pytest.raises(UserError, match="lacks tokens-00001"):
        sources.load(**section(stored))
    with pytest.raises(UserError, match="not a record of tokens .* starts with b'JUNK'"):
        tokens.decode(b"JUNK" + tokens.encode(ids(0), 0, 2, ORIGIN)[4:], (2, 2, GRID**2))


def test_a_stored_token_that_its_manifest_does_not_know(stored):
    path = stored / tokens.MANIFEST
    manifest = json.loads(path.read_text())
    manifest["streams"][0]["codes"] = 15
    path.write_text(json.dumps(manifest))
    source = sources.load(**section(stored, vocabulary=15))
    assert source.examples[4]["image"].max() == 14
    with pytest.raises(UserError, match="record 5 holds token 15, but its manifest has a vocabulary of 15"):
        source.examples[5]
    batches = Batches(source, batch_size=COUNT, seed=0, flip=False)
    with pytest.raises(UserError, match="but its manifest has a vocabulary of 15"):
        next(batches)
    batches.close()


@pytest.mark.parametrize(
    "values, label, match",
    [
        (ids(50), 0, r"token 60 is outside the vocabulary of 50"),
        (-1 - ids(0), 0, r"token -11 is outside"),
        (ids(0)[:, :1], 0, r"tokens have shape \(2, 1, 9\); expected .* \(2, 2, 9\)"),
        (ids(0), 5, r"label 5 is outside the 5 classes"),
    ],
)
def test_refusals_when_writing(values, label, match):
    with pytest.raises(UserError, match=match):
        tokens.encode(values, label, 2, ORIGIN)


def test_tokens_of_other_images_are_of_the_same_kind_and_those_of_another_codebook_are_not(stored, tmp_path):
    trained = tokens.kinds(tokens.read_manifest(stored), 2)
    (tmp_path / "others").mkdir()
    write_tokens(tmp_path / "others", [(ids(1), 1)], replace(ORIGIN, images={"name": "others"}))
    assert tokens.check_kinds(tmp_path / "others", trained)["images"] == {"name": "others"}
    one_stream = {"features": trained["features"]}
    assert tokens.check_kinds(stored, one_stream)["count"] == COUNT
    for stream, change in (
        ("features", {"grid": 4}),
        ("decoder", {"codes": 1001}),
        ("decoder", {"codebook_sha256": "3"}),
    ):
        other = trained | {stream: trained[stream] | change}
        name = f"{stream}.{next(iter(change))} was {next(iter(change.values()))} and is "
        with pytest.raises(UserError, match=name):
            tokens.check_kinds(stored, other)


@pytest.mark.parametrize(
    "change, match",
    [
        ({"encoder": {"name": "pixels", "patch": 4}}, "source.codes.features.encoder.patch was 2 and is 4"),
        ({"codebook_sha256": "3"}, "source.codes.features.codebook_sha256 was 0+ and is 3"),
    ],
)
def test_a_run_does_not_go_on_with_tokens_of_another_kind(stored, change, match):
    batches = Batches(sources.load(**section(stored)), batch_size=2, seed=0, flip=False)
    state = json.loads(json.dumps(batches.get_state()))
    other = replace(ORIGIN, codebooks=(replace(PIXELS, **change), DECODER))
    write_tokens(stored, [(ids(number), number % 5) for number in range(COUNT)], other)
    again = Batches(sources.load(**section(stored)), batch_size=2, seed=0, flip=False)
    with pytest.raises(UserError, match=match):
        again.set_state(state)
    for stream in (batches, again):
        stream.close()
