"""What a sampler costs beyond its network calls: time of a trajectory over (network calls x bare forward pass).

    JAX_PLATFORMS=cpu python -m tests.benchmarks.sampling [--calls 10] [--turns 5]

DiT-S/2 with random weights on 32 x 32 x 4 latents, batch 16, float32, no guidance. Trajectory and forward passes run in
turns in one process; each ratio is of neighbours in time, and the median of the turns is shown.
"""

import argparse
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from diffjax import diffusion, models
from diffjax.contracts import bind
from diffjax.diffusion import samplers

BATCH, SHAPE = 16, (32, 32, 4)
CASES = (
    ("gaussian", "ddpm"),
    ("gaussian", "ddim"),
    ("gaussian", "edm"),
    ("gaussian", "dpmpp_2m"),
    ("flow_linear", "euler"),
    ("flow_linear", "heun"),
    ("flow_linear", "euler_maruyama"),
    ("flow_linear", "sde_heun"),
)


def seconds(run: Callable[[], Any]) -> float:
    started = time.perf_counter()
    jax.block_until_ready(run())
    return time.perf_counter() - started


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--calls", type=int, default=10)
    parser.add_argument("--turns", type=int, default=5)
    arguments = parser.parse_args()
    model = models.create("DiT-S/2")
    apply = bind(model)
    keys = jax.random.split(jax.random.key(0), BATCH)
    x, t, y = jnp.ones((BATCH, *SHAPE)), jnp.full(BATCH, 500.0), jnp.zeros(BATCH, jnp.int32)
    params = jax.jit(model.init)(jax.random.key(1), x, t, y)["params"]
    forward = jax.jit(apply)
    jax.block_until_ready(forward(params, x, t, y))

    @jax.jit
    def trajectory(params: Any, schedule: samplers.SamplerSchedule) -> jax.Array:
        start, noise = samplers.initial_noise(keys, SHAPE), samplers.step_noise(keys, SHAPE)
        return samplers.sample(schedule, lambda x, t, weight: apply(params, x, t, y), start, noise)

    print(f"{'process':<13}{'sampler':<16}{'calls':>6}{'seconds':>9}  over calls x forward")
    for process, sampler in CASES:
        two = sampler in ("edm", "heun", "sde_heun")
        schedule = samplers.schedule(diffusion.create_process(process), sampler, arguments.calls // (2 if two else 1))
        calls = int(schedule.nfe)
        jax.block_until_ready(trajectory(params, schedule))
        ratios, times = [], []
        for _ in range(arguments.turns):
            bare = seconds(lambda: [forward(params, x, t, y) for _ in range(calls)])  # noqa: B023
            times.append(seconds(lambda: trajectory(params, schedule)))  # noqa: B023
            ratios.append(times[-1] / bare)
        print(f"{process:<13}{sampler:<16}{calls:>6}{np.median(times):>9.2f}  {np.median(ratios):.3f}", flush=True)


if __name__ == "__main__":
    main()
