"""Processes, closed-form denoisers and whole trajectories, for the tests of samplers."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from diffjax.diffusion import edm as shipped
from diffjax.diffusion import samplers, time_samplers
from diffjax.diffusion.paths import Path, Point, Prediction, namespace
from diffjax.diffusion.process import Process


def drift(c: Point) -> tuple[Any, Any]:
    """(r, D) of equation (5) of `paths`, shaped like t."""
    r = c.alpha_dot / c.alpha
    return r, c.sigma * (r * c.sigma - c.sigma_dot)


def ones(t: Any) -> Any:
    return namespace(t).ones_like(t)


def make(path: Path, prediction: Prediction, span: tuple[float, float], **others: Any) -> Process:
    """A process whose network gets the time itself and unscaled x."""
    unused = {"sample_times": lambda keys: None, "weight": ones}
    return Process(path, prediction, **({"c_in": ones, "c_noise": lambda t: t} | unused | others), span=span)


def edm(span: tuple[float, float] = (80.0, 0.002)) -> Process:
    """The preconditioned network of EDM, sampled within another span."""
    return replace(shipped.edm(), span=span)


def exact(process: Process, mean: float, std: float, time: Callable = lambda told: told) -> samplers.Denoise:
    """The best network for data N(mean, std²), which gets a function of t that `time` inverts."""

    def denoise(x: jax.Array, told: jax.Array, weight: Any = 1.0) -> jax.Array:
        t = time(told).reshape(-1, *(1,) * (x.ndim - 1))
        c = process.path(t)
        offset = x / process.c_in(t) - c.alpha * mean
        variance = (c.alpha * std) ** 2 + c.sigma**2
        p, q = process.prediction(c)
        return p * (mean + c.alpha * std**2 * offset / variance) + q * (c.sigma * offset / variance)

    return denoise


def states(
    schedule: samplers.SamplerSchedule, denoise: samplers.Denoise, x: Any, noise: samplers.Noise = jnp.float32
) -> np.ndarray:
    """The state before each call of the network, and the result: [rows + 1, b, ..., c]."""
    run = jax.jit(lambda schedule, x: samplers.sample(schedule, denoise, x, noise))
    return np.stack([run(replace(schedule, nfe=np.int32(i)), x) for i in range(int(schedule.nfe) + 1)])


def schedule_at(process: Process, solver: str, t: np.ndarray, **options: Any) -> samplers.SamplerSchedule:
    """The package's steps of "euler" or "heun" between given times [steps + 1]."""
    made = {"euler": time_samplers.euler_at, "heun": time_samplers.heun_at}[solver](process, t, **options)
    return samplers.padded(process, solver, made, 1.0, len(made.step))
