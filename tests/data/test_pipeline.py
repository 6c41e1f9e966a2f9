"""The training stream: order, flips, hosts, workers, resume, and what happens when the parent is killed."""

import json
import os
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import jax
import numpy as np
import pytest

from diffjax.contracts import Batch
from diffjax.data import sources
from diffjax.data.pipeline import Stream
from diffjax.data.source import Source
from diffjax.errors import UserError
from tests import slow
from tests.data import configs
from tests.data.seen import Batches, seen

COUNT = 50  # examples of the small source


def small_source(count: int = COUNT, name: str = "small", sha256: str = "a") -> Source:
    """Images 4x4x1 that hold the example's number in the left half; the label is the number, too."""
    images = np.zeros((count, 4, 4, 1), np.uint8)
    images[:, :, :2] = np.arange(count)[:, None, None, None]
    examples = sources.ArrayExamples(images, np.arange(count))
    identity = {"name": name, "length": count, "sha256": sha256}
    return Source(name, examples, 4, 1, count, identity, place="/data/small")


def take(batches, count: int) -> list[Batch]:
    taken = [next(batches) for _ in range(count)]
    batches.close()
    return taken


def assert_equal(left, right):
    assert len(left) == len(right)
    for one, other in zip(left, right):
        assert one.aux.keys() == other.aux.keys()
        for mine, theirs in zip(jax.tree.leaves(one), jax.tree.leaves(other), strict=True):
            np.testing.assert_array_equal(mine, theirs)


@pytest.fixture(scope="module")
def straight() -> list[Batch]:
    return take(Batches(small_source(), batch_size=8, seed=3, flip=True, threads=0), 20)


def test_shapes_and_types():
    source = sources.load(**configs.emoji32())
    (batch,) = take(Batches(source, batch_size=6, seed=0, flip=True), 1)
    assert batch.aux == {}
    arrays = {"x": batch.x, "condition": batch.condition, "index": batch.index}
    assert {key: (value.shape, value.dtype.name) for key, value in arrays.items()} == {
        "x": ((6, 32, 32, 3), "float32"),
        "condition": ((6,), "int32"),
        "index": ((6,), "int32"),
    }
    assert batch.x.min() >= -1
    assert batch.x.max() <= 1


def test_every_epoch_is_another_permutation_across_batch_borders(straight):
    labels = np.concatenate([batch.condition for batch in straight])
    epochs = [tuple(labels[start : start + COUNT]) for start in (0, COUNT, 2 * COUNT)]
    assert all(sorted(epoch) == list(range(COUNT)) for epoch in epochs)
    assert len(set(epochs)) == 3


def test_a_batch_may_be_larger_than_the_data_set():
    (batch,) = take(Batches(small_source(3), batch_size=8, seed=0, flip=False), 1)
    assert sorted(batch.condition[:3]) == sorted(batch.condition[3:6]) == [0, 1, 2]


def test_seeds_give_other_orders(straight):
    other = take(Batches(small_source(), batch_size=8, seed=4, flip=True, threads=0), 1)
    assert (other[0].condition != straight[0].condition).any()


def test_flips_follow_the_position_not_the_example(straight):
    mirrored = np.concatenate([batch.x[:, 0, 0, 0] == -1 for batch in straight])
    labels = np.concatenate([batch.condition for batch in straight])
    assert 0.3 < mirrored[labels > 0].mean() < 0.7
    # with another order of the same positions (one example only) the same positions are mirrored
    same = Stream(small_source(), 160, 3, True, 0, 1)[0]
    np.testing.assert_array_equal(seen(small_source(), same, 3).x[:, 0, 0, 0] == -1, mirrored)
    epochs = [dict(zip(labels[i : i + COUNT], mirrored[i : i + COUNT])) for i in (0, COUNT)]
    assert any(epochs[0][n] != epochs[1][n] for n in range(1, COUNT))


def test_no_flip_without_flip():
    for batch in take(Batches(small_source(), batch_size=8, seed=3, flip=False), 10):
        np.testing.assert_array_equal(batch.x[:, 0, 0, 0], batch.condition.astype(np.float32) / np.float32(127.5) - 1)


@pytest.mark.parametrize("hosts", [2, 4])
def test_hosts_share_one_stream(straight, hosts):
    parts = [
        take(Batches(small_source(), batch_size=8, seed=3, flip=True, process_index=i, process_count=hosts), 20)
        for i in range(hosts)
    ]
    for step, batch in enumerate(straight):
        for i in range(hosts):
            for part, whole in zip(jax.tree.leaves(parts[i][step]), jax.tree.leaves(batch), strict=True):
                np.testing.assert_array_equal(part, whole[i::hosts])


@pytest.mark.parametrize("threads", [0, 1, 4])
def test_threads_do_not_change_the_stream(straight, threads):
    assert_equal(take(Batches(small_source(), batch_size=8, seed=3, flip=True, threads=threads), 20), straight)


