"""The Frechet distance against the square root of the matrix product, as most public codes have it, on one core.

    python -m tests.benchmarks.frechet [--features=2048 --images=5000 --rounds=1]

Both take the same two means and covariances, in turns; the statistics are timed alone. Prints the fastest of the
rounds, the ratio, and the relative difference of the two distances.
"""

import argparse
import os
import time
from collections.abc import Callable

for variable in ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"):  # read once, by numpy's import
    os.environ[variable] = "1"

import numpy as np  # noqa: E402
import scipy.linalg  # noqa: E402

from diffjax.evaluation import frechet, statistics  # noqa: E402


def drawn(images: int, features: int, seed: int) -> np.ndarray:
    """float32 [images, features]: none negative, correlated, with decaying variances, as pooled features are."""
    r = np.random.default_rng(seed)
    mixing = r.standard_normal((features, features)) * np.exp(-6 * np.arange(features) / features)[:, None]
    return np.abs(r.standard_normal((images, features)) @ mixing / 30).astype(np.float32)


def with_matrix_root(mean_a: np.ndarray, a: np.ndarray, mean_b: np.ndarray, b: np.ndarray) -> float:
    root = scipy.linalg.sqrtm(a @ b).real
    return float(np.square(mean_a - mean_b).sum() + np.trace(a) + np.trace(b) - 2 * np.trace(root))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, value in (("features", 2048), ("images", 5000), ("rounds", 1)):
        parser.add_argument(f"--{name}", type=int, default=value)
    options = parser.parse_args()
    sets = [drawn(options.images, options.features, seed) for seed in (0, 1)]
    start = time.perf_counter()
    found = [statistics.of(each) for each in sets]
    print(f"{'statistics of both':<20} {time.perf_counter() - start:>8.2f} s")
    given = [value for each in found for value in (each.mean, each.covariance)]
    ways: dict[str, Callable[..., float]] = {"diffjax": frechet.distance, "scipy sqrtm": with_matrix_root}
    times: dict[str, list[float]] = {name: [] for name in ways}
    distances = {}
    for _ in range(options.rounds):
        for name, way in ways.items():
            start = time.perf_counter()
            distances[name] = way(*given)
            times[name].append(time.perf_counter() - start)
    for name, taken in times.items():
        print(f"{name:<20} {min(taken):>8.2f} s   distance {distances[name]:.12g}")
    ours, other = distances.values()
    ratio = min(times["scipy sqrtm"]) / min(times["diffjax"])
    print(f"ratio: {ratio:.2f} times faster; relative difference {abs(ours - other) / other:.1e}")


if __name__ == "__main__":
    main()
