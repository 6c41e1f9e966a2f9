"""DiT on ImageNet 256 x 256 latents, the published recipe (arXiv 2212.09748, section 4 and table 4).

    python -m diffjax train --config=configs/imagenet256.py:model=dit-xl-2 --workdir=runs/xl --config.data.dir=DIR

DIR holds autoencoder latents with their mirror images, in this project's record format. Features in the fast-DiT
layout become such a folder, without mirror images (then add --config.data.flip=false), by

    python -m diffjax.data.latents --features=imagenet256_features --labels=imagenet256_labels --out=DIR

Hardware: the paper trained XL/2 at about 5.7 steps/s on a TPU v3-256 pod, so 400K steps take about 20 hours there.
Expected FID-50K (ADM reference, EMA 0.9999, 250 DDPM steps, no guidance, ft-MSE decoder) after 400K steps:

    | patch | S      | B      | L      | XL     |
    |-------|--------|--------|--------|--------|
    | 2     | 68.40  | 43.47  | 23.33  | 19.47  |
    | 4     | 100.41 | 68.38  | 45.64  | 43.01  |
    | 8     | 153.60 | 122.74 | 118.87 | 106.41 |

XL/2 after 7M steps with the ft-EMA decoder: 9.62, and 2.27 with guidance 1.5 on three channels (the published quirk).
"""

from configs import common


def get_config(arg: str | None = None):
    options = common.parse(arg, model="dit-xl-2", runlocal=False)
    c = common.base()
    c.total_steps = 400_000
    c.batch_size = 256
    c.model.update(common.DIT, name=options.model)
    c.model.dtype, c.model.remat = "bfloat16", "full"

    c.data.name = "latents"
    c.data.dir, c.data.split = "data/imagenet256-latents", ""
    c.data.size, c.data.channels, c.data.num_classes = 32, 4, 1000
    c.data.flip = True
    c.data.workers, c.data.threads = 4, 4

    c.diffusion.label_drop = 0.1
    c.sampling.sampler, c.sampling.steps = "ddpm", 250
    c.sampling.guidance, c.sampling.guidance_channels = 1.5, 3

    c.optim.lr = 1e-4
    c.ema.decay = 0.9999
    c.parallel.strategy = "fsdp"
    c.checkpoint.every_steps, c.checkpoint.keep_every_steps = 10_000, 100_000
    c.evals.samples.every_steps = 0  # latents are no pictures

    if options.runlocal:
        c.total_steps, c.batch_size = 2, 8
        c.model.name, c.model.dtype, c.model.remat = "DiT-S/8", "float32", "none"
        c.data.workers = 0
        c.sampling.steps = 2
        c.checkpoint.every_steps = c.log.every_steps = 1
    return c
