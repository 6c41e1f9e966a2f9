"""A process in continuous time: a path, what the network predicts on it, and how it is trained.

`GaussianDiffusion` is the process in discrete steps; samplers know both by their `grid`.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import jax
import numpy as np

from diffjax.diffusion.paths import Array, Conversion, Path, Prediction, conversion


class Grid(NamedTuple):
    """A process at the times where a sampler looks at it: float64 arrays [n].

    t: in the process's own time. model_time: what the network is told of it. input_scale: what its input x is
    multiplied with. alpha, sigma: of the path. conversion: from (x, output) to data, noise and velocity.
    """

    t: np.ndarray
    model_time: np.ndarray
    input_scale: np.ndarray
    alpha: np.ndarray
    sigma: np.ndarray
    conversion: Conversion


@dataclass(frozen=True)
class Process:
    """See the module docstring; `edm` and `flow` make them.

    Attributes:
        path: coefficients of data and noise at a time t.
        prediction: what the network's output estimates.
        input_scale: what the network's input is multiplied with, c_in of EDM.
        model_time: what the network is told of t, c_noise of EDM.
        sample_times: typed keys [b] -> t float32 [b], in training.
        weight: of the squared error of the output at t, [b] -> [b].
        span: (t of pure noise, t of data), between which a sampler moves.
    """

    path: Path
    prediction: Prediction
    input_scale: Callable[[Array], Array]
    model_time: Callable[[Array], Array]
    sample_times: Callable[[jax.Array], jax.Array]
    weight: Callable[[Array], Array]
    span: tuple[float, float]

    def grid(self, t: np.ndarray) -> Grid:
        """The process at the float64 times t [n]."""
        with np.errstate(divide="ignore", invalid="ignore"):  # where nothing can be evaluated, nothing is
            point = self.path(t)
            converted = conversion(point, self.prediction)
            return Grid(t, self.model_time(t), self.input_scale(t), point.alpha, point.sigma, converted)
