"""Turn images into codes: OUT/tokens-*.array_record, OUT/codebook.npy and OUT/tokens.json, which says how.

python -m diffjax tokenize --config=configs/quickstart.py:model=digit --out=runs/quickstart-digit/tokens
python -m diffjax tokenize --config=configs/digit_stage1.py --codebook=km_8k.npy --out=data/imagenet256-dinov2-8192

The config's section `images` says which images, `data.encoder` what makes features of them, `tokens` with which
options. Without --codebook one is fitted to them by k-means; started again after an interruption, that fit goes on.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from absl import flags
from jax.sharding import Mesh
from jax.tree_util import Partial
from ml_collections import ConfigDict
from tqdm import tqdm

from diffjax.data import draws, shards, sources, tokens
from diffjax.errors import UserError
from diffjax.parallel.mesh import batch_sharding, make_mesh, replicated
from diffjax.tokens import kmeans
from diffjax.training import config as configs
from diffjax.training.encoders import Encoder, load_encoder, load_vqgan
from diffjax.verbs import local_path

FIT = "kmeans.npz"  # the fit so far, while it is under way
WITHOUT_PIXELS = ("latents", "tokens")


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
    """Codes of all images of a config, in the folder `out`, by the codebook `given`, the encoder's or a fitted one."""
    source, encoder = _images(config), load_encoder(config)
    decoder = load_vqgan(config, config.tokens.decoder, "tokens.decoder") if config.tokens.decoder else None
    if given and encoder.codebook is not None:
        raise UserError(f"--codebook={given}: the encoder {config.data.encoder} has its own; leave it out")
    if given:
        encoder = encoder._replace(codebook=kmeans.read_codebook(given))
    _check(config, [encoder, decoder] if decoder else [encoder])
    shards.make_folder(out, tokens.MANIFEST)
    mesh = make_mesh({"data": -1})
    batch_size = -(-batch_size // mesh.size) * mesh.size
    with jax.set_mesh(mesh):
        encoder, decoder = (_everywhere(each, mesh) for each in (encoder, decoder))
        if encoder.codebook is None:
            codebook = _fit(config, source, encoder.encode, batch_size, mesh, out / FIT)
            encoder = encoder._replace(codebook=codebook)
        encoders = [encoder, decoder] if decoder else [encoder]
        origin = tokens.Origin(_streams(config, encoders), source.fingerprint, source.num_classes)
        np.save(out / tokens.CODEBOOK, np.asarray(encoder.codebook))
        examples = _codes(source, encoders, config.tokens.mirrored, batch_size, mesh)
        manifest = tokens.write_tokens(out, tqdm(examples, "codes", len(source.examples), disable=None), origin)
    (out / FIT).unlink(missing_ok=True)
    kinds = " and ".join(f"{stream.codes} of {stream.encoder['name']}" for stream in origin.streams)
    print(f"wrote {config.data.size} x {config.data.size} codes ({kinds}) of {manifest['count']} images to {out}")


def _check(config: ConfigDict, encoders: list[Encoder]) -> None:
    """What can be known before any feature is made."""
    kmeans.check_settings(config.tokens.iterations, config.tokens.seed, config.tokens.init)
    if config.tokens.fit_images < 0:
        raise UserError(f"tokens.fit_images = {config.tokens.fit_images}: valid: 0 (all) or more")
    for leaf, encoder in zip(("codes", "decoder_codes"), encoders):
        if not 1 <= config.data[leaf] <= tokens.LARGEST:
            raise UserError(f"data.{leaf} = {config.data[leaf]}: valid: 1 to {tokens.LARGEST}")
        found = config.data[leaf] if encoder.codebook is None else len(encoder.codebook)
        if found != config.data[leaf]:
            kind = f"the codebook of {encoder.identity['name']} has {found} centroids"
            raise UserError(f"{kind}, but data.{leaf} = {config.data[leaf]}")


def _everywhere(encoder: Any, mesh: Mesh) -> Any:
    """The encoder, or None, with its parameters on all devices."""
    return encoder and encoder._replace(encode=jax.device_put(encoder.encode, replicated(mesh)))


def _images(config: ConfigDict) -> sources.Source:
    if "tokens" not in config:
        raise UserError(f"tokenize: the config is that of {config.model.name}, which has no codes; give one of DiGIT")
    if jax.process_count() > 1:
        raise UserError("tokenize runs as one process, on all its devices; start it on one host")
    if config.images.name in WITHOUT_PIXELS:
        raise UserError(f"images.name={config.images.name!r} holds no pixels; valid: a source of images")
    return sources.load(config.images)


def _streams(config: ConfigDict, encoders: list[Encoder]) -> tuple[tokens.Stream, ...]:
    books = [np.asarray(encoder.codebook) for encoder in encoders]
    return tuple(
        tokens.Stream(encoder.identity, len(book), tokens.codebook_sha256(book), config.data.size)
        for encoder, book in zip(encoders, books)
    )


def _fit(
    config: ConfigDict, source: sources.Source, encode: Partial, batch_size: int, mesh: Mesh, state: Path
) -> np.ndarray:
    """The codebook, by k-means on features of the images, float32 [k, d]."""
    k = config.data.codes
    count = len(source.examples)
    chosen = np.arange(count)
    if 0 < config.tokens.fit_images < count:
        chosen = np.sort(draws.permutation(config.tokens.seed, "codebook", 0, count)[: config.tokens.fit_images])
    points = _points(source, chosen, encode, k, config.tokens.seed, batch_size, mesh)
    bar = tqdm(total=config.tokens.iterations, desc="k-means", disable=None)

    def progress(iteration: int, objective: float) -> None:
        bar.update(iteration - bar.n)
        bar.set_postfix_str(f"mean squared distance {objective / len(points):.4g}")

    options = {"iterations": config.tokens.iterations, "seed": config.tokens.seed, "init": config.tokens.init}
    with bar:
        return kmeans.fit(points, k, mesh=mesh, state=state, progress=progress, **options).centroids


def _points(
    source: sources.Source, chosen: np.ndarray, encode: Partial, k: int, seed: int, batch_size: int, mesh: Mesh
) -> np.ndarray:
    """The features that k-means takes of those of the chosen images, in its order, float32 [m, d].

    Only these are kept: of ImageNet's there would be a hundred gigabytes.
    """
    features = _features(source, chosen, encode, batch_size, mesh)
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
    source: sources.Source, chosen: np.ndarray, encode: Partial, batch_size: int, mesh: Mesh
) -> Iterator[np.ndarray]:
    jitted = jax.jit(lambda encode, images: encode(images))
    for images, _ in _batches(source, chosen, batch_size):
        yield np.asarray(jitted(encode, _put(images, batch_size, mesh)))[: len(images)]


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


@jax.jit
def _nearest(encode: Partial, images: jax.Array, centroids: jax.Array) -> jax.Array:
    return kmeans.assign(encode(images), centroids)


def _codes(
    source: sources.Source, encoders: list[Encoder], mirrored: bool, batch_size: int, mesh: Mesh
) -> Iterator[tuple[np.ndarray, int]]:
    """Codes int32 [views, streams, n] and label of every image."""
    kinds = [(encoder.encode, jnp.asarray(encoder.codebook)) for encoder in encoders]
    for images, examples in _batches(source, np.arange(len(source.examples)), batch_size):
        views = [_put(view, batch_size, mesh) for view in ([images, images[:, :, ::-1]] if mirrored else [images])]
        codes = np.array([[_nearest(encode, view, centroids) for encode, centroids in kinds] for view in views])
        for i, example in enumerate(examples):
            yield codes[:, :, i], example["label"]
