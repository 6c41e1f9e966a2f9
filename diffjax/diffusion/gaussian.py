"""Discrete-time Gaussian diffusion: schedule, targets and losses (DDPM 2006.11239, improved DDPM 2102.09672).

Data x0 is destroyed in T steps of variance β_t. With ᾱ_t = Π_{s<=t} (1 - β_s) each x_t can be drawn directly:

    (1)  x_t = √ᾱ_t x0 + √(1-ᾱ_t) eps,   eps ~ N(0, I)                               DDPM eq. 4
    (2)  q(x_{t-1} | x_t, x0) = N(m_t(x0, x_t), β~_t),   β~_t = β_t (1-ᾱ_{t-1})/(1-ᾱ_t)    DDPM eq. 6, 7
         m_t(x0, x_t) = β_t √ᾱ_{t-1}/(1-ᾱ_t) x0 + (1-ᾱ_{t-1}) √(1-β_t)/(1-ᾱ_t) x_t

The model undoes one step: p(x_{t-1} | x_t) = N(m_t(x̂0, x_t), σ_t²), where x̂0 is the network's output or follows from
its prediction of the noise, by inverting (1), or of v = √ᾱ_t eps - √(1-ᾱ_t) x0 (2202.00512), and the
variance is fixed or interpolated by a second output, also called v:

    (3)  x̂0 = √(1/ᾱ_t) x_t - √(1/ᾱ_t - 1) eps^ = √ᾱ_t x_t - √(1-ᾱ_t) v^                DDPM eq. 15
    (4)  log σ_t² = f log β_t + (1-f) log β~_t,   f = (v+1)/2                          improved DDPM eq. 15

Training minimises the squared error of the prediction, which learns the mean, plus one term of the variational bound in
bits per dimension, which through a stop-gradient on the mean learns the variance alone (improved DDPM eq. 16):

    (5)  L_t = KL(q(x_{t-1} | x_t, x0) || p(x_{t-1} | x_t)) / ln 2  for t > 0,   L_0 = -log2 p(x0 | x_1)

A respaced process keeps the steps s_0 < s_1 < ... of the original one and takes new variances from their ᾱ (improved
DDPM section 4, eq. 19), so that the marginals (1) at the kept steps stay what the network was trained on:

    (6)  β'_k = 1 - ᾱ_{s_k} / ᾱ_{s_{k-1}}

Everywhere k counts the steps of this process, from 0; the network is given the original step s_k. Tables are
float64 on the host; a gathered value becomes float32 before it is used.
"""

import math
from dataclasses import dataclass
from functools import cached_property
from typing import Annotated, ClassVar, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from diffjax import rng
from diffjax.diffusion.paths import PREDICTIONS, Point, conversion
from diffjax.diffusion.process import Grid, resolved
from diffjax.diffusion.weighting import Gamma, SigmaData, check_numbers, weights
from diffjax.errors import UserError
from diffjax.options import Leaf, at_least, checked, one_of

OPTIONS = {
    "prediction": ("epsilon", "x0", "v"),
    "variance": ("learned_range", "fixed_small", "fixed_large"),
    "loss": ("mse", "rescaled_mse", "rescaled_kl"),
    "weighting": ("uniform", "snr", "min_snr", "edm"),
}


SQRT_8_OVER_PI = math.sqrt(8 / math.pi)
SMALLEST_PROBABILITY = 2.0**-25  # above 0, that a difference of float32 values of (1 + tanh) / 2 can be


class PMeanVariance(NamedTuple):
    """p(x_{k-1} | x_k): mean and x0 [b, ..., c] float32; log_variance the same or [b, 1, ...], broadcasting to it."""

    mean: jax.Array
    log_variance: jax.Array
    x0: jax.Array


