"""Folders of latents: ArrayRecord shards and a manifest, `latents.json`, that describes them.

    python -m diffjax.data.latents --features=DIR --labels=DIR --out=DIR

converts the fast-DiT layout: `{i}.npy` float32 [1, c, h, w], one frozen posterior sample already multiplied by the
scale, and `{i}.npy` int64 [1], its label. Such a set gets std 0 and `scale_applied`, so that it is never scaled twice.
"""

import argparse
import sys
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from diffjax.data import draws, records, shards
from diffjax.data.normal import standard_normal
from diffjax.errors import UserError
from diffjax.files import local_path

MANIFEST = "latents.json"
SHARD_SIZE = 8192  # records; 135 MB of 32x32x4 moments
COMMAND = "python -m diffjax.data.latents --features=<folder of {i}.npy> --labels=<folder of {i}.npy> --out="


@dataclass(frozen=True)
class Origin:
    """The origin of latents, which is written to the manifest."""

    source: str  # the data set, split and crop that were encoded
    autoencoder: str
    weights_sha256: str
    input_range: tuple[float, float]  # of the pixels that the autoencoder was given
    scale: float  # latents times this are what models train on
    scale_applied: bool  # whether the stored numbers are multiplied by it already
    num_classes: int  # 0: unlabelled
    label_table_sha256: str  # of the class names, joined by "\n", in label order; "" when not known


def write_latents(out: Path, examples: Iterable[tuple[np.ndarray, int]], origin: Origin) -> dict[str, Any]:
    """Write (moments [views, 2, h, w, c], label) pairs to the folder `out`; returns the manifest, written last.

    Views: 1, or 2 with the encoding of the mirrored image, the same for all. See records.py for the numbers.
    """
    shards.make_folder(out, MANIFEST)
    shape: tuple[int, ...] = ()

    def encoded() -> Iterator[bytes]:
        nonlocal shape
        for moments, label in examples:
            shape = shape or moments.shape
            _check(moments, label, shape, origin)
            yield records.encode(moments, label)

    contents = shards.write(out, "latents", encoded(), SHARD_SIZE)
    layout = {"version": records.VERSION, "views": shape[0], "shape": shape[2:], "dtype": "float16"}
    return shards.write_manifest(out / MANIFEST, layout | contents | asdict(origin))


def finish(
    out: Path, names: Sequence[str], count: int, views: int, shape: tuple[int, int, int], origin: Origin
) -> dict[str, Any]:
    """Write the manifest of shards that are there, of `count` records in all; returns it. UserError for others.

    It also holds mean and standard deviation of the scaled latents by channel, over all positions and draws.
    """
    sums = np.zeros((2, shape[2]))

    def look(record: bytes) -> None:
        moments, label = records.decode(record, shape)
        _check(moments, label, (views, 2, *shape), origin)
        mean, std = np.moveaxis(moments.astype(np.float64), 1, 0)
        sums[:] += np.stack([mean, mean**2 + std**2]).sum(axis=(1, 2, 3))

    contents = shards.contents(out, names, look)
    if contents["count"] != count:
        raise UserError(
            f"{out} holds {contents['count']} latents of {count} images; remove its shards and make them again"
        )
    mean, square = sums / (contents["count"] * views * shape[0] * shape[1])
    spread = {"mean": (mean * origin.scale).tolist(), "std": (np.sqrt(square - mean**2) * origin.scale).tolist()}
    layout = {"version": records.VERSION, "views": views, "shape": shape, "dtype": "float16"}
    return shards.write_manifest(out / MANIFEST, layout | contents | asdict(origin) | spread)


def _check(moments: np.ndarray, label: int, shape: tuple[int, ...], origin: Origin) -> None:
    if moments.shape != shape or len(shape) != 5 or shape[0] not in (1, 2) or shape[1] != 2:
        raise UserError(
            f"latent moments have shape {moments.shape}; expected [1 or 2, 2, h, w, c], the same for all: {shape}"
        )
    if not 0 <= label < max(origin.num_classes, 1):
        raise UserError(f"label {label} is outside the {origin.num_classes} classes")


def read_manifest(folder: Path) -> dict[str, Any]:
    """The manifest of the latents in `folder`. `UserError` with the command that makes them when there are none."""
    fields = {"views": int, "shape": [int], "scale": int | float, "scale_applied": bool, "num_classes": int}
    manifest = shards.read_manifest(folder / MANIFEST, "latents", COMMAND, fields)
    if manifest["views"] not in (1, 2) or len(manifest["shape"]) != 3:
        found = f"views {manifest['views']}, shape {manifest['shape']}"
        raise UserError(f"{folder / MANIFEST}: {found}; valid: 1 or 2, and [h, w, c]")
    return manifest


