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
    c = common.base()
    common.published(c, options.model)
    common.imagenet_latents(c, options.pixels)
    common.dis_recipe(c, examples=1_281_167)
    c.parallel.strategy = "fsdp"
    if options.runlocal:
        common.run_local(c)
    return c
