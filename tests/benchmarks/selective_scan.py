"""The implementations of the selective scan against each other, in one process, on the machine at hand.

    python -m tests.benchmarks.selective_scan [--lengths=256,1024] [--batch=2 --channels=768 --states=16]

Prints, for every implementation and length, the time of a forward pass and of forward and backward together (gradients
of u, delta, A, B and C), as milliseconds and as a ratio to `associative`; the compiler's temporaries; and the floor:
the bytes that any implementation has to move, inputs and outputs once each (and, backwards, the chunk-start states of
`chunked` written and read). "autodiff" is `lax.associative_scan` differentiated by JAX instead of by our rule. With
torch installed, the recurrence written with its operations comes last, where it does not take minutes.
"""

import argparse
import functools
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from diffjax.ops.recurrence import balanced
from diffjax.ops.selective_scan import selective_scan
from tests.ops.scans import draw

TORCH_UP_TO = 256  # tokens; its backward pass grows faster than the length: over two minutes at 1,024


def associative_autodiff(u: jax.Array, delta: jax.Array, A: jax.Array, B: jax.Array, C: jax.Array) -> jax.Array:
    d = jax.nn.softplus(delta)
    maps = jnp.exp(d[..., None, :] * A.T), (d * u)[..., None, :] * B[..., None]
    _, h = jax.lax.associative_scan(lambda p, q: (p[0] * q[0], q[0] * p[1] + q[1]), maps, axis=1)
    return jnp.sum(h * C[..., None], axis=2)


def with_gradients(scan: Callable) -> Callable:
    """(arguments, cotangent) -> values and gradients."""

    def run(arguments: dict[str, jax.Array], g: jax.Array) -> Any:
        out, pull = jax.vjp(lambda x: scan(**x), arguments)
        return out, pull(g)

    return run


def measure(function: Callable, *arguments: Any, repeats: int) -> tuple[float, float]:
    """(seconds, the best of some runs; MiB of temporaries) of the compiled function."""
    compiled = jax.jit(function).lower(*arguments).compile()
    jax.block_until_ready(compiled(*arguments))
    memory = compiled.memory_analysis().temp_size_in_bytes / 2**20
    return best(lambda: jax.block_until_ready(compiled(*arguments)), repeats), memory


def best(run: Callable, repeats: int) -> float:
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        run()
        times.append(time.perf_counter() - start)
    return min(times)


def floors(b: int, tokens: int, e: int, n: int) -> tuple[float, float]:
    """MiB that a forward pass, and forward and backward together, have to move."""
    wide, narrow = b * tokens * e, b * tokens * n
    starts = b * e * n * -(-tokens // balanced(tokens))
    forward = 3 * wide + 2 * narrow
    backward = 5 * wide + 4 * narrow
    return forward * 4 / 2**20, (forward + backward + 2 * starts) * 4 / 2**20


def torch_recurrence(arguments: dict[str, jax.Array], g: jax.Array) -> tuple[Callable, Callable] | None:
    """(forward, forward and backward) in torch operations, step by step, in the layout [b, e, l, n] of public code."""
    try:
        import torch
    except ImportError:
        print("torch is not installed: its rows are left out")
        return None
    tensors = {name: torch.tensor(np.asarray(x), requires_grad=True) for name, x in arguments.items()}
    cotangent = torch.tensor(np.asarray(g))

    def forward() -> Any:
        u, delta, A, B, C = (tensors[name] for name in ("u", "delta", "A", "B", "C"))
        d = torch.nn.functional.softplus(delta)
        decay = torch.exp(torch.einsum("ble,en->beln", d, A))
        drive = torch.einsum("ble,bln->beln", d * u, B)
        h, outputs = torch.zeros_like(drive[:, :, 0]), []
        for t in range(u.shape[1]):
            h = decay[:, :, t] * h + drive[:, :, t]
            outputs.append(torch.einsum("ben,bn->be", h, C[:, t]))
        return torch.stack(outputs, dim=1)

    def both() -> None:
        torch.autograd.grad(forward(), list(tensors.values()), cotangent)

    return forward, both


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--lengths", default="256,1024")
    for name, value in (("batch", 2), ("channels", 768), ("states", 16), ("repeats", 5)):
        parser.add_argument(f"--{name}", type=int, default=value)
    options = parser.parse_args()
    scans: dict[str, Callable] = {
        name: functools.partial(selective_scan, implementation=name)
        for name in ("associative", "sequential", "chunked")
    }
    scans["autodiff"] = associative_autodiff
    if jax.default_backend() in ("tpu", "gpu"):
        scans["pallas"] = functools.partial(selective_scan, implementation="pallas")
    print(f"{options.batch} x L x {options.channels}, {options.states} states, float32, {jax.devices()[0].device_kind}")
    print(f"{'L':>5} {'pass':<8} {'implementation':<14} {'ms':>9} {'of associative':>14} {'temporaries':>12}")
    for tokens in map(int, options.lengths.split(",")):
        shape = options.batch, tokens, options.channels, options.states
        arguments = {name: x for name, x in draw(shape).items() if name in ("u", "delta", "A", "B", "C")}
        g = draw(shape, seed=1)["u"]
        in_torch = torch_recurrence(arguments, g) if tokens <= TORCH_UP_TO else None
        for number, (name, floor) in enumerate(zip(("forward", "both"), floors(*shape))):
            reference = 0.0
            for scan, function in scans.items():
                if number:
                    seconds, memory = measure(with_gradients(function), arguments, g, repeats=options.repeats)
                else:
                    seconds, memory = measure(lambda x, scan=function: scan(**x), arguments, repeats=options.repeats)
                reference = reference or seconds
                row(tokens, name, scan, seconds, reference, f"{memory:.1f} MiB")
            if in_torch:
                row(tokens, name, "torch", best(in_torch[number], 1 + 2 * (not number)), reference, "")
            print(f"{tokens:>5} {name:<8} {'floor':<14} {floor:>37.1f} MiB moved")


def row(tokens: int, name: str, scan: str, seconds: float, reference: float, memory: str) -> None:
    print(
        f"{tokens:>5} {name:<8} {scan:<14} {1e3 * seconds:>9.2f} {seconds / reference:>14.3f} {memory:>12}", flush=True
    )


if __name__ == "__main__":
    main()
