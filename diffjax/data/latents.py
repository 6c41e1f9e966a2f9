"""Folders of latents: ArrayRecord shards and a manifest, `latents.json`, that describes them.

Stored are mean and standard deviation of z, the autoencoder's posterior; models train on (z - shift) scale. `encode`
makes such a folder of images, and features.py of the feature folders that others published.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Annotated, Any

import numpy as np
from tqdm import tqdm

from diffjax.contracts import Device
from diffjax.data import records, shards
from diffjax.errors import UserError
from diffjax.files import only_writer
from diffjax.options import Leaf, Options, Valid

MANIFEST = "latents.json"
NAME = "latents"  # of the shards
REQUEST = "encode.json"  # what is being made, while it is
SHARD_SIZE = 8192  # records; 135 MB of 32x32x4 moments
COMMAND = "python -m diffjax encode --config=RECIPE --out="
INPUT_RANGE = (-1.0, 1.0)
DRAWS = "threefry"  # of posteriors, for (seed, number of the batch, index); earlier versions drew them on the host
# Entries of manifests and requests that earlier versions did not write, and what they meant.
LATER: dict[str, Any] = {
    "shift": 0.0,
    "input_range": list(INPUT_RANGE),
    "image": None,
    "encoder_sha256": "",
    "fingerprint": "",
}

Numbers = float | tuple[float, ...]  # one for all channels, or one for each
Scale = Annotated[
    Numbers,
    Leaf(
        "latents: the model sees the autoencoder's output, less data.shift, times this: one number, or one a channel",
        valid=Valid(lambda: "above 0", lambda value: bool(np.all(np.asarray(value) > 0))),
        fixed=True,
    ),
]
Shift = Annotated[Numbers, Leaf("latents: see data.scale; one number, or one a channel", fixed=True)]
InputRange = Annotated[
    tuple[float, ...], Leaf("latents: lowest and highest value of the autoencoder's pixels", fixed=True)
]


@dataclass(frozen=True)
class Scaling:
    """How latents are scaled: (z - shift) scale is what models train on; the leaves of section `data` of these names.

    Attributes:
        input_range: of the pixels that the autoencoder was given; it decodes to the same.
    """

    scale: Numbers
    shift: Numbers = 0.0
    input_range: tuple[float, ...] = INPUT_RANGE

    @property
    def per_channel(self) -> bool:
        """Whether channels differ: the statistics of a data set, other than those an autoencoder has by itself."""
        return np.size(self.scale) > 1 or np.size(self.shift) > 1

    def check(self, channels: int) -> None:
        """Raise UserError for other than one number or one per channel, and for pixels of no range."""
        for leaf, value in (("scale", self.scale), ("shift", self.shift)):
            if np.size(value) not in (1, channels):
                raise UserError(
                    f"data.{leaf} has {np.size(value)} numbers; valid: 1, or one for each of {channels} channels"
                )
        if len(self.input_range) != 2 or self.input_range[0] >= self.input_range[1]:
            raise UserError(
                f"data.input_range = {self.input_range}; valid: the lowest and the highest value, such as -1,1"
            )

    def check_manifest(self, folder: Path, manifest: Mapping[str, Any]) -> None:
        """Raise UserError where the latents in `folder` are scaled otherwise."""
        channels = manifest["shape"][2]
        self.check(channels)
        for leaf, given in asdict(self).items():
            wide = 2 if leaf == "input_range" else channels
            if not np.array_equal(np.broadcast_to(given, wide), np.broadcast_to(manifest[leaf], wide)):
                raise UserError(f"data.{leaf}={given}, but the latents in {folder} have {leaf}={manifest[leaf]}")


def scaling(options: Options) -> Scaling:
    """The scaling that the options of the source `latents` say."""
    given: Any = {leaf: options[leaf] for leaf in ("scale", "shift", "input_range")}
    return Scaling(**given)


@dataclass(frozen=True, kw_only=True)
class Origin(Scaling):
    """The origin of latents, which is written to the manifest."""

    source: str  # the data set, split and crop that were encoded
    autoencoder: str
    weights_sha256: str
    scale_applied: bool  # whether the stored numbers are scaled and shifted already
    num_classes: int  # 0: unlabelled
    label_table_sha256: str  # of the class names, joined by "\n", in label order; "" when not known
    encoder_sha256: str = ""  # of the half of the weights that encodes; "" when not known
    fingerprint: str = ""  # of the files that were converted; "" when images were encoded

    def scaled(self, mean: np.ndarray, std: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Mean and standard deviation [..., c] of what models train on, of those of the stored numbers."""
        if self.scale_applied:
            return mean, std
        return (mean - np.asarray(self.shift)) * np.asarray(self.scale), std * np.asarray(self.scale)


class Spread:
    """Mean and variance by channel, over all positions, views and draws of latents that are added one by one."""

    def __init__(self) -> None:
        self._sums: Any = 0.0
        self._count = 0

    def add(self, moments: np.ndarray) -> None:
        """moments: float [views, 2, h, w, c]."""
        mean, std = np.moveaxis(moments.astype(np.float64), 1, 0)
        self._sums = self._sums + np.stack([mean, mean**2 + std**2]).sum(axis=(1, 2, 3))
        self._count += mean[..., 0].size

    def of(self, origin: Origin) -> tuple[np.ndarray, np.ndarray]:
        """Mean and standard deviation [c] of the scaled latents."""
        mean, square = self._sums / self._count
        return origin.scaled(mean, np.sqrt(np.maximum(square - mean**2, 0)))


