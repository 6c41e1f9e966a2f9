"""DiGIT, first stage: a causal transformer over the clusters of DINOv2 features (arXiv 2410.12490, DAMO-NLP-SG/DiGIT).

    python -m diffjax fetch    dinov2_vitb14_reg4
    python -m diffjax convert  --family=dinov2 --checkpoint=dinov2_vitb14_reg4 --out=params/dinov2-b
    python -m diffjax tokenize --config=configs/digit_stage1.py --out=data/imagenet256-dinov2-8192
    python -m diffjax train    --config=configs/digit_stage1.py --workdir=runs/digit-b

    images -> DINOv2 -> k-means -> tokens -> [this model] -> tokens -> [digit_stage2.py] -> VQGAN tokens -> pixels

`tokenize` fits the codebook, or takes the published one (--codebook=km_8k.npy); the images are those of
tensorflow-datasets, prepared as array_record, or those of `prepare imagenet256 --out=DIR` with
--config.images.name=records --config.images.dir=DIR. Arguments: `model=digit-l` (16,384 clusters of the L encoder),
`classes` (a model of classes), `vocabulary=2048` (other codebooks), `model=digit-b-vq` (no features: VQGAN's own
tokens, the paper's baseline; its weights, converted with --family=vqgan, are in params/vqgan).

The scripts tokenize a random crop anew in every step; here the tokens of the central crop and of its mirror image are
made once, resized as ADM does. Their k-means saw crops resized to 224, ours sees what the model is trained on. They
train in float16, this recipe in bfloat16. Batch size and updates are those of 8 devices, 200 epochs. The published
samples of B use top_k=200, 300 for classes, those of L 400. Published (ImageNet validation set as reference,
torch-fidelity), with the second stage:

    |                   | parameters | epochs | FID   | IS     | linear probe |
    |-------------------|------------|--------|-------|--------|--------------|
    | VQ tokens only    | 214 M      | 200    | 24.38 | 30.93  |              |
    | B                 | 219 M      | 400    | 9.13  | 73.85  | 71.7         |
    | L                 | 732 M      | 200    | 4.59  | 141.29 | 80.3         |
    | B, masked stage 2 | 219 M      | 200    | 9.04  | 75.04  |              |
    | B, classes        | 219 M      | 400    | 4.79  | 142.87 |              |
    | L, classes        | 732 M      | 200    | 3.39  | 205.96 |              |
"""

from configs import common

# encoder, its weights, vocabulary, top_k, learning rate
MODELS = {
    "digit-b": ("dinov2", "params/dinov2-b", 8192, 200, 3e-4),
    "digit-l": ("dinov2", "params/dinov2-l", 16384, 400, 3e-4),
    "digit-b-vq": ("vqgan", "params/vqgan", 1024, 300, 5e-4),
}


def get_config(arg: str | None = None):
    options = common.parse(arg, model="digit-b", vocabulary=0, classes=False, runlocal=False)
    if options.model not in MODELS:
        raise ValueError(f"config argument model={options.model!r} is unknown; valid: {', '.join(MODELS)}")
    encoder, weights, vocabulary, top_k, lr = MODELS[options.model]
    c = common.base()
    common.published(c, options.model)
    common.tfds_images(c, "imagenet2012", 256, num_classes=1000)
    common.token_data(c, encoder, options.vocabulary or vocabulary, grid=16)
    c.data.dir = f"data/imagenet256-{encoder}-{c.data.vocabulary}"
    c.data.num_classes = 1000 if options.classes else 0
    c.tokens.weights, c.tokens.fit_images = weights, 128_000
    common.digit_recipe(c, lr, updates=125_000, batch_size=2048)
    c.sampling.tokens.top_k = 300 if options.classes and options.model == "digit-b" else top_k
    if options.runlocal:
        common.run_local(c)
    return c
