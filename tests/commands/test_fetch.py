"""`fetch` from a server on the loopback and from local files, and the names that it makes work."""

import hashlib
import json
import os
import signal
import time

import jax
import numpy as np
import pytest
from safetensors.numpy import save_file

from diffjax import download
from diffjax.__main__ import main
from diffjax.config import load
from diffjax.data.latents import Scaling
from diffjax.files import only_writer
from diffjax.frozen import create
from diffjax.inputs import data_spec
from diffjax.methods.latents import load_decoder
from diffjax.weights import autoencoders, public, store, to_reference
from diffjax.weights.autoencoders import Autoencoder
from diffjax.weights.public import File, Row
from tests.download_server import serving
from tests.frozen.test_vae import SMALL, some_params
from tests.programs import ROOT, start

CONTENT = np.random.default_rng(0).bytes(100_000)
SHA256 = hashlib.sha256(CONTENT).hexdigest()
CONFIG = {"_class_name": "AutoencoderKL", "norm_num_groups": 8, "scaling_factor": 0.5}


@pytest.fixture
def site(tmp_path, monkeypatch):
    """Two rows: `small` of one file, `vae` of two."""
    monkeypatch.setenv("DIFFJAX_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(download, "PAUSE", 0.0)
    monkeypatch.chdir(tmp_path)
    with serving() as site:
        site.files["/a.bin"] = CONTENT
        files = (File(public.WEIGHTS), File("config.json"))
        rows = {
            "small": Row(
                "dit", (File("a.bin", len(CONTENT), SHA256),), f"{site.address}/a.bin", "page", "MIT", "small"
            ),
            "vae": Row("vae", files, f"{site.address}/vae/{public.WEIGHTS}", "page", "MIT", "an autoencoder"),
            "by-hand": Row("vqgan", (File("b.ckpt"),), "", "drive.example/b", "MIT", "of a page alone"),
            "images": Row("reference", (File("images of it.npz"),), f"{site.address}/a.bin", "page", "MIT", "images"),
        }
        monkeypatch.setattr(public, "ROWS", rows)
        yield site


@pytest.fixture
def vae(tmp_path):
    """A folder of diffusers."""
    module = create("VAE", **SMALL["VAE"], scale=0.5)
    params = some_params(module)
    (tmp_path / "mine").mkdir()
    save_file(to_reference("vae", module, params), tmp_path / "mine" / public.WEIGHTS)
    (tmp_path / "mine/config.json").write_text(json.dumps(CONFIG))
    return tmp_path / "mine", module, params


def test_without_a_name_it_lists_them(capsys):
    assert main(["fetch"]) == 0
    head, *rows = capsys.readouterr().out.splitlines()
    assert [row.split()[0] for row in rows] == list(public.ROWS)
    assert all(row[head.index("what it is") :] == public.ROWS[row.split()[0]].purpose for row in rows)


def test_a_file_by_name(site, tmp_path, capsys):
    assert main(["fetch", "small"]) == 0
    kept = tmp_path / "cache/weights/small/a.bin"
    assert kept.read_bytes() == CONTENT
    said = capsys.readouterr().out.splitlines()
    assert said == [
        "small: small; licence: MIT (page)",
        f"{kept}: 100,000 bytes, sha256 {SHA256}, from {site.address}/a.bin",
        "next: python -m diffjax convert --family=dit --checkpoint=small --out=params/small",
    ]
    assert main(["fetch", "--name=small"]) == 0
    assert "there since 20" in capsys.readouterr().out
    assert len(site.asked) == 1
    kept.write_bytes(CONTENT[::-1])
    assert main(["fetch", "small"]) == 2
    assert "remove it, and the same command fetches it again" in capsys.readouterr().err


def test_another_place(site, tmp_path, capsys):
    assert main(["fetch", "images", "--out=my files"]) == 0
    path = "'my files/images of it.npz'"
    assert f"next: python -m diffjax evaluate --samples=samples.npz --reference={path}" in capsys.readouterr().out
    assert not (tmp_path / "cache").exists()


@pytest.mark.parametrize("source", ["mine", f"mine/{public.WEIGHTS}"])
def test_local_files(site, vae, tmp_path, capsys, source):
    folder, module, params = vae
    assert main(["fetch", "vae", f"--from={source}"]) == 0
    assert "--autoencoder=vae --out=samples.npz" in capsys.readouterr().out
    found, loaded, sha256 = autoencoders.read(Autoencoder("vae"))
    assert found == module
    assert sha256 == store.tree_sha256(params)
    assert autoencoders.read(Autoencoder(str(folder)))[2] == sha256  # the source is where it was
    jax.tree.map(np.testing.assert_array_equal, loaded, params)


@pytest.mark.parametrize("source", ["", "/copy/", f"/copy/{public.WEIGHTS}"])
def test_two_files_of_a_server(site, vae, tmp_path, source):
    for file in vae[0].iterdir():
        site.files[f"{'/copy' if source else '/vae'}/{file.name}"] = file.read_bytes()
    given = [f"--from={site.address}{source}"] if source else []
    assert main(["fetch", "vae", *given]) == 0
    for name in (public.WEIGHTS, "config.json"):
        assert (tmp_path / "cache/weights/vae" / name).read_bytes() == (vae[0] / name).read_bytes()
    assert [path.rpartition("/")[2] for path, _, _ in site.asked] == ["config.json", public.WEIGHTS]


def test_the_name_is_a_checkpoint(site, vae, tmp_path, capsys):
    argv = ["convert", "--family=vae", "--checkpoint=vae", "--out=params"]
    assert main(argv) == 2
    assert "vae is no path here and was not fetched yet; `python -m diffjax fetch vae`" in capsys.readouterr().err
    assert main(["fetch", "vae", "--from=mine"]) == 0
    assert main(argv) == 0
    model = json.loads((tmp_path / "params/model.json").read_text())
    assert (model["sha256"], model["checkpoint"]) == (store.tree_sha256(vae[2]), "vae")


def test_the_name_is_an_autoencoder(site, vae, tmp_path):
    """The config of a run keeps the name, not where the cache is."""
    assert main(["fetch", "vae", "--from=mine"]) == 0
    leaves = ["--config.autoencoder.weights=vae", "--config.data.scale=0.5", "--config.data.channels=4"]
    config = load(f"{ROOT / 'configs/imagenet256.py'}:model=dit-s-2,runlocal", leaves)
    assert config.values["autoencoder.weights"] == data_spec(config).autoencoder.weights == "vae"
    decode = load_decoder(Autoencoder("vae"), "no folder", vae[1].latent_channels, Scaling(0.5))
    assert decode(np.zeros((1, 4, 4, vae[1].latent_channels), np.float32)).shape[-1] == 3


@pytest.mark.parametrize(
    "argv, words",
    [
        (["smal"], "public file 'smal' is unknown; did you mean small?; valid: small, vae, by-hand"),
        (
            ["by-hand"],
            "no address that a program could use; get b.ckpt at drive.example/b, then `python -m diffjax fetch",
        ),
        (["small", "vae"], "fetch: 'vae' is not a flag"),
        (["--from=a.bin"], "--from and --out are of one file"),
        (["small", "--from=nothing.bin"], "nothing.bin: no such file"),
        (
            ["small", "--from=bad.bin"],
            f"bad.bin has sha256 {hashlib.sha256(CONTENT[::-1]).hexdigest()}, expected {SHA256}",
        ),
        (["small", "--from=ftp://a/b"], "ftp://a/b: valid: an http:// or https:// address, or a path"),
        (["vae", "--from=bad.bin"], "config.json: no such file"),
        (["small", "--out=bad.bin"], "bad.bin"),
    ],
)
def test_mistakes(site, tmp_path, capsys, argv, words):
    (tmp_path / "bad.bin").write_bytes(CONTENT[::-1])
    assert main(["fetch", *argv]) == 2
    error = capsys.readouterr().err
    assert words in error
    assert error.count("\n") == 1
    assert {path.name for path in tmp_path.glob("cache/weights/*/*")} <= {".lock"}


def test_a_file_of_a_page_is_given(site, tmp_path, capsys):
    (tmp_path / "b.ckpt").write_bytes(CONTENT)
    assert main(["fetch", "by-hand", "--from=b.ckpt"]) == 0
    capsys.readouterr()
    assert main(["fetch", "by-hand"]) == 0
    assert "unchanged" in capsys.readouterr().out


def test_two_processes(site, tmp_path, capsys):
    """Locks of one process do not exclude each other: the second is a program of its own."""
    folder = tmp_path / "cache/weights/taesd"
    folder.mkdir(parents=True)
    log = tmp_path / "log"
    with only_writer(folder):
        process = start(["fetch", "taesd", f"--from={site.address}/"], log, DIFFJAX_CACHE=str(tmp_path / "cache"))
        assert process.wait(120) == 2
    assert f"another process writes in {folder}" in log.read_text()
    assert site.asked == []


def test_it_is_stopped_and_goes_on(site, tmp_path, capsys):
    part = tmp_path / "cache/weights/small/a.bin.part"

    def interrupt():
        while not (part.is_file() and part.stat().st_size):
            time.sleep(0.01)
        os.kill(os.getpid(), signal.SIGINT)
        site.closing.wait(0.5)

    site.amid = interrupt
    assert main(["fetch", "small"]) == 130
    said = "diffjax: fetch: SIGINT: stopped; what has arrived is kept, the same command continues\n"
    assert capsys.readouterr().err.endswith(said)
    arrived = part.stat().st_size
    assert not part.with_name("a.bin").exists()
    assert main(["fetch", "small"]) == 0
    assert site.asked[-1][1:] == (f"bytes={arrived}-", len(CONTENT) - arrived)
    assert part.with_name("a.bin").read_bytes() == CONTENT
