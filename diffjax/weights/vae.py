"""AutoencoderKL files: stabilityai/sd-vae-ft-ema, sd-vae-ft-mse and others of diffusers, and those of CompVis.

Three layouts are read: the names of diffusers, those that its attention had before, and those of CompVis's
latent-diffusion, also inside a whole model under "first_stage_model.". `to_reference` writes the first.
"""

import re
from collections.abc import Mapping, Sequence
from typing import Any

import flax.linen as nn
import numpy as np

from diffjax.errors import UserError
from diffjax.frozen import create
from diffjax.weights import convolutions, mapping
from diffjax.weights.convolutions import KERNEL1, Rows, axis, conv, linear, norm

PART = "first_stage_model."  # in a whole latent diffusion model
LOSS = "loss."  # the discriminator, in a checkpoint of the autoencoder's training

# (pattern, replacement) of CompVis's names, in this order; "{up}" counts from the other side
COMPVIS = (
    (r"\.nin_shortcut\.", ".conv_shortcut."),
    (r"^(encoder|decoder)\.norm_out\.", r"\1.conv_norm_out."),
    (r"^encoder\.down\.(\d+)\.block\.", r"encoder.down_blocks.\1.resnets."),
    (r"^encoder\.down\.(\d+)\.downsample\.", r"encoder.down_blocks.\1.downsamplers.0."),
    (r"\.mid\.block_1\.", ".mid_block.resnets.0."),
    (r"\.mid\.block_2\.", ".mid_block.resnets.1."),
    (r"\.mid\.attn_1\.norm\.", ".mid_block.attentions.0.group_norm."),
    (r"\.mid\.attn_1\.([qkv])\.", r".mid_block.attentions.0.to_\1."),
    (r"\.mid\.attn_1\.proj_out\.", ".mid_block.attentions.0.to_out.0."),
)
UP = re.compile(r"^decoder\.up\.(\d+)\.(block|upsample)\.")
EARLIER = {"query": "to_q", "key": "to_k", "value": "to_v", "proj_attn": "to_out.0"}  # names of diffusers' attention

# The reference's constructor arguments: those that this network has in one form alone, and those that are not of it.
FIXED = {"act_fn": "silu", "latents_mean": None, "latents_std": None}
ELSEWHERE = ("sample_size", "force_upcast")
ARGUMENTS = (
    *("in_channels", "out_channels", "down_block_types", "up_block_types", "block_out_channels", "layers_per_block"),
    *("latent_channels", "norm_num_groups", "scaling_factor", "shift_factor", "use_quant_conv", "use_post_quant_conv"),
    "mid_block_add_attention",
)
SCALE, GROUPS = 0.18215, 32  # the reference's defaults


def from_reference(state_dict: Mapping[str, Any], **config: Any) -> tuple[nn.Module, dict[str, Any]]:
    """The module and its parameters; `config` as in `diffjax.weights.from_reference`.

    Shapes tell neither the groups of the norms nor the scale and shift of latents: without `norm_num_groups`,
    `scaling_factor` and `shift_factor` they are 32, 0.18215 and 0.
    """
    config = {name: value for name, value in config.items() if not name.startswith("_")}  # of a config.json
    mapping.check_names("vae", config, (*ARGUMENTS, *FIXED, *ELSEWHERE))
    weights = renamed(state_dict)
    levels, depth = (
        _count(weights, r"encoder\.down_blocks\.(\d+)\."),
        _count(weights, r"encoder\.\w+\.0\.resnets\.(\d+)"),
    )
    quant, attends = "quant_conv.weight" in weights, any(".attentions." in key for key in weights)
    sizes = mapping.infer(_table(levels, depth, quant, attends, {}), weights, convolutions.CONSTANTS)
    table = _table(levels, depth, quant, attends, sizes)
    mapping.check(table, sizes, weights, "vae")
    widths = [sizes[axis(level)] for level in range(levels)]
    _check_arguments(config, sizes, widths, depth, quant, attends)
    module = create(
        "VAE",
        channels=sizes["c"],
        latent_channels=sizes["z"],
        widths=tuple(widths),
        depth=depth,
        groups=config.get("norm_num_groups", GROUPS),
        quant=quant,
        attention=attends,
        scale=config.get("scaling_factor", SCALE),
        shift=config.get("shift_factor") or 0.0,
    )
    return module, mapping.to_params(table, sizes, weights, "vae")


