"""k-means as the published codebooks were made: Lloyd's algorithm with faiss's choices, on any number of devices.

    token(x) = argmin_k |x - c_k|^2 = argmin_k (|c_k|^2 - 2 x . c_k)                                   (1)
    c_k      = mean of the points with token k                                                         (2)

A *fit* keeps 256 points per centroid, drawn without replacement, starts at K of them and makes 20 iterations of (1)
and (2); after each, an empty cluster takes half of another one (`split_empty`). Draws are those of faiss (32-bit
Mersenne Twister; Douze et al., arXiv 2401.08281), so a seed gives its rows and, to rounding, its centroids.

Every device goes through its points in blocks, against blocks of centroids: no points x K matrix exists. The sums of
(2) are sums of integers: a coordinate is rounded to 2^-25 of its largest magnitude and written in three digits of
base 512, and int32 holds the sum of 2^23 digits exactly. So they do not depend on the order, and a fit gives the same
centroids on one device and on many; all that devices exchange is these sums, the counts and the objective.
"""

import functools
import hashlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, PartitionSpec

from diffjax import rng
from diffjax.errors import UserError
from diffjax.parallel import hosts
from diffjax.parallel.mesh import BATCH_AXES, batch_sharding, replicated
from diffjax.parallel.rules import mesh_axes, per_device
from diffjax.tokens.codebooks import Fit, read_state, write_state
from diffjax.tokens.faiss_random import perm, split_empty

POINTS_PER_CENTROID = 256  # a fit uses at most so many
BLOCK = 1024  # points, and centroids, whose scores are in memory at a time
DIGIT, DIGITS = 9, 3  # bits of a digit, digits of a coordinate
MAX_POINTS = 2 ** (32 - DIGIT)  # of more the sum of a digit could leave int32
INITS = ("random", "k-means++")


@dataclass(frozen=True)
class Points:
    """Points on the devices, in blocks; the last blocks are filled up with rows that do not count."""

    blocks: jax.Array  # float32 [blocks, BLOCK, d], the blocks split over the devices
    valid: jax.Array  # bool [blocks, BLOCK]
    scale: np.ndarray  # float32 [d], powers of two: |x scale| < 2^25
    count: int
    mesh: Mesh | None


