"""Both stages of a token model as their user runs them, with small networks in the places of the published ones."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

from diffjax import frozen
from diffjax.__main__ import main
from diffjax.data import tokens as records
from diffjax.files import file_sha256, write_protocol
from diffjax.sampling.samples import read_samples
from diffjax.weights import store
from tests.programs import QUIET, ROOT

pytestmark = pytest.mark.slow

STAGE2 = f"--config={ROOT}/configs/digit_stage2.py:runlocal"
# The recipe's leaves of its own images back at their defaults, which no other source reads.
EMOJI = {"images.name": "emoji32", "images.size": 32, "images.num_classes": 9, "images.dir": "", "images.dataset": ""}


def given(leaves):
    return [f"--config.{leaf}={value}" for leaf, value in leaves.items()]


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    """Folders of a small VQGAN, 2 pixels to a token, and a small DINOv2."""
    folder = tmp_path_factory.mktemp("weights")
    sizes = {"vocabulary": 20, "features": 4, "width": 32, "multipliers": (1, 1), "depth": 1}
    networks = {
        "vqgan": (frozen.create("VQGAN", **sizes), (1, 4, 4, 3)),
        "dinov2": (frozen.create("DINOv2", depth=3, width=24, heads=2, hidden=48), (1, 28, 28, 3)),
    }
    for name, (module, shape) in networks.items():
        params = jax.jit(module.init)(jax.random.key(0), jnp.zeros(shape))["params"]
        store.save(folder / name, module, jax.device_get(params), {})
    return folder


@pytest.fixture(scope="module")
def stage2(weights, tmp_path_factory):
    """Leaves of a second stage on the emoji: from patches of 2 x 2 pixels to the tokens of the small VQGAN."""
    folder = tmp_path_factory.mktemp("tokens") / "emoji"
    own = {
        "data.encoder": "pixels",
        "data.vocabulary": 12,
        "data.decoder_vocabulary": 20,
        "data.dir": folder,
        "tokens.patch": 2,
    }
    leaves = EMOJI | own | {"tokens.decoder": weights / "vqgan", "tokens.iterations": 2}
    assert main(["tokenize", STAGE2, *given(leaves), f"--out={folder}"]) == 0
    return leaves


def test_both_kinds_of_tokens_are_in_the_records(stage2):
    manifest = records.read_manifest(stage2["data.dir"])
    assert [stream["encoder"]["name"] for stream in manifest["streams"]] == ["pixels", "vqgan"]
    assert (manifest["views"], manifest["count"], manifest["num_classes"]) == (2, 1700, 9)


@pytest.mark.parametrize("decoding", ["ar", "nar"])
def test_the_second_stage_makes_pictures_of_tokens(stage2, tmp_path, capsys, decoding):
    run, config = tmp_path / "run", STAGE2.replace(":", f":decoding={decoding},")
    quiet = [f"--config.{leaf}" for leaf in QUIET]
    assert main(["train", config, f"--workdir={run}", *given(stage2), *quiet]) == 0
    tokens = np.random.default_rng(0).integers(0, 12, (5, 256))
    np.savez(tmp_path / "tokens.npz", arr_0=tokens, arr_1=np.arange(5))
    kinds = records.kinds(records.read_manifest(stage2["data.dir"]))
    write_protocol(tmp_path / "tokens.npz", {"origin": {"codes": kinds}})
    sample = ["sample", f"--workdir={run}", "--num=4", f"--out={tmp_path / 's.npz'}"]
    assert main([*sample, f"--source={tmp_path / 'tokens.npz'}"]) == 0
    images, labels, _ = read_samples(tmp_path / "s.npz")
    assert images.shape == (4, 32, 32, 3)
    assert images.std() > 1
    np.testing.assert_array_equal(labels, np.arange(4))

    capsys.readouterr()
    np.savez(tmp_path / "wrong.npz", arr_0=tokens + 1, arr_1=np.arange(5))
    np.savez(tmp_path / "other.npz", arr_0=tokens, arr_1=np.arange(5))
    np.savez(tmp_path / "images.npz", arr_0=np.zeros((5, 8, 8, 3), np.uint8), arr_1=np.arange(5))
    for name in ("wrong", "images"):
        write_protocol(tmp_path / f"{name}.npz", {"origin": {"codes": kinds}})
    others = {"features": kinds["features"] | {"codebook_sha256": "another"}}
    write_protocol(tmp_path / "other.npz", {"origin": {"codes": others}})
    for extra, reason in (
        ([], "give them as --source"),
        ([f"--source={tmp_path / 'wrong.npz'}"], "holds tokens from 1 to 12; valid: 0 to 11"),
        ([f"--source={tmp_path / 'tokens.npz'}", "--first=2"], "has 5 rows; --first=2 and --num=4 need 6"),
        ([f"--source={tmp_path / 'images.npz'}"], "expected integers [n, 256]"),
        ([f"--source={tmp_path / 'nothing.npz'}"], "`sample --raw` of a first stage writes both"),
        ([f"--source={tmp_path / 'other.npz'}"], "'codebook_sha256': 'another'"),
        ([f"--source={tmp_path / 'tokens.npz'}", "--labels=uniform"], "leave out --labels"),
    ):
        assert main([*sample, *extra]) == 2
        assert reason in capsys.readouterr().err


def test_tokens_of_a_first_stage_are_the_source_of_the_second(stage2, tmp_path):
    """Of one folder of tokens: stage 1 on the first kind, whose samples, --raw, are what stage 2 draws pictures of."""
    quiet = [f"--config.{leaf}" for leaf in QUIET]
    first = {leaf: value for leaf, value in stage2.items() if leaf != "tokens.decoder"} | {"sampling.tokens.top_k": 0}
    config = f"--config={ROOT}/configs/digit_stage1.py:runlocal"
    assert main(["train", config, f"--workdir={tmp_path / '1'}", *given(first), *quiet]) == 0
    assert main(["train", STAGE2, f"--workdir={tmp_path / '2'}", *given(stage2), *quiet]) == 0
    tokens = tmp_path / "tokens.npz"
    assert main(["sample", f"--workdir={tmp_path / '1'}", "--raw", "--num=3", f"--out={tokens}"]) == 0
    out = tmp_path / "s.npz"
    assert main(["sample", f"--workdir={tmp_path / '2'}", f"--source={tokens}", "--num=3", f"--out={out}"]) == 0
    images, _, protocol = read_samples(out)
    assert images.shape == (3, 32, 32, 3)
    assert protocol["source"]["file_sha256"] == file_sha256(tokens)
    assert protocol["source"]["workdir"] == str(tmp_path / "1")


def test_a_decoder_that_did_not_make_the_tokens_is_refused(stage2, weights, tmp_path, capsys):
    config = f"--config={ROOT}/configs/digit_stage1.py:model=digit-b-vq,runlocal"
    leaves = EMOJI | {"data.vocabulary": 20, "data.dir": tmp_path / "tokens", "tokens.weights": weights / "dinov2"}
    assert main(["tokenize", config, *given(leaves), f"--out={tmp_path / 'tokens'}"]) == 2
    assert "holds a DINOv2, not a vqgan" in capsys.readouterr().err
    leaves["tokens.weights"] = ""
    assert main(["tokenize", config, *given(leaves), f"--out={tmp_path / 'tokens'}"]) == 2
    assert "python -m diffjax convert --family=vqgan" in capsys.readouterr().err
    leaves["tokens.weights"] = weights / "vqgan"
    book = stage2["data.dir"] / records.CODEBOOK
    assert main(["tokenize", config, *given(leaves), f"--out={tmp_path / 'tokens'}", f"--codebook={book}"]) == 2
    assert "has its own" in capsys.readouterr().err
    assert not (tmp_path / "tokens").exists()


def test_features_of_dinov2_become_tokens(weights, tmp_path, capsys):
    for i in range(3):
        path = tmp_path / "images" / f"{i}.png"
        path.parent.mkdir(exist_ok=True)
        Image.fromarray(np.random.default_rng(i).integers(0, 256, (224, 224, 3), np.uint8)).save(path)
    images = {"images.name": "folder", "images.dir": tmp_path / "images", "images.split": "", "images.size": 224}
    images |= {"images.dataset": ""}
    leaves = images | {"images.num_classes": 0, "images.crop": "none", "data.vocabulary": 6, "tokens.layer": 2}
    config = [f"--config={ROOT}/configs/digit_stage1.py:runlocal", *given(leaves)]
    out = tmp_path / "tokens"
    options = [f"--config.tokens.weights={weights / 'dinov2'}", f"--out={out}", "--batch_size=8"]
    assert main(["tokenize", *config, *options]) == 0
    manifest = records.read_manifest(out)
    encoder = manifest["streams"][0]["encoder"]
    assert (encoder["name"], encoder["layer"], manifest["count"]) == ("dinov2", 2, 3)
    assert np.load(out / records.CODEBOOK).shape == (6, 24)
    capsys.readouterr()
    assert main(["tokenize", *config, *options, "--config.data.size=8"]) == 2
    assert "dinov2 makes 16 x 16 features of 224 or 256 pixels" in capsys.readouterr().err
