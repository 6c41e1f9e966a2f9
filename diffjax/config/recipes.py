"""Helpers that recipes share: the argument string, backbones, data sets, and published settings.

A recipe imports this module as `configs.common`, wherever it lies; also where diffjax is installed without `configs`.
It calls `parse` to read what stands after the colon of `--config=configs/recipe.py:model=dit-b,runlocal`, takes
`base()`, all leaves at their defaults, and sets what its paper says. `python -m diffjax train --help-config` lists the
leaves. Afterwards any of them can be overridden: `--config.optim.lr=2e-4`.
"""

from collections.abc import Mapping
from typing import Any

from ml_collections import ConfigDict

from diffjax.config.load import base, model_defaults
from diffjax.errors import did_you_mean

# How names start, and a model of the family that is small enough for two steps on a laptop.
SIZES = ("patch", "depth", "width", "heads")
UNET = {"widths": (16, 32), "depth": (1, 1), "groups": 8, "head_width": 16}
SMALL: dict[str, dict[str, Any]] = {
    "digit": {"name": "DiGIT", "depth": 2, "width": 48, "heads": 3},
    "dit": {"name": "DiT-S/8"},
    "dis": {"name": "DiS-S/8"},
    "udit": {"name": "U-DiT-T"},
    "diffitxl2": {"name": "DiffiT", "patch": 2, "depth": 2, "width": 96, "heads": 4},
    "diffitcifar10": {"name": "DiffiT-UNet", **UNET},
    "diffitffhq64": {"name": "DiffiT-UNet", **UNET},
}


# Scale and schedule of DiffiT's published samples, by the side of its latents.
DIFFIT_GUIDANCE = {32: (4.4, "power_cosine"), 64: (1.49, "constant")}

EARLIER = {"codes": "vocabulary"}  # arguments of recipes that had another name


def parse(arg: str | None, **defaults: Any) -> ConfigDict:
    """Read "name=value,name=value,switch" against declared defaults, whose types the values take.

    Raises:
        ValueError: an undeclared name, or a value that is not of the declared type.
    """
    options = dict(defaults)
    for item in filter(None, (arg or "").split(",")):
        name, _, text = item.partition("=")
        name = EARLIER.get(name, name)
        if name not in defaults:
            near = did_you_mean(name, defaults)
            raise ValueError(f"config argument {name!r} is unknown{near or '; valid: ' + ', '.join(defaults)}")
        options[name] = _value(name, text, type(defaults[name]))
    return ConfigDict(options)


def _value(name: str, text: str, kind: type) -> Any:
    if kind is bool:
        if text.lower() not in ("", "true", "false"):
            raise ValueError(f"config argument {name}={text!r}: valid: true, false, or the bare name")
        return text.lower() != "false"
    try:
        return kind(text)
    except ValueError:
        raise ValueError(f"config argument {name}={text!r} is not of type {kind.__name__}") from None


def backbone(c: ConfigDict, name: str, **sizes: Any) -> None:
    """A published model, by a name such as "dit-xl-2", "U-DiT-B" or "udit-b"; or a family with sizes of your own."""
    c.model = ConfigDict({**model_defaults(name), **sizes, "name": name})


def published(c: ConfigDict, name: str) -> None:
    """A published model of one of the families that recipes know, with its options."""
    _family(name)
    backbone(c, name)


def _family(name: str) -> str:
    plain = name.lower().replace("-", "").replace("/", "")
    for family in SMALL:
        if plain.startswith(family):
            return family
    raise ValueError(f"config argument model={name!r}: valid: published names, of {', '.join(SMALL)}")


def imagenet_latents(c: ConfigDict, pixels: int) -> None:
    """Autoencoder latents of ImageNet at 256 or 512 pixels, in records; they are no pictures to look at."""
    if pixels not in (256, 512):
        raise ValueError(f"config argument pixels={pixels}: valid: 256, 512")
    c.data.name = "latents"
    c.data.dir, c.data.split = f"data/imagenet{pixels}-latents", ""
    c.data.size, c.data.channels, c.data.num_classes = pixels // 8, 4, 1000
    c.data.workers, c.data.threads = 4, 4
    c.evals.samples.every_steps = 0


def tfds_images(c: ConfigDict, dataset: str, size: int, num_classes: int) -> None:
    """Colour images of a data set that tensorflow-datasets has prepared; those of another size are cropped."""
    c.data.name, c.data.dataset, c.data.dir = "tfds", dataset, "data/tfds"
    c.data.size, c.data.channels, c.data.num_classes = size, 3, num_classes


def dit_recipe(c: ConfigDict) -> None:
    """Settings of DiT and U-DiT for ImageNet latents: 400K steps at a constant rate, flipped images."""
    c.total_steps, c.batch_size = 400_000, 256
    c.model.dtype, c.model.remat = "bfloat16", "full"
    c.data.flip = True
    c.diffusion.label_drop = 0.1
    c.sampling.sampler, c.sampling.steps = "ddpm", 250
    c.sampling.guidance.scale, c.sampling.guidance.channels = 1.5, 3
    c.optim.lr = 1e-4
    c.ema.decay = 0.9999
    c.parallel.strategy = "fsdp"
    c.checkpoint.every_steps, c.checkpoint.keep_every_steps = 10_000, 100_000


