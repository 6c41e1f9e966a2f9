"""Samplers of a Gaussian diffusion: DDPM 2006.11239, DDIM 2010.02502.

Each sampler is a pure single step and a loop of it (`lax.fori_loop`, so the network is compiled once per shape; call it
under `jax.jit`). `denoise(xt, t)` is the network with everything else bound: xt [b, ..., c], t float32 [b] the original
step -> [b, ..., c or 2c]. `noise(k)` gives the standard normal values [b, ..., c] of loop index k, an int32 scalar.

    (1)  ancestral step, DDPM algorithm 2:   x_{k-1} = mean + [k > 0] exp(log σ_k² / 2) z
    (2)  DDIM eq. 12, 16:   x_{k-1} = √ᾱ_{k-1} x̂0 + √(1-ᾱ_{k-1}-s²) eps^ + [k > 0] s z,
                            s = η √((1-ᾱ_{k-1})/(1-ᾱ_k)) √(1-ᾱ_k/ᾱ_{k-1})
    (3)  DDIM eq. 14, the step of η = 0 taken upwards:   x_{k+1} = √ᾱ_{k+1} x̂0 + √(1-ᾱ_{k+1}) eps^

η = 0 is deterministic; η = 1 has the variance β~ of the DDPM posterior.
"""

from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp

from diffjax import rng
from diffjax.diffusion.gaussian import GaussianDiffusion, at
from diffjax.errors import UserError

Denoise = Callable[[jax.Array, jax.Array], jax.Array]
Noise = Callable[[jax.Array], jax.Array]


def initial_noise(keys: jax.Array, shape: Sequence[int]) -> jax.Array:
    """Where sampling starts: standard normal float32 [b, *shape], sample i from keys[i] alone."""
    return rng.normal(rng.fold_name(keys, "x_T"), shape)


def step_noise(keys: jax.Array, shape: Sequence[int]) -> Noise:
    """The `noise` of a sampler: standard normal float32 [b, *shape] at each k, sample i from (keys[i], k) alone."""
    streams = rng.fold_name(keys, "noise")
    return lambda k: rng.normal(rng.fold(streams, k), shape)


def ddpm(process: GaussianDiffusion, denoise: Denoise, x: jax.Array, noise: Noise, *, clip: bool = False) -> jax.Array:
    """Samples x0 [b, ..., c] float32 from x = x_{K-1} ~ N(0, I) by K ancestral steps: equation (1)."""

    def step(k: jax.Array, x: jax.Array) -> jax.Array:
        steps = jnp.full(x.shape[0], k)
        return ddpm_step(process, denoise(x, process.model_time(steps)), x, steps, noise(k), clip=clip)

    return downwards(process, step, x)


def ddim(
    process: GaussianDiffusion,
    denoise: Denoise,
    x: jax.Array,
    noise: Noise | None = None,
    *,
    eta: float = 0.0,
    clip: bool = False,
) -> jax.Array:
    """Samples x0 [b, ..., c] float32 from x = x_{K-1} ~ N(0, I) by K steps of (2); eta > 0 needs `noise`."""
    if eta > 0 and noise is None:
        raise UserError(f"DDIM with eta {eta} is random and needs noise; give noise, or eta 0")

    def step(k: jax.Array, x: jax.Array) -> jax.Array:
        steps = jnp.full(x.shape[0], k)
        z = noise(k) if noise is not None and eta > 0 else None
        return ddim_step(process, denoise(x, process.model_time(steps)), x, steps, z, eta=eta, clip=clip)

    return downwards(process, step, x)


def ddim_reverse(process: GaussianDiffusion, denoise: Denoise, x: jax.Array, *, clip: bool = False) -> jax.Array:
    """The x_{K-1} from which deterministic `ddim` returns to x = x_0 [b, ..., c]: K - 1 steps of (3)."""

    def step(k: jax.Array, x: jax.Array) -> jax.Array:
        steps = jnp.full(x.shape[0], k)
        return ddim_reverse_step(process, denoise(x, process.model_time(steps)), x, steps, clip=clip)

    return jax.lax.fori_loop(0, process.num_steps - 1, step, x.astype(jnp.float32))


def downwards(process: GaussianDiffusion, step: Callable[[jax.Array, jax.Array], jax.Array], x: jax.Array) -> jax.Array:
    """x carried through step(k, x) for k = K-1, ..., 0, in float32."""
    last = process.num_steps - 1
    return jax.lax.fori_loop(0, process.num_steps, lambda i, x: step(last - i, x), x.astype(jnp.float32))


def ddpm_step(
    process: GaussianDiffusion,
    model_output: jax.Array,
    xt: jax.Array,
    k: jax.Array,
    z: jax.Array,
    *,
    clip: bool = False,
) -> jax.Array:
    """x_{k-1} from xt = x_k [b, ..., c], the network's output there, k [b] int32 and noise z: equation (1)."""
    p = process.p_mean_variance(model_output, xt, k, clip)
    return p.mean + not_first(k, xt) * jnp.exp(0.5 * p.log_variance) * z


def ddim_step(
    process: GaussianDiffusion,
    model_output: jax.Array,
    xt: jax.Array,
    k: jax.Array,
    z: jax.Array | None = None,
    *,
    eta: float = 0.0,
    clip: bool = False,
) -> jax.Array:
    """x_{k-1} from xt = x_k [b, ..., c], the network's output there and k [b] int32: equation (2). A v is ignored."""
    x0 = process.p_mean_variance(model_output, xt, k, clip).x0
    eps = process.eps_from_x0(xt, k, x0)  # of the clipped x0, as in the published samplers
    now, before = at(process.alphas_cumprod, k, xt), at(process.alphas_cumprod_prev, k, xt)
    sigma = eta * jnp.sqrt((1.0 - before) / (1.0 - now)) * jnp.sqrt(1.0 - now / before)
    mean = x0 * jnp.sqrt(before) + jnp.sqrt(1.0 - before - sigma**2) * eps
    return mean if z is None else mean + not_first(k, xt) * sigma * z


def ddim_reverse_step(
    process: GaussianDiffusion, model_output: jax.Array, xt: jax.Array, k: jax.Array, *, clip: bool = False
) -> jax.Array:
    """x_{k+1} from xt = x_k [b, ..., c], the network's output there and k [b] int32: equation (3)."""
    x0 = process.p_mean_variance(model_output, xt, k, clip).x0
    eps = process.eps_from_x0(xt, k, x0)
    after = at(process.alphas_cumprod_next, k, xt)
    return x0 * jnp.sqrt(after) + jnp.sqrt(1.0 - after) * eps


def not_first(k: jax.Array, like: jax.Array) -> jax.Array:
    """0 where k is 0, which ends the chain without noise, else 1: float32 [b, 1, ...]."""
    return (k != 0).astype(jnp.float32).reshape(-1, *(1,) * (like.ndim - 1))
