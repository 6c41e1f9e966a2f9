"""U-DiT and DiT at equal multiply-accumulates: what a forward pass and a training step take on this machine.

    JAX_PLATFORMS=cpu python -m tests.benchmarks.equal_compute [--size S] [--batch 8] [--turns 5]

DiT-S/2 (6.06 GMACs), and U-DiT-S as it is trained (7.13) and fused (6.02), or with --size B DiT-B/2 (23.01), and
U-DiT-B (26.51 and 22.18), on 32 x 32 x 4 latents in float32, in turns in one process. A training step here is the
gradient of the mean square of the output.
"""

import argparse
import time

import jax
import jax.numpy as jnp
import numpy as np

from diffjax import models
from diffjax.contracts import bind


def programs(size: str, batch: int) -> dict[str, tuple]:
    """{name with multiply-accumulates: (function, arguments)}."""
    inputs = (jnp.ones((batch, 32, 32, 4)), jnp.full(batch, 500.0), jnp.zeros(batch, jnp.int32))
    found = {}
    for name in (f"DiT-{size}/2", f"U-DiT-{size}"):
        model = models.create(name)
        params = jax.jit(model.init)(jax.random.key(0), *inputs)["params"]
        for form in ("trained", "fused") if name.startswith("U-") else ("trained",):
            module, weights = models.fused(model, params) if form == "fused" else (model, params)
            apply = bind(module)
            gmacs = models.MODELS[name].deploy_gmacs if form == "fused" else models.MODELS[name].gmacs
            label = f"{name} {form}: {gmacs:.2f} GMACs"
            found[f"{label}, forward"] = jax.jit(apply), (weights, *inputs)
            if form == "trained":
                gradient = jax.grad(lambda p, *rest, apply=apply: jnp.mean(apply(p, *rest) ** 2))
                found[f"{label}, with gradients"] = jax.jit(gradient), (weights, *inputs)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", choices=["S", "B"], default="S")
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--turns", type=int, default=5)
    arguments = parser.parse_args()
    ready = programs(arguments.size, arguments.batch)
    seconds: dict[str, list[float]] = {name: [] for name in ready}
    for turn in range(arguments.turns + 1):  # the first compiles
        for name, (run, given) in ready.items():
            started = time.perf_counter()
            jax.block_until_ready(run(*given))
            if turn:
                seconds[name].append(time.perf_counter() - started)
    for kind in ("forward", "with gradients"):
        names = [name for name in ready if name.endswith(kind)]
        base = np.median(seconds[names[0]])
        for name in names:
            median = np.median(seconds[name])
            print(f"{name:<52}{1000 * median:>9.0f} ms {median / base:>7.2f} of {names[0].split()[0]}")


if __name__ == "__main__":
    main()
