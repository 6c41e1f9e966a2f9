"""Score a samples file, or compare two result files.

python -m diffjax evaluate --samples=runs/a/samples.npz --reference=digits --out=runs/a/scores.json
python -m diffjax evaluate --compare a/scores.json b/scores.json

The reference is an embedded set (digits, emoji32) or a file in the layout of samples. Scores on pixels are for small
images: they tell whether training works and are not FID. Results with different protocols are not compared.
"""

from pathlib import Path
from typing import Any

from absl import flags
from ml_collections import ConfigDict

from diffjax.data import sources
from diffjax.errors import UserError
from diffjax.evaluation import pixels, protocol
from diffjax.files import file_sha256
from diffjax.sampling.samples import read_samples

EMBEDDED = ("digits", "emoji32")
REST = "compare"  # the flag that arguments without a name belong to


def define_flags(values: flags.FlagValues) -> None:
    flags.DEFINE_string("samples", None, "samples file, .npz", flag_values=values)
    flags.DEFINE_string("reference", None, f"{', '.join(EMBEDDED)}, or an .npz file like samples", flag_values=values)
    flags.DEFINE_string("out", None, "result file; <samples>.scores.json by default", flag_values=values)
    flags.DEFINE_list("compare", [], "two result files, instead of all else", flag_values=values)


def run(values: flags.FlagValues, overrides: list[str]) -> None:
    if values.compare:
        if len(values.compare) != 2 or values.samples:
            raise UserError("evaluate: --compare takes two result files, and no other flag")
        compare(*map(Path, values.compare))
        return
    if not values.samples or not values.reference:
        raise UserError("evaluate: give --samples and --reference, or --compare")
    samples = Path(values.samples)
    evaluate(samples, values.reference, Path(values.out) if values.out else samples.with_suffix(".scores.json"))


def evaluate(samples: Path, reference: str, out: Path) -> dict[str, Any]:
    """Score, print a short table, write the result file `out`; returns the result."""
    images, labels, made = read_samples(samples)
    train, held_out, identity = reference_set(reference)
    values = pixels.score((images, labels), train, held_out)
    result = protocol.result(
        values,
        features=pixels.FEATURES,
        features_sha256="none",
        resize="none",
        reference=identity,
        num=len(images),
        samples=made | {"file": str(samples), "file_sha256": file_sha256(samples)},
    )
    protocol.write(out, result)
    form = f", model {made['form']}" if "form" in made else ""
    print(f"{samples}: {len(images)} images{form}")
    print(f"against {identity['count']} of {identity['name']} (pixel scores, not FID)")
    print(f"{'':<26}{'samples':>10}{'held-out real':>16}")
    for score, columns in values.items():
        real = f"{columns['held_out_real']:>16.4f}" if "held_out_real" in columns else f"{'-':>16}"
        print(f"{score:<26}{columns['value']:>10.4f}{real}")
    print(f"wrote {out}")
    return result


def compare(a: Path, b: Path) -> None:
    """Print the scores of two result files side by side; UserError when their protocols differ."""
    pairs = protocol.compare(protocol.read(a), protocol.read(b))
    print(f"{'':<26}{'a':>10}{'b':>10}{'b - a':>11}")
    for score, (value_a, value_b) in pairs.items():
        print(f"{score:<26}{value_a:>10.4f}{value_b:>10.4f}{value_b - value_a:>+11.4f}")


def reference_set(name: str) -> tuple[pixels.Labelled, pixels.Labelled | None, dict[str, Any]]:
    """(training images, held-out images if there are any, identity) of the reference."""
    if name in EMBEDDED:
        parts = [sources.SOURCES[name](ConfigDict({"name": name, "split": split})) for split in ("train", "test")]
        train, held_out = (sources.arrays(part) for part in parts)
        sha256 = parts[0].fingerprint["sha256"]
        identity = {"name": name, "sha256": sha256, "count": len(train[0]), "held_out_count": len(held_out[0])}
        return train, held_out, identity
    path = Path(name)
    if path.suffix != ".npz":
        raise UserError(f"--reference={name}: valid: {', '.join(EMBEDDED)}, or an .npz file in the layout of samples")
    images, labels, _ = read_samples(path)
    identity = {"name": path.name, "sha256": file_sha256(path), "count": len(images), "held_out_count": 0}
    return (images, labels), None, identity
