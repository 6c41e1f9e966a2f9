"""Conditions of samples: labels, and vectors or tokens from a file or from the training data."""

import difflib
import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from diffjax.errors import UserError
from diffjax.experiment import Experiment
from diffjax.files import NO_LABELS, file_sha256, read_npz, read_protocol
from diffjax.runs import Run
from diffjax.sampling import generate
from diffjax.sampling.samples import Classes

SPREAD = ("interleaved", "uniform")  # how all classes are spread over the samples


@dataclass(frozen=True)
class Conditions:
    """The conditions of samples.

    Attributes:
        given: [n, ...], what the model gets.
        arrays: what the samples file says of it: arr_1, labels int32 [n] (zeros where there are none), and for vectors
            and tokens of files also `conditions`.
        described: what the protocol says of it.
        classes: what the columns of a grid stand for; None: nothing.
    """

    given: np.ndarray
    arrays: dict[str, np.ndarray]
    described: dict[str, Any] = field(default_factory=dict)
    classes: Classes | None = None

    @property
    def sha256(self) -> str:
        return hashlib.sha256(np.ascontiguousarray(self.given).tobytes()).hexdigest()


def of_labels(said: str, seed: int, first: int, num: int, num_classes: int, names: Sequence[str] = ()) -> Conditions:
    """Classes of samples first, first + 1, ...

    Args:
        said: "interleaved", all classes in equal parts; "uniform", drawn from (seed, i); or some of them in turn, by
            number or name: "207,360".
        names: of the classes, where they have any.

    Raises:
        UserError: no such class.
    """
    if not num_classes and said not in SPREAD:
        raise UserError(f"--labels={said}: this model has no classes; leave it out")
    if said == "uniform":
        labels = generate.uniform_labels(seed, first + num, num_classes)[first:]
    elif said == "interleaved":
        labels = generate.interleaved_labels(first + num, num_classes)[first:]
    else:
        chosen = np.array([_label(text.strip(), num_classes, names) for text in said.split(",")], np.int32)
        labels = chosen[np.arange(first, first + num) % len(chosen)]
    described: dict[str, Any] = {"labels": said if num_classes else NO_LABELS}
    if num_classes and names:
        described["classes"] = {str(label): names[label] for label in np.unique(labels)}
    return Conditions(labels, {"arr_1": labels}, described, Classes(labels, names) if num_classes else None)


def _label(text: str, num_classes: int, names: Sequence[str]) -> int:
    """The class of a number or a name; a name that is a number is looked for last."""
    if text.isdecimal() and int(text) < num_classes:
        return int(text)
    if text in names:
        return list(names).index(text)
    near = difflib.get_close_matches(text, names, n=3)
    hint = f"; did you mean {', '.join(near)}?" if near else ", or their names" if names else ""
    raise UserError(f"--labels: no class {text!r}; valid: {', '.join(SPREAD)}, or numbers 0 to {num_classes - 1}{hint}")


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
    return Conditions(
        given, {"arr_1": np.zeros(num, np.int32), "conditions": given}, {"labels": NO_LABELS, **described}
    )


def check_range(path: Path, stored: np.ndarray, count: int) -> None:
    """UserError for vectors that are not finite, and tokens that are out of range."""
    if not np.isfinite(stored).all():
        raise UserError(f"{path}: conditions are not all finite")
    if count and (stored.min() < 0 or stored.max() >= count):
        raise UserError(f"{path} holds tokens from {stored.min()} to {stored.max()}; valid: 0 to {count - 1}")


def of_source(path: Path, first: int, num: int, trained: Run) -> Conditions:
    """Tokens of a first stage, for a second one. UserError unless they are what the run was trained on."""
    made = _made_of(path, trained.origin)
    labels, given = read_source(path, first, num, trained.experiment)
    described = {"labels": "source", "source": {"file_sha256": file_sha256(path), **made}}
    return Conditions(given, {"arr_1": labels}, described)


def _made_of(path: Path, origin: dict[str, Any]) -> dict[str, Any]:
    """The origin of a file of tokens, from its json. UserError unless they are of the kind the run was trained on."""
    beside = path.with_suffix(".json")
    if not path.is_file() or not beside.is_file():
        raise UserError(f"--source={path}: it or {beside.name} is missing; `sample --raw` of a first stage writes both")
    made = read_protocol(path).get("origin")
    if not isinstance(made, dict):
        raise UserError(f"{beside}: not what `sample --raw` writes, it says nothing of an origin")
    wanted, found = (each.get("codes", {}).get("features") for each in (origin, made))
    if wanted and wanted != found:
        raise UserError(f"--source={path} holds tokens of {found}, and this run was trained on tokens of {wanted}")
    return made


def read_source(path: Path, first: int, num: int, experiment: Experiment) -> tuple[np.ndarray, np.ndarray]:
    """Labels [num] and tokens int32 [num, m] number `first` and following, of a file that `sample --raw` wrote."""
    stored = read_npz(path, ("arr_0", "arr_1"))
    tokens, labels = stored["arr_0"], stored["arr_1"]
    condition = experiment.method.condition
    assert condition
    length = condition.shape[0]
    if tokens.ndim != 2 or tokens.shape[1] != length or not np.issubdtype(tokens.dtype, np.integer):
        raise UserError(f"--source={path} holds {tokens.dtype} {tokens.shape}; expected integers [n, {length}]")
    if len(tokens) < first + num:
        raise UserError(f"--source={path} has {len(tokens)} rows; --first={first} and --num={num} need {first + num}")
    check_range(path, tokens, condition.count)
    chosen = slice(first, first + num)
    return labels[chosen].astype(np.int32), tokens[chosen].astype(np.int32)
