"""Your own images: a folder of them, or one sub-folder per class.

    python -m diffjax train  --config=configs/folder.py:dir=pictures,size=32,classes=3 --workdir=runs/mine
    python -m diffjax sample --workdir=runs/mine --num=60 --out=runs/mine/samples.npz

Images of any size are cropped at the centre and scaled to `size` pixels. `classes` is the number of sub-folders (0: one
folder without classes). `model` is small enough for a CPU by default: dit, dis, udit or diffit, of 64 tokens or, of the
last two, of all pixels; or a published backbone such as dit-s-4. 3,000 steps of 32 images show colours and layout; for
more set --config.model.width, --config.model.depth, --config.total_steps and --config.batch_size.
"""

from configs import common

SMALL = {
    "dit": {"name": "DiT", "depth": 4, "width": 128, "heads": 4},
    "dis": {"name": "DiS", "depth": 4, "width": 96, "d_state": 8},
    "udit": {"name": "U-DiT", "width": 32, "heads": 2, "depth": (1, 1, 1, 1, 1)},
    "diffit": {"name": "DiffiT-UNet", "widths": (32, 64), "depth": (1, 1), "window": 4}
    | {"head_width": 16, "groups": 8, "time_width": 128},
}


def get_config(arg: str | None = None):
    options = common.parse(arg, dir="", size=32, classes=0, model="dit", runlocal=False)
    c = common.base()
    c.total_steps, c.batch_size = 3_000, 32
    if options.model not in SMALL:
        common.published(c, options.model)
    else:
        patch = {"patch": max(options.size // 8, 1)} if options.model in ("dit", "dis") else {}
        common.backbone(c, **SMALL[options.model], **patch)

    c.data.name, c.data.dir, c.data.split = "folder", options.dir, ""
    c.data.size, c.data.channels, c.data.num_classes = options.size, 3, options.classes

    c.diffusion.label_drop = 0.1 if options.classes else 0.0
    c.sampling.sampler, c.sampling.steps, c.sampling.clip = "ddim", 50, True
    c.sampling.guidance.scale = 1.5 if options.classes else 1.0

    c.optim.lr, c.optim.warmup_steps, c.optim.schedule = 1e-3, 100, "cosine"
    c.optim.clip = 1.0
    c.ema.decay, c.ema.decay_rampup = 0.999, 0.1
    c.checkpoint.every_steps = 500
    c.log.every_steps = 20
    c.evals.samples.every_steps, c.evals.samples.num = 500, max(10 * options.classes, 36)

    if options.runlocal:
        common.run_local(c)
    return c
