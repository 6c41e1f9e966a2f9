"""A model of latents makes pictures with an autoencoder, wherever its weights lie."""

import dataclasses
import json
from functools import partial

import jax
import numpy as np
import pytest
from safetensors.numpy import save_file

from diffjax.__main__ import main
from diffjax.data import latents
from diffjax.data.latents import Scaling
from diffjax.errors import UserError
from diffjax.experiment import build
from diffjax.frozen import create
from diffjax.methods import latents as decoding
from diffjax.methods.latents import load_decoder
from diffjax.parallel.mesh import batch_sharding, make_mesh
from diffjax.parallel.rules import on_mesh
from diffjax.sampling.samples import read_samples
from diffjax.weights import autoencoders, store, to_reference
from diffjax.weights.autoencoders import Autoencoder
from tests.data.test_latents import ORIGIN
from tests.frozen.test_vae import some_params
from tests.programs import tiny_config, train_arguments

LEAVES = (
    "data.name=latents",
    "data.split=",
    "data.size=4",
    "data.channels=4",
    "data.num_classes=5",
    "model.patch=2",
    "sampling.clip=false",
)
VAE = {"widths": (16, 24), "depth": 1, "groups": 8, "scale": 0.25}


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """Latents, a run on them, and an autoencoder as `convert` writes it (`vae`), as a file and as a folder."""
    folder = tmp_path_factory.mktemp("latents")
    r = np.random.default_rng(0)
    moments = r.normal(size=(40, 1, 2, 4, 4, 4)).astype(np.float32)
    moments[:, :, 1] = np.abs(moments[:, :, 1])
    latents.write_latents(folder / "data", [(each, i % 5) for i, each in enumerate(moments)], ORIGIN)
    assert main(run_arguments(folder, "total_steps=2", "ema.decay=0.5")) == 0
    module = create("VAE", **VAE)
    params = some_params(module)
    store.save(folder / "vae", module, params, {})
    weights = to_reference("vae", module, params)
    (folder / "diffusers").mkdir()
    save_file(weights, folder / "diffusers/diffusion_pytorch_model.safetensors")
    arguments = {"_class_name": "AutoencoderKL", "norm_num_groups": 8, "scaling_factor": 0.25}
    (folder / "diffusers/config.json").write_text(json.dumps(arguments))
    return folder


def run_arguments(folder, *leaves):
    return train_arguments(folder / "run", *LEAVES, f"data.dir={folder / 'data'}", "data.scale=0.25", *leaves)


def sample(world, out, *flags):
    return main(["sample", f"--workdir={world / 'run'}", "--num=6", f"--out={out}", *flags])


@pytest.fixture(scope="module")
def decoded(world):
    assert sample(world, world / "s.npz", f"--autoencoder={world / 'vae'}") == 0
    return read_samples(world / "s.npz")


@pytest.mark.slow
def test_pictures_are_decoded_latents(world, decoded):
    images, labels, made = decoded
    assert (images.shape, images.dtype) == ((6, 8, 8, 3), np.uint8)
    np.testing.assert_array_equal(labels, np.arange(6) % 5)
    assert sample(world, world / "raw.npz", "--raw") == 0
    raw = np.load(world / "raw.npz")["arr_0"]
    module, params, _ = store.load(world / "vae")
    values = module.apply({"params": params}, raw / 0.25, method="decode")
    np.testing.assert_allclose(images, np.clip(np.asarray(values) * 127.5 + 127.5, 0, 255), atol=1)
    assert len(made["autoencoder_sha256"]) == 64
    assert (world / "s.png").stat().st_size > 100


@pytest.mark.slow
def test_weights_from_a_folder_of_diffusers_and_as_a_leaf(world, decoded, tmp_path):
    for name, flag in (("a", "--autoencoder="), ("b", "--config.autoencoder.weights=")):
        assert sample(world, tmp_path / f"{name}.npz", f"{flag}{world / 'diffusers'}") == 0
        images, _, made = read_samples(tmp_path / f"{name}.npz")
        np.testing.assert_array_equal(images, decoded[0])
        assert made["autoencoder_sha256"] == decoded[2]["autoencoder_sha256"]


@pytest.mark.slow
def test_an_autoencoder_that_encodes_otherwise_is_refused(world, tmp_path, caplog):
    """A decoder may be another one (ft-mse in place of ft-ema), but nobody should take a wrong one unknowingly."""
    manifest = json.loads((world / "data/latents.json").read_text()) | {"autoencoder": "VAE(channels=3)"}
    asked = Autoencoder(str(world / "vae"))
    own = autoencoders.encoder_sha256(autoencoders.read(asked)[1])

    def decoder(name, **entries):
        (tmp_path / name).mkdir()
        (tmp_path / name / "latents.json").write_text(json.dumps(manifest | entries))
        caplog.clear()
        with caplog.at_level("INFO"):
            load_decoder(asked, str(tmp_path / name), 4, Scaling(0.25))
        return caplog.text

    assert decoder("own", encoder_sha256=own, weights_sha256="1" * 64) == ""
    assert "nothing says that autoencoder.weights" in decoder("tiny", encoder_sha256="2" * 64, autoencoder="TinyVAE()")
    assert "nothing says that autoencoder.weights" in decoder("earlier")
    with pytest.raises(UserError, match="has another encoder than the autoencoder that made the latents in"):
        decoder("other", encoder_sha256="2" * 64)


