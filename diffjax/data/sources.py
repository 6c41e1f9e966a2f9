"""Data sets: each has a name, random access to its examples, and an identity (fingerprint).

`load` opens one by its name and options. A source only describes and reads; order, flips and batches are the
pipeline's (pipeline.py). The options of a source are the keyword parameters of its function below; `size`, `channels`,
`num_classes`, `condition`, `condition_size` and `flip`, which every data set has, are checked against what is found.
"""

import hashlib
import inspect
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import numpy as np

from diffjax import contracts
from diffjax.contracts import Condition
from diffjax.data import draws, embedded, image_records, shards
from diffjax.data.arrays import ArrayExamples, check_conditions, read_arrays
from diffjax.data.image_records import ImageRecords
from diffjax.data.images import SUFFIXES, FolderExamples, PreparedExamples, class_names, list_images, unread_classes
from diffjax.data.latents import (
    DRAWS,
    INPUT_RANGE,
    InputRange,
    LatentExamples,
    Sample,
    Scale,
    Scaling,
    Shift,
    read_manifest,
)
from diffjax.data.source import Source, as_stored, mirror, pixels
from diffjax.data.tokens import TokenExamples, kinds, of_view, source_and_target, target
from diffjax.data.tokens import read_manifest as read_token_manifest
from diffjax.data.transforms import DECODERS
from diffjax.errors import UserError
from diffjax.files import file_sha256
from diffjax.options import Leaf, Value, at_least, one_of

Dir = Annotated[str, Leaf("folder of the data", "place")]
Split = Annotated[str, Leaf("part of the data set; of a folder: the sub-folder to read", fixed=True)]
Crop = Annotated[str, Leaf("how images reach `size`: adm, a centre crop; none: they have it", fixed=True)]
Decode = Annotated[
    str,
    Leaf(
        "pixels of a file: shown, as a viewer shows it on white; stored, alpha dropped and not turned, as published",
        valid=one_of(DECODERS),
        fixed=True,
    ),
]
Vocabulary = Annotated[int, Leaf("size of the vocabulary of the tokens", valid=at_least(0), fixed=True)]
DecoderVocabulary = Annotated[int, Leaf("size of the decoder's vocabulary", valid=at_least(0), fixed=True)]


def load(
    name: str,
    *,
    size: int,
    channels: int,
    num_classes: int,
    condition: str = "labels",
    condition_size: int = 0,
    flip: bool = False,
    **options: Value,
) -> Source:
    """The source `name`, one of SOURCES.

    options: those of its function below. `UserError` for an unknown name, missing files, and sizes or conditions that
    the data contradicts.
    """
    if name not in SOURCES:
        raise UserError(f"data.name={name!r} is not a data source; valid: {', '.join(sorted(SOURCES))}")
    every = {"size": size, "channels": channels, "num_classes": num_classes, "condition": condition}
    every |= {"condition_size": condition_size, "flip": flip}
    taken = inspect.signature(SOURCES[name]).parameters
    source = SOURCES[name](**{leaf: value for leaf, value in every.items() if leaf in taken}, **options)
    if len(source.examples) == 0:
        raise UserError(f"data source {source.name}, split {options.get('split')!r}, has no examples")
    for leaf in ("size", "channels", "num_classes"):
        if getattr(source, leaf) != every[leaf]:
            found = f"{getattr(source, leaf)}{source.names() if leaf == 'num_classes' else ''}"
            raise UserError(f"data.{leaf}={every[leaf]}, but {source.name} has {leaf}={found}")
    if condition != "labels" and (source.given is None or source.given.kind != condition):
        raise UserError(f"data.condition={condition!r}, but {source.name} holds labels; valid: labels")
    return source


