"""Image-space DiffiT on FFHQ at 64 x 64 pixels, in the training setup of EDM (arXiv 2312.02139, appendices H.1, I.1).

    python -m diffjax train --config=configs/diffit_ffhq64.py --workdir=runs/diffit-ffhq64 --config.data.dir=DIR

DIR holds the 70,000 images, each resized to 64 x 64 by one Lanczos step from 1024 x 1024 as EDM's tool does it;
sub-folders do not matter. Of the originals, with --config.data.name=records, the folder of

    python -m diffjax prepare ffhq64 --from=images1024x1024 --out=DIR

The paper contradicts itself on the blocks of the stages (4 each, or 1, 2, 2, 2: model=diffit-ffhq64_l2). It trains
200,000 iterations of 256 images; EDM, whose setup it follows, 200,000 thousand images, which this recipe does:
--config.total_steps=200000 is the other reading. Published FID-50K against the training set, 40 deterministic steps
(79 network calls): 2.22.

The argument `batch` changes the batch size and keeps the images that are seen; --config.batch_size keeps the steps.
"""

from configs import common


def get_config(arg: str | None = None):
    options = common.parse(arg, model="diffit-ffhq64", batch=256, runlocal=False)
    c = common.base()
    common.published(c, options.model)
    c.model.window, c.model.time_width = 8, 512  # what figure 8 and table 3 vary
    c.model.dropout = 0.05
    c.data.name, c.data.dir, c.data.crop, c.data.decode = "folder", "data/ffhq64", "none", "stored"
    c.data.size, c.data.channels, c.data.num_classes = 64, 3, 0
    common.edm_recipe(c, batch_size=options.batch, lr=2e-4, augment=0.15)
    c.sampling.steps = 40
    if options.runlocal:
        common.run_local(c)
    return c
