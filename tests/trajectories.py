"""Processes, closed-form denoisers and whole trajectories, for the tests of samplers."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from diffjax.diffusion import samplers
from diffjax.diffusion.paths import Path, Point, Prediction, namespace, noise_level
from diffjax.diffusion.process import Process


def ones(t: Any) -> Any:
    return namespace(t).ones_like(t)


def make(path: Path, prediction: Prediction, span: tuple[float, float], **others: Any) -> Process:
    """A process whose network is told the time itself and given x as it is."""
    unused = {"sample_times": lambda keys: None, "weight": ones}
    return Process(path, prediction, **({"input_scale": ones, "model_time": lambda t: t} | unused | others), span=span)


def edm(sigma_data: float = 0.5, path: Path = noise_level, span: tuple[float, float] = (80.0, 0.002)) -> Process:
    """The preconditioned network of EDM, on its own path or another with the same σ/α."""

    def scaled_norm(t: Any) -> Any:
        c = path(t)
        return namespace(t).sqrt(c.sigma**2 + (c.alpha * sigma_data) ** 2)

    def prediction(c: Point) -> tuple[Any, Any]:
        norm = namespace(c.sigma).sqrt(c.sigma**2 + (c.alpha * sigma_data) ** 2)
        return c.sigma / sigma_data / norm, -c.alpha * sigma_data / norm

    def model_time(t: Any) -> Any:
        c = path(t)
        return namespace(t).log(c.sigma / c.alpha) / 4

    return make(path, prediction, span, input_scale=lambda t: 1 / scaled_norm(t), model_time=model_time)


def exact(process: Process, mean: float, std: float, time: Callable = lambda told: told) -> samplers.Denoise:
    """The best network for data N(mean, std²), which is told a function of t that `time` inverts."""

    def denoise(x: jax.Array, told: jax.Array, weight: Any = 1.0) -> jax.Array:
        t = time(told).reshape(-1, *(1,) * (x.ndim - 1))
        c = process.path(t)
        offset = x / process.input_scale(t) - c.alpha * mean
        variance = (c.alpha * std) ** 2 + c.sigma**2
        p, q = process.prediction(c)
        return p * (mean + c.alpha * std**2 * offset / variance) + q * (c.sigma * offset / variance)

    return denoise


def states(plan: samplers.Plan, denoise: samplers.Denoise, x: Any, noise: samplers.Noise = jnp.float32) -> np.ndarray:
    """The state before each call of the network, and the result: [rows + 1, b, ..., c]."""
    run = jax.jit(lambda plan, x: samplers.sample(plan, denoise, x, noise))
    return np.stack([run(replace(plan, rows=np.int32(i)), x) for i in range(int(plan.rows) + 1)])
