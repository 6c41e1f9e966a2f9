"""`encode`: the latents are the autoencoder's, once each, also after an interruption; a model trains on them."""

import json
import shutil

import numpy as np
import pytest

from diffjax.__main__ import main
from diffjax.data import draws, latents, records, shards, sources
from diffjax.errors import UserError
from diffjax.frozen import create
from diffjax.methods.latents import load_decoder
from diffjax.sampling.samples import read_samples
from diffjax.weights import autoencoders, store
from diffjax.weights.autoencoders import Autoencoder
from tests.data import configs
from tests.data.seen import Batches
from tests.frozen.test_vae import some_params
from tests.programs import TINY

VAE = {"channels": 1, "widths": (8, 8), "depth": 1, "groups": 4, "scale": 0.5}
SHARD = 600  # of 1,500 images
LEAVES = (
    *("images.name=digits", "images.size=8", "images.channels=1", "images.num_classes=10"),
    *("data.name=latents", "data.split=", "data.size=4", "data.channels=4", "data.scale=0.5", "data.flip=true"),
    "data.num_classes=10",
    *("model.patch=2", "sampling.clip=false", "evals.samples.every_steps=0", "log.tensorboard=false"),
)


def given(*leaves):
    return [f"--config={TINY}", *(f"--config.{leaf}" for leaf in (*LEAVES, *leaves))]


def run(vae, out, *leaves, batch_size=64, flags=()):
    arguments = given(f"autoencoder.weights={vae}", *leaves)
    return main(["encode", *arguments, f"--out={out}", f"--batch_size={batch_size}", *flags])


@pytest.fixture(scope="module")
def vae(tmp_path_factory):
    folder = tmp_path_factory.mktemp("vae") / "vae"
    module = create("VAE", **VAE)
    store.save(folder, module, some_params(module), {})
    return folder


@pytest.fixture(scope="module")
def encoded(vae, tmp_path_factory):
    out = tmp_path_factory.mktemp("encoded") / "latents"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(latents, "SHARD_SIZE", SHARD)
        assert run(vae, out) == 0
    return out


def stored(out):
    manifest = latents.read_manifest(out)
    found = shards.open_records(out, manifest)
    pairs = [records.decode(found[i], tuple(manifest["shape"])) for i in range(len(found))]
    return np.stack([moments for moments, _ in pairs]), np.array([label for _, label in pairs]), manifest


def test_latents_are_those_of_the_autoencoder(vae, encoded):
    """Also of the mirrored images; to float16, in the order of the images."""
    moments, labels, manifest = stored(encoded)
    images, expected = sources.arrays(sources.load(**configs.digits()))
    np.testing.assert_array_equal(labels, expected)
    module, params, model = store.load(vae)
    for view, pixels in enumerate((images, images[:, :, ::-1])):
        mean, log_variance = module.apply({"params": params}, pixels / np.float32(127.5) - 1, method="encode")
        np.testing.assert_allclose(moments[:, view, 0], mean, rtol=1e-3, atol=1e-4)
        np.testing.assert_allclose(moments[:, view, 1], np.exp(log_variance / 2), rtol=1e-3, atol=1e-4)
    assert (manifest["views"], manifest["count"], manifest["shape"]) == (2, 1500, [4, 4, 4])
    assert manifest["shards"] == [f"latents-0000{i}.array_record" for i in range(3)]
    assert (manifest["scale"], manifest["scale_applied"], manifest["num_classes"]) == (0.5, False, 10)
    assert manifest["weights_sha256"] == model["sha256"]
    assert manifest["encoder_sha256"] == autoencoders.encoder_sha256(params)
    assert manifest["autoencoder"].startswith("VAE(channels=1, latent_channels=4, widths=(8, 8), ")
    assert json.loads(manifest["source"])["name"] == "digits"
    draws = moments[:, :, 0] + moments[:, :, 1] * np.random.default_rng(0).standard_normal(moments[:, :, 0].shape)
    np.testing.assert_allclose(manifest["mean"], 0.5 * draws.mean(axis=(0, 1, 2, 3)), atol=0.01)
    np.testing.assert_allclose(manifest["std"], 0.5 * draws.std(axis=(0, 1, 2, 3)), rtol=0.02)
    assert sorted(path.name for path in encoded.iterdir()) == [".lock", *manifest["shards"], latents.MANIFEST]


