"""The trainable backbones and the table of their published sizes."""

import dataclasses
from dataclasses import dataclass, field
from typing import Any

import flax.linen as nn

from diffjax.errors import UserError, did_you_mean
from diffjax.frozen import vae
from diffjax.models import diffit, diffit_unet, digit, dis, dit, udit
from diffjax.options import Option, options

FAMILIES: dict[str, type[nn.Module]] = {
    "DiT": dit.DiT,
    "DiS": dis.DiS,
    "U-DiT": udit.UDiT,
    "DiffiT": diffit.DiffiT,
    "DiffiT-UNet": diffit_unet.DiffiTUNet,
    "DiGIT": digit.DiGIT,
    "VAE": vae.VAE,  # trained, too, by method reconstruction
}


@dataclass(frozen=True)
class PublishedModel:
    """A published size: constructor arguments and what is known of it, for 32 x 32 x 4 latents and 1000 classes.

    DiffiT-XL/2-512 is for latents of 64 x 64 x 4, DiffiT-CIFAR10 and -FFHQ64 for images of 32 x 32 x 3 and 64 x 64 x 3
    without classes. DiGIT is for sequences of 256 tokens (256 more of the source in stage 2), without classes.

    Attributes:
        params: trainable parameters (DiT's frozen position table not counted).
        gmacs: multiply-accumulates of the matrix products of one forward pass, in 1e9; what the DiT papers print as
            GFLOPs. For DiS they are ours: its scans and depthwise convolutions (2 d_state and d_conv per channel,
            token and direction) are not among them, and the figures of its paper could not be checked.
        deploy_params, deploy_gmacs: the same of the fused form, for models that have one; what the U-DiT paper prints
            of S, B and L (52.05 M and 6.04, 204.43 M and 22.22, 810.19 M and 85.00), while what is trained is larger.
            Its depthwise convolutions are counted.
    """

    family: str
    params: int
    gmacs: float
    paper: str
    kwargs: dict[str, Any] = field(default_factory=dict)
    deploy_params: int | None = None
    deploy_gmacs: float | None = None


def _dit(size: str, patch: int, params: int, gmacs: float) -> PublishedModel:
    depth, width, heads = dit.SIZES[size]
    kwargs = {"patch": patch, "depth": depth, "width": width, "heads": heads}
    return PublishedModel("DiT", params, gmacs, "arXiv 2212.09748", kwargs)


def _dis(size: str, patch: int, params: int, gmacs: float) -> PublishedModel:
    depth, width = dis.SIZES[size]
    return PublishedModel("DiS", params, gmacs, "arXiv 2402.05608", {"patch": patch, "depth": depth, "width": width})


def _udit(size: str, params: int, gmacs: float, deploy_params: int, deploy_gmacs: float) -> PublishedModel:
    width, heads, depth = udit.SIZES[size]
    kwargs = {"width": width, "heads": heads, "depth": depth}
    return PublishedModel("U-DiT", params, gmacs, "arXiv 2405.02730", kwargs, deploy_params, deploy_gmacs)


def _diffit(size: str, window: int, params: int, gmacs: float) -> PublishedModel:
    depth, width, heads = diffit.SIZES[size]
    kwargs = {"patch": 2, "depth": depth, "width": width, "heads": heads, "window": window}
    return PublishedModel("DiffiT", params, gmacs, "arXiv 2312.02139", kwargs)


def _diffit_unet(size: str, params: int, gmacs: float) -> PublishedModel:
    widths, depth, window, dropout = diffit_unet.SIZES[size]
    kwargs = {"widths": widths, "depth": depth, "window": window, "dropout": dropout}
    return PublishedModel("DiffiT-UNet", params, gmacs, "arXiv 2312.02139", kwargs)


def _digit(size: str, params: int, gmacs: float, **kwargs: Any) -> PublishedModel:
    depth, width, heads, vocabulary = digit.SIZES[size]
    sizes = {"vocabulary": vocabulary, "depth": depth, "width": width, "heads": heads, "norm": "post"}
    return PublishedModel("DiGIT", params, gmacs, "arXiv 2410.12490", sizes | kwargs)


def _digit_stage2(size: str, causal: bool, params: int, gmacs: float) -> PublishedModel:
    source = {"vocabulary": digit.VQGAN_VOCABULARY, "source_vocabulary": digit.SIZES[size][-1]}
    return _digit(size, params, gmacs, **source, norm="pre", causal=causal)


