"""Images by number through the command line: subsets, raw values, labels, converted parameters."""

import json
import shutil
from collections import OrderedDict

import jax
import numpy as np
import pytest
from PIL import Image

from diffjax.__main__ import main
from diffjax.commands import sample as samples_command
from diffjax.commands.inspect import inspect
from diffjax.errors import UserError
from diffjax.experiment import build
from diffjax.parallel.mesh import make_mesh
from diffjax.runs import check_same_process, open_run
from diffjax.sampling.samples import read_samples
from diffjax.training.checkpoint import Checkpoints
from diffjax.weights import store, to_reference
from tests.programs import ROOT, method_of, tiny_config, train_arguments
from tests.training.test_devices import LAYOUTS, OWN_SHAPES, SHAPES
from tests.weights.torch_writer import tensor, write_zip

QUICKSTART = f"--config={ROOT}/configs/quickstart.py:model=dit,runlocal"


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    workdir = tmp_path_factory.mktemp("runs") / "run"
    options = ("total_steps=4", "checkpoint.every_steps=2", "optim.warmup_steps=0", "ema.decay=0.5")
    assert main(train_arguments(workdir, *options)) == 0
    return workdir


def sample(out, *flags):
    assert main(["sample", f"--out={out}", *flags]) == 0
    return out


@pytest.fixture(scope="module")
def full(run):
    return read_samples(sample(run.parent / "full.npz", f"--workdir={run}", "--num=24", "--batch_size=8"))


def test_files_and_protocol(run, full):
    images, labels, protocol = full
    assert images.shape == (24, 8, 8, 3)
    assert images.std() > 10
    np.testing.assert_array_equal(labels, np.arange(24) % 10)
    assert (run.parent / "full.png").stat().st_size > 100
    assert {"num": 24, "first": 0, "seed": 0, "labels": "interleaved"}.items() <= protocol.items()
    assert protocol["origin"]["step"] == 4
    assert protocol["origin"]["sha256"] == inspect(run)["sha256"]["ema"]


@pytest.mark.parametrize(
    "flags", [("--first=8", "--num=8", "--batch_size=8"), ("--first=5", "--num=11", "--batch_size=8")]
)
def test_a_subset_is_the_same_bits_in_batches_of_the_same_shape(run, full, tmp_path, flags):
    first = int(flags[0].partition("=")[2])
    images, labels, protocol = read_samples(sample(tmp_path / "s.npz", f"--workdir={run}", *flags))
    np.testing.assert_array_equal(images, full[0][first : first + len(images)])
    np.testing.assert_array_equal(labels, full[1][first : first + len(images)])
    assert protocol["first"] == first


def test_a_subset_in_other_batches_differs_by_rounding_alone(run, full, tmp_path):
    images, labels, _ = read_samples(sample(tmp_path / "s.npz", f"--workdir={run}", "--first=3", "--num=20"))
    assert np.abs(images.astype(int) - full[0][3:23].astype(int)).max() <= 1
    np.testing.assert_array_equal(labels, full[1][3:23])


def test_a_second_run_writes_the_same_file(run, tmp_path):
    files = [sample(tmp_path / name, f"--workdir={run}", "--num=8") for name in ("a.npz", "b.npz")]
    protocols = [json.loads(file.with_suffix(".json").read_text()) for file in files]
    assert protocols[0] == protocols[1]
    np.testing.assert_array_equal(read_samples(files[0])[0], read_samples(files[1])[0])


def test_a_finished_file_is_left_alone(run, tmp_path, monkeypatch, capsys):
    """The same request draws nothing, another one is refused, and --overwrite replaces the file."""
    drawn = []
    written = samples_command.write
    monkeypatch.setattr(samples_command, "write", lambda out, *rest: drawn.append(out) or written(out, *rest))
    out = tmp_path / "s.npz"
    flags = ["sample", f"--workdir={run}", "--num=8", f"--out={out}"]
    assert main([*flags, "--labels=2"]) == 0
    before = out.read_bytes()
    capsys.readouterr()
    assert main([*flags, "--labels=2"]) == 0
    assert f"{out} is finished: 8 of " in capsys.readouterr().out
    others = {"--labels=1": 'labels ("2", now "1")', "--raw": "raw (not given, now true)"}
    for other, words in others.items():
        assert main([*flags, "--labels=2", other]) == 2
        error = capsys.readouterr().err
        assert f"{out} was made with other settings: " in error
        assert words in error
        assert error.count("\n") == 1
    out.with_suffix(".json").rename(tmp_path / "elsewhere.json")
    assert main([*flags, "--labels=2"]) == 2
    assert f"{out} is there already and does not say what it is; choose another --out" in capsys.readouterr().err
    assert (drawn, out.read_bytes()) == ([out], before)
    assert main([*flags, "--labels=1", "--overwrite"]) == 0
    assert read_samples(out)[2]["labels"] == "1"
    assert len(drawn) == 2


