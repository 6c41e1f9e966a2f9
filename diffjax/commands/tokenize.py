"""Turn images into tokens: OUT/tokens-*.array_record, OUT/codebook.npy and OUT/tokens.json, which says how.

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
from tqdm import tqdm

from diffjax.commands import define_distributed, define_path
from diffjax.config import Config, load
from diffjax.data import draws, shards
from diffjax.data import tokens as records
from diffjax.data.source import Source, scaled
from diffjax.errors import UserError
from diffjax.files import atomic, only_writer, write_npy
from diffjax.inputs import tokenization
from diffjax.methods.encoders import Encoder, Tokenization, load_encoder, load_vqgan
from diffjax.parallel import hosts
from diffjax.parallel.mesh import batch_sharding, make_mesh, replicated
from diffjax.tokens import codebooks, kmeans

FIT = "kmeans.npz"  # the fit so far, while it is under way
INTERRUPTED = "the fit of a codebook is kept, the same command resumes from it"
REQUIRED = ("config", "out")


def define_flags(values: flags.FlagValues) -> None:
    flags.DEFINE_string("config", None, "recipe of a token model", flag_values=values)
    define_path("out", None, "folder for the tokens", values)
    define_path("codebook", None, "centroids, .npy float32 [k, d]; fitted when not given", values)
    flags.DEFINE_integer("batch_size", 128, "images at a time on all devices", lower_bound=1, flag_values=values)
    define_distributed(values)


def run(values: flags.FlagValues, overrides: list[str]) -> None:
    hosts.start(values.distributed)
    tokenize(load(values.config, overrides), values.out, values.codebook, values.batch_size)


def tokenize(config: Config, out: Path, given: Path | None = None, batch_size: int = 128) -> None:
    """Tokens of all images of a config, in the folder `out`, by the codebook `given`, the encoder's or a fitted one."""
    if jax.process_count() > 1:
        raise UserError("tokenize runs as one process, on all its devices; start it on one host")
    asked = tokenization(config)
    source, encoder = asked.images, load_encoder(asked.made)
    decoder = load_vqgan(asked.made, asked.made.decoder, "tokens.decoder") if asked.made.decoder else None
    if given and encoder.codebook is not None:
        raise UserError(f"--codebook={given}: the encoder {asked.made.encoder} has its own; leave it out")
    if given:
        encoder = encoder._replace(codebook=codebooks.read_codebook(given))
    _check(asked, [encoder, decoder] if decoder else [encoder])
    shards.make_folder(out, records.MANIFEST)
    with only_writer(out):
        _write(asked, source, encoder, decoder, out, batch_size)


