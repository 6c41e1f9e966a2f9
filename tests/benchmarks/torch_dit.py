"""Time of a DiT training step on the CPU: diffjax against the same step in PyTorch eager. Needs torch (CPU build).

    python -m tests.benchmarks.torch_dit [--model=DiT-S/2] [--batch=8] [--threads=2] [--repeats=12] [--fused]

One step, the same on both sides and in float32, from given data, labels, steps and noise: noising, forward pass, the
learned-variance DiT loss, backward pass, AdamW without weight decay, moving average of the parameters. Here that is one
`jit` with donated state; there torch.nn layers, `scaled_dot_product_attention`, autograd, `torch.optim.AdamW` as its
defaults have it (--fused: its fused form) and one mul_/add_ per parameter for the average. Both start from the same
weights and the losses of the first step are compared. The steps alternate in one process that is held to `--threads`
cores; the first two pairs are not counted.
"""

import argparse
import os
import time
from collections.abc import Callable
from functools import partial

MODEL_SEED, DATA_SEED = 0, 1


def main() -> None:
    options = parse()
    cores = sorted(os.sched_getaffinity(0))[: options.threads]
    os.sched_setaffinity(0, cores)  # before XLA makes its thread pool, one thread per core it may use
    os.environ["JAX_PLATFORMS"] = "cpu"
    batch = draw_batch(options.batch)
    theirs, state_dict = torch_step(options, batch)
    ours = jax_step(options, batch, state_dict)
    compare(ours(), theirs())
    times: dict[str, list] = {"diffjax": [], "torch": []}
    for i in range(options.repeats + 1):
        for name, step in (("diffjax", ours), ("torch", theirs)):
            measured = timed(step)
            if i > 0:
                times[name].append(measured)
    report(times, options, len(cores))


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    parser.add_argument("--model", default="DiT-S/2")
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--repeats", type=int, default=12)
    parser.add_argument("--fused", action="store_true")
    return parser.parse_args()


def timed(step: Callable[[], float]) -> tuple[float, float]:
    """(wall, process CPU) seconds of one step; reading its loss waits for it."""
    wall, cpu = time.perf_counter(), time.process_time()
    step()
    return time.perf_counter() - wall, time.process_time() - cpu


def compare(ours: float, theirs: float) -> None:
    print(f"loss of the first step: diffjax {ours:.6f}, torch {theirs:.6f}")
    if abs(ours - theirs) > 1e-4 * abs(theirs):
        raise SystemExit("the two sides do not compute the same loss")


def report(times: dict[str, list], options: argparse.Namespace, cores: int) -> None:
    import numpy as np

    print(f"{options.model}, batch {options.batch}, float32, {cores} threads, {options.repeats} interleaved steps each")
    wall, cpu = (np.array([[t[kind] for t in times[name]] for name in times]) for kind in (0, 1))
    for name, w, c in zip(times, wall, cpu):
        low, middle, high = np.percentile(w, [25, 50, 75])
        print(f"{name:8s} {middle:.3f} s per step (quartiles {low:.3f} to {high:.3f}), CPU {np.median(c):.3f} s")
    ratios = np.percentile(wall[0] / wall[1], [25, 50, 75])
    print(
        f"ratio diffjax/torch: {np.median(wall[0]) / np.median(wall[1]):.3f} of medians; per pair {ratios[1]:.3f} "
        f"(quartiles {ratios[0]:.3f} to {ratios[2]:.3f}); of CPU time {np.median(cpu[0]) / np.median(cpu[1]):.3f}"
    )


def draw_batch(size: int):
    """x0, noise [b, 32, 32, 4] float32; steps k, labels y [b] int32."""
    import numpy as np

    generator = np.random.default_rng(DATA_SEED)
    x0, eps = generator.standard_normal((2, size, 32, 32, 4)).astype(np.float32)
    k = generator.integers(1, 1000, size).astype(np.int32)
    return {"x0": x0, "eps": eps, "k": k, "y": generator.integers(0, 1001, size).astype(np.int32)}


