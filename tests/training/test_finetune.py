"""Runs that start from other parameters: what is kept is kept bit for bit, and what does not fit has to be named."""

import json
import shutil
from pathlib import Path

import jax
import numpy as np
import pytest

from diffjax import weights
from diffjax.__main__ import main
from diffjax.config import Config, load, model_defaults, override, write
from diffjax.config.trained import of_start
from diffjax.data import sources
from diffjax.errors import UserError
from diffjax.experiment import build
from diffjax.parallel.rules import key_path
from diffjax.runs import open_run
from diffjax.training import finetune
from diffjax.weights import store
from tests.programs import tiny_config, train_arguments


@pytest.fixture(scope="module")
def trained(tmp_path_factory) -> Path:
    """A short run on the ten digits."""
    workdir = tmp_path_factory.mktemp("finetune") / "run"
    assert main(train_arguments(workdir, "total_steps=2")) == 0
    return workdir


@pytest.fixture(scope="module")
def converted(trained, tmp_path_factory) -> Path:
    """Its averaged parameters by way of the reference's layout, as `convert` writes them."""
    run = open_run(trained)
    out = tmp_path_factory.mktemp("converted") / "own"
    state = weights.to_reference("dit", run.experiment.model, run.params)
    module, params = weights.from_reference("dit", state, num_heads=3)
    store.save(out, module, params, {"family": "dit"})
    return out


def flat(tree) -> dict[str, np.ndarray]:
    return {key_path(path): np.asarray(leaf) for path, leaf in jax.tree_util.tree_leaves_with_path(tree)}


def started(source: Path, *overrides: str, new: str = "") -> tuple[dict[str, np.ndarray], dict[str, np.ndarray]]:
    """Parameters at step 0 of a run that starts from `source`, and those of one that starts fresh."""
    experiment = build(tiny_config(*overrides, f"init.from={source}", f"init.new={new}"))
    state = finetune.initial_state(experiment, finetune.find_start(experiment))
    np.testing.assert_array_equal(*(jax.tree.leaves(tree)[0] for tree in (state.params, state.ema)))
    return flat(state.params), flat(experiment.init().params)


def test_another_model_is_said_in_leaves_to_give(trained, converted):
    for source in (trained, converted):
        with pytest.raises(UserError, match=r"holds another model \(width 48 not 72\); give --config.model.width=48"):
            started(source, "model.width=72")
        with pytest.raises(UserError, match=r"a DiT and not a DiS; give --config.model.name=DiT"):
            started(source, "model.name=DiS")


def test_another_model_of_a_published_name_is_given_by_its_name(trained, tmp_path):
    shutil.copytree(trained, tmp_path / "run")
    path = tmp_path / "run/config.json"
    stored = json.loads(path.read_text())
    named = {**stored, "model": model_defaults("dit-s-4") | {"name": "dit-s-4"}}
    path.write_text(json.dumps(named))
    with pytest.raises(UserError, match=r"width 384 not 48, .*; give --config.model.name=dit-s-4$"):
        started(tmp_path / "run", "model.heads=4")
    with pytest.raises(UserError, match=r"give --config.model.name=DiT .*--config.model.width=48"):
        started(trained, "model.name=dit-s-4")


def test_a_run_that_does_not_say_its_model_is_answered_with_the_arrays_that_differ(trained, tmp_path):
    shutil.copytree(trained, tmp_path / "run")
    for text in (None, "[]"):
        (tmp_path / "run/config.json").unlink()
        if text:
            (tmp_path / "run/config.json").write_text(text)
        with pytest.raises(
            UserError, match=r"does not fit this model: blocks/.* for \[.*; name what is to start fresh"
        ):
            started(tmp_path / "run", "model.width=72")
        (tmp_path / "run/config.json").write_text("{}")


def test_the_start_of_a_path_is_said_where_a_part_has_no_name(converted, tmp_path):
    r = np.random.default_rng(0)
    np.savez(tmp_path / "train.npz", images=r.integers(256, size=(9, 8, 8, 3), dtype=np.uint8), conditions=np.arange(9))
    leaves = ("data.name=arrays", f"data.dir={tmp_path}", "data.channels=3", "data.num_classes=10")
    with pytest.raises(UserError, match=r"patch_embed/kernel .* for example init.new = head,patch_embed$"):
        started(converted, *leaves)


