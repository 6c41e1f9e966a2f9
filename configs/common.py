"""What every recipe shares: the argument string, and the full set of leaves with their defaults.

A recipe calls `parse` to read what stands after the colon of `--config=configs/recipe.py:model=dit-b,runlocal`, takes
`base()`, and sets what its paper says. Afterwards any leaf can be overridden: `--config.optim.lr=2e-4`.
"""

from typing import Any

from ml_collections import ConfigDict

# Leaves of `model` that one backbone has and another has not: its switches, as published, and how it computes.
DIT = {"attention": "xla"}
DIS = {"drop_path": 0.1, "scan": ""}  # scan: "" lets the backend choose
UDIT = {
    "similarity": "cosine",  # cosine, dot
    "positions": "rope",  # rope, none
    "rope_rows": "sqrt",  # sqrt, width: the true one of maps that are not square
    "logit_clamp": 4.6052,
    "down_factor": 2,
    "down_kernel": 5,  # 0: none
    "down_shortcut": True,
    "ffn": "rep",  # rep, basic
    "label_drop_per_level": True,
    "depthwise": "",  # "" lets the backend choose
}
DIGIT = {"dropout": 0.1, "attention": "xla"}
DIFFIT = {"time_in": "attention", "attention": "xla"}  # time_in: attention, values, mlp
DIFFIT_UNET = DIFFIT | {"augment_labels": 9, "time_features": "positional"}  # time_features: positional, fourier
IMAGE_LEAVES = ("name", "dir", "dataset", "split", "size", "channels", "num_classes", "crop")
UNET = {"widths": (16, 32), "depth": (1, 1), "groups": 8, "head_width": 16}
# How names start, the leaves of the family, and a model of it that is small enough for two steps on a laptop.
FAMILIES = {
    "digit": (DIGIT, {"depth": 2, "width": 48, "heads": 3}),
    "dit": (DIT, {"name": "DiT-S/8"}),
    "dis": (DIS, {"name": "DiS-S/8"}),
    "udit": (UDIT, {"name": "U-DiT-T"}),
    "diffitxl2": (DIFFIT, {"depth": 2, "width": 96, "heads": 4}),
    "diffitcifar10": (DIFFIT_UNET, UNET),
    "diffitffhq64": (DIFFIT_UNET, UNET),
}


def parse(arg: str | None, **defaults: Any) -> ConfigDict:
    """Read "name=value,name=value,switch" against declared defaults, whose types the values take.

    Raises:
        ValueError: an undeclared name, or a value that is not of the declared type.
    """
    options = dict(defaults)
    for item in filter(None, (arg or "").split(",")):
        name, _, text = item.partition("=")
        if name not in defaults:
            raise ValueError(f"config argument {name!r} is unknown; valid: {', '.join(defaults)}")
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


