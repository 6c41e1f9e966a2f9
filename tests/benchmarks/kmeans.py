"""One iteration of k-means against scikit-learn's Lloyd, in one process, in turns, on the machine at hand.

    python -m tests.benchmarks.kmeans [--points=200000 --width=64 --centroids=1024 --iterations=6 --rounds=5]

Both start from the same rows. scikit-learn's time per iteration is the difference of a fit of one iteration and of one
more than --iterations, so that its checks and its start are left out; ours are --iterations calls of `lloyd_step`, the
host's part included. Prints the fastest and the median of the rounds, the ratios, and how far apart the centroids are
after the first iteration (later ones differ more: a point that is as near to two centroids moves both).
"""

import argparse
import statistics
import time
import warnings
from collections.abc import Callable

import jax
import numpy as np

from diffjax.tokens import kmeans


def ours(x: np.ndarray, k: int) -> Callable[[int], tuple[float, np.ndarray]]:
    """(iterations) -> seconds for each, centroids after the first."""
    points = kmeans.place(x)
    kmeans.lloyd_step(points, x[:k])  # compiles

    def run(iterations: int) -> tuple[float, np.ndarray]:
        centroids, start = [x[:k]], time.perf_counter()
        for _ in range(iterations):
            centroids.append(kmeans.lloyd_step(points, centroids[-1])[0])
        return (time.perf_counter() - start) / iterations, centroids[1]

    return run


def sklearns(x: np.ndarray, k: int) -> Callable[[int], tuple[float, np.ndarray]] | None:
    try:
        from sklearn.cluster import KMeans
    except ImportError:
        print("scikit-learn is not installed: its rows are left out")
        return None
    warnings.simplefilter("ignore")  # that it has not converged

    def fit(iterations: int) -> tuple[float, np.ndarray]:
        model = KMeans(k, init=x[:k], n_init=1, max_iter=iterations, tol=0, algorithm="lloyd")
        start = time.perf_counter()
        model.fit(x)
        assert model.n_iter_ == iterations
        return time.perf_counter() - start, model.cluster_centers_

    def run(iterations: int) -> tuple[float, np.ndarray]:
        (first, centroids), (all_of_them, _) = fit(1), fit(iterations + 1)
        return (all_of_them - first) / iterations, centroids

    return run


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, value in (("points", 200_000), ("width", 64), ("centroids", 1024), ("iterations", 6), ("rounds", 5)):
        parser.add_argument(f"--{name}", type=int, default=value)
    options = parser.parse_args()
    n, d, k = options.points, options.width, options.centroids
    x = np.random.default_rng(0).standard_normal((n, d)).astype(np.float32)
    runs = {"diffjax": ours(x, k), "scikit-learn": sklearns(x, k)}
    print(f"{n} x {d}, {k} centroids, float32, {jax.devices()[0].device_kind}")
    times: dict[str, list[float]] = {name: [] for name, run in runs.items() if run}
    centroids = {}
    for _ in range(options.rounds):
        for name, run in runs.items():
            if run:
                seconds, centroids[name] = run(options.iterations)
                times[name].append(seconds)
    print(f"{'':<14} {'fastest ms':>11} {'median ms':>11} {'GFLOP/s':>9}")
    for name, taken in times.items():
        rate = 2 * n * d * k / min(taken) / 1e9
        print(f"{name:<14} {1e3 * min(taken):>11.1f} {1e3 * statistics.median(taken):>11.1f} {rate:>9.1f}")
    if len(times) == 2:
        a, b = times.values()
        medians = statistics.median(a) / statistics.median(b)
        apart = np.abs(centroids["diffjax"] - centroids["scikit-learn"]).max()
        print(f"ratio: {min(a) / min(b):.3f} of the fastest, {medians:.3f} of the medians; centroids {apart:.0e} apart")


if __name__ == "__main__":
    main()