@dataclass(frozen=True, eq=False)
class GaussianDiffusion:
    """One process of K steps; see the module docstring. Build it with `gaussian_diffusion`.

    betas: [K] float64. timestep_map: [K] int64, the original step s_k of each step. original_steps: T before respacing.
    prediction: what the network predicts. variance: where σ² comes from; "learned_range" needs twice the channels,
    [..., :c] the prediction and [..., c:] v; the fixed ones are β~ ("fixed_small") and β ("fixed_large").
    loss: "mse" is (squared error) + (5); "rescaled_mse" weights (5) with K/1000; "rescaled_kl" is K times (5) alone.
    weighting: of the squared error; its numbers are gamma and sigma_data, see `weighting`.
    """

    betas: np.ndarray
    timestep_map: np.ndarray
    prediction: str
    variance: str
    loss: str
    original_steps: int
    weighting: str = "uniform"
    gamma: float = 5.0
    sigma_data: float = 0.5
    uncertainty: ClassVar[bool] = False  # what `Process` may have and this has not

    def __post_init__(self) -> None:
        if self.weighting in ("velocity", "likelihood", "uncertainty"):
            raise UserError(f"weighting {self.weighting!r} belongs to processes in continuous time")
        check_numbers(self.gamma, self.sigma_data)
        for name, valid in OPTIONS.items():
            if getattr(self, name) not in valid:
                raise UserError(f"diffusion {name} {getattr(self, name)!r} is unknown; valid: {', '.join(valid)}")
        if self.num_steps < 2:
            raise UserError(f"a diffusion process needs at least 2 steps, not {self.num_steps}")
        if self.loss == "rescaled_mse" and self.variance != "learned_range":
            raise UserError(
                f"loss 'rescaled_mse' rescales the term of a learned variance, not {self.variance!r}; valid: mse"
            )
        if self.loss == "rescaled_kl" and self.weighting != "uniform":
            raise UserError(f"weighting {self.weighting!r} is of the squared error, which loss 'rescaled_kl' has not")

    @property
    def num_steps(self) -> int:
        """K."""
        return len(self.betas)

    @cached_property
    def alphas_cumprod(self) -> np.ndarray:
        return np.cumprod(1.0 - self.betas)

    @cached_property
    def alphas_cumprod_prev(self) -> np.ndarray:
        return np.append(1.0, self.alphas_cumprod[:-1])

    @cached_property
    def alphas_cumprod_next(self) -> np.ndarray:
        return np.append(self.alphas_cumprod[1:], 0.0)

    @cached_property
    def sqrt_alphas_cumprod(self) -> np.ndarray:
        return np.sqrt(self.alphas_cumprod)

    @cached_property
    def sqrt_one_minus_alphas_cumprod(self) -> np.ndarray:
        return np.sqrt(1.0 - self.alphas_cumprod)

    @cached_property
    def log_one_minus_alphas_cumprod(self) -> np.ndarray:
        return np.log(1.0 - self.alphas_cumprod)

    @cached_property
    def sqrt_recip_alphas_cumprod(self) -> np.ndarray:
        return np.sqrt(1.0 / self.alphas_cumprod)

    @cached_property
    def sqrt_recipm1_alphas_cumprod(self) -> np.ndarray:
        return np.sqrt(1.0 / self.alphas_cumprod - 1.0)

    @cached_property
    def posterior_variance(self) -> np.ndarray:
        """β~ of (2)."""
        return self.betas * (1.0 - self.alphas_cumprod_prev) / (1.0 - self.alphas_cumprod)

    @cached_property
    def posterior_log_variance_clipped(self) -> np.ndarray:
        """log β~; β~_0 is zero, so the first entry repeats the second."""
        return np.log(np.append(self.posterior_variance[1], self.posterior_variance[1:]))

    @cached_property
    def posterior_mean_coef1(self) -> np.ndarray:
        return self.betas * np.sqrt(self.alphas_cumprod_prev) / (1.0 - self.alphas_cumprod)

    @cached_property
    def posterior_mean_coef2(self) -> np.ndarray:
        return (1.0 - self.alphas_cumprod_prev) * np.sqrt(1.0 - self.betas) / (1.0 - self.alphas_cumprod)

    @cached_property
    def fixed_large_log_variance(self) -> np.ndarray:
        """log β; the first entry is that of β~ above, which gives the better likelihood there."""
        return np.log(np.append(self.posterior_variance[1], self.betas[1:]))

    @cached_property
    def mse_weights(self) -> np.ndarray:
        """The weight of the squared error at each step: float64 [K]."""
        c = self.points(np.arange(self.num_steps))
        numbers = {"gamma": self.gamma, "sigma_data": self.sigma_data}
        return weights(self.weighting, c, PREDICTIONS[self.prediction], **numbers)

    def points(self, steps: np.ndarray) -> Point:
        """√ᾱ and √(1-ᾱ) at steps [n], or of the data at -1: float64 [n]. Steps have no derivatives: NaN."""
        alpha = np.append(self.sqrt_alphas_cumprod, 1.0)[steps]
        sigma = np.append(self.sqrt_one_minus_alphas_cumprod, 0.0)[steps]
        return Point(alpha, sigma, np.full_like(alpha, np.nan), np.full_like(alpha, np.nan))

    def grid(self, steps: np.ndarray) -> Grid:
        """The process at steps [n] of 0, ..., K-1, or -1 for the data themselves, as float64 tables for samplers.

        t is the step, c_noise the original one (-1 for the data); velocities are NaN. UserError on another step.
        """
        steps = np.asarray(steps, np.int64)
        if not ((steps >= -1) & (steps < self.num_steps)).all():
            raise UserError(f"steps {steps.tolist()} of a process of {self.num_steps}: valid: -1 (the data) to K-1")
        c = self.points(steps)
        c_noise = np.append(self.timestep_map, -1)[steps].astype(np.float64)
        with np.errstate(divide="ignore", invalid="ignore"):  # the data determine no noise
            converted = conversion(c, PREDICTIONS[self.prediction])
        return Grid(steps.astype(np.float64), c_noise, np.ones(steps.shape), c.alpha, c.sigma, converted)

    def c_in(self, k: jax.Array) -> jax.Array:
        """The factor of the network's input at steps k [b]: ones, float32 [b]."""
        return jnp.ones(k.shape, jnp.float32)

    def c_noise(self, k: jax.Array) -> jax.Array:
        """The original step of step k [b] int32, as the network receives it: float32 [b]."""
        return jnp.asarray(self.timestep_map, jnp.float32)[k]

    def sample_times(self, keys: jax.Array) -> jax.Array:
        """A step uniform on {0, ..., K-1} for each key [b]: int32 [b]."""
        return rng.integers(keys, self.num_steps)

    def q_sample(self, x0: jax.Array, k: jax.Array, eps: jax.Array) -> jax.Array:
        """x_k from data x0 and noise eps, both [b, ..., c], at steps k [b]: equation (1)."""
        return at(self.sqrt_alphas_cumprod, k, x0) * x0 + at(self.sqrt_one_minus_alphas_cumprod, k, x0) * eps

    def posterior(self, x0: jax.Array, xt: jax.Array, k: jax.Array) -> tuple[jax.Array, jax.Array]:
        """Mean [b, ..., c] and clipped log variance [b, 1, ...] of q(x_{k-1} | x_k, x0): equation (2)."""
        mean = at(self.posterior_mean_coef1, k, xt) * x0 + at(self.posterior_mean_coef2, k, xt) * xt
        return mean, at(self.posterior_log_variance_clipped, k, xt)

    def x0_from_eps(self, xt: jax.Array, k: jax.Array, eps: jax.Array) -> jax.Array:
        """The data that (1) turns into xt with noise eps: equation (3)."""
        return at(self.sqrt_recip_alphas_cumprod, k, xt) * xt - at(self.sqrt_recipm1_alphas_cumprod, k, xt) * eps

    def eps_from_x0(self, xt: jax.Array, k: jax.Array, x0: jax.Array) -> jax.Array:
        """The noise with which (1) turns x0 into xt: equation (3) solved for eps."""
        return (at(self.sqrt_recip_alphas_cumprod, k, xt) * xt - x0) / at(self.sqrt_recipm1_alphas_cumprod, k, xt)

    def x0_from_v(self, xt: jax.Array, k: jax.Array, v: jax.Array) -> jax.Array:
        """The data of the v [b, ..., c] of progressive distillation at xt = x_k."""
        return at(self.sqrt_alphas_cumprod, k, xt) * xt - at(self.sqrt_one_minus_alphas_cumprod, k, xt) * v

    def target(self, x0: jax.Array, k: jax.Array, eps: jax.Array) -> jax.Array:
        """The regression target [b, ..., c] for data x0 and noise eps at steps k [b]."""
        if self.prediction == "v":
            return at(self.sqrt_alphas_cumprod, k, x0) * eps - at(self.sqrt_one_minus_alphas_cumprod, k, x0) * x0
        return x0 if self.prediction == "x0" else eps

    def p_mean_variance(
        self, model_output: jax.Array, xt: jax.Array, k: jax.Array, clip: bool = False
    ) -> PMeanVariance:
        """p(x_{k-1} | x_k) for the network's output [b, ..., c or 2c] at xt [b, ..., c], k [b].

        clip limits x0 to [-1, 1]; it suits pixels, never latents.
        """
        prediction, v = self.split(model_output, xt)
        if self.prediction == "epsilon":
            x0 = self.x0_from_eps(xt, k, prediction)
        elif self.prediction == "v":
            x0 = self.x0_from_v(xt, k, prediction)
        else:
            x0 = prediction
        if clip:
            x0 = jnp.clip(x0, -1.0, 1.0)
        mean, log_variance = self.posterior(x0, xt, k)
        if v is not None:
            # improved DDPM eq. 15; v is free, so σ² may leave the range between the two
            fraction = (v + 1.0) / 2.0
            log_variance = fraction * at(np.log(self.betas), k, xt) + (1.0 - fraction) * log_variance
        elif self.variance == "fixed_large":
            log_variance = at(self.fixed_large_log_variance, k, xt)
        return PMeanVariance(mean, log_variance, x0)

    def losses(
        self, model_output: jax.Array, x0: jax.Array, xt: jax.Array, k: jax.Array, eps: jax.Array
    ) -> dict[str, jax.Array]:
        """Loss terms of each example, float32 [b]: "loss", and "mse" and "vb" (as they enter it) where they apply.

        model_output [b, ..., c or 2c] is the network's at (xt, c_noise(k)); xt = q_sample(x0, k, eps).
        """
        if self.loss == "rescaled_kl":
            vb = self.variational_bound(model_output, x0, xt, k) * self.num_steps
            return {"loss": vb, "vb": vb}
        prediction, v = self.split(model_output, xt)
        mse = mean_per_example((self.target(x0, k, eps) - prediction) ** 2)
        if self.weighting != "uniform":
            mse = mse * jnp.asarray(self.mse_weights, jnp.float32)[k]
        if v is None:
            return {"loss": mse, "mse": mse}
        frozen = jnp.concatenate([jax.lax.stop_gradient(prediction), v], axis=-1)
        vb = self.variational_bound(frozen, x0, xt, k)
        if self.loss == "rescaled_mse":
            vb = vb * (self.num_steps / 1000)
        return {"loss": mse + vb, "mse": mse, "vb": vb}

    def variational_bound(self, model_output: jax.Array, x0: jax.Array, xt: jax.Array, k: jax.Array) -> jax.Array:
        """L_k of equation (5) in bits per dimension, float32 [b]."""
        true_mean, true_log_variance = self.posterior(x0, xt, k)
        mean, log_variance, _ = self.p_mean_variance(model_output, xt, k)
        kl = mean_per_example(normal_kl(true_mean, true_log_variance, mean, log_variance))
        nll = -mean_per_example(discretized_log_likelihood(x0, mean, 0.5 * log_variance))
        return jnp.where(k == 0, nll, kl) / np.float32(np.log(2.0))

    def noise_fraction(self, k: jax.Array) -> jax.Array:
        """How far steps k [b] are from the data, 0 to 1."""
        return k / (self.num_steps - 1)

    def split(self, model_output: jax.Array, xt: jax.Array) -> tuple[jax.Array, jax.Array | None]:
        """The network's output as float32 (prediction [b, ..., c], v the same or None when the variance is fixed)."""
        channels = xt.shape[-1]
        expected = channels * (2 if self.variance == "learned_range" else 1)
        if model_output.shape[-1] != expected:
            raise UserError(
                f"diffusion variance {self.variance!r} needs {expected} output channels for {channels} input channels, "
                f"the model gives {model_output.shape[-1]}"
            )
        output = model_output.astype(jnp.float32)
        return output[..., :channels], output[..., channels:] if expected > channels else None


