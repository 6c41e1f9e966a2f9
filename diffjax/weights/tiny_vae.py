"""AutoencoderTiny files: madebyollin/taesd and others of diffusers. Layers are numbered along each half."""

import itertools
import re
from collections.abc import Mapping
from typing import Any

import flax.linen as nn
import numpy as np

from diffjax.errors import UserError
from diffjax.frozen import create
from diffjax.frozen.tiny_vae import MAGNITUDE
from diffjax.weights import convolutions, mapping
from diffjax.weights.convolutions import Rows, conv, kernel

# The reference's constructor arguments: those that this network has in one form alone, and those that are not of it.
FIXED = {
    "act_fn": "relu",
    "upsample_fn": "nearest",
    "upsampling_scaling_factor": 2,
    "latent_magnitude": MAGNITUDE,
    "scaling_factor": 1.0,
    "shift_factor": 0.0,
}
ELSEWHERE = ("force_upcast", "latent_shift")
ARGUMENTS = (
    *("in_channels", "out_channels", "latent_channels", "num_encoder_blocks", "num_decoder_blocks"),
    *("encoder_block_out_channels", "decoder_block_out_channels", "block_out_channels"),
)


def from_reference(state_dict: Mapping[str, Any], **config: Any) -> tuple[nn.Module, dict[str, Any]]:
    """The module and its parameters; `config` as in `diffjax.weights.from_reference`. The shapes tell everything."""
    config = {name: value for name, value in config.items() if not name.startswith("_")}  # of a config.json
    mapping.check_names("tiny_vae", config, (*ARGUMENTS, *FIXED, *ELSEWHERE))
    encoder, decoder = (_blocks(state_dict, half) for half in ("encoder", "decoder"))
    table = _table(encoder, decoder)
    sizes = mapping.infer(table, state_dict, convolutions.CONSTANTS)
    mapping.check(table, sizes, state_dict, "tiny_vae")
    widths = [sizes["w"]] * len(encoder)
    inferred: dict[str, Any] = {"in_channels": sizes["c"], "out_channels": sizes["c"], "latent_channels": sizes["z"]}
    inferred |= {"num_encoder_blocks": list(encoder), "num_decoder_blocks": list(decoder)}
    inferred |= {name: widths for name in ARGUMENTS if name.endswith("block_out_channels")}
    given = {name: list(value) if isinstance(value, tuple) else value for name, value in config.items()}
    mapping.check_agreement("tiny_vae", inferred, given)
    for name, value in FIXED.items():
        if name in config and config[name] != value:
            raise UserError(f"tiny_vae: {name} = {config[name]!r} is another network; valid: {value!r}")
    module = create(
        "TinyVAE",
        channels=sizes["c"],
        latent_channels=sizes["z"],
        width=sizes["w"],
        encoder_blocks=encoder,
        decoder_blocks=decoder,
    )
    return module, mapping.to_params(table, sizes, state_dict, "tiny_vae")


def to_reference(module: nn.Module, params: Mapping[str, Any]) -> dict[str, np.ndarray]:
    """The reference's state_dict."""
    model: Any = module
    sizes = convolutions.CONSTANTS | {"c": model.channels, "z": model.latent_channels, "w": model.width}
    return mapping.to_state_dict(_table(model.encoder_blocks, model.decoder_blocks), sizes, params)


def config_of(module: nn.Module) -> dict[str, Any]:
    """The reference's constructor arguments, as diffusers keeps them in config.json."""
    model: Any = module
    widths = [model.width] * len(model.encoder_blocks)
    return {
        "_class_name": "AutoencoderTiny",
        "in_channels": model.channels,
        "out_channels": model.channels,
        "encoder_block_out_channels": widths,
        "decoder_block_out_channels": widths,
        "num_encoder_blocks": list(model.encoder_blocks),
        "num_decoder_blocks": list(model.decoder_blocks),
        "latent_channels": model.latent_channels,
        **FIXED,
    }


def _blocks(state_dict: Mapping[str, Any], half: str) -> tuple[int, ...]:
    """How many blocks each level of a half has: convolutions alone, but the first and last, stand between levels."""
    found = {match[1] for key in state_dict if (match := re.match(rf"{half}\.layers\.(\d+)\.conv\.", key))}
    alone = {match[1] for key in state_dict if (match := re.match(rf"{half}\.layers\.(\d+)\.weight$", key))}
    blocks, between = sorted(map(int, found)), sorted(map(int, alone))[1:-1]
    edges = [-1, *between, max([*blocks, *between], default=0) + 1]
    counts = tuple(sum(low < block < high for block in blocks) for low, high in itertools.pairwise(edges))
    if not blocks or min(counts) < 1:
        raise UserError(f"these are not the weights of a tiny_vae model: no blocks {half}.layers.*.conv in every level")
    return counts


def _table(encoder: tuple[int, ...], decoder: tuple[int, ...]) -> mapping.Table:
    return (*_encoder(encoder), *_decoder(decoder))


def _encoder(blocks: tuple[int, ...]) -> Rows:
    yield from conv("encoder.layers.0", "encoder/conv_in", "c", "w")
    layer = 1
    for level, count in enumerate(blocks):
        if level:
            yield from kernel(f"encoder.layers.{layer}", f"encoder/level_{level}_down", "w", "w")
            layer += 1
        for block in range(count):
            yield from _block(f"encoder.layers.{layer}", f"encoder/level_{level}_block_{block}")
            layer += 1
    yield from conv(f"encoder.layers.{layer}", "encoder/conv_out", "w", "z")


def _decoder(blocks: tuple[int, ...]) -> Rows:
    yield from conv("decoder.layers.0", "decoder/conv_in", "z", "w")
    layer = 2  # after the activation
    for level, count in enumerate(blocks):
        for block in range(count):
            yield from _block(f"decoder.layers.{layer}", f"decoder/level_{level}_block_{block}")
            layer += 1
        if level < len(blocks) - 1:  # after the layer that repeats pixels
            yield from kernel(f"decoder.layers.{layer + 1}", f"decoder/level_{level}_up", "w", "w")
            layer += 2
    yield from conv(f"decoder.layers.{layer}", "decoder/conv_out", "w", "c")


def _block(theirs: str, ours: str) -> Rows:
    for number in range(3):
        yield from conv(f"{theirs}.conv.{2 * number}", f"{ours}/conv{number + 1}", "w", "w")
