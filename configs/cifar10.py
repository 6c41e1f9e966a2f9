"""DiT on CIFAR-10 pixels, class-conditional, with the published DiT recipe (arXiv 2212.09748, section 4).

    python -m diffjax train --config=configs/cifar10.py:model=dit-s-2 --workdir=runs/cifar10 --config.data.dir=DIR

DIR is the data folder of tensorflow-datasets, in which `cifar10` has been prepared as array_record (the error for a
missing folder prints the command); or, with --config.data.name=records, the folder of

    python -m diffjax prepare cifar10 --from=DOWNLOADS --out=DIR

No figure is published for DiT on CIFAR-10; none is claimed here.
"""

from configs import common


def get_config(arg: str | None = None):
    options = common.parse(arg, model="dit-s-2", runlocal=False)
    c = common.base()
    c.total_steps = 400_000
    c.batch_size = 256
    common.published(c, options.model)

    common.tfds_images(c, "cifar10", 32, num_classes=10)
    c.data.crop = "none"
    c.data.flip = True

    c.diffusion.label_drop = 0.1
    c.sampling.sampler, c.sampling.steps, c.sampling.clip = "ddpm", 250, True
    c.sampling.guidance.scale = 1.5

    c.optim.lr = 1e-4
    c.ema.decay = 0.9999
    c.checkpoint.every_steps, c.checkpoint.keep_every_steps = 10_000, 100_000
    c.evals.samples.every_steps, c.evals.samples.num = 10_000, 100

    if options.runlocal:
        common.run_local(c)
    return c