@pytest.mark.slow
def test_another_autoencoder_makes_another_file(world, decoded, tmp_path, capsys):
    module = create("TinyVAE", width=8, encoder_blocks=(1, 1), decoder_blocks=(1, 1))
    save_file(to_reference("tiny_vae", module, some_params(module)), tmp_path / "taesd.safetensors")
    flag = f"--autoencoder={tmp_path / 'taesd.safetensors'}"
    assert sample(world, world / "s.npz", flag) == 2
    assert "s.npz was made with other settings: autoencoder_sha256" in capsys.readouterr().err
    assert sample(world, tmp_path / "t.npz", flag) == 0
    assert (read_samples(tmp_path / "t.npz")[0] != decoded[0]).any()


@pytest.mark.slow
def test_pictures_in_training(world, tmp_path):
    leaves = (f"autoencoder.weights={world / 'vae'}", "evals.samples.every_steps=1", "evals.samples.num=4")
    assert main([*run_arguments(world, "total_steps=1", *leaves), f"--workdir={tmp_path / 'run'}"]) == 0
    assert (tmp_path / "run/samples/step_1.png").is_file() or list((tmp_path / "run/samples").glob("*.png"))


@pytest.mark.slow
def test_what_cannot_decode_is_said(world, tmp_path, capsys):
    def error(*flags):
        assert sample(world, tmp_path / "s.npz", *flags) == 2
        text = capsys.readouterr().err
        assert text.count("\n") == 1
        return text

    assert "makes latents of 4 channels, not pictures; give their autoencoder to decode them (--autoencoder" in error()
    assert f"{world / 'run'} is no folder of diffusers, which holds config.json" in error(
        f"--autoencoder={world / 'run'}"
    )
    assert "gone: no such file" in error(f"--autoencoder={tmp_path / 'gone'}")
    for name, changed, words in (
        ("scaled", {"scale": 0.5}, "scales latents by 0.5, and data.scale = 0.25"),
        ("shifted", {"shift": 0.5}, "shifts latents by 0.5, and data.shift = 0.0"),
        ("wide", {"latent_channels": 8}, "is for latents of 8 channels, not 4"),
    ):
        module = create("VAE", **{**VAE, **changed})
        store.save(tmp_path / name, module, some_params(module), {})
        assert words in error(f"--autoencoder={tmp_path / name}")
    vqgan = create("VQGAN", vocabulary=4, features=8, width=32, multipliers=(1,), depth=1)
    store.save(tmp_path / "vqgan", vqgan, some_params(vqgan), {})
    assert "holds a VQGAN, not an autoencoder of latents" in error(f"--autoencoder={tmp_path / 'vqgan'}")
    assert not (tmp_path / "s.npz").exists()


CHANNELS = Scaling((0.25, 0.5, 1.0, 2.0), (1.0, 0.0, -1.0, 0.5), (0.0, 1.0))


@pytest.mark.slow
def test_latents_of_other_statistics_than_the_autoencoders(world, tmp_path):
    """z is latent / scale + shift by channel, whatever the autoencoder's own scale; pixels of [0, 1] go to [-1, 1]."""
    z = np.random.default_rng(0).normal(size=(3, 4, 4, 4)).astype(np.float32)
    latent = (z - np.float32(CHANNELS.shift)) * np.float32(CHANNELS.scale)
    module, params, _ = store.load(world / "vae")
    pictures = module.apply({"params": params}, z, method="decode") * 2 - 1
    decoder = load_decoder(Autoencoder(str(world / "vae")), str(tmp_path / "gone"), 4, CHANNELS)
    np.testing.assert_allclose(decoder(latent), pictures, atol=2e-5)
    data = dataclasses.asdict(CHANNELS)
    latents.write_latents(tmp_path / "data", [(np.zeros((1, 2, 4, 4, 4)), 0)], dataclasses.replace(ORIGIN, **data))
    np.testing.assert_allclose(
        load_decoder(Autoencoder(str(world / "vae")), str(tmp_path / "data"), 4, CHANNELS)(latent), pictures, atol=2e-5
    )
    for leaf, value in (("scale", 0.25), ("shift", 0.0), ("input_range", (-1.0, 1.0))):
        other = dataclasses.replace(CHANNELS, **{leaf: value})
        with pytest.raises(UserError, match=rf"data\.{leaf}=.*, but the latents in .* have {leaf}="):
            load_decoder(Autoencoder(str(world / "vae")), str(tmp_path / "data"), 4, other)


