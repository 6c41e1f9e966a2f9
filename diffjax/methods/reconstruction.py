"""Training of the autoencoder of latent diffusion: reconstruction, and a weak pull of the posterior towards a normal.

    loss = mean |x - decode(z)| + kl KL(N(mean, std^2) || N(0, 1)) / pixels,    z = mean + std eps

per image x, the divergence summed over its latent and divided by the values of the image, so that `kl` is the weight of
arXiv 2112.10752 (appendix G), whose perceptual and adversarial terms are not here. Nothing is drawn: `encode` makes
latents of images with what is trained, which `export --family=vae` writes.
"""

import dataclasses
from typing import Annotated, Any

import jax
import jax.numpy as jnp

from diffjax import rng
from diffjax.contracts import Apply, Batch, DataSpec, MakeModel, Method, MethodRecord, Metrics, Tree
from diffjax.errors import UserError
from diffjax.methods.diffusion import mean_of
from diffjax.options import Leaf, at_least, one_of

ERRORS = {"absolute": jnp.abs, "squared": jnp.square}


@dataclasses.dataclass(frozen=True)
class Reconstruction:
    """Section `reconstruction`: what is learned."""

    error: Annotated[str, Leaf("of a pixel value, in [-1, 1]", valid=one_of(ERRORS))] = "absolute"
    kl: Annotated[float, Leaf("weight of the divergence of the posterior", valid=at_least(0))] = 1e-6


@dataclasses.dataclass(frozen=True)
class Sampling:
    """Section `sampling`: nothing is sampled."""


def build(make_model: MakeModel, data: DataSpec, options: Reconstruction) -> Method:
    """The method of a config. Raises UserError for options that contradict each other."""
    if data.name in ("latents", "tokens"):
        raise UserError(f"data.name = {data.name!r}: an autoencoder is trained on images; valid: a source of images")
    if data.augment:
        raise UserError(
            f"data.augment = {data.augment}: an autoencoder is not given how images are augmented; valid: 0"
        )
    model: Any = make_model(channels=data.channels)
    if not hasattr(model, "encode"):
        raise UserError(
            f"method 'reconstruction' trains an autoencoder, which {type(model).__name__} is not; valid: VAE"
        )
    model.check_input(data.size, data.size)
    return Method(
        model=model,
        inputs=(jnp.zeros((1, data.size, data.size, data.channels)),),
        condition=None,
        loss=mean_of(terms := training_terms(options)),
        sampler=None,
        makes="reconstructions",
        terms=terms,
        reconstruct=lambda apply, params, x: apply(params, x),
    )


def training_terms(options: Reconstruction) -> Any:
    """`contracts.Terms`; the reconstruction of evaluation is that of the mean."""

    def terms(
        apply: Apply, params: Tree, frozen: Tree, batch: Batch, key: jax.Array, train: bool = True
    ) -> tuple[Metrics, jax.Array]:
        x = batch.x
        mean, log_variance = apply(params, x, method="encode")
        z = mean
        if train:
            eps = rng.normal(rng.per_example(rng.fold_name(key, "noise"), batch.index), mean.shape[1:])
            z = mean + jnp.exp(log_variance / 2) * eps
        difference = apply(params, z, method="decode") - x
        error = _mean(ERRORS[options.error](difference))
        divergence = _mean(mean**2 + jnp.exp(log_variance) - 1 - log_variance) / 2  # of a value of the latent
        return {
            "loss": error + options.kl * divergence * mean[0].size / x[0].size,
            "error": error,
            "kl": divergence,
            "psnr": 10 * jnp.log10(4 / _mean(difference**2)),
            "latent_square": _mean(mean**2 + jnp.exp(log_variance)),
        }, jnp.zeros(len(x))

    return terms


def _mean(values: jax.Array) -> jax.Array:
    """Per example: [b, h, w, c] -> [b]."""
    return jnp.mean(values, axis=(1, 2, 3))


RECORD = MethodRecord(build, Reconstruction, Sampling)
