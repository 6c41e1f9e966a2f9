"""What was not finite in the step that ended a run: which arrays, and which examples the step was made on."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np

from diffjax.data.pipeline import Batches
from diffjax.errors import UserError
from diffjax.files import write_json
from diffjax.parallel import hosts
from diffjax.parallel.rules import key_path

FILE = "nonfinite.json"  # of the run folder
NOUNS = {"grad_squares": "gradients", "param_squares": "parameters"}  # in the file
NAMED = 3  # arrays or examples that the message names


def explain(workdir: Path, step: int, squares: Mapping[str, np.ndarray], params: Any, batches: Batches) -> str:
    """Words on the update that led to `step`; the lead writes them in full into `FILE`.

    Args:
        squares: the squared norm of every array, by the names of `step.SQUARED_NORMS`.
        params: the tree of the parameters, or of their shapes.
    """
    paths = [key_path(path) for path, _ in jax.tree_util.tree_leaves_with_path(params)]
    found: dict[str, Any] = {NOUNS[name]: arrays(values, paths) for name, values in squares.items()}
    found |= {"examples": batches.examples(step - 1), "examples_not_finite": batches.not_finite(step - 1)}
    # Parameters follow the gradients: they are named where these are finite.
    words = [f"{noun} of {_listed(found[noun], len(paths), 'arrays')}" for noun in NOUNS.values() if found[noun]]
    text = f"not finite: {words[0] if words else 'the loss alone'}"
    if bad := found["examples_not_finite"]:
        text += f"; of its {len(found['examples']):,} examples as they are stored: {_listed(bad, 0, 'examples')}"
    if hosts.is_lead():
        try:
            write_json(workdir / FILE, {"step": step, **found})
        except UserError as error:
            return f"{text}; {error}"
    return f"{text}; {workdir / FILE} has all their names, and the numbers of the step's examples"


def arrays(squares: np.ndarray, paths: Sequence[str]) -> list[str]:
    """The paths of the arrays whose squared norm is not finite."""
    return [path for path, square in zip(paths, squares) if not np.isfinite(square)]


def _listed(names: Sequence[Any], count: int, noun: str) -> str:
    if len(names) == count:
        return f"all {count} {noun}"
    listed = ", ".join(map(str, names[:NAMED]))
    return f"{listed} and {len(names) - NAMED} more {noun}" if len(names) > NAMED else listed
