"""Autoencoders of latents, from a folder that `convert` wrote, a folder of diffusers, or a file of weights."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from diffjax.errors import UserError
from diffjax.weights import store, tiny_vae, torch_file, unwrap, vae
from diffjax.weights.store import tree_sha256

KINDS = ("VAE", "TinyVAE")
FILES = ("diffusion_pytorch_model.safetensors", "diffusion_pytorch_model.bin")  # in a folder of diffusers


def read(path: Path) -> tuple[Any, Any, str]:
    """(module, parameters as numpy arrays, sha256 of their values) of an autoencoder.

    UserError for a place that is none, and for the weights of something else.
    """
    if (path / "model.json").is_file():
        module, params, made = store.load(path)
        if made["name"] not in KINDS:
            raise UserError(f"{path} holds a {made['name']}, not an autoencoder of latents ({', '.join(KINDS)})")
        return module, params, made["sha256"]
    weights, config = read_folder(path) if path.is_dir() else (unwrap(torch_file.read(path)), {})
    family = tiny_vae if any(key.startswith("encoder.layers.") for key in weights) else vae
    module, params = family.from_reference(weights, **config)
    return module, params, tree_sha256(params)


def read_folder(folder: Path) -> tuple[dict[str, Any], Mapping[str, Any]]:
    """(weights by name, constructor arguments) of a folder of diffusers: config.json and a file of weights."""
    found = next((folder / name for name in FILES if (folder / name).is_file()), None)
    if not found or not (folder / "config.json").is_file():
        raise UserError(
            f"{folder} is no autoencoder: neither a folder that `convert` wrote nor one of diffusers, which holds "
            f"config.json and {' or '.join(FILES)}"
        )
    try:
        config = json.loads((folder / "config.json").read_text())
        if not isinstance(config, dict):
            raise ValueError("not a table of arguments")
    except ValueError as error:
        raise UserError(f"{folder / 'config.json'}: damaged ({error})") from error
    return unwrap(torch_file.read(found)), {name: value for name, value in config.items() if not name.startswith("_")}