def base() -> ConfigDict:
    """Every leaf that the training loop, the sampler and the data read; `model` gets its arguments from the recipe."""
    c = ConfigDict()
    c.seed = 0
    c.total_steps = 400_000
    c.batch_size = 256  # global
    c.model = ConfigDict({"name": "", "dtype": "float32", "remat": "dots"})

    c.data = ConfigDict()
    c.data.name = ""  # digits, emoji32, folder, tfds, latents
    c.data.dir = ""  # for folder, tfds, latents
    c.data.dataset = ""  # for tfds: the builder's name
    c.data.split = "train"
    c.data.size = 32  # side of an image (or latent)
    c.data.channels = 3
    c.data.num_classes = 0  # 0: unlabelled
    c.data.crop = "adm"  # how folder and tfds images reach `size`: adm, none
    c.data.scale = 0.18215  # latents only: what the model sees is the autoencoder output times this
    c.data.flip = False  # horizontal, probability 0.5
    c.data.augment = 0.0  # probability of EDM's augmentations of pixels, of which the model is told; 0: none
    c.data.workers = 0  # processes; 0 reads in threads of this one
    c.data.threads = 4

    c.diffusion = ConfigDict()
    c.diffusion.process = "gaussian"  # gaussian, edm, edm_vp, edm_ve, edm_iddpm, flow_linear, flow_gvp, flow_vp
    # What stays "" or 0 belongs to the process; what a process does not know is refused.
    c.diffusion.prediction = ""  # edm: also edm; flow: also velocity, score, v; gaussian: also v; all: epsilon, x0
    c.diffusion.weighting = ""  # uniform, snr, min_snr, edm; edm and flow also: velocity, likelihood, uncertainty
    c.diffusion.times = ""  # drawn in training. edm: lognormal, vp, ve, iddpm; flow: uniform, logit_normal
    c.diffusion.options = ""  # numbers such as gamma=5,sigma_data=0.5,p_mean=-0.4,p_std=1.0,logit_mean=0,shift=3
    c.diffusion.steps = 0  # gaussian only: 1000
    c.diffusion.variance = ""  # gaussian only: learned_range, fixed_small, fixed_large
    c.diffusion.loss = ""  # gaussian only: mse, rescaled_mse, rescaled_kl
    c.diffusion.label_drop = 0.1  # probability of the null class in training; 0: no null class

    c.sampling = ConfigDict()
    c.sampling.sampler = "ddpm"  # any process: ddim, edm, dpmpp_2m; gaussian: ddpm; edm and flow: euler, heun, dopri5;
    c.sampling.steps = 250  # ... flow: euler_maruyama, sde_heun. dopri5 has 0 steps, it chooses them
    c.sampling.options = ""  # of the sampler: eta=1 (ddim), churn=40,churn_min=0.05 (edm), last_step=tweedie (the SDEs)
    c.sampling.clip = False  # clip predicted x0 to [-1, 1]: for pixels, never for latents; ddpm, ddim, edm, dpmpp_2m
    c.sampling.guidance = 1.0  # weight of classifier-free guidance, or of `sample --guide`; 1: none
    c.sampling.guidance_weights = ""  # constant; or power_cosine,power=4, or interval,low=0.28,high=2.9 in noise/signal
    c.sampling.guidance_channels = 0  # 0: all; 3: what DiT and U-DiT published
    c.sampling.guidance_calls = ""  # one, on a doubled batch, or two, with less memory; "": one, two with a guide

    c.optim = ConfigDict()
    c.optim.name = "adamw"  # adamw; fairseq_adam: its Adam and gradient clipping, which differ in where epsilons stand
    c.optim.lr = 1e-4
    c.optim.b1 = 0.9
    c.optim.b2 = 0.999
    c.optim.eps = 1e-8
    c.optim.weight_decay = 0.0
    c.optim.schedule = (
        "constant"  # constant, cosine (to zero at total_steps), cosine_to_hundredth (of lr), inverse_sqrt
    )
    c.optim.warmup_steps = 0
    c.optim.warmup_from = 0.0  # rate at step 0 of the warm-up
    c.optim.decay_after_steps = 0  # inverse_sqrt only: constant until then
    c.optim.clip = 0.0  # global gradient norm; 0: none
    c.optim.accumulate = 1  # micro-batches per step

    c.ema = ConfigDict()
    c.ema.kind = "constant"  # constant, halflife
    c.ema.decay = 0.9999  # constant only
    c.ema.halflife_images = 0.0  # halflife only
    c.ema.rampup = 0.05  # halflife only: at most this part of the images seen; 0: none
    c.ema.tracks = ""  # relative lengths of power-function averages to keep besides: 0.05,0.10
    c.ema.snapshot_every_steps = 0  # of the tracks, for good, from which `ema` makes averages of any length
    c.parallel = ConfigDict({"mesh": {"data": -1, "fsdp": 1, "tensor": 1}, "strategy": "dp"})
    c.parallel.replicate_below = 2**20  # bytes; smaller parameters stay whole on every device
    c.checkpoint = ConfigDict({"every_steps": 10_000, "keep": 3, "keep_every_steps": 0})  # 0: none is permanent
    c.log = ConfigDict({"every_steps": 100, "tensorboard": True})
    c.evals = ConfigDict({"samples": {"every_steps": 10_000, "num": 64}})  # a grid of images; 0 steps: never
    return c


def backbone(c: ConfigDict, name: str) -> None:
    """A published model, by a name such as "dit-xl-2", "U-DiT-B" or "udit-b", with the leaves of its family."""
    switches, _ = FAMILIES[_family(name)]
    c.model.update(switches, name=name)


