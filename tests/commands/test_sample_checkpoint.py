"""`sample --checkpoint`: pictures straight from a public file, as its family was published."""

import json

import jax
import numpy as np
import pytest
from safetensors.numpy import save_file

from diffjax.__main__ import main
from diffjax.frozen import create
from diffjax.sampling.samples import read_samples
from diffjax.weights import store, to_reference
from tests.frozen.test_vae import some_params
from tests.weights.test_dit import module_and_params
from tests.weights.torch_writer import tensor, write_zip

TINY = {"width": 8, "encoder_blocks": (1, 1), "decoder_blocks": (1, 1)}


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """A DiT for latents of 8 x 8 in a training checkpoint, and the autoencoder of its latents."""
    folder = tmp_path_factory.mktemp("files")
    module, params = module_and_params(channels=4)
    weights = to_reference("dit", module, jax.tree.map(lambda leaf: 0.05 * leaf, params), 8)
    state = {key: tensor(value, key) for key, value in weights.items()}
    last = {key: tensor(value if key == "pos_embed" else 0 * value, f"m{key}") for key, value in weights.items()}
    write_zip(folder / "dit.pt", {"model": last, "ema": state})
    vae = create("TinyVAE", **TINY)
    save_file(to_reference("tiny_vae", vae, some_params(vae)), folder / "taesd.safetensors")
    return folder


def sample(files, out, *flags):
    given = ["--family=dit", "--arguments=num_heads=2", "--num=4", "--config.sampling.steps=2"]
    return main(["sample", f"--checkpoint={files / 'dit.pt'}", f"--out={out}", *given, *flags])


def test_pictures_of_a_file(files, tmp_path, capsys):
    out = tmp_path / "samples.npz"
    assert sample(files, out, f"--autoencoder={files / 'taesd.safetensors'}", "--labels=1,0") == 0
    assert "wrote 4 images of dit.pt" in capsys.readouterr().out
    images, labels, *_ = read_samples(out)
    assert images.shape == (4, 16, 16, 3)
    np.testing.assert_array_equal(labels, [1, 0, 1, 0])
    protocol = json.loads(out.with_suffix(".json").read_text())
    assert protocol["process"]["gaussian"]["variance"] == "learned_range"
    assert (protocol["sampling"]["guidance"]["scale"], protocol["sampling"]["guidance"]["channels"]) == (1.5, 3)
    command = ["convert", "--family=dit", f"--checkpoint={files / 'dit.pt'}", "--arguments=num_heads=2"]
    assert main([*command, f"--out={tmp_path / 'converted'}"]) == 0
    made = store.read_model(tmp_path / "converted")
    assert protocol["origin"]["sha256"] == made["sha256"]
    assert protocol["origin"]["checkpoint_sha256"] == made["checkpoint_sha256"]
    assert made["size"] == 8


def test_another_entry_and_a_recipe(files, tmp_path):
    assert sample(files, tmp_path / "ema.npz", "--raw") == 0
    assert sample(files, tmp_path / "model.npz", "--raw", "--entry=model") == 0
    recipe = tmp_path / "recipe.py"
    recipe.write_text(
        "from configs import common\n\n"
        "def get_config(arg=None):\n"
        "    c = common.base()\n"
        "    common.imagenet_latents(c, 256)\n"
        "    c.data.size, c.data.num_classes = 8, 5\n"
        "    common.backbone(c, 'DiT-S/2')\n"
        "    c.sampling.guidance.scale, c.sampling.guidance.channels = 1.5, 3\n"
        "    return c\n"
    )
    assert sample(files, tmp_path / "recipe.npz", "--raw", f"--config={recipe}") == 0
    ema, model, same = (np.load(tmp_path / f"{name}.npz")["arr_0"] for name in ("ema", "model", "recipe"))
    assert ema.shape == (4, 8, 8, 4)
    assert np.abs(ema - model).max() > 0.1
    np.testing.assert_array_equal(same, ema)


@pytest.mark.parametrize(
    "flags, message",
    [
        (["--family=vae"], "vae has no argument num_heads"),
        (["--family=sit"], "`python -m diffjax fetch sd-vae-ft-ema` brings), or --raw"),
        (["--workdir=run"], "give one of --workdir, --params and --checkpoint"),
        (["--weights=params"], "choose within a run folder"),
        (["--arguments=num_heads"], "'num_heads' is not name=value"),
        (["--entry=nothing"], "the checkpoint has no weights named 'nothing'; there are: model, ema"),
        (["--config.data.size=7", "--raw"], "size 7 x 7"),
    ],
)
def test_mistakes(files, tmp_path, capsys, flags, message):
    assert sample(files, tmp_path / "a.npz", *flags) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1


def test_flags_of_a_checkpoint_alone(files, tmp_path, capsys):
    assert main(["sample", "--workdir=run", "--family=dit", "--num=1", f"--out={tmp_path / 'a.npz'}"]) == 2
    assert "--family is of --checkpoint" in capsys.readouterr().err
    taesd = ["sample", f"--checkpoint={files / 'taesd.safetensors'}", "--family=tiny_vae", "--num=1"]
    assert main([*taesd, f"--out={tmp_path / 'a.npz'}"]) == 2
    assert "taesd.safetensors is a TinyVAE, which draws nothing by itself" in capsys.readouterr().err
    assert main(["sample", "--checkpoint=dit.pt", "--num=1", f"--out={tmp_path / 'a.npz'}"]) == 2
    assert "--checkpoint needs --family, whose weights they are: dit, sit" in capsys.readouterr().err
