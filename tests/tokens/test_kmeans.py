import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from diffjax.errors import UserError
from diffjax.parallel.mesh import make_mesh
from diffjax.tokens import codebooks, faiss_random, kmeans
from tests import slow


def mixture(n: int, d: int, clusters: int, seed: int = 0) -> np.ndarray:
    generator = np.random.default_rng(seed)
    centres = 4 * generator.standard_normal((clusters, d))
    return (centres[generator.integers(clusters, size=n)] + generator.standard_normal((n, d))).astype(np.float32)


def distances(x: np.ndarray, centroids: np.ndarray) -> np.ndarray:
    return np.square(x[:, None].astype(np.float64) - centroids).sum(axis=2)


# ---- assignment


@pytest.mark.parametrize("shape, k", [((5, 7, 6), 3), ((2500, 6), 40), ((50, 6), 2500), ((1, 6), 1), ((0, 6), 2)])
def test_assign_finds_the_nearest(shape, k):
    generator = np.random.default_rng(0)
    x, centroids = (generator.standard_normal(s).astype(np.float32) for s in (shape, (k, 6)))
    tokens = jax.jit(kmeans.assign)(x, centroids)
    assert (tokens.shape, tokens.dtype) == (shape[:-1], jnp.int32)
    np.testing.assert_array_equal(tokens, distances(x.reshape(-1, 6), centroids).argmin(axis=1).reshape(shape[:-1]))


def test_of_equal_centroids_the_first_is_taken_also_in_another_block():
    generator = np.random.default_rng(0)
    centroids = generator.standard_normal((1500, 4)).astype(np.float32)
    twice = np.concatenate([centroids, centroids, centroids])
    np.testing.assert_array_equal(kmeans.assign(centroids, twice), np.arange(1500))


def test_a_point_with_a_nan_gets_no_token():
    x = np.float32([[0, 1], [np.nan, 1]])
    assert kmeans.assign(x, x[:1]).tolist() == [0, -1]


def test_assign_is_float32_for_narrow_features():
    generator = np.random.default_rng(0)
    x = (40 + generator.standard_normal((200, 64))).astype(jnp.bfloat16)
    centroids = (40 + generator.standard_normal((30, 64))).astype(np.float32)
    expected = distances(x.astype(np.float32), centroids).argmin(axis=1)
    np.testing.assert_array_equal(kmeans.assign(x, centroids), expected)


@pytest.mark.parametrize("shapes", [((5, 4), (3, 5)), ((4,), (3, 4)), ((5, 4), (4,))])
def test_assign_refuses_other_shapes(shapes):
    with pytest.raises(UserError, match=re.escape(f"features {shapes[0]} and centroids {shapes[1]} do not fit")):
        kmeans.assign(*map(np.zeros, shapes))


def test_assign_on_a_mesh_divides_the_batch_and_moves_nothing():
    x = np.random.default_rng(0).standard_normal((16, 9, 6)).astype(np.float32)
    centroids = x[:, 0]
    with jax.set_mesh(make_mesh({"data": 4, "fsdp": 2})):
        split = jax.device_put(x, jax.sharding.PartitionSpec(("data", "fsdp")))
        compiled = jax.jit(kmeans.assign).lower(split, centroids).compile()
        tokens = compiled(split, centroids)
    assert not collectives(compiled)
    assert [shard.data.shape for shard in tokens.addressable_shards] == [(2, 9)] * 8
    np.testing.assert_array_equal(tokens, kmeans.assign(x, centroids))


def collectives(compiled) -> list[tuple[str, str]]:
    """(shape, name) of every collective operation."""
    names = "all-reduce|all-gather|all-to-all|collective-permute|reduce-scatter"
    return re.findall(rf"= (\S[^=]*?) ({names})(?:-start)?\(", compiled.as_text())


# ---- one device and eight


