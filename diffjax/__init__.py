"""diffjax: diffusion and token backbones for image generation under one recipe, in JAX and Flax Linen."""

__version__ = "0.2.0"