@checked
def gaussian_diffusion(
    *,
    respacing: str = "",
    prediction: Annotated[str, Leaf("what the network predicts", valid=one_of(OPTIONS["prediction"]))] = "epsilon",
    variance: Annotated[
        str, Leaf("of the reverse steps: learned in a range, or fixed", valid=one_of(OPTIONS["variance"]))
    ] = "learned_range",
    loss: Annotated[
        str, Leaf("mse; or with the term of a learned variance rescaled, or that alone", valid=one_of(OPTIONS["loss"]))
    ] = "mse",
    steps: Annotated[int, Leaf("T", valid=at_least(21))] = 1000,
    weighting: Annotated[str, Leaf("of the squared error", valid=one_of(OPTIONS["weighting"]))] = "uniform",
    gamma: Gamma = None,
    sigma_data: SigmaData = None,
) -> GaussianDiffusion:
    """The linear-schedule process with `steps` original steps, of which `respacing` keeps some: equation (6).

    The defaults are those of DiT, and gamma 5 and sigma_data 0.5. Options: see `GaussianDiffusion` and
    `respaced_steps`. UserError on an unknown one, and on one that nothing reads.
    """
    gamma = resolved("gamma", gamma, 5.0, weighting == "min_snr", "weighting 'min_snr'")
    sigma_data = resolved("sigma_data", sigma_data, 0.5, weighting == "edm", "weighting 'edm'")
    # Also with nothing left out the variances are recovered from ᾱ, so that every process goes through one path.
    kept = np.array(respaced_steps(steps, respacing), np.int64)
    alphas_cumprod = np.cumprod(1.0 - linear_betas(steps))[kept]
    betas = 1.0 - alphas_cumprod / np.append(1.0, alphas_cumprod[:-1])
    return GaussianDiffusion(betas, kept, prediction, variance, loss, steps, weighting, gamma, sigma_data)