def assign(features: jax.Array, centroids: jax.Array) -> jax.Array:
    """The index of the nearest centroid (squared L2, float32), the lowest of equally near ones.

    To be called under jit; with a mesh in context every device does its part of the leading axis.

    Args:
        features: [..., n, d] of any float dtype; a point with a NaN gets -1.
        centroids: [k, d].

    Returns:
        int32 [..., n].
    """
    if features.ndim < 2 or centroids.ndim != 2 or features.shape[-1] != centroids.shape[1]:
        raise UserError(
            f"features {features.shape} and centroids {centroids.shape} do not fit; valid: [..., n, d] and [k, d]"
        )

    def local(features: jax.Array, centroids: jax.Array) -> jax.Array:
        points = features.reshape(-1, features.shape[-1])
        n = len(points)
        block = _balanced(n)
        rows = -(-n // block) * block
        blocks = jnp.pad(points, ((0, rows - n), (0, 0))).reshape(-1, block, points.shape[1])
        codebook = _codebook(centroids)
        nearest = jax.lax.map(lambda x: _nearest(x.astype(jnp.float32), codebook)[1], blocks)
        return nearest.reshape(-1)[:n].reshape(features.shape[:-1])

    names = PartitionSpec("batch"), PartitionSpec()
    axes = mesh_axes(batch=features.shape[0])
    return per_device(local, axes, names, PartitionSpec("batch"), whole=False)(features, centroids)


def fit(
    points: np.ndarray,
    k: int,
    *,
    iterations: int = 20,
    seed: int = 1234,
    init: str = "random",
    mesh: Mesh | None = None,
    state: Path | None = None,
    progress: Callable[[int, float], None] | None = None,
) -> Fit:
    """The k centroids of `points`, the same on any mesh.

    Args:
        points: [n, d] of any real dtype, n >= k, the same in every process; can be a memory map. Of more than 256 per
            centroid the rows `perm(n, seed)[:256 k]` are used.
        init: "random", the rows `perm(n, seed + 1)[:k]` of those used, as faiss; or "k-means++".
        mesh: its data and fsdp axes split the points; None: one device.
        state: a file written after every iteration; where it exists the fit resumes from it, bit for bit.
        progress: called with the number of iterations done and the objective of the last.

    Raises:
        UserError: points or settings that cannot be; a state file of another fit.
    """
    points = np.asanyarray(points)
    _check(points, k, iterations, seed, init)
    if len(points) > POINTS_PER_CENTROID * k:
        points = points[sample(len(points), k, seed)]
    points = np.ascontiguousarray(points, np.float32)
    placed = place(points, mesh)
    origin = {"k": k, "seed": seed, "init": init, "shape": list(points.shape)}
    if state is not None:
        origin["points_sha256"] = hashlib.sha256(points.data).hexdigest()
    done = None if state is None else read_state(Path(state), origin, iterations)
    if done is None:
        start = points[perm(len(points), seed + 1, k)] if init == "random" else plus_plus(placed, k, seed)
        done = Fit(start, np.empty(0, np.float32), 0)
    while done.iteration < iterations:
        done = _advance(placed, done, iterations)
        if state is not None and hosts.is_lead():
            write_state(Path(state), origin, done)
        if progress is not None:
            progress(done.iteration, float(done.objectives[-1]))
    return done


def sample(n: int, k: int, seed: int) -> np.ndarray:
    """The rows, of n, that a fit of k centroids uses, in its order: all, or 256 per centroid; int64."""
    return perm(n, seed, POINTS_PER_CENTROID * k) if n > POINTS_PER_CENTROID * k else np.arange(n)


def _advance(points: Points, done: Fit, iterations: int) -> Fit:
    """One iteration more; all that are left where the centroids do not move, since the rest would repeat it."""
    centroids, objective, _ = lloyd_step(points, done.centroids)
    repeats = iterations - done.iteration if np.array_equal(centroids, done.centroids) else 1
    objectives = np.append(done.objectives, np.repeat(np.float32(objective), repeats))
    return Fit(centroids, objectives, done.iteration + repeats)


def lloyd_step(points: Points, centroids: np.ndarray) -> tuple[np.ndarray, float, np.ndarray]:
    """One iteration: (1), (2) and the split of empty clusters.

    Returns:
        The new centroids, float32 [k, d]; the sum of squared distances to the given ones; how many points are nearest
        to each of the given ones, int32 [k].
    """
    program = _accumulate(points.mesh)
    sums, counts, objective = jax.device_get(program(points.blocks, points.valid, centroids, points.scale))
    digits = np.split(sums.astype(np.int64), DIGITS, axis=1)
    totals = sum(digit << DIGIT * i for i, digit in enumerate(digits))
    means = totals / points.scale.astype(np.float64) / np.maximum(counts, 1)[:, None]
    return split_empty(means.astype(np.float32), counts, points.count), float(objective), counts


def place(points: np.ndarray, mesh: Mesh | None = None) -> Points:
    """Points float32 [n, d] on the devices; `UserError` names the first row that is not finite."""
    n, d = points.shape
    largest = np.zeros(d, np.float32)
    for first in range(0, n, BLOCK):
        block = np.abs(points[first : first + BLOCK])
        if not np.isfinite(block.max(axis=0)).all():
            row = first + int(np.flatnonzero(~np.isfinite(block).all(axis=1))[0])
            raise UserError(f"row {row} of the {n} points holds a value that is not finite; k-means needs finite ones")
        largest = np.maximum(largest, block.max(axis=0))
    with np.errstate(over="ignore"):
        if not np.isfinite(4 * np.square(largest).sum()):
            raise UserError(
                f"points hold values up to {np.max(largest):g}; their squared distances leave float32's range"
            )
    bits = DIGIT * DIGITS - 2  # so that the highest digit stays in -128 .. 128
    scale = np.ldexp(np.float32(1), np.minimum(bits - np.frexp(largest)[1], 127)).astype(np.float32)
    shards = 1 if mesh is None else mesh.shape["data"] * mesh.shape["fsdp"]
    number = -(-n // (BLOCK * shards)) * shards
    sharding = None if mesh is None else batch_sharding(mesh)

    def rows(index: tuple[slice, ...]) -> slice:
        first, last, _ = index[0].indices(number)
        return slice(first * BLOCK, last * BLOCK)

    def blocks(index: tuple[slice, ...]) -> np.ndarray:
        wanted = rows(index)
        part = np.zeros((wanted.stop - wanted.start, d), np.float32)
        present = points[wanted]
        part[: len(present)] = present
        return part.reshape(-1, BLOCK, d)

    def valid(index: tuple[slice, ...]) -> np.ndarray:
        wanted = rows(index)
        return (np.arange(wanted.start, wanted.stop) < n).reshape(-1, BLOCK)

    return Points(
        _placed((number, BLOCK, d), sharding, blocks), _placed((number, BLOCK), sharding, valid), scale, n, mesh
    )


def _placed(shape: tuple[int, ...], sharding: Any, part: Callable) -> jax.Array:
    if sharding is None:
        return jnp.asarray(part((slice(None),)))
    return jax.make_array_from_callback(shape, sharding, part)


class _Codebook(NamedTuple):
    """Centroids in blocks; the last is filled up with centroids at infinite distance."""

    minus_twice: jax.Array  # float32 [blocks, block, d], -2 times the centroids
    norms: jax.Array  # float32 [blocks, block], their squared lengths


def _codebook(centroids: jax.Array) -> _Codebook:
    k, d = centroids.shape
    block = _balanced(k)
    number = -(-k // block)
    centroids = jnp.pad(centroids.astype(jnp.float32), ((0, number * block - k), (0, 0)))
    norms = jnp.where(jnp.arange(number * block) < k, jnp.sum(jnp.square(centroids), axis=1), jnp.inf)
    return _Codebook((-2 * centroids).reshape(number, block, d), norms.reshape(number, block))


def _balanced(n: int) -> int:
    """The length of equal blocks of at most BLOCK that cover n."""
    return -(-n // max(-(-n // BLOCK), 1)) or 1


def _nearest(points: jax.Array, codebook: _Codebook) -> tuple[jax.Array, jax.Array]:
    """Lowest score (1), float32 [b], and its index, int32 [b], of points float32 [b, d].

    Minimum, then the first place that has it: for XLA on a CPU two plain reductions are five times as fast as its
    argmin, and those over the leading axis faster than over the last.
    """
    block = codebook.norms.shape[1]
    place = jnp.arange(block, dtype=jnp.int32)[:, None]

    def step(best: tuple[jax.Array, jax.Array], xs: tuple[jax.Array, _Codebook]) -> tuple[tuple, None]:
        first, (minus_twice, norms) = xs
        products = jnp.dot(minus_twice, points.T, precision=jax.lax.Precision.HIGHEST)
        scores = jax.lax.optimization_barrier(norms[:, None] + products)  # computed once, or == could miss the minimum
        lowest = jnp.min(scores, axis=0)
        index = first + jnp.min(jnp.where(scores == lowest, place, block), axis=0)
        better = lowest < best[0]
        return (jnp.where(better, lowest, best[0]), jnp.where(better, index, best[1])), None

    first = block * jnp.arange(len(codebook.norms), dtype=jnp.int32)
    start = jnp.full_like(points[:, 0], jnp.inf), jnp.full_like(points[:, 0], -1, dtype=jnp.int32)
    return jax.lax.scan(step, start, (first, codebook))[0]


@functools.cache
def _accumulate(mesh: Mesh | None) -> Callable:
    """Compiled (blocks, valid, centroids, scale) -> digit sums int32 [k, DIGITS d], counts int32 [k], objective."""

    def local(blocks: jax.Array, valid: jax.Array, centroids: jax.Array, scale: jax.Array) -> Any:
        codebook, k = _codebook(centroids), len(centroids)

        def step(totals: tuple, xs: tuple[jax.Array, jax.Array]) -> tuple[tuple, None]:
            sums, counts, objective = totals
            points, valid = xs
            score, token = _nearest(points, codebook)
            token = jnp.where(valid, token, k)  # past the end, where nothing is added
            distance = jnp.maximum(jnp.sum(jnp.square(points), axis=1) + score, 0)
            sums = sums.at[token].add(_digits(points * scale), mode="drop")
            counts = counts.at[token].add(1, mode="drop")
            return (sums, counts, objective + jnp.sum(jnp.where(valid, distance, 0))), None

        zeros = jnp.zeros((k, DIGITS * blocks.shape[-1]), jnp.int32), jnp.zeros(k, jnp.int32), jnp.float32(0)
        totals = jax.lax.scan(step, zeros, (blocks, valid))[0]
        return totals if mesh is None else jax.lax.psum(totals, BATCH_AXES)

    return _on_devices(local, mesh, split=2, whole=2)


def _digits(x: jax.Array) -> jax.Array:
    """x float32 [b, d], rounded, as digits int32 [b, DIGITS d] of base 512 in -256 .. 255, the lowest first."""
    rest, half = jnp.round(x).astype(jnp.int32), 1 << (DIGIT - 1)
    digits = []
    for _ in range(DIGITS - 1):
        digits.append(((rest + half) & (2 * half - 1)) - half)
        rest = (rest - digits[-1]) >> DIGIT
    return jnp.concatenate([*digits, rest], axis=1)


def plus_plus(points: Points, k: int, seed: int) -> np.ndarray:
    """k of the points, float32 [k, d]: each drawn with a probability in proportion to the squared distance to the
    nearest one drawn before (k-means++, Arthur and Vassilvitskii 2007).

    A draw takes a block of points, then one of its points. Every weight has its own key: the same on any mesh.
    """
    number = np.arange(len(points.valid), dtype=np.int32)
    key = jax.random.key_data(rng.stream(seed, "k-means++"))
    return np.asarray(_draw(points.mesh, k)(points.blocks, points.valid, number, key))


@functools.cache
def _draw(mesh: Mesh | None, k: int) -> Callable:
    """Compiled (blocks, valid, numbers of the blocks, key data) -> drawn points float32 [k, d]."""

    def local(blocks: jax.Array, valid: jax.Array, number: jax.Array, key: jax.Array) -> jax.Array:
        def contest(weights: jax.Array, key: jax.Array) -> jax.Array:
            of_blocks, of_points = (rng.fold_name(key, name) for name in ("blocks", "points"))
            values = _race(jnp.sum(weights, axis=1), rng.per_example(of_blocks, number))
            block = jnp.argmax(values)
            places = jax.random.split(rng.fold(of_points, number[block]), weights.shape[1])
            place = jnp.argmax(_race(weights[block], places))
            return _winner(values[block], number[block], blocks[block, place], mesh)

        def draw(i: jax.Array, carry: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
            chosen, weights = carry
            point = contest(weights, jax.random.fold_in(rng.key_of(key), i))
            distances = jnp.sum(jnp.square(blocks - point), axis=2)
            weights = jnp.where(i == 0, distances, jnp.minimum(weights, distances))
            return chosen.at[i].set(point), jnp.where(valid, weights, 0)

        chosen = jnp.zeros((k, blocks.shape[-1]), jnp.float32)
        return jax.lax.fori_loop(0, k, draw, (chosen, valid.astype(jnp.float32)))[0]

    return _on_devices(local, mesh, split=3, whole=1)


def _race(weights: jax.Array, keys: jax.Array) -> jax.Array:
    """log(weight) + Gumbel noise, [b]: the largest is that of i with a probability in proportion to weights [b]."""
    noise = jax.vmap(lambda key: jax.random.gumbel(key, (), jnp.float32, mode="high"))(keys)
    return jnp.log(weights) + noise


def _winner(value: jax.Array, number: jax.Array, point: jax.Array, mesh: Mesh | None) -> jax.Array:
    """The point of the device with the largest value, of equal ones that with the lowest block number."""
    if mesh is None:
        return point
    first = jnp.where(value == jax.lax.pmax(value, BATCH_AXES), number, jnp.iinfo(jnp.int32).max)
    mine = first == jax.lax.pmin(first, BATCH_AXES)
    return jax.lax.psum(jnp.where(mine & (first == number), point, 0), BATCH_AXES)


def _on_devices(local: Callable, mesh: Mesh | None, split: int, whole: int) -> Callable:
    """`local` compiled; on a mesh every device runs it on its part of the first `split` arguments, the `whole` others
    and the results are the same everywhere."""
    if mesh is None:
        return jax.jit(local)
    specs = (PartitionSpec(BATCH_AXES),) * split + (PartitionSpec(),) * whole
    mapped = jax.shard_map(local, mesh=mesh, in_specs=specs, out_specs=PartitionSpec(), check_vma=False)
    return jax.jit(mapped, out_shardings=replicated(mesh))


def _check(points: np.ndarray, k: int, iterations: int, seed: int, init: str) -> None:
    if points.ndim != 2 or not points.shape[1] or points.dtype.kind not in "fiu":
        raise UserError(f"k-means takes real points [n, d]; found {points.dtype} {points.shape}")
    if k < 1:
        raise UserError(f"k = {k} centroids; valid: 1 or more")
    if len(points) < k:
        raise UserError(f"{len(points)} points cannot have k = {k} centroids; give at least {k} points, or a smaller k")
    if (used := min(len(points), POINTS_PER_CENTROID * k)) > MAX_POINTS:
        raise UserError(f"k = {k} takes {used} points; valid: up to {MAX_POINTS}, so give fewer or a smaller k")
    check_settings(iterations, seed, init)


def check_settings(iterations: int, seed: int, init: str) -> None:
    """Raise UserError for settings that no fit can have."""
    if iterations < 1:
        raise UserError(f"iterations = {iterations}; valid: 1 or more")
    if not 0 <= seed < 2**32 - 1:
        raise UserError(f"seed = {seed}; valid: 0 to {2**32 - 2}")
    if init not in INITS:
        raise UserError(f"init = {init!r} is unknown; valid: {', '.join(INITS)}")
