"""Images to tokens through the command line: what the tokens are, the same on any devices and after an interruption."""

import jax
import numpy as np
import pytest

from diffjax import inputs
from diffjax.commands import tokenize as tokenize_command
from diffjax.data import sources
from diffjax.data import tokens as records
from diffjax.data.source import Source
from diffjax.files import LOCK
from diffjax.parallel.mesh import make_mesh
from diffjax.tokens import kmeans
from tests.commands.digit import VOCABULARY, mistake, tokenize, tokenize_arguments
from tests.programs import TINY

GRID, PATCH = 4, 2
DIGITS = {"size": 8, "channels": 1, "num_classes": 10, "flip": False}


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """Tokens of the training images, with a codebook of their own."""
    return tokenize(tmp_path_factory.mktemp("tokens") / "train", "tokens.mirrored=true")


def digits(split: str) -> tuple[np.ndarray, np.ndarray]:
    return sources.arrays(sources.load("digits", **DIGITS, split=split))


def nearest(images: np.ndarray, codebook: np.ndarray) -> np.ndarray:
    """Tokens [n, places] of uint8 images, in numpy."""
    values = images.astype(np.float64) / 127.5 - 1
    n = len(values)
    patches = values.reshape(n, GRID, PATCH, GRID, PATCH).transpose(0, 1, 3, 2, 4).reshape(n, GRID**2, -1)
    return np.square(patches[:, :, None] - codebook).sum(axis=-1).argmin(axis=-1)


def stored(folder) -> tuple[np.ndarray, np.ndarray]:
    """Tokens [n, views, places] and labels [n]."""
    leaves = {"encoder": "pixels", "vocabulary": VOCABULARY, "decoder_vocabulary": 0, "dir": str(folder)}
    examples = sources.load("tokens", size=GRID, channels=1, num_classes=10, flip=False, **leaves).examples
    read = [examples[i] for i in range(len(examples))]
    return np.stack([e["image"][:, 0] for e in read]), np.array([e["label"] for e in read])


def test_tokens_are_of_the_nearest_centroids_of_an_image_and_of_its_mirror_image(made):
    images, labels = digits("train")
    codebook = np.load(made / records.CODEBOOK)
    tokens, read = stored(made)
    assert (tokens.shape, codebook.shape) == ((1500, 2, GRID**2), (VOCABULARY, PATCH**2))
    np.testing.assert_array_equal(read, labels)
    for view, pictures in enumerate((images, images[:, :, ::-1])):
        assert np.mean(tokens[:, view] == nearest(pictures, codebook)) > 0.9999  # all but ties
    assert len(np.unique(tokens)) == VOCABULARY
    assert not list(made.glob(f"{tokenize_command.FIT}*"))


def test_the_manifest_says_how(made):
    manifest = records.read_manifest(made)
    (stream,) = manifest["streams"]
    assert stream["encoder"] == {"name": "pixels", "patch": PATCH, "image_size": 8, "image_crop": "none"}
    assert (stream["codes"], stream["grid"], manifest["views"], manifest["num_classes"]) == (VOCABULARY, GRID, 2, 10)
    assert stream["codebook_sha256"] == records.codebook_sha256(np.load(made / records.CODEBOOK))
    assert manifest["images"] == sources.load("digits", **DIGITS).fingerprint


def test_other_images_with_the_same_codebook(made, tmp_path):
    out = tokenize(tmp_path / "test", "images.split=test", codebook=made / records.CODEBOOK)
    assert (out / records.CODEBOOK).read_bytes() == (made / records.CODEBOOK).read_bytes()
    assert records.check_kinds(out, records.kinds(records.read_manifest(made)))["images"]["split"] == "test"
    images, labels = digits("test")
    tokens, read = stored(out)
    np.testing.assert_array_equal(read, labels)
    np.testing.assert_array_equal(tokens[:, 0], nearest(images, np.load(out / records.CODEBOOK)))


def test_one_device_and_eight_write_the_same_bytes(made, tmp_path, monkeypatch):
    monkeypatch.setattr(tokenize_command, "make_mesh", lambda sizes: make_mesh({"data": 1}, jax.devices()[:1]))
    alone = tokenize(tmp_path / "one", "tokens.mirrored=true")
    assert records.read_manifest(alone) == records.read_manifest(made)
    assert (alone / records.CODEBOOK).read_bytes() == (made / records.CODEBOOK).read_bytes()


