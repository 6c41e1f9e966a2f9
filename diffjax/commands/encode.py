"""Turn images into latents: OUT/latents-*.array_record and OUT/latents.json, which says how.

python -m diffjax encode --config=configs/imagenet256.py --out=data/imagenet256-latents \\
  --config.images.name=records --config.images.dir=data/imagenet256 --config.images.size=256 \\
  --config.images.num_classes=1000 --config.autoencoder.weights=sd-vae-ft-ema

The config's section `images` says which images, `autoencoder.weights` by which autoencoder, `data` what the latents
should be; with data.flip the mirrored images are encoded, too. Stored are mean and standard deviation of the posterior,
not scaled; training draws from it anew at each visit. --keep_images stores the images themselves beside them.
Started on several hosts, or with JAX_COORDINATOR_ADDRESS, the processes divide the shards of one shared folder.
"""

import contextlib
import dataclasses
import json
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from absl import flags
from jax.sharding import Mesh
from tqdm import tqdm

from diffjax.commands import define_distributed, define_path
from diffjax.config import load
from diffjax.data import image_records, latents, records, shards
from diffjax.errors import UserError
from diffjax.files import only_writer
from diffjax.inputs import encoding
from diffjax.methods.latents import Encoding, check_scaling
from diffjax.parallel import hosts
from diffjax.parallel.mesh import batch_sharding, make_mesh, replicated
from diffjax.weights import autoencoders

SHARED = "all processes have to see the same folder"
INTERRUPTED = "finished shards are kept, the same command makes the others"
REQUIRED = ("config", "out")


def define_flags(values: flags.FlagValues) -> None:
    flags.DEFINE_string("config", None, "recipe of a model of latents", flag_values=values)
    define_path("out", None, "folder for the latents", values)
    flags.DEFINE_integer("batch_size", 32, "images at a time", lower_bound=1, flag_values=values)
    keep = "store every image, as it was cropped, beside its latent; data.images=true reads them"
    flags.DEFINE_boolean("keep_images", False, keep, flag_values=values)
    define_distributed(values)


def run(values: flags.FlagValues, overrides: list[str]) -> None:
    hosts.start(values.distributed)
    encode(encoding(load(values.config, overrides)), values.out, values.batch_size, values.keep_images)


