"""Peak memory of `convert` on full-size checkpoints of random numbers, and of loading the result over eight devices.

    python -m tests.benchmarks.convert [--models vae dit dis udit diffit digit] [--format safetensors|torch]

One line per model: size of the file, peak resident memory of `convert` as a multiple of it, seconds; then how many
parameters each of eight simulated devices holds of all, with the strategy fsdp. Needs 8 GB of disk and 12 GB of memory.
"""

import argparse
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import jax
import numpy as np
from safetensors.numpy import save_file

from diffjax import frozen, models, rng, weights
from diffjax.parallel.mesh import make_mesh
from diffjax.parallel.rules import shardings
from diffjax.weights import store
from tests.weights.torch_writer import tensor, write_zip

LATENTS = {"channels": 4, "num_classes": 1000}
MODELS: dict[str, tuple[str, str, dict[str, Any]]] = {
    "vae": ("VAE", "vae", {}),
    "dit": ("DiT-XL/2", "dit", LATENTS),
    "dis": ("DiS-H/2", "dis", LATENTS),
    "udit": ("U-DiT-L", "udit", LATENTS),
    "diffit": ("DiffiT-XL/2", "diffit", LATENTS),
    "digit": ("DiGIT-L", "digit_stage1", {}),
}


def module_of(model: str) -> Any:
    name, _, arguments = MODELS[model]
    return (frozen if name in frozen.FAMILIES else models).create(name, **arguments)


def shapes_of(model: str, module: Any) -> Any:
    if model == "vae":
        inputs: tuple[Any, ...] = (np.zeros((1, 64, 64, 3), np.float32),)
    elif model == "digit":
        inputs = (np.zeros((1, 256), np.int32), np.zeros((1,), np.int32))
    else:
        inputs = (np.zeros((1, 32, 32, 4), np.float32), np.zeros((1,), np.float32), np.zeros((1,), np.int32))
    return jax.eval_shape(module.init, rng.stream(0, "params"), *inputs)["params"]


def write(model: str, path: Path) -> None:
    """A checkpoint of random numbers in the reference's layout."""
    module = module_of(model)
    r = np.random.default_rng(0)
    params = jax.tree.map(lambda leaf: r.standard_normal(leaf.shape, np.float32), shapes_of(model, module))
    state = weights.to_reference(MODELS[model][1], module, params)
    if path.suffix == ".safetensors":
        save_file(state, path)
    else:
        write_zip(path, {"ema": {key: tensor(array, str(number)) for number, (key, array) in enumerate(state.items())}})


def load(model: str, folder: Path) -> None:
    """Load what `convert` wrote, split over all devices; print what each holds."""
    module = module_of(model)
    mesh = make_mesh({"fsdp": -1})
    shapes = shapes_of(model, module)
    axes = module.logical_axes
    sharding = shardings(shapes, mesh, "fsdp", axes, 2**20)
    abstract = jax.tree.map(lambda s, where: jax.ShapeDtypeStruct(s.shape, s.dtype, sharding=where), shapes, sharding)
    params = store.load_params(folder, abstract)
    held = [sum(leaf.addressable_shards[i].data.size for leaf in jax.tree.leaves(params)) for i in range(mesh.size)]
    total = sum(leaf.size for leaf in jax.tree.leaves(params))
    print(f"{total:,} parameters; on each of {mesh.size} devices {max(held):,} at most")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", default=list(MODELS), choices=MODELS)
    parser.add_argument("--format", default="safetensors", choices=["safetensors", "torch"])
    parser.add_argument("--step", nargs=2, help=argparse.SUPPRESS)  # what a child process does, and where
    args = parser.parse_args()
    if args.step:
        {"write": write, "load": load}[args.step[0]](args.models[0], Path(args.step[1]))
        return
    for model in args.models:
        with tempfile.TemporaryDirectory() as folder:
            measure(model, Path(folder), ".safetensors" if args.format == "safetensors" else ".pt")


def measure(model: str, folder: Path, suffix: str) -> None:
    file, out = folder / f"random{suffix}", folder / "params"
    own = [sys.executable, "-m", "tests.benchmarks.convert", "--models", model, "--step"]
    environment = {**os.environ, "JAX_PLATFORMS": "cpu"}
    subprocess.run([*own, "write", str(file)], check=True, env=environment)
    command = ["convert", f"--family={MODELS[model][1]}", f"--checkpoint={file}", f"--out={out}"]
    began = time.perf_counter()
    child = subprocess.Popen([sys.executable, "-m", "diffjax", *command], env=environment, stdout=subprocess.DEVNULL)
    _, status, usage = os.wait4(child.pid, 0)
    seconds = time.perf_counter() - began
    assert status == 0
    size, peak = file.stat().st_size / 2**20, usage.ru_maxrss / 2**10
    print(f"{model}: file {size:,.0f} MiB; convert {peak:,.0f} MiB, {peak / size:.2f} of the file; {seconds:.0f} s")
    file.unlink()
    devices = {"XLA_FLAGS": "--xla_force_host_platform_device_count=8"}
    subprocess.run([*own, "load", str(out)], check=True, env={**environment, **devices})


if __name__ == "__main__":
    main()
