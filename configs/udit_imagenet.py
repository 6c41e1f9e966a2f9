"""U-DiT on ImageNet latents of 256 or 512 pixels, the published recipe (arXiv 2405.02730, YuchuanTian/U-DiT).

    python -m diffjax train --config=configs/udit_imagenet.py:model=u-dit-b --workdir=runs/b --config.data.dir=DIR
    python -m diffjax train --config=configs/udit_imagenet.py:pixels=512 --workdir=runs/b512 --config.data.dir=DIR

DIR holds autoencoder latents with their mirror images, in this project's record format (see imagenet256.py); the
feature files of the script hold, as far as known, one sample and mirror state per image. It computes in float32 or
float16, this recipe in bfloat16. What is sampled is the fused form, which the published sizes count.

Expected FID-50K (ADM reference, EMA 0.9999, 250 DDPM steps, ft-EMA decoder), with DiT under the same 400K steps:

    |                        | GFLOPs | 400K  | 1M    | 400K, guidance 1.5 on three channels |
    |------------------------|--------|-------|-------|--------------------------------------|
    | DiT-S/2                | 6.06   | 67.40 |       |                                      |
    | U-DiT-S                | 6.04   | 31.51 |       |                                      |
    | DiT-B/2                | 23.01  | 42.84 |       |                                      |
    | U-DiT-B                | 22.22  | 16.64 | 12.87 | 4.26                                 |
    | DiT-XL/2               | 118.64 | 20.05 |       | 6.24                                 |
    | U-DiT-L                | 85.00  | 10.08 | 7.54  | 3.37                                 |
    | DiT-XL/2, 512 pixels   | 524.7  | 20.94 |       |                                      |
    | U-DiT-B, 512 pixels    | 106.7  | 15.39 |       |                                      |

Eight A100 took 0.84 steps/s for L. The labels drop out level by level, as published: the fully unconditional network
of guidance is hardly trained; --config.model.label_drop_per_level=false drops them together. The argument `vanilla`
trains the paper's model without its changes to attention and feed-forward network, 20.89 instead of 16.64 for B.
"""

from configs import common

VANILLA = {"similarity": "dot", "positions": "none", "ffn": "basic"}  # table 10 of the paper


def get_config(arg: str | None = None):
    options = common.parse(arg, model="u-dit-b", pixels=256, vanilla=False, runlocal=False)
    c = common.base()
    common.published(c, options.model)
    if options.vanilla:
        c.model.update(VANILLA)
    common.imagenet_latents(c, options.pixels)
    common.dit_recipe(c)
    if options.runlocal:
        common.run_local(c)
    return c
