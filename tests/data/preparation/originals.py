"""Synthetic originals in the layouts of the published ones, and `prepare` of them."""

import io
import tarfile
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from diffjax.__main__ import main
from diffjax.data import image_records, shards
from diffjax.data.preparation import datasets
from diffjax.data.preparation.imagenet import synsets

RANKS = (281, 0, 999)  # of the classes of the small ImageNet


def picture(number: int, width: int = 80, height: int = 60) -> Image.Image:
    return Image.fromarray(np.random.default_rng(number).integers(0, 256, (height, width, 3), np.uint8))


def encoded(image: Image.Image, kind: str = "jpeg", **options: Any) -> bytes:
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def tar_of(files: Mapping[str, bytes], mode: str = "w") -> bytes:
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode=mode) as tar:
        for name, data in files.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return out.getvalue()


def write_tree(root: Path, files: Mapping[str, bytes]) -> Path:
    for name, data in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)
    return root


def imagenet_files() -> dict[str, bytes]:
    """ "<synset>/<synset>_<i>.JPEG" -> its bytes, of three classes with three images each; one grey, one cmyk."""
    ids, files = synsets(), {}
    for rank in RANKS:
        for i, mode in ((10, "RGB"), (2, "L"), (7, "CMYK")):
            image = picture(1000 * rank + i)
            files[f"{ids[rank]}/{ids[rank]}_{i}.JPEG"] = encoded(image if rank else image.convert(mode))
    return files


def imagenet_tar(files: Mapping[str, bytes]) -> bytes:
    """The tar of tars; in another order than that of the classes and of the names."""
    folders = dict.fromkeys(name.split("/")[0] for name in files)
    inner = {
        f"{synset}.tar": tar_of({name.split("/")[1]: data for name, data in files.items() if name.startswith(synset)})
        for synset in folders
    }
    return tar_of(inner)


def publish(monkeypatch: pytest.MonkeyPatch, name: str, **fields: Any) -> None:
    """Other published numbers, as those of the small originals."""
    monkeypatch.setitem(datasets.DATASETS, name, replace(datasets.DATASETS[name], **fields))


def prepare(name: str, origin: Path, out: Path, *flags: str) -> Path:
    assert main(["prepare", name, f"--from={origin}", f"--out={out}", "--threads=2", *flags]) == 0
    return out


def stored(out: Path) -> tuple[np.ndarray, list[int], dict[str, Any]]:
    """Images uint8 [n, size, size, 3], labels and the manifest of prepared records."""
    manifest = image_records.read_manifest(out)
    records = shards.open_records(out, manifest)
    pairs = [image_records.decode(records[i]) for i in range(len(records))]
    return np.stack([image for image, _ in pairs]), [label for _, label in pairs], manifest


def refusal(capsys: pytest.CaptureFixture[str], name: str, origin: Path, out: Path, *flags: str) -> str:
    """The one line that `prepare` says of what it refuses."""
    capsys.readouterr()
    assert main(["prepare", name, f"--from={origin}", f"--out={out}", "--threads=2", *flags]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1, error
    assert not (out / image_records.MANIFEST).exists()
    return error