def test_a_result_is_not_replaced_by_the_description_of_samples(run, tmp_path, capsys):
    (tmp_path / "scores.json").write_text('{"values": {}}')
    assert main(["sample", f"--workdir={run}", "--num=8", f"--out={tmp_path / 'scores.npz'}"]) == 2
    assert f"{tmp_path / 'scores.json'} is there already" in capsys.readouterr().err
    assert (tmp_path / "scores.json").read_text() == '{"values": {}}'


@pytest.mark.slow
def test_seed_step_and_weights_change_the_images(run, full, tmp_path):
    for flag in ("--seed=1", "--step=2", "--weights=params"):
        flags = (f"--workdir={run}", "--num=8", "--overwrite", flag)
        images, _, protocol = read_samples(sample(tmp_path / "s.npz", *flags))
        assert (images != full[0][:8]).any(), flag
    assert protocol["origin"]["sha256"] == inspect(run)["sha256"]["params"]


def test_raw_values_are_those_that_are_rounded(run, full, tmp_path):
    out = sample(tmp_path / "s.npz", f"--workdir={run}", "--num=8", "--raw")
    with np.load(out) as arrays:
        raw, labels = arrays["arr_0"], arrays["arr_1"]
    assert (raw.dtype, raw.shape, labels.dtype) == (np.float32, (8, 8, 8, 1), np.int32)
    rounded = np.clip(127.5 * raw + 128, 0, 255).astype(np.uint8).repeat(3, axis=-1)
    np.testing.assert_array_equal(rounded, full[0][:8])
    np.testing.assert_array_equal(labels, full[1][:8])


def test_uniform_labels_depend_on_the_number_alone(run, tmp_path):
    flags = (f"--workdir={run}", "--labels=uniform", "--batch_size=8")
    _, labels, protocol = read_samples(sample(tmp_path / "all.npz", *flags, "--num=40"))
    assert protocol["labels"] == "uniform"
    assert len(set(labels)) > 5
    assert (labels != np.arange(40) % 10).any()
    _, part, _ = read_samples(sample(tmp_path / "part.npz", *flags, "--num=8", "--first=16"))
    np.testing.assert_array_equal(part, labels[16:24])


def test_chosen_classes_and_their_names(run, tmp_path):
    """Of digits the names are the numbers; the columns of the picture stand for classes."""
    out = sample(tmp_path / "s.npz", f"--workdir={run}", "--labels=7,2", "--num=5")
    _, labels, protocol = read_samples(out)
    assert labels.tolist() == [7, 2, 7, 2, 7]
    assert (protocol["labels"], protocol["classes"]) == ("7,2", {"2": "2", "7": "7"})
    with Image.open(out.with_suffix(".png")) as picture:
        assert picture.width == 2 * 66
    assert main(["sample", f"--out={out}", f"--workdir={run}", "--labels=10", "--num=5"]) == 2


def test_raw_values_that_are_not_finite_are_refused(run, tmp_path, monkeypatch, capsys):
    drawn = np.zeros((4, 8, 8, 1), np.float32)
    drawn[2, 0, 0] = np.nan
    monkeypatch.setattr("diffjax.sampling.generate.generate", lambda *_: [(np.arange(4) + 3, drawn)])
    for flags in (["--raw"], []):
        command = ["sample", f"--out={tmp_path / 's.npz'}", f"--workdir={run}", "--num=4", "--first=3", *flags]
        assert main(command) == 2
        assert "sample 5: 1 of 256 sampled values are not finite" in capsys.readouterr().err
        shutil.rmtree(tmp_path / "s.npz.parts")


