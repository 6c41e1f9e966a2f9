"""Readers of the layouts in which others publish latents of whole data sets; features.py says what they mean.

Every reader takes the folder or file of a release and returns its `Features`: (moments, label) by the index of the
image. Moments are float32 [views, 2, h, w, c] as in records.py. What differs from the layout is a UserError.
"""

import hashlib
import json
import re
import zipfile
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from diffjax import torch_file
from diffjax.data.npy import read_array, read_pair
from diffjax.errors import UserError

LARGEST = 2**24  # bytes of one array; those of 512-pixel images have 131,200
LARGEST_TABLE = 2**29  # bytes of dataset.json
PADDED = 1_281_168  # files of U-DiT's release: the sampler of 8 processes repeats one image of 1,281,167
BATCH = 256  # images that U-ViT encodes at a time, followed by their mirrors
LOWEST, HIGHEST = -30.0, 20.0  # what U-ViT's log-variance is cut to when it is loaded

Example = tuple[np.ndarray, int]


@dataclass(frozen=True)
class Features(Sequence[Example]):
    """The examples of a release, by index.

    Attributes:
        read: index -> (moments, label), label 0 where there are none.
        fingerprint: tells these files from others, and from what they were before a change.
        labelled: whether there are labels.
        statistics: mean and standard deviation [c] of the stored numbers by which the release normalises them.
    """

    length: int
    read: Callable[[int], Example]
    fingerprint: str
    labelled: bool = True
    statistics: tuple[np.ndarray, np.ndarray] | None = None

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, index: Any) -> Any:
        return self.read(index)


def fast_dit(source: Path) -> Features:
    """fast-DiT: in `*_features` {i}.npy float32 [1, c, h, w], in `*_labels` {i}.npy int64 [1]; frozen samples."""
    features, labels = (
        _numbered(_part(source, end), "{i}.npy", r"(\d+)\.npy", int) for end in ("_features", "_labels")
    )
    return _frozen(source, features, labels)


def udit(source: Path) -> Features:
    """U-DiT: as fast-DiT, named {step}_..{rank}.npy, index 8 step + rank; the last of 1,281,168 is padding."""

    def number(step: str, rank: str) -> int:
        return 8 * int(step) + int(rank)

    parts = (_part(source, end) for end in ("_features", "_labels"))
    features, labels = (_numbered(part, "{step}_..{rank}.npy", r"(\d+)_.*?(\d)\.npy", number) for part in parts)
    if len(features) == len(labels) == PADDED:
        features, labels = features[:-1], labels[:-1]
    return _frozen(source, features, labels)


def _frozen(source: Path, features: list[Path], labels: list[Path]) -> Features:
    if len(features) != len(labels):
        raise UserError(
            f"{len(features)} features in {features[0].parent} and {len(labels)} labels in {labels[0].parent}; valid: "
            "as many of both"
        )

    def read(index: int) -> Example:
        latent = read_array(*_file(features[index]), (1, None, None, None), "<f4")
        label = read_array(*_file(labels[index]), (1,), "<i8")
        return _frozen_moments(latent), int(label[0])

    return Features(len(features), read, _fingerprint(_stamps(source, features + labels)))


def u_vit(source: Path) -> Features:
    """U-ViT: {i}.npy, pickled pairs of float32 [2c, h, w] (mean and log-variance, not cut) and a label.

    Batches of 256 images, each followed by the mirrors of its images; the last is smaller. Joined to two views each.
    """
    files = _numbered(source, "{i}.npy", r"(\d+)\.npy", int)
    count = len(files) // 2
    if len(files) % 2:
        raise UserError(f"{source} holds {len(files)} files; valid: an even number, every image and its mirror")

    def view(file: Path) -> Example:
        data, name = _file(file)
        moments, label = read_pair(data, name)
        if moments.dtype != np.float32 or moments.ndim != 3 or moments.shape[0] % 2:
            raise UserError(f"{name}: {moments.dtype} of shape {moments.shape}; valid: float32 of shape (2 c, h, w)")
        mean, log_variance = np.split(moments, 2)
        return _channels_last(mean, np.exp(np.clip(log_variance, LOWEST, HIGHEST) / 2)), label

    def read(index: int) -> Example:
        batch, place = divmod(index, BATCH)
        size = min(BATCH, count - batch * BATCH)
        plain = 2 * BATCH * batch + place
        (original, label), (mirror, other) = view(files[plain]), view(files[plain + size])
        if label != other:
            raise UserError(
                f"{files[plain]} has label {label}, and {files[plain + size].name}, which should be its mirror, has "
                f"{other}; valid: batches of {BATCH} images and then their mirrors"
            )
        return np.stack([original, mirror]), label

    return Features(count, read, _fingerprint(_stamps(source, files)))


