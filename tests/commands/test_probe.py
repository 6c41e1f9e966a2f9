"""A token model from images to scores: tokenize, train, sample, probe; and tokens that are not the run's."""

import dataclasses
import json
import shutil

import jax
import numpy as np
import pytest

from diffjax.__main__ import main
from diffjax.commands import probe as probe_command
from diffjax.config import resolve
from diffjax.data import sources
from diffjax.data import tokens as records
from diffjax.evaluation import linear_probe, protocol
from diffjax.experiment import build
from diffjax.parallel.mesh import make_mesh
from diffjax.runs import open_run
from diffjax.sampling.samples import read_samples
from tests.commands.digit import VOCABULARY, mistake, run_arguments, tokenize, train
from tests.programs import complete_steps, train_arguments

BLOCKS, BASELINES = ("block_0", "block_1"), ("images", "images_of_codes", "counts_of_codes")


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """A run of four steps, its tokens, and tokens of the test images: `run`, `tokens`, `test`."""
    folder = tmp_path_factory.mktemp("world")
    tokens = tokenize(folder / "tokens", "tokens.mirrored=true")
    tokenize(folder / "test", "images.split=test", codebook=tokens / records.CODEBOOK)
    train(folder / "run", tokens, "data.flip=true")
    return folder


def probe_arguments(world, out, *flags: str, test: str = "test") -> list[str]:
    return ["probe", f"--workdir={world / 'run'}", f"--test={world / test}", f"--out={out}", "--steps=200", *flags]


@pytest.fixture(scope="module")
def scored(world):
    assert main(probe_arguments(world, world / "probe.json")) == 0
    return protocol.read(world / "probe.json")


@pytest.mark.slow
def test_the_pictures_are_made_of_the_codebook(world):
    assert complete_steps(world / "run") == [2, 4]
    assert main(["sample", f"--workdir={world / 'run'}", "--num=20", f"--out={world / 'samples.npz'}"]) == 0
    images, labels, made = read_samples(world / "samples.npz")
    assert (images.shape, images.dtype) == ((20, 8, 8, 3), np.uint8)
    np.testing.assert_array_equal(labels, np.arange(20) % 10)
    assert made["origin"]["step"] == 4
    codebook = np.load(world / "tokens" / records.CODEBOOK)
    patches = images[..., 0].reshape(20, 4, 2, 4, 2).transpose(0, 1, 3, 2, 4).reshape(-1, 4) / 127.5 - 1
    nearest = np.abs(patches[:, None] - np.clip(codebook, -1, 1)).max(axis=2).min(axis=1)
    assert nearest.max() < 1.01 / 127.5


@pytest.mark.slow
def test_scores_of_every_block_and_what_to_compare_them_with(scored):
    assert tuple(scored["values"]) == (*BLOCKS, *BASELINES)
    for row in scored["values"].values():
        assert 0.1 < row["value"] < 1
        assert 0.1 < row["train"] <= 1
    assert scored["values"]["images"]["value"] > 0.8  # though half of the digits to learn from are mirrored
    said = scored["protocol"]
    assert {"steps": 200, "batch_size": 256, "learning_rate": 0.4, "seed": 0, "label": "null class"}.items() <= (
        said.items()
    )
    assert (said["train"]["views"], said["test"]["views"]) == (2, 1)
    assert (said["train"]["images"]["split"], said["test"]["images"]["split"]) == ("train", "test")
    assert scored["subject"]["origin"]["step"] == 4
    protocol.compare(scored, scored)


@pytest.mark.slow
def test_scores_of_other_settings_are_not_replaced(world, scored, capsys):
    before = (world / "probe.json").read_bytes()
    assert main(probe_arguments(world, world / "probe.json", "--seed=1")) == 2
    assert "probe.json was made with other settings: protocol.seed (0, now 1); choose" in capsys.readouterr().err
    assert (world / "probe.json").read_bytes() == before


