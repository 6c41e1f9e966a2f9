"""`export` writes what the reference would, and `convert` reads it back, of a run and of converted parameters."""

import numpy as np
import pytest
from safetensors import safe_open
from safetensors.numpy import load_file

from diffjax.__main__ import main
from diffjax.commands.inspect import inspect
from diffjax.frozen import create
from diffjax.models.layers import sincos_positions
from diffjax.weights import FAMILIES, MODELS, autoencoders, store
from diffjax.weights.autoencoders import Autoencoder
from tests.frozen.test_vae import SMALL, some_params
from tests.programs import train_arguments


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    workdir = tmp_path_factory.mktemp("export") / "run"
    assert main(train_arguments(workdir, "total_steps=2", "ema.decay=0.5")) == 0
    return workdir


def convert(family, file, out, *arguments):
    flags = [f"--arguments={','.join(arguments)}"] if arguments else []
    assert main(["convert", f"--family={family}", f"--checkpoint={file}", f"--out={out}", *flags]) == 0
    return store.load(out)[2]["sha256"]


@pytest.mark.parametrize("weights", ["ema", "params"])
def test_a_run_comes_back(run, tmp_path, capsys, weights):
    out = tmp_path / "dit.safetensors"
    assert main(["export", f"--workdir={run}", "--family=dit", f"--weights={weights}", f"--out={out}"]) == 0
    assert f"({weights}) to {out}, sha256 " in capsys.readouterr().out
    assert convert("dit", out, tmp_path / "back", "num_heads=3") == inspect(run)["sha256"][weights]
    with safe_open(out, "numpy") as file:
        assert file.metadata() == {"format": "pt"}
    written = load_file(out)
    assert "blocks.0.attn.qkv.weight" in written
    np.testing.assert_array_equal(written["pos_embed"][0], sincos_positions(4, 4, 48))
    module, params, _ = store.load(tmp_path / "back")
    store.save(tmp_path / "unsized", module, params, {})
    export = ["export", f"--params={tmp_path / 'unsized'}", "--family=dit", f"--out={tmp_path / 'again.safetensors'}"]
    assert main(export) == 2
    assert "does not say for which inputs; give their side, --size=32" in capsys.readouterr().err
    assert main([*export, "--size=8"]) == 0
    assert (tmp_path / "again.safetensors").read_bytes() == out.read_bytes()


@pytest.mark.parametrize("family, name", [("vae", "VAE"), ("tiny_vae", "TinyVAE")])
def test_a_frozen_network_comes_back(tmp_path, family, name):
    module = create(name, **SMALL[name])
    made = store.save(tmp_path / "params", module, some_params(module), {})
    out = tmp_path / "vae.safetensors"
    assert main(["export", f"--params={tmp_path / 'params'}", f"--family={family}", f"--out={out}"]) == 0
    arguments = ["norm_num_groups=8"] if family == "vae" else []
    assert convert(family, out, tmp_path / "back", *arguments) == made["sha256"]


@pytest.mark.parametrize("family, name", [("vae", "VAE"), ("tiny_vae", "TinyVAE")])
def test_an_autoencoder_comes_back_from_a_folder_without_arguments(tmp_path, family, name):
    module = create(name, **SMALL[name], **({"scale": 0.25, "shift": 0.5} if name == "VAE" else {}))
    store.save(tmp_path / "params", module, params := some_params(module), {})
    export = ["export", f"--params={tmp_path / 'params'}", f"--family={family}", f"--out={tmp_path / 'folder'}"]
    assert main(export) == 0
    found, back, sha256 = autoencoders.read(Autoencoder(str(tmp_path / "folder")))
    assert found == module
    assert sha256 == store.tree_sha256(params) == store.tree_sha256(back)
    assert main(export) == 2


def test_what_cannot_be_written_is_said(run, tmp_path, capsys):
    def error(*flags, out=tmp_path / "a.safetensors"):
        assert main(["export", f"--workdir={run}", f"--out={out}", *flags]) == 2
        text = capsys.readouterr().err
        assert text.count("\n") == 1
        return text

    assert "is the layout of DiS, and" in (text := error("--family=dis"))
    assert "holds a DiT; valid: dit, sit" in text
    assert "--family=vit is unknown; valid: dit, sit" in error("--family=vit")
    assert "give a file that ends in .safetensors" in error("--family=dit", out=tmp_path / "a.pt")
    assert "give either --workdir or --params" in error("--family=dit", f"--params={run}")
    (tmp_path / "a.safetensors").write_text("mine")
    assert "is there already; choose another --out, or --overwrite" in error("--family=dit")
    assert (tmp_path / "a.safetensors").read_text() == "mine"


def test_every_family_has_a_model():
    assert MODELS.keys() == FAMILIES.keys()