def test_an_interrupted_encoding_goes_on(vae, encoded, tmp_path, monkeypatch):
    """Whole shards stay, the one that was being written is made anew: the same files in the end."""
    monkeypatch.setattr(latents, "SHARD_SIZE", SHARD)

    class Cut(Exception):
        pass

    write, written = shards.write_shard, []

    def write_or_cut(path, encoded_records, digest=None):
        written.append(path.name)
        if len(written) == 2:
            write(path.with_name("other"), (next(encoded_records) for _ in range(100)))
            raise Cut
        return write(path, encoded_records, digest)

    monkeypatch.setattr(shards, "write_shard", write_or_cut)
    with pytest.raises(Cut):
        run(vae, tmp_path / "out")
    assert not (tmp_path / "out" / latents.MANIFEST).exists()
    (tmp_path / "out/latents-00001.unfinished").write_bytes(b"half")
    (tmp_path / "out/other").unlink()
    assert run(vae, tmp_path / "out") == 0
    assert written == [f"latents-0000{i}.array_record" for i in (0, 1, 1, 2)]
    assert latents.read_manifest(tmp_path / "out") == latents.read_manifest(encoded)
    names = {path.name for path in encoded.iterdir()}
    assert {path.name for path in (tmp_path / "out").iterdir()} == names
    for name in names:
        assert (tmp_path / "out" / name).read_bytes() == (encoded / name).read_bytes(), name


@pytest.mark.slow
def test_batches_change_nothing_but_rounding(vae, encoded, tmp_path, monkeypatch):
    monkeypatch.setattr(latents, "SHARD_SIZE", SHARD)
    assert run(vae, tmp_path / "out", batch_size=56) == 0
    for ours, theirs in zip(stored(tmp_path / "out")[:2], stored(encoded)[:2]):
        np.testing.assert_allclose(ours, theirs, rtol=2e-3, atol=2e-4)


@pytest.mark.slow
def test_a_model_trains_on_them_and_makes_pictures(vae, encoded, tmp_path):
    leaves = given(f"data.dir={encoded}", f"autoencoder.weights={vae}", "total_steps=2", "ema.decay=0.5")
    assert main(["train", *leaves, f"--workdir={tmp_path / 'run'}"]) == 0
    assert main(["sample", f"--workdir={tmp_path / 'run'}", "--num=4", f"--out={tmp_path / 's.npz'}"]) == 0
    images, labels, made = read_samples(tmp_path / "s.npz")
    assert images.shape == (4, 8, 8, 3)  # grey pictures in three channels
    np.testing.assert_array_equal(labels, np.arange(4))
    assert made["autoencoder_sha256"] == store.load(vae)[2]["sha256"]
    again = given(
        "images.split=test", f"data.dir={encoded}", f"autoencoder.weights={vae}", "total_steps=2", "ema.decay=0.5"
    )
    assert main(["train", *again, f"--workdir={tmp_path / 'run'}"]) == 0  # it does not look at images


def test_what_does_not_fit_costs_nothing(vae, encoded, tmp_path, capsys):
    def error(*leaves, out=tmp_path / "out"):
        assert run(vae, out, *leaves) == 2
        text = capsys.readouterr().err
        assert text.count("\n") == 1
        return text

    assert "makes latents of size 4 and 4 channels; the config has data.size = 8" in error("data.size=8")
    assert "data.channels = 3" in error("data.channels=3")
    assert "scales latents by 0.5, and data.scale = 0.18215" in error("data.scale=0.18215")
    assert "images.num_classes = 10, and data.num_classes = 5; valid: the same" in error("data.num_classes=5")
    assert "images have 3 channels, and this autoencoder takes 1" in error(
        "images.name=emoji32",
        "images.size=32",
        "images.channels=3",
        "images.num_classes=9",
        "data.size=16",
        "data.num_classes=9",
    )
    assert "autoencoder.weights is empty; give its weights" in error("autoencoder.weights=")
    assert "already holds latents.json" in error(out=encoded)
    assert not (tmp_path / "out").exists()
    assert main(["encode", f"--config={TINY}", f"--out={tmp_path / 'out'}"]) == 2
    assert "the config's data are digits; give one whose data.name is latents" in capsys.readouterr().err


