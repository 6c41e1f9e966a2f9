"""Reference files: mean and covariance of the features of a data set, and some of its images.

    layout           file   arrays
    adm              .npz   mu, sigma (Inception, 2048); mu_s, sigma_s (its spatial features, 2023); arr_0: images,
                            without mu the statistics are those of the images
    pytorch-fid      .npz   mu, sigma; also of EDM and clean-fid
    clean-fid        .npz   feats [n, 2048]
    edm2             .pkl   {num_images, fid: {mu, sigma}, fd_dinov2: {mu, sigma}}
    torch-fidelity   .pt    {mu, sigma}, or features [n, 2048]
    images                  any set of images, see data/image_sets.py
    diffjax          .npz   as adm, of other features mu_KIND, sigma_KIND; beside it a json that says of what

Files of others do not say which network or resize their features are of; their widths tell the network.
"""

import json
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from diffjax import numpy_pickle, torch_file
from diffjax.data.image_sets import ImageSet, open_image_set
from diffjax.data.preparation.containers import reading
from diffjax.errors import UserError
from diffjax.evaluation.statistics import Statistics
from diffjax.files import Blocks, file_sha256, read_npz, read_protocol, write_npz, write_protocol

WIDTHS = {2048: "pool3", 2023: "spatial", 1024: "dinov2"}  # of the features that files of others hold
ARRAYS = {"pool3": ("mu", "sigma"), "spatial": ("mu_s", "sigma_s")}  # of others: mu_KIND, sigma_KIND
OF_EDM2 = {"fid": "pool3", "fd_dinov2": "dinov2"}
MADE = "protocol"  # array: the json beside the file, as bytes
NETWORK = ("features", "features_sha256", "resize")  # what a json says of a network
TOLERANCE = 1e-6  # of the symmetry of a covariance, relative to its largest entry
VALID = (
    "npz with mu and sigma, or images arr_0, or feats; .pkl of EDM2; .pt of torch-fidelity; folder or archive of images"
)


@dataclass(frozen=True)
class Moments:
    """Of the features of one kind."""

    mean: np.ndarray  # float64 [d]
    covariance: np.ndarray  # float64 [d, d], symmetric


@dataclass(frozen=True)
class Reference:
    name: str  # of the file
    sha256: str  # of the file; of image files and records that of their set
    count: int | None  # images that the statistics or features are of; None: the file does not say
    moments: dict[str, Moments] = field(repr=False)  # by kind of feature: pool3, spatial, dinov2, ...
    features: dict[str, np.ndarray] = field(repr=False)  # by kind of feature, [n, d], where the file holds them
    images: ImageSet | None = field(repr=False)  # some images of the set, or all where there are no statistics
    network: dict[str, str] | None  # features, features_sha256, resize; None: the file does not say
    layout: str  # see above
    made: dict[str, Any] = field(repr=False)  # the json of a file of this package; {} otherwise


def read(path: Path) -> Reference:
    """The reference in a file of any of the layouts above, or the images of a folder or archive.

    UserError, naming file and array, for what is missing, damaged or of another layout, and for statistics that are
    none: sizes that do not fit or that no network here has, values that are not finite, a covariance that is not
    symmetric or has a negative variance.
    """
    if path.is_file() and path.suffix.lower() in (".pkl", ".pt", ".pth"):
        return _edm2(path) if path.suffix.lower() == ".pkl" else _torch_fidelity(path)
    if path.is_file() and path.suffix.lower() == ".npz":
        return _npz(path)
    if not path.exists():
        raise UserError(f"{path}: no such reference; valid: {VALID}")
    return of_images(open_image_set(path))


def of_images(images: ImageSet) -> Reference:
    """A reference that is a set of images: its statistics are those of all of them."""
    sha256 = images.fingerprint["sha256"]
    return Reference(images.name, sha256, images.count, {}, {}, images, None, "images", {})