def linear_betas(num_steps: int = 1000) -> np.ndarray:
    """β from 1e-4 to 0.02 for 1000 steps (DDPM section 4), both ends scaled by 1000/T for T steps: float64 [T]."""
    scale = 1000 / num_steps if num_steps > 0 else np.inf
    if scale * 0.02 >= 1.0:
        raise UserError(f"the linear schedule needs more than 20 steps, not {num_steps}")
    return np.linspace(scale * 1e-4, scale * 0.02, num_steps, dtype=np.float64)


def respaced_steps(num_steps: int, spec: str) -> list[int]:
    """The original steps, rising, that `spec` keeps of 0, ..., num_steps - 1 (improved DDPM section 4).

    "" keeps all. "250" or "10,15,20" splits the steps into that many nearly equal sections and spreads the given
    number of steps over each, both ends included. "ddim50" takes every i-th step from 0, with the smallest stride i
    that gives 50 (DDIM 2010.02502 appendix D.2). UserError when the spec reads otherwise or cannot be met.
    """
    if not spec:
        return list(range(num_steps))
    if spec.startswith("ddim") and spec[4:].isdecimal():
        return strided_steps(num_steps, int(spec[4:]))
    parts = spec.split(",")
    if not all(part.strip().isdecimal() for part in parts):
        raise UserError(f'respacing {spec!r} is not understood; valid: "", "250", "10,15,20" or "ddim50"')
    base, longer = divmod(num_steps, len(parts))
    kept: set[int] = set()
    start = 0
    for section, count in enumerate(int(part) for part in parts):
        size = base + (section < longer)
        if count > size:
            raise UserError(f"respacing {spec!r} asks for {count} of the {size} steps in section {section}")
        kept.update(start + offset for offset in spread(size, count))
        start += size
    return sorted(kept)


