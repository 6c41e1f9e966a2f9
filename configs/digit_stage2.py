"""DiGIT, second stage: from the clusters of DINOv2 features to tokens of VQGAN (arXiv 2410.12490, DAMO-NLP-SG/DiGIT).

    python -m diffjax fetch    vqgan_jax_strongaug --from=vqgan_jax_strongaug.ckpt
    python -m diffjax convert  --family=vqgan --checkpoint=vqgan_jax_strongaug --out=params/vqgan
    python -m diffjax tokenize --config=configs/digit_stage2.py --codebook=CODEBOOK --out=data/imagenet256-stage2-8192
    python -m diffjax train    --config=configs/digit_stage2.py --workdir=runs/digit-b-stage2
    python -m diffjax sample   --workdir=runs/digit-b --raw --num=50000 --out=tokens.npz
    python -m diffjax sample   --workdir=runs/digit-b-stage2 --source=tokens.npz --num=50000 --out=samples.npz

CODEBOOK is that of the first stage (data/imagenet256-dinov2-8192/codebook.npy). Arguments: `decoding=nar` (a masked
model, eight rounds, instead of one token after the other), `model=digit-l`. Batch size and updates are those of 8
devices, 200 epochs. The scripts cut 255 y to whole numbers, our samples are rounded (their json says how). What is
known of the results is in digit_stage1.py.
"""

from configs import common

# weights and vocabulary of the encoder
ENCODERS = {"digit-b": ("params/dinov2-b", 8192), "digit-l": ("params/dinov2-l", 16384)}
TRAINING = {"ar": (250_000, 1024), "nar": (125_000, 2048)}  # updates, batch size


def get_config(arg: str | None = None):
    options = common.parse(arg, model="digit-b", decoding="ar", runlocal=False)
    for name, valid in (("model", ENCODERS), ("decoding", TRAINING)):
        if options[name] not in valid:
            raise ValueError(f"config argument {name}={options[name]!r} is unknown; valid: {', '.join(valid)}")
    c = common.base()
    common.published(c, f"{options.model}-stage2-{options.decoding}")
    common.tfds_images(c, "imagenet2012", 256, num_classes=1000)
    weights, vocabulary = ENCODERS[options.model]
    common.token_data(c, "dinov2", vocabulary, grid=16)
    c.data.dir = f"data/imagenet256-stage2-{vocabulary}"
    c.data.channels, c.data.decoder_vocabulary = 2, 1024
    c.data.num_classes = 0
    c.tokens.weights, c.tokens.decoder, c.tokens.fit_images = weights, "params/vqgan", 128_000
    updates, batch_size = TRAINING[options.decoding]
    common.digit_recipe(c, 5e-4, updates, batch_size)
    if options.decoding == "nar":
        c.optim.accumulate = 2
        c.sampling.tokens.rounds = 8
    else:
        c.sampling.tokens.top_p = 0.8
    if options.runlocal:
        common.run_local(c)
    return c
