"""The samplers of a discrete process as papers write them, one step at a time: what the package's tables repeat.

(1)  ancestral step, DDPM algorithm 2:   x_{k-1} = mean + [k > 0] exp(log σ_k² / 2) z
(2)  DDIM eq. 12, 16:   x_{k-1} = √ᾱ_{k-1} x̂0 + √(1-ᾱ_{k-1}-s²) eps^ + [k > 0] s z,
                        s = η √((1-ᾱ_{k-1})/(1-ᾱ_k)) √(1-ᾱ_k/ᾱ_{k-1})
"""

import jax.numpy as jnp
import numpy as np


def ddpm_step(process, output, x, k, z, clip):
    """x_{k-1} from x = x_k [b, ..., c], the network's output there, the step k and noise z: equation (1)."""
    p = process.p_mean_variance(output, x, jnp.full(len(x), k), clip)
    return p.mean + (k > 0) * jnp.exp(0.5 * p.log_variance) * z


def ddim_step(process, output, x, k, z, clip, eta=0.0):
    """x_{k-1} by equation (2); of a clipped x̂0 the noise follows, as in the published samplers."""
    steps = jnp.full(len(x), k)
    x0 = process.p_mean_variance(output, x, steps, clip).x0
    eps = process.eps_from_x0(x, steps, x0)
    now, before = process.alphas_cumprod[k], process.alphas_cumprod_prev[k]
    s = eta * np.sqrt((1 - before) / (1 - now)) * np.sqrt(1 - now / before)
    return np.sqrt(before) * x0 + np.sqrt(1 - before - s**2) * eps + (k > 0) * s * z


def loop(process, step, denoise, x, noise, clip):
    """All steps of a process from x, with noise(i) in the i-th."""
    for i in range(process.num_steps):
        k = process.num_steps - 1 - i
        output = denoise(x, process.c_noise(jnp.full(len(x), k)), None)
        x = step(process, output, x, k, noise(jnp.int32(i)), clip)
    return x