MODELS: dict[str, PublishedModel] = {
    "DiT-S/2": _dit("S", 2, 32_865_056, 6.06),
    "DiT-S/4": _dit("S", 4, 32_920_448, 1.41),
    "DiT-S/8": _dit("S", 8, 33_142_016, 0.36),
    "DiT-B/2": _dit("B", 2, 130_315_808, 23.01),
    "DiT-B/4": _dit("B", 4, 130_426_496, 5.56),
    "DiT-B/8": _dit("B", 8, 130_869_248, 1.42),
    "DiT-L/2": _dit("L", 2, 457_840_672, 80.71),
    "DiT-L/4": _dit("L", 4, 457_988_224, 19.70),
    "DiT-L/8": _dit("L", 8, 458_578_432, 5.01),
    "DiT-XL/2": _dit("XL", 2, 674_834_720, 118.64),
    "DiT-XL/4": _dit("XL", 4, 675_000_704, 29.05),
    "DiT-XL/8": _dit("XL", 8, 675_664_640, 7.39),
    "DiS-S/2": _dis("S", 2, 29_132_752, 6.83),
    "DiS-S/4": _dis("S", 4, 29_115_184, 1.75),
    "DiS-S/8": _dis("S", 8, 29_309_872, 0.48),
    "DiS-B/2": _dis("B", 2, 121_163_552, 29.03),
    "DiS-B/4": _dis("B", 4, 121_126_784, 7.44),
    "DiS-B/8": _dis("B", 8, 121_532_672, 2.04),
    "DiS-M/2": _dis("M", 2, 231_414_560, 57.03),
    "DiS-M/4": _dis("M", 4, 231_377_792, 14.60),
    "DiS-M/8": _dis("M", 8, 231_783_680, 3.99),
    "DiS-L/2": _dis("L", 2, 407_249_952, 100.83),
    "DiS-L/4": _dis("L", 4, 407_200_896, 25.81),
    "DiS-L/8": _dis("L", 8, 407_741_952, 7.06),
    "DiS-H/2": _dis("H", 2, 906_966_560, 225.62),
    "DiS-H/4": _dis("H", 4, 906_892_928, 57.75),
    "DiS-H/8": _dis("H", 8, 907_704_320, 15.78),
    "U-DiT-T": _udit("T", 9_098_176, 1.597, 8_110_144, 1.389),
    "U-DiT-S": _udit("S", 58_896_568, 7.129, 52_045_240, 6.021),
    "U-DiT-B": _udit("B", 231_251_304, 26.509, 204_425_064, 22.179),
    "U-DiT-L": _udit("L", 916_335_304, 102.025, 810_188_488, 84.909),
    "DiffiT-XL/2": _diffit("XL", 16, 561_035_232, 118.51),
    "DiffiT-XL/2-512": _diffit("XL", 32, 562_382_816, 524.42),
    "DiffiT-CIFAR10": _diffit_unet("CIFAR10", 28_702_339, 7.36),
    "DiffiT-CIFAR10_l2": _diffit_unet("CIFAR10_l2", 15_880_771, 4.33),
    "DiffiT-CIFAR10_w256": _diffit_unet("CIFAR10_w256", 39_642_659, 16.42),
    "DiffiT-FFHQ64": _diffit_unet("FFHQ64", 44_835_779, 32.21),
    "DiffiT-FFHQ64_l2": _diffit_unet("FFHQ64_l2", 23_810_395, 15.95),
    "DiGIT-B": _digit("B", 219_377_664, 56.06),
    "DiGIT-L": _digit("L", 731_879_424, 185.96),
    "DiGIT-B-stage2-AR": _digit_stage2("B", True, 214_144_000, 112.17),
    "DiGIT-B-stage2-NAR": _digit_stage2("B", False, 214_144_000, 112.17),
    "DiGIT-L-stage2-AR": _digit_stage2("L", True, 711_446_016, 368.38),
    "DiGIT-L-stage2-NAR": _digit_stage2("L", False, 711_446_016, 368.38),
    "DiGIT-B-VQ": _digit("B", 204_699_648, 54.18, vocabulary=digit.VQGAN_VOCABULARY, norm="pre"),
}


FREE = ("dropout",)  # published with the sizes, and of no shape


def create(name: str, **kwargs: Any) -> nn.Module:
    """The backbone of a published name ("DiT-XL/2", "dit-xl-2") or of a family ("DiT", every size given).

    Args:
        name: case does not matter, nor do "-" and "/".
        kwargs: constructor arguments; they win over those of the published size.

    Raises:
        UserError: unknown name or argument, a missing size, or values that exclude each other.
    """
    family, arguments = _resolve(name)
    module = FAMILIES[family]
    valid = [f for f in module.__dataclass_fields__ if f not in ("parent", "name")]
    if unknown := sorted(set(kwargs) - set(valid)):
        raise UserError(f"model {name!r} has no argument {', '.join(unknown)}; valid: {', '.join(valid)}")
    try:
        model = module(**{**arguments, **kwargs})
    except TypeError as error:
        raise UserError(f"model {name!r}: {error}".replace("__init__() ", "")) from error
    model.validate()
    return model


def family_of(name: str) -> str:
    """The family that a published name belongs to; of a family's own name the name as `FAMILIES` has it."""
    return _resolve(name)[0]


def option_table(name: str) -> dict[str, Option]:
    """The options of a published model, its sizes as defaults, or of a family, whose sizes have none.

    The fields that follow from the data and the training method (channels, classes ...) are not among them.

    Raises:
        UserError: unknown name.
    """
    family, sizes = _resolve(name)
    table = options(FAMILIES[family])
    return {key: dataclasses.replace(option, default=sizes.get(key, option.default)) for key, option in table.items()}


def published_sizes(name: str) -> dict[str, Any]:
    """The sizes of a published name, by option; {} for a family."""
    family, sizes = _resolve(name)
    return {key: value for key, value in sizes.items() if key in options(FAMILIES[family]) and key not in FREE}


def arguments(name: str) -> set[str]:
    """The constructor arguments of a published name's or family's backbone."""
    return {field for field in FAMILIES[family_of(name)].__dataclass_fields__ if field not in ("parent", "name")}


def fused(model: nn.Module, params: Any) -> tuple[nn.Module, Any]:
    """The same function of (x, t, y) with fewer parameters, for models that are deployed so; others as they are.

    Of U-DiT, arXiv 2405.02730: exact but for rounding.
    """
    if isinstance(model, udit.UDiT):
        return model.fused(), udit.fuse(params)
    return model, params


def _resolve(name: str) -> tuple[str, dict[str, Any]]:
    wanted = _normal(name)
    for family in FAMILIES:
        if wanted == _normal(family):
            return family, {}
    for published, row in MODELS.items():
        if wanted == _normal(published):
            return row.family, row.kwargs
    valid = [*FAMILIES, *MODELS]
    raise UserError(f"model {name!r} is unknown{did_you_mean(name, valid) or '; valid: ' + ', '.join(valid)}")


def _normal(name: str) -> str:
    return name.lower().replace("/", "").replace("-", "")