def encode(asked: Encoding, out: Path, batch_size: int = 32, keep_images: bool = False) -> None:
    """Latents of all images, in the folder `out`, with or without the images; shards that are there already stay.

    Several processes divide the missing shards, each on its own devices; the lead writes all else.
    """
    module, params, sha256 = autoencoders.read(asked.autoencoder)
    check(asked, module)
    image = (asked.images.size, asked.images.size, asked.images.channels) if keep_images else None
    mesh = make_mesh({"data": -1}, jax.local_devices())
    batch_size = -(-batch_size // mesh.size) * mesh.size
    request = {
        "source": json.dumps(asked.images.fingerprint, sort_keys=True),
        "autoencoder": describe(module),
        "weights_sha256": sha256,
        "mirrored": asked.mirrored,
        **dataclasses.asdict(asked.scaling),
        "image": image,
        "shard_size": latents.SHARD_SIZE,
    }
    with contextlib.ExitStack() as alone:
        with hosts.together():
            if hosts.is_lead():
                shards.make_folder(out, latents.MANIFEST)
                alone.enter_context(only_writer(out))
                shards.agree(out, latents.REQUEST, request, latents.NAME, latents.LATER)
        jobs = own_shards(out, len(asked.images.examples))
        with hosts.together():
            if not (out / latents.REQUEST).is_file():
                raise UserError(f"{out / latents.REQUEST} is not there, which the first process wrote; {SHARED}")
            write(asked, module, params, jobs, batch_size, mesh, keep_images)
        with hosts.together():
            if hosts.is_lead():
                finish(asked, request, autoencoders.encoder_sha256(params), out)


def own_shards(out: Path, count: int) -> list[tuple[Path, range]]:
    """The missing shards, as the lead lists them, that this process writes, each with the numbers of its images."""
    every = shards.every(out, latents.NAME, count, latents.SHARD_SIZE)
    lacking = hosts.leads(np.array([not path.is_file() for path, _ in every]))
    jobs = [each for each, lacks in zip(every, lacking) if lacks]
    return jobs[jax.process_index() :: jax.process_count()]


def describe(module: Any) -> str:
    """The autoencoder with its sizes, in a line."""
    fields = [field.name for field in dataclasses.fields(module) if field.name not in ("parent", "name")]
    return f"{type(module).__name__}({', '.join(f'{name}={getattr(module, name)}' for name in fields)})"


def check(asked: Encoding, module: Any) -> None:
    """UserError for an autoencoder that does not make the latents that the config expects."""
    size, channels = asked.images.size, asked.images.channels
    if size != asked.size * module.factor or asked.channels != module.latent_channels:
        raise UserError(
            f"encode: of images of {size} pixels this autoencoder makes latents of size {size // module.factor} and "
            f"{module.latent_channels} channels; the config has data.size = {asked.size}, "
            f"data.channels = {asked.channels}, images.size = {size}"
        )
    if channels != module.channels:
        raise UserError(f"encode: the images have {channels} channels, and this autoencoder takes {module.channels}")
    if asked.num_classes not in (0, asked.images.num_classes):
        raise UserError(
            f"encode: images.num_classes = {asked.images.num_classes}, and data.num_classes = {asked.num_classes}; "
            "valid: the same, or data.num_classes = 0"
        )
    asked.scaling.check(asked.channels)
    check_scaling(module, asked.scaling, "encode: this autoencoder")
    if not hasattr(module, "scale") and asked.scaling.scale != 1.0:
        raise UserError(f"encode: this autoencoder scales latents by 1.0, and data.scale = {asked.scaling.scale}")


def write(
    asked: Encoding,
    module: Any,
    params: Any,
    jobs: Sequence[tuple[Path, range]],
    batch_size: int,
    mesh: Mesh,
    keep_images: bool,
) -> None:
    """Write shards, each of the images of some numbers."""
    quiet = None if hosts.is_lead() else True
    params = jax.device_put(params, replicated(mesh))
    moments = jax.jit(lambda params, images: moments_of(module, params, images, asked))
    with (
        ThreadPoolExecutor(asked.threads) as readers,
        ThreadPoolExecutor(1) as ahead,
        tqdm(total=sum(len(numbers) for _, numbers in jobs), unit="image", disable=quiet) as bar,
    ):

        def read(numbers: range) -> tuple[np.ndarray, list[int]]:
            examples = list(readers.map(asked.images.examples.__getitem__, numbers))
            return np.stack([each["image"] for each in examples]), [int(each["label"]) for each in examples]

        for path, numbers in jobs:
            batches = [numbers[i : i + batch_size] for i in range(0, len(numbers), batch_size)]
            encoded = encoded_batches((ahead.submit(read, each) for each in batches), params, moments, batch_size, mesh)
            shards.write_shard(path, of_batches(encoded, keep_images, bar))


def encoded_batches(
    reads: Iterator[Any], params: Any, moments: Any, batch_size: int, mesh: Mesh
) -> Iterator[tuple[np.ndarray, np.ndarray, list[int]]]:
    """Moments float16 [b, views, 2, h, w, c], the images and labels.

    Reading, computing and writing overlap by a batch each.
    """
    following, computed = next(reads, None), None
    while following is not None:
        current, following = following, next(reads, None)
        images, labels = current.result()
        filled = np.concatenate([images, np.repeat(images[-1:], batch_size - len(images), axis=0)])
        previous, computed = computed, (moments(params, jax.device_put(filled, batch_sharding(mesh))), images, labels)
        if previous:
            yield np.asarray(previous[0]), *previous[1:]
    if computed:
        yield np.asarray(computed[0]), *computed[1:]


def of_batches(
    batches: Iterator[tuple[np.ndarray, np.ndarray, list[int]]], keep_images: bool, bar: tqdm
) -> Iterator[bytes]:
    for moments, images, labels in batches:
        for each, image, label in zip(moments, images, labels):
            yield records.encode(each, label, image if keep_images else None)
        bar.update(len(labels))


def moments_of(module: Any, params: Any, images: jax.Array, asked: Encoding) -> jax.Array:
    """uint8 images [b, h, w, c] -> mean and standard deviation, float16 [b, views, 2, h/f, w/f, c]."""
    low, high = asked.scaling.input_range

    def of_view(view: jax.Array) -> jax.Array:
        values = (view.astype(jnp.float32) / 127.5 - 1) * ((high - low) / 2) + (high + low) / 2
        mean, log_variance = module.apply({"params": params}, values, method="encode")
        return jnp.stack([mean, jnp.exp(log_variance / 2)], axis=1)

    views = [images, images[:, :, ::-1]] if asked.mirrored else [images]
    with jax.default_matmul_precision("highest"):
        return jnp.stack([of_view(view) for view in views], axis=1).astype(jnp.float16)


def finish(asked: Encoding, request: dict[str, Any], encoder_sha256: str, out: Path) -> None:
    """Write the manifest. UserError where a shard is missing that another process wrote."""
    count = len(asked.images.examples)
    if missing := shards.missing(out, latents.NAME, count, latents.SHARD_SIZE):
        raise UserError(f"{out} lacks {missing[0][0].name}, which another process wrote; {SHARED}")
    origin = latents.Origin(
        source=request["source"],
        autoencoder=request["autoencoder"],
        weights_sha256=request["weights_sha256"],
        encoder_sha256=encoder_sha256,
        **dataclasses.asdict(asked.scaling),
        scale_applied=False,
        num_classes=asked.images.num_classes,
        label_table_sha256=image_records.table_sha256(asked.images.classes),
    )
    shape = (asked.size, asked.size, asked.channels)
    manifest = latents.finish(out, count, 1 + asked.mirrored, shape, origin, request["image"])
    spread = ", ".join(f"{value:.3g}" for value in manifest["std"])
    print(f"wrote {count} latents of {asked.size} x {asked.size} x {asked.channels} to {out}")
    print(f"standard deviation of the scaled latents by channel: {spread} (about 1 is right)")