@pytest.mark.slow
def test_the_table_and_its_last_sentence(world, tmp_path, capsys):
    """Another seed of the classifiers is another protocol; the same one gives the same bits."""
    capsys.readouterr()
    assert main(probe_arguments(world, tmp_path / "again.json")) == 0
    printed = capsys.readouterr().out.splitlines()
    assert (tmp_path / "again.json").read_text() == (world / "probe.json").read_text()
    values = protocol.read(tmp_path / "again.json")["values"]
    for line, (name, row) in zip(printed[1:], values.items()):
        assert line.startswith(name.replace("_", " "))
        assert line.endswith(f"{100 * row['value']:.1f}")
    best = max(BLOCKS, key=lambda name: values[name]["value"])
    fewer = round(297 * (values["images"]["value"] - values[best]["value"]))
    assert fewer > 0
    assert f"{best.replace('_', ' ')} is the best on these 297 test images" in printed[-2]
    assert f"does not beat raw pixels, with {100 * values['images']['value']:.1f} % (-{fewer} images)" in printed[-2]


@pytest.mark.parametrize("value, word", [(0.9, "it beats raw pixels"), (0.5, "it equals"), (0.3, "it does not beat")])
def test_the_last_sentence_is_honest(capsys, value, word):
    rows = {"block_0": 0.2, "block_1": value, "images": 0.5}
    probe_command.print_table({name: {"value": v, "train": 1.0} for name, v in rows.items()}, 10)
    assert word in capsys.readouterr().out
    probe_command.print_table({"block_0": {"value": 0.2, "train": 1.0}}, 10)
    assert "there are no raw pixels to compare with" in capsys.readouterr().out


@pytest.fixture(scope="module")
def inputs(world):
    """What classifiers look at, and all that it is made of."""
    run = open_run(world / "run")
    train, test = (probe_command.read(world / name, run.experiment, run.origin["codes"]) for name in ("tokens", "test"))
    return run, train, test, probe_command.of_blocks(run, train, test)


def of_config(run, values):
    """The run as if its config had said something else."""
    config = resolve({**run.experiment.config.values, **values})
    return dataclasses.replace(run, experiment=build(config))


@pytest.mark.slow
def test_features_are_the_models_own_under_the_null_class(inputs):
    run, train, test, blocks = inputs
    assert blocks.train.shape == (3000, 2, 48)
    assert blocks.test.shape == (297, 2, 48)
    model, params, rows = run.experiment.model, jax.device_get(run.params), np.arange(0, 1500, 150)

    def expected(tokens):
        null = np.full(len(tokens), 10)
        return np.asarray(model.apply({"params": params}, tokens, null, method="features")).swapaxes(0, 1)

    np.testing.assert_allclose(blocks.train[rows], expected(train.tokens[rows, 0]), atol=1e-5)
    np.testing.assert_allclose(blocks.train[1500 + rows], expected(train.tokens[rows, 1]), atol=1e-5)
    np.testing.assert_allclose(blocks.test[-10:], expected(test.tokens[-10:, 0]), atol=1e-5)


@pytest.mark.slow
def test_features_do_not_depend_on_devices(inputs):
    run, _, test, blocks = inputs
    few = test._replace(tokens=test.tokens[:9], labels=test.labels[:9])
    one = open_run(run.origin["workdir"], mesh=make_mesh({"data": 1}, jax.devices()[:1]))
    alone = probe_command.of_blocks(one, few, few)
    np.testing.assert_allclose(alone.test, blocks.test[:9], atol=1e-5)


@pytest.mark.slow
def test_what_is_compared_with(inputs):
    run, train, test, _ = inputs
    compared = probe_command.of_pixels(run.experiment, train, test)
    pictures = sources.arrays(run.experiment.images_of_tokens())[0] / 127.5 - 1
    np.testing.assert_allclose(compared["images"].train[:1500, 0], pictures.reshape(1500, -1), atol=1e-6)
    np.testing.assert_allclose(compared["images"].train[1500:, 0], pictures[:, :, ::-1].reshape(1500, -1), atol=1e-6)
    patches = np.load(train.folder / records.CODEBOOK)[test.tokens[0, 0]]
    decoded = patches.reshape(4, 4, 2, 2).transpose(0, 2, 1, 3).reshape(-1)
    np.testing.assert_array_equal(compared["images_of_codes"].test[0, 0], decoded)
    # Images of the tokens resemble the images; counts are of the tokens.
    distance = np.square(compared["images"].train - compared["images_of_codes"].train).mean()
    assert distance < 0.5 * compared["images"].train.var()
    counts = compared["counts_of_codes"]
    assert counts.train.shape == (3000, 1, VOCABULARY)
    assert counts.test[3, 0, test.tokens[3, 0, 5]] == np.sum(test.tokens[3, 0] == test.tokens[3, 0, 5])
    manifest = json.loads(json.dumps(train.manifest))
    manifest["streams"][0]["encoder"]["name"] = "other"
    assert probe_command.of_pixels(run.experiment, train._replace(manifest=manifest), test) == {}