def test_leaves_of_sampling_can_be_overridden(run, full, tmp_path):
    out = sample(tmp_path / "s.npz", f"--workdir={run}", "--num=8", "--config.sampling.steps=2")
    images, _, protocol = read_samples(out)
    assert protocol["sampling"]["steps"] == 2
    assert (images != full[0][:8]).any()


def test_converted_parameters(run, full, tmp_path):
    """The run's averaged weights out to a torch file, back through `convert`, and sampled: the same images."""
    config = tiny_config()
    ema = Checkpoints(run, read_only=True).restore_arrays("ema", 4)
    weights = to_reference("dit", build(config).model, ema)
    named = OrderedDict((key, tensor(np.asarray(value), str(i))) for i, (key, value) in enumerate(weights.items()))
    checkpoint = write_zip(tmp_path / "tiny.pt", {"ema": named})
    params = tmp_path / "params"
    convert = ["convert", "--family=dit", f"--checkpoint={checkpoint}", f"--out={params}", "--arguments=num_heads=3"]
    assert main(convert) == 0
    larger = QUICKSTART.replace(",runlocal", "")  # a recipe of another size: the folder says which model it is
    for recipe in ([QUICKSTART], [larger, "--config.sampling.steps=4"]):
        out = sample(tmp_path / f"{len(recipe)}.npz", f"--params={params}", *recipe, "--num=16", "--batch_size=8")
        images, _, protocol = read_samples(out)
        np.testing.assert_array_equal(images, full[0][:16])
        assert protocol["origin"]["sha256"] == full[2]["origin"]["sha256"]
        assert (protocol["model"]["width"], protocol["model"]["depth"]) == (48, 2)


@pytest.mark.slow
def test_a_guide_from_a_run_or_from_parameters(run, full, tmp_path):
    """Away from itself leads nowhere; away from another network elsewhere; both kinds of folder give the same."""
    flags = (f"--workdir={run}", "--num=8", "--batch_size=8", "--config.sampling.guidance.scale=3")
    itself, _, protocol = read_samples(sample(tmp_path / "a.npz", *flags, f"--guide={run}"))
    plain = sample(tmp_path / "b.npz", *flags[:3], "--config.sampling.guidance.scale=1")
    assert np.abs(itself.astype(int) - read_samples(plain)[0].astype(int)).max() <= 1
    assert protocol["sampling"]["guide_sha256"] == protocol["origin"]["sha256"]
    assert "guide_sha256" not in full[2]["sampling"]

    module, params = method_of(tiny_config()).model, Checkpoints(run, read_only=True).restore_arrays("ema", 4)
    store.save(tmp_path / "same", module, params, {})
    store.save(tmp_path / "other", module, jax.tree.map(lambda leaf: 0.5 * leaf, params), {})
    images = {}
    for name in ("same", "other"):
        out = sample(tmp_path / f"{name}.npz", *flags, f"--guide={tmp_path / name}")
        images[name] = read_samples(out)[0]
    np.testing.assert_array_equal(images["same"], itself)
    assert (images["other"] != itself).any()


def test_parameters_must_be_called_and_read_as_the_config_says(tmp_path):
    def check(trained, config):
        check_same_process(tmp_path, trained, config, "guide")

    edm = tiny_config("diffusion.process=edm", "sampling.sampler=edm")
    check(tiny_config(), tiny_config("diffusion.gaussian.weighting=min_snr", "diffusion.gaussian.loss=mse"))
    wider = tiny_config("diffusion.process=edm", "sampling.sampler=edm", "diffusion.edm.sigma_data=1")
    short = tiny_config("diffusion.gaussian.steps=500")
    for trained, config in ((edm, tiny_config()), (edm, wider), (tiny_config(), short)):
        with pytest.raises(UserError, match="--guide=.* was trained with another process"):
            check(trained, config)


def test_parameters_remember_their_process(run, tmp_path, capsys):
    model, params = method_of(tiny_config()).model, Checkpoints(run, read_only=True).restore_arrays("ema", 4)
    process = {"process": "gaussian", "label_drop": 0.1, "steps": 500, "options": ""}  # as version 1 recorded it
    store.save(tmp_path / "p", model, params, {"process": process})
    flags = (f"--params={tmp_path / 'p'}", QUICKSTART, "--num=4", f"--out={tmp_path / 's.npz'}")
    assert main(["sample", *flags]) == 2
    assert "was trained with another process: {'diffusion': {'gaussian': {'steps': 500}}}" in capsys.readouterr().err
    assert main(["sample", *flags, "--config.diffusion.gaussian.steps=500"]) == 0