def arrays(source: Source, limit: int | None = None) -> tuple[np.ndarray, np.ndarray]:
    """The first `limit` (None: all) examples in stored order: images uint8 [n, h, w, c], labels int32 [n]."""
    if source.draw is not pixels:
        raise UserError(f"data source {source.name} holds no pixels; evaluation needs an image source")
    count = len(source.examples) if limit is None else min(limit, len(source.examples))
    examples = [source.examples[i] for i in range(count)]
    return np.stack([example["image"] for example in examples]), np.array(
        [example["label"] for example in examples], np.int32
    )


def digits(*, split: Split = "train") -> Source:
    """Handwritten digits, 8x8x1, 10 classes, embedded in the package: splits train (1,500) and test (297)."""
    return _embedded("digits", "digits8.npz", split, held_out=297)


def emoji32(*, split: Split = "train") -> Source:
    """Noto emoji, 32x32x3, 9 classes, embedded in the package: splits train (1,700) and test (206)."""
    return _embedded("emoji32", "emoji32.npz", split, held_out=206)


def _embedded(name: str, file: str, split: str, held_out: int) -> Source:
    stored = embedded.read(file)
    train, test = stratified_split(stored["labels"], held_out)
    chosen = {"train": train, "test": test}.get(split)
    if chosen is None:
        raise UserError(f"data.split={split!r} is not a split of {name}; valid: train, test")
    examples = ArrayExamples(stored["images"][chosen], stored["labels"][chosen])
    size, channels = stored["images"].shape[2:]
    identity = {"name": name, "split": split, "length": len(chosen), "sha256": embedded.SHA256[file]}
    names = tuple(map(str, stored["names"]))
    return Source(name, examples, size, channels, len(names), identity, classes=names)


def stratified_split(labels: np.ndarray, held_out: int) -> tuple[np.ndarray, np.ndarray]:
    """A fixed split of labels [n]: ascending indices int64 [n - held_out] and [held_out], classes in equal proportion.

    Each class is shuffled and its members get the scores (rank + 1/2) / class size; the lowest scores are held out.
    """
    shuffled = draws.permutation(0, "split", 0, len(labels))
    scores = np.empty(len(labels))
    for label in np.unique(labels):
        members = shuffled[labels[shuffled] == label]
        scores[members] = (np.arange(len(members)) + 0.5) / len(members)
    order = np.argsort(scores, kind="stable")
    return np.sort(order[held_out:]), np.sort(order[:held_out])


def folder(
    *,
    size: int,
    num_classes: int,
    dir: Dir = "",
    split: Split = "train",
    crop: Crop = "adm",
    decode: Decode = "shown",
) -> Source:
    """Image files below `dir` (below its folder `split` when that is not "").

    `crop` is "adm" (centre crop to `size`) or "none" (every image must have that size). For `decode` see transforms.py.
    The class is the rank of the top-level sub-folder. When `num_classes` is 0 the source is unlabelled.
    """
    if not dir:
        raise UserError("data.dir is empty: give the folder of images, with --config.data.dir=FOLDER")
    root = _inside(dir, split)
    if not root.is_dir():
        raise UserError(
            f"data.dir={dir!r} with data.split={split!r} is no folder; it should hold images "
            f"({', '.join(SUFFIXES)}), for labels in one sub-folder per class"
        )
    _check_crop(crop)
    if decode not in DECODERS:
        raise UserError(f"data.decode={decode!r} is unknown; valid: {', '.join(DECODERS)}")
    found = list_images(root)
    if not len(found):
        raise UserError(f"{root} has no examples, no {', '.join(SUFFIXES)}{_but(found.left_out())}")
    names = class_names(root, found) if num_classes else []
    ranks = {name: rank for rank, name in enumerate(names)}
    labels = np.array([ranks.get(file.split("/")[0], 0) for file in found.images], np.int32)
    identity = {
        "name": "folder",
        "split": split,
        "size": size,
        "crop": crop,
        "length": len(found),
        "files_sha256": hashlib.sha256("\n".join(found.images).encode()).hexdigest(),
        "classes": len(names),
    }
    examples = FolderExamples(root, found.images, labels, size, crop == "adm", decode)
    examples.check_headers()
    return Source(
        "folder",
        examples,
        size,
        3,
        len(names),
        identity | _decoded(decode),
        classes=tuple(names),
        note=" and ".join(filter(None, (found.left_out(), "" if names else unread_classes(root, found)))),
        place=str(root),
    )