@pytest.mark.parametrize("init", kmeans.INITS)
@pytest.mark.parametrize("sizes", slow.but([{"data": 8}], [{"data": 8}, {"data": 2, "fsdp": 2, "tensor": 2}]))
def test_the_fit_is_the_same_on_any_mesh(init, sizes):
    """20,011 points, no multiple of anything: the last blocks are filled up, and one device gets less than others."""
    x = mixture(20_011, 12, 30)
    alone = kmeans.fit(x, 100, iterations=8, init=init)
    together = kmeans.fit(x, 100, iterations=8, init=init, mesh=make_mesh(sizes))
    np.testing.assert_allclose(together.centroids, alone.centroids, rtol=0, atol=1e-5)
    np.testing.assert_allclose(together.objectives, alone.objectives, rtol=1e-5)


def test_sums_do_not_depend_on_the_order_of_the_points():
    """Bit for bit, of points whose float32 sums would differ in the fourth digit."""
    generator = np.random.default_rng(0)
    x = generator.standard_normal((5000, 3)).astype(np.float32) * np.float32([1, 1e-4, 1e4]) + np.float32([1000, 0, 0])
    centroids = x[:2]
    means, _, counts = kmeans.lloyd_step(kmeans.place(x), centroids)
    for shuffled in (x[::-1], generator.permutation(x)):
        again, _, same = kmeans.lloyd_step(kmeans.place(shuffled), centroids)
        np.testing.assert_array_equal(again, means)
        np.testing.assert_array_equal(same, counts)
    tokens = np.asarray(kmeans.assign(x, centroids))
    exact = np.stack([x[tokens == k].astype(np.float64).mean(axis=0) for k in (0, 1)])
    assert np.all(np.abs(means - exact) <= np.abs(x).max(axis=0) * 2.0**-25)


def test_sums_of_a_cluster_that_has_all_points():
    """The largest digits of both signs, as often as in the largest fit: no sum leaves int32."""
    generator, base = np.random.default_rng(0), 2**kmeans.DIGIT
    top = 2 ** (kmeans.DIGIT * kmeans.DIGITS - 2)
    low = -base // 2 * (1 + base)  # both lower digits at their lowest
    x = np.concatenate([generator.integers(-top, top, 10_000), [top, -top, low, -low]]).astype(np.float32)
    digits = np.asarray(kmeans._digits(jnp.asarray(x)[:, None])).astype(np.int64)
    np.testing.assert_array_equal(digits @ base ** np.arange(kmeans.DIGITS), x)
    assert digits.min() == -base // 2
    assert -(2**31) <= digits.min() * kmeans.MAX_POINTS <= digits.max() * kmeans.MAX_POINTS <= 2**31 - 1
    assert np.all(np.abs(kmeans.place(x[:, None]).scale * x) <= top)


def test_devices_exchange_sums_and_counts_alone():
    points = kmeans.place(mixture(3000, 5, 4), make_mesh({"data": 8}))
    program = kmeans._accumulate(points.mesh)
    compiled = program.lower(points.blocks, points.valid, np.zeros((7, 5), np.float32), points.scale).compile()
    moved = collectives(compiled)
    assert {name for _, name in moved} == {"all-reduce"}
    shapes = re.findall(r"\w+\[[\d,]*\]", " ".join(shape for shape, _ in moved))
    assert sorted(shapes) == ["f32[]", "s32[7,15]", "s32[7]"]


def test_memory_does_not_grow_with_points_times_centroids():
    def temporaries(blocks: int, k: int) -> tuple[int, int]:
        points = jax.ShapeDtypeStruct((blocks, kmeans.BLOCK, 8), jnp.float32)
        flat = jax.ShapeDtypeStruct((blocks * kmeans.BLOCK, 8), jnp.float32)
        valid = jax.ShapeDtypeStruct((blocks, kmeans.BLOCK), bool)
        centroids, scale = jax.ShapeDtypeStruct((k, 8), jnp.float32), jax.ShapeDtypeStruct((8,), jnp.float32)
        step = kmeans._accumulate(None).lower(points, valid, centroids, scale)
        tokens = jax.jit(kmeans.assign).lower(flat, centroids)
        return tuple(lowered.compile().memory_analysis().temp_size_in_bytes for lowered in (step, tokens))

    block = 4 * kmeans.BLOCK**2  # scores of one block of points against one of centroids
    few, many = temporaries(2, 2048), temporaries(64, 8192)
    for small, large in zip(few, many):
        assert large < small + 64 * kmeans.BLOCK * 8 * 4 + 8192 * 8 * 4 * 4  # copies of the arguments at most
        assert block <= large < 4 * block