def strided_steps(num_steps: int, count: int) -> list[int]:
    """Every i-th of `num_steps` steps with the smallest stride i >= 1 that gives exactly `count`; else UserError."""
    for stride in range(1, num_steps):
        steps = range(0, num_steps, stride)
        if len(steps) == count:
            return list(steps)
    raise UserError(f"respacing 'ddim{count}': no integer stride gives {count} of {num_steps} steps")


def spread(size: int, count: int) -> list[int]:
    """`count` offsets spread evenly over 0, ..., size - 1, both ends included; one alone is 0."""
    stride = (size - 1) / (count - 1) if count > 1 else 1.0
    offsets, position = [], 0.0
    for _ in range(count):
        offsets.append(round(position))
        position += stride  # summed, not multiplied: the rounding of published samples depends on it
    return offsets


def at(table: np.ndarray, k: jax.Array, like: jax.Array) -> jax.Array:
    """table[k] for steps k [b] as float32 [b, 1, ...], ready to multiply `like` [b, ...]."""
    return jnp.asarray(table, jnp.float32)[k].reshape(-1, *(1,) * (like.ndim - 1))


def mean_per_example(x: jax.Array) -> jax.Array:
    """The mean over all axes but the first: [b, ...] -> [b]."""
    return jnp.mean(x, axis=tuple(range(1, x.ndim)))