@pytest.mark.slow
def test_output_channels_of_a_variance_are_left_out_where_the_process_has_none(converted, caplog):
    """As of SiT's public weights: DiT's, with twice the channels that a flow process uses."""
    flow = ("diffusion.process=flow_linear", "diffusion.flow_linear.prediction=velocity", "sampling.clip=false")
    with caplog.at_level("INFO"):
        found, _ = started(converted, *flow)
    assert "has 2 output channels; the last 1, of a variance, are not used and left out" in caplog.text
    _, stored, _ = store.load(converted)
    whole = flat(stored)
    for path, array in found.items():
        expected = whole[path]
        if path.startswith("final/linear"):
            expected = expected.reshape(*expected.shape[:-1], -1, 2)[..., 0]
        np.testing.assert_array_equal(array, expected, path)


def halved_digits(folder: Path) -> tuple[str, ...]:
    """Digits of 16 x 16 pixels in five classes."""
    for split in ("train", "test"):
        images, labels = sources.arrays(sources.digits(split=split))
        np.savez(folder / f"{split}.npz", images=images.repeat(2, axis=1).repeat(2, axis=2), conditions=labels // 2)
    return ("data.name=arrays", f"data.dir={folder}", "data.size=16", "data.num_classes=5")


@pytest.mark.parametrize("kind", ["run", "parameters"])
def test_what_fits_is_kept_bit_for_bit(kind, trained, converted, capsys):
    source = trained if kind == "run" else converted
    params, _ = started(source)
    expected = flat(open_run(trained).params)
    assert params.keys() == expected.keys()
    for path, leaf in expected.items():
        np.testing.assert_array_equal(params[path], leaf, err_msg=path)
    assert "  new: " not in capsys.readouterr().out


@pytest.mark.slow
def test_another_label_table_and_image_size(converted, trained, tmp_path, capsys):
    leaves = halved_digits(tmp_path)
    with pytest.raises(UserError, match=r"label_embed/embedding \[11, 48\] for \[6, 48\]; .* init.new = labels"):
        started(converted, *leaves)
    params, fresh = started(converted, *leaves, new="labels")
    expected = flat(open_run(trained).params)
    np.testing.assert_array_equal(params["label_embed/embedding"], fresh["label_embed/embedding"])
    for path in expected.keys() - {"label_embed/embedding"}:
        np.testing.assert_array_equal(params[path], expected[path], err_msg=path)
    assert "  new: label_embed/embedding [6, 48]" in capsys.readouterr().out


@pytest.mark.slow
def test_a_null_class_is_one_more_row(tmp_path, capsys):
    plain = ("diffusion.label_drop=0", "sampling.guidance.scale=1")
    assert main(train_arguments(tmp_path / "plain", *plain, "total_steps=1")) == 0
    with pytest.raises(UserError, match="init.new = null_class"):
        started(tmp_path / "plain")
    params, fresh = started(tmp_path / "plain", new="null_class")
    table = flat(open_run(tmp_path / "plain").params)["label_embed/embedding"]
    np.testing.assert_array_equal(params["label_embed/embedding"][:10], table)
    np.testing.assert_array_equal(params["label_embed/embedding"][10], fresh["label_embed/embedding"][10])
    assert "the last row of label_embed/embedding" in capsys.readouterr().out


def test_a_name_that_means_nothing_is_refused(converted):
    with pytest.raises(UserError, match="'lables' is no part of this model .* valid: labels, head, null_class"):
        started(converted, new="lables")
    with pytest.raises(UserError, match="init.new = .* is not read without init.from"):
        tiny_config("init.new=labels")


def test_parameters_that_do_not_fit_cost_nothing(converted, tmp_path, capsys):
    workdir = tmp_path / "run"
    assert main(train_arguments(workdir, *halved_digits(tmp_path), f"init.from={converted}")) == 2
    assert not workdir.exists()
    assert main(train_arguments(workdir, f"init.from={tmp_path}/nowhere")) == 2
    assert "nowhere" in capsys.readouterr().err
    assert not workdir.exists()


RECIPE = "configs/quickstart.py:runlocal"  # which leaves the backbone open


@pytest.fixture
def smaller(tmp_path) -> Path:
    """Parameters of one block of width 24, as `convert` writes them."""
    return zeros(build(tiny_config("model.depth=1", "model.width=24", "model.heads=2")), tmp_path / "smaller")


def zeros(experiment, out: Path) -> Path:
    """Parameters of a backbone, all 0, which nothing has to be compiled for."""
    params = jax.tree.map(lambda leaf: np.zeros(leaf.shape, leaf.dtype), experiment.abstract.params)
    store.save(out, experiment.model, params, {})
    return out


@pytest.mark.slow
def test_a_run_has_the_backbone_that_it_starts_from_and_goes_on_without(smaller, tmp_path, capsys):
    arguments = train_arguments(tmp_path / "run", f"init.from={smaller}", "total_steps=1", "model.remat=full")
    arguments[1] = f"--config={RECIPE}"
    assert main(arguments) == 0
    assert "the backbone is that of init.from: model.depth: 2 -> 1; model.heads: 3 -> 2" in capsys.readouterr().out
    stored = json.loads((tmp_path / "run/config.json").read_text())["model"]
    assert stored == stored | {"name": "DiT", "depth": 1, "width": 24, "heads": 2, "remat": "full"}
    smaller.rename(tmp_path / "moved")
    assert main([*arguments, "--config.total_steps=2", "--accept=total_steps"]) == 0
    assert "the backbone is that of" not in capsys.readouterr().out


def test_the_family_and_a_published_name_are_taken_over(tmp_path):
    leaves = tiny_config(model="dis").model
    zeros(build(tiny_config(model="dis")), tmp_path / "dis")
    recipe = load(RECIPE)
    taken = of_start(config_of(recipe, tmp_path / "dis"), [], None, finetune.model_of)
    assert (taken.model.name, taken.model.options["d_state"]) == ("DiS", leaves.options["d_state"])
    (tmp_path / "run/checkpoints").mkdir(parents=True)
    write(
        load(RECIPE.replace("quickstart", "imagenet256"), ["--config.model.name=dit-s-4"]), tmp_path / "run/config.json"
    )
    taken = of_start(config_of(recipe, tmp_path / "run"), [], None, finetune.model_of)
    assert (taken.model.name, taken.model.options["width"]) == ("dit-s-4", 384)


def config_of(config: Config, start: Path) -> Config:
    return override(config, [f"--config.init.from={start}"])


@pytest.mark.parametrize("given", ["model=dit", "--config.model.depth=2", "--config.model.name=DiT"])
def test_a_backbone_that_was_chosen_stays(given, smaller, tmp_path, capsys):
    arguments = train_arguments(tmp_path / "run", f"init.from={smaller}")
    arguments[1] = f"--config={RECIPE}" + (f",{given}" if given.startswith("model") else "")
    assert main([*arguments, *([given] if given.startswith("--") else [])]) == 2
    assert "holds another model (depth 1 not 2" in capsys.readouterr().err


@pytest.mark.slow
def test_fine_tuning_beats_a_start_from_scratch(tmp_path):
    def held_out_loss(name: str, *leaves: str) -> float:
        common = ("evals.loss.every_steps=60", "optim.lr=2e-3", "batch_size=32", "ema.decay=0.9")
        assert main(train_arguments(tmp_path / name, *common, *leaves)) == 0
        step = max((tmp_path / name / "evals").glob("loss_*.json"))
        return json.loads(step.read_text())["values"]["loss"]

    held_out_loss("before", "total_steps=240")
    other = (*halved_digits(tmp_path), "total_steps=60")
    tuned = held_out_loss("tuned", *other, f"init.from={tmp_path / 'before'}", "init.new=labels")
    assert tuned < held_out_loss("scratch", *other)
