"""Networks that are only used with given weights: autoencoders and feature extractors."""

from typing import Any

import flax.linen as nn

from diffjax.errors import UserError
from diffjax.frozen import dinov2, efficientnet_lite, inception, tiny_vae, vae, vqgan

FAMILIES: dict[str, type[nn.Module]] = {
    "DINOv2": dinov2.DINOv2,
    "VQGAN": vqgan.VQGAN,
    "VAE": vae.VAE,
    "TinyVAE": tiny_vae.TinyVAE,
    "Inception": inception.Inception,
    "EfficientNetLite0": efficientnet_lite.EfficientNetLite0,
}


def create(name: str, **kwargs: Any) -> nn.Module:
    """The network of a family with these constructor arguments; UserError for unknown names and impossible sizes."""
    if name not in FAMILIES:
        raise UserError(f"frozen network {name!r} is unknown; valid: {', '.join(FAMILIES)}")
    try:
        module: Any = FAMILIES[name](**kwargs)
    except TypeError as error:
        raise UserError(f"frozen network {name!r}: {error}".replace("__init__() ", "")) from error
    module.validate()
    return module