@pytest.mark.parametrize("place", ["file/s.npz", "/proc/diffjax/s.npz"])
def test_a_file_that_cannot_be_written(run, tmp_path, capsys, place):
    (tmp_path / "file").write_text("not a folder")
    assert main(["sample", f"--workdir={run}", "--num=8", f"--out={tmp_path / place}"]) == 2
    error = capsys.readouterr().err
    assert f"--out={tmp_path / place}" in error
    assert error.count("\n") == 1


@pytest.fixture(scope="module")
def sharded(tmp_path_factory):
    """A run whose parameters eight devices share."""
    workdir = tmp_path_factory.mktemp("sharded") / "run"
    leaves = (*SHAPES, *OWN_SHAPES["dit"], *LAYOUTS["fsdp8"], "optim.warmup_steps=0", "ema.decay=0.5")
    assert main(train_arguments(workdir, *leaves, "total_steps=2")) == 0
    return workdir


@pytest.mark.slow
def test_parameters_are_sharded_as_the_run_says(sharded):
    eight, one = open_run(sharded), open_run(sharded, mesh=make_mesh({"data": 1}, jax.devices()[:1]))
    expected = jax.tree.map(lambda leaf: leaf.sharding, eight.experiment.abstract.params)
    assert jax.tree.map(lambda leaf: leaf.sharding, eight.params) == expected
    kernel = eight.params["blocks"]["mlp"]["fc1"]["kernel"]
    assert kernel.sharding.shard_shape(kernel.shape) == (2, 8, 256)
    assert {len(leaf.sharding.device_set) for leaf in jax.tree.leaves(one.params)} == {1}
    conditions = eight.experiment.conditions(0, 12)
    images = [np.concatenate(list(run.experiment.images(run.params, conditions))) for run in (eight, one)]
    assert images[0].std() > 0.1
    np.testing.assert_allclose(images[0], images[1], atol=1e-5)


@pytest.mark.slow
def test_a_mesh_that_does_not_fit_is_said_and_the_images_are_the_same(sharded, tmp_path, monkeypatch, capsys):
    flags = (f"--workdir={sharded}", "--num=16", "--batch_size=16")
    eight = read_samples(sample(tmp_path / "8.npz", *flags))[0]
    capsys.readouterr()
    other = ("--config.parallel.mesh.data=3", "--config.parallel.mesh.fsdp=1")
    whole = read_samples(sample(tmp_path / "3.npz", *flags, *other))[0]
    assert "mesh (data 3, fsdp 1, tensor 1) does not fit 8 devices: parameters are whole on each" in (
        capsys.readouterr().out
    )
    assert np.abs(eight.astype(int) - whole.astype(int)).max() <= 1


@pytest.mark.slow
def test_a_moved_folder_of_images_goes_on(tmp_path, capsys):
    r = np.random.default_rng(0)
    for number in range(20):
        path = tmp_path / "images" / "train" / f"class{number % 2}" / f"{number}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(r.integers(256, size=(8, 8, 3), dtype=np.uint8)).save(path)
    leaves = ("data.name=folder", "data.channels=3", "data.num_classes=2", "data.crop=none")
    assert main(train_arguments(tmp_path / "run", *leaves, f"data.dir={tmp_path / 'images'}", "total_steps=2")) == 0
    (tmp_path / "images").rename(tmp_path / "elsewhere")
    capsys.readouterr()
    more = train_arguments(tmp_path / "run", *leaves, f"data.dir={tmp_path / 'elsewhere'}", "total_steps=3")
    assert main([*more, "--accept=total_steps"]) == 0
    printed = capsys.readouterr().out
    assert "continuing with data.dir: " in printed
    assert "resuming at step 2" in printed
    (next((tmp_path / "elsewhere/train/class1").iterdir())).unlink()
    longer = [each.replace("total_steps=3", "total_steps=4") for each in more]
    assert main([*longer, "--accept=total_steps"]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