@pytest.mark.slow
def test_a_model_that_only_knows_classes_is_refused(inputs):
    run, train, test, _ = inputs
    run = of_config(run, {"tokens.label_drop": 0.0, "sampling.guidance.scale": 1.0})
    with pytest.raises(probe_command.UserError, match="begins with the class, and it has no null class"):
        probe_command.of_blocks(run, train, test)


@pytest.mark.slow
def test_images_that_are_not_those_of_the_tokens(inputs):
    run, _, test, _ = inputs
    manifest = json.loads(json.dumps(test.manifest))
    manifest["images"]["sha256"] = "0"
    with pytest.raises(probe_command.UserError, match="and the run's config knows other images"):
        probe_command.images(run.experiment, test._replace(manifest=manifest))


@pytest.mark.slow
def test_tokens_are_not_swept(world, tmp_path, capsys):
    sweep = ["sweep", f"--workdir={world / 'run'}", "--sampler=ddim", "--steps=4", "--reference=digits"]
    assert "is a run of a token model" in mistake(capsys, [*sweep, f"--out={tmp_path / 'sweep.json'}"])


@pytest.mark.slow
def test_a_run_whose_tokens_have_moved_goes_on(world, tmp_path, capsys):
    run, moved = shutil.copytree(world / "run", tmp_path / "run"), shutil.copytree(world / "tokens", tmp_path / "moved")
    assert main([*run_arguments(run, moved, "data.flip=true", "total_steps=5"), "--accept=total_steps"]) == 0
    printed = capsys.readouterr().out
    assert f"continuing with data.dir: '{world / 'tokens'}' -> '{moved}'; total_steps: 4 -> 5" in printed
    assert complete_steps(run)[-1] == 5


# What is not the run's own

OTHERS = {  # how other tokens are made, and what the refusal names
    "codebook": (("tokens.seed=7",), "features.codebook_sha256 was"),
    "codes": (("data.vocabulary=20",), "features.codes was 16 and is 20"),
    "grid": (("tokens.patch=4", "data.size=2"), "features.grid was 4 and is 2"),
    "preparation": ((), "features.encoder.image_crop was none and is adm"),
}


@pytest.fixture(scope="module", params=OTHERS)
def moved(request, world):
    """(a copy of the run whose folder of tokens was made anew in another way, what is wrong)."""
    folder = world / request.param
    leaves, wrong = OTHERS[request.param]
    tokenize(folder / "tokens", "tokens.mirrored=true", *leaves)
    if not leaves:  # of another source, images that were cropped
        path = folder / "tokens" / records.MANIFEST
        manifest = json.loads(path.read_text())
        manifest["streams"][0]["encoder"]["image_crop"] = "adm"
        path.write_text(json.dumps(manifest))
    shutil.copytree(world / "run", folder / "run")
    path = folder / "run" / "config.json"
    path.write_text(path.read_text().replace(str(world / "tokens"), str(folder / "tokens")))
    return folder, wrong


@pytest.mark.slow
def test_a_run_whose_tokens_were_made_anew_is_not_sampled(moved, capsys):
    folder, wrong = moved
    error = mistake(capsys, ["sample", f"--workdir={folder / 'run'}", "--num=2", f"--out={folder / 's.npz'}"])
    assert "were not made like those that the run was trained on" in error
    assert wrong in error
    assert "tokenize" in error
    assert not (folder / "s.npz").exists()