def test_shards_of_another_request_are_not_mixed(vae, encoded, tmp_path, capsys):
    shutil.copytree(encoded, tmp_path / "out")
    (tmp_path / "out" / latents.MANIFEST).unlink()
    request = {"source": "", "weights_sha256": "", "mirrored": True, "scale": 0.5, "shard_size": latents.SHARD_SIZE}
    (tmp_path / "out" / latents.REQUEST).write_text(json.dumps(request))
    assert run(vae, tmp_path / "out") == 2
    differing = "autoencoder, source, weights_sha256"
    assert f"holds shards of another request ({differing} differ)" in capsys.readouterr().err
    (tmp_path / "out" / latents.REQUEST).unlink()
    assert run(vae, tmp_path / "out") == 2
    assert "holds latents-00000.array_record and does not say of what; remove" in capsys.readouterr().err


def cut(path):
    path.write_bytes(path.read_bytes()[:-10])


# What happens to the shards of a folder, and what is said of it.
CHANGES = {
    "cut": (lambda out: cut(out / "latents-00001.array_record"), "latents-00001.array_record is damaged; remove it"),
    "twice": (
        lambda out: shutil.copy(out / "latents-00000.array_record", out / "latents-00002.array_record"),
        "holds 1800 latents of 1500 images",
    ),
}