def write_latents(out: Path, examples: Sequence[tuple[np.ndarray, int]], origin: Origin) -> dict[str, Any]:
    """Write (moments [views, 2, h, w, c], label) pairs to the folder `out`; returns the manifest, written last.

    Views: 1, or 2 with the encoding of the mirrored image, the same for all. See records.py for the numbers. Shards
    that an interrupted call with the same origin has left whole stay.
    """
    if not len(examples):
        raise UserError(f"no latents to write to {out}")
    expected = examples[0][0].shape

    def encoded(numbers: range) -> Iterator[bytes]:
        for number in numbers:
            moments, label = examples[number]
            _check(moments, label, expected, origin)
            yield records.encode(moments, label)
            bar.update()

    shards.make_folder(out, MANIFEST)
    with only_writer(out):
        request = {**asdict(origin), "count": len(examples), "shard_size": SHARD_SIZE}
        shards.agree(out, REQUEST, request, NAME, LATER)
        jobs = shards.missing(out, NAME, len(examples), SHARD_SIZE)
        left = sum(len(numbers) for _, numbers in jobs)
        with tqdm(total=len(examples), initial=len(examples) - left, unit="latent", disable=None) as bar:
            for path, numbers in jobs:
                shards.write_shard(path, encoded(numbers))
        return finish(out, len(examples), expected[0], expected[2:], origin)


def finish(
    out: Path,
    count: int,
    views: int,
    shape: Sequence[int],
    origin: Origin,
    image: Sequence[int] | None = None,
) -> dict[str, Any]:
    """Write the manifest of the shards of `count` latents, which are there; returns it. UserError for others.

    It also holds mean and standard deviation of the scaled latents by channel, over all positions and draws.
    image: the shape of the images beside them.
    """
    spread = Spread()

    def look(record: bytes) -> None:
        moments, label = records.decode(record, shape, image)
        _check(moments, label, (views, 2, *shape), origin)
        spread.add(moments)

    contents = shards.contents(out, shards.file_names(NAME, count, SHARD_SIZE), look)
    if contents["count"] != count:
        raise UserError(
            f"{out} holds {contents['count']} latents of {count} images; remove its shards and make them again"
        )
    mean, std = spread.of(origin)
    layout = {"version": records.version(image), "views": views, "shape": shape, "dtype": "float16", "image": image}
    statistics = {"mean": mean.tolist(), "std": std.tolist()}
    manifest = shards.write_manifest(out / MANIFEST, layout | contents | asdict(origin) | statistics)
    (out / REQUEST).unlink(missing_ok=True)
    return manifest


def _check(moments: np.ndarray, label: int, shape: tuple[int, ...], origin: Origin) -> None:
    if moments.shape != shape or len(shape) != 5 or shape[0] not in (1, 2) or shape[1] != 2:
        raise UserError(
            f"latent moments have shape {moments.shape}; expected [1 or 2, 2, h, w, c], the same for all: {shape}"
        )
    if not 0 <= label < max(origin.num_classes, 1):
        raise UserError(f"label {label} is outside the {origin.num_classes} classes")


def read_manifest(folder: Path) -> dict[str, Any]:
    """The manifest of the latents in `folder`. `UserError` with the command that makes them when there are none."""
    number = int | float
    fields = {"views": int, "shape": [int], "scale": (number, [number]), "scale_applied": bool, "num_classes": int}
    later: dict[str, Any] = {"shift": (number, [number]), "input_range": [number], "image": (type(None), [int])}
    later |= {"encoder_sha256": str, "fingerprint": str}
    manifest = shards.read_manifest(folder / MANIFEST, "latents", COMMAND, fields | later, LATER)
    if manifest["views"] not in (1, 2) or len(manifest["shape"]) != 3:
        found = f"views {manifest['views']}, shape {manifest['shape']}"
        raise UserError(f"{folder / MANIFEST}: {found}; valid: 1 or 2, and [h, w, c]")
    sizes = {leaf: np.size(manifest[leaf]) for leaf in ("scale", "shift", "input_range")}
    if {sizes["scale"], sizes["shift"]} - {1, manifest["shape"][2]} or sizes["input_range"] != 2:
        raise UserError(
            f"{folder / MANIFEST}: scale, shift, input_range of {', '.join(map(str, sizes.values()))} numbers; valid: "
            f"1 or {manifest['shape'][2]} for the channels, and 2"
        )
    return manifest


@dataclass(frozen=True)
class LatentExamples:
    """{"image": moments float16 [views, 2, h, w, c], "label": int} from ArrayRecord shards.

    stored_image: the shape of the images in the records; None: none. images: whether they are read, as the auxiliary
    array `image`, uint8 [H, W, channels].
    """

    records: Any = field(repr=False)
    shape: tuple[int, int, int]
    labelled: bool
    stored_image: tuple[int, ...] | None = None
    images: bool = False

    def __len__(self) -> int:
        return len(self.records)

    def __getitem__(self, index: int) -> dict[str, Any]:
        record = self.records[index]
        moments, label = records.decode(record, self.shape, self.stored_image)
        example = {"image": moments, "label": label if self.labelled else 0}
        if self.images and self.stored_image:
            example["aux"] = {"image": records.decode_image(record, self.stored_image)}
        return example


@dataclass(frozen=True)
class Sample:
    """A new posterior sample at each visit: (mean + std eps - shift) scale."""

    scale: Numbers  # 1 when the stored latents are scaled already
    shift: Numbers = 0.0

    def __call__(self, moments: Any, mirrored: Any, device: Device) -> Any:
        """Moments float16 [b, 2, h, w, c] of the view that is seen -> float32 [b, h, w, c]."""
        mean, std = moments[:, 0].astype(np.float32), moments[:, 1].astype(np.float32)
        drawn = mean + std * device.normal(mean.shape[1:])
        return (drawn - np.asarray(self.shift, np.float32)) * np.asarray(self.scale, np.float32)
