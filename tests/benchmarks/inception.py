"""Images per second of the Inception of FID: ours against pytorch-fid's on this CPU, or an estimate for a TPU v5e.

    python -m tests.benchmarks.inception [--batch=16] [--side=256] [--threads=2] [--repeats=10]
    JAX_PLATFORMS=cpu python -m tests.benchmarks.inception --tpu [--batch=16]

The first needs the package pytorch-fid, the second libtpu and no TPU; it compiles for many minutes, the longer the
larger the batch.

On the CPU both take float32 images of `--side`, resize them to 299 x 299 half-pixel bilinearly and return the 2,048
means, with the same generated weights; the features must agree. The passes alternate in one process that is held to
`--threads` cores.

With --tpu, images uint8 -> features is compiled for one chip that is not there, in float32 of highest precision as
everywhere, and a forward pass of DiT-XL/2 in bfloat16. Cycles are the compiler's estimate, which knows neither stalls
between operations nor the host; the clock is that which the chip's peak implies.
"""

import argparse
import os
import time
from collections.abc import Callable
from functools import partial
from typing import Any

Pass = Callable[[], Any]  # computes features [b, 2048] and waits for them
CLOCK = 1.5e9  # of a v5e: 197 TFLOP/s in four units of 128 x 128 products
IMAGES, PASSES = 50_000, 500  # of FID-50K; 250 steps with guidance
GUIDED = 128  # images and their copies without a class, in a pass


def main() -> None:
    options = parse()
    if options.tpu:
        estimate(options)
        return
    # Before XLA makes its thread pool, which has one thread per core it may use.
    os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[: options.threads])
    os.environ["JAX_PLATFORMS"] = "cpu"
    compare(options)


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--side", type=int, default=256)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--repeats", type=int, default=10)
    parser.add_argument("--tpu", action="store_true")
    return parser.parse_args()


def compare(options: argparse.Namespace) -> None:
    import numpy as np

    images = np.random.default_rng(0).random((options.batch, options.side, options.side, 3), np.float32)
    passes = {"diffjax": jax_pass(images), "pytorch-fid": torch_pass(images, options.threads)}
    ours, theirs = (run() for run in passes.values())
    difference = np.abs(ours - theirs).max() / np.abs(theirs).max()
    print(f"features differ by up to {difference:.1e} of the largest")
    if difference > 1e-4:
        raise SystemExit("the two sides do not compute the same features")
    seconds: dict[str, list[float]] = {name: [] for name in passes}
    for _ in range(options.repeats):
        for name, run in passes.items():
            start = time.perf_counter()
            run()
            seconds[name].append(time.perf_counter() - start)
    print(f"batch {options.batch}, {options.side} px, {options.threads} threads, {options.repeats} alternating passes")
    for name, values in seconds.items():
        low, middle, high = options.batch / np.percentile(values, [75, 50, 25])
        print(f"{name:12s} {middle:.2f} images/s (quartiles {low:.2f} to {high:.2f})")
    middle, fastest = (f([seconds[name] for name in passes], axis=1) for f in (np.median, np.min))
    print(f"diffjax / pytorch-fid: {middle[1] / middle[0]:.2f} of medians, {fastest[1] / fastest[0]:.2f} of fastest")


def jax_pass(images: Any) -> Pass:
    import jax
    import numpy as np

    from diffjax.weights import from_reference
    from tests.golden.test_inception import state_dict

    module, params = from_reference("inception", state_dict())
    module = module.clone(inputs="pytorch-fid")
    features = jax.jit(lambda params, images: module.apply({"params": params}, images).pool3)
    params, images = jax.device_put(params), jax.device_put(255 * images)
    return lambda: np.asarray(features(params, images))


def torch_pass(images: Any, threads: int) -> Pass:
    import numpy as np
    import pytorch_fid.inception
    import torch

    from tests.golden.test_inception import state_dict

    torch.set_num_threads(threads)
    weights = {name: torch.from_numpy(array) for name, array in state_dict().items()}
    pytorch_fid.inception.load_state_dict_from_url = lambda *_, **__: weights
    network = pytorch_fid.inception.InceptionV3().eval()
    batch = torch.from_numpy(np.ascontiguousarray(np.moveaxis(images, -1, 1)))

    def run() -> Any:
        with torch.inference_mode():
            return network(batch)[0][:, :, 0, 0].numpy()

    return run


def estimate(options: argparse.Namespace) -> None:
    import jax
    import jax.numpy as jnp

    from diffjax import models
    from diffjax.frozen import create

    def shaped(batch: int, *inputs: tuple[tuple[int, ...], Any]) -> list[jax.ShapeDtypeStruct]:
        return [jax.ShapeDtypeStruct((batch, *shape), dtype) for shape, dtype in inputs]

    images = ((options.side, options.side, 3), jnp.uint8)
    noised = (((32, 32, 4), jnp.float32), ((), jnp.float32), ((), jnp.int32))
    dit = models.create("DiT-XL/2", dtype="bfloat16")
    asked = {
        "DiT-XL/2": (dit, shaped(GUIDED, *noised)),
        "Inception": (create("Inception"), shaped(options.batch, images)),
    }
    found = {}
    for name, (module, inputs) in asked.items():
        macs, cycles = found[name] = per_image(module, inputs)
        print(
            f"{name:10s} {cycles / 1e6:8.2f} Mcycles an image, {CLOCK / cycles:8.1f} images/s a chip at "
            f"{CLOCK / 1e9} GHz; {macs / 1e9:.2f} GMACs, {2e-12 * macs * CLOCK / cycles:.1f} TFLOP/s",
            flush=True,
        )
    (dit_macs, dit_cycles), (macs, cycles) = found.values()
    dit_macs, dit_cycles = PASSES * dit_macs, PASSES * dit_cycles
    print(
        f"FID-50K of DiT-XL/2, {PASSES} passes an image, on one chip: {IMAGES * dit_cycles / CLOCK / 3600:.1f} h of "
        f"passes, {IMAGES * cycles / CLOCK / 60:.1f} min of features; these are "
        f"{100 * cycles / (cycles + dit_cycles):.3f} % of both by cycles, "
        f"{100 * macs / (macs + dit_macs):.4f} % by MACs"
    )


def per_image(module: Any, inputs: list[Any]) -> tuple[float, float]:
    """(multiply-accumulates, cycles of one chip) of a forward pass; of the Inception, as far as the 2,048 means."""
    import jax

    from diffjax.ops.macs import count_macs
    from tests import tpu
    from tests.benchmarks.tpu_train_step import operations

    def apply(params: Any, *inputs: Any) -> Any:
        out = module.apply({"params": params}, *inputs)
        return getattr(out, "pool3", out)

    params = jax.eval_shape(partial(module.init, jax.random.key(0)), *inputs)["params"]
    batch = inputs[0].shape[0]
    placed = tpu.placed(tpu.mesh("v5e", data=1), (params, *inputs))
    program = jax.jit(apply).lower(*placed).compile().as_text()
    cycles = sum(count for _, count in operations(program))
    return count_macs(apply, params, *inputs) / batch, cycles / batch


if __name__ == "__main__":
    main()