def write(
    path: Path,
    statistics: Mapping[str, Statistics],
    made: Mapping[str, Any],
    images: Blocks | None = None,
    labels: np.ndarray | None = None,
) -> None:
    """Write a reference: `path`, .npz, and beside it the .json that says what it is.

    Args:
        statistics: of all images, by kind of feature.
        made: json-able; "count", "network" with the entries of NETWORK, and what else is known of the data.
        images: uint8 [n, h, w, 3], some of them.
        labels: integers [n], of these.
    """
    arrays: dict[str, np.ndarray | Blocks] = {}
    if images:
        arrays["arr_0"] = images
    if labels is not None:
        arrays["arr_1"] = labels.astype(np.int32)
    for kind, found in statistics.items():
        mean, covariance = ARRAYS.get(kind, (f"mu_{kind}", f"sigma_{kind}"))
        arrays |= {mean: found.mean, covariance: found.covariance}
    # Also where the json beside is left behind; without the version of the code, so that equal statistics are equal.
    kept = {name: value for name, value in made.items() if name != "code_version"}
    arrays[MADE] = np.frombuffer(json.dumps(kept).encode(), np.uint8)
    write_npz(path, arrays)
    write_protocol(path, made)


def _npz(path: Path) -> Reference:
    with reading(path), zipfile.ZipFile(path) as archive:
        names = [name.removesuffix(".npy") for name in archive.namelist()]
    images = open_image_set(path) if "arr_0" in names else None
    sha256 = images.fingerprint["sha256"] if images else file_sha256(path)
    made = images.made if images else read_protocol(path, sha256)
    made = made if "network" in made else _inside(path) if MADE in names else {}  # else the json of samples
    network = _network(path, made) if made else None
    means = [name for name in names if name == "mu" or name.startswith("mu_")]
    if not means and "feats" in names:
        features = _features(path, "feats", read_npz(path, ("feats",))["feats"])
        return Reference(path.name, sha256, len(features), {}, {"pool3": features}, images, None, "clean-fid", {})
    if not means and images and not made:
        return of_images(images)
    if not means:
        raise UserError(f"{path} is no reference: it holds {', '.join(names[:5]) or 'nothing'}; valid: {VALID}")
    moments = dict(_moments_of_npz(path, name, own=bool(made)) for name in means)
    layout = "adm" if images or "mu_s" in means else "pytorch-fid"
    if made or set(means) - {"mu", "mu_s"}:
        layout = "diffjax"
    return Reference(path.name, sha256, made.get("count"), moments, {}, images, network, layout, made)


def _inside(path: Path) -> dict[str, Any]:
    """What a reference says of itself inside."""
    try:
        made = json.loads(read_npz(path, (MADE,))[MADE].tobytes())
    except ValueError as error:
        raise UserError(f"{path}: {MADE} is not json ({error})") from error
    return made if isinstance(made, dict) and "network" in made else {}


def _moments_of_npz(path: Path, mean: str, own: bool) -> tuple[str, Moments]:
    """(kind of feature, moments), from the name of the array of the mean. own: the kind is certain."""
    covariance = mean.replace("mu", "sigma", 1)
    stored = read_npz(path, (mean, covariance), "a reference")
    found = _moments(path, {mean: stored[mean], covariance: stored[covariance]})
    kind = {"mu": "pool3", "mu_s": "spatial"}.get(mean, mean.removeprefix("mu_"))
    if not own and mean in ("mu", "mu_s"):
        kind = _kind(path, mean, len(found.mean), ("pool3", "dinov2") if mean == "mu" else ("spatial",))
    return kind, found


def _network(path: Path, made: Mapping[str, Any]) -> dict[str, str]:
    """The network of a file of this package, from the json beside it."""
    network, count = made["network"], made.get("count")
    stated = isinstance(network, dict) and all(isinstance(network.get(name), str) for name in NETWORK)
    if not stated or type(count) is not int or count < 2:
        raise UserError(f"{path.with_suffix('.json')} does not say what {path.name} is of; make the reference again")
    return {name: network[name] for name in NETWORK}


