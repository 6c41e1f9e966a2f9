"""Compiles the selective scan for H100s that are not there, and prints what the compiler says as JSON lines.

A program of its own, since XLA reads its flags once. Needs jax's CUDA plugin, but no driver and no CUDA toolkit.
"""

import functools
import json
import os
import re

# Nothing can be tuned without a device.
os.environ["XLA_FLAGS"] = os.environ.get("XLA_FLAGS", "") + " --xla_gpu_autotune_level=0"
os.environ["JAX_PLATFORMS"] = "cpu"

import jax
import jax.numpy as jnp
from jax.experimental import topologies
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from diffjax.ops import recurrence
from diffjax.ops.pallas import selective_scan_gpu as kernels
from diffjax.ops.recurrence import Inputs
from diffjax.ops.selective_scan import selective_scan
from diffjax.parallel.mesh import make_mesh

H100 = """
gpu_device_info {
  threads_per_block_limit: 1024  threads_per_warp: 32  threads_per_core_limit: 2048  core_count: 132  fpus_per_core: 128
  shared_memory_per_block: 49152  shared_memory_per_block_optin: 232448  shared_memory_per_core: 233472
  registers_per_block_limit: 65536  registers_per_core_limit: 65536  l2_cache_size: 52428800
  block_dim_limit_x: 2147483647  block_dim_limit_y: 65535  block_dim_limit_z: 65535
  clock_rate_ghz: 1.98  memory_bandwidth: 3352000000000  device_memory_size: 84929347584
  cuda_compute_capability { major: 9 }
}
platform_name: "CUDA"
device_description_str: "NVIDIA H100 80GB HBM3"
runtime_version { major: 12 minor: 8 }
dnn_version_info { major: 9 minor: 7 }
"""
SHAPES = ((8, 258, 1536), (8, 1026, 3072))
STATES = 16


def inputs(b: int, tokens: int, e: int, dtype: str) -> Inputs:
    """Shapes of everything a scan can get."""
    along, narrow = jax.ShapeDtypeStruct((b, tokens, e), dtype), jax.ShapeDtypeStruct((b, tokens, STATES), dtype)
    matrix, vector = jax.ShapeDtypeStruct((STATES, e), jnp.float32), jax.ShapeDtypeStruct((e,), jnp.float32)
    return Inputs(along, along, matrix, narrow, narrow, vector, along, vector)


def report(name: str, compiled: jax.stages.Compiled) -> None:
    text = compiled.as_text()
    kinds = ("all-reduce", "all-gather", "all-to-all", "collective-permute", "reduce-scatter")
    collectives = [kind for kind in kinds if f" {kind}(" in text or f" {kind}-start(" in text]
    calls = text.count('custom_call_target="__gpu$xla.gpu.triton"')
    temporaries = compiled.memory_analysis().temp_size_in_bytes
    print(json.dumps({"name": name, "temp": temporaries, "collectives": collectives, "kernels": calls}))


def compile_alone(device: jax.Device, shape: tuple[int, int, int], dtype: str, reverse: bool) -> None:
    """The two passes as they are, on one device."""
    options = {"softplus": True, "reverse": reverse}
    forward, backward = (functools.partial(f, **options) for f in (kernels.forward, kernels.backward))
    given = inputs(*shape, dtype)
    out, starts, last = jax.eval_shape(forward, given)
    for name, function, arguments in (
        ("forward", forward, (given,)),
        ("backward", backward, (given, starts, out, last)),
    ):
        placed = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=device), arguments)
        compiled = jax.jit(function).trace(*placed).lower(lowering_platforms=("cuda",)).compile()
        report(f"{name} {shape} {dtype} reverse={reverse}", compiled)


def limited(length: int) -> functools.partial:
    return functools.partial(recurrence.balanced, limit=length)


