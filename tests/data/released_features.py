"""Small feature folders in the layouts that others published, in files as their programs write them."""

import io
import json
import zipfile

import numpy as np
from safetensors.numpy import save_file

from diffjax.data import layouts, sources
from diffjax.data.features import EDM2_MEAN, EDM2_STD
from diffjax.data.latents import read_manifest
from tests.data import configs
from tests.weights.torch_writer import tensor, write_zip

SD = 0.18215
H, W, C = 4, 6, 4  # unequal, so that exchanged axes are seen


def unit(count, *shape, seed=0):
    """Normal numbers, float32 [count, *shape]."""
    return np.random.default_rng(seed).normal(size=(count, *shape)).astype(np.float32)


def saved(path, array):
    path.parent.mkdir(parents=True, exist_ok=True)
    np.save(path, array)


def npy(array, **options):
    file = io.BytesIO()
    np.save(file, array, **options)
    return file.getvalue()


def frozen(root, count=12):
    """As fast-DiT writes it; the scale is applied. Twelve, so that names sorted as strings would misplace 10 and 11."""
    samples = unit(count, 1, C, H, W)
    for i, sample in enumerate(samples):
        saved(root / f"imagenet256_features/{i}.npy", sample)
        saved(root / f"imagenet256_labels/{i}.npy", np.array([i % 5]))
    return samples[:, 0]


def udit(root, count=24):
    samples = unit(count, 1, C, H, W)
    for i, sample in enumerate(samples):
        for part, array in (("features", sample), ("labels", np.array([i % 5]))):
            saved(root / f"imagenet_{part}/{i // 8}_rank{i % 8}.npy", array)
    return samples[:, 0]


def pair(moments, label):
    """An npy file of an object array, as numpy before 1.24 made one of a tuple."""
    array = np.empty(2, object)
    array[:] = moments, label
    return npy(array, allow_pickle=True)


def u_vit(root, count=5, label=np.int64):
    """Batches of `layouts.BATCH` images and then their mirrors; z of deviation 1 / 0.18215, log-variance not cut."""
    mean = unit(count, 2, C, H, W) / SD  # both views
    log_variance = np.full((count, 2, C, H, W), -4.0, np.float32)
    log_variance[:, :, 0], log_variance[:, :, 1] = -50.0, -2.0
    root.mkdir()
    number = 0
    for first in range(0, count, layouts.BATCH):
        for view in (0, 1):
            for i in range(first, min(first + layouts.BATCH, count)):
                moments = np.concatenate([mean[i, view], log_variance[i, view]])
                (root / f"{number}.npy").write_bytes(pair(moments, label(i % 5)))
                number += 1
    return mean


def edm2(root, count=12, zipped=True):
    mean = unit(count, C, H, W) * np.reshape(EDM2_STD, (C, 1, 1)) + np.reshape(EDM2_MEAN, (C, 1, 1))
    std = np.full_like(mean, 0.25)
    names = [f"00000/img-mean-std-{i:08d}.npy" for i in range(count)]
    files = {name: npy(np.concatenate(each).astype(np.float32)) for name, *each in zip(names, mean, std)}
    files["dataset.json"] = json.dumps({"labels": [[name, i % 5] for i, name in enumerate(names)][::-1]}).encode()
    write_members(root, files, zipped)
    return mean


def write_members(root, files, zipped=True, **options):
    if not zipped:
        for name, data in files.items():
            (root / name).parent.mkdir(parents=True, exist_ok=True)
            (root / name).write_bytes(data)
        return
    with zipfile.ZipFile(root, "w", **options) as archive:
        for name, data in files.items():
            archive.writestr(name, data)


STATISTICS = np.array([1.0, -2.0, 0.5, 3.0]), np.array([2.0, 4.0, 0.5, 1.0])


def va_vae(root, count=11):
    """Two shards and a third of another process; the numbers have the mean and deviation of STATISTICS."""
    mean, std = (each.reshape(C, 1, 1) for each in STATISTICS)
    both = (unit(count, 2, C, H, W) * std + mean).astype(np.float32)
    root.mkdir()
    for name, rows in (("00_shard000", slice(0, 4)), ("00_shard001", slice(4, 7)), ("01_shard000", slice(7, count))):
        shard = {"latents": both[rows, 0], "latents_flip": both[rows, 1], "labels": np.arange(count)[rows] % 5}
        save_file({k: np.ascontiguousarray(v) for k, v in shard.items()}, root / f"latents_rank{name}.safetensors")
    write_statistics(root, **{k: each.reshape(1, C, 1, 1) for k, each in zip(("mean", "std"), STATISTICS)})
    return both


def write_statistics(root, **arrays):
    stats = {name: tensor(array.astype(np.float32), name) for name, array in arrays.items()}
    write_zip(root / "latents_stats.pt", stats)


def last(array):
    """[..., c, h, w] -> [..., h, w, c], as float16 keeps it."""
    return np.moveaxis(array, -3, -1).astype(np.float16)


def opened(out, **leaves):
    manifest = read_manifest(out)
    spread = {leaf: manifest[leaf] for leaf in ("scale", "shift", "input_range")}
    spread = {leaf: tuple(value) if isinstance(value, list) else value for leaf, value in spread.items()}
    common = {"size": H, "channels": C, "num_classes": 5, "dir": str(out), "split": "", "flip": False}
    return sources.load(**configs.section("latents", **(common | spread | leaves)))


MAKERS = {"fast-dit": frozen, "udit": udit, "u-vit": u_vit, "edm2": edm2, "va-vae": va_vae}
STD = np.full((C, H, W), 0.5, np.float32)


def other_zip(**changes):
    """A zip of EDM2 with other members; None: without."""

    def change(root):
        with zipfile.ZipFile(root) as archive:
            files = {name: archive.read(name) for name in archive.namelist()}
        files |= {
            name.replace("__", "/").replace("_npy", ".npy").replace("_json", ".json"): data
            for name, data in changes.items()
        }
        write_members(root, {name: data for name, data in files.items() if data is not None})

    return change


def named(number, data):
    return other_zip(**{f"00000__img-mean-std-{number:08d}_npy": data})
