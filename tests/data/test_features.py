"""Feature folders that others published become latents of the right scale."""

import os

import numpy as np
import pytest

from diffjax.__main__ import main
from diffjax.data import features, latents, layouts, records
from diffjax.data.features import convert
from diffjax.data.latents import read_manifest
from diffjax.errors import UserError
from tests.data.released_features import (
    MAKERS,
    SD,
    STD,
    C,
    H,
    edm2,
    frozen,
    last,
    named,
    npy,
    opened,
    u_vit,
    udit,
    va_vae,
    write_members,
)
from tests.data.seen import Batches


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