def to_reference(module: nn.Module, params: Mapping[str, Any]) -> dict[str, np.ndarray]:
    """The reference's state_dict, with the names of diffusers."""
    model: Any = module
    sizes = convolutions.CONSTANTS | {axis(level): width for level, width in enumerate(model.widths)}
    sizes |= {"c": model.channels, "z": model.latent_channels, "m": 2 * model.latent_channels}
    return mapping.to_state_dict(
        _table(len(model.widths), model.depth, model.quant, model.attention, sizes), sizes, params
    )


def config_of(module: nn.Module) -> dict[str, Any]:
    """The reference's constructor arguments, as diffusers keeps them in config.json."""
    model: Any = module
    levels = len(model.widths)
    return {
        "_class_name": "AutoencoderKL",
        "in_channels": model.channels,
        "out_channels": model.channels,
        "down_block_types": ["DownEncoderBlock2D"] * levels,
        "up_block_types": ["UpDecoderBlock2D"] * levels,
        "block_out_channels": list(model.widths),
        "layers_per_block": model.depth,
        "act_fn": FIXED["act_fn"],
        "latent_channels": model.latent_channels,
        "norm_num_groups": model.groups,
        "scaling_factor": model.scale,
        "shift_factor": model.shift or None,
        "use_quant_conv": model.quant,
        "use_post_quant_conv": model.quant,
        "mid_block_add_attention": model.attention,
    }


def renamed(state_dict: Mapping[str, Any]) -> dict[str, Any]:
    """The weights of the autoencoder by the names of diffusers, of any of the three layouts."""
    weights = {key: value for key, value in state_dict.items() if not key.startswith(LOSS)}
    up = [int(match[1]) for key in weights if (match := UP.match(key))]
    return {_renamed(key, max(up, default=0)): _as_linear(key, value) for key, value in weights.items()}


def _renamed(key: str, last: int) -> str:
    if match := UP.match(key):
        place = "resnets" if match[2] == "block" else "upsamplers.0"
        key = UP.sub(f"decoder.up_blocks.{last - int(match[1])}.{place}.", key)
    for pattern, replacement in COMPVIS:
        key = re.sub(pattern, replacement, key)
    return re.sub(
        r"(\.attentions\.0\.)(query|key|value|proj_attn)\.", lambda match: f"{match[1]}{EARLIER[match[2]]}.", key
    )


def _as_linear(key: str, value: Any) -> Any:
    """CompVis's attention has 1 x 1 convolutions [out, in, 1, 1] in place of linear maps [out, in]."""
    shape = getattr(value, "shape", ())
    if re.search(r"\.mid\.attn_1\.(q|k|v|proj_out)\.weight$", key) and len(shape) == 4 and shape[2:] == (1, 1):
        return np.asarray(value).reshape(shape[:2])
    return value


def _check_arguments(
    config: Mapping[str, Any], sizes: mapping.Sizes, widths: Sequence[int], depth: int, quant: bool, attends: bool
) -> None:
    """UserError for what contradicts the weights, and for forms of the network that are not this one."""
    if sizes["m"] != 2 * sizes["z"]:
        raise UserError(f"vae: {sizes['m']} channels of moments for latents of {sizes['z']}; valid: twice as many")
    inferred: dict[str, Any] = {"in_channels": sizes["c"], "out_channels": sizes["c"], "latent_channels": sizes["z"]}
    inferred |= {"block_out_channels": list(widths), "layers_per_block": depth, "mid_block_add_attention": attends}
    inferred |= {"use_quant_conv": quant, "use_post_quant_conv": quant}
    inferred |= {"down_block_types": ["DownEncoderBlock2D"] * len(widths)}
    inferred |= {"up_block_types": ["UpDecoderBlock2D"] * len(widths)}
    given = {name: list(value) if isinstance(value, tuple) else value for name, value in config.items()}
    mapping.check_agreement("vae", inferred, given)
    for name, value in FIXED.items():
        if name in config and config[name] != value:
            raise UserError(f"vae: {name} = {config[name]!r} is another network; valid: {value!r}")


