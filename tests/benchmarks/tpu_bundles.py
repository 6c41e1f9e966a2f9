"""Static cost of the TPU scan kernels: instruction bundles (about one cycle each) of their loops. Needs libtpu, no TPU.

    JAX_PLATFORMS=cpu python -m tests.benchmarks.tpu_bundles [--blocks 256 512] [--generations v5e v6e]

Every row is one loop of a kernel compiled for bfloat16 [8, 1056, 3072] and 16 states; the figures are per 8 tokens.
`states` and `steps` run for every block of channels, `spread` (of B and C over lanes) and `sums` (of dB and dC) once.
The compiler also counts what the slots of the bundles hold: arithmetic (4 slots a bundle) bounds the loops. Stalls are
not in it.
"""

import argparse
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from functools import partial
from pathlib import Path

from diffjax.ops.pallas import selective_scan_tpu as kernels

BATCH, TOKENS, CHANNELS, STATES = 8, 1056, 3072, 16
SHOWN = ("VALU", "EUP", "VLOAD", "VSTORE", "VSTORE:SPILL")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--blocks", type=int, nargs="+", default=[256, 512])
    parser.add_argument("--generations", nargs="+", default=["v5e", "v6e"])
    parser.add_argument("--compile", nargs=2, metavar=("GENERATION", "BLOCK"), help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.compile:
        compile_kernels(arguments.compile[0], int(arguments.compile[1]))
        return
    print(
        f"{'chip':<5}{'block':>6}  {'loop':<18}{'bundles / 8 tokens':>19}  "
        + "".join(f"{s.split(':')[-1]:>8}" for s in SHOWN)
    )
    for generation in arguments.generations:
        for block in arguments.blocks:
            for loop, bundles, slots in measured(generation, block):
                eights = (kernels.WIDE if loop in ("spread", "sums") else kernels.GROUP) / 8
                figures = "".join(f"{slots[name] / eights:>8.1f}" for name in SHOWN)
                print(f"{generation:<5}{block:>6}  {loop:<18}{bundles / eights:>19.1f}  {figures}", flush=True)


def measured(generation: str, block: int) -> Iterator[tuple[str, int, dict[str, int]]]:
    """(loop, bundles, what its slots hold) of both kernels; a process each, as libtpu reads its flags at the start."""
    with tempfile.TemporaryDirectory() as folder:
        flags = f"--xla_jf_dump_to={folder} --xla_jf_dump_llo_text=true"
        environment = os.environ | {
            "LIBTPU_INIT_ARGS": flags,
            "JAX_PLATFORMS": "cpu",
            "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
        }
        command = [sys.executable, "-m", "tests.benchmarks.tpu_bundles", "--compile", generation, str(block)]
        done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
        if done.returncode:
            raise SystemExit(done.stderr)
        names = {"selective_scan.": ("spread", "forward steps"), "selective_scan_gradient.": ()}
        names["selective_scan_gradient."] = ("spread", "backward states", "backward steps", "sums")
        for kernel, loops in names.items():
            found = [loop for loop in loops_of(Path(folder), kernel) if loop[1]["VPOP"]]  # others fill with zeros
            if len(found) != len(loops):
                raise SystemExit(f"{kernel} has {len(found)} loops, not {len(loops)}: {found}")
            for name, (bundles, slots) in zip(loops, found):
                yield name, bundles, slots


def loops_of(folder: Path, kernel: str) -> Iterator[tuple[int, dict[str, int]]]:
    """The innermost loops of a kernel in the order of the program: number of bundles, total of each slot."""
    (listing,) = (path for path in folder.glob(f"*-{kernel}*-final_bundles.txt") if "schedule" not in path.name)
    (counts,) = folder.glob(f"*-{kernel}*-final_hlo-static-per-bundle-utilization.txt")
    header, rows = counts.read_text().split("== UTILIZATION:")
    slots = header.splitlines()[1].split(", ")  # they differ between versions of the compiler
    usage = [[int(n) for n in row.split()] for row in rows.split("\n")[1:]]
    bundles = re.findall(r"^\s*(?:0x[0-9a-f]+|0)\s+(\w\w)?\s*:\s*(>*)\s*\{", listing.read_text(), re.MULTILINE)
    for first, (mark, depth) in enumerate(bundles):
        if mark == "LB" and len(depth) > 1:
            last = first
            while last < len(bundles) and len(bundles[last][1]) >= len(depth):
                last += 1
            yield last - first, dict(zip(slots, map(sum, zip(*usage[first:last]))))


def compile_kernels(generation: str, block: int) -> None:
    import jax
    import jax.numpy as jnp

    from diffjax.ops.recurrence import Inputs
    from tests import tpu

    kernels.sizes = lambda *_: (kernels.CHUNK, block)
    of = jax.ShapeDtypeStruct
    wide, narrow = (of((BATCH, TOKENS, size), jnp.bfloat16) for size in (CHANNELS, STATES))
    channels, state = of((CHANNELS,), jnp.float32), of((BATCH, STATES, CHANNELS), jnp.float32)
    starts = of((BATCH, -(-TOKENS // kernels.CHUNK), STATES, CHANNELS), jnp.float32)
    inputs = Inputs(wide, wide, of((STATES, CHANNELS), jnp.float32), narrow, narrow, channels, wide, channels)
    inputs, starts, wide, state = tpu.placed(tpu.mesh(generation), (inputs, starts, wide, state))
    jax.jit(partial(kernels.forward, softplus=True, reverse=False)).lower(inputs).compile()
    jax.jit(partial(kernels.backward, softplus=True, reverse=False)).lower(inputs, starts, wide, state).compile()


if __name__ == "__main__":
    main()
