"""Features of samples by number: each process computes those of the samples that it draws.

On disk, one row per sample in a folder of parts (see parts.py), so that a killed command goes on where it was; or in
memory, for what is scored at once.
"""

from collections.abc import Collection, Iterable, Iterator, Mapping

import jax
import numpy as np
from jax.experimental import multihost_utils

from diffjax.errors import UserError
from diffjax.evaluation.networks import Features, Network
from diffjax.evaluation.pixels import to_rgb
from diffjax.parallel import hosts
from diffjax.sampling import samples
from diffjax.sampling.parts import Parts

Drawn = Iterable[tuple[np.ndarray, np.ndarray]]  # (numbers [n], samples float32 or images uint8 [n, h, w, c])


def joined(features: Features) -> np.ndarray:
    """Features of all kinds side by side, one row an image."""
    return np.concatenate(list(features.values()), axis=1)


def parted(rows: np.ndarray, widths: Mapping[str, int]) -> Features:
    """The kinds of features that `joined` put side by side; a width of 0 is all of the row."""
    bounds = np.cumsum([width or rows.shape[1] for width in widths.values()])[:-1]
    return dict(zip(widths, np.split(rows, bounds, axis=1)))


def write(
    drawn: Drawn, network: Network, file: Parts, missing: np.ndarray, images: Parts | None = None
) -> Iterator[int]:
    """Write the features of what is drawn, batch by batch; yields how many images each batch has.

    drawn: this process's part. missing: the numbers whose features `file` lacks; what is drawn may hold more of them,
    where `images` lacks those. images: where the images themselves are kept, too.

    Raises:
        UserError: samples that are not finite, or files that cannot be written: at once, or of several processes after
            the last batch, since the others wait for this one's part of it.
    """
    compute = network.loaded()
    lacks = np.zeros(file.num, bool)
    lacks[missing] = True
    refused: UserError | None = None
    for numbers, values in drawn:
        try:
            pictures = as_pictures(values, numbers)
            if images:  # first: with its features an image counts as done
                images.write(numbers, pictures)
            needed = lacks[numbers]
            if needed.any():
                file.write(numbers[needed], joined(compute(pictures[needed])))
        except UserError as error:
            if jax.process_count() == 1:
                raise
            refused = refused or error
        else:
            yield len(numbers)
    if refused:
        raise refused


def read(file: Parts, network: Network) -> Features:
    """All features of a complete folder, in the order of the numbers."""
    return parted(np.concatenate(list(file.rows())), network.kinds)


def collect(drawn: Drawn, network: Network, num: int, kinds: Collection[str] = ()) -> Features | int:
    """Features of samples 0, ..., num - 1 on every process, of what each of them drew; all of them call it.

    kinds: those that are wanted; none: all. Where samples are not finite: how many of them.
    """
    widths = {kind: width for kind, width in network.kinds.items() if not kinds or kind in kinds}
    with hosts.together():  # images may be read here, and one of them be damaged
        numbers, rows, bad = _computed(drawn, network, widths)
    gathered = _gathered(numbers, rows, num, bad)
    return gathered if isinstance(gathered, int) else parted(gathered, widths)


def _computed(drawn: Drawn, network: Network, kinds: Collection[str]) -> tuple[np.ndarray, np.ndarray, int]:
    """Numbers and `joined` features of what is drawn, as far as all is finite; and how many samples are not."""
    compute = network.loaded()
    found: list[tuple[np.ndarray, np.ndarray]] = []
    bad = 0
    for numbers, values in drawn:
        bad += int(np.sum(~np.isfinite(values.reshape(len(values), -1)).all(axis=1))) if len(values) else 0
        if len(values) and not bad:
            features = compute(as_pictures(values, numbers))
            found.append((numbers, joined({kind: features[kind] for kind in kinds})))
    numbers = np.concatenate([numbers for numbers, _ in found]) if found else np.zeros(0, np.int64)
    rows = np.concatenate([rows for _, rows in found]) if found else np.zeros((0, 0), np.float32)
    return numbers, rows, bad


def as_pictures(values: np.ndarray, numbers: np.ndarray) -> np.ndarray:
    """Samples float32 in [-1, 1], or images uint8 -> uint8 [n, h, w, 3]. NotFiniteError for values that are not."""
    if values.dtype == np.uint8:
        return to_rgb(values)
    samples.check_finite(values, numbers)
    return to_rgb(samples.to_uint8(values))


def _gathered(numbers: np.ndarray, rows: np.ndarray, num: int, bad: int) -> np.ndarray | int:
    """The rows of all processes in the order of their numbers, or how many samples are bad."""
    if jax.process_count() > 1:
        sizes = np.array([len(numbers), rows.shape[1], bad], np.int32)
        most, width, _ = (sizes_of_all := multihost_utils.process_allgather(sizes)).max(axis=0)
        bad = int(sizes_of_all[:, 2].sum())
    if bad:
        return bad
    if jax.process_count() > 1:
        padded = np.full(most, -1, np.int32), np.zeros((most, width), np.float32)
        if len(numbers):  # a process without samples does not know the width
            padded[0][: len(numbers)], padded[1][: len(numbers)] = numbers, rows
        numbers, rows = (np.concatenate(each) for each in multihost_utils.process_allgather(padded))
        numbers, rows = numbers[numbers >= 0], rows[numbers >= 0]
    if len(numbers) != num:
        raise ValueError(f"{len(numbers)} features of {num} samples")
    return rows[np.argsort(numbers)]
