"""What images are compared with, as one network sees it: statistics of a reference file, or features of its images."""

import functools
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np
from tqdm import tqdm

from diffjax.data import image_sets
from diffjax.data.image_sets import EMBEDDED, ImageSet
from diffjax.errors import UserError
from diffjax.evaluation import references, statistics
from diffjax.evaluation.networks import EDM2, RULES, Features, Network
from diffjax.evaluation.references import Moments, Reference
from diffjax.files import local_path

OF_KIND = {"pool3": "inception", "dinov2": "dinov2", "lite0": "lite0"}  # networks by their main features
UNKNOWN = "not stated"  # number of images of a reference
BLOCK = 256  # images read at a time
MOST = 50_000  # training images that samples are compared with in training


@dataclass(frozen=True)
class Images:
    """Images as a network sees them.

    Attributes:
        features: float32 [n, width] by kind.
        labels: integers [n]; None for images without classes.
    """

    features: Features
    labels: np.ndarray | None = None

    @property
    def count(self) -> int:
        return len(next(iter(self.features.values())))


class Available(NamedTuple):
    """What there is to score with, known before any features are.

    Attributes:
        moments: kinds of features that a file has mean and covariance of; (): those of its images are computed.
        images: of the reference, how many, or how many have features in the file; 0: none.
        kinds: of features that there are of single images of the reference.
        labels: whether both sides have labels.
    """

    moments: Collection[str]
    images: int
    kinds: Collection[str]
    labels: bool


@dataclass(frozen=True)
class Standard:
    """What images are compared with, as one network sees it.

    Attributes:
        identity: json-able, what the protocol of results says of it.
        moments: mean and covariance by kind of features; {} where they are to be had from `images` alone.
        images: its images, for the scores that need single ones; None where it has none.
        count: images that the moments are of; None: not stated.
        held_out: real images besides.
    """

    identity: Mapping[str, Any]
    moments: Mapping[str, Moments] = field(default_factory=dict)
    images: Images | None = None
    count: int | None = None
    held_out: Images | None = None


@dataclass(frozen=True)
class Source:
    """What a user named as the reference, opened, before any features are computed.

    Attributes:
        identity: see `Standard`.
        images: to compute features of; None where there are none.
        held_out: real images besides, of embedded sets.
        file: its statistics, of a reference file.
    """

    identity: Mapping[str, Any]
    images: ImageSet | None
    held_out: ImageSet | None = None
    file: Reference | None = None

    def available(self, network: Network, labels: bool) -> Available:
        """See `Available`. labels: whether the samples have some."""
        stored = self.file.moments if self.file else {}
        moments = [kind for kind in network.moments if kind in stored] if network.main in stored else []
        kept = self.file.features.get(network.main) if self.file else None
        count = len(kept) if kept is not None else self.images.count if self.images else 0
        kinds = [network.main] if kept is not None else list(network.kinds) if self.images else []
        return Available(moments, count, kinds, labels and self.images is not None and self.images.labels is not None)

    @property
    def described(self) -> str:
        """In words, for tables."""
        count = self.identity["count"]
        return f"{self.identity['name']}" if count == UNKNOWN else f"{count:,} of {self.identity['name']}"

    @property
    def shape(self) -> tuple[int, int] | None:
        """Height and width of its images, or of those that its statistics are of; None where it does not say."""
        if self.images:
            return self.images.shape[:2]
        stated = self.file.made.get("size") if self.file else None
        return (int(stated[0]), int(stated[1])) if stated else None


def open_source(name: str) -> Source:
    """The reference of a name: an embedded set, images in any container, or a file of statistics."""
    if name in EMBEDDED:
        train, held_out = (image_sets.embedded(name, split) for split in ("train", "test"))
        sha256 = train.fingerprint["sha256"]
        identity = {"name": name, "sha256": sha256, "count": train.count, "held_out_count": held_out.count}
        return Source(identity, train, held_out)
    try:
        path = local_path(name)
        if not path.exists():
            raise UserError(f"valid: {', '.join(EMBEDDED)}, {references.VALID}")
        file = references.read(path)
    except UserError as error:
        raise UserError(f"--reference={name}: {error}") from error
    if file.images:
        image_sets.check_range(file.images)
    count = UNKNOWN if file.count is None else file.count
    return Source(
        {"name": file.name, "sha256": file.sha256, "count": count, "held_out_count": 0}, file.images, None, file
    )