@pytest.mark.parametrize("stop", [0, 1, 13])
def test_resume_at_any_batch(straight, stop):
    first = Batches(small_source(), batch_size=8, seed=3, flip=True)
    for _ in range(stop):
        next(first)
    state = json.loads(json.dumps(first.get_state()))
    first.close()
    assert state["next_batch"] == stop
    second = Batches(small_source(), batch_size=8, seed=3, flip=True)
    next(second)  # a position of its own, to be given up
    second.set_state(state)
    assert second.get_state() == state
    assert_equal(take(second, 20 - stop), straight[stop:])
    assert_equal(take(Batches(small_source(), batch_size=8, seed=3, flip=True, start=stop), 20 - stop), straight[stop:])


@pytest.mark.parametrize("workers", slow.but([2], [1, 2]))
def test_workers_do_not_change_the_stream_and_states_are_interchangeable(straight, workers):
    batches = Batches(small_source(), batch_size=8, seed=3, flip=True, workers=workers, threads=1)
    begun = [next(batches) for _ in range(7)]
    state = batches.get_state()
    batches.close()
    plain = Batches(small_source(), batch_size=8, seed=3, flip=True)
    plain.set_state(state)
    assert_equal(begun + take(plain, 13), straight)
    back = Batches(small_source(), batch_size=8, seed=3, flip=True, workers=workers, start=7)
    assert_equal(take(back, 5), straight[7:12])


def test_a_far_position_is_reached_at_once():
    begin = time.monotonic()
    take(Batches(small_source(), batch_size=8, seed=3, flip=True, start=100_000_000), 1)
    assert time.monotonic() - begin < 5


@pytest.mark.parametrize(
    "other, said",
    [
        ({"seed": 4}, "seed was 3 and is 4"),
        ({"batch_size": 16}, "batch_size was 8 and is 16"),
        ({"flip": False}, "flip was True and is False"),
        (
            {"source": small_source(7)},
            r"the images in /data/small are not those of the run \(50 images then, 7 now\); restore",
        ),
        (
            {"source": small_source(sha256="b")},
            r"/data/small are not those of the run \(as many, but others\); restore",
        ),
        ({"source": small_source(name="big")}, "source.name was small and is big"),
    ],
)
def test_a_state_of_another_stream_is_refused(other, said):
    own = {"source": small_source(), "batch_size": 8, "seed": 3, "flip": True}
    state = Batches(**own).get_state()
    with pytest.raises(UserError, match=said):
        Batches(**(own | other)).set_state(state)


def test_batches_that_cannot_be_divided_are_refused():
    with pytest.raises(UserError, match=r"batch_size=8 .* 3 processes"):
        Batches(small_source(), batch_size=8, seed=0, flip=False, process_count=3)
    with pytest.raises(UserError, match="batch_size=0"):
        Batches(small_source(), batch_size=0, seed=0, flip=False)
    with pytest.raises(UserError, match=r"data\.workers=-1"):
        Batches(small_source(), batch_size=8, seed=0, flip=False, workers=-1)


def test_importing_the_pipeline_imports_no_jax_of_ours():
    """Whether Grain imports jax is its own affair; nothing of this package may add it."""

    def loaded(modules: str) -> set[str]:
        code = f"import sys, {modules}; print(*sys.modules)"
        return set(
            subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True).stdout.split()
        )

    ours = loaded("diffjax.data.pipeline, diffjax.data.sources") - loaded("grain, numpy")
    assert {"diffjax.data.pipeline", "diffjax.data.sources"} <= ours
    assert not [name for name in ours if name.split(".")[0] in ("jax", "jaxlib", "flax", "tensorflow_datasets")]


PARENT = """
import multiprocessing, os, signal
from diffjax.data.pipeline import Batches
from tests.data.test_pipeline import small_source

if __name__ == "__main__":
    batches = Batches(small_source(), batch_size=8, seed=3, flip=True, workers=2)
    next(batches)
    print(*[child.pid for child in multiprocessing.active_children()], flush=True)
    os.kill(os.getpid(), signal.SIGKILL)
"""


@pytest.mark.slow
def test_workers_end_with_a_killed_parent(tmp_path):
    script = tmp_path / "parent.py"
    script.write_text(textwrap.dedent(PARENT))
    root = Path(__file__).parents[2]
    environment = os.environ | {"PYTHONPATH": str(root)}
    with (tmp_path / "out").open("w") as out:
        code = subprocess.run([sys.executable, script], stdout=out, env=environment, cwd=root, timeout=60).returncode
    assert code == -signal.SIGKILL
    workers = [int(pid) for pid in (tmp_path / "out").read_text().split()]
    assert len(workers) == 2
    deadline = time.monotonic() + 10
    while any(_alive(pid) for pid in workers) and time.monotonic() < deadline:
        time.sleep(0.1)
    left = [pid for pid in workers if _alive(pid)]
    for pid in left:
        os.kill(pid, signal.SIGKILL)
    assert not left


def _alive(pid: int) -> bool:
    """Whether `pid` runs; a dead process that nobody has waited for yet does not."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] not in "ZX"
    except FileNotFoundError:
        return False