def _count(weights: Mapping[str, Any], pattern: str) -> int:
    """How many indices the keys have at a position; 1 where there are no keys, which are then reported as missing."""
    return len({match[1] for key in weights if (match := re.match(pattern, key))}) or 1


def _table(levels: int, depth: int, quant: bool, attends: bool, sizes: mapping.Sizes) -> mapping.Table:
    """The rows of a network of these sizes; without sizes no row is of a shortcut, which would tell nothing new."""
    names = [axis(level) for level in range(levels)]
    quants = (
        *conv("quant_conv", "quant_conv", "m", "m", KERNEL1),
        *conv("post_quant_conv", "post_quant_conv", "z", "z", KERNEL1),
    )
    return (
        *conv("encoder.conv_in", "encoder/conv_in", "c", names[0]),
        *_encoder(names, depth, sizes),
        *_middle("encoder", names[-1], attends),
        *_end("encoder", names[-1], "m"),
        *(quants if quant else ()),
        *conv("decoder.conv_in", "decoder/conv_in", "z", names[-1]),
        *_middle("decoder", names[-1], attends),
        *_decoder(names, depth, sizes),
        *_end("decoder", names[0], "c"),
    )


def _encoder(names: Sequence[str], depth: int, sizes: mapping.Sizes) -> Rows:
    for level, name in enumerate(names):
        theirs, ours = f"encoder.down_blocks.{level}", f"encoder/level_{level}"
        for block in range(depth):
            inner = names[max(level - 1, 0)] if block == 0 else name
            yield from _block(f"{theirs}.resnets.{block}", f"{ours}_block_{block}", inner, name, sizes)
        if level < len(names) - 1:
            yield from conv(f"{theirs}.downsamplers.0.conv", f"{ours}_down", name, name)


def _decoder(names: Sequence[str], depth: int, sizes: mapping.Sizes) -> Rows:
    last = len(names) - 1
    for level, name in enumerate(names):
        theirs, ours = f"decoder.up_blocks.{last - level}", f"decoder/level_{level}"
        for block in range(depth + 1):
            inner = names[min(level + 1, last)] if block == 0 else name
            yield from _block(f"{theirs}.resnets.{block}", f"{ours}_block_{block}", inner, name, sizes)
        if level:
            yield from conv(f"{theirs}.upsamplers.0.conv", f"{ours}_up", name, name)


def _middle(half: str, width: str, attends: bool) -> Rows:
    theirs, ours = f"{half}.mid_block", f"{half}/middle"
    for block in range(2):
        yield from _block(f"{theirs}.resnets.{block}", f"{ours}/block_{block + 1}", width, width, {})
    if attends:
        yield from norm(f"{theirs}.attentions.0.group_norm", f"{ours}/attention/norm", width)
        for name, place in (("to_q", "query"), ("to_k", "key"), ("to_v", "value"), ("to_out.0", "out")):
            yield from linear(f"{theirs}.attentions.0.{name}", f"{ours}/attention/{place}", width)


def _block(theirs: str, ours: str, inner: str, outer: str, sizes: mapping.Sizes) -> Rows:
    for number, width in ((1, inner), (2, outer)):
        yield from norm(f"{theirs}.norm{number}", f"{ours}/norm{number}", width)
        yield from conv(f"{theirs}.conv{number}", f"{ours}/conv{number}", width, outer)
    if sizes.get(inner) != sizes.get(outer):
        yield from conv(f"{theirs}.conv_shortcut", f"{ours}/shortcut", inner, outer, KERNEL1)


def _end(half: str, inner: str, outer: str) -> Rows:
    yield from norm(f"{half}.conv_norm_out", f"{half}/norm_out", inner)
    yield from conv(f"{half}.conv_out", f"{half}/conv_out", inner, outer)
