"""A process in continuous time: a path, what the network predicts on it, and how it is trained.

`GaussianDiffusion` is the process in discrete steps. Both have `sample_times`, `q_sample`, `c_in`, `c_noise` and
`losses`, by which they are trained, and `grid`, by which samplers know them.
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple, TypeVar

import jax
import jax.numpy as jnp
import numpy as np

from diffjax.diffusion.paths import Array, Conversion, Path, Point, Prediction, conversion, namespace, sigma_as_time
from diffjax.errors import UserError

Coefficients = TypeVar("Coefficients", Point, Conversion)
LARGEST_LOG_SIGMA = 20.0  # of |ln(σ/α)|, for the ends of a path; float32 knows nothing beyond


class Grid(NamedTuple):
    """A process at the times where a sampler looks at it: float64 arrays [n].

    t: in the process's own time. c_noise: what the network is given of it. c_in: what its input x is
    multiplied with. alpha, sigma: of the path. conversion: from (x, output) to data, noise and velocity.
    """

    t: np.ndarray
    c_noise: np.ndarray
    c_in: np.ndarray
    alpha: np.ndarray
    sigma: np.ndarray
    conversion: Conversion


def unchanged(t: Array) -> Array:
    return t


def ones(t: Array) -> Array:
    return namespace(t).ones_like(t)


@dataclass(frozen=True)
class Process:
    """See the module docstring; `edm` and `flow` make them.

    Attributes:
        path: coefficients of data and noise at a time t.
        prediction: what the network's output estimates.
        c_in: what the network's input is multiplied with, c_in of EDM.
        c_noise: what the network is given of t, c_noise of EDM.
        sample_times: typed keys [b] -> t float32 [b], in training.
        weight: of the squared error of the output at t, [b] -> [b].
        span: (t of pure noise, t of data), between which a sampler moves.
        uncertainty: whether the loss wants a learned log variance, see `weighting`.
        nearest: of all times, the one that the network knows; for networks of discrete steps.
    """

    path: Path
    prediction: Prediction
    c_in: Callable[[Array], Array]
    c_noise: Callable[[Array], Array]
    sample_times: Callable[[jax.Array], jax.Array]
    weight: Callable[[Array], Array]
    span: tuple[float, float]
    uncertainty: bool = False
    nearest: Callable[[Array], Array] = unchanged

    def grid(self, t: np.ndarray) -> Grid:
        """The process at the float64 times t [n], or at those nearest to them that the network knows."""
        with np.errstate(divide="ignore", invalid="ignore"):  # where nothing can be evaluated, nothing is
            t = self.nearest(t)
            point = self.path(t)
            converted = conversion(point, self.prediction)
            return Grid(t, self.c_noise(t), self.c_in(t), point.alpha, point.sigma, converted)

    def q_sample(self, x0: jax.Array, t: jax.Array, eps: jax.Array) -> jax.Array:
        """x at times t [b] from data x0 and noise eps, both [b, ..., c]: equation (1) of `paths`."""
        c = per_example(self.path(t), x0)
        return c.alpha * x0 + c.sigma * eps

    def target(self, x0: jax.Array, t: jax.Array, eps: jax.Array) -> jax.Array:
        """The regression target [b, ..., c] for data x0 and noise eps at times t [b]: f = p x0 + q eps."""
        p, q = self.prediction(per_example(self.path(t), x0))
        return p * x0 + q * eps

    def losses(
        self,
        output: jax.Array,
        x0: jax.Array,
        xt: jax.Array,
        t: jax.Array,
        eps: jax.Array,
        log_variance: jax.Array | None = None,
    ) -> dict[str, jax.Array]:
        """Loss terms of each example, [b], in the dtype of x0: "loss", the plain squared error "mse" of the output.

        output [b, ..., c or 2c] is the network's at (c_in(t) xt, c_noise(t)), xt = q_sample(x0, t, eps); a
        second half of its channels is no part of the loss. log_variance [b] is u of equation (3) in `weighting`, given
        if and only if the process has `uncertainty`; then there is also "log_variance".

        Errors are means over all but the first axis. EDM's public loop sums over pixels and channels and divides by
        the batch alone, so that its gradients are larger by that count; Adam does not notice, but its epsilon and a
        clipped norm do.
        """
        if self.uncertainty != (log_variance is not None):
            needs = "needs a" if self.uncertainty else "takes no"
            raise UserError(f"the loss of this process {needs} log variance; it belongs to weighting 'uncertainty'")
        error = prediction_of(output, x0) - self.target(x0, t, eps)
        mse = jnp.mean(error**2, axis=tuple(range(1, x0.ndim)))
        loss = self.weight(t) * mse
        if log_variance is None:
            return {"loss": loss, "mse": mse}
        return {"loss": loss / jnp.exp(log_variance) + log_variance, "mse": mse, "log_variance": log_variance}

    def noise_fraction(self, t: jax.Array) -> jax.Array:
        """How far times t [b] are from the data, 0 to 1: along the span, or in ln σ where time is the noise level."""
        noise, data = self.span
        if self.path is sigma_as_time:
            t, noise, data = jnp.log(t), math.log(noise), math.log(data)
        return jnp.clip((t - data) / (noise - data), 0.0, 1.0)

    def log_sigma(self, t: jax.Array) -> jax.Array:
        """ln(σ/α) at t [b], within ±LARGEST_LOG_SIGMA."""
        c = self.path(t)
        return jnp.clip(jnp.log(c.sigma) - jnp.log(c.alpha), -LARGEST_LOG_SIGMA, LARGEST_LOG_SIGMA)


def per_example(coefficients: Coefficients, like: jax.Array) -> Coefficients:
    """Coefficients [b] as [b, 1, ...], ready to multiply `like` [b, ...]."""
    return type(coefficients)(*(value.reshape(-1, *(1,) * (like.ndim - 1)) for value in coefficients))


def prediction_of(output: jax.Array, like: jax.Array) -> jax.Array:
    """The first half of an output with twice the channels of `like`, else all of it; in at least float32."""
    channels = like.shape[-1]
    if output.shape[-1] not in (channels, 2 * channels):
        raise UserError(
            f"the process needs {channels} output channels for {channels} input channels, "
            f"or {2 * channels} of which it drops half; the model gives {output.shape[-1]}"
        )
    return output[..., :channels].astype(jnp.promote_types(like.dtype, jnp.float32))


def choose(table: Mapping[str, Any], option: str, name: str) -> Any:
    """table[name]; UserError when it is not there."""
    if name not in table:
        raise UserError(f"{option} {name!r} is unknown for this process; valid: {', '.join(table)}")
    return table[name]


def resolved(option: str, value: float | None, default: float, used: bool, needs: str) -> float:
    """The value of an option, or its default for None. UserError when it is given where it is not `used`."""
    if value is None:
        return default
    if not used:
        raise UserError(f"{option} = {value!r} is read by nothing in this process; valid with {needs}")
    return value
