"""Compute the statistics that generated images are scored against, of a data set: a reference file.

python -m diffjax reference --data=data/imagenet256 --out=imagenet256.npz
python -m diffjax reference --data=pictures.zip --features=lite0 --out=pictures.npz
python -m diffjax reference --data=digits --split=test --features=lite0 --out=digits.npz

The data are a folder that `prepare` wrote, a folder, .zip or .tar of image files of one size, an .npz or .npy of
images, or an embedded set (digits, emoji32). The images are taken as they are: prepare them by the rule that the
published numbers had. OUT holds mean and covariance of the features of all of them, under the names that
guided-diffusion gave those of Inception, and some of the images, evenly spaced, for precision and recall. The json
beside it says what it is. The weights of Inception come from `python -m diffjax fetch pt_inception-2015-12-05`, or are
given as --weights. A finished file is left as it is; one of another request is replaced with --overwrite alone.
"""

from pathlib import Path
from typing import Any

import numpy as np
from absl import flags
from tqdm import tqdm

from diffjax.commands import define_overwrite, define_path, make_folder
from diffjax.commands.sample import is_finished
from diffjax.data import image_sets
from diffjax.data.image_sets import ImageSet
from diffjax.errors import UserError
from diffjax.evaluation import networks, protocol, references, statistics
from diffjax.evaluation.networks import NETWORKS, RESIZES, Network
from diffjax.evaluation.statistics import Statistics
from diffjax.files import NO_LABELS, Blocks, local_path
from diffjax.parallel import hosts

REQUIRED = ("data", "out")
KEPT = "image floor(i n / count) of the n images, i = 0, ..., count - 1"  # classes lie one after the other


def define_flags(values: flags.FlagValues) -> None:
    embedded = ", ".join(image_sets.EMBEDDED)
    data = f"records, a folder, .zip or .tar of images, an .npz or .npy of images, or {embedded}"
    flags.DEFINE_string("data", None, data, flag_values=values)
    flags.DEFINE_string("split", "train", f"of {embedded}: train or test", flag_values=values)
    networks_of_files = [name for name in NETWORKS if name != "pixels"]
    flags.DEFINE_enum("features", "inception", networks_of_files, "network whose features they are", flag_values=values)
    define_path("weights", None, "weights of the network, instead of the fetched ones", values)
    flags.DEFINE_enum(
        "resize", None, list(RESIZES), "how it gets its images; its own rule by default", flag_values=values
    )
    count = "how many images the file holds; 0: statistics alone"
    flags.DEFINE_integer("images", 10_000, count, lower_bound=0, flag_values=values)
    define_path("out", None, "reference file, .npz", values)
    define_overwrite(values)


def run(values: flags.FlagValues, overrides: list[str]) -> None:
    out, data = values.out, values.data
    if out.suffix != ".npz" or out.is_dir():
        raise UserError(f"--out={out}: give a file that ends in .npz")
    if data not in image_sets.EMBEDDED:
        if values["split"].present:
            raise UserError(f"reference: --split is of {', '.join(image_sets.EMBEDDED)}; --data={data} is read whole")
        if out.exists() and local_path(data).exists() and out.samefile(local_path(data)):
            raise UserError(f"--out={out} is --data; choose another file")
    hosts.start("off")
    network = networks.load(values.features, values.weights, values.resize or "")
    print(f"reading {data}", flush=True)
    images = image_sets.find(data, values.split)
    count = min(values.images, images.count)
    kept = np.arange(count) * images.count // max(count, 1)
    made = describe(images, network, len(kept))
    make_folder(out)
    if not values.overwrite and is_finished(out, made):
        print(f"{out} is finished: {images.count:,} images of {images.name}; --overwrite makes it again")
        return
    write(out, images, measure(images, network), made, kept)
    what = f"{' and '.join(network.moments)} ({network.name}) of {images.count:,} images of {images.name}"
    print(f"wrote {what}{f' and {len(kept):,} of them' if len(kept) else ''} to {out}")


def describe(images: ImageSet, network: Network, kept: int) -> dict[str, Any]:
    """What a reference is, json-able. kept: how many images it holds."""
    prepared = {name: images.fingerprint[name] for name in ("rule", "decode") if name in images.fingerprint}
    return {
        "network": {"name": network.name, **network.identity()},
        "count": images.count,
        "size": list(images.shape[:2]),
        "data": {"name": images.name, **images.fingerprint},
        "preparation": prepared or "as they were",
        "labels": NO_LABELS if images.labels is None else "those of the data",
        "images": {"count": kept, "which": KEPT},
        "code_version": protocol.code_version(),
    }


def measure(images: ImageSet, network: Network) -> dict[str, Statistics]:
    """Statistics of the features of all images, by kind. UserError for features that are not finite."""
    found: dict[str, Statistics] = {}
    compute, first = network.loaded(), 0
    with tqdm(total=images.count, unit="image", disable=None) as bar:
        for block in images.blocks():
            features = compute(block)
            for kind in network.moments:
                finite = np.isfinite(features[kind]).all(axis=1)
                if not finite.all():
                    bad = f"image {first + int(np.argmin(finite))} of {images.name}"
                    raise UserError(f"{kind} of {bad} is not finite; the network or its weights are not")
                part = statistics.of(features[kind])
                found[kind] = statistics.merge(found[kind], part) if kind in found else part
            bar.update(len(block))
            first += len(block)
    return found


def write(out: Path, images: ImageSet, found: dict[str, Statistics], made: dict[str, Any], kept: np.ndarray) -> None:
    """Write statistics of all images, and the images of the numbers `kept`."""
    blocks = Blocks((len(kept), *images.shape), np.dtype(np.uint8), images.blocks(kept)) if len(kept) else None
    labels = images.labels[kept] if len(kept) and images.labels is not None else None
    references.write(out, found, made, blocks, labels)
