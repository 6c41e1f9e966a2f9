"""Turn images into codes: OUT/tokens-*.array_record, OUT/codebook.npy and OUT/tokens.json, which says how.

python -m diffjax tokenize --config=configs/quickstart.py:model=digit --out=runs/quickstart-digit/tokens
python -m diffjax tokenize --config=configs/digit_stage1.py --codebook=km_8k.npy --out=data/imagenet256-tokens

The config's section `images` says which images, `data.encoder` what makes features of them, `tokens` with which
options. Without --codebook one is fitted to them by k-means; started again after an interruption, that fit goes on.
"""

from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from absl import flags
from jax.sharding import Mesh
from ml_collections import ConfigDict
from tqdm import tqdm

from diffjax.data import draws, shards, sources, tokens
from diffjax.errors import UserError
from diffjax.parallel.mesh import batch_sharding, make_mesh
from diffjax.tokens import kmeans, pixels
from diffjax.training import config as configs
from diffjax.verbs import local_path

FIT = "kmeans.npz"  # the fit so far, while it is under way
WITHOUT_PIXELS = ("latents", "tokens")


class Encoder(NamedTuple):
    """A jitted function: images float32 [b, h, w, c] in [-1, 1] -> features [b, n, d]; and what it depends on."""

    encode: Any
    identity: dict[str, Any]


def define_flags(values: flags.FlagValues) -> None:
    flags.DEFINE_string("config", None, "recipe of a model of codes", flag_values=values)
    flags.DEFINE_string("out", None, "folder for the codes", flag_values=values)
    flags.DEFINE_string("codebook", None, "centroids, .npy float32 [k, d]; fitted when not given", flag_values=values)
    flags.DEFINE_integer("batch_size", 128, "images at a time on all devices", lower_bound=1, flag_values=values)
    flags.mark_flags_as_required(["config", "out"], values)


def run(values: flags.FlagValues, overrides: list[str]) -> None:
    codebook = local_path("codebook", values.codebook) if values.codebook else None
    tokenize(configs.load(values.config, overrides), local_path("out", values.out), codebook, values.batch_size)


