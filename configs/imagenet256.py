"""DiT on ImageNet 256 x 256 latents, the published recipe (arXiv 2212.09748, section 4 and table 4).

    python -m diffjax train --config=configs/imagenet256.py:model=dit-xl-2 --workdir=runs/xl --config.data.dir=DIR

Any other backbone trains under the same recipe: model=udit-b, model=dis-b-2 (the recipe of its own paper, if it has
another one, is in a file of its own).

DIR holds autoencoder latents with their mirror images, which `encode` makes of the images of `prepare imagenet256`
(docs/data.md, "Latents"). Features that others published become such a folder, too; those of fast-DiT without mirror
images (then add --config.data.flip=false):

    python -m diffjax prepare features-fast-dit --from=FOLDER --out=DIR

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
    common.published(c, options.model)
    common.imagenet_latents(c, 256)
    common.dit_recipe(c)
    if options.runlocal:
        common.run_local(c)
    return c
