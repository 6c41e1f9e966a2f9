"""Latent DiffiT on ImageNet of 256 or 512 pixels (arXiv 2312.02139, section 5.2 and appendices H.2, I.2).

    python -m diffjax train --config=configs/diffit_imagenet.py --workdir=runs/diffit --config.data.dir=DIR
    python -m diffjax train --config=configs/diffit_imagenet.py:pixels=512 --workdir=runs/d512 --config.data.dir=DIR

DIR holds autoencoder latents with their mirror images, in this project's record format (see imagenet256.py).

The paper gives learning rate, batch size and decay of the average; the diffusion and the classes that drop out are
those of ADM and DiT. It is silent on the optimizer (here Adam without decay of weights), the number of steps (here
400K, as DiT's comparison runs; full runs are several millions), warm-up and precision (here bfloat16). Without gates
that start at zero a rate of 3e-4 may spike early: --config.optim.warmup_steps=5000 is the mildest remedy.

Published FID-50K (ADM reference, EMA 0.9999, 250 DDPM steps, ft-EMA decoder), after an unknown number of steps:

    |            | parameters | FID  | IS     | precision | recall | guidance on three channels            |
    |------------|------------|------|--------|-----------|--------|---------------------------------------|
    | 256 pixels | 561 M      | 1.73 | 276.49 | 0.80      | 0.62   | power cosine to 4.4, power 4          |
    | 512 pixels | 562 M      | 2.67 | 252.12 | 0.83      | 0.55   | 1.49 throughout                       |

The release writes 4.4 for 256 pixels and section 5.8 of the paper 4.6: the argument `guidance=4.6`; guidance=1: none.
"""

from configs import common

TRAINING = {256: ("DiffiT-XL/2", 256, 3e-4), 512: ("DiffiT-XL/2-512", 512, 1e-4)}


def get_config(arg: str | None = None):
    options = common.parse(arg, pixels=256, guidance="", runlocal=False)
    name, batch_size, lr = TRAINING[options.pixels]
    c = common.base()
    common.published(c, name)
    common.imagenet_latents(c, options.pixels)
    common.dit_recipe(c)
    c.batch_size, c.optim.lr = batch_size, lr
    weight, schedule = common.DIFFIT_GUIDANCE[c.data.size]  # power 4, the default
    c.sampling.guidance.scale = float(options.guidance or weight)
    c.sampling.guidance.schedule = schedule if c.sampling.guidance.scale != 1 else "constant"
    if options.runlocal:
        common.run_local(c)
    return c
