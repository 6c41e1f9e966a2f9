"""Where the cycles of a whole training step go on a TPU v5e 2x2, by its compiler's estimate. Needs libtpu, no TPU.

    JAX_PLATFORMS=cpu python -m tests.benchmarks.tpu_train_step --config=configs/udit_imagenet.py:model=u-dit-s \
        --parts=attention/downsample,mlp/conv_general_dilated,attention,mlp --config.parallel.mesh.fsdp=2

U-DiT-S, global batch 256, bfloat16, remat "full" (libtpu 0.0.52): 479 million cycles a chip, 1.62 GiB of temporaries.
The attention has 42.7 % of them, the 5 x 5 depthwise convolutions before it 13.0 %, those of the feed-forward networks
12.9 %, the rest of these 13.9 %.

Every operation counts for the first of the parts whose name is in its scope; operations in loops count as often as
the loop runs. The compiler's estimate is not a chip's time: it knows neither stalls between operations nor the wires.
"""

import re
import sys
from collections.abc import Iterator, Sequence

import jax
import jax.numpy as jnp
from absl import flags

from diffjax import rng
from diffjax.config import Config, load
from diffjax.contracts import Batch
from diffjax.experiment import build
from diffjax.parallel.mesh import batch_sharding, replicated
from tests import tpu


def compiled_step(config: Config, generation: str = "v5e") -> jax.stages.Compiled:
    """The training step of a config for a 2x2 slice, laid out as its `parallel` section says."""
    mesh = tpu.mesh(generation, data=4)
    experiment = build(config, devices=list(mesh.devices.flat))
    key = jax.eval_shape(lambda: rng.stream(config.seed, "train"))
    data, b = config.data, config.batch_size
    over = batch_sharding(experiment.mesh)
    x = jax.ShapeDtypeStruct((b, data.size, data.size, data.channels), jnp.float32, sharding=over)
    number = jax.ShapeDtypeStruct((b,), jnp.int32, sharding=over)
    with jax.set_mesh(experiment.mesh):
        key = jax.ShapeDtypeStruct(key.shape, key.dtype, sharding=replicated(experiment.mesh))
        return experiment.step.lower(experiment.abstract, {}, Batch(x, number, number), key).compile()


def operations(program: str) -> Iterator[tuple[str, int]]:
    """(scope, cycles) of every operation of an optimised program, with cycles of all runs of its loops."""
    bodies, entry = {}, ""
    for text in re.split(r"\n(?=%|ENTRY )", program):
        if match := re.match(r"(ENTRY )?%([\w.\-]+) ", text):
            bodies[match[2]] = text.splitlines()[1:]
            entry = match[2] if match[1] else entry
    pending = [(entry, 1)]
    while pending:
        name, times = pending.pop()
        for line in bodies[name]:
            if match := re.search(r"while\(.*condition=%([\w.\-]+), body=%([\w.\-]+)", line):
                [trips] = re.findall(r"s32\[\]\S* constant\((\d+)\)", "\n".join(bodies[match[1]]))
                pending.append((match[2], times * int(trips)))
            elif match := re.search(r'"estimated_cycles":"(\d+)"', line):
                scope = re.search(r'op_name="([^"]*)"', line)
                yield scope[1] if scope else "", times * int(match[1])


def table(program: str, parts: Sequence[str]) -> dict[str, int]:
    """Cycles per part, what belongs to none last."""
    cycles = dict.fromkeys([*parts, "other"], 0)
    for scope, count in operations(program):
        cycles[next((part for part in parts if part in scope), "other")] += count
    return cycles


def main() -> None:
    values = flags.FlagValues()
    flags.DEFINE_string("config", None, "recipe and its argument", flag_values=values)
    flags.DEFINE_list("parts", ["attention", "mlp"], "parts of scopes, the first that fits counts", flag_values=values)
    overrides = [a for a in sys.argv[1:] if a.startswith("--config.")]
    values([sys.argv[0], *(a for a in sys.argv[1:] if a not in overrides)])
    step = compiled_step(load(values.config, overrides))
    program = step.as_text()
    cycles = table(program, values.parts)
    total = sum(cycles.values())
    for part, count in cycles.items():
        print(f"{part:<28}{count / 1e6:>12.1f} Mcycles {100 * count / total:>6.1f} %")
    memory = step.memory_analysis()
    print(f"temporaries {memory.temp_size_in_bytes / 2**30:.2f} GiB")


if __name__ == "__main__":
    main()