def _write(
    asked: Tokenization,
    source: Source,
    encoder: Encoder,
    decoder: Encoder | None,
    out: Path,
    batch_size: int,
) -> None:
    mesh = make_mesh({"data": -1})
    batch_size = -(-batch_size // mesh.size) * mesh.size
    with jax.set_mesh(mesh):
        encoder, decoder = (_everywhere(each, mesh) for each in (encoder, decoder))
        if encoder.codebook is None:
            codebook = _fit(asked, source, encoder.encode, batch_size, mesh, out / FIT)
            encoder = encoder._replace(codebook=codebook)
        encoders = [encoder, decoder] if decoder else [encoder]
        origin = records.Origin(_codebooks(asked, encoders), source.fingerprint, source.num_classes)
        with atomic(out / records.CODEBOOK) as file:
            write_npy(file, np.asarray(encoder.codebook))
        examples = _tokens(source, encoders, asked.mirrored, batch_size, mesh)
        manifest = records.write_tokens(out, tqdm(examples, "tokens", len(source.examples), disable=None), origin)
    (out / FIT).unlink(missing_ok=True)
    kinds = " and ".join(f"{each.vocabulary} of {each.encoder['name']}" for each in origin.codebooks)
    print(f"wrote {asked.made.grid} x {asked.made.grid} tokens ({kinds}) of {manifest['count']} images to {out}")


def _check(asked: Tokenization, encoders: list[Encoder]) -> None:
    """Check all that can be checked before any feature is computed."""
    kmeans.check_settings(asked.iterations, asked.seed, asked.init)
    for (leaf, count), encoder in zip(asked.counts.items(), encoders):
        if not 1 <= count <= records.LARGEST:
            raise UserError(f"data.{leaf} = {count}: valid: 1 to {records.LARGEST}")
        found = count if encoder.codebook is None else len(encoder.codebook)
        if found != count:
            kind = f"the codebook of {encoder.identity['name']} has {found} centroids"
            raise UserError(f"{kind}, but data.{leaf} = {count}")


def _everywhere(encoder: Any, mesh: Mesh) -> Any:
    """The encoder, or None, with its parameters on all devices."""
    return encoder and encoder._replace(encode=jax.device_put(encoder.encode, replicated(mesh)))


def _codebooks(asked: Tokenization, encoders: list[Encoder]) -> tuple[records.Codebook, ...]:
    books = [np.asarray(encoder.codebook) for encoder in encoders]
    return tuple(
        records.Codebook(encoder.identity, len(book), records.codebook_sha256(book), asked.made.grid)
        for encoder, book in zip(encoders, books)
    )


def _fit(asked: Tokenization, source: Source, encode: Partial, batch_size: int, mesh: Mesh, state: Path) -> np.ndarray:
    """The codebook, by k-means on features of the images, float32 [k, d]."""
    k = asked.counts["vocabulary"]
    count = len(source.examples)
    chosen = np.arange(count)
    if 0 < asked.fit_images < count:
        chosen = np.sort(draws.permutation(asked.seed, "codebook", 0, count)[: asked.fit_images])
    points = _points(source, chosen, encode, k, asked.seed, batch_size, mesh)
    bar = tqdm(total=asked.iterations, desc="k-means", disable=None)

    def progress(iteration: int, objective: float) -> None:
        bar.update(iteration - bar.n)
        bar.set_postfix_str(f"mean squared distance {objective / len(points):.4g}")

    with bar:
        fitted = kmeans.fit(
            points,
            k,
            mesh=mesh,
            state=state,
            progress=progress,
            iterations=asked.iterations,
            seed=asked.seed,
            init=asked.init,
        )
    return fitted.centroids


def _points(
    source: Source, chosen: np.ndarray, encode: Partial, k: int, seed: int, batch_size: int, mesh: Mesh
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


def _features(source: Source, chosen: np.ndarray, encode: Partial, batch_size: int, mesh: Mesh) -> Iterator[np.ndarray]:
    jitted = jax.jit(lambda encode, images: encode(images))
    for images, _ in _batches(source, chosen, batch_size):
        yield np.asarray(jitted(encode, _put(images, batch_size, mesh)))[: len(images)]


def _batches(source: Source, chosen: np.ndarray, batch_size: int) -> Iterator[tuple[np.ndarray, list[dict[str, Any]]]]:
    """Images uint8 [at most batch_size, h, w, c], and their examples."""
    for start in range(0, len(chosen), batch_size):
        examples = [source.examples[int(i)] for i in chosen[start : start + batch_size]]
        yield np.stack([example["image"] for example in examples]), examples


def _put(images: np.ndarray, batch_size: int, mesh: Mesh) -> jax.Array:
    """uint8 images as float32 in [-1, 1] on the devices, filled up to a whole batch with copies of the last."""
    whole = np.concatenate([images, np.repeat(images[-1:], batch_size - len(images), axis=0)])
    return jax.device_put(scaled(whole), batch_sharding(mesh))


@jax.jit
def _nearest(encode: Partial, images: jax.Array, centroids: jax.Array) -> jax.Array:
    return kmeans.assign(encode(images), centroids)


def _tokens(
    source: Source, encoders: list[Encoder], mirrored: bool, batch_size: int, mesh: Mesh
) -> Iterator[tuple[np.ndarray, int]]:
    """Tokens int32 [views, codebooks, n] and label of every image."""
    kinds = [(encoder.encode, jnp.asarray(encoder.codebook)) for encoder in encoders]
    for images, examples in _batches(source, np.arange(len(source.examples)), batch_size):
        views = [_put(view, batch_size, mesh) for view in ([images, images[:, :, ::-1]] if mirrored else [images])]
        tokens = np.array([[_nearest(encode, view, centroids) for encode, centroids in kinds] for view in views])
        for i, example in enumerate(examples):
            yield tokens[:, :, i], example["label"]
