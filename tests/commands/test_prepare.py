"""`prepare` as its user runs it: names, flags, refusals, a kill, and what trains and encodes on its records."""

import json
import os
import signal
import time

import numpy as np
import pytest
from PIL import Image

from diffjax.__main__ import main
from diffjax.data import image_records, latents
from diffjax.data.preparation.datasets import DATASETS, REFUSED
from diffjax.data.transforms import RULES
from diffjax.frozen import create
from diffjax.weights import store
from tests.data.preparation.originals import encoded, picture, prepare, stored, write_tree
from tests.frozen.test_vae import some_params
from tests.programs import ROOT, TINY, start

FLAGS = ("--size=8", "--rule=adm", "--decode=stored")


def pictures(root, count=12):
    return write_tree(root, {f"{i % 3}/{i:04d}.png": encoded(picture(i, 9, 9), "png") for i in range(count)})


def error(capsys, *arguments):
    capsys.readouterr()
    assert main(["prepare", *arguments]) == 2
    text = capsys.readouterr().err
    assert text.count("\n") == 1
    return text


def test_every_row_is_complete():
    """Each has a rule, an expected number of images and terms, or leaves them open to the user or says so."""
    for name, row in DATASETS.items():
        own = name == "images"
        assert (row.size > 0, row.rule in RULES, row.decode == "stored") == (not own,) * 3, name
        assert own or {"train"} <= row.counts.keys()
        assert all((row.layout, row.terms, row.use))
        assert all(len(file.sha256) in (0, 64) and len(file.md5) in (0, 32) for file in row.files)
        assert all(file.sha256 or file.md5 for file in row.files)


def test_published_numbers():
    counts = {name: row.counts["train"] for name, row in DATASETS.items() if row.counts}
    assert {counts[name] for name in counts if name.startswith("imagenet")} == {1_281_167}
    assert (counts["cifar10"], counts["cifar100"], counts["celeba64"]) == (50_000, 50_000, 162_770)
    assert (counts["ffhq64"], counts["ffhq256"], counts["afhqv2-64"]) == (70_000, 70_000, 15_803)
    assert (counts["lsun-bedroom256"], counts["lsun-church256"]) == (3_033_042, 126_227)


def test_the_page_lists_every_name_and_rule():
    page = (ROOT / "docs/data.md").read_text()
    table = page.partition("## Public data sets")[2].partition("## Latents")[0]
    missing = [name for name in (*DATASETS, *RULES) if f"`{name}`" not in table]
    assert missing == []


@pytest.mark.parametrize("name", [*REFUSED, "celeba_hq", "Celeb_A_HQ", "imagenet_resized/64x64"])
def test_what_cannot_be_prepared_is_refused_with_the_reason(tmp_path, capsys, name):
    line = error(capsys, name, f"--from={tmp_path}", f"--out={tmp_path / 'out'}")
    assert f"prepare: {name} is not prepared: " in line
    assert "; valid: " in line
    assert not (tmp_path / "out").exists()


def test_names_and_flags(tmp_path, capsys):
    paths = (f"--from={tmp_path}", f"--out={tmp_path / 'out'}")
    line = error(capsys, "imagnet64", *paths)
    assert "data set 'imagnet64' is unknown; did you mean imagenet64" in line
    assert "did you mean imagenet64" in line
    assert "--name is missing" in error(capsys, *paths)
    assert "--from and --out are missing" in error(capsys, "cifar10")
    assert "'cifar100' is not a flag" in error(capsys, "cifar10", "cifar100", *paths)
    assert "'cifar100' is not a flag" in error(capsys, "--name=cifar10", "cifar100", *paths)
    assert "--num_classes is of features" in error(capsys, "cifar10", *paths, "--num_classes=5")
    assert "cifar10 has no split 'validation'; valid: train, test" in error(
        capsys, "cifar10", *paths, "--split=validation"
    )
    assert "imagenet64 is made with --rule=adm; --rule is for images" in error(
        capsys, "imagenet64", *paths, "--rule=edm-crop"
    )
    assert "imagenet64 is made with --size=64" in error(capsys, "imagenet64", *paths, "--size=32")
    assert "imagenet64 is made with --decode=stored" in error(capsys, "imagenet64", *paths, "--decode=shown")
    assert "--rule is missing; images leaves it open" in error(capsys, "images", *paths, "--size=32")
    assert "value should be one of <adm|edm-crop|" in error(capsys, "images", *paths, "--size=32", "--rule=best")
    assert "images has no splits; choose the sub-folder with --from" in error(
        capsys, "images", *paths, *FLAGS, "--split=test"
    )
    assert "no such file or folder" in error(capsys, "images", f"--from={tmp_path / 'no'}", paths[1], *FLAGS)
    assert not (tmp_path / "out").exists()


