"""From the ImageNet tars to pictures of a latent model, every stage cut and run again, as if nothing had happened."""

import filecmp
import json

import pytest
from PIL import Image

from diffjax.__main__ import main
from diffjax.commands.inspect import inspect
from diffjax.data import image_records, latents, shards
from diffjax.frozen import create
from diffjax.sampling import parts
from diffjax.sampling.samples import read_samples
from diffjax.weights import store
from tests.data.preparation.originals import imagenet_files, imagenet_tar, write_tree
from tests.frozen.test_vae import some_params
from tests.training.test_resume import Cut, at_batch, cut

SHARD = 4
VAE = {"widths": (8, 8, 8, 8), "depth": 1, "groups": 4, "scale": 1.0}  # 64 pixels -> 8
RUN = ("total_steps=20", "checkpoint.every_steps=10", "log.every_steps=10", "batch_size=8", "log.tensorboard=false")
COMPUTE = ("model.dtype=float32", "data.workers=0", "parallel.strategy=dp", "sampling.steps=4")
MODELS = {
    "DiT": ("model.name=DiT", "model.depth=2", "model.width=48", "model.heads=3", "model.patch=2"),
    "DiS": ("model.name=DiS", "model.depth=2", "model.width=32", "model.patch=2"),
}
LATENTS = ("data.size=8", "data.scale=1.0", "data.split=")


def at_call(monkeypatch, module, name, number):
    """Cut the program at a call of a function."""
    function, calls = getattr(module, name), []

    def called(*args, **kwargs):
        calls.append(name)
        if len(calls) == number:
            raise Cut
        return function(*args, **kwargs)

    monkeypatch.setattr(module, name, called)


def twice(monkeypatch, command, straight, again, module, name, number=2):
    """Run a command with --out, once as it is, and once cut at a call and run again; what is there must be the same."""
    assert main([*command, f"--out={straight}"]) == 0
    with monkeypatch.context() as patched:
        at_call(patched, module, name, number)
        with pytest.raises(Cut):
            main([*command, f"--out={again}"])
    assert main([*command, f"--out={again}"]) == 0


def same_folders(one, other):
    names = sorted(path.name for path in one.iterdir())
    assert names == sorted(path.name for path in other.iterdir())
    _, different, broken = filecmp.cmpfiles(one, other, [name for name in names if name != ".lock"], shallow=False)
    assert (different, broken) == ([], [])


@pytest.fixture
def small_shards(monkeypatch):
    monkeypatch.setattr(latents, "SHARD_SIZE", SHARD)
    monkeypatch.setattr(image_records, "SHARD_BYTES", SHARD * 64 * 64 * 3)


@pytest.mark.slow
def test_every_stage_goes_on_where_it_was_cut(tmp_path, monkeypatch, small_shards):
    files = imagenet_files()
    (tmp_path / "tars").mkdir()
    (tmp_path / "tars/ILSVRC2012_img_train.tar").write_bytes(imagenet_tar(files))
    tree = write_tree(tmp_path / "tree/train", files).parent

    images, images_again, of_tree = (tmp_path / name for name in ("images", "images-again", "images-of-tree"))
    prepare = ["prepare", "imagenet64", f"--from={tmp_path / 'tars'}", "--partial", "--threads=2"]
    twice(monkeypatch, prepare, images, images_again, shards, "write_shard")
    same_folders(images, images_again)
    assert main(["prepare", "imagenet64", f"--from={tree}", "--partial", "--threads=2", f"--out={of_tree}"]) == 0
    assert [filecmp.cmp(path, of_tree / path.name, shallow=False) for path in images.glob("*.array_record")] == [
        True
    ] * 3
    assert json.loads((images / "images.json").read_text())["count"] == len(files)

    module = create("VAE", **VAE)
    vae = tmp_path / "vae"
    store.save(vae, module, some_params(module), {})
    recipe = "--config=configs/imagenet256.py"
    of_images = [f"images.dir={images}", "images.name=records", "images.size=64", "images.num_classes=1000"]
    leaves = [f"--config.{leaf}" for leaf in (*LATENTS, *of_images, f"autoencoder.weights={vae}")]
    made, made_again = tmp_path / "latents", tmp_path / "latents-again"
    twice(monkeypatch, ["encode", recipe, *leaves], made, made_again, shards, "write_shard")
    same_folders(made, made_again)

    for model, sizes in MODELS.items():
        own = (f"data.dir={made}", f"autoencoder.weights={vae}", *LATENTS, *RUN, *COMPUTE, *sizes)
        train = ["train", recipe, *(f"--config.{leaf}" for leaf in own)]
        straight, again = tmp_path / f"{model}-straight", tmp_path / f"{model}-again"
        assert main([*train, f"--workdir={straight}"]) == 0
        with monkeypatch.context() as patched:
            at_batch(patched, 13, cut)
            with pytest.raises(Cut):
                main([*train, f"--workdir={again}"])
        assert main([*train, f"--workdir={again}"]) == 0
        assert inspect(straight)["latest"] == 20
        assert inspect(straight)["sha256"] == inspect(again)["sha256"]

        pictures, pictures_again = straight / "samples.npz", again / "samples.npz"
        sample = ["sample", "--num=16", "--batch_size=8", "--labels=281,0"]
        assert main([*sample, f"--workdir={straight}", f"--out={pictures}"]) == 0
        with monkeypatch.context() as patched:
            at_call(patched, parts.Parts, "write", 2)
            with pytest.raises(Cut):
                main([*sample, f"--workdir={again}", f"--out={pictures_again}"])
        assert main([*sample, f"--workdir={again}", f"--out={pictures_again}"]) == 0
        assert pictures.read_bytes() == pictures_again.read_bytes()
        drawn, labels, *_ = read_samples(pictures)
        assert drawn.shape == (16, 64, 64, 3)
        assert labels.tolist() == [281, 0] * 8
        with Image.open(pictures.with_suffix(".png")) as grid:
            assert grid.size[0] > 64
