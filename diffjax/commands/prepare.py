"""Turn the original files of a public data set into records, by its published preparation.

python -m diffjax prepare imagenet256 --from=downloads/imagenet --out=data/imagenet256
python -m diffjax prepare imagenet256 --from=downloads/imagenet --out=data/imagenet256-validation --split=validation
python -m diffjax prepare images --from=pictures.zip --size=128 --rule=adm --decode=shown --out=data/pictures
python -m diffjax prepare features-edm2 --from=img512-sd.zip --out=data/imagenet512-latents
python -m diffjax encode --config=configs/imagenet256.py --config.images.name=records \\
  --config.images.dir=data/imagenet256 --config.images.size=256 --config.images.num_classes=1000 \\
  --config.autoencoder.weights=sd-vae-ft-ema --out=data/imagenet256-latents

OUT/images-*.array_record holds the images, OUT/images.json says what they are: the data source `records`. Features that
others published (features-*) become latents as `encode` makes them: the data source `latents`. Nothing is downloaded;
where the originals come from and what lies where is in docs/data.md.
"""

import os
from typing import Any

from absl import flags

from diffjax.commands import define_path
from diffjax.data import features
from diffjax.data.image_records import MANIFEST
from diffjax.data.preparation.datasets import DATASETS, Dataset, find
from diffjax.data.preparation.write import Request, prepare
from diffjax.data.shards import check_unfinished
from diffjax.data.transforms import DECODERS, RULES
from diffjax.errors import UserError

INTERRUPTED = "finished shards are kept, the same command makes the others"
REQUIRED = ("name", "from", "out")
FIRST = "name"
FEATURES = "features-"  # starts of names
OF_IMAGES = ("split", "partial", "threads", "size", "rule", "decode")  # flags


def define_flags(values: flags.FlagValues) -> None:
    names = (*DATASETS, *(FEATURES + layout for layout in features.LAYOUTS))
    flags.DEFINE_string("name", None, f"data set, without --name: {', '.join(names)}", flag_values=values)
    define_path("from", None, "the original files: a folder or an archive", values)
    define_path("out", None, "folder for the records", values)
    flags.DEFINE_string("split", "train", "part of the data set", flag_values=values)
    flags.DEFINE_bool("partial", False, "take another number of images or classes than published", flag_values=values)
    flags.DEFINE_integer("threads", os.cpu_count() or 1, "that decode images", lower_bound=1, flag_values=values)
    flags.DEFINE_integer("size", None, "of `images`: side in pixels", lower_bound=1, flag_values=values)
    flags.DEFINE_enum("rule", None, list(RULES), "of `images`: resize and crop", flag_values=values)
    classes = "of features: labels that there are; 0: they are left out"
    flags.DEFINE_integer("num_classes", 1000, classes, lower_bound=0, flag_values=values)
    flags.DEFINE_enum("decode", None, list(DECODERS), "of `images`: how files become pixels", flag_values=values)


def run(values: flags.FlagValues, overrides: list[str]) -> None:
    if values.name.startswith(FEATURES):
        convert_features(values)
        return
    if values["num_classes"].present:
        raise UserError("prepare: --num_classes is of features; classes of images are those that they have")
    dataset = find(values.name)
    asked = request(values, dataset)
    check_unfinished(values.out, MANIFEST)
    source: Any = values["from"].value
    print(f"reading {source}", flush=True)
    with dataset.read(source, asked.split) as originals:
        manifest = prepare(asked, dataset, originals, values.out, values.threads)
    print(f"wrote {manifest['count']:,} images of {asked.size} x {asked.size} x 3 to {values.out}")
    if converted := ", ".join(f"{count:,} {name}" for name, count in manifest["converted"].items()):
        print(f"converted to rgb: {converted}")
    print(f"terms: {dataset.terms}")


def convert_features(values: flags.FlagValues) -> None:
    """Latents of features that others published, of any autoencoder."""
    if unread := [name for name in OF_IMAGES if values[name].present]:
        raise UserError(f"prepare: --{unread[0]} is of images, and {values.name} are features")
    source: Any = values["from"].value
    manifest = features.convert(values.name.removeprefix(FEATURES), source, values.out, values.num_classes)
    print(f"wrote {manifest['count']:,} latents of {' x '.join(map(str, manifest['shape']))} to {values.out}")
    print(f"read with: {features.leaves(manifest)}")


def request(values: flags.FlagValues, dataset: Dataset) -> Request:
    """What is asked for. UserError for what the data set fixes, lacks, or leaves open and was not said."""
    if not dataset.counts and values.split != values["split"].default:
        raise UserError(f"prepare: {values.name} has no splits; choose the sub-folder with --from")
    if dataset.counts and values.split not in dataset.counts:
        raise UserError(f"prepare: {values.name} has no split {values.split!r}; valid: {', '.join(dataset.counts)}")

    def choose(name: str, given: Any, fixed: Any) -> Any:
        if fixed and given not in (None, fixed):
            raise UserError(f"prepare: {values.name} is made with --{name}={fixed}; --{name} is for images")
        if not fixed and given is None:
            raise UserError(f"prepare: --{name} is missing; {values.name} leaves it open")
        return fixed or given

    return Request(
        values.name,
        values.split,
        size=choose("size", values.size, dataset.size),
        rule=choose("rule", values.rule, dataset.rule),
        decode=choose("decode", values.decode, dataset.decode),
        partial=values.partial,
    )
