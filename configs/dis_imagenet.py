"""DiS on ImageNet latents of 256 or 512 pixels, with the recipe of its script (arXiv 2402.05608, feizc/DiS).

    python -m diffjax train --config=configs/dis_imagenet.py:model=dis-h-2 --workdir=runs/h --config.data.dir=DIR
    python -m diffjax train --config=configs/dis_imagenet.py:pixels=512 --workdir=runs/h512 --config.data.dir=DIR

DIR holds autoencoder latents with their mirror images, in this project's record format (see imagenet256.py).

Published FID-50K of H/2 with classifier-free guidance: 2.10 at 256 and 2.88 at 512 pixels (inception score 272.33).
The guidance scale, batch size and number of steps behind them are not known to us: what stands here are the script's
defaults, 1,000 epochs of batches of 128, and 250 DDPM steps with guidance 1.5 on three channels, its fixed choice.
The script computes in float32; --config.model.dtype=bfloat16 is faster.
"""

from configs import common


def get_config(arg: str | None = None):
    options = common.parse(arg, model="dis-h-2", pixels=256, runlocal=False)
    if options.pixels not in (256, 512):
        raise ValueError(f"config argument pixels={options.pixels}: valid: 256, 512")
    c = common.base()
    c.model.name = options.model

    c.data.name = "latents"
    c.data.dir, c.data.split = f"data/imagenet{options.pixels}-latents", ""
    c.data.size, c.data.channels, c.data.num_classes = options.pixels // 8, 4, 1000
    c.data.workers, c.data.threads = 4, 4

    common.dis_recipe(c, examples=1_281_167)
    c.parallel.strategy = "fsdp"
    c.evals.samples.every_steps = 0  # latents are no pictures

    if options.runlocal:
        c.total_steps, c.batch_size = 2, 8
        c.model.name, c.model.remat = "DiS-S/8", "none"
        c.data.workers = 0
        c.sampling.steps = 2
        c.checkpoint.every_steps = c.log.every_steps = 1
    return c