def _but(left_out: str) -> str:
    return f", but {left_out}" if left_out else ""


def _decoded(decode: str) -> dict[str, str]:
    """The entry `decode` of the identity; absent for `stored`, which earlier versions did not record."""
    return {} if decode == "stored" else {"decode": decode}


def _inside(dir: str, part: str) -> Path:
    """The path of a part of a data folder. UserError for one that leaves it: configs may come from others."""
    if Path(part).is_absolute() or ".." in Path(part).parts:
        raise UserError(f"data.split={part!r} leads out of data.dir={dir!r}; valid: the name of something in it")
    return Path(dir) / part


def _check_crop(crop: str) -> None:
    if crop not in ("adm", "none"):
        raise UserError(f"data.crop={crop!r} is not a crop; valid: adm, none")


def tfds(
    *,
    size: int,
    num_classes: int,
    dir: Dir = "",
    dataset: Annotated[str, Leaf("name of the data set in tensorflow-datasets", fixed=True)] = "",
    split: Split = "train",
    crop: Crop = "adm",
) -> Source:
    """A data set prepared by tensorflow_datasets as ArrayRecord, read without tensorflow.

    `dataset` is its name, under `dir` ("": the default folder of tensorflow_datasets); with "" as its name
    `dir` is the folder of the prepared version itself. `split` may be an expression like "train[:90%]".
    `crop` is "adm" (centre crop to `size`) or "none" (every image must have that size).
    Images are decoded as `stored`, see transforms.py, as published runs read them; of four channels as `shown`.
    With `num_classes` 0 the labels are not read.
    """
    _check_crop(crop)
    builder = _prepared(dataset, dir)
    features = builder.info.features
    shape = features["image"].shape
    decode = "shown" if shape[-1] == 4 else "stored"
    channels = 1 if shape[-1] == 1 else 3
    names = tuple(features["label"].names) if num_classes and "label" in features else ()
    found = size if crop == "adm" or shape[0] is None else shape[0]
    encoded = _records(builder, split)
    examples = PreparedExamples(encoded, size, channels, crop == "adm", decode, len(names) > 0)
    identity = {
        "name": "tfds",
        "dataset": builder.info.full_name,
        "split": split,
        "length": len(encoded),
        "size": size,
        "crop": crop,
        "classes": len(names),
    }
    return Source(
        "tfds",
        examples,
        found,
        channels,
        len(names),
        identity | _decoded(decode),
        classes=names,
        place=str(builder.data_path),
    )


def _prepared(dataset: str, dir: str) -> Any:
    """The builder of a data set that lies ready on disk as ArrayRecord, with an image in each example."""
    import tensorflow_datasets as tfds

    place = f"data_dir={dir!r}, " if dir else ""
    call = f"tfds.builder({dataset or '<name>'!r}, {place}file_format='array_record').download_and_prepare()"
    advice = (
        f"prepare it once with: pip install -e '.[prepare]' && python -c \"import tensorflow_datasets as tfds; {call}\""
    )
    try:
        builder = tfds.builder(dataset, data_dir=dir or None) if dataset else tfds.builder_from_directory(dir)
    except (OSError, ValueError) as error:  # no such folder; no such name
        reason = str(error).partition("\n")[0]
        raise UserError(f"data.dataset={dataset!r}, data.dir={dir!r}: {reason}; {advice}") from error
    if not builder.is_prepared():
        if builder.MANUAL_DOWNLOAD_INSTRUCTIONS:
            advice += f" after placing its files in {dir or '~/tensorflow_datasets'}/downloads/manual"
        raise UserError(f"{builder.info.full_name} is not prepared in {builder.data_path}; {advice}")
    if builder.info.file_format.value != "array_record":
        raise UserError(
            f"{builder.data_path} is in format {builder.info.file_format.value}, not array_record; {advice}"
        )
    if "image" not in builder.info.features:
        raise UserError(f"{builder.info.full_name} has no feature 'image', only {', '.join(builder.info.features)}")
    return builder


