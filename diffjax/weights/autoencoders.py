"""Autoencoders of latents, from a folder that `convert` wrote or from where public weights lie."""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

from diffjax.contracts import AutoencoderOptions
from diffjax.errors import UserError
from diffjax.ops.dtypes import DTYPES
from diffjax.options import Leaf, at_least, one_of
from diffjax.weights import checkpoints, store, tiny_vae, unwrap, vae
from diffjax.weights.store import tree_sha256

KINDS = ("VAE", "TinyVAE")
ENCODER = ("encoder", "quant_conv")  # parts of the parameters


@dataclass(frozen=True)
class Autoencoder:
    """The autoencoder of latents."""

    weights: Annotated[
        str,
        Leaf(
            "weights that decode latents to pictures: a file, folder of `convert` or diffusers, name of `fetch`",
            "place",
        ),
    ] = ""
    dtype: Annotated[str, Leaf("in which it encodes and decodes", "compute", one_of(DTYPES))] = "float32"
    tile: Annotated[
        int,
        Leaf(
            "an image of more than tile x tile pixels is decoded in strips of so many, with the same result",
            "compute",
            at_least(0, "whole"),
        ),
    ] = 512


def read(asked: AutoencoderOptions) -> tuple[Any, Any, str]:
    """(module, parameters as numpy arrays, sha256 of their values) of an autoencoder.

    UserError for weights in a place that is none, and for those of something else.
    """
    module, params, sha256 = _read(Path(asked.weights))
    return module.clone(dtype=asked.dtype), params, sha256


def encoder_sha256(params: Any) -> str:
    """sha256 of the half of an autoencoder's parameters that encodes; several decoders may be trained for one."""
    return tree_sha256({name: tree for name, tree in params.items() if name in ENCODER})


def _read(path: Path) -> tuple[Any, Any, str]:
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