def default_network(source: Source) -> str:
    """The network whose features a reference holds; pixels where it is images alone."""
    return next((OF_KIND[kind] for kind in _held(source) if kind in OF_KIND), "pixels")


def check_network(source: Source, network: Network) -> None:
    """UserError where the statistics of a reference are of another network."""
    stated = source.file.network if source.file else None
    if stated:
        differing = [name for name, value in network.identity().items() if stated.get(name) != value]
        if differing:
            said = ", ".join(f"{name} {stated.get(name)}, not {network.identity()[name]}" for name in differing)
            raise UserError(f"{source.identity['name']} is a reference of another network: {said}")
    elif source.file and source.file.layout == "edm2" and network.name == "dinov2":
        if network.resize != RULES["dinov2"][EDM2]:
            raise UserError(f"{source.identity['name']} has statistics of EDM2's resize; give --resize={EDM2}")
    elif (held := _held(source)) and network.main not in held and not source.images:
        what = "statistics" if source.file and source.file.moments else "features"
        raise UserError(
            f"{source.identity['name']} has {what} of {', '.join(held)} and no images; {network.name} needs "
            f"{network.main}"
        )


def _held(source: Source) -> list[str]:
    """The kinds of features that a reference file holds statistics or values of."""
    return [*source.file.moments, *source.file.features] if source.file else []


def of_source(
    source: Source, network: Network, features_of: Callable[[ImageSet, str], Images] | None = None, *, single: bool
) -> Standard:
    """A reference as a network sees it.

    Args:
        features_of: (images, what they are) -> their features; by default see `of_images`.
        single: whether features of its single images are needed, beside mean and covariance.
    """
    check_network(source, network)
    features_of = features_of or functools.partial(of_images, network)
    stored, kept = (source.file.moments, source.file.features) if source.file else ({}, {})
    moments = {kind: stored[kind] for kind in network.moments if kind in stored and network.main in stored}
    images = Images({network.main: kept[network.main]}) if network.main in kept else None
    if source.images and images is None and (single or not moments):
        images = features_of(source.images, "reference")
    count = (source.file.count if source.file else None) if moments or images is None else images.count
    if not moments and images:
        moments = {kind: moments_of(images.features[kind]) for kind in network.moments if kind in images.features}
    if moments and not single:
        images = None  # 400 MB of 50,000 images
    held_out = features_of(source.held_out, "held-out images") if source.held_out else None
    return Standard(source.identity, moments, images, count, held_out)


def of_images(network: Network, images: ImageSet, name: str) -> Images:
    """Features and labels of a set of images, computed on the devices of this process, with a bar of progress."""
    compute = network.loaded()
    found: list[Features] = []
    quiet = None if network.run else True  # pixels take no time
    with tqdm(total=images.count, unit="image", desc=f"features of the {name}", disable=quiet) as bar:
        for numbers in blocks(np.arange(images.count)):
            found.append(compute(images.read(numbers)))
            bar.update(len(numbers))
    return Images({kind: np.concatenate([each.pop(kind) for each in found]) for kind in network.kinds}, images.labels)


def of_training(source: Any, network: Network) -> Source:
    """The images of a data source as a reference: at most MOST of them, evenly spaced; with labels where they count."""
    images = image_sets.of_source(source, MOST, labelled=network.run is None)
    identity = {"name": source.name, "sha256": images.fingerprint["sha256"], "count": images.count}
    return Source({**identity, "held_out_count": 0}, images)


def blocks(numbers: np.ndarray) -> Iterator[np.ndarray]:
    """Numbers in pieces of BLOCK."""
    for start in range(0, len(numbers), BLOCK):
        yield numbers[start : start + BLOCK]


def moments_of(features: np.ndarray) -> Moments:
    found = statistics.of(features)
    return Moments(found.mean, found.covariance)
