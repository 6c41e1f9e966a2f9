"""k-means against stored outputs of faiss.

Objectives, sums over all points, are held relative to their size; faiss ends a run when the objective repeats, ours
repeats it to the end.
"""

import re

import jax
import numpy as np
import pytest

from diffjax.tokens import faiss_random, kmeans
from tests.golden.cases import cases

pytestmark = pytest.mark.golden
ATOL = 1e-4
MARGIN = 1e-3


def stored(case, pattern: str) -> dict[int, np.ndarray]:
    """The arrays whose whole names match, by the number in them."""
    assert case is not None, "no stored cases"
    found = {int(match[1]): case.arrays[name] for name in case.arrays if (match := re.fullmatch(pattern, name))}
    assert found, f"{case.path} has no array {pattern}"
    return found


def iterate(case, start: str, iterations: int) -> tuple[np.ndarray, list[float], list[int]]:
    """(centroids, objectives, numbers of empty clusters) of some iterations from the stored centroids `start`."""
    points, centroids = kmeans.place(case.arrays["x"]), case.arrays[start]
    objectives, empty = [], []
    for _ in range(iterations):
        centroids, objective, counts = kmeans.lloyd_step(points, centroids)
        objectives.append(objective)
        empty.append(int(np.sum(counts == 0)))
        assert counts.sum() == points.count
    return centroids, objectives, empty


@pytest.mark.parametrize("case", cases("digit", "centroids_iter"))
def test_iterations_from_fixed_centroids(case):
    for iterations, expected in stored(case, r"centroids_iter(\d+)").items():
        centroids, _, _ = iterate(case, "init", iterations)
        np.testing.assert_allclose(centroids, expected, rtol=0, atol=ATOL, err_msg=f"{iterations} iterations")


@pytest.mark.parametrize("case", cases("digit", "obj_iter"))
def test_objectives(case):
    for iterations, expected in stored(case, r"obj_iter(\d+)").items():
        _, objectives, _ = iterate(case, "init", iterations)
        repeated = np.append(expected, np.repeat(expected[-1], iterations - len(expected)))
        np.testing.assert_allclose(objectives, repeated, rtol=1e-5, err_msg=f"{iterations} iterations")


@pytest.mark.parametrize("case", cases("digit", "centroids_empty_iter"))
def test_empty_clusters_are_split_off_others(case):
    for iterations, expected in stored(case, r"centroids_empty_iter(\d+)").items():
        centroids, _, empty = iterate(case, "init_empty", iterations)
        assert empty[0] > 0, "the case has no empty cluster"
        np.testing.assert_allclose(centroids, expected, rtol=0, atol=ATOL, err_msg=f"{iterations} iterations")


@pytest.mark.parametrize("case", cases("digit", "centroids_default"))
def test_default_seeding(case):
    assert case is not None, "no stored cases"
    x, rows = case.arrays["x"], case.arrays["default_init_rows"]
    np.testing.assert_array_equal(faiss_random.perm(len(x), 1235, len(rows)), rows)
    result = kmeans.fit(x, len(rows))
    np.testing.assert_allclose(result.centroids, case.arrays["centroids_default"], rtol=0, atol=ATOL)


@pytest.mark.parametrize("case", cases("digit", "centroids_subsampled_k"))
def test_subsampled_run(case):
    for k, expected in stored(case, r"centroids_subsampled_k(\d+)").items():
        x = case.arrays["x"]
        rows = faiss_random.perm(len(x), 1234, 256 * k)
        np.testing.assert_array_equal(rows, case.arrays[f"subsample_rows_k{k}"])
        start = rows[faiss_random.perm(len(rows), 1235, k)]
        np.testing.assert_array_equal(start, case.arrays[f"subsample_init_rows_k{k}"])
        np.testing.assert_allclose(kmeans.fit(x, k).centroids, expected, rtol=0, atol=ATOL)


@pytest.mark.parametrize("case", cases("digit", "assign_first"))
def test_assignment(case):
    """To the stored centroids of the longest run."""
    longest = stored(case, r"centroids_iter(\d+)")
    for n, expected in stored(case, r"assign_first(\d+)").items():
        tokens = jax.jit(kmeans.assign)(case.arrays["x"][:n], longest[max(longest)])
        clear = case.arrays[f"assign_margin_first{n}"] > MARGIN
        assert clear.mean() > 0.9, "hardly a token is told by its margin"
        np.testing.assert_array_equal(np.asarray(tokens)[clear], expected[clear])