@dataclass(frozen=True)
class LatentExamples:
    """{"image": moments float32 [views, 2, h, w, c], "label": int} from ArrayRecord shards."""

    records: Any = field(repr=False)
    shape: tuple[int, int, int]
    labelled: bool

    def __len__(self) -> int:
        return len(self.records)

    def __getitem__(self, index: int) -> dict[str, Any]:
        moments, label = records.decode(self.records[index], self.shape)
        return {"image": moments, "label": label if self.labelled else 0}


@dataclass(frozen=True)
class Sample:
    """A new posterior sample at each visit: (mean + std * eps) * scale, eps drawn for (seed, stream position)."""

    scale: float  # 1 when the stored latents are scaled already

    def __call__(self, stored: np.ndarray, mirrored: np.ndarray, positions: np.ndarray, seed: int) -> np.ndarray:
        """Moments [b, views, 2, h, w, c], mirrored bool [b], positions int64 [b] -> float32 [b, h, w, c]."""
        chosen = stored[np.arange(len(stored)), mirrored.astype(int)]
        shape = chosen.shape[2:]
        eps = np.stack([standard_normal(draws.philox(seed, "latent", block=int(each)), shape) for each in positions])
        return (chosen[:, 0] + chosen[:, 1] * eps) * np.float32(self.scale)


def fast_dit(features: Path, labels: Path) -> Iterator[tuple[np.ndarray, int]]:
    """The (moments [1, 2, h, w, c], label) of a fast-DiT feature folder in numerical order, std 0."""
    feature_files, label_files = _numbered(features), _numbered(labels)
    if feature_files.keys() != label_files.keys():
        differing = sorted(feature_files.keys() ^ label_files.keys())
        raise UserError(
            f"{len(feature_files)} features in {features} and {len(label_files)} labels in {labels} do not pair; "
            f"{differing[0]}.npy is in one folder only"
        )
    for number in sorted(feature_files):
        latent, label = _load(feature_files[number]), _load(label_files[number])
        if latent.ndim != 4 or latent.shape[0] != 1 or label.size != 1:
            raise UserError(
                f"{feature_files[number]}: shape {latent.shape}, label {label.shape}; expected (1, c, h, w) and (1,)"
            )
        mean = latent[0].transpose(1, 2, 0)
        yield np.stack([mean, np.zeros_like(mean)])[None], int(label.item())


def _load(file: Path) -> np.ndarray:
    try:
        return np.load(file, allow_pickle=False)
    except ValueError as error:
        raise UserError(f"{file.name} in {file.parent} cannot be read: {error}") from error


def _numbered(folder: Path) -> dict[int, Path]:
    """The files `{i}.npy` of `folder` by their number."""
    if not folder.is_dir():
        raise UserError(f"no such folder: {folder}")
    files = sorted(folder.glob("*.npy"))
    if strange := [file.name for file in files if not file.stem.isdecimal()]:
        raise UserError(f"{strange[0]} in {folder} is not named by a number; expected 0.npy, 1.npy, ...")
    return {int(file.stem): file for file in files}


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name in ("features", "labels", "out"):
        parser.add_argument(f"--{name}", required=True)
    parser.add_argument("--scale", type=float, default=0.18215, help="the factor that the features are multiplied by")
    parser.add_argument("--num_classes", type=int, default=1000)
    parser.add_argument("--autoencoder", default="unknown", help="name to record")
    parser.add_argument("--weights_sha256", default="", help="of the autoencoder's weights, to record")
    args = parser.parse_args(arguments)
    origin = Origin(
        source=f"fast-DiT features {Path(args.features).name}",
        autoencoder=args.autoencoder,
        weights_sha256=args.weights_sha256,
        input_range=(-1.0, 1.0),
        scale=args.scale,
        scale_applied=True,
        num_classes=args.num_classes,
        label_table_sha256="",
    )
    try:
        features, labels, out = (local_path(text) for text in (args.features, args.labels, args.out))
        manifest = write_latents(out, fast_dit(features, labels), origin)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(f"{manifest['count']} latents of shape {manifest['shape']} in {len(manifest['shards'])} shards: {out}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
