"""Features of samples by number, on disk and in memory: complete, in order, and computed once."""

import threading
from concurrent.futures import ThreadPoolExecutor

import jax
import numpy as np
import pytest
from jax.experimental import multihost_utils

from diffjax.errors import UserError
from diffjax.evaluation import networks
from diffjax.sampling import features
from diffjax.sampling.parts import open_parts
from diffjax.sampling.samples import NotFiniteError, to_uint8
from tests.evaluation import projection

NUM = 23
VALUES = np.random.default_rng(0).uniform(-1, 1, (NUM, 8, 8, 1)).astype(np.float32)
SPLITS = {
    "halves": (np.arange(11), np.arange(11, NUM)),
    "turns": (np.arange(0, NUM, 2), np.arange(1, NUM, 2)),
    "one": (np.arange(NUM), np.arange(0)),
    "odd": (np.array([0, 1, 5, 6, 7, 20]), np.setdiff1d(np.arange(NUM), [0, 1, 5, 6, 7, 20])),
}


class Counted(networks.Network):
    """Keeps how many images each call computes."""

    def loaded(self):
        compute = super().loaded()

        def counting(images):
            self.params["calls"].append(len(images))
            return compute(images)

        return counting


def counted():
    """The features of pixels, and the list of the numbers of images that they are computed of."""
    calls = []
    given = {"name": "pixels", "features": "pixels", "features_sha256": "none", "resize": "none", "title": "pixels"}
    return Counted(**given, kinds={"pixels": 0}, moments=(), suffix="pixels", params={"calls": calls}), calls


def batches(numbers, size=4):
    """(numbers, samples) batch by batch, as `generate` yields them."""
    for start in range(0, len(numbers), size):
        chosen = numbers[start : start + size]
        yield chosen, VALUES[chosen]


@pytest.fixture(scope="module")
def network():
    return projection.network(projection.OF_INCEPTION, moments=("pool3", "spatial"))


@pytest.fixture(scope="module")
def expected(network):
    return network.compute(np.repeat(to_uint8(VALUES), 3, axis=-1))


def same(found, expected):
    assert list(found) == list(expected)
    for kind, rows in expected.items():
        assert found[kind].shape == rows.shape
        np.testing.assert_allclose(found[kind], rows, rtol=1e-6, atol=1e-5)


def folder(path, process=0, num=NUM, what="features"):
    return open_parts(path / f"{what}.npz", {"of": what}, num, process)


@pytest.mark.parametrize("split", SPLITS)
def test_any_split_between_processes_gives_the_same_rows(tmp_path, network, expected, split):
    for process, numbers in enumerate(SPLITS[split]):
        file = folder(tmp_path, process)
        assert sum(features.write(batches(numbers), network, file, np.arange(NUM))) == len(numbers)
    same(features.read(folder(tmp_path), network), expected)


def test_what_is_missing_alone_is_computed(tmp_path):
    network, calls = counted()
    file = folder(tmp_path)
    done = np.array([0, 1, 2, 7, 8, 20])
    list(features.write(batches(done), network, file, file.missing()))
    assert calls == [4, 2]
    before = {path: path.read_bytes() for path in file.folder.glob("part-*")}
    calls.clear()
    again = folder(tmp_path)
    missing = again.missing()
    np.testing.assert_array_equal(missing, np.setdiff1d(np.arange(NUM), done))
    assert list(features.write(batches(missing), network, again, missing)) == [4, 4, 4, 4, 1]
    assert sum(calls) == NUM - len(done)
    assert {path: path.read_bytes() for path in before} == before
    rows = features.read(again, network)["pixels"]
    np.testing.assert_allclose(rows[:, ::3] * 255, to_uint8(VALUES).reshape(NUM, -1), atol=1e-4)


def test_images_are_kept_beside_features_that_are_there(tmp_path):
    """More is drawn than features are missing, where images are: no feature is computed twice."""
    network, calls = counted()
    file, images = folder(tmp_path), folder(tmp_path, what="samples")
    list(features.write(batches(np.arange(6)), network, file, file.missing()))
    images.write(np.arange(4), np.repeat(to_uint8(VALUES[:4]), 3, axis=-1))
    calls.clear()
    wanted = np.union1d(file.missing(), images.missing())
    np.testing.assert_array_equal(wanted, np.arange(4, NUM))
    list(features.write(batches(wanted), network, file, file.missing(), images))
    assert calls == [2, 4, 4, 4, 3]
    assert not len(file.missing())
    np.testing.assert_array_equal(np.concatenate(list(images.rows()))[..., :1], to_uint8(VALUES))
    expected = network.compute(np.concatenate(list(images.rows())))["pixels"]
    np.testing.assert_array_equal(features.read(file, network)["pixels"], expected)