def jax_step(options: argparse.Namespace, batch: dict, state_dict: dict) -> Callable[[], float]:
    """Our step on parameters converted from the torch model's; each call makes one update and returns its loss."""
    import jax
    import jax.numpy as jnp
    import optax

    from diffjax.diffusion.gaussian import gaussian_diffusion
    from diffjax.models import create

    model, process, optimizer = create(options.model), gaussian_diffusion(), optax.adamw(1e-4, weight_decay=0.0)
    params = jax.tree.map(jnp.asarray, convert(state_dict, model.heads))

    def loss(params, x0, eps, k, y):
        xt = process.q_sample(x0, k, eps)
        output = model.apply({"params": params}, xt, process.model_time(k), y, train=True)
        return process.losses(output, x0, xt, k, eps)["loss"].mean()

    @partial(jax.jit, donate_argnums=0)
    def update(state, batch):
        params, moments, average = state
        value, gradients = jax.value_and_grad(loss)(params, **batch)
        updates, moments = optimizer.update(gradients, moments, params)
        params = optax.apply_updates(params, updates)
        average = jax.tree.map(lambda a, p: a + 1e-4 * (p - a), average, params)
        return (params, moments, average), value

    state = params, optimizer.init(params), jax.tree.map(jnp.copy, params)
    batch = jax.tree.map(jnp.asarray, batch)

    def step() -> float:
        nonlocal state
        state, value = update(state, batch)
        jax.block_until_ready(state)
        return float(value)

    return step


def convert(state_dict: dict, heads: int) -> dict:
    """The torch model's weights as our parameters."""
    import numpy as np
    from einops import rearrange

    def linear(name: str) -> dict:
        return {"kernel": state_dict[f"{name}.weight"].T, "bias": state_dict[f"{name}.bias"]}

    def block(i: int) -> dict:
        at = f"blocks.{i}."
        qkv, out = linear(at + "attn.qkv"), linear(at + "attn.proj")
        qkv["kernel"] = rearrange(qkv["kernel"], "d (qkv h k) -> d h qkv k", qkv=3, h=heads)
        qkv["bias"] = rearrange(qkv["bias"], "(qkv h k) -> h qkv k", qkv=3, h=heads)
        out["kernel"] = rearrange(out["kernel"], "(h k) d -> h k d", h=heads)
        mlp = {"fc1": linear(at + "mlp.fc1"), "fc2": linear(at + "mlp.fc2")}
        return {
            "attention": {"qkv": qkv, "out": out},
            "mlp": mlp,
            "modulation": linear(at + "adaLN_modulation.1"),
        }

    depth = 1 + max(int(name.split(".")[1]) for name in state_dict if name.startswith("blocks."))
    import jax

    patch = state_dict["x_embedder.proj.weight"]
    return {
        "patch_embed": {
            "kernel": rearrange(patch, "d c ph pw -> (ph pw c) d"),
            "bias": state_dict["x_embedder.proj.bias"],
        },
        "time_embed": {"fc1": linear("t_embedder.mlp.0"), "fc2": linear("t_embedder.mlp.2")},
        "label_embed": {"embedding": state_dict["y_embedder.embedding_table.weight"]},
        "blocks": jax.tree.map(lambda *leaves: np.stack(leaves), *(block(i) for i in range(depth))),
        "final": {
            "modulation": linear("final_layer.adaLN_modulation.1"),
            "linear": linear("final_layer.linear"),
        },
    }


def torch_step(options: argparse.Namespace, batch: dict) -> tuple[Callable[[], float], dict]:
    """The step in PyTorch eager, and the weights it starts from; parameters carry the published DiT names."""
    import copy

    import numpy as np
    import torch

    from diffjax.diffusion.gaussian import gaussian_diffusion
    from diffjax.models import MODELS
    from tests.benchmarks.torch_model import TorchDiT, TorchLoss

    torch.manual_seed(MODEL_SEED)
    torch.set_num_threads(options.threads)
    size = MODELS[options.model].kwargs
    model = TorchDiT(size["patch"], size["depth"], size["width"], size["heads"])
    average = copy.deepcopy(model).requires_grad_(False)
    state_dict = {name: p.detach().numpy().copy() for name, p in model.state_dict().items()}
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, weight_decay=0.0, fused=options.fused or None)
    loss = TorchLoss(gaussian_diffusion())
    x0, eps = (torch.from_numpy(np.ascontiguousarray(np.moveaxis(batch[name], -1, 1))) for name in ("x0", "eps"))
    k, y = torch.from_numpy(batch["k"]).long(), torch.from_numpy(batch["y"]).long()

    def step() -> float:
        value = loss(model, x0, eps, k, y)
        optimizer.zero_grad()
        value.backward()
        optimizer.step()
        with torch.no_grad():
            for a, p in zip(average.parameters(), model.parameters()):
                a.mul_(0.9999).add_(p, alpha=1e-4)
        return value.item()

    return step, state_dict


if __name__ == "__main__":
    main()