def edm2(source: Path) -> Features:
    """EDM2: a zip or folder of dataset.json and %05d/img-mean-std-%08d.npy float32 [2c, h, w].

    The arrays are mean and standard deviation, not the logarithm of the variance; the first five digits of the index
    are the folder.
    """
    members = _members(source)
    labels = _labels(source, members)
    count = len(members.sizes) - 1

    def name(index: int) -> str:
        return f"{index // 1000:05d}/img-mean-std-{index:08d}.npy"

    if missing := next((name(i) for i in range(count) if name(i) not in members.sizes), ""):
        raise UserError(f"{source} holds {count} files beside dataset.json, and not {missing}; valid: all of 0, 1, ...")
    if labels is not None and (unlabelled := next((name(i) for i in range(count) if name(i) not in labels), "")):
        raise UserError(f"{source}: dataset.json has no label of {unlabelled}")

    def read(index: int) -> Example:
        file = name(index)
        moments = read_array(members.read(file, LARGEST), f"{source}: {file}", (None, None, None), "<f4")
        if len(moments) % 2 or not (moments[len(moments) // 2 :] >= 0).all():
            raise UserError(f"{source}: {file}: valid: as many channels of means as of standard deviations, from 0 on")
        return _channels_last(*np.split(moments, 2))[None], 0 if labels is None else labels[file]

    return Features(count, read, members.fingerprint, labels is not None)


@dataclass(frozen=True)
class _Members:
    """Files of a folder or zip by name: their sizes, and name, limit -> their bytes."""

    sizes: Mapping[str, int]
    read: Callable[[str, int], bytes]
    fingerprint: str


def _members(source: Path) -> _Members:
    if source.is_dir():
        files = {str(path.relative_to(source)): path for path in source.rglob("*") if path.is_file()}
        sizes = {name: path.stat().st_size for name, path in files.items()}
        stamps = _fingerprint(_stamps(source, files.values()))
        return _Members(sizes, lambda name, most: _bytes(files[name], most), stamps)
    if not source.is_file():
        raise UserError(f"{source}: no such file or folder")
    try:
        archive = zipfile.ZipFile(source)
    except (zipfile.BadZipFile, OSError, ValueError) as error:
        raise UserError(f"{source}: damaged or no zip ({error}); valid: a zip of EDM2, or its folder") from error
    infos = {info.filename: info for info in archive.infolist() if not info.is_dir()}

    def read(name: str, most: int) -> bytes:
        info = infos[name]
        if info.file_size > most:
            raise UserError(f"{source}: {name} has {info.file_size} bytes; valid: up to {most}")
        if info.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
            raise UserError(f"{source}: {name} is compressed by method {info.compress_type}; valid: stored or deflated")
        try:
            with archive.open(info) as file:
                data = file.read(info.file_size + 1)  # without a number it inflates whatever there is
        except Exception as error:  # a damaged or crafted zip can break the reader in any way
            raise UserError(f"{source}: {name} is damaged ({error})") from error
        if len(data) != info.file_size:
            raise UserError(f"{source}: {name} is damaged ({len(data)} bytes where the zip says {info.file_size})")
        return data

    sizes = {name: info.file_size for name, info in infos.items()}
    return _Members(sizes, read, _fingerprint((name, info.file_size, info.CRC) for name, info in infos.items()))


def _labels(source: Path, members: _Members) -> dict[str, int] | None:
    """The label of every file of a data set of EDM2; None: it has none."""
    if "dataset.json" not in members.sizes:
        raise UserError(f"{source} lacks dataset.json; valid: a zip of EDM2, or its folder")
    try:
        pairs = json.loads(members.read("dataset.json", LARGEST_TABLE))["labels"]
        found = None if pairs is None else dict(pairs)
    except (ValueError, TypeError, KeyError) as error:
        raise UserError(f"{source}: dataset.json holds no labels ({error})") from error
    if found and (wrong := [name for name, label in found.items() if type(label) is not int]):
        raise UserError(f"{source}: dataset.json has {found[wrong[0]]!r} for {wrong[0]}; valid: whole numbers")
    return found


def va_vae(source: Path) -> Features:
    """LightningDiT: safetensors latents_rank{r}_shard{s}, and latents_stats.pt with mean and std float32 [1, c, 1, 1].

    Of a shard: latents, latents_flip float32 [n, c, h, w], frozen samples of images and their mirrors, labels int64
    [n]. In the order of the names, which is that of the release's own reader.
    """
    if not (files := sorted(source.glob("latents_rank*_shard*.safetensors"))):
        raise UserError(f"{source} holds no latents_rank00_shard000.safetensors")
    shards = [_open_shard(file) for file in files]
    shapes = [_shard_shape(file, shard) for file, shard in zip(files, shards)]
    firsts = np.cumsum([0, *(shape[0] for shape in shapes)])
    if other := [i for i, shape in enumerate(shapes) if shape[1:] != shapes[0][1:]]:
        raise UserError(f"{files[other[0]]}: latents of shape {shapes[other[0]][1:]}, and before {shapes[0][1:]}")

    def read(index: int) -> Example:
        number = int(np.searchsorted(firsts, index, "right")) - 1
        row, shard = index - int(firsts[number]), shards[number]
        views = [_frozen_moments(shard.get_slice(name)[row : row + 1]) for name in ("latents", "latents_flip")]
        return np.concatenate(views), int(shard.get_slice("labels")[row : row + 1].item())

    table = source / "latents_stats.pt"
    statistics = _statistics(table, shapes[0][1])
    return Features(int(firsts[-1]), read, _fingerprint(_stamps(source, [*files, table])), statistics=statistics)


def _open_shard(file: Path) -> Any:
    from safetensors import SafetensorError, safe_open

    try:
        return safe_open(file, "np")
    except (SafetensorError, OSError) as error:
        raise UserError(f"{file}: damaged or no safetensors ({error})") from error


def _shard_shape(file: Path, opened: Any) -> list[int]:
    """The shape [n, c, h, w] of a shard of LightningDiT."""
    names = ("latents", "latents_flip", "labels")
    if missing := set(names) - set(opened.keys()):
        raise UserError(f"{file} lacks {', '.join(sorted(missing))}")
    slices = [opened.get_slice(name) for name in names]
    latents, flipped, labels = ((each.get_dtype(), each.get_shape()) for each in slices)
    if latents[0] != "F32" or len(latents[1]) != 4 or flipped != latents or labels != ("I64", latents[1][:1]):
        raise UserError(
            f"{file}: latents {latents}, latents_flip {flipped}, labels {labels}; valid: F32 [n, c, h, w] twice and "
            "I64 [n]"
        )
    return latents[1]


def _statistics(path: Path, channels: int) -> tuple[np.ndarray, np.ndarray]:
    """Mean and standard deviation [channels] of latents_stats.pt."""
    found = torch_file.read(path)
    held = [found.get(name) if isinstance(found, dict) else None for name in ("mean", "std")]
    arrays = [each for each in held if isinstance(each, np.ndarray) and each.shape == (1, channels, 1, 1)]
    if len(arrays) < 2 or not np.all(arrays[1] > 0) or not np.isfinite(arrays).all():
        shapes = [each.shape if isinstance(each, np.ndarray) else type(each).__name__ for each in held]
        raise UserError(f"{path}: mean and std of shapes {shapes}; valid: (1, {channels}, 1, 1), std above 0")
    mean, std = (each.astype(np.float64).reshape(channels) for each in arrays)
    return mean, std


def _fingerprint(stamps: Iterable[tuple[str, int, int]]) -> str:
    """The sha256 of names, sizes and times (of members of a zip checksums), in the order of the names."""
    digest = hashlib.sha256()
    for name, size, stamp in sorted(stamps):
        digest.update(f"{name}\0{size}\0{stamp}\n".encode(errors="surrogateescape"))
    return digest.hexdigest()


def _stamps(source: Path, files: Iterable[Path]) -> Iterator[tuple[str, int, int]]:
    """Name in the folder `source`, bytes and time of change in ns of every file."""
    for path in files:
        status = path.stat()
        yield str(path.relative_to(source)), status.st_size, status.st_mtime_ns


def _channels_last(mean: np.ndarray, std: np.ndarray) -> np.ndarray:
    """[c, h, w] twice -> [2, h, w, c]."""
    return np.stack([mean, std]).transpose(0, 2, 3, 1)


def _frozen_moments(sample: np.ndarray) -> np.ndarray:
    """A sample [1, c, h, w] -> moments [1, 2, h, w, c] of standard deviation 0."""
    return _channels_last(sample[0], np.zeros_like(sample[0]))[None]


def _part(source: Path, end: str) -> Path:
    """The one folder in `source` whose name ends so."""
    found = sorted(path for path in source.glob(f"*{end}") if path.is_dir())
    if len(found) != 1:
        raise UserError(f"{source} holds {len(found)} folders *{end}; valid: one, as imagenet256{end}")
    return found[0]


def _numbered(folder: Path, names: str, pattern: str, number: Callable[..., int]) -> list[Path]:
    """The npy files of a folder in the order of their numbers, which have to be 0, 1, 2, ... without a gap.

    names: in words. number: of the texts of the groups of the pattern, which has to match the whole name.
    """
    if not folder.is_dir():
        raise UserError(f"no such folder: {folder}")
    found: dict[int, Path] = {}
    for path in sorted(folder.glob("*.npy")):
        if not (match := re.fullmatch(pattern, path.name)):
            raise UserError(f"{path}: not a name of this layout; valid: {names}")
        if (key := number(*match.groups())) in found:
            raise UserError(f"{path} and {found[key].name} are both number {key}")
        found[key] = path
    if not found:
        raise UserError(f"{folder} holds no npy files")
    if missing := next((i for i in range(len(found)) if i not in found), None):
        raise UserError(f"{folder} holds {len(found)} files, and not number {missing}; valid: all of 0, 1, ...")
    return [found[i] for i in range(len(found))]


def _file(path: Path) -> tuple[bytes, str]:
    """The bytes of a file of one array, and what it is called."""
    return _bytes(path, LARGEST), str(path)


def _bytes(path: Path, most: int) -> bytes:
    if (size := path.stat().st_size) > most:
        raise UserError(f"{path} has {size} bytes; valid: up to {most}")
    return path.read_bytes()
