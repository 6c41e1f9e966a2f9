"""The loss of autoencoders by hand, training that lowers it, and what such a model does not do."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from diffjax import rng
from diffjax.__main__ import main
from diffjax.config import load
from diffjax.contracts import Batch, bind
from diffjax.errors import UserError
from diffjax.evaluation.evaluators import EVALUATORS
from diffjax.experiment import build
from diffjax.files import read_npz
from diffjax.parallel.mesh import batch_sharding
from diffjax.sampling.samples import grid, to_uint8
from diffjax.weights import autoencoders
from tests.programs import ROOT, method_of

RECIPE = "configs/emoji32_latent.py:stage=autoencoder,runlocal"
SMALL = ("model.widths=8,16", "model.groups=4", "batch_size=8")


def config(*overrides: str):
    return load(RECIPE, [f"--config.{each}" for each in (*SMALL, *overrides)])


@pytest.fixture(scope="module")
def experiment():
    return build(config("reconstruction.kl=0.5", "reconstruction.error=squared", "optim.warmup_steps=0"))


def batch(count=8):
    images = np.random.default_rng(0).uniform(-1, 1, (count, 32, 32, 3)).astype(np.float32)
    return Batch(images, np.zeros(count, np.int32), np.arange(count, dtype=np.int32))


def test_the_loss_by_hand(experiment):
    params, key = experiment.init().params, rng.stream(0, "test")
    apply, given = bind(experiment.model), batch()
    terms = jax.jit(functools.partial(experiment.method.terms, apply, train=True))
    values, fraction = terms(params, {}, given, key)
    mean, log_variance = map(np.asarray, jax.jit(functools.partial(apply, method="encode"))(params, given.x))
    eps = rng.normal(rng.per_example(rng.fold_name(key, "noise"), given.index), mean.shape[1:])
    decode = jax.jit(functools.partial(apply, method="decode"))
    out = np.asarray(decode(params, mean + np.exp(log_variance / 2) * eps))
    error = np.mean((out - given.x) ** 2, axis=(1, 2, 3))
    divergence = 0.5 * np.sum(mean**2 + np.exp(log_variance) - 1 - log_variance, axis=(1, 2, 3))
    np.testing.assert_allclose(values["error"], error, rtol=1e-5)
    np.testing.assert_allclose(values["loss"], error + 0.5 * divergence / (32 * 32 * 3), rtol=1e-5)
    np.testing.assert_allclose(values["psnr"], -10 * np.log10(error / 4), rtol=1e-5)
    assert not fraction.any()


@pytest.mark.slow
def test_evaluation_is_of_the_mean_and_the_other_error(experiment):
    params, given = experiment.init().params, batch()
    apply = bind(experiment.model)
    method = method_of(config("reconstruction.error=absolute", "reconstruction.kl=0"))
    values, _ = method.terms(apply, params, {}, given, rng.stream(0, "test"), train=False)
    out = np.asarray(apply(params, given.x))
    np.testing.assert_allclose(values["loss"], np.mean(np.abs(out - given.x), axis=(1, 2, 3)), rtol=1e-5)
    np.testing.assert_array_equal(method.reconstruct(apply, params, given.x), out)


@pytest.mark.slow
def test_steps_lower_the_loss(experiment):
    state, key = experiment.init(), experiment.key
    images = jax.device_put(batch(), batch_sharding(experiment.mesh))
    losses = []
    for _ in range(12):
        state, metrics = experiment.step(state, {}, images, key)
        losses.append(float(metrics["loss"]))
    assert np.mean(losses[-3:]) < 0.8 * losses[0]


@pytest.mark.slow
def test_pictures_of_held_out_images(experiment):
    source = experiment.other_source(split="test")
    params = experiment.init().params
    pictures = []
    for given, real in experiment.batches(source, 11):
        pictures.append(experiment.reconstructions(params, given)[:real])
    found = np.concatenate(pictures)
    assert found.shape == (11, 32, 32, 3)
    images = np.stack([source.examples[i]["image"] for i in range(11)]).astype(np.float32) / 127.5 - 1
    np.testing.assert_allclose(found, experiment.model.apply({"params": params}, jnp.asarray(images)), atol=1e-5)
    evaluate = EVALUATORS["reconstructions"].build(experiment, num=11)
    beside = [np.concatenate([source.examples[i]["image"], to_uint8(found)[i]], axis=1) for i in range(11)]
    np.testing.assert_array_equal(evaluate(params).picture, grid(np.stack(beside)))


def test_what_it_does_not_do(experiment):
    with pytest.raises(UserError, match=r"VAE draws nothing: method 'reconstruction' makes reconstructions"):
        _ = experiment.sampler
    for overrides, message in (
        (("data.augment=0.1", "data.flip=false"), "an autoencoder is not given how images are augmented"),
        (("model.widths=8,16,16,16,16,16,16", "reconstruction.kl=1"), "sides divisible by 64"),
        (("model.widths=8,10",), "multiples of groups = 4"),
        (("evals.samples.every_steps=1",), "evals.samples draws pictures, and this model makes reconstructions"),
    ):
        with pytest.raises(UserError, match=message):
            build(config(*overrides)).evaluators()
    for recipe, message in (
        ("configs/quickstart.py:runlocal", "method 'reconstruction' trains an autoencoder, which DiT is not"),
        ("configs/imagenet256.py:runlocal", "an autoencoder is trained on images"),
    ):
        with pytest.raises(UserError, match=message):
            build(load(recipe, ["--config.method=reconstruction", "--config.evals.samples.every_steps=0"]))
    with pytest.raises(UserError, match="VAE.* has no argument"):
        build(load("configs/quickstart.py:runlocal", ["--config.model.name=VAE"]))
    with pytest.raises(UserError, match="evals.reconstructions is of autoencoders"):
        build(load("configs/quickstart.py:runlocal", ["--config.evals.reconstructions.every_steps=1"])).evaluators()


@pytest.mark.slow
def test_from_pixels_to_latents_to_samples(tmp_path, monkeypatch):
    """Every command of the recipe, with two steps each."""
    root = RECIPE.partition(":")[0]
    (tmp_path / "configs").symlink_to(ROOT / "configs")
    monkeypatch.chdir(tmp_path)
    folder = "runs/quickstart-latent"
    assert main(["train", f"--config={root}:stage=autoencoder,runlocal", f"--workdir={folder}/vae"]) == 0
    assert main(["export", f"--workdir={folder}/vae", "--family=vae", f"--out={folder}/autoencoder"]) == 0
    assert autoencoders.read(autoencoders.Autoencoder(f"{folder}/autoencoder"))[0].groups == 8
    assert main(["encode", f"--config={root}:runlocal", f"--out={folder}/latents"]) == 0
    leaves = ["--config.evals.samples.every_steps=0"]
    assert main(["train", f"--config={root}:runlocal", f"--workdir={folder}/dit", *leaves]) == 0
    sample = ["sample", f"--workdir={folder}/dit", "--num=9", "--config.sampling.steps=2", f"--out={folder}/a.npz"]
    assert main(sample) == 0
    assert read_npz(tmp_path / folder / "a.npz")["arr_0"].shape == (9, 32, 32, 3)
