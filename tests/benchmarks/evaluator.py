"""Memory of device and host before and after ten runs of the evaluator `fid`, which must leave nothing behind.

    JAX_PLATFORMS=cpu python -m tests.benchmarks.evaluator [--network=lite0] [--num=64]

The tiny DiT on the digits; the first run, which compiles and computes the features of the reference, is not counted.
"""

import argparse
import gc

import jax

from diffjax.evaluation.evaluators import EVALUATORS
from diffjax.experiment import build
from tests.programs import tiny_config

RUNS = 10


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--network", default="lite0")
    parser.add_argument("--num", type=int, default=64, help="samples that are scored")
    options = parser.parse_args()
    subject = build(tiny_config("sampling.steps=2"))
    params = subject.fresh()
    evaluate = EVALUATORS["fid"].build(subject, network=options.network, num=options.num)
    evaluate(params)
    before = memory()
    for _ in range(RUNS):
        evaluate(params)
    for name, old, new in zip(("device arrays", "resident host memory"), before, memory()):
        print(f"{name}: {old / 2**20:,.1f} MiB before, {new / 2**20:,.1f} after {RUNS} evaluations: {new / old:.4f}")
        if new > 1.01 * old:
            raise SystemExit(f"{name}: more than one percent was left behind")


def memory() -> tuple[int, int]:
    """Bytes of the arrays that live on devices, and of the process in memory."""
    gc.collect()
    with open("/proc/self/status") as status:
        resident = next(int(line.split()[1]) * 1024 for line in status if line.startswith("VmRSS:"))
    return sum(array.nbytes for array in jax.live_arrays()), resident


if __name__ == "__main__":
    main()