def compile_plain(device: jax.Device, name: str, passes: tuple) -> None:
    """The two passes of a plain form on one device, with the number of kernels that they start."""
    forward, backward = (functools.partial(f, softplus=True, reverse=False) for f in passes)
    given = inputs(*SHAPES[1], "bfloat16")
    out, starts, last = jax.eval_shape(forward, given)
    for way, function, arguments in (
        ("forward", forward, (given,)),
        ("backward", backward, (given, starts, out, last)),
    ):
        placed = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=device), arguments)
        compiled = jax.jit(function).trace(*placed).lower(lowering_platforms=("cuda",)).compile()
        temporaries, started = compiled.memory_analysis().temp_size_in_bytes, kernels_started(compiled.as_text())
        print(json.dumps({"name": f"{name} {way}", "temp": temporaries, "collectives": [], "kernels": started}))


KERNEL = re.compile(
    r" = .*? (fusion|custom-call|copy|reduce|scatter|gather|dynamic-update-slice|dynamic-slice|transpose|conditional"
    r"|sort|concatenate|pad|broadcast|iota|select|add|multiply)\("
)


def kernels_started(text: str) -> int:
    """How many kernels a compiled program starts: instructions, those of a loop as often as it turns."""
    bodies: dict[str, list[str]] = {}
    entry, current = "", ""
    for line in text.splitlines():
        if found := re.match(r"^(ENTRY )?%?([\w.\-]+) \(.*\{$", line):
            current = found[2]
            entry = current if found[1] else entry
            bodies[current] = []
        elif current:
            bodies[current].append(line)

    def count(name: str) -> int:
        total = 0
        for line in bodies[name]:
            if " while(" in line:
                body, turns = re.search(r"body=%?([\w.\-]+)", line), re.search(r'trip_count":\{"n":"(\d+)"', line)
                total += (int(turns[1]) if turns else 1) * (count(body[1]) + 1)  # one for the test of the loop
            elif " call(" in line:
                total += count(re.search(r"to_apply=%?([\w.\-]+)", line)[1])
            else:
                total += bool(KERNEL.search(line))
        return total

    return count(entry)


def compile_spread(devices: list[jax.Device], name: str, implementation: str | None) -> None:
    """The gradient of the scan over eight devices, as models call it: batch over two, channels over four."""
    b, tokens, e = SHAPES[0]
    mesh = make_mesh({"data": 2, "tensor": 4}, devices)
    along, channels = P("data", None, "tensor"), P("tensor")
    given = inputs(b, tokens, e, "bfloat16")
    names = Inputs(along, along, P(None, "tensor"), P("data"), P("data"), channels, along, channels)
    placed = [jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=NamedSharding(mesh, s)) for x, s in zip(given, names)]

    def loss(u, delta, A, B, C, D, z, bias):
        out = selective_scan(u, delta, A.T, B, C, D, z, bias, implementation=implementation)
        return jnp.sum(out.astype(jnp.float32))

    with jax.set_mesh(mesh):
        report(name, jax.jit(jax.grad(loss, argnums=tuple(range(8)))).trace(*placed).lower().compile())


if __name__ == "__main__":
    topology = topologies.get_topology_desc(platform="cuda", target_config=H100, topology="1x1x8")
    device = jax.sharding.SingleDeviceSharding(topology.devices[0])
    with jax.set_mesh(make_mesh({"data": 1}, topology.devices[:1])):  # by which the kernels know what they are for
        for shape in SHAPES:
            for dtype in ("bfloat16", "float32"):
                compile_alone(device, shape, dtype, reverse=False)
        compile_alone(device, SHAPES[0], "bfloat16", reverse=True)
    compile_spread(topology.devices, "spread", "pallas")
    compile_spread(topology.devices, "spread by default", None)
    for length in (16, 64, 128):
        compile_plain(device, f"associative {length}", recurrence.pair(recurrence.ASSOCIATIVE, limited(length)))
    compile_plain(device, "loop 16", recurrence.CHUNKED)