def _edm2(path: Path) -> Reference:
    found = numpy_pickle.load(path.read_bytes(), str(path))
    held = found if isinstance(found, dict) else {}
    metrics = [name for name in OF_EDM2 if isinstance(held.get(name), dict)]
    if not metrics:
        raise UserError(f"{path} is no reference of EDM2: a dict with {' or '.join(OF_EDM2)}")
    moments = {}
    for name in metrics:
        arrays = {f"{name}.{each}": held[name].get(each) for each in ("mu", "sigma")}
        of_metric = _moments(path, arrays)
        moments[_kind(path, f"{name}.mu", len(of_metric.mean), (OF_EDM2[name],))] = of_metric
    count = held.get("num_images")
    if count is not None and not (isinstance(count, int | np.integer) and count > 1):
        raise UserError(f"{path}: num_images is {str(count)[:40]}; valid: a number from 2 on")
    count = None if count is None else int(count)
    return Reference(path.name, file_sha256(path), count, moments, {}, None, None, "edm2", {})


def _torch_fidelity(path: Path) -> Reference:
    found = numpy_pickle.plain(torch_file.read(path, numpy_pickle.names()))
    moments, features, count = {}, {}, None
    if isinstance(found, dict):
        if not {"mu", "sigma"} <= found.keys():
            raise UserError(f"{path} is no file of torch-fidelity: a dict with mu and sigma, or features")
        of_file = _moments(path, {name: found[name] for name in ("mu", "sigma")})
        moments[_kind(path, "mu", len(of_file.mean), ("pool3",))] = of_file
    else:
        features["pool3"] = _features(path, "the tensor", found)
        count = len(features["pool3"])
    return Reference(path.name, file_sha256(path), count, moments, features, None, None, "torch-fidelity", {})


def _kind(path: Path, name: str, width: int, valid: tuple[str, ...]) -> str:
    """The kind of the features whose mean `name` has so many numbers. UserError where it is none of the valid ones."""
    kind = WIDTHS.get(width)
    if kind not in valid:
        widths = " or ".join(f"{width} ({kind})" for width, kind in WIDTHS.items() if kind in valid)
        raise UserError(
            f"{path}: {name} has {width} numbers; valid: {widths}; `reference` makes files of other features"
        )
    return kind


def _features(path: Path, name: str, array: Any) -> np.ndarray:
    """Features float32 [n, 2048] of Inception, of a file of others."""
    if not isinstance(array, np.ndarray) or array.ndim != 2 or array.dtype.kind != "f" or len(array) < 2:
        raise UserError(f"{path}: {name} is {_described(array)}; valid: floats [n, 2048]")
    _kind(path, f"a row of {name}", array.shape[1], ("pool3",))
    if not np.isfinite(array).all():
        raise UserError(f"{path}: {name} is not finite; make it again")
    return np.asarray(array, np.float32)


def _moments(path: Path, arrays: Mapping[str, Any]) -> Moments:
    """The checked moments of {name of the mean: array, name of the covariance: array}."""
    for name, array in arrays.items():
        if not isinstance(array, np.ndarray) or array.dtype.kind not in "fiu" or not array.size:
            raise UserError(f"{path}: {name} is {_described(array)}; valid: numbers")
        if not np.isfinite(array).all():
            raise UserError(f"{path}: {name} is not finite; make the reference again")
    (mean_name, mean), (name, covariance) = ((name, np.asarray(each, np.float64)) for name, each in arrays.items())
    if mean.ndim != 1 or covariance.shape != (len(mean), len(mean)):
        shapes = f"{mean_name} is {list(mean.shape)} and {name} {list(covariance.shape)}"
        raise UserError(f"{path}: {shapes}; valid: [d] and [d, d]")
    difference = np.abs(covariance - covariance.T).max()
    if difference > TOLERANCE * np.abs(covariance).max():
        raise UserError(f"{path}: {name} is not symmetric, entries differ by {difference:.3g}; no covariance is that")
    if (lowest := covariance.diagonal().min()) < 0:
        raise UserError(f"{path}: {name} has a negative variance, {lowest:.3g}; no covariance has that")
    return Moments(mean, (covariance + covariance.T) / 2)


def _described(value: Any) -> str:
    return f"{value.dtype} {list(value.shape)}" if isinstance(value, np.ndarray) else type(value).__name__
