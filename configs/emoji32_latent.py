"""Latent diffusion from end to end, offline, on 1,700 embedded emoji of 32 x 32 pixels: an autoencoder and a DiT.

    python -m diffjax train  --config=configs/emoji32_latent.py:stage=autoencoder --workdir=runs/quickstart-latent/vae
    python -m diffjax export --workdir=runs/quickstart-latent/vae --family=vae --out=runs/quickstart-latent/autoencoder
    python -m diffjax encode --config=configs/emoji32_latent.py --out=runs/quickstart-latent/latents
    python -m diffjax train  --config=configs/emoji32_latent.py --workdir=runs/quickstart-latent/dit
    python -m diffjax sample --workdir=runs/quickstart-latent/dit --num=504 --out=runs/quickstart-latent/samples.npz

`bash launch/quickstart.sh latent` runs them and scores the samples. The autoencoder makes 8 x 8 x 4 latents of images.
It has no perceptual loss and no discriminator, for which networks trained on other images would be needed.
"""

from configs import common

FOLDER = "runs/quickstart-latent"
SCALE = 0.68  # 1 / the deviation of z: with 1 in its place `encode` prints about 1 / 0.68


def get_config(arg: str | None = None):
    options = common.parse(arg, stage="dit", runlocal=False)
    if options.stage not in ("autoencoder", "dit"):
        raise ValueError(f"config argument stage={options.stage!r} is unknown; valid: autoencoder, dit")
    c = common.base()
    c.data.threads = 1
    c.optim.warmup_steps, c.optim.schedule, c.optim.clip = 100, "cosine", 1.0
    c.ema.decay, c.ema.decay_rampup = 0.995, 0.1
    c.checkpoint.every_steps = 500
    c.log.every_steps = 50
    autoencoder(c) if options.stage == "autoencoder" else dit(c)
    if options.runlocal:
        c.total_steps, c.batch_size = 2, 8
        c.checkpoint.every_steps = c.log.every_steps = 1
        for evaluator in c.evals.values():
            evaluator.every_steps = min(evaluator.every_steps, 1)
    return c


def autoencoder(c) -> None:
    """Images of 32 x 32 x 3 -> latents of 8 x 8 x 4."""
    c.method = "reconstruction"
    c.total_steps, c.batch_size, c.optim.lr = 1500, 32, 2e-3
    common.backbone(c, "VAE", widths=(16, 32, 64), depth=1, groups=8, attention=False, scale=SCALE)
    c.data.name, c.data.size, c.data.channels, c.data.num_classes = "emoji32", 32, 3, 9
    c.data.flip = True
    c.reconstruction.kl = 1e-3
    c.evals.samples.every_steps = 0
    c.evals.reconstructions.every_steps = c.evals.loss.every_steps = 500


def dit(c) -> None:
    """A DiT on the latents that `encode` made with the autoencoder."""
    c.total_steps, c.batch_size, c.optim.lr = 3000, 64, 2e-3
    common.backbone(c, "DiT", patch=1, depth=4, width=128, heads=4)
    c.images.name, c.images.size, c.images.num_classes = "emoji32", 32, 9
    c.autoencoder.weights = f"{FOLDER}/autoencoder"
    c.data.name, c.data.dir, c.data.split, c.data.scale = "latents", f"{FOLDER}/latents", "", SCALE
    c.data.size, c.data.channels, c.data.num_classes = 8, 4, 9
    c.data.flip = True
    c.sampling.sampler, c.sampling.steps = "ddim", 50
    c.sampling.guidance.scale = 1.5
    c.evals.samples.every_steps, c.evals.samples.num = 500, 90
