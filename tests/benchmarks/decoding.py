"""What a token costs to decode: with the cache at several lengths, and against computing the whole prefix again.

    JAX_PLATFORMS=cpu python -m tests.benchmarks.decoding [--lengths 64,256,1024] [--batch 16] [--width 128 --depth 2]

A DiGIT with random weights, float32, drawn with top-k. The programs run in turns in one process and the best of the
turns counts; each generates all its tokens in one compiled loop. The floor is what a step has to read: the parameters
of the blocks and the logits once, and the keys and values of the positions seen so far, half of them on average.
"again" is the forward pass of the whole sequence per token, of fixed length since it is compiled once; as prefixes grow
from nothing, no program without a cache can do with less than about half of that.
"""

import argparse
import functools
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from diffjax import models, rng
from diffjax.ops.vocabulary import SPECIALS
from diffjax.tokens import decoding


def with_cache(model: Any, params: Any, keys: jax.Array, length: int, how: decoding.Choice) -> jax.Array:
    def step(cache: Any, tokens: jax.Array) -> Any:
        return model.apply({"params": params}, cache, tokens, method="step")

    cache = model.init_cache(keys.shape[0], length)
    logits, cache = model.apply({"params": params}, cache, method="prefill")
    return decoding.generate(step, logits, cache, keys, length, how)


def again(model: Any, params: Any, keys: jax.Array, length: int, how: decoding.Choice) -> jax.Array:
    """The same tokens without a cache: every step computes all places."""

    def body(i: jax.Array, tokens: jax.Array) -> jax.Array:
        log_p = decoding.log_probabilities(model.apply({"params": params}, tokens)[:, i])
        return tokens.at[:, i].set(decoding.draw_entry(log_p, rng.fold(keys, i), how) - SPECIALS)

    return jax.lax.fori_loop(0, length, body, jnp.zeros((keys.shape[0], length), jnp.int32))


def seconds(run: Callable[[], Any]) -> float:
    started = time.perf_counter()
    jax.block_until_ready(run())
    return time.perf_counter() - started


def floor(model: Any, params: Any, batch: int, length: int) -> float:
    """MiB that a step reads."""
    read = sum(leaf.nbytes for part in ("blocks", "output") for leaf in jax.tree.leaves(params[part]))
    return (read + model.depth * batch * length * model.width * 4) / 2**20


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--lengths", default="64,256,1024")
    parser.add_argument("--again", type=int, default=256, help="length of the comparison")
    for name, value in (("batch", 16), ("width", 128), ("depth", 2), ("vocabulary", 512), ("top_k", 100), ("turns", 2)):
        parser.add_argument(f"--{name}", type=int, default=value)
    options = parser.parse_args()
    lengths = [int(length) for length in options.lengths.split(",")]
    model: Any = models.create(
        "DiGIT",
        vocabulary=options.vocabulary,
        depth=options.depth,
        width=options.width,
        heads=4,
        length=1 + max(lengths),
    )
    params = jax.jit(model.init)(jax.random.key(0), jnp.zeros((1, 1), jnp.int32))["params"]
    keys = jax.random.split(jax.random.key(1), options.batch)
    how = decoding.choice(options.vocabulary, top_k=options.top_k)
    runs = {("cache", length): jax.jit(functools.partial(with_cache, model, length=length)) for length in lengths}
    runs["again", options.again] = jax.jit(functools.partial(again, model, length=options.again))
    best = dict.fromkeys(runs, float("inf"))
    for turn in range(options.turns + 1):
        for name, run in runs.items():
            taken = seconds(lambda run=run: run(params, keys, how=how))
            best[name] = min(best[name], taken) if turn else best[name]  # the first compiles
    device = jax.devices()[0].device_kind
    sizes = f"{options.depth} layers of {options.width}, vocabulary {options.vocabulary}, batch {options.batch}"
    print(f"{sizes}, float32, {device}")
    print(f"{'tokens':>6} {'program':<8} {'ms per token':>12} {'MiB read, floor':>16}")
    for (program, length), taken in best.items():
        read = f"{floor(model, params, options.batch, length):.1f}" if program != "again" else ""
        print(f"{length:>6} {program:<8} {1e3 * taken / length:>12.3f} {read:>16}")
    if options.again in lengths:
        cached, recomputed = (runs[program, options.again](params, keys, how=how) for program in ("cache", "again"))
        factor = best["again", options.again] / best["cache", options.again]
        print(f"at {options.again} tokens the cache saves a factor {factor:.1f}")
        print(f"{100 * jnp.mean(cached == recomputed):.1f} % of the tokens are the same")


if __name__ == "__main__":
    main()
