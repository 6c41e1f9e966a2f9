"""DiS on CelebA at 64 x 64 pixels, unconditional, with the recipe of its script (arXiv 2402.05608, feizc/DiS).

    python -m diffjax train --config=configs/dis_celeba64.py --workdir=runs/dis-celeba64 --config.data.dir=DIR

DIR is the data folder of tensorflow-datasets, in which `celeb_a` has been prepared as array_record (the error for a
missing folder prints the command). Its 218 x 178 pictures are cropped and resized as in ADM. The crop of DDIM and
U-ViT, read with --config.data.name=records, is made by

    python -m diffjax prepare celeba64 --from=DOWNLOADS --out=DIR

The figures of the paper's table could not be read: none is claimed here.
"""

from configs import common


def get_config(arg: str | None = None):
    options = common.parse(arg, model="dis-s-4", runlocal=False)
    c = common.base()
    common.published(c, options.model)

    common.tfds_images(c, "celeb_a", 64, num_classes=0)
    c.data.workers, c.data.threads = 4, 4

    common.dis_recipe(c, examples=162_770)
    c.evals.samples.every_steps, c.evals.samples.num = 10_000, 64

    if options.runlocal:
        common.run_local(c)
    return c
