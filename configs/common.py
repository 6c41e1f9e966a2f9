"""What recipes share: see diffjax/config/recipes.py, which a recipe outside this folder finds under this name, too."""

from diffjax.config.recipes import (
    DIFFIT_GUIDANCE,
    SIZES,
    SMALL,
    UNET,
    backbone,
    base,
    digit_recipe,
    dis_recipe,
    dit_recipe,
    edm_recipe,
    imagenet_latents,
    parse,
    published,
    run_local,
    tfds_images,
    token_data,
)

__all__ = [
    "DIFFIT_GUIDANCE",
    "SIZES",
    "SMALL",
    "UNET",
    "backbone",
    "base",
    "digit_recipe",
    "dis_recipe",
    "dit_recipe",
    "edm_recipe",
    "imagenet_latents",
    "parse",
    "published",
    "run_local",
    "tfds_images",
    "token_data",
]