def test_shards_that_are_not_whole_are_named(vae, encoded, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(latents, "SHARD_SIZE", SHARD)
    agree = shards.agree

    def agree_and_bring(out, *request):
        agree(out, *request)
        for path in encoded.glob("*.array_record"):
            shutil.copy(path, out)
        CHANGES[out.name][0](out)

    monkeypatch.setattr(shards, "agree", agree_and_bring)
    for name, (_, words) in CHANGES.items():
        assert run(vae, tmp_path / name) == 2
        assert words in (error := capsys.readouterr().err)
        assert error.count("\n") == 1
        assert not (tmp_path / name / latents.MANIFEST).exists()


def test_an_autoencoder_of_another_shift_is_refused(tmp_path, capsys):
    module = create("VAE", **VAE, shift=0.5)
    store.save(tmp_path / "vae", module, some_params(module), {})
    assert run(tmp_path / "vae", tmp_path / "out") == 2
    assert "shifts latents by 0.5, and data.shift = 0.0" in capsys.readouterr().err


@pytest.mark.slow
def test_latents_of_a_shifted_scale_and_of_pixels_from_0_to_1(tmp_path):
    """Stored is the posterior of the other pixels; the statistics are those of what models see; pictures come back."""
    module = create("VAE", **VAE, shift=0.25)
    params = some_params(module)
    store.save(tmp_path / "vae", module, params, {})
    leaves = ("images.split=test", "data.flip=false", "data.shift=0.25", "data.input_range=0,1")
    assert run(tmp_path / "vae", tmp_path / "out", *leaves) == 0
    moments, _, manifest = stored(tmp_path / "out")
    images, _ = sources.arrays(sources.load(**configs.digits(split="test")))
    mean, _ = module.apply({"params": params}, images / np.float32(255), method="encode")
    np.testing.assert_allclose(moments[:, 0, 0], mean, rtol=1e-3, atol=1e-4)
    assert (manifest["shift"], manifest["input_range"]) == (0.25, [0.0, 1.0])
    np.testing.assert_allclose(manifest["mean"], 0.5 * (np.asarray(mean).mean((0, 1, 2)) - 0.25), atol=1e-3)
    scaling = latents.Scaling(0.5, 0.25, (0.0, 1.0))
    decoder = load_decoder(Autoencoder(str(tmp_path / "vae")), str(tmp_path / "out"), 4, scaling)
    pictures = module.apply({"params": params}, mean[:4], method="decode") * 2 - 1
    np.testing.assert_allclose(decoder((mean[:4] - 0.25) * 0.5), pictures, atol=1e-5)


def test_images_beside_their_latents(vae, encoded, tmp_path, monkeypatch):
    """As they were encoded, mirrored where their latents are, read where they are asked for; the latents are equal."""
    monkeypatch.setattr(latents, "SHARD_SIZE", SHARD)
    assert run(vae, tmp_path / "out", flags=("--keep_images",)) == 0
    manifest = latents.read_manifest(tmp_path / "out")
    assert manifest["image"] == [8, 8, 1]
    leaves = {"size": 4, "channels": 4, "num_classes": 10, "split": "", "scale": 0.5, "flip": True}
    with_images = sources.load(**configs.section("latents", **leaves, dir=str(tmp_path / "out"), images=True))
    without = sources.load(**configs.section("latents", **leaves, dir=str(tmp_path / "out")))
    plain = sources.load(**configs.section("latents", **leaves, dir=str(encoded)))
    images, _ = sources.arrays(sources.load(**configs.digits()))
    for number in (0, 599, 600, 1499):
        example = with_images.examples[number]
        np.testing.assert_array_equal(example["aux"]["image"], images[number])
        np.testing.assert_array_equal(example["image"], plain.examples[number]["image"])
        assert "aux" not in without.examples[number]
    streams = [Batches(each, batch_size=50, seed=0, flip=True) for each in (with_images, plain, without)]
    first, second, third = map(next, streams)
    for stream in streams:
        stream.close()
    np.testing.assert_array_equal(first.x, second.x)
    np.testing.assert_array_equal(first.x, third.x)
    assert (second.aux, third.aux) == ({}, {})
    assert (first.aux["image"].shape, first.aux["image"].dtype) == ((50, 8, 8, 1), np.uint8)
    mirrored = draws.coins(0, "flip", 0, 50)
    order = draws.permutation(0, "order", 0, 1500)[:50]
    expected = [images[n][:, ::-1] if flipped else images[n] for n, flipped in zip(order, mirrored)]
    np.testing.assert_array_equal(first.aux["image"], expected)


@pytest.mark.slow
def test_bfloat16_latents_are_near_and_told_apart(vae, encoded, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(latents, "SHARD_SIZE", SHARD)
    assert run(vae, tmp_path / "out", "autoencoder.dtype=bfloat16") == 0
    (ours, _, manifest), (theirs, _, other) = stored(tmp_path / "out"), stored(encoded)
    far = np.abs(ours - theirs).max() / np.abs(theirs).max()
    assert 1e-4 < far < 0.05
    assert manifest["autoencoder"] == other["autoencoder"].replace("float32", "bfloat16") != other["autoencoder"]
    assert manifest["weights_sha256"] == other["weights_sha256"]
    (tmp_path / "out" / latents.MANIFEST).unlink()
    asked = ("source", "autoencoder", "weights_sha256", "scale", "shift", "input_range", "image")
    request = {name: manifest[name] for name in asked} | {"mirrored": True, "shard_size": SHARD}
    (tmp_path / "out" / latents.REQUEST).write_text(json.dumps(request))
    assert run(vae, tmp_path / "out") == 2
    assert "holds shards of another request (autoencoder differ)" in capsys.readouterr().err


def test_a_full_disk_is_one_line(tmp_path):
    (tmp_path / "latents-00000.unfinished").symlink_to("/dev/full")
    with pytest.raises(UserError, match="latents-00000.array_record cannot be written"):
        shards.write_shard(tmp_path / "latents-00000.array_record", (bytes(2**20) for _ in range(20)))
