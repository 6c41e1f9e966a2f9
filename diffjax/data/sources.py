"""What a data set is: a name, random access to its examples, and an identity.

`load(data)` reads the data section of a config. A source only describes and reads; order, flips and batches are the
pipeline's (pipeline.py).
"""

import hashlib
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from ml_collections import ConfigDict

from diffjax.data import draws, embedded, shards
from diffjax.data.images import SUFFIXES, FolderExamples, PreparedExamples, class_names, list_images
from diffjax.data.latents import LatentExamples, Sample, read_manifest
from diffjax.data.tokens import TokenExamples, choose_view, kinds
from diffjax.data.tokens import read_manifest as read_token_manifest
from diffjax.errors import UserError


class RandomAccess(Protocol):
    """Examples by number: {"image": array, "label": int}. Picklable, since worker processes receive a copy."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> dict[str, Any]: ...


def pixels(images: np.ndarray, mirrored: np.ndarray, positions: np.ndarray, seed: int) -> np.ndarray:
    """Images uint8 [b, h, w, c], left-right mirrored where `mirrored` bool [b], as float32 in [-1, 1].

    Nothing else is random here, so `positions` and `seed` have no effect.
    """
    flipped = np.where(mirrored[:, None, None, None], images[:, :, ::-1], images)
    return flipped.astype(np.float32) / np.float32(127.5) - np.float32(1)


@dataclass(frozen=True)
class Source:
    name: str
    examples: RandomAccess = field(repr=False)
    size: int  # side of the square image or latent
    channels: int
    num_classes: int  # 0: unlabelled, every label is 0
    fingerprint: dict[str, Any]  # json-able identity: another data set, split or file list has another one
    # (stored [b, ...], mirrored bool [b], stream positions int64 [b], seed) -> what training sees: float32
    # [b, h, w, c], or of codes int32 [b, streams, n]
    draw: Callable[[np.ndarray, np.ndarray, np.ndarray, int], np.ndarray] = pixels


def load(data: ConfigDict) -> Source:
    """The source that the config's data section describes.

    Every source reads `name, split, size, channels, num_classes`; what else it reads is said in its own docstring
    below. `UserError` for an unknown name, missing files, and sizes or classes that the data contradicts.
    """
    if data.name not in SOURCES:
        raise UserError(f"data.name={data.name!r} is not a data source; valid: {', '.join(sorted(SOURCES))}")
    source = SOURCES[data.name](data)
    if len(source.examples) == 0:
        raise UserError(f"data source {source.name}, split {data.split!r}, has no examples")
    for leaf in ("size", "channels", "num_classes"):
        if getattr(source, leaf) != data[leaf]:
            raise UserError(f"data.{leaf}={data[leaf]}, but {source.name} has {leaf}={getattr(source, leaf)}")
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


@dataclass(frozen=True)
class ArrayExamples:
    """Examples held in memory: images uint8 [n, h, w, c], labels [n]."""

    images: np.ndarray
    labels: np.ndarray

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> dict[str, Any]:
        return {"image": self.images[index], "label": int(self.labels[index])}


def digits(data: ConfigDict) -> Source:
    """Handwritten digits, 8x8x1, 10 classes, embedded in the package: splits train (1,500) and test (297)."""
    return _embedded("digits", "digits8.npz", data.split, held_out=297)


def emoji32(data: ConfigDict) -> Source:
    """Noto emoji, 32x32x3, 9 classes, embedded in the package: splits train (1,700) and test (206)."""
    return _embedded("emoji32", "emoji32.npz", data.split, held_out=206)


def _embedded(name: str, file: str, split: str, held_out: int) -> Source:
    stored = embedded.read(file)
    train, test = stratified_split(stored["labels"], held_out)
    chosen = {"train": train, "test": test}.get(split)
    if chosen is None:
        raise UserError(f"data.split={split!r} is not a split of {name}; valid: train, test")
    examples = ArrayExamples(stored["images"][chosen], stored["labels"][chosen])
    size, channels = stored["images"].shape[2:]
    identity = {"name": name, "split": split, "length": len(chosen), "sha256": embedded.SHA256[file]}
    return Source(name, examples, size, channels, len(stored["names"]), identity)


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


def folder(data: ConfigDict) -> Source:
    """Image files below `data.dir` (below its folder `data.split` when that is not "").

    `data.crop` is "adm" (centre crop to `data.size`) or "none" (every image must have that size).

    The class is the rank of the top-level sub-folder. Without sub-folders, or when `data.num_classes` is 0, the source
    is unlabelled.
    """
    root = Path(data.dir) / data.split
    if not data.dir or not root.is_dir():
        raise UserError(
            f"data.dir={data.dir!r} with data.split={data.split!r} is no folder; it should hold images "
            f"({', '.join(SUFFIXES)}), for labels in one sub-folder per class"
        )
    _check_crop(data)
    files = list_images(root)
    names = class_names(files) if data.num_classes else []
    ranks = {name: rank for rank, name in enumerate(names)}
    labels = np.array([ranks.get(file.split("/")[0], 0) for file in files], np.int32)
    identity = {
        "name": "folder",
        "split": data.split,
        "size": data.size,
        "crop": data.crop,
        "length": len(files),
        "files_sha256": hashlib.sha256("\n".join(files).encode()).hexdigest(),
        "classes": len(names),
    }
    examples = FolderExamples(root, files, labels, data.size, data.crop == "adm")
    return Source("folder", examples, data.size, 3, len(names), identity)


def _check_crop(data: ConfigDict) -> None:
    if data.crop not in ("adm", "none"):
        raise UserError(f"data.crop={data.crop!r} is not a crop; valid: adm, none")


def tfds(data: ConfigDict) -> Source:
    """A data set prepared by tensorflow_datasets as ArrayRecord, read without tensorflow.

    `data.dataset` is its name, under `data.dir` ("": the default folder of tensorflow_datasets); with "" as its name
    `data.dir` is the folder of the prepared version itself. `data.split` may be an expression like "train[:90%]".
    `data.crop` is "adm" (centre crop to `data.size`) or "none" (every image must have that size).
    With `data.num_classes` 0 the labels are not read.
    """
    _check_crop(data)
    builder = _prepared(data)
    features = builder.info.features
    shape = features["image"].shape
    channels = 1 if shape[-1] == 1 else 3
    num_classes = features["label"].num_classes if data.num_classes and "label" in features else 0
    found = data.size if data.crop == "adm" or shape[0] is None else shape[0]
    records = _records(builder, data.split)
    examples = PreparedExamples(records, data.size, channels, data.crop == "adm", num_classes > 0)
    identity = {
        "name": "tfds",
        "dataset": builder.info.full_name,
        "split": data.split,
        "length": len(records),
        "size": data.size,
        "crop": data.crop,
        "classes": num_classes,
    }
    return Source("tfds", examples, found, channels, num_classes, identity)


def _prepared(data: ConfigDict) -> Any:
    """The builder of a data set that lies ready on disk as ArrayRecord, with an image in each example."""
    import tensorflow_datasets as tfds

    place = f"data_dir={data.dir!r}, " if data.dir else ""
    call = f"tfds.builder({data.dataset or '<name>'!r}, {place}file_format='array_record').download_and_prepare()"
    advice = (
        f"prepare it once with: pip install -e '.[prepare]' && python -c \"import tensorflow_datasets as tfds; {call}\""
    )
    try:
        if data.dataset:
            builder = tfds.builder(data.dataset, data_dir=data.dir or None)
        else:
            builder = tfds.builder_from_directory(data.dir)
    except (OSError, ValueError) as error:  # no such folder; no such name
        reason = str(error).partition("\n")[0]
        raise UserError(f"data.dataset={data.dataset!r}, data.dir={data.dir!r}: {reason}; {advice}") from error
    if not builder.is_prepared():
        if builder.MANUAL_DOWNLOAD_INSTRUCTIONS:
            advice += f" after placing its files in {data.dir or '~/tensorflow_datasets'}/downloads/manual"
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


def latents(data: ConfigDict) -> Source:
    """Latents in `data.dir` (in its folder `data.split` when that is not ""), sampled anew at each visit.

    `data.scale` must be the one in the manifest; it is applied here unless it was when the latents were written.
    `data.flip` needs latents written with their mirror images. With `data.num_classes` 0 the labels are not read.
    """
    root = Path(data.dir) / data.split
    manifest = read_manifest(root)
    if data.scale != manifest["scale"]:
        raise UserError(f"data.scale={data.scale}, but the latents in {root} have scale={manifest['scale']}")
    if data.flip and manifest["views"] == 1:
        raise UserError(f"data.flip=True, but the latents in {root} hold no mirror images; set data.flip=False")
    records = shards.open_records(root, manifest)
    height, width, channels = manifest["shape"]
    num_classes = manifest["num_classes"] if data.num_classes else 0
    examples = LatentExamples(records, (height, width, channels), num_classes > 0)
    identity = {"name": "latents", "split": data.split, "classes": num_classes}
    identity |= {key: manifest[key] for key in ("count", "records_sha256", "scale")}
    draw = Sample(1.0 if manifest["scale_applied"] else data.scale)
    return Source("latents", examples, height, channels, num_classes, identity, draw)


def tokens(data: ConfigDict) -> Source:
    """Codes of images in `data.dir`, made by `tokenize`.

    `data.encoder` and `data.codes` must be those of the first stream in the manifest, `data.size` its grid; with
    `data.channels` 2 the codes of a decoder, `data.decoder_codes`, are read besides. `data.flip` needs codes of the
    mirrored images. With `data.num_classes` 0 the labels are not read.
    """
    root = Path(data.dir)
    manifest = read_token_manifest(root)
    streams = manifest["streams"]
    if data.channels > len(streams):
        raise UserError(f"data.channels={data.channels}, but the codes in {root} are of {len(streams)} kind(s) alone")
    found = {"encoder": streams[0]["encoder"]["name"], "codes": streams[0]["codes"]}
    if data.channels == 2:
        found["decoder_codes"] = streams[1]["codes"]
    if wrong := [f"data.{leaf}={data[leaf]}, not {value}" for leaf, value in found.items() if data[leaf] != value]:
        raise UserError(f"the codes in {root} are others than the config says: {'; '.join(wrong)}")
    if data.flip and manifest["views"] == 1:
        raise UserError(f"data.flip=True, but {root} holds no codes of mirrored images; set data.flip=False")
    grid, views = streams[0]["grid"], manifest["views"]
    num_classes = manifest["num_classes"] if data.num_classes else 0
    records = shards.open_records(root, manifest)
    counts = tuple(stream["codes"] for stream in streams[: data.channels])
    examples = TokenExamples(records, (views, len(streams), grid**2), counts, num_classes > 0)
    identity = {"name": "tokens", "classes": num_classes, "codes": kinds(manifest, data.channels)}
    identity |= {key: manifest[key] for key in ("images", "count", "records_sha256")}
    return Source("tokens", examples, grid, data.channels, num_classes, identity, choose_view)


SOURCES: dict[str, Callable[[ConfigDict], Source]] = {
    "digits": digits,
    "emoji32": emoji32,
    "folder": folder,
    "tfds": tfds,
    "latents": latents,
    "tokens": tokens,
}