def test_a_tiny_autoencoder_cannot_shift(tmp_path):
    module = create("TinyVAE", width=8, encoder_blocks=(1, 1), decoder_blocks=(1, 1))
    store.save(tmp_path / "tiny", module, some_params(module), {})
    for scaling in (CHANNELS, Scaling(0.25, 1.0)):
        with pytest.raises(
            UserError, match="decodes latents as they are, and data.scale = .*; valid: one number, and 0"
        ):
            load_decoder(Autoencoder(str(tmp_path / "tiny")), str(tmp_path / "gone"), 4, scaling)


def test_the_leaf_is_of_latents_alone(tmp_path, capsys):
    assert main(train_arguments(tmp_path, "autoencoder.weights=vae")) == 2
    assert "autoencoder.weights = 'vae'" in (error := capsys.readouterr().err)
    assert "only with latents" in error


@pytest.mark.slow
def test_devices_decode_their_own_part_a_few_at_a_time(world, monkeypatch):
    """In groups, with the same result, and nothing crosses between devices but the parameters."""
    module, params, _ = store.load(world / "vae")
    x = np.random.default_rng(1).normal(size=(32, 4, 4, 4)).astype(np.float32)
    expected = module.apply({"params": params}, x / 0.25, method="decode")
    monkeypatch.setattr(decoding, "AT_ONCE", 2 * 8 * 8)
    mesh = make_mesh({"data": 8})
    decode = partial(decoding.decode, module, (-1.0, 1.0), 512)
    compiled = (
        jax.jit(on_mesh(decode, mesh), out_shardings=batch_sharding(mesh))
        .lower(params, jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=batch_sharding(mesh)))
        .compile()
    )
    text = compiled.as_text()
    assert not any(word in text for word in ("all-gather", "all-to-all", "collective-permute", "all-reduce"))
    assert "while" in text
    found = compiled(params, jax.device_put(x, batch_sharding(mesh)))
    np.testing.assert_allclose(found, expected, atol=1e-5)


@pytest.mark.slow
def test_devices_decode_large_images_in_strips(world):
    """Each its own, one after the other, with the result of the whole ones."""
    module, params, _ = store.load(world / "vae")
    x = np.random.default_rng(1).normal(size=(16, 8, 4, 4)).astype(np.float32)
    mesh = make_mesh({"data": 8})
    shape = jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=batch_sharding(mesh))

    def program(tile):
        decode = on_mesh(partial(decoding.decode, module, (-1.0, 1.0), tile), mesh)
        return jax.jit(decode, out_shardings=batch_sharding(mesh)).lower(params, shape).compile()

    whole, strips = program(0), program(7)
    text = strips.as_text()
    assert not any(word in text for word in ("all-gather", "all-to-all", "collective-permute", "all-reduce"))
    assert strips.memory_analysis().temp_size_in_bytes < whole.memory_analysis().temp_size_in_bytes
    x = jax.device_put(x, batch_sharding(mesh))
    np.testing.assert_allclose(strips(params, x), whole(params, x), atol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("leaf, value", [("dtype", "bfloat16"), ("tile", 4)])
def test_how_latents_are_decoded_is_recorded(world, decoded, tmp_path, leaf, value):
    flags = f"--autoencoder={world / 'vae'}", f"--config.autoencoder.{leaf}={value}"
    assert sample(world, tmp_path / "s.npz", *flags) == 0
    images, _, made = read_samples(tmp_path / "s.npz")
    assert made.pop(f"autoencoder_{leaf}") == value
    assert made.keys() == decoded[2].keys()
    assert np.abs(images.astype(int) - decoded[0]).max() <= (1 if leaf == "tile" else 8)


@pytest.mark.slow
def test_a_bfloat16_decoder_is_near_the_float32_one(world, tmp_path):
    x = np.random.default_rng(1).normal(size=(4, 4, 4, 4)).astype(np.float32)
    full, half = (
        load_decoder(Autoencoder(str(world / "vae"), dtype), str(tmp_path / "gone"), 4, Scaling(0.25))(x)
        for dtype in ("float32", "bfloat16")
    )
    assert half.dtype == np.float32
    assert 1e-4 < np.abs(half - full).max() / np.abs(full).max() < 0.05


@pytest.mark.slow
def test_scores_on_pixels_need_images(world):
    config = tiny_config(
        *LEAVES,
        f"data.dir={world / 'data'}",
        "data.scale=0.25",
        f"autoencoder.weights={world / 'vae'}",
        "evals.scores.every_steps=1",
    )
    experiment = build(config)
    with pytest.raises(Exception, match=r"these data are none; set evals.scores.every_steps = 0"):
        experiment.evaluators()
    assert len(dataclasses.replace(experiment, config=config).decoder_protocol()["autoencoder_sha256"]) == 64
