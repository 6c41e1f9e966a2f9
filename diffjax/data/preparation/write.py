"""Records of the originals of a data set: `OUT/images-*.array_record`, and `OUT/images.json`, written last.

Whole shards stay when the program ends early; the same request makes the others, and the same bytes in the end.
"""

import io
import logging
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import PIL
from PIL import Image
from tqdm import tqdm

from diffjax.data import image_records, shards
from diffjax.data.images import refusing
from diffjax.data.preparation.datasets import Dataset
from diffjax.data.preparation.originals import Originals
from diffjax.data.transforms import DECODERS, RULES
from diffjax.errors import UserError
from diffjax.files import only_writer

REQUEST = "prepare.json"  # what is being made, while it is
AHEAD = 4  # images per thread that are read before they are written
LARGEST = 178_956_970  # pixels that a rule may make of an image before it crops: Pillow's limit of what it opens


@dataclass(frozen=True)
class Request:
    """What records are made of.

    Attributes:
        partial: whether other numbers of images and classes than the published ones are taken.
    """

    dataset: str
    split: str
    size: int
    rule: str
    decode: str
    partial: bool


def prepare(asked: Request, dataset: Dataset, originals: Originals, out: Path, threads: int) -> dict[str, Any]:
    """The manifest of the records of all originals, in the folder `out`; shards that are there already stay."""
    check(asked, dataset, originals)
    stated = {
        **asdict(asked),
        "pillow": PIL.__version__,  # other versions of it may decode jpeg and write png otherwise
        "source": {
            "files": originals.files,
            "not_as_published": changed(dataset, originals),
            "index_sha256": originals.index_sha256,
        },
    }
    size = image_records.shard_size(asked.size)
    shards.make_folder(out, image_records.MANIFEST)
    with only_writer(out):
        layout = {"version": image_records.VERSION, "shard_size": size}
        shards.agree(out, REQUEST, stated | layout, image_records.NAME)
        _write(asked, dataset, originals, out, size, threads)
        stated |= {"terms": dataset.terms, "use": dataset.use}
        manifest = image_records.finish(out, len(originals), asked.size, originals.classes, stated)
        (out / REQUEST).unlink()
    return manifest


def check(asked: Request, dataset: Dataset, originals: Originals) -> None:
    """UserError for other numbers of images and classes than the published ones, unless they are asked for."""
    log = logging.getLogger("diffjax")
    found, expected = len(originals), dataset.counts.get(asked.split, 0)
    if not found:
        raise UserError(f"{asked.dataset}: no images; --from is {dataset.layout}")
    present = len(np.unique(originals.labels))
    named = f"{asked.dataset}, {asked.split}: {found:,} images"
    if not asked.partial:
        if expected and found != expected:
            raise UserError(f"{named}, published are {expected:,}; --partial prepares them nevertheless")
        if dataset.classes and present != dataset.classes:
            raise UserError(
                f"{named} of {present:,} classes, published are {dataset.classes:,}; --partial prepares them "
                "nevertheless"
            )
    classes = f" of {present:,} of {len(originals.classes):,} classes" if originals.classes else ""
    log.info(f"{named}{classes}{'; their number is not checked' if dataset.counts and not expected else ''}")
    if originals.note:
        log.info(originals.note)
    for name in changed(dataset, originals):
        log.info(f"{name} is not the published file, by its size or hash")


def changed(dataset: Dataset, originals: Originals) -> list[str]:
    """The names of the originals that are not the published files."""
    published = {file.name: file for file in dataset.files}

    def differs(found: dict[str, Any]) -> bool:
        file = published[found["name"]]
        pairs = ((found.get(field), getattr(file, field)) for field in ("bytes", "sha256", "md5"))
        return any(have is not None and want and have != want for have, want in pairs)

    return [found["name"] for found in originals.files if found["name"] in published and differs(found)]


def _write(asked: Request, dataset: Dataset, originals: Originals, out: Path, size: int, threads: int) -> None:
    """The shards that are missing."""
    count = len(originals)
    jobs = shards.missing(out, image_records.NAME, count, size)
    left = sum(len(numbers) for _, numbers in jobs)
    with (
        ThreadPoolExecutor(threads) as pool,
        tqdm(total=count, initial=count - left, unit="image", disable=None) as bar,
    ):

        def made(number: int) -> bytes:
            return record(asked, dataset, originals, number)

        for path, numbers in jobs:
            shards.write_shard(path, _counted(in_turn(pool, made, numbers, threads * AHEAD), bar))


def _counted(records: Iterable[bytes], bar: tqdm) -> Iterator[bytes]:
    for each in records:
        yield each
        bar.update()


def in_turn(
    pool: ThreadPoolExecutor, function: Callable[[int], bytes], numbers: Iterable[int], ahead: int
) -> Iterator[bytes]:
    """function(number) of every number in turn, `ahead` of them under way at a time."""
    waiting: deque[Future[bytes]] = deque()
    try:
        for number in numbers:
            waiting.append(pool.submit(function, number))
            if len(waiting) > ahead:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()
    finally:
        for future in waiting:
            future.cancel()


def record(asked: Request, dataset: Dataset, originals: Originals, number: int) -> bytes:
    """The record of one original. UserError, which names it, where it is damaged or is no original of the data set."""
    found, name = originals.load(number), originals.names[number]
    if isinstance(found, bytes):
        with refusing(name):
            colours = colours_of(found)
            image = DECODERS[asked.decode](io.BytesIO(found))
    else:
        colours, image = "rgb", Image.fromarray(found)
    if dataset.original and image.size != dataset.original:
        (width, height), (right, high) = image.size, dataset.original
        raise UserError(f"{name} has {width}x{height} pixels; originals of {asked.dataset} have {right}x{high}")
    if asked.size**2 * max(image.size) > LARGEST * min(image.size):
        raise UserError(f"{name} has {image.width}x{image.height} pixels, too narrow for a square of {asked.size}")
    try:
        pixels = RULES[asked.rule](image, asked.size)
    except ValueError as error:
        raise UserError(f"{name}: {error}") from error
    return image_records.encode(pixels, int(originals.labels[number]), colours)


def colours_of(file: bytes) -> str:
    """What the image in a file is converted to rgb from: one of image_records.COLOURS."""
    with Image.open(io.BytesIO(file)) as image:
        if image.has_transparency_data:
            return "alpha"
        named = {"RGB": "rgb", "P": "palette", "CMYK": "cmyk"}
        return "grey" if image.mode in ("1", "L") or image.mode.startswith("I") else named.get(image.mode, "other")