def normal_kl(mean1: jax.Array, log_variance1: jax.Array, mean2: jax.Array, log_variance2: jax.Array) -> jax.Array:
    """KL(N(mean1, exp(log_variance1)) || N(mean2, exp(log_variance2))) per element, in nats."""
    return 0.5 * (
        -1.0
        + log_variance2
        - log_variance1
        + jnp.exp(log_variance1 - log_variance2)
        + (mean1 - mean2) ** 2 * jnp.exp(-log_variance2)
    )


def discretized_log_likelihood(x: jax.Array, mean: jax.Array, log_scale: jax.Array) -> jax.Array:
    """Log probability (nats, per element) of the 8-bit bin around x under N(mean, exp(log_scale)²): DDPM eq. 13.

    x lies on the grid of 256 levels over [-1, 1]; the outer bins are open. Latents are not 8-bit images, yet the
    published models were trained with this term on them, so it is kept for an equal loss.

    For the normal distribution the published losses take (1 + tanh(√(2/π) (z + 0.044715 z³))) / 2, which is the
    logistic function F of w = √(8/π) (z + 0.044715 z³). Its difference over a bin from w_0 to w_1 is

        F(w_1) - F(w_0) = F(w_1) F(-w_0) (1 - exp(w_0 - w_1)),

    a product, of which the logarithm is taken term by term, and w_1 - w_0 follows from the width of the bin: so neither
    the value nor the gradient is a small difference of large numbers. What the float32 of the published losses cannot
    tell from 0, below SMALLEST_PROBABILITY, counts as 1e-12 without a gradient, as there.
    """
    inverse_scale = jnp.exp(-log_scale)
    centre, half = inverse_scale * (x - mean), inverse_scale / 255.0
    upper, lower = logistic_argument(centre + half), logistic_argument(centre - half)
    width = 2 * SQRT_8_OVER_PI * half * (1 + 0.044715 * (3 * centre**2 + half**2))
    below, above = jax.nn.log_sigmoid(upper), jax.nn.log_sigmoid(-lower)
    inside = below + above + jnp.log(-jnp.expm1(-width))
    value = jnp.where(x < -0.999, below, jnp.where(x > 0.999, above, inside))
    return jnp.where(value < math.log(SMALLEST_PROBABILITY), math.log(1e-12), value)


def logistic_argument(z: jax.Array) -> jax.Array:
    """w of `discretized_log_likelihood`: the logistic function of it is nearly the normal distribution of z."""
    return SQRT_8_OVER_PI * (z + 0.044715 * z**3)