def _family(name: str) -> str:
    plain = name.lower().replace("-", "").replace("/", "")
    for family in FAMILIES:
        if plain.startswith(family):
            return family
    raise ValueError(f"config argument model={name!r}: valid: published names, of {', '.join(FAMILIES)}")


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
    """What DiT, and U-DiT after it, train ImageNet latents with: 400K steps at a constant rate, flipped images."""
    c.total_steps, c.batch_size = 400_000, 256
    c.model.dtype, c.model.remat = "bfloat16", "full"
    c.data.flip = True
    c.diffusion.label_drop = 0.1
    c.sampling.sampler, c.sampling.steps = "ddpm", 250
    c.sampling.guidance, c.sampling.guidance_channels = 1.5, 3
    c.optim.lr = 1e-4
    c.ema.decay = 0.9999
    c.parallel.strategy = "fsdp"
    c.checkpoint.every_steps, c.checkpoint.keep_every_steps = 10_000, 100_000


def run_local(c: ConfigDict) -> None:
    """Two steps of a small model of the family on a laptop: does the recipe run on this data?"""
    c.total_steps, c.batch_size = 2, 8
    _, small = FAMILIES[_family(c.model.name)]
    c.model.update(small, dtype="float32", remat="none")
    c.data.workers, c.optim.accumulate = 0, 1
    if "diffusion" in c:
        c.sampling.steps = 2
    c.checkpoint.every_steps = c.log.every_steps = 1
    if c.evals.samples.every_steps:
        c.evals.samples.every_steps, c.evals.samples.num = 1, 8


def dis_recipe(c: ConfigDict, examples: int) -> None:
    """What the DiS script trains every data set with: 1,000 epochs in float32, 5 of them of warm-up, flipped images.

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
        c.sampling.guidance, c.sampling.guidance_channels = 1.5, 3
    else:
        c.diffusion.label_drop = 0.0
    c.checkpoint.every_steps, c.checkpoint.keep_every_steps = 10_000, 100_000


def edm_recipe(c: ConfigDict, batch_size: int, lr: float, augment: float) -> None:
    """What EDM (arXiv 2206.00364, table 7) trains unconditional pixels with: 200M augmented images in float32."""
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


def codes(c: ConfigDict, encoder: str, count: int, grid: int) -> None:
    """A model of codes instead of a diffusion backbone: `data` becomes codes, made by `tokenize` of `images`."""
    del c.diffusion
    c.images = ConfigDict({leaf: c.data[leaf] for leaf in IMAGE_LEAVES})
    c.data.name = "tokens"
    c.data.encoder, c.data.codes, c.data.decoder_codes = encoder, count, 0
    c.data.size, c.data.channels = grid, 1  # codes along a side; 2 with those of a decoder besides

    c.tokens = ConfigDict()
    c.tokens.patch = 0  # encoder pixels only: side of a patch
    c.tokens.weights = ""  # encoders dinov2 and vqgan: folder that `convert` wrote
    c.tokens.layer = 3  # encoder dinov2 only: whose output the features are, counted from the last
    c.tokens.decoder = ""  # of codes to pixels, vqgan: folder that `convert` wrote
    c.tokens.mirrored = False  # codes of the mirrored images, too, for data.flip
    c.tokens.fit_images = 0  # on so many the codebook is fitted; 0: all
    c.tokens.init, c.tokens.iterations, c.tokens.seed = "random", 20, 1234  # of k-means: random, k-means++
    c.tokens.label_drop = 0.0  # probability of the null class in training; 0: no null class
    c.tokens.smoothing = 0.0  # of labels

    c.sampling = ConfigDict()
    c.sampling.temperature = 1.0  # 0: the most probable code
    c.sampling.top_k = 0  # 0: all
    c.sampling.top_p = 1.0
    c.sampling.guidance = 1.0  # weight of classifier-free guidance; 1: none
    c.sampling.rounds = 0  # masked models only
    c.sampling.choice_temperature = 4.5  # masked models only: of the noise on which codes to keep


def digit_recipe(c: ConfigDict, lr: float, updates: int, batch_size: int) -> None:
    """What DiGIT's scripts train with (fairseq): its Adam, a rate that falls as 1 / sqrt(step), no average."""
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
