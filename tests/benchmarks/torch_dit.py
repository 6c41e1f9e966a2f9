"""Time of a DiT training step on the CPU: diffjax against the same step in PyTorch eager. Needs torch (CPU build).

    python -m tests.benchmarks.torch_dit [--model=DiT-S/2] [--batch=8] [--threads=2] [--repeats=12] [--remat=] [--fused]

One step is the same on both sides, in float32, from given 32 x 32 x 4 latents, noise, diffusion steps and labels:
noising, forward pass, DiT's loss (squared error and variational bound), backward pass, norm of the gradient, AdamW
without weight decay, moving average of the parameters. Ours is `training.step.train_step` under one `jit` with donated
state. Theirs is torch.nn layers with `scaled_dot_product_attention`, autograd, `torch.optim.AdamW` with its default
implementation (--fused: the fused one) and one mul_ and add_ per parameter for the average. Both start from the same
weights, and the losses of the first two steps must agree. The steps alternate in one process that is held to
`--threads` cores; the first pair after that is not counted. With other load on those cores torch's threads wait for
each other and the ratio flatters us: trust it only where torch's quartiles are close.
"""

import argparse
import os
import time
from collections.abc import Callable
from functools import partial
from typing import Any

Step = Callable[[], float]  # makes one update, waits for it and returns its loss


def main() -> None:
    options = parse()
    # Before XLA makes its thread pool, which has one thread per core it may use.
    os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[: options.threads])
    os.environ["JAX_PLATFORMS"] = "cpu"
    batch = draw_batch(options.batch)
    theirs, state_dict = torch_step(options, batch)
    steps = {"diffjax": jax_step(options, batch, state_dict), "torch": theirs}
    for _ in range(2):
        compare(*(step() for step in steps.values()))
    times: dict[str, list] = {name: [] for name in steps}
    for _ in range(options.repeats + 1):
        for name, step in steps.items():
            times[name].append(timed(step))
    report({name: values[1:] for name, values in times.items()}, options)


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="DiT-S/2")
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--repeats", type=int, default=12)
    parser.add_argument("--remat", help="our model's `remat`; by default its own default")
    parser.add_argument("--fused", action="store_true", help="torch's fused AdamW")
    return parser.parse_args()


def timed(step: Step) -> tuple[float, float]:
    """(wall, process CPU) seconds of one step."""
    wall, cpu = time.perf_counter(), time.process_time()
    step()
    return time.perf_counter() - wall, time.process_time() - cpu


def compare(ours: float, theirs: float) -> None:
    print(f"loss: diffjax {ours:.6f}, torch {theirs:.6f}")
    if abs(ours - theirs) > 1e-4 * abs(theirs):
        raise SystemExit("the two sides do not compute the same loss")


def report(times: dict[str, list], options: argparse.Namespace) -> None:
    import numpy as np

    print(
        f"{options.model}, batch {options.batch}, {options.threads} threads, {options.repeats} alternating steps each"
    )
    wall, cpu = (np.array([[pair[kind] for pair in values] for values in times.values()]) for kind in (0, 1))
    for name, w, c in zip(times, wall, cpu):
        low, middle, high = np.percentile(w, [25, 50, 75])
        print(f"{name:8s} {middle:.3f} s per step (quartiles {low:.3f} to {high:.3f}), CPU time {np.median(c):.3f} s")
    low, middle, high = np.percentile(wall[0] / wall[1], [25, 50, 75])
    fastest, wall, cpu = np.min(wall, axis=1), np.median(wall, axis=1), np.median(cpu, axis=1)
    print(f"ratio diffjax/torch {wall[0] / wall[1]:.3f} of medians, {fastest[0] / fastest[1]:.3f} of fastest steps")
    print(f"of neighbours {middle:.3f} (quartiles {low:.3f} to {high:.3f}), of CPU time {cpu[0] / cpu[1]:.3f}")


def draw_batch(size: int) -> dict[str, Any]:
    """x0 and noise eps [b, 32, 32, 4] float32; diffusion steps k > 0 and labels y [b] int32."""
    import numpy as np

    generator = np.random.default_rng(0)
    x0, eps = generator.standard_normal((2, size, 32, 32, 4)).astype(np.float32)
    k, y = (generator.integers(low, high, size).astype(np.int32) for low, high in ((1, 1000), (0, 1001)))
    return {"x0": x0, "eps": eps, "k": k, "y": y}


def jax_step(options: argparse.Namespace, batch: dict[str, Any], state_dict: dict[str, Any]) -> Step:
    import jax
    import optax

    from diffjax.diffusion.gaussian import gaussian_diffusion
    from diffjax.training import ema
    from diffjax.training.state import initial_state
    from diffjax.training.step import train_step
    from diffjax.weights import from_reference

    model, params = from_reference("dit", state_dict)
    model = model.clone(remat=options.remat) if options.remat else model
    process, optimizer = gaussian_diffusion(), optax.adamw(1e-4, weight_decay=0.0)

    def loss(params, frozen, batch, key):
        x0, eps, k = batch["x0"], batch["eps"], batch["k"]
        xt = process.q_sample(x0, k, eps)
        output = model.apply({"params": params}, xt, process.c_noise(k), batch["y"], train=True)
        return process.losses(output, x0, xt, k, eps)["loss"].mean(), {}

    rates = ema.Rates(ema.constant(0.9999))
    rate = optax.constant_schedule(1e-4)
    step = partial(train_step, loss=loss, optimizer=optimizer, learning_rate=rate, rates=rates, microbatches=1)
    update = jax.jit(step, donate_argnums=0)
    state = initial_state(jax.device_put(params), optimizer)
    batch, key = jax.device_put(batch), jax.random.key(0)

    def run() -> float:
        nonlocal state
        state, metrics = jax.block_until_ready(update(state, {}, batch, key))
        return float(metrics["loss"])

    return run


def torch_step(options: argparse.Namespace, batch: dict[str, Any]) -> tuple[Step, dict[str, Any]]:
    """Their step, and the weights it starts from."""
    import copy

    import numpy as np
    import torch

    from diffjax.diffusion.gaussian import gaussian_diffusion
    from diffjax.models import MODELS
    from tests.benchmarks.torch_model import TorchDiT, TorchLoss

    torch.manual_seed(0)
    torch.set_num_threads(options.threads)
    model = TorchDiT(**MODELS[options.model].kwargs)
    state_dict = {name: tensor.detach().numpy().copy() for name, tensor in model.state_dict().items()}
    average = copy.deepcopy(model).requires_grad_(False)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, weight_decay=0.0, fused=options.fused or None)
    loss = TorchLoss(gaussian_diffusion())
    x0, eps = (torch.from_numpy(np.ascontiguousarray(np.moveaxis(batch[name], -1, 1))) for name in ("x0", "eps"))
    k, y = (torch.from_numpy(batch[name]).long() for name in ("k", "y"))

    def run() -> float:
        value = loss(model, x0, eps, k, y)
        optimizer.zero_grad()
        value.backward()
        torch.nn.utils.get_total_norm([parameter.grad for parameter in model.parameters()])
        optimizer.step()
        with torch.no_grad():
            for mean, parameter in zip(average.parameters(), model.parameters()):
                mean.mul_(0.9999).add_(parameter, alpha=1e-4)
        return value.item()

    return run, state_dict


if __name__ == "__main__":
    main()