def tokenize(config: ConfigDict, out: Path, given: Path | None = None, batch_size: int = 128) -> None:
    """Codes of all images of a config, in the folder `out`; with the codebook `given`, or one that is fitted."""
    source, encoder = _images(config), _encoder(config)
    shards.make_folder(out, tokens.MANIFEST)
    mesh = make_mesh({"data": -1})
    batch_size = -(-batch_size // mesh.size) * mesh.size
    with jax.set_mesh(mesh):
        fit = partial(_fit, config, source, encoder, batch_size, mesh, out / FIT)
        codebook = kmeans.read_codebook(given) if given else fit()
        if len(codebook) != config.data.codes:
            raise UserError(f"{given} holds {len(codebook)} centroids, but data.codes = {config.data.codes}")
        np.save(out / tokens.CODEBOOK, codebook)
        stream = tokens.Stream(encoder.identity, len(codebook), tokens.codebook_sha256(codebook), config.data.size)
        origin = tokens.Origin((stream,), source.fingerprint, source.num_classes)
        examples = _codes(config, source, encoder, codebook, batch_size, mesh)
        manifest = tokens.write_tokens(out, tqdm(examples, "codes", len(source.examples), disable=None), origin)
    (out / FIT).unlink(missing_ok=True)
    kinds = f"{len(codebook)} clusters of {config.data.encoder}"
    print(f"wrote {config.data.size} x {config.data.size} codes of {manifest['count']} images, {kinds}, to {out}")


def _images(config: ConfigDict) -> sources.Source:
    if "tokens" not in config:
        raise UserError(f"tokenize: the config is that of {config.model.name}, which has no codes; give one of DiGIT")
    if jax.process_count() > 1:
        raise UserError("tokenize runs as one process, on all its devices; start it on one host")
    if config.images.name in WITHOUT_PIXELS:
        raise UserError(f"images.name={config.images.name!r} holds no pixels; valid: a source of images")
    return sources.load(config.images)


def _encoder(config: ConfigDict) -> Encoder:
    name = config.data.encoder
    if name not in ENCODERS:
        raise UserError(f"data.encoder={name!r} is unknown; valid: {', '.join(ENCODERS)}")
    return ENCODERS[name](config)


def _patches(config: ConfigDict) -> Encoder:
    patch = config.tokens.patch
    if config.images.size != patch * config.data.size:
        raise UserError(
            f"images.size = {config.images.size} is not tokens.patch = {patch} times data.size = {config.data.size}"
        )
    return Encoder(jax.jit(lambda images: pixels.encode(images, patch)), {"name": "pixels", "patch": patch})


ENCODERS = {"pixels": _patches}


def _fit(
    config: ConfigDict, source: sources.Source, encoder: Encoder, batch_size: int, mesh: Mesh, state: Path
) -> np.ndarray:
    """The codebook, by k-means on features of the images, float32 [k, d]."""
    settings, k = config.tokens, config.data.codes
    count = len(source.examples)
    chosen = np.arange(count)
    if 0 < settings.fit_images < count:
        chosen = np.sort(draws.permutation(settings.seed, "codebook", 0, count)[: settings.fit_images])
    points = _points(source, chosen, encoder, k, settings.seed, batch_size, mesh)
    bar = tqdm(total=settings.iterations, desc="k-means", disable=None)

    def progress(iteration: int, objective: float) -> None:
        bar.update(iteration - bar.n)
        bar.set_postfix_str(f"mean squared distance {objective / len(points):.4g}")

    options = {"iterations": settings.iterations, "seed": settings.seed, "init": settings.init}
    with bar:
        return kmeans.fit(points, k, mesh=mesh, state=state, progress=progress, **options).centroids


def _points(
    source: sources.Source, chosen: np.ndarray, encoder: Encoder, k: int, seed: int, batch_size: int, mesh: Mesh
) -> np.ndarray:
    """The features that k-means takes of those of the chosen images, in its order, float32 [m, d].

    Only these are kept: of ImageNet's there would be a hundred gigabytes.
    """
    features = _features(source, chosen, encoder, batch_size, mesh)
    first = next(features)
    rows = len(chosen) * first.shape[1]
    wanted = kmeans.sample(rows, k, seed)
    order = np.argsort(wanted)
    ascending = wanted[order]
    points = np.empty((len(wanted), first.shape[2]), np.float32)
    start = 0
    for batch in tqdm(_chain(first, features), "features", -(-len(chosen) // batch_size), disable=None):
        flat = batch.reshape(-1, batch.shape[2])
        inside = slice(*np.searchsorted(ascending, (start, start + len(flat))))
        points[order[inside]] = flat[ascending[inside] - start]
        start += len(flat)
    return points


def _chain(first: np.ndarray, rest: Iterator[np.ndarray]) -> Iterator[np.ndarray]:
    yield first
    yield from rest


def _features(
    source: sources.Source, chosen: np.ndarray, encoder: Encoder, batch_size: int, mesh: Mesh
) -> Iterator[np.ndarray]:
    for images, _ in _batches(source, chosen, batch_size):
        yield np.asarray(encoder.encode(_put(images, batch_size, mesh)))[: len(images)]


def _batches(
    source: sources.Source, chosen: np.ndarray, batch_size: int
) -> Iterator[tuple[np.ndarray, list[dict[str, Any]]]]:
    """Images uint8 [at most batch_size, h, w, c], and their examples."""
    for start in range(0, len(chosen), batch_size):
        examples = [source.examples[int(i)] for i in chosen[start : start + batch_size]]
        yield np.stack([example["image"] for example in examples]), examples


def _put(images: np.ndarray, batch_size: int, mesh: Mesh) -> jax.Array:
    """uint8 images as float32 in [-1, 1] on the devices, filled up to a whole batch with copies of the last."""
    whole = np.concatenate([images, np.repeat(images[-1:], batch_size - len(images), axis=0)])
    values = sources.pixels(whole, np.zeros(batch_size, bool), np.arange(batch_size), seed=0)
    return jax.device_put(values, batch_sharding(mesh))


def _codes(
    config: ConfigDict,
    source: sources.Source,
    encoder: Encoder,
    codebook: np.ndarray,
    batch_size: int,
    mesh: Mesh,
) -> Iterator[tuple[np.ndarray, int]]:
    """Codes int32 [views, 1, n] and label of every image."""
    centroids = jnp.asarray(codebook)
    nearest = jax.jit(lambda images, centroids: kmeans.assign(encoder.encode(images), centroids))
    for images, examples in _batches(source, np.arange(len(source.examples)), batch_size):
        views = [images, images[:, :, ::-1]] if config.tokens.mirrored else [images]
        codes = [np.asarray(nearest(_put(view, batch_size, mesh), centroids)) for view in views]
        for i, example in enumerate(examples):
            yield np.stack([view[i] for view in codes])[:, None], example["label"]
