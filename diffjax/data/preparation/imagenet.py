"""ImageNet (ILSVRC 2012): the original tars, a tree of class folders, or parquet shards.

A label is the rank of the synset id among the thousand, never the number that the devkit gives a class.
"""

import importlib.util
import io
import re
import tarfile
from pathlib import Path

import numpy as np

from diffjax.data.image_records import table_sha256
from diffjax.data.preparation import parquet
from diffjax.data.preparation.containers import open_container, reading
from diffjax.data.preparation.originals import Originals, describe, find, of_container
from diffjax.errors import UserError

SYNSETS_SHA256 = "385e0240499426c022b773be1ae4da780f057b89c9694c7f47199f62746b6edd"
FOLDERS = {"train": ("train",), "validation": ("val", "validation")}
TARS = {"train": "ILSVRC2012_img_train.tar", "validation": "ILSVRC2012_img_val.tar"}
DEVKIT = ("ILSVRC2012_devkit_t12.tar.gz", "ILSVRC2012_devkit_t12")
TRUTH, META = "data/ILSVRC2012_validation_ground_truth.txt", "data/meta.mat"
VALIDATION = re.compile(r"ILSVRC2012_val_(\d{8})\.JPEG")
LAYOUT = (
    "a folder of ILSVRC2012_img_train.tar or ILSVRC2012_img_val.tar (with ILSVRC2012_devkit_t12.tar.gz), of class "
    "folders train/<synset>/*.JPEG or val/<synset>/*.JPEG, or of parquet shards; or such a tar or tree itself"
)


def read(path: Path, split: str) -> Originals:
    """The images of `split` in the order (class, file name); of parquet shards in their own."""
    classes = synsets()
    if shards := parquet.find_shards(path, split):
        return parquet.read(shards, classes)
    place = _place(path, split)
    container = open_container(place)
    ranks = {synset: rank for rank, synset in enumerate(classes)}
    names = list(container.sizes)
    if not names:
        raise UserError(f"{path} holds no images of ImageNet's {split}; valid: {LAYOUT}")
    devkit: Path | None = None
    if split == "validation" and not any("/" in name for name in names):
        devkit = find(path, DEVKIT, "the devkit, which has the labels of validation images", beside=place == path)
        labels = _labels_of_validation(names, path, devkit, ranks)
    else:
        labels = np.array([_rank(name, ranks, path) for name in names], np.int32)
    order = sorted(range(len(names)), key=lambda i: (labels[i], names[i].rpartition("/")[2]))
    originals = of_container(container, [names[i] for i in order], labels[order], classes)
    if devkit and devkit.is_file():
        originals.files.extend(describe([devkit]))
    return originals


def synsets() -> tuple[str, ...]:
    """The thousand synset ids in ascending order, from a file of tensorflow-datasets, which is not imported."""
    found = importlib.util.find_spec("tensorflow_datasets")
    places = list(found.submodule_search_locations or ()) if found else []
    files = [Path(place) / "datasets/imagenet2012/labels.txt" for place in places]
    advice = "the synset ids come from datasets/imagenet2012/labels.txt of the package tensorflow-datasets"
    if not files or not files[0].is_file():
        raise UserError(f"ImageNet: {advice}, which is not installed; pip install tensorflow-datasets")
    ids = tuple(files[0].read_text().split())
    if table_sha256(ids) != SYNSETS_SHA256:
        raise UserError(f"ImageNet: {advice}, and {files[0]} holds other ids; install tensorflow-datasets 4.9 again")
    return ids


def _place(path: Path, split: str) -> Path:
    """The tar of the split in a folder, else its tree; or what a user named."""
    if path.is_dir():
        for name in (TARS[split], *FOLDERS[split]):
            if (path / name).exists():
                return path / name
    return path


def _rank(name: str, ranks: dict[str, int], path: Path) -> int:
    synset, _, file = name.partition("/")
    if synset not in ranks or "/" in file:
        raise UserError(f"{path}: {name} does not lie in a folder of a synset of ImageNet's 1000; valid: {LAYOUT}")
    return ranks[synset]


def _labels_of_validation(names: list[str], path: Path, devkit: Path, ranks: dict[str, int]) -> np.ndarray:
    """Labels int32 [n] of ILSVRC2012_val_*.JPEG by the devkit, which numbers the classes in an order of its own."""
    truth, synset_of = _devkit(devkit)
    labels = []
    for name in names:
        match = VALIDATION.fullmatch(name)
        if not match or not 1 <= int(match[1]) <= len(truth):
            raise UserError(f"{path}: {name} is no image of ImageNet's validation set, ILSVRC2012_val_<number>.JPEG")
        labels.append(ranks[synset_of[truth[int(match[1]) - 1]]])
    return np.array(labels, np.int32)


def _devkit(path: Path) -> tuple[list[int], dict[int, str]]:
    """The devkit's class number of each validation image, and the synset id of each number."""
    from scipy.io import loadmat

    with reading(path):
        if path.is_dir():
            truth, meta = (path / TRUTH).read_bytes(), (path / META).read_bytes()
        else:
            with tarfile.open(path, "r:gz") as tar:
                files = {member.name.removeprefix("./"): member for member in tar if member.isreg()}
                truth, meta = (_member(tar, files, f"{DEVKIT[1]}/{name}") for name in (TRUTH, META))
        rows = loadmat(io.BytesIO(meta), squeeze_me=True)["synsets"]
        synset_of = {int(row["ILSVRC2012_ID"]): str(row["WNID"]) for row in rows}
        numbers = [int(line) for line in truth.split()]
    if unknown := set(numbers) - set(synset_of):
        raise UserError(f"{path}: {TRUTH} names class {min(unknown)}, which {META} does not have")
    return numbers, synset_of


def _member(tar: tarfile.TarFile, files: dict[str, tarfile.TarInfo], name: str) -> bytes:
    found = tar.extractfile(files[name]) if name in files else None
    if found is None:
        raise tarfile.ReadError(f"it lacks {name}")
    return found.read()
