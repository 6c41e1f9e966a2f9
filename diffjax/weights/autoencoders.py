"""Autoencoders of latents, from a folder that `convert` wrote or from where public weights lie."""

from pathlib import Path
from typing import Any

from diffjax.errors import UserError
from diffjax.weights import checkpoints, store, tiny_vae, unwrap, vae
from diffjax.weights.store import tree_sha256

KINDS = ("VAE", "TinyVAE")


def read(path: Path) -> tuple[Any, Any, str]:
    """(module, parameters as numpy arrays, sha256 of their values) of an autoencoder.

    UserError for a place that is none, and for the weights of something else.
    """
    if (path / "model.json").is_file():
        module, params, made = store.load(path)
        if made["name"] not in KINDS:
            raise UserError(f"{path} holds a {made['name']}, not an autoencoder of latents ({', '.join(KINDS)})")
        return module, params, made["sha256"]
    found = checkpoints.read(path)
    weights = unwrap(found.content, part=vae.PART)
    family = tiny_vae if any(key.startswith("encoder.layers.") for key in weights) else vae
    module, params = family.from_reference(weights, **found.config)
    return module, params, tree_sha256(params)
