"""Balls around features: the estimate of a manifold behind precision, recall, density and coverage.

A set is taken as the union of balls around its features, each reaching to the k-th nearest other one (Kynkaanniemi et
al. 2019, equation 1). Distances are squared throughout, and computed in blocks as |u|^2 - 2 u.v + |v|^2. Where that is
too inexact to tell on which side of a ball's surface a point lies, the pair is computed again as |u - v|^2, which
depends on the two vectors alone: duplicates are at distance 0, and the result does not depend on the blocks.
"""

import math
from collections.abc import Iterator
from typing import NamedTuple

import numpy as np

from diffjax.errors import UserError

BLOCK = 2500  # rows and columns: 50 MB in float64
EPSILON = np.finfo(np.float64).eps


class Membership(NamedTuple):
    """Which points lie in which balls, of generated images [n] and reference images [m]."""

    generated: np.ndarray  # int64 [n]: how many balls of the reference hold each generated image
    reference: np.ndarray  # int64 [m]: how many balls of generated images hold each reference image
    covered: np.ndarray  # int64 [m]: how many generated images each ball of the reference holds


def squared_radii(features: np.ndarray, k: int, block: int = BLOCK, adm_fp16: bool = False) -> np.ndarray:
    """[n]: squared distance of each of the features [n, d] to its k-th nearest other one."""
    if len(features) <= k:
        raise UserError(f"{len(features)} images have no {k}-th nearest other image; at least {k + 1} are needed")
    found = []
    for rows in _slices(len(features), block):
        u = features[rows]
        distances: np.ndarray = np.empty((len(u), 0))
        indices: np.ndarray = np.empty((len(u), 0), np.int64)
        for columns in _slices(len(features), block):
            here = np.broadcast_to(np.arange(columns.start, columns.stop), (len(u), columns.stop - columns.start))
            distances = np.concatenate([distances, _squared(u, features[columns], adm_fp16)], axis=1)
            indices = np.concatenate([indices, here], axis=1)
            if distances.shape[1] > k + 1:  # the image itself is among the k + 1
                nearest = np.argpartition(distances, k, axis=1)[:, : k + 1]
                distances = np.take_along_axis(distances, nearest, axis=1)
                indices = np.take_along_axis(indices, nearest, axis=1)
        if not adm_fp16:
            distances = np.stack([_directly(u, features[column]) for column in indices.T], axis=1)
        found.append(distances.max(axis=1))
    return np.concatenate(found)


def membership(
    features: np.ndarray,
    reference: np.ndarray,
    radii: np.ndarray | None,
    reference_radii: np.ndarray,
    *,
    strict: bool = False,
    block: int = BLOCK,
    adm_fp16: bool = False,
) -> Membership:
    """Who lies in whose balls.

    Args:
        features: [n, d] of generated images, radii [n] of their balls, squared; None leaves these balls out (zeros).
        reference: [m, d] of reference images, reference_radii [m] of their balls, squared.
        strict: points on the surface are outside.
    """
    found = Membership(*(np.zeros(n, np.int64) for n in (len(features), len(reference), len(reference))))
    for rows in _slices(len(reference), block):
        u = reference[rows]
        for columns in _slices(len(features), block):
            v = features[columns]
            distances = _squared(u, v, adm_fp16)
            tolerance = 0.0 if adm_fp16 else _tolerance(u, v)
            inside = _inside(u, v, distances, reference_radii[rows, None], tolerance, strict)
            found.generated[columns] += inside.sum(axis=0)
            found.covered[rows] += inside.sum(axis=1)
            if radii is not None:
                found.reference[rows] += _inside(u, v, distances, radii[columns], tolerance, strict).sum(axis=1)
    return found


def _inside(
    u: np.ndarray,
    v: np.ndarray,
    distances: np.ndarray,
    limits: np.ndarray,
    tolerance: np.ndarray | float,
    strict: bool,
    at_once: int = 4096,
) -> np.ndarray:
    """bool [n, m]: distances [n, m] of u and v against the limits, computed directly within the tolerance of them."""
    compare = np.less if strict else np.less_equal
    inside = compare(distances, limits)
    if isinstance(tolerance, np.ndarray):
        i, j = np.nonzero(np.abs(distances - limits) <= tolerance)
        limits = np.broadcast_to(limits, distances.shape)
        for part in _slices(len(i), at_once):
            pair = i[part], j[part]
            inside[pair] = compare(_directly(u[pair[0]], v[pair[1]]), limits[pair])
    return inside


def _directly(u: np.ndarray, v: np.ndarray) -> np.ndarray:
    """[n]: squared distances of the rows of u from those of v."""
    return np.square(u.astype(np.float64) - v.astype(np.float64)).sum(axis=1)


def _squared(u: np.ndarray, v: np.ndarray, adm_fp16: bool) -> np.ndarray:
    """[n, m]: squared distances of the rows of u from those of v."""
    if not adm_fp16:
        return _expanded(u.astype(np.float64), v.astype(np.float64))
    with np.errstate(over="ignore", invalid="ignore"):
        distances = _expanded(u.astype(np.float16), v.astype(np.float16))
    if not np.isfinite(distances).all():
        distances = _expanded(u.astype(np.float32), v.astype(np.float32))
    return distances.astype(np.float32)


def _expanded(u: np.ndarray, v: np.ndarray) -> np.ndarray:
    """|u|^2 - 2 u.v + |v|^2 in the dtype of u and v, none negative; matrix products of float16 add up in float32."""
    if u.dtype == np.float16:
        products = (u.astype(np.float32) @ v.astype(np.float32).T).astype(np.float16)
        norms = [_sum_of_halves(np.square(array)) for array in (u, v)]
    else:
        products = u @ v.T
        norms = [np.square(array).sum(axis=1) for array in (u, v)]
    return np.maximum(norms[0][:, None] - 2 * products + norms[1], 0)


def _tolerance(u: np.ndarray, v: np.ndarray) -> np.ndarray:
    """[n, m]: a bound on the rounding errors of `_expanded` in float64."""
    norms = [np.square(array.astype(np.float64)).sum(axis=1) for array in (u, v)]
    return 4 * u.shape[1] * EPSILON * (norms[0][:, None] + norms[1])


def _sum_of_halves(x: np.ndarray, lanes: int = 8, unrolled: int = 4, longest: int = 1600) -> np.ndarray:
    """float16 [n]: the sums of rows of float16 [n, d] in the order of TensorFlow on CPU.

    Columns are added up into 4 vectors of 8, these into one, and that one in float32; long rows are halved before.
    """
    d = x.shape[1]
    if d > longest:
        middle = math.ceil(math.ceil(d / 2) / lanes) * lanes
        return _sum_of_halves(x[:, :middle]) + _sum_of_halves(x[:, middle:])
    x = np.pad(x, ((0, 0), (0, -d % (lanes * unrolled)))).reshape(len(x), -1, unrolled, lanes)
    for axis_length in (x.shape[1], unrolled):
        total = np.zeros_like(x[:, 0])
        for i in range(axis_length):
            total = total + x[:, i]
        x = total
    return x.astype(np.float32).sum(axis=1).astype(np.float16)


def _slices(count: int, size: int) -> Iterator[slice]:
    for start in range(0, count, size):
        yield slice(start, min(start + size, count))