def test_what_was_drawn_before_samples_that_are_not_finite_is_kept(tmp_path, network, expected):
    values = VALUES.copy()
    values[9, 3, 4] = np.nan
    file = folder(tmp_path)
    drawn = ((numbers, values[numbers]) for numbers, _ in batches(np.arange(NUM)))
    with pytest.raises(NotFiniteError, match="sample 9: 1 of 256 sampled values are not finite"):
        list(features.write(drawn, network, file, file.missing(), folder(tmp_path, what="samples")))
    np.testing.assert_array_equal(file.missing(), np.arange(8, NUM))
    np.testing.assert_array_equal(folder(tmp_path, what="samples").missing(), np.arange(8, NUM))
    list(features.write(batches(file.missing()), network, file, file.missing()))
    same(features.read(file, network), expected)


def test_in_memory(network, expected):
    same(features.collect(batches(np.arange(NUM)), network, NUM), expected)
    same(features.collect(reversed(list(batches(np.arange(NUM)))), network, NUM), expected)
    images = [(numbers, to_uint8(values)) for numbers, values in batches(np.arange(NUM))]
    same(features.collect(images, network, NUM), expected)
    with pytest.raises(ValueError, match="19 features of 23 samples"):
        features.collect(list(batches(np.arange(NUM)))[1:], network, NUM)


def test_values_that_are_not_finite_are_counted(network):
    values = VALUES.copy()
    values[0, 0, 0], values[9, 3, 4], values[22] = np.inf, np.nan, -np.inf
    drawn = ((numbers, values[numbers]) for numbers, _ in batches(np.arange(NUM)))
    assert features.collect(drawn, network, NUM) == 3


@pytest.fixture
def on_two(monkeypatch):
    """What `collect` gives on each of two processes, which are threads here; `drawn`: the part of each."""
    here, barrier, sent = threading.local(), threading.Barrier(2, timeout=5), [None, None]

    def gather(tree):
        sent[here.process] = tree
        barrier.wait()
        found = jax.tree.map(lambda *leaves: np.stack(leaves), *sent)
        barrier.wait()
        return found

    def collect(drawn, network, num):
        def one(process):
            here.process = process
            return features.collect(drawn[process], network, num)

        with ThreadPoolExecutor(2) as pool:
            return list(pool.map(one, range(2)))

    monkeypatch.setattr(jax, "process_count", lambda: 2)
    monkeypatch.setattr(multihost_utils, "process_allgather", gather)
    return collect


@pytest.mark.parametrize("split", SPLITS)
def test_in_memory_of_two_processes(on_two, split):
    """Every process has the features of all samples, also one that draws none."""
    network, calls = counted()
    for found in on_two([batches(numbers) for numbers in SPLITS[split]], network, NUM):
        np.testing.assert_allclose(found["pixels"][:, ::3] * 255, to_uint8(VALUES).reshape(NUM, -1), atol=1e-4)
    assert sum(calls) == NUM


@pytest.mark.parametrize("bad", [[0], [0, 4], [22]])
def test_both_processes_know_what_is_not_finite(on_two, bad):
    """Also where the first batch of one is bad, or of both, of which no features are left."""
    values = VALUES.copy()
    values[bad, 0, 0] = np.nan
    drawn = [[(numbers, values[numbers]) for numbers, _ in batches(part)] for part in SPLITS["turns"]]
    assert on_two(drawn, counted()[0], NUM) == [len(bad)] * 2
    drawn = [[(numbers, np.nan * values[numbers]) for numbers, _ in batches(part)] for part in SPLITS["turns"]]
    assert on_two(drawn, counted()[0], NUM) == [NUM] * 2


def test_a_write_that_is_refused_leaves_no_other_process_waiting(tmp_path, network, monkeypatch):
    """The others wait for this one's part of every batch: it draws on, and says it at the end."""
    drawn = []

    def watched():
        for numbers, values in batches(np.arange(NUM)):
            drawn.extend(numbers)
            yield numbers, values

    def refuse(self, *_):
        raise UserError("no space")

    file = open_parts(tmp_path / "a.npz", {}, NUM)
    monkeypatch.setattr(type(file), "write", refuse)
    for processes, seen in ((1, 4), (2, NUM)):
        monkeypatch.setattr(jax, "process_count", lambda n=processes: n)
        drawn.clear()
        with pytest.raises(UserError, match="no space"):
            list(features.write(watched(), network, file, np.arange(NUM)))
        assert len(drawn) == seen