# ---- resuming


class Interrupted(Exception):
    pass


def interrupt_after(iterations: int):
    def progress(done: int, objective: float) -> None:
        if done == iterations:
            raise Interrupted

    return progress


@pytest.mark.parametrize("init", kmeans.INITS)
def test_an_interrupted_fit_goes_on_bit_for_bit(tmp_path, init):
    x, state = mixture(2000, 6, 9), tmp_path / "new" / "state.npz"
    straight = kmeans.fit(x, 20, iterations=7, init=init)
    with pytest.raises(Interrupted):
        kmeans.fit(x, 20, iterations=7, init=init, state=state, progress=interrupt_after(3))
    for left in ("state.npz.unfinished", ".state.npz.kmeans-0123.tmp"):  # by a kill, of an earlier version and of this
        (state.parent / left).write_bytes(b"half a file")
    seen = []
    resumed = kmeans.fit(x, 20, iterations=7, init=init, state=state, progress=lambda done, _: seen.append(done))
    assert seen == [4, 5, 6, 7]
    for part, expected in zip(resumed, straight):
        np.testing.assert_array_equal(part, expected)
    finished = kmeans.fit(x, 20, iterations=7, init=init, state=state, progress=interrupt_after(7))
    np.testing.assert_array_equal(finished.centroids, straight.centroids)
    assert [path.name for path in state.parent.iterdir()] == ["state.npz"]


def test_a_state_of_an_earlier_version_goes_on(tmp_path):
    """Their `origin` was a string."""
    x, state = mixture(500, 3, 4), tmp_path / "state.npz"
    kmeans.fit(x, 5, iterations=3, state=state)
    with np.load(state) as arrays:
        stored = dict(arrays)
    np.savez(state, **stored | {"origin": np.array(stored["origin"].tobytes().decode())})
    resumed = kmeans.fit(x, 5, iterations=5, state=state)
    np.testing.assert_array_equal(resumed.centroids, kmeans.fit(x, 5, iterations=5).centroids)


def test_a_fit_that_does_not_move_any_more_ends(tmp_path):
    """Objectives are as many as iterations, however the fit came to its end."""
    x, seen = mixture(300, 2, 2), []
    straight = kmeans.fit(x, 2, iterations=50, progress=lambda done, _: seen.append(done))
    assert len(seen) < 20
    assert seen[-1] == straight.iteration == len(straight.objectives) == 50
    longer = kmeans.fit(x, 2, iterations=60)
    np.testing.assert_array_equal(longer.centroids, straight.centroids)
    np.testing.assert_array_equal(longer.objectives[:50], straight.objectives)
    for iterations in (2, 50):
        resumed = kmeans.fit(x, 2, iterations=iterations, state=tmp_path / "state.npz")
    np.testing.assert_array_equal(resumed.objectives, straight.objectives)


