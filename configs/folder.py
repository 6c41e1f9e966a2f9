"""Your own images: a folder of them, or one sub-folder per class.

    python -m diffjax train  --config=configs/folder.py:dir=pictures,size=32,classes=3 --workdir=runs/mine
    python -m diffjax sample --workdir=runs/mine --num=60 --out=runs/mine/samples.npz

Images of any size are cropped at the centre and scaled to `size` pixels. `classes` is the number of sub-folders (0: one
folder without classes). `model` is a published backbone such as dit-s-4, dis-s-4, udit-s or diffit-ffhq64; without it a
small DiT of 64 tokens is trained, which a CPU can do at 32 pixels. 5,000 steps of 64 images are enough to see colours
and layout; set --config.total_steps and --config.batch_size to what your data and device allow.
"""

from configs import common


def get_config(arg: str | None = None):
    options = common.parse(arg, dir="", size=32, classes=0, model="", runlocal=False)
    c = common.base()
    c.total_steps, c.batch_size = 5_000, 64
    if options.model:
        common.published(c, options.model)
    else:
        common.backbone(c, "DiT", patch=max(options.size // 8, 1), depth=8, width=256, heads=8)

    c.data.name, c.data.dir, c.data.split = "folder", options.dir, ""
    c.data.size, c.data.channels, c.data.num_classes = options.size, 3, options.classes

    c.diffusion.label_drop = 0.1 if options.classes else 0.0
    c.sampling.sampler, c.sampling.steps, c.sampling.clip = "ddim", 50, True
    c.sampling.guidance.scale = 1.5 if options.classes else 1.0

    c.optim.lr, c.optim.warmup_steps, c.optim.schedule = 3e-4, 500, "cosine"
    c.optim.clip = 1.0
    c.ema.decay, c.ema.decay_rampup = 0.999, 0.1
    c.checkpoint.every_steps = 500
    c.log.every_steps = 50
    c.evals.samples.every_steps, c.evals.samples.num = 500, max(10 * options.classes, 36)

    if options.runlocal:
        common.run_local(c)
    return c
