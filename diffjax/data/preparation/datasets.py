"""The public data sets that `prepare` makes records of, and how: one row each.

Sizes and hashes of files, and the numbers of images, are those of the publishers and of the catalogue of
tensorflow-datasets. A file of another hash is named in a line and in the manifest: it may have been packed again.
Another number of images is refused.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import NamedTuple

from diffjax.data.preparation import celeba, cifar, imagenet, lsun, pictures
from diffjax.data.preparation.originals import Originals
from diffjax.errors import UserError, did_you_mean


class File(NamedTuple):
    """An original file as published."""

    name: str
    bytes: int  # 0: not stated
    sha256: str = ""
    md5: str = ""


@dataclass(frozen=True)
class Dataset:
    """How the records of a data set are made.

    Attributes:
        read: (where the originals lie, split) -> them.
        counts: split -> number of images; 0 where no publisher states it.
        size: side of the records in pixels; 0: as asked.
        rule: one of transforms.RULES; "": as asked.
        layout: what lies at --from, in words.
        terms: the licence.
        use: of whose published runs these images are.
        classes: how many there are; each has images.
        original: width and height of every original, where they are all the same.
        files: the originals, where their sizes are published.
        decode: one of transforms.DECODERS; "": as asked.
    """

    read: Callable[[Path, str], Originals]
    counts: Mapping[str, int]
    size: int
    rule: str
    layout: str
    terms: str
    use: str
    classes: int = 0
    original: tuple[int, int] | None = None
    files: tuple[File, ...] = field(default=(), repr=False)
    decode: str = "stored"


def _imagenet(size: int, rule: str, use: str) -> Dataset:
    return Dataset(
        imagenet.read,
        {"train": 1_281_167, "validation": 50_000},
        size,
        rule,
        imagenet.LAYOUT,
        "account at image-net.org, non-commercial research",
        use,
        classes=1000,
        files=(
            File(
                "ILSVRC2012_img_train.tar",
                147_897_477_120,
                "b08200a27a8e34218a0e58fde36b0fe8f73bc377f4acea2d91602057c3ca45bb",
                "1d675b47d978889d74fa0da5fadfb00e",
            ),
            File(
                "ILSVRC2012_img_val.tar",
                6_744_924_160,
                "c7e06a6c0baccf06d8dbeb6577d71efff84673a5dbdd50633ab44f8ea0456ae0",
                "29b22e2961454d5413ddabcf34fc5622",
            ),
            File("ILSVRC2012_devkit_t12.tar.gz", 0, md5="fa75699e90414af021442c21a62c3abf"),
        ),
    )


def _cifar(versions: tuple[cifar.Version, ...], classes: int, use: str, *files: File) -> Dataset:
    return Dataset(
        partial(cifar.read, versions),
        {"train": 50_000, "test": 10_000},
        32,
        "none",
        " or ".join(version.archive for version in versions),
        "none stated by the publisher",
        use,
        classes=classes,
        original=(32, 32),
        files=files,
    )


def _ffhq(size: int, use: str) -> Dataset:
    return Dataset(
        pictures.read,
        {"train": 70_000},
        size,
        "edm-scale",
        "the folder images1024x1024, or a zip of it",
        "the set CC BY-NC-SA 4.0; the images CC BY, CC BY-NC or public domain",
        use,
        original=(1024, 1024),
    )


def _lsun(category: str, train: int, *files: File) -> Dataset:
    name = f"{category}_train_lmdb"
    return Dataset(
        partial(lsun.read, category),
        {"train": train, "validation": 300},
        256,
        "lsun",
        f"the folder {name} (extracted from {name}.zip), or one that holds it",
        "none stated by the publisher",
        "ADM on LSUN",
        files=files,
    )


DATASETS: dict[str, Dataset] = {
    "imagenet64": _imagenet(64, "adm", "ADM, EDM2 and U-ViT at 64 pixels; VIRTUAL_imagenet64_labeled.npz"),
    "imagenet64-edm": _imagenet(64, "edm-crop", "EDM and DiffiT at 64 pixels; EDM's imagenet-64x64.npz"),
    "imagenet128": _imagenet(128, "adm", "ADM at 128 pixels; VIRTUAL_imagenet128_labeled.npz"),
    "imagenet256": _imagenet(256, "adm", "ADM, DiT, U-DiT, DiS at 256 pixels; VIRTUAL_imagenet256_labeled.npz"),
    "imagenet512": _imagenet(512, "adm", "ADM, DiT, EDM2 at 512 pixels; VIRTUAL_imagenet512.npz"),
    "cifar10": _cifar(
        cifar.CIFAR10,
        10,
        "EDM, DiffiT, DiS, U-ViT; cifar10-32x32.npz",
        File(
            "cifar-10-binary.tar.gz",
            170_052_171,
            "c4a38c50a1bc5f3a1c5537f2155ab9d68f9f25eb1ed8d9ddda3db29a59bca1dd",
        ),
        File("cifar-10-python.tar.gz", 0, md5="c58f30108f718f92721af3b95e74349a"),
    ),
    "cifar100": _cifar(
        cifar.CIFAR100,
        100,
        "class-conditional models; labels are the 100 fine classes",
        File(
            "cifar-100-binary.tar.gz",
            168_513_733,
            "58a81ae192c23a4be8b1804d68e518ed807d710a4eb253b1f2a199162a40d8ec",
        ),
        File("cifar-100-python.tar.gz", 0, md5="eb9058c3a382ffc7106e4002c42a8d85"),
    ),
    "celeba64": Dataset(
        celeba.read,
        {"train": 162_770, "validation": 19_867, "test": 19_962},
        64,
        "celeba",
        "a folder of img_align_celeba.zip (or its folder) and list_eval_partition.txt",
        "non-commercial research",
        "DDIM and U-ViT; fid_stats_celeba64_train_50000_ddim.npz",
        files=(
            File(
                "img_align_celeba.zip",
                1_443_490_838,
                "46fb89443c578308acf364d7d379fe1b9efb793042c0af734b6112e4fd3a8c74",
                "00d2c5bc6d35e252742224ab0c1e8fcb",
            ),
            File(
                "list_eval_partition.txt",
                2_836_386,
                "fc955bcb3ef8fbdf7d5640d9a8693a8431b5f2ee291a5c1449a1549e7e073fe7",
            ),
        ),
    ),
    "ffhq64": _ffhq(64, "EDM and DiffiT; ffhq-64x64.npz"),
    "ffhq256": _ffhq(256, "models at 256 pixels; other 256 pixel copies of FFHQ give other scores"),
    "afhqv2-64": Dataset(
        pictures.read,
        {"train": 15_803},
        64,
        "edm-scale",
        "the folder afhq of the v2 download with its sub-folders train and test, or the zip",
        "CC BY-NC 4.0",
        "EDM; afhqv2-64x64.npz",
        original=(512, 512),
    ),
    "lsun-bedroom256": _lsun(
        "bedroom",
        3_033_042,  # as commonly given; no publisher's list states it
        File(
            "bedroom_train_lmdb.zip",
            45_922_737_680,
            "a15644c2e7153106867f0adb3491fc41224102d1f01b24494fb47d9f5d1f174e",
        ),
    ),
    "lsun-church256": _lsun(
        "church_outdoor",
        126_227,
        File(
            "church_outdoor_train_lmdb.zip",
            2_448_463_466,
            "91128ae026840ac0c5982b4445ab5fc4e092d6847cca76793b2b1a0815c2e74a",
        ),
    ),
    "lsun-cat256": _lsun("cat", 0),
    "lsun-horse256": _lsun("horse", 0),
    "images": Dataset(
        pictures.read_labelled,
        {},
        0,
        "",
        "a folder, .zip or .tar of images: class folders, or labels in a dataset.json as EDM's archives have them",
        "yours",
        "your own images",
        decode="",
    ),
}

# What cannot be prepared so that published numbers hold, and why.
REFUSED = {
    "downsampled_imagenet": "its images were resized otherwise than those of ADM, EDM and EDM2, and have no labels; "
    "valid: imagenet64 or imagenet64-edm, from the original files",
    "imagenet_resized": "its images were resized otherwise than those of ADM, EDM and EDM2, and its labels are in an "
    "order of the devkit; valid: imagenet64 or imagenet64-edm, from the original files",
    "celeba-hq": "the public copies differ in how they were made, and no rule of a published run is known; valid: "
    "celeba64, or images with --rule",
    "afhq": "version 1 was resized by nearest neighbours and has other images; valid: afhqv2-64",
}
SPELLINGS = {"celeba_hq": "celeba-hq", "celeba_a_hq": "celeba-hq", "celebahq": "celeba-hq", "celeb_a_hq": "celeba-hq"}


def find(name: str) -> Dataset:
    """The row of a data set. UserError with the reason for one that is not prepared, and for an unknown name."""
    plain = SPELLINGS.get(name.lower(), name.lower())
    if reason := next((reason for refused, reason in REFUSED.items() if plain.split("/")[0] == refused), ""):
        raise UserError(f"prepare: {name} is not prepared: {reason}")
    if name not in DATASETS:
        raise UserError(
            f"prepare: data set {name!r} is unknown{did_you_mean(name, DATASETS)}; valid: {', '.join(DATASETS)}, or "
            "features-LAYOUT"
        )
    return DATASETS[name]
