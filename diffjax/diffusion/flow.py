"""Flow matching and stochastic interpolants (2210.02747, 2209.03003, 2303.08797; SiT 2401.08740) as processes.

Noise is at t = 0 and data at t = 1, as in SiT's code; its paper and SD3 (2403.03206) count the other way round, which
changes the sign of velocities. The network is given t as it is, and its input is not scaled. It predicts the velocity,
the noise, the score, the data or v (see `paths`), each trained by the squared error to

    (1)  f = p x0 + q eps

Time is drawn where a prediction is determined: noise and score say nothing of the data at α = 0, the data say nothing
of the noise at σ = 0, and the velocity of the VP path is infinite there. Times are uniform, or logit-normal in the
fraction u of noise, u = 1 - t (SD3 eq. 19), and then shifted for the resolution, as more tokens need more noise:

    (2)  u = sigmoid(m + s z),   z ~ N(0, 1)
    (3)  u <- a u / (1 + (a - 1) u),   a = √(tokens / tokens for which u was chosen)               SD3 eq. 23
"""

from collections.abc import Callable
from typing import Annotated, NamedTuple

import jax

from diffjax import rng
from diffjax.diffusion.paths import PREDICTIONS, Array, Path, gvp, linear, vp
from diffjax.diffusion.process import Process, choose, ones, resolved, unchanged
from diffjax.diffusion.weighting import Gamma, SigmaData, Weighting, weight_of_time
from diffjax.options import Leaf, above, at_least, checked, one_of

PATHS: dict[str, Path] = {"linear": linear, "gvp": gvp, "vp": vp}
MARGIN = 1e-3  # kept from an end of a path where a prediction says too little
VP_TRAIN_MARGIN = 1e-5


class Intervals(NamedTuple):
    """(first t, last t), noise first: of training, of the ODE, of the SDE before its last step."""

    train: tuple[float, float]
    ode: tuple[float, float]
    sde: tuple[float, float]


def intervals(path: str, prediction: str, last_step: float = 0.0) -> Intervals:
    """Where a prediction is trained and used on a path; `last_step` is the size of the SDE's own last step, 0 for none.

    Those of SiT for the velocity, the noise and the score. The data are determined from t = 0, v on the whole path.
    """
    choose(PATHS, "path", path)
    choose(PREDICTIONS, "prediction", prediction)
    if path == "vp":
        train, ode = (0.0, 1 - VP_TRAIN_MARGIN), (0.0, 1 - MARGIN)
    else:
        first = MARGIN if prediction in ("epsilon", "score") else 0.0
        last = 1 - MARGIN if prediction in ("epsilon", "score", "x0") else 1.0
        train = ode = (first, last)
    return Intervals(train, ode, sde=(ode[0], 1 - last_step) if last_step else ode)


@checked
def flow(
    path: str = "linear",
    *,
    prediction: Annotated[str, Leaf("what the network predicts", valid=one_of(PREDICTIONS))] = "velocity",
    weighting: Weighting = "uniform",
    times: Annotated[
        str, Leaf("how times are drawn in training", valid=one_of(("uniform", "logit_normal")))
    ] = "uniform",
    gamma: Gamma = None,
    sigma_data: SigmaData = None,
    logit_mean: Annotated[float | None, Leaf("of logit-normal times; above 0 is more noise; none: 0")] = None,
    logit_std: Annotated[float | None, Leaf("of logit-normal times; none: 1", valid=at_least(0))] = None,
    shift: Annotated[float | None, Leaf("resolution shift of the times; none: 1", valid=above(0))] = None,
) -> Process:
    """The process of one of PATHS.

    prediction: "velocity", "epsilon", "score", "x0" or "v". weighting: see `weighting`, whose numbers are gamma (5)
    and sigma_data (0.5). times: "uniform" or "logit_normal" with m = logit_mean (0), s = logit_std (1) of (2); above 0
    is more noise. shift: a of (3), also for uniform times (1). The span is the interval of the ODE. UserError on an
    unknown name, an impossible number or one that nothing reads, and a weight that is infinite where the prediction is
    trained.
    """
    train, ode, _ = intervals(path, prediction)
    gamma = resolved("gamma", gamma, 5.0, weighting == "min_snr", "weighting 'min_snr'")
    sigma_data = resolved("sigma_data", sigma_data, 0.5, weighting == "edm", "weighting 'edm'")
    logit_mean = resolved("logit_mean", logit_mean, 0.0, times == "logit_normal", "times 'logit_normal'")
    logit_std = resolved("logit_std", logit_std, 1.0, times == "logit_normal", "times 'logit_normal'")
    shift = resolved("shift", shift, 1.0, True, "any times")

    draws: dict[str, Callable[[jax.Array], jax.Array]] = {
        "uniform": lambda keys: 1 - rng.uniform(keys),
        "logit_normal": lambda keys: logit_normal(rng.normal(keys, ()), logit_mean, logit_std),
    }
    noise = choose(draws, "times", times)

    def sample_times(keys: jax.Array) -> jax.Array:
        return train[0] + (train[1] - train[0]) * (1 - shifted(noise(keys), shift))

    predicted = PREDICTIONS[prediction]
    return Process(
        path=PATHS[path],
        prediction=predicted,
        c_in=ones,
        c_noise=unchanged,
        sample_times=sample_times,
        weight=weight_of_time(weighting, PATHS[path], predicted, train, gamma=gamma, sigma_data=sigma_data),
        span=ode,
        uncertainty=weighting == "uncertainty",
    )


def logit_normal(z: jax.Array, mean: float, std: float) -> jax.Array:
    """Equation (2): fractions of noise for standard normal z."""
    return jax.nn.sigmoid(mean + std * z)


def shifted(noise: Array, shift: float) -> Array:
    """Equation (3) on fractions of noise in [0, 1]; the ends stay where they are."""
    return shift * noise / (1 + (shift - 1) * noise)
