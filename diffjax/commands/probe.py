"""Score linear classifiers of the input of each block of a token model (a linear probe).

python -m diffjax tokenize --config=configs/quickstart.py:model=digit --config.images.split=test \\
    --codebook=runs/quickstart-digit/tokens/codebook.npy --out=runs/quickstart-digit/tokens-test
python -m diffjax probe --workdir=runs/quickstart-digit --test=runs/quickstart-digit/tokens-test --out=probe.json

The features of block n are its input, averaged over all positions; a model with classes gets its null class. Without
--train the classifiers learn from the run's own tokens. For tokens of pixel patches, baseline classifiers are trained
the same way on the images, on the images reconstructed from the tokens, and on the token histogram of each image.

The published probe of DiGIT makes 100,000 steps of 4 x 256 examples, which it crops anew each time; here tokens are
fixed, and those of mirrored images are examples of their own. All features are kept in memory.
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from absl import flags
from jax.sharding import Mesh

from diffjax.commands import define_distributed, define_overwrite, define_path, make_folder, refuse_other_result
from diffjax.data import sources
from diffjax.data import tokens as records
from diffjax.data.source import scaled
from diffjax.errors import UserError
from diffjax.evaluation import linear_probe, protocol
from diffjax.experiment import Experiment
from diffjax.parallel import hosts
from diffjax.parallel.mesh import batch_sharding
from diffjax.runs import Run, open_run

FEATURES = "input of each block, mean over all places"
IMAGES, DECODED, COUNTS = "images", "images_of_codes", "counts_of_codes"  # what is not features of a block
BATCH = 256  # examples whose features are computed at a time
REQUIRED = ("workdir", "test", "out")


class Examples(NamedTuple):
    """A folder of tokens, int32 [n, views, positions], with labels, int32 [n]."""

    folder: Path
    manifest: dict[str, Any]
    tokens: np.ndarray
    labels: np.ndarray

    @property
    def views(self) -> int:
        return self.tokens.shape[1]


class Inputs(NamedTuple):
    """Inputs of the classifiers, float32 [n, blocks, d] each; `train` has one view after the other."""

    train: np.ndarray
    test: np.ndarray


def define_flags(values: flags.FlagValues) -> None:
    number = flags.DEFINE_integer
    define_path("workdir", None, "run folder: its config and its checkpoint", values)
    define_path("train", None, "folder of tokens to learn from; the run's own by default", values)
    define_path("test", None, "folder of tokens to score on", values)
    define_path("out", None, "result file, .json", values)
    define_overwrite(values)
    number("step", None, "which checkpoint; the latest by default", flag_values=values)
    flags.DEFINE_enum("weights", "ema", ["ema", "params"], "average or last parameters", flag_values=values)
    number("steps", 2000, "of the classifiers' training", lower_bound=1, flag_values=values)
    number("batch_size", 256, "examples in each of them", lower_bound=1, flag_values=values)
    flags.DEFINE_float("learning_rate", 0.4, "at the first of them; it falls to 0", flag_values=values)
    number("seed", 0, "of the classifiers", lower_bound=0, upper_bound=2**32 - 1, flag_values=values)
    define_distributed(values)


def run(values: flags.FlagValues, overrides: list[str]) -> None:
    hosts.start(values.distributed)
    if jax.process_count() > 1:
        raise UserError("probe runs as one process, on all its devices; start it on one host")
    workdir, out = values.workdir, values.out
    learn = [f"--config.data.dir={values.train}"] if values.train else []
    trained = open_run(workdir, learn, weights=values.weights, step=values.step)
    experiment = trained.experiment
    if not hasattr(experiment.model, "features") or experiment.method.takes_source:
        raise UserError(f"probe is for token models of image features, and {workdir} holds another model")
    folders = Path(experiment.data_folder), values.test
    train, test = (read(folder, experiment, trained.origin["codes"]) for folder in folders)
    if train.manifest["num_classes"] != test.manifest["num_classes"]:
        raise UserError(f"{train.folder} and {test.folder} differ in their classes; one classifier is to fit both")
    settings = {"steps": values.steps, "batch_size": values.batch_size}
    settings |= {"learning_rate": values.learning_rate, "seed": values.seed}
    known = result({}, trained, train, test, settings)
    refuse_other_result(out, {name: known[name] for name in ("protocol", "subject")}, values.overwrite)
    make_folder(out)
    inputs = {"block": of_blocks(trained, train, test)} | of_pixels(experiment, train, test)
    scores = score(inputs, train, test, experiment.mesh, settings)
    protocol.write(out, result(scores, trained, train, test, settings))
    print_table(scores, len(test.labels))
    print(f"wrote {out}")


def read(folder: Path, experiment: Experiment, trained: Mapping[str, Any]) -> Examples:
    """The tokens of a folder. UserError unless they are of the kind that the model was trained on, and labelled."""
    manifest = records.check_kinds(folder, trained)
    if not manifest["num_classes"]:
        raise UserError(f"the tokens in {folder} have no labels, and a classifier needs them")
    examples = experiment.other_source(dir=str(folder), num_classes=manifest["num_classes"], flip=False).examples
    stored = [examples[i] for i in range(len(examples))]
    tokens = np.stack([example["image"][:, 0] for example in stored])
    return Examples(folder, manifest, tokens, np.array([example["label"] for example in stored], np.int32))


def of_blocks(trained: Run, train: Examples, test: Examples) -> Inputs:
    """The input of each block of the model, averaged over all positions."""
    model, params, mesh = trained.experiment.model, trained.params, trained.experiment.mesh
    if model.num_classes and not model.null_class:
        raise UserError(
            "probe: what this model sees begins with the class, and it has no null class to begin with instead; "
            "train one with tokens.label_drop above 0, or without classes (data.num_classes = 0)"
        )
    rows = -(-BATCH // mesh.size) * mesh.size
    y = np.full(rows, model.num_classes, np.int32) if model.num_classes else None

    @jax.jit
    def features(tokens: jax.Array, y: jax.Array | None) -> jax.Array:
        return jnp.swapaxes(model.apply({"params": params}, tokens, y, method="features"), 0, 1)

    def all_of(tokens: np.ndarray) -> np.ndarray:
        parts = []
        for first in range(0, len(tokens), rows):
            part = tokens[first : first + rows]
            whole = np.concatenate([part, np.repeat(part[-1:], rows - len(part), axis=0)])
            with jax.set_mesh(mesh):
                parts.append(np.asarray(features(*jax.device_put((whole, y), batch_sharding(mesh))))[: len(part)])
        return np.concatenate(parts)

    return Inputs(*map(all_of, tokens_of(train, test)))


def tokens_of(train: Examples, test: Examples) -> tuple[np.ndarray, np.ndarray]:
    """Tokens int32 [n, positions] to learn from, all views, and to score on, the first view."""
    return train.tokens.swapaxes(0, 1).reshape(-1, train.tokens.shape[2]), test.tokens[:, 0]


def of_pixels(experiment: Experiment, train: Examples, test: Examples) -> dict[str, Inputs]:
    """Baseline inputs for tokens of pixel patches: images, images reconstructed from the tokens, token histograms.

    The images are in the order of their tokens.
    """
    if train.manifest["streams"][0]["encoder"]["name"] != "pixels":
        return {}
    decode = experiment.decode
    tokens = tokens_of(train, test)
    count = lambda each: np.stack([np.bincount(row, minlength=experiment.model.vocabulary) for row in each])  # noqa: E731
    pictures = images(experiment, train)
    mirrored = [pictures, pictures[:, :, ::-1]][: train.views]
    arrays = {
        IMAGES: (np.concatenate(mirrored), images(experiment, test)),
        DECODED: (np.asarray(decode(each)) for each in tokens),
        COUNTS: map(count, tokens),
    }
    return {
        name: Inputs(*(array.reshape(len(array), 1, -1).astype(np.float32) for array in pair))
        for name, pair in arrays.items()
    }


def images(experiment: Experiment, examples: Examples) -> np.ndarray:
    """The images that tokens were made of, float32 [n, h, w, c] in [-1, 1]."""
    made_of = examples.manifest["images"]
    source = experiment.images_of_tokens(split=made_of["split"])
    if json.loads(json.dumps(source.fingerprint)) != made_of:
        raise UserError(f"the tokens in {examples.folder} are of {made_of}, and the run's config knows other images")
    images, _ = sources.arrays(source)
    return scaled(images)


def score(
    inputs: Mapping[str, Inputs], train: Examples, test: Examples, mesh: Mesh, settings: Mapping[str, Any]
) -> dict[str, dict[str, float]]:
    """{"block_0": {"value": accuracy on the examples to score on, "train": on the others}, ...}."""
    labels, num_classes = np.tile(train.labels, train.views), train.manifest["num_classes"]
    scores = {}
    for name, pair in inputs.items():
        probe = linear_probe.fit(pair.train, labels, num_classes, mesh, **settings)
        on_train = linear_probe.accuracy(probe, pair.train, labels)
        on_test = linear_probe.accuracy(probe, pair.test, test.labels)
        for block, (a, b) in enumerate(zip(on_test, on_train)):
            scores[f"block_{block}" if name == "block" else name] = {"value": float(a), "train": float(b)}
    return scores


def result(
    scores: Mapping[str, Any],
    trained: Run,
    train: Examples,
    test: Examples,
    settings: Mapping[str, Any],
) -> dict[str, Any]:
    """The result file: scores, how they came about, what they are about."""
    said = {
        "features": FEATURES,
        "label": "null class" if trained.experiment.num_classes else "none",
        "optimizer": f"SGD, momentum {linear_probe.MOMENTUM}, cosine to 0",
        **settings,
        **{name: {"images": e.manifest["images"], "views": e.views} for name, e in (("train", train), ("test", test))},
        "ema": trained.origin["weights"],
        "precision": trained.experiment.precision,
        "code_version": protocol.code_version(),
    }
    model = trained.experiment.description()["model"]
    about = {"model": model, "codes": records.kinds(train.manifest), "origin": dict(trained.origin)}
    return {"values": dict(scores), "protocol": said, "subject": about}


def print_table(scores: Mapping[str, Mapping[str, float]], count: int) -> None:
    """The scores in percent, and which is better: the best block, or pixels."""
    print(f"{'accuracy, %':<20}{'train':>8}{'test':>8}")
    for name, row in scores.items():
        print(f"{name.replace('_', ' '):<20}{100 * row['train']:>8.1f}{100 * row['value']:>8.1f}")
    value = lambda name: scores[name]["value"]  # noqa: E731
    best = max((name for name in scores if name.startswith("block")), key=value)
    said = f"{best.replace('_', ' ')} is the best on these {count} test images, with {100 * value(best):.1f} %"
    if IMAGES not in scores:
        print(f"{said}; there are no raw pixels to compare with")
        return
    more = round(count * (value(best) - value(IMAGES)))
    word = "beats" if more > 0 else "equals" if more == 0 else "does not beat"
    print(f"{said}: it {word} raw pixels, with {100 * value(IMAGES):.1f} % ({more:+d} images)")