def test_what_it_says(tmp_path, capsys):
    out = tmp_path / "out"
    prepare("images", pictures(tmp_path / "in"), out, *FLAGS)
    said = capsys.readouterr().out.splitlines()
    assert said == [
        f"reading {tmp_path / 'in'}",
        "images, train: 12 images of 3 of 3 classes",
        f"wrote 12 images of 8 x 8 x 3 to {out}",
        "terms: yours",
    ]
    assert "already holds images.json" in error(capsys, "images", f"--from={tmp_path / 'in'}", f"--out={out}", *FLAGS)


@pytest.mark.slow
@pytest.mark.parametrize("number, code", [(signal.SIGTERM, 143), (signal.SIGKILL, -9)])
def test_a_killed_program_goes_on(tmp_path, number, code):
    """Killed in its second shard; the same files in the end as without."""
    size, count = 1024, 130
    assert image_records.shard_size(size) < 100
    plain = {f"{i:04d}.png": encoded(Image.new("RGB", (9, 9), (i, 2 * i % 256, 7)), "png") for i in range(count)}
    origin, out, whole = write_tree(tmp_path / "in", plain), tmp_path / "out", tmp_path / "whole"
    flags = (f"--size={size}", "--rule=adm", "--decode=stored")
    program = start(["prepare", "images", f"--from={origin}", f"--out={out}", *flags], tmp_path / "log")
    deadline = time.monotonic() + 60
    while not (out / "images-00000.array_record").exists():
        assert time.monotonic() < deadline
        time.sleep(0.005)
    os.killpg(program.pid, number)
    assert program.wait(timeout=30) == code
    assert not (out / "images.json").exists()
    if number == signal.SIGTERM:
        assert "finished shards are kept, the same command makes the others" in (tmp_path / "log").read_text()
    first = (out / "images-00000.array_record").stat().st_mtime_ns
    prepare("images", origin, out, *flags)
    assert (out / "images-00000.array_record").stat().st_mtime_ns == first
    prepare("images", origin, whole, *flags)
    found, expected = (
        {path.name: path.read_bytes() for path in folder.iterdir() if path.name != ".lock"} for folder in (out, whole)
    )
    assert found == expected


@pytest.mark.slow
def test_a_model_trains_on_records(tmp_path):
    out = prepare("images", pictures(tmp_path / "in"), tmp_path / "out", *FLAGS)
    leaves = ["data.name=records", f"data.dir={out}", "data.channels=3", "data.num_classes=3", "data.workers=0"]
    leaves += ["total_steps=2", "batch_size=8", "ema.decay=0.5", "log.tensorboard=false", "evals.samples.every_steps=0"]
    leaves += ["evals.scores.every_steps=0", "evals.loss.every_steps=0"]
    arguments = [f"--config={TINY}", *(f"--config.{leaf}" for leaf in leaves), f"--workdir={tmp_path / 'run'}"]
    assert main(["train", *arguments]) == 0
    stored_config = json.loads((tmp_path / "run/config.json").read_text())
    assert "records" in json.dumps(stored_config)


def test_records_are_encoded(tmp_path):
    out = prepare("images", pictures(tmp_path / "in"), tmp_path / "out", *FLAGS)
    module = create("VAE", channels=3, widths=(8, 8), depth=1, groups=4, scale=0.5)
    store.save(tmp_path / "vae", module, some_params(module), {})
    leaves = ["images.name=records", f"images.dir={out}", "images.size=8", "images.channels=3", "images.num_classes=3"]
    leaves += ["data.name=latents", "data.split=", "data.size=4", "data.channels=4", "data.scale=0.5", "data.flip=true"]
    leaves += ["data.num_classes=3", "model.patch=2", f"autoencoder.weights={tmp_path / 'vae'}"]
    arguments = [f"--config={TINY}", *(f"--config.{leaf}" for leaf in leaves), f"--out={tmp_path / 'latents'}"]
    assert main(["encode", *arguments, "--batch_size=4"]) == 0
    manifest = latents.read_manifest(tmp_path / "latents")
    assert manifest["count"] == 12
    assert manifest["label_table_sha256"] == image_records.read_manifest(out)["label_table_sha256"]
    assert json.loads(manifest["source"])["records_sha256"] == image_records.read_manifest(out)["records_sha256"]
    np.testing.assert_array_equal(stored(out)[1], [0] * 4 + [1] * 4 + [2] * 4)
