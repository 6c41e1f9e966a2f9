"""Result files: {"values": {score: {"value": ...}}, "protocol": {...}, "subject": {...}}.

The protocol says how the numbers came about, the subject what they are about (model, weights, samples file). Two
results are comparable when every field of their protocols is recorded and equal; the version of the code is recorded
alone: results of two commits are what is compared.
"""

import json
import subprocess
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import diffjax
from diffjax.errors import UserError
from diffjax.files import write_json
from diffjax.trees import leaves

# what the maker of the samples knows; the scorer knows the rest
DECODER = "autoencoder_"  # what the fields of a decoder of latents begin with; pictures of others have none
SAMPLING_FIELDS = ("sampling", "labels", "rounding", "precision", "seed", "first", "code_version")


def result(
    values: Mapping[str, Mapping[str, Any]],
    *,
    features: str,
    features_sha256: str,
    resize: str,
    reference: Mapping[str, Any],
    num: int,
    samples: Mapping[str, Any],
) -> dict[str, Any]:
    """A result, json-able.

    Args:
        features: the network and layer that the scores look at, with the hash of its weights ("none" without any).
        resize: how images reached the network's size.
        reference: name, sha256 and number of images of the reference set.
        num: how many images were scored.
        samples: the json beside the samples file; {} leaves the fields of SAMPLING_FIELDS unrecorded (null).
    """
    scorer = {"features": features, "features_sha256": features_sha256, "resize": resize}
    sampling = {field: samples.get(field) for field in SAMPLING_FIELDS}
    sampling |= {field: value for field, value in samples.items() if field.startswith(DECODER)}
    origin = samples.get("origin")
    averaged = None if origin is None else origin.get("weights") or origin.get("entry") or "as converted"
    subject = {field: value for field, value in samples.items() if field not in sampling}
    return {
        "values": dict(values),
        "protocol": {**scorer, "reference": dict(reference), "num": num, **sampling, "ema": averaged},
        "subject": subject,
    }


def compare(a: Mapping[str, Any], b: Mapping[str, Any]) -> dict[str, tuple[float, float]]:
    """{score: (value of a, value of b)} for the scores that both results have.

    Raises:
        UserError: a field of the protocols differs or is not recorded, or a score was computed by another rule; names
            all of them.
    """
    fields_a, fields_b = leaves(a["protocol"]), leaves(b["protocol"])
    names = sorted((fields_a | fields_b).keys() - {"code_version"})
    pairs = {name: (fields_a.get(name), fields_b.get(name)) for name in names}
    differing = [f"{name} ({x} and {y})" for name, (x, y) in pairs.items() if x != y]
    unknown = [name for name, pair in pairs.items() if pair == (None, None)]
    if differing:
        raise UserError(f"these results cannot be compared, their protocols differ in {', '.join(differing)}")
    if unknown:
        raise UserError(f"these results cannot be compared, their protocols do not record {', '.join(unknown)}")
    common = [score for score in a["values"] if score in b["values"]]
    if not common:
        scores = [", ".join(each["values"]) or "none" for each in (a, b)]
        raise UserError(f"these results have no score in common: {scores[0]}, and {scores[1]}")
    rules = {score: [each["values"][score].get("rule") for each in (a, b)] for score in common}
    # results of earlier versions have no rules; their scores had those of today
    other = [f"{score} ({x} and {y})" for score, (x, y) in rules.items() if x and y and x != y]
    if other:
        raise UserError(f"these results cannot be compared, the rules differ of {', '.join(other)}")
    return {score: (a["values"][score]["value"], b["values"][score]["value"]) for score in common}


def code_version() -> str:
    """The package's version, and the commit it runs from when it runs from a checkout."""
    root = Path(diffjax.__file__).parent.parent
    command = ["git", "-C", str(root), "describe", "--always", "--dirty", "--abbrev=12", "--exclude=*"]
    try:
        described = subprocess.run(command, capture_output=True, text=True, check=True, timeout=10)
    except (OSError, subprocess.SubprocessError):
        return diffjax.__version__
    return f"{diffjax.__version__}+{described.stdout.strip()}" if (root / ".git").exists() else diffjax.__version__


def write(path: Path, result: Mapping[str, Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    write_json(path, result)


def read(path: Path) -> dict[str, Any]:
    """A result file; UserError when it is missing or something else."""
    if not path.is_file():
        raise UserError(f"{path}: no such result file; `python -m diffjax evaluate --out={path}` writes one")
    try:
        result = json.loads(path.read_text())
        complete = isinstance(result["protocol"], dict) and all("value" in score for score in result["values"].values())
    except (ValueError, TypeError, KeyError, AttributeError):
        complete = False
    if not complete:
        raise UserError(f"{path}: not a result file, a json with values and protocol")
    return result
