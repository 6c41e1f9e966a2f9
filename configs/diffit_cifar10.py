"""Image-space DiffiT on CIFAR-10, unconditional, in the training setup of EDM (arXiv 2312.02139, appendices H.1, I.1).

    python -m diffjax train --config=configs/diffit_cifar10.py --workdir=runs/diffit-cifar10 --config.data.dir=DIR

DIR is the data folder of tensorflow-datasets, in which `cifar10` has been prepared as array_record (the error for a
missing folder prints the command); or, with --config.data.name=records, the folder of

    python -m diffjax prepare cifar10 --from=DOWNLOADS --out=DIR

The paper contradicts itself on the blocks of a stage (4 or 2: model=diffit-cifar10, model=diffit-cifar10_l2) and leaves
the width of the first one open (128 here, 256 with model=diffit-cifar10_w256). It trains 200,000 iterations of 512
images; EDM, whose setup it follows, 200,000 thousand images, which this recipe does: --config.total_steps=200000 is the
other reading. Published FID-50K against the training set, 18 deterministic steps (35 network calls): 1.95.

The argument `batch` changes the batch size and keeps the images that are seen; --config.batch_size keeps the steps.
"""

from configs import common


def get_config(arg: str | None = None):
    options = common.parse(arg, model="diffit-cifar10", batch=512, runlocal=False)
    c = common.base()
    common.published(c, options.model)
    c.model.window, c.model.time_width = 4, 512  # what figure 8 and table 3 vary
    c.model.dropout = 0.13
    common.tfds_images(c, "cifar10", 32, num_classes=0)
    c.data.crop = "none"
    common.edm_recipe(c, batch_size=options.batch, lr=1e-3, augment=0.12)
    c.sampling.steps = 18
    if options.runlocal:
        common.run_local(c)
    return c
