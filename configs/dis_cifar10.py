"""DiS on CIFAR-10 pixels, with the recipe of its script (arXiv 2402.05608, feizc/DiS): unconditional, or by class.

    python -m diffjax train --config=configs/dis_cifar10.py --workdir=runs/dis-cifar10 --config.data.dir=DIR
    python -m diffjax train --config=configs/dis_cifar10.py:labels --workdir=runs/dis-cifar10-l --config.data.dir=DIR

DIR is the data folder of tensorflow-datasets, in which `cifar10` has been prepared as array_record (the error for a
missing folder prints the command); or, with --config.data.name=records, the folder of

    python -m diffjax prepare cifar10 --from=DOWNLOADS --out=DIR

The figures of the paper's table could not be read: none is claimed here. A third party reported FID-10K 16.4 for the
unconditional S/2 after 200K steps of that script and 250 sampling steps.
"""

from configs import common


def get_config(arg: str | None = None):
    options = common.parse(arg, model="dis-s-2", labels=False, runlocal=False)
    c = common.base()
    common.published(c, options.model)

    common.tfds_images(c, "cifar10", 32, num_classes=10 if options.labels else 0)
    c.data.crop = "none"

    common.dis_recipe(c, examples=50_000)
    c.evals.samples.every_steps, c.evals.samples.num = 10_000, 100

    if options.runlocal:
        common.run_local(c)
    return c
