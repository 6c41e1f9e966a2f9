"""Image-space DiffiT on CelebA at 64 x 64 pixels: the model and the training setup of FFHQ (arXiv 2312.02139).

    python -m diffjax train --config=configs/diffit_celeba64.py --workdir=runs/diffit-celeba64 --config.data.dir=DIR

DIR is the data folder of tensorflow-datasets, in which `celeb_a` has been prepared as array_record (the error for a
missing folder prints the command). Its 218 x 178 pictures are cropped and resized as in ADM,
not as in DDIM and U-ViT, whose statistics of this set do not fit. They fit what, read with --config.data.name=records,
is made by

    python -m diffjax prepare celeba64 --from=DOWNLOADS --out=DIR

The paper has no figure
for this data set; none is claimed here.

The argument `batch` changes the batch size and keeps the images that are seen; --config.batch_size keeps the steps.
"""

from configs import common


def get_config(arg: str | None = None):
    options = common.parse(arg, model="diffit-ffhq64", batch=256, runlocal=False)
    c = common.base()
    common.published(c, options.model)
    c.model.window, c.model.time_width = 8, 512  # what figure 8 and table 3 vary
    c.model.dropout = 0.05
    common.tfds_images(c, "celeb_a", 64, num_classes=0)
    common.edm_recipe(c, batch_size=options.batch, lr=2e-4, augment=0.15)
    c.sampling.steps = 40
    if options.runlocal:
        common.run_local(c)
    return c
