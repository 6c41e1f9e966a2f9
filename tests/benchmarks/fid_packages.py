"""FID, IS, KID, precision and recall of two folders of PNGs: ours against pytorch-fid and torch-fidelity on the CPU.

    JAX_PLATFORMS=cpu python -m tests.benchmarks.fid_packages [--images=200] [--subset=100]

Needs both packages. The folders hold images of emoji32, of 32 x 32 pixels, drawn without replacement; the first stands
for the generated ones. All networks have the same generated weights of the Inception of 2015, so the values mean
nothing but whether they agree: every one to a thousandth.
"""

import argparse
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
import numpy as np
from PIL import Image

from diffjax.data import sources
from diffjax.evaluation import scores, statistics
from diffjax.weights import from_reference
from tests.golden.test_inception import state_dict

BATCH = 50
AGREEMENT = 1e-3
Table = dict[str, float]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=200, help="in each folder")
    parser.add_argument("--subset", type=int, default=100, help="images of a subset of KID")
    options = parser.parse_args()
    emoji = sources.load("emoji32", size=32, channels=3, num_classes=9, split="train").examples
    chosen = np.random.default_rng(0).permutation(len(emoji))[: 2 * options.images]
    images = np.stack([emoji[int(i)]["image"] for i in chosen])
    sets = images[: options.images], images[options.images :]
    with tempfile.TemporaryDirectory() as folder:
        paths = [written(Path(folder) / name, part) for name, part in zip(("generated", "reference"), sets)]
        packages: dict[str, tuple[str, Callable[[], Table]]] = {
            "torch-fidelity": ("tensorflow", lambda: of_torch_fidelity(paths, options.subset)),
            "pytorch-fid": ("pytorch-fid", lambda: of_pytorch_fid(paths)),
        }
        print(f"{options.images} images in each folder, subsets of {options.subset}")
        worst = 0.0
        for name, (inputs, run) in packages.items():
            worst = max(worst, *compared(name, run(), ours(inputs, sets, options.subset)))
    if worst > AGREEMENT:
        raise SystemExit(f"values differ by {worst:.1e} of theirs; expected at most {AGREEMENT}")


def compared(name: str, theirs: Table, ours: Table) -> Iterator[float]:
    """Prints the values that a package has, and yields how far ours are from them."""
    for score, value in theirs.items():
        difference = abs(ours[score] - value) / abs(value) if value else abs(ours[score])
        print(
            f"{name:15s} {score:10s} {value:.8f}, ours {ours[score]:.8f}, relative difference {difference:.1e}",
            flush=True,
        )
        yield difference


def written(folder: Path, images: np.ndarray) -> str:
    folder.mkdir()
    for index, image in enumerate(images):
        Image.fromarray(image).save(folder / f"{index:05d}.png")
    return str(folder)


def ours(inputs: str, sets: tuple[np.ndarray, np.ndarray], subset: int) -> Table:
    (pool3, logits), (reference, _) = (features(inputs, images) for images in sets)
    found = statistics.of(reference)
    inception = scores.inception_score(logits, splits=10, shuffle_seed=2020)
    # torch-fidelity draws of its first folder first.
    kernel = scores.kernel_distance_of_subsets(pool3, reference, subsets=100, size=subset, seed=2020)
    precision, recall = scores.precision_recall(pool3, reference, k=3)
    return {
        "FID": scores.frechet_distance(pool3, found.mean, found.covariance).value,
        "IS": inception.value,
        "IS std": inception.spread or 0.0,
        "KID": kernel.value,
        "KID std": kernel.spread or 0.0,
        "precision": precision.value,
        "recall": recall.value,
    }


def features(inputs: str, images: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The means [n, 2048] and logits without bias [n, 1008] of images uint8 [n, h, w, 3]."""
    module, params = from_reference("inception", state_dict())
    run: Callable[..., Any] = jax.jit(module.clone(inputs=inputs).apply)
    padded = np.concatenate([images, np.zeros((-len(images) % BATCH, *images.shape[1:]), np.uint8)])
    found = [run({"params": params}, batch) for batch in np.split(padded, len(padded) // BATCH)]
    pool3, logits = (np.concatenate([getattr(out, name) for out in found]) for name in ("pool3", "logits_unbiased"))
    return pool3[: len(images)], logits[: len(images)]


def of_pytorch_fid(paths: list[str]) -> Table:
    import pytorch_fid.inception
    from pytorch_fid.fid_score import calculate_fid_given_paths

    weights = torch_weights()
    pytorch_fid.inception.load_state_dict_from_url = lambda *_, **__: weights
    return {"FID": float(calculate_fid_given_paths(paths, BATCH, "cpu", 2048, num_workers=0))}


def of_torch_fidelity(paths: list[str], subset: int) -> Table:
    import torch
    import torch_fidelity

    with tempfile.NamedTemporaryFile(suffix=".pth") as file:
        torch.save(torch_weights(), file.name)
        found = torch_fidelity.calculate_metrics(
            input1=paths[0],
            input2=paths[1],
            feature_extractor="inception-v3-compat",  # by default that of precision and recall is another network
            feature_extractor_weights_path=file.name,
            feature_layer_prc="2048",
            **dict.fromkeys(("isc", "fid", "kid", "prc"), True),
            kid_subset_size=subset,
            batch_size=BATCH,
            save_cpu_ram=True,  # no processes beside this one, which has threads
            cuda=False,
            cache=False,
            verbose=False,
        )
    names = {
        "FID": "frechet_inception_distance",
        "IS": "inception_score_mean",
        "IS std": "inception_score_std",
        "KID": "kernel_inception_distance_mean",
        "KID std": "kernel_inception_distance_std",
        "precision": "precision",
        "recall": "recall",
    }
    return {score: float(found[name]) for score, name in names.items()}


def torch_weights() -> dict[str, Any]:
    import torch

    return {name: torch.from_numpy(array) for name, array in state_dict().items()}


if __name__ == "__main__":
    main()