def test_a_codebook_of_some_images_is_of_the_chosen_ones(made, tmp_path):
    few = tokenize(tmp_path / "few", "tokens.fit_images=40")
    assert records.read_manifest(few)["count"] == 1500
    assert (few / records.CODEBOOK).read_bytes() != (made / records.CODEBOOK).read_bytes()


class Killed(BaseException):
    pass


def test_an_interrupted_fit_goes_on_to_the_same_codebook(made, tmp_path, monkeypatch, capsys):
    write, out = kmeans.write_state, tmp_path / "tokens"

    def write_and_die(path, origin, done):
        write(path, origin, done)
        if done.iteration == 2:
            raise Killed

    with monkeypatch.context() as patched:
        patched.setattr(kmeans, "write_state", write_and_die)
        with pytest.raises(Killed):
            tokenize(out, "tokens.mirrored=true")
    assert sorted(path.name for path in out.iterdir()) == [LOCK, tokenize_command.FIT]
    error = mistake(capsys, tokenize_arguments(out, "tokens.seed=5"))
    assert "is of a fit of other points or settings" in error
    assert "seed 1234 there, 5 here" in error

    iterations = []
    monkeypatch.setattr(kmeans, "write_state", lambda path, origin, done: iterations.append(done.iteration))
    tokenize(out, "tokens.mirrored=true")
    assert iterations == [3, 4]
    assert (out / records.CODEBOOK).read_bytes() == (made / records.CODEBOOK).read_bytes()
    assert records.read_manifest(out) == records.read_manifest(made)
    assert not (out / tokenize_command.FIT).exists()


def test_unlabelled_images(tmp_path, monkeypatch):
    images = np.random.default_rng(0).integers(256, size=(40, 8, 8, 1), dtype=np.uint8)

    def load(*_) -> Source:
        return Source("some", sources.ArrayExamples(images, np.zeros(40, int)), 8, 1, 0, {"name": "some"})

    monkeypatch.setattr(inputs, "load_source", load)
    out = tokenize(tmp_path / "tokens", "data.num_classes=0")
    assert records.read_manifest(out)["num_classes"] == 0


REFUSED = {
    "encoder": (("data.encoder=clip",), "data.encoder='clip' is unknown; valid: pixels"),
    "size": (("tokens.patch=3",), "images.size = 8 is not tokens.patch = 3 times data.size = 4"),
    "no-pixels": (("images.name=latents",), "images.name = 'latents': valid: digits, emoji32, folder, tfds"),
    "tokens-of-tokens": (("images.name=tokens",), "images.name = 'tokens': valid: digits, emoji32, folder, tfds"),
    "init": (("tokens.init=first",), "tokens.init = 'first': valid: random"),
    "too-many-tokens": (("data.vocabulary=25000",), "24000 points cannot have k = 25000 centroids"),
}


@pytest.mark.parametrize("leaves, reason", REFUSED.values(), ids=REFUSED)
def test_refusals(tmp_path, capsys, leaves, reason):
    assert reason in mistake(capsys, tokenize_arguments(tmp_path / "tokens", *leaves))
    assert not (tmp_path / "tokens" / records.MANIFEST).exists()


def test_the_config_of_a_diffusion_model(tmp_path, capsys):
    error = mistake(capsys, ["tokenize", f"--config={TINY}", f"--out={tmp_path / 'tokens'}"])
    assert "the config is that of DiT, which has no tokens; give one of DiGIT" in error
    assert not list(tmp_path.iterdir())


def test_a_codebook_that_does_not_fit(made, tmp_path, capsys):
    codebook = np.load(made / records.CODEBOOK)
    bad = codebook.copy()
    bad[3, 0] = np.nan
    for array, reason in (
        (codebook[:9], f"the codebook of pixels has 9 centroids, but data.vocabulary = {VOCABULARY}"),
        (codebook[:, :3], "do not fit"),
        (bad, "centroid 3 of 16 holds a value that is not finite"),
    ):
        np.save(tmp_path / "other.npy", array)
        error = mistake(capsys, tokenize_arguments(tmp_path / "tokens", codebook=tmp_path / "other.npy"))
        assert reason in error
    assert "nothing.npy" in mistake(capsys, tokenize_arguments(tmp_path / "tokens", codebook=tmp_path / "nothing.npy"))


def test_a_folder_that_holds_tokens_already(made, capsys):
    before = {path.name: path.stat().st_mtime_ns for path in made.iterdir()}
    assert "already holds tokens.json; remove it" in mistake(capsys, tokenize_arguments(made))
    assert {path.name: path.stat().st_mtime_ns for path in made.iterdir()} == before
