"""Minutes on a laptop CPU: a small class-conditional model on 1,500 real 8 x 8 digits, embedded in the package.

    python -m diffjax train --config=configs/quickstart.py:model=dit --workdir=runs/quickstart-dit
    python -m diffjax train --config=configs/quickstart.py:model=dit,process=edm --workdir=runs/quickstart-edm

`bash launch/quickstart.sh dit` runs it, samples 500 images and scores them.
"""

from configs import common

MODELS = {
    "dit": {"name": "DiT", "patch": 2, "depth": 4, "width": 96, "heads": 3},
    "dis": {"name": "DiS", "patch": 2, "depth": 4, "width": 64, "d_state": 8, "drop_path": 0.0},
    "udit": {"name": "U-DiT", "width": 24, "heads": 2, "depth": (1, 1, 1, 1, 1)},
    "diffit": {"name": "DiffiT-UNet", "widths": (32, 64), "depth": (1, 2), "window": 4}
    | {"head_width": 16, "groups": 8, "time_width": 128},
    "diffit-latent": {"name": "DiffiT", "patch": 2, "depth": 4, "width": 96, "heads": 3, "window": 4},
    "digit": {"name": "DiGIT", "depth": 4, "width": 96, "heads": 4, "length": 32},
}
# steps, batch size, learning rate. The label reaches DiS's patches by way of the scan alone: that takes more steps.
TRAINING = {
    "dit": (1500, 128, 4e-3),
    "dis": (2400, 64, 3e-3),
    "udit": (1500, 64, 2e-3),
    "diffit": (1500, 64, 2e-3),
    "diffit-latent": (5000, 64, 4e-3),
    "digit": (1000, 128, 2e-3),
}

SIGMA_DATA = 0.75  # the digits in [-1, 1] vary by 0.752
SAMPLERS = {"gaussian": ("ddim", 50, True), "edm": ("edm", 18, True), "flow_linear": ("heun", 16, False)}

LOCAL = {
    "dit": {"depth": 2, "width": 48, "heads": 3},
    "dis": {"depth": 2, "width": 32},
    "udit": {"width": 16, "heads": 2},
    "diffit": {"widths": (16, 32), "depth": (1, 2)},
    "diffit-latent": {"depth": 2, "width": 48, "heads": 3},
    "digit": {"depth": 2, "width": 48, "heads": 3},
}


def get_config(arg: str | None = None):
    options = common.parse(arg, model="dit", process="", runlocal=False)
    if options.model not in MODELS:
        raise ValueError(f"config argument model={options.model!r} is unknown; valid: {', '.join(MODELS)}")
    process = options.process or ("edm" if options.model == "diffit" else "gaussian")
    if process not in SAMPLERS:
        raise ValueError(f"config argument process={process!r} is unknown; valid: {', '.join(SAMPLERS)}")
    c = common.base()
    c.total_steps, c.batch_size, c.optim.lr = TRAINING[options.model]
    common.backbone(c, **MODELS[options.model])

    c.data.name = "digits"
    c.data.size, c.data.channels, c.data.num_classes = 8, 1, 10
    c.data.threads = 1

    if options.model == "digit":
        common.token_data(c, encoder="pixels", vocabulary=128, grid=4)
        c.data.dir = "runs/quickstart-digit/tokens"
        c.tokens.patch, c.tokens.label_drop = 2, 0.1
    else:
        c.diffusion.process = process
        if process == "edm":
            c.diffusion.edm.sigma_data = SIGMA_DATA
        c.sampling.sampler, c.sampling.steps, c.sampling.clip = SAMPLERS[process]
    c.sampling.guidance.scale = 1.5

    c.optim.warmup_steps, c.optim.schedule = 100, "cosine"
    c.optim.clip = 1.0
    c.ema.decay, c.ema.decay_rampup = 0.995, 0.1
    c.checkpoint.every_steps = 500
    c.log.every_steps = 50
    c.evals.samples.every_steps, c.evals.samples.num = 500, 100

    if options.runlocal:
        c.total_steps, c.batch_size = 4, 16
        c.model.update(LOCAL[options.model])
        if options.model != "digit":
            c.sampling.steps = 4
        c.checkpoint.every_steps = c.evals.samples.every_steps = c.log.every_steps = 2
    return c
