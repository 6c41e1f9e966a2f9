"""Classifier-free guidance (2207.12598): a denoiser made from a labelled one, ready for any sampler.

A network trained with labels dropped at random predicts both given a label c and given none (∅). Moving away from the
second towards the first sharpens the samples. With scale s (s = 1 + w in the paper's w; 1 is no guidance):

    (1)  f_s(x, c) = f(x, ∅) + s (f(x, c) - f(x, ∅))                      eq. 6

It acts on predictions of noise, data, velocity and score alike.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp

from diffjax.diffusion.samplers import Denoise

DenoiseWithLabels = Callable[[jax.Array, jax.Array, jax.Array], jax.Array]


def classifier_free(
    denoise: DenoiseWithLabels,
    labels: jax.Array,
    null_label: int,
    scale: float | jax.Array,
    channels: int | None = None,
) -> Denoise:
    """A guided `denoise(x, t)` from `denoise(x, t, y)`, for labels [b] int32 and the index that means "no label".

    One call on the doubled batch, the conditional row of an example first. Guided are the first `channels` output
    channels, by default as many as x has; the rest (the variance output v) is the conditional one. channels=3 on
    four-channel latents is what the published DiT, SiT and MDT figures were sampled with: keep it for those alone. A
    Python scale of 1 makes a plain conditional call.
    """
    if isinstance(scale, int | float) and scale == 1:
        return lambda x, t: denoise(x, t, labels)
    both_labels = jnp.stack([labels, jnp.full_like(labels, null_label)], axis=1).reshape(-1)

    def guided(x: jax.Array, t: jax.Array) -> jax.Array:
        # The two rows of an example stay neighbours, so that a batch split over devices needs no exchange.
        output = denoise(jnp.repeat(x, 2, axis=0), jnp.repeat(t, 2), both_labels)
        conditional, unconditional = output[0::2], output[1::2]
        return combine(conditional, unconditional, scale, x.shape[-1] if channels is None else channels)

    return guided


def combine(
    conditional: jax.Array, unconditional: jax.Array, scale: float | jax.Array, channels: int | None = None
) -> jax.Array:
    """Equation (1) on the first `channels` of [b, ..., c] (None: all); the others are the conditional ones."""
    base = unconditional[..., :channels]
    guided = base + scale * (conditional[..., :channels] - base)
    return guided if channels is None else jnp.concatenate([guided, conditional[..., channels:]], axis=-1)
