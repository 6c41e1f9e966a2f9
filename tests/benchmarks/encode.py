"""Images per second of `encode`, reading and writing included, over the bare compiled encoder, in turns.

The start (weights, compilation) is left out: counted are the images by which a whole set exceeds its first half.

    JAX_PLATFORMS=cpu python -m tests.benchmarks.encode [--batch 32] [--turns 3] [--widths 32 64 64 64]

The images are the emoji of 32 x 32 pixels, the autoencoder has random weights.
"""

import argparse
import dataclasses
import shutil
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import jax
import numpy as np

from diffjax.commands import encode
from diffjax.data import sources
from diffjax.data.latents import Scaling
from diffjax.data.source import RandomAccess, Source
from diffjax.frozen import create
from diffjax.methods.latents import Encoding
from diffjax.weights import store
from diffjax.weights.autoencoders import Autoencoder


class Half:
    """The first half of some examples."""

    def __init__(self, examples: RandomAccess):
        self._examples = examples

    def __len__(self) -> int:
        return len(self._examples) // 2

    def __getitem__(self, index: int) -> dict[str, Any]:
        return self._examples[index]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--turns", type=int, default=3)
    parser.add_argument("--widths", type=int, nargs="+", default=[32, 64, 64, 64])
    arguments = parser.parse_args()
    folder = Path(tempfile.mkdtemp())
    module = create("VAE", widths=tuple(arguments.widths))
    params = jax.jit(module.init)(jax.random.key(0), np.zeros((1, 32, 32, 3), np.float32))["params"]
    store.save(folder / "vae", module, params, {})
    emoji = sources.load("emoji32", size=32, channels=3, num_classes=9, split="train")
    asked = Encoding(
        emoji, Autoencoder(str(folder / "vae")), 32 // module.factor, 4, Scaling(module.scale), 9, False, 4
    )
    half = dataclasses.replace(emoji, examples=Half(emoji.examples))
    count = len(emoji.examples) - len(half.examples)
    images = np.stack([emoji.examples[i]["image"] for i in range(arguments.batch)])
    bare = jax.jit(lambda params, images: encode.moments_of(module, params, images, asked))
    on_device = jax.block_until_ready(jax.device_put(images))
    jax.block_until_ready(bare(params, on_device))

    def encoded(images: Source) -> float:
        start = time.perf_counter()
        encode.encode(dataclasses.replace(asked, images=images), folder / "out", arguments.batch)
        shutil.rmtree(folder / "out")
        return time.perf_counter() - start

    seconds: dict[str, list[float]] = {"bare": [], "encode": []}
    for _ in range(arguments.turns):
        start = time.perf_counter()
        for _ in range(-(-count // arguments.batch)):
            jax.block_until_ready(bare(params, on_device))
        seconds["bare"].append(time.perf_counter() - start)
        seconds["encode"].append(encoded(emoji) - encoded(half))
    shutil.rmtree(folder)
    medians = {name: statistics.median(each) for name, each in seconds.items()}
    rates = ", ".join(f"{name} {count / each:.1f} images/s" for name, each in medians.items())
    print(f"batch {arguments.batch}: {rates}; encode over bare {medians['bare'] / medians['encode']:.2f}")


if __name__ == "__main__":
    main()