def public(family: str, name: str, made: Mapping[str, Any], size: int | None) -> ConfigDict:
    """Settings to sample a public checkpoint of a diffusion backbone with guidance, as its family was published.

    Args:
        family: a key of `diffjax.weights.FAMILIES`.
        name, made: the backbone, a key of `models.FAMILIES`, and its constructor arguments.
        size: side of its input; None: 32.
    """
    c = base()
    sizes = model_defaults(name)
    backbone(c, name, **{option: value for option, value in made.items() if option in sizes or option in SIZES})
    if made["channels"] == 4:
        imagenet_latents(c, 256)
    else:
        c.data.name, c.sampling.clip = "folder", True
    c.data.size, c.data.channels, c.data.num_classes = size or 32, made["channels"], made["num_classes"]
    c.sampling.sampler, c.sampling.steps = "ddpm", 250
    if family == "sit":
        c.diffusion.process, c.diffusion.flow_linear.prediction = "flow_linear", "velocity"
        c.sampling.sampler, c.sampling.steps = "dopri5", 0
    elif not made["learn_sigma"]:
        c.diffusion.gaussian.variance = "fixed_large"
    c.diffusion.label_drop = 0.1 if made["null_class"] else 0.0
    if made["null_class"]:
        scale, schedule = (
            DIFFIT_GUIDANCE.get(c.data.size, (1.5, "constant")) if family == "diffit" else (1.5, "constant")
        )
        c.sampling.guidance.scale, c.sampling.guidance.channels, c.sampling.guidance.schedule = scale, 3, schedule
    return c


def run_local(c: ConfigDict) -> None:
    """Two steps of a small model of the family on a laptop: does the recipe run on this data?"""
    c.total_steps, c.batch_size = 2, 8
    small = SMALL[_family(c.model.name)]
    kept = {leaf: value for leaf, value in c.model.items() if leaf not in SIZES and leaf != "name"}
    backbone(c, **{**kept, **small, "dtype": "float32", "remat": "none"})
    c.data.workers, c.optim.accumulate = 0, 1
    if c.method == "diffusion":
        c.sampling.steps = 2
    c.checkpoint.every_steps = c.log.every_steps = 1
    if c.evals.samples.every_steps:
        c.evals.samples.every_steps, c.evals.samples.num = 1, 8


def dis_recipe(c: ConfigDict, examples: int) -> None:
    """Settings of the DiS script for every data set: 1,000 epochs in float32, 5 of them of warm-up, flipped images.

    The script skips steps whose loss is not finite; a run of ours ends at the first one and names it.
    """
    c.batch_size = 128
    c.total_steps = 1000 * examples // c.batch_size
    c.optim.warmup_steps = 5 * examples // c.batch_size
    c.optim.lr, c.optim.schedule, c.optim.clip = 1e-4, "cosine_to_hundredth", 1.0
    c.ema.decay = 0.9999
    c.data.flip = True
    c.sampling.sampler, c.sampling.steps = "ddpm", 250
    if c.data.num_classes:
        c.diffusion.label_drop = 0.1
        c.sampling.guidance.scale, c.sampling.guidance.channels = 1.5, 3
    else:
        c.diffusion.label_drop = 0.0
    c.checkpoint.every_steps, c.checkpoint.keep_every_steps = 10_000, 100_000


def edm_recipe(c: ConfigDict, batch_size: int, lr: float, augment: float) -> None:
    """Settings of EDM (arXiv 2206.00364, table 7) for unconditional pixels: 200M augmented images in float32."""
    c.batch_size = batch_size
    c.total_steps = 200_000_000 // batch_size
    c.optim.lr, c.optim.warmup_steps = lr, 10_000_000 // batch_size
    c.ema.kind, c.ema.halflife_images, c.ema.rampup = "halflife", 500_000.0, 0.05
    c.data.augment = augment
    c.data.workers, c.data.threads = 4, 4
    c.diffusion.process, c.diffusion.label_drop = "edm", 0.0
    c.sampling.sampler, c.sampling.clip = "edm", False
    c.checkpoint.every_steps, c.checkpoint.keep_every_steps = 10_000, 50_000
    c.evals.samples.every_steps, c.evals.samples.num = 10_000, 64


def token_data(c: ConfigDict, encoder: str, vocabulary: int, grid: int) -> None:
    """A token model instead of a diffusion backbone: `data` becomes tokens, made by `tokenize` of `images`."""
    c.method = "tokens"
    for leaf in c.images:
        c.images[leaf] = c.data[leaf]
    for leaf in ("dataset", "crop"):
        c.data[leaf] = base().data[leaf]
    c.data.name, c.data.split = "tokens", "train"
    c.data.encoder, c.data.vocabulary = encoder, vocabulary
    c.data.size, c.data.channels = grid, 1  # tokens along a side; 2 codebooks: of the features and of a decoder


def digit_recipe(c: ConfigDict, lr: float, updates: int, batch_size: int) -> None:
    """Settings of DiGIT's scripts (fairseq): its Adam, a rate that falls as 1 / sqrt(step), no average."""
    c.total_steps, c.batch_size = updates, batch_size
    c.model.dtype = "bfloat16"
    c.data.workers, c.data.threads, c.data.flip = 4, 4, True
    c.tokens.smoothing, c.tokens.mirrored = 0.1, True
    c.optim.name, c.optim.b2, c.optim.weight_decay, c.optim.clip = "fairseq_adam", 0.98, 0.01, 1.0
    c.optim.lr, c.optim.schedule = lr, "inverse_sqrt"
    c.optim.warmup_steps = c.optim.decay_after_steps = 6250
    c.optim.warmup_from = 1e-7
    c.ema.decay = 0.0
    c.parallel.strategy = "fsdp"
    c.checkpoint.every_steps, c.checkpoint.keep_every_steps = 5_000, 25_000
    c.evals.samples.every_steps = 0