def test_a_state_of_another_fit_is_refused(tmp_path):
    x, state = mixture(500, 3, 4), tmp_path / "state.npz"
    kmeans.fit(x, 5, iterations=3, state=state)
    other = x.copy()
    other[17, 1] += 1e-3
    for arguments, words in [
        ({"points": x, "k": 6}, "k 5 there, 6 here"),
        ({"points": x, "k": 5, "seed": 1}, "seed 1234 there, 1 here"),
        ({"points": x, "k": 5, "init": "k-means++"}, "init random there, k-means.. here"),
        ({"points": x[:-1], "k": 5}, r"shape \[500, 3\] there, \[499, 3\] here"),
        ({"points": other, "k": 5}, r"other points or settings: points_sha256 \w{64} there"),
    ]:
        with pytest.raises(UserError, match=words):
            kmeans.fit(**arguments, iterations=3, state=state)
    with pytest.raises(UserError, match="holds 3 iterations; valid: iterations = 3 or more"):
        kmeans.fit(x, 5, iterations=2, state=state)
    whole = state.read_bytes()
    for damaged in (b"", b"no archive", whole[: len(whole) // 2]):
        state.write_bytes(damaged)
        with pytest.raises(UserError, match="holds no state of a k-means fit"):
            kmeans.fit(x, 5, iterations=3, state=state)


# ---- seeds and splits


def shuffled(n: int, seed: int) -> np.ndarray:
    """The definition of `perm`, step by step."""
    raw = np.random.RandomState(seed).randint(0, 2**32, n, dtype=np.uint32)
    order = np.arange(n)
    for i in range(n):
        j = i + int(raw[i]) % (n - i)
        order[i], order[j] = order[j], order[i]
    return order


@pytest.mark.parametrize("n", [1, 2, 3, 10, 1000])
def test_perm_is_the_shuffle(n):
    for seed in (0, 1234, 1235):
        order = shuffled(n, seed)
        np.testing.assert_array_equal(faiss_random.perm(n, seed), order)
        for count in {0, 1, n // 3, n - 1}:
            np.testing.assert_array_equal(faiss_random.perm(n, seed, count), order[:count])


def split_in_turn(centroids: np.ndarray, counts: np.ndarray, n: int) -> np.ndarray:
    """The definition of `split_empty`, one donor asked after the other."""
    k, (centroids, counts) = len(counts), (centroids.copy(), counts.astype(np.float64))
    words = np.random.RandomState(1234)
    for empty in range(k):
        if counts[empty]:
            continue
        donor = 0
        while words.randint(0, 2**32, dtype=np.uint32) / (2**32 - 1) >= (counts[donor] - 1) / (n - k):
            donor = (donor + 1) % k
        centroids[empty] = centroids[donor]
        centroids[empty, ::2] *= 1 + 1 / 1024
        centroids[empty, 1::2] *= 1 - 1 / 1024
        centroids[donor, ::2] *= 1 - 1 / 1024
        centroids[donor, 1::2] *= 1 + 1 / 1024
        counts[empty] = counts[donor] / 2
        counts[donor] -= counts[empty]
    return centroids


def test_many_empty_clusters_are_split_as_defined():
    generator = np.random.default_rng(0)
    counts = generator.integers(0, 4, 200) * generator.integers(0, 40, 200)
    assert (counts == 0).sum() > 40
    centroids = generator.standard_normal((200, 5)).astype(np.float32)
    n = int(counts.sum())
    split = faiss_random.split_empty(centroids, counts, n)
    np.testing.assert_allclose(split, split_in_turn(centroids, counts, n), rtol=1e-6)
    whole = np.maximum(counts, 1)
    np.testing.assert_array_equal(faiss_random.split_empty(centroids, whole, n), centroids)


def test_as_many_points_as_centroids_of_which_two_are_equal():
    x = np.float32([[1, 2], [1, 2], [5, 6]])
    result = kmeans.fit(x, 3, iterations=4)
    assert np.isfinite(result.centroids).all()
    assert result.objectives[-1] < 1e-3


def test_equal_points_and_coordinates_that_are_always_zero():
    result = kmeans.fit(np.tile(np.float32([3, 0]), (50, 1)), 2, iterations=3)
    np.testing.assert_allclose(result.centroids, [[3, 0], [3, 0]], rtol=1e-2)


def test_plus_plus_is_better_than_random_on_average_and_told_by_its_seed():
    x = mixture(4000, 4, 32)
    first = {
        init: [kmeans.fit(x, 32, iterations=1, seed=seed, init=init).objectives[0] for seed in range(6)]
        for init in kmeans.INITS
    }
    last = {
        init: [kmeans.fit(x, 32, iterations=10, seed=seed, init=init).objectives[-1] for seed in range(6)]
        for init in kmeans.INITS
    }
    for objectives in (first, last):
        assert np.mean(objectives["k-means++"]) < np.mean(objectives["random"])
    points = kmeans.place(x)
    drawn = kmeans.plus_plus(points, 32, seed=0)
    np.testing.assert_array_equal(drawn, kmeans.plus_plus(points, 32, seed=0))
    assert not np.array_equal(drawn, kmeans.plus_plus(points, 32, seed=1))
    np.testing.assert_array_equal(drawn, kmeans.plus_plus(kmeans.place(x, make_mesh({"data": 8})), 32, seed=0))


def test_plus_plus_draws_in_proportion_to_the_squared_distance():
    """Three places: after the first draw, the second is at one of the two others with odds of the distances squared."""
    x = np.repeat(np.float32([[0], [1], [3]]), [700, 700, 700], axis=0)
    points = kmeans.place(x)
    pairs = [tuple(kmeans.plus_plus(points, 2, seed)[:, 0]) for seed in range(400)]
    assert all(a != b for a, b in pairs)
    for start, near, far, odds in ((0, 1, 3, 9), (1, 0, 3, 4), (3, 1, 0, 9 / 4)):
        after = [b for a, b in pairs if a == start]
        assert abs(len(after) / 400 - 1 / 3) < 0.1  # more than four standard deviations
        expected = odds / (1 + odds)
        assert abs(np.mean([b == far for b in after]) - expected) < 4 * np.sqrt(expected * (1 - expected) / len(after))
        assert set(after) <= {near, far}


# ---- refusals


@pytest.mark.parametrize(
    "points, arguments, words",
    [
        (np.zeros((3, 2)), {"k": 4}, "3 points cannot have k = 4 centroids; give at least 4 points, or a smaller k"),
        (np.zeros((3, 2)), {"k": 0}, "k = 0 centroids; valid: 1 or more"),
        (np.broadcast_to(0.0, (2**24, 1)), {"k": 2**15 + 1}, "k = 32769 takes 8388864 points; valid: up to 8388608"),
        (np.zeros((3, 2, 2)), {"k": 1}, r"real points \[n, d\]; found float64 \(3, 2, 2\)"),
        (np.zeros((3, 0)), {"k": 1}, r"found float64 \(3, 0\)"),
        (np.zeros((3, 2), complex), {"k": 1}, r"found complex128 \(3, 2\)"),
        (np.float32([[1], [2], [np.nan]]), {"k": 1}, "row 2 of the 3 points holds a value that is not finite"),
        (np.float64([[1], [1e39]]), {"k": 1}, "row 1 of the 2 points"),
        (np.float32([[1], [1e19]]), {"k": 1}, "values up to 1e.19; their squared distances leave"),
        (np.zeros((3, 2)), {"k": 1, "iterations": 0}, "iterations = 0; valid: 1 or more"),
        (np.zeros((3, 2)), {"k": 1, "seed": -1}, "seed = -1; valid: 0 to"),
        (np.zeros((3, 2)), {"k": 1, "init": "kmeans++"}, "init = 'kmeans..' is unknown; valid: random, k-means.."),
    ],
)
@pytest.mark.filterwarnings("ignore:overflow")
def test_what_cannot_be_fitted_is_refused(points, arguments, words):
    with pytest.raises(UserError, match=words):
        kmeans.fit(points, **arguments)


def test_codebooks_are_read(tmp_path):
    codebook = np.random.default_rng(0).standard_normal((6, 4)).astype(np.float32)
    path = tmp_path / "km.npy"
    for dtype in (np.float32, np.float64):
        np.save(path, codebook.astype(dtype))
        read = codebooks.read_codebook(path)
        assert read.dtype == np.float32
        np.testing.assert_array_equal(read, codebook)


@pytest.mark.parametrize(
    "content, words",
    [
        (np.zeros(4, np.float32), r"holds float32 \(4,\); a codebook is float32 \[k, d\]"),
        (np.zeros((4, 2), np.int64), r"holds int64 \(4, 2\)"),
        (np.zeros((0, 2), np.float32), r"holds float32 \(0, 2\)"),
        (np.float32([[1, 2], [np.inf, 2]]), "centroid 1 of 2 holds a value that is not finite"),
        (np.array([{"a": 1}], object), "not an array of numbers"),
        (b"text", "not an array of numbers"),
        (b"", "km.npy"),
        (None, "no codebook can be read"),
    ],
)
def test_what_is_no_codebook_is_refused(tmp_path, content, words):
    path = tmp_path / "km.npy"
    if isinstance(content, np.ndarray):
        np.save(path, content)
    elif content is not None:
        path.write_bytes(content)
    with pytest.raises(UserError, match=words):
        codebooks.read_codebook(path)


def test_an_archive_is_no_codebook(tmp_path):
    np.savez(tmp_path / "km.npz", centroids=np.zeros((2, 2), np.float32))
    with pytest.raises(UserError, match="an archive of arrays; a codebook is"):
        codebooks.read_codebook(tmp_path / "km.npz")
