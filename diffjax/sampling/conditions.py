"""What each sample is conditioned on: labels, vectors or tokens of a file, or of the training data."""

import hashlib
import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from diffjax.errors import UserError
from diffjax.experiment import Experiment
from diffjax.files import file_sha256, read_npz
from diffjax.runs import Run
from diffjax.sampling import generate


@dataclass(frozen=True)
class Conditions:
    """What samples are conditioned on.

    Attributes:
        given: [n, ...], what the model gets.
        arrays: what the samples file says of it: arr_1, labels int32 [n] (zeros where there are none), and for vectors
            and tokens of files also `conditions`.
        described: what the protocol says of it.
    """

    given: np.ndarray
    arrays: dict[str, np.ndarray]
    described: dict[str, Any] = field(default_factory=dict)

    @property
    def sha256(self) -> str:
        return hashlib.sha256(np.ascontiguousarray(self.given).tobytes()).hexdigest()


def of_labels(kind: str, seed: int, first: int, num: int, num_classes: int) -> Conditions:
    """Classes in equal parts ("interleaved"), or drawn from (seed, i) ("uniform")."""
    if kind == "uniform":
        labels = generate.uniform_labels(seed, first + num, num_classes)[first:]
    else:
        labels = generate.interleaved_labels(first + num, num_classes)[first:]
    return Conditions(labels, {"arr_1": labels})


def of_file(path: Path | None, first: int, num: int, experiment: Experiment) -> Conditions:
    """Row i of the array `conditions` of a file for sample i; without a file those of the training examples in turn."""
    condition = experiment.method.condition
    assert condition
    if path is None:
        given = experiment.conditions(first, num)
        described: dict[str, Any] = {"conditions": "of the training data"}
    else:
        stored = read_npz(path, ("conditions",))["conditions"]
        kind = np.floating if condition.kind == "vectors" else np.integer
        if stored.shape[1:] != condition.shape or not np.issubdtype(stored.dtype, kind):
            expected = f"{condition.kind} [n, {condition.shape[0]}]"
            raise UserError(f"--conditions={path} holds {stored.dtype} {list(stored.shape)}; expected {expected}")
        if len(stored) < first + num:
            raise UserError(f"--conditions={path} has {len(stored)} rows; --first and --num need {first + num}")
        check_range(path, stored, condition.count)
        given = stored[first : first + num].astype(condition.dtype)
        described = {"conditions": {"file_sha256": file_sha256(path)}}
    return Conditions(given, {"arr_1": np.zeros(num, np.int32), "conditions": given}, {"labels": "none", **described})


def check_range(path: Path, stored: np.ndarray, count: int) -> None:
    """UserError for vectors that are not finite, and tokens that are out of range."""
    if not np.isfinite(stored).all():
        raise UserError(f"{path}: conditions are not all finite")
    if count and (stored.min() < 0 or stored.max() >= count):
        raise UserError(f"{path} holds codes from {stored.min()} to {stored.max()}; valid: 0 to {count - 1}")


def of_source(path: Path, first: int, num: int, trained: Run) -> Conditions:
    """Tokens of a first stage, for a second one. UserError unless they are what the run was trained on."""
    made = _made_of(path, trained.origin)
    labels, given = read_source(path, first, num, trained.experiment)
    described = {"labels": "source", "source": {"file_sha256": file_sha256(path), **made}}
    return Conditions(given, {"arr_1": labels}, described)


def _made_of(path: Path, origin: dict[str, Any]) -> dict[str, Any]:
    """The origin of a file of codes, by the json beside it. UserError unless they are what this run was trained on."""
    beside = path.with_suffix(".json")
    if not path.is_file() or not beside.is_file():
        raise UserError(f"--source={path}: it or {beside.name} is missing; `sample --raw` of a first stage writes both")
    try:
        made: dict[str, Any] = json.loads(beside.read_text())["origin"]
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(f"{beside}: not what `sample --raw` writes ({type(error).__name__})") from error
    wanted, found = (each.get("codes", {}).get("features") for each in (origin, made))
    if wanted and wanted != found:
        raise UserError(f"--source={path} holds codes of {found}, and this run was trained on codes of {wanted}")
    return made


def read_source(path: Path, first: int, num: int, experiment: Experiment) -> tuple[np.ndarray, np.ndarray]:
    """Labels [num] and codes int32 [num, m] number `first` and following, of a file that `sample --raw` wrote."""
    stored = read_npz(path, ("arr_0", "arr_1"))
    codes, labels = stored["arr_0"], stored["arr_1"]
    condition = experiment.method.condition
    assert condition
    length = condition.shape[0]
    if codes.ndim != 2 or codes.shape[1] != length or not np.issubdtype(codes.dtype, np.integer):
        raise UserError(f"--source={path} holds {codes.dtype} {codes.shape}; expected integers [n, {length}]")
    if len(codes) < first + num:
        raise UserError(f"--source={path} has {len(codes)} rows; --first={first} and --num={num} need {first + num}")
    check_range(path, codes, condition.count)
    chosen = slice(first, first + num)
    return labels[chosen].astype(np.int32), codes[chosen].astype(np.int32)