def _records(builder: Any, split: str) -> Any:
    """Random access to the examples of `split` with the images still encoded: one decoder, Pillow, for all sources."""
    import tensorflow_datasets as tfds

    try:
        return builder.as_data_source(split, decoders={"image": tfds.decode.SkipDecoding()})
    except (KeyError, ValueError) as error:
        known = ", ".join(builder.info.splits)
        raise UserError(f"data.split={split!r} is not a split of {builder.info.full_name}; valid: {known}") from error


def records(*, num_classes: int, dir: Dir = "", split: Split = "train") -> Source:
    """Images in `dir`, made by `prepare`, of the part `split` of the data set.

    With `num_classes` 0 the labels are not read.
    """
    root = Path(dir)
    manifest = image_records.read_manifest(root)
    if split != manifest["split"]:
        raise UserError(f"data.split={split!r}, but the images in {root} are of split {manifest['split']!r}")
    classes = tuple(manifest["classes"]) if num_classes else ()
    examples = ImageRecords(shards.open_records(root, manifest), len(classes) > 0)
    identity = {"name": "records", "classes": len(classes)}
    identity |= {key: manifest[key] for key in ("dataset", "split", "size", "count", "records_sha256")}
    size, channels = manifest["size"], manifest["channels"]
    return Source("records", examples, size, channels, len(classes), identity, classes=classes, place=str(root))


def latents(
    *,
    num_classes: int,
    flip: bool,
    dir: Dir = "",
    split: Split = "train",
    scale: Scale = 0.18215,
    shift: Shift = 0.0,
    input_range: InputRange = INPUT_RANGE,
    images: Annotated[bool, Leaf("latents: also read the images beside them, as auxiliary array `image`")] = False,
) -> Source:
    """Latents in `dir` (in its folder `split` when that is not ""), sampled anew at each visit.

    `scale`, `shift` and `input_range` must be those in the manifest; scale and shift are applied here unless they were
    when the latents were written. `flip` needs latents written with their mirror images, `images` the images beside
    them. With `num_classes` 0 the labels are not read.
    """
    root = _inside(dir, split)
    manifest = read_manifest(root)
    Scaling(scale, shift, input_range).check_manifest(root, manifest)
    if images and not manifest["image"]:
        raise UserError(
            f"data.images=True, but the latents in {root} have no images beside them; make them with "
            "encode --keep_images, or set data.images=False"
        )
    if flip and manifest["views"] == 1:
        raise UserError(f"data.flip=True, but the latents in {root} hold no mirror images; set data.flip=False")
    height, width, channels = manifest["shape"]
    num_classes = manifest["num_classes"] if num_classes else 0
    records = shards.open_records(root, manifest)
    stored_image = tuple(manifest["image"]) if manifest["image"] else None
    examples = LatentExamples(records, (height, width, channels), num_classes > 0, stored_image, images)
    identity = {"name": "latents", "split": split, "classes": num_classes}
    identity |= {key: manifest[key] for key in ("count", "records_sha256", "scale")}
    identity |= {"shift": manifest["shift"]} if manifest["shift"] else {}
    draw = Sample(1.0) if manifest["scale_applied"] else Sample(scale, shift)
    aux = {"image": mirror} if images else {}
    return Source(
        "latents", examples, height, channels, num_classes, identity, draw, True, aux=aux, place=str(root), draws=DRAWS
    )