@pytest.mark.slow
def test_a_run_whose_tokens_were_made_anew_does_not_go_on(moved, capsys):
    folder, _ = moved
    before = (folder / "run" / "config.json").read_bytes()
    more = run_arguments(folder / "run", folder / "tokens", "data.flip=true", "total_steps=6")
    error = mistake(capsys, [*more, "--accept=total_steps"])
    reasons = ("features.codebook_sha256 was", "data.vocabulary=16, not 20", "patch = 4, not 2", "crop = adm, not none")
    assert sum(reason in error for reason in reasons) == 1
    assert (folder / "run" / "config.json").read_bytes() == before
    assert complete_steps(folder / "run") == [2, 4]


@pytest.mark.slow
def test_other_tokens_are_not_probed(world, moved, tmp_path, capsys):
    folder, wrong = moved
    for flags in ({"test": f"{folder.name}/tokens"}, {}):
        extra = [] if flags else [f"--train={folder / 'tokens'}"]
        error = mistake(capsys, probe_arguments(world, tmp_path / "p.json", *extra, **flags))
        assert wrong in error
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
def test_tokens_of_another_encoder_or_without_labels_are_not_probed(world, tmp_path, capsys):
    changes = (
        (lambda manifest: manifest["streams"][0]["encoder"].update(name="dinov2"), "features.encoder.name was pixels"),
        (lambda manifest: manifest.update(num_classes=0), "have no labels, and a classifier needs them"),
        (lambda manifest: manifest.update(num_classes=11), "differ in their classes"),
    )
    for number, (change, reason) in enumerate(changes):
        copy = shutil.copytree(world / "test", tmp_path / str(number))
        manifest = json.loads((copy / records.MANIFEST).read_text())
        change(manifest)
        (copy / records.MANIFEST).write_text(json.dumps(manifest))
        assert reason in mistake(capsys, probe_arguments(world, tmp_path / "p.json", test=copy))


@pytest.mark.slow
def test_a_codebook_that_is_not_the_one_of_its_manifest(world, tmp_path, capsys):
    copy = shutil.copytree(world / "tokens", tmp_path / "tokens")
    np.save(copy / records.CODEBOOK, 1 + np.load(copy / records.CODEBOOK))
    error = mistake(capsys, probe_arguments(world, tmp_path / "p.json", f"--train={copy}"))
    assert "is not the codebook that the tokens beside it were made with" in error


@pytest.mark.slow
def test_tokens_that_are_not_there(world, tmp_path, capsys):
    error = mistake(capsys, probe_arguments(world, tmp_path / "p.json", test="nothing"))
    assert "tokens.json is missing; make them with: python -m diffjax tokenize" in error
    run = shutil.copytree(world / "run", tmp_path / "run")
    path = run / "config.json"
    path.write_text(path.read_text().replace(str(world / "tokens"), str(tmp_path / "gone")))
    sample = ["sample", f"--workdir={run}", "--num=2", f"--out={tmp_path / 's.npz'}"]
    assert "tokens.json is missing; make them with: python -m diffjax tokenize" in mistake(capsys, sample)


@pytest.mark.slow
def test_a_run_of_another_kind_is_not_probed(world, tmp_path, capsys):
    assert main(train_arguments(tmp_path / "dit", "total_steps=1")) == 0
    arguments = probe_arguments(world, tmp_path / "p.json")
    error = mistake(capsys, [arguments[0], f"--workdir={tmp_path / 'dit'}", *arguments[2:]])
    assert "probe is for token models of image features" in error


@pytest.mark.slow
def test_a_learning_rate_that_diverges_writes_nothing(world, tmp_path, capsys):
    error = mistake(capsys, probe_arguments(world, tmp_path / "p.json", "--learning_rate=1e38"))
    assert "diverged with learning rate 1e+38" in error
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
def test_each_block_is_probed_as_if_alone(scored, inputs):
    *_, train, test, blocks = inputs
    labels = np.tile(train.labels, 2)
    alone = linear_probe.fit(blocks.train[:, 1:], labels, 10, make_mesh({"data": -1}), steps=200)
    (accuracy,) = linear_probe.accuracy(alone, blocks.test[:, 1:], test.labels)
    assert accuracy == pytest.approx(scored["values"]["block_1"]["value"], abs=0.011)  # of 297, three on the border