def tokens(
    *,
    channels: int,
    num_classes: int,
    flip: bool,
    dir: Dir = "",
    encoder: Annotated[str, Leaf("what made the features of the tokens: pixels, dinov2, vqgan", fixed=True)] = "",
    vocabulary: Vocabulary = 0,
    decoder_vocabulary: DecoderVocabulary = 0,
) -> Source:
    """Tokens of images in `dir`, made by `tokenize`.

    `encoder` and `vocabulary` must be those of the first codebook in the manifest, `size` its grid; with
    `channels` 2 the tokens of the decoder, out of `decoder_vocabulary`, are read too. `flip` needs tokens of the
    mirrored images. With `num_classes` 0 the labels are not read.
    """
    root = Path(dir)
    manifest = read_token_manifest(root)
    streams = manifest["streams"]
    if channels > len(streams):
        raise UserError(f"data.channels={channels}, but the tokens in {root} have {len(streams)} codebook(s)")
    given = {"encoder": encoder, "vocabulary": vocabulary, "decoder_vocabulary": decoder_vocabulary}
    found = {"encoder": streams[0]["encoder"]["name"], "vocabulary": streams[0]["codes"]}
    if channels == 2:
        found["decoder_vocabulary"] = streams[1]["codes"]
    if wrong := [f"data.{leaf}={given[leaf]}, not {value}" for leaf, value in found.items() if given[leaf] != value]:
        raise UserError(f"the tokens in {root} are not those of the config: {'; '.join(wrong)}")
    if flip and manifest["views"] == 1:
        raise UserError(f"data.flip=True, but {root} holds no tokens of mirrored images; set data.flip=False")
    grid, views = streams[0]["grid"], manifest["views"]
    num_classes = manifest["num_classes"] if num_classes else 0
    counts = tuple(stream["codes"] for stream in streams[:channels])
    examples = TokenExamples(
        shards.open_records(root, manifest), (views, len(streams), grid**2), counts, num_classes > 0
    )
    identity = {"name": "tokens", "classes": num_classes, "codes": kinds(manifest, channels)}
    identity |= {key: manifest[key] for key in ("images", "count", "records_sha256")}
    separate = source_and_target if channels == 2 else target
    given_tokens = Condition("tokens", streams[0]["codes"], (grid**2,)) if channels == 2 else None
    return Source(
        "tokens",
        examples,
        grid,
        channels,
        num_classes,
        identity,
        of_view,
        views=True,
        given=given_tokens,
        separate=separate,
        place=str(root),
    )


def arrays_of_file(
    *,
    num_classes: int,
    condition: str,
    condition_size: int,
    dir: Dir = "",
    split: Split = "train",
) -> Source:
    """Arrays of your own: the file `dir`/`split`.npz with images uint8 [n, h, h, c] and, if there are any, conditions.

    conditions: labels, integers [n]; tokens, integers [n, condition_size]; or vectors, floats [n, condition_size].
    Other arrays [n, ...] of the file are auxiliary ones; those named image... are maps, mirrored with the images.
    """
    path = Path(f"{_inside(dir, split)}.npz")
    stored = read_arrays(path)
    images, conditions = stored.pop("images"), stored.pop("conditions", None)
    expected = contracts.condition(condition, num_classes, condition_size)
    found = check_conditions(path, conditions, len(images), expected)
    examples = ArrayExamples(images, found, stored)
    aux = {name: mirror if name.startswith("image") else as_stored for name in stored}
    identity = {"name": "arrays", "split": split, "length": len(images), "sha256": file_sha256(path)}
    given = expected if expected and expected.kind != "labels" else None
    size, channels = images.shape[2:]
    return Source("arrays", examples, size, channels, num_classes, identity, given=given, aux=aux, place=str(path))


SOURCES: dict[str, Callable[..., Source]] = {
    "digits": digits,
    "emoji32": emoji32,
    "folder": folder,
    "tfds": tfds,
    "records": records,
    "latents": latents,
    "tokens": tokens,
    "arrays": arrays_of_file,
}
