"""Read and write codebooks and the state of an unfinished k-means fit."""

import json
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from diffjax.errors import UserError
from diffjax.files import read_npz, remove_temporaries, write_npz

OWNER = "kmeans"  # of temporary files


class Fit(NamedTuple):
    centroids: np.ndarray  # float32 [k, d]
    objectives: np.ndarray  # float32 [iterations]: sum of squared distances to the centroids before each
    iteration: int  # how many are done


def read_codebook(path: Path) -> np.ndarray:
    """The centroids of a .npy file, float32 [k, d], such as the published km_8k.npy."""
    try:
        codebook = np.load(path, allow_pickle=False)
    except OSError as error:
        raise UserError(f"{path}: no codebook can be read ({error.strerror or error}); valid: a .npy file") from error
    except (ValueError, EOFError) as error:
        raise UserError(f"{path}: not an array of numbers ({error}); valid: a .npy file, float32 [k, d]") from error
    if not isinstance(codebook, np.ndarray) or codebook.ndim != 2 or codebook.dtype.kind != "f" or not codebook.size:
        found = f"{codebook.dtype} {codebook.shape}" if isinstance(codebook, np.ndarray) else "an archive of arrays"
        raise UserError(f"{path} holds {found}; a codebook is float32 [k, d]")
    if not np.isfinite(codebook).all():
        row = int(np.flatnonzero(~np.isfinite(codebook).all(axis=1))[0])
        raise UserError(f"{path}: centroid {row} of {len(codebook)} holds a value that is not finite")
    return codebook.astype(np.float32)


def write_state(path: Path, origin: dict[str, Any], done: Fit) -> None:
    """Keep a fit. origin: json-able, which points and settings it is of."""
    path.parent.mkdir(parents=True, exist_ok=True)
    text = np.frombuffer(json.dumps(origin).encode(), np.uint8)
    write_npz(path, {"origin": text, **{name: np.asarray(value) for name, value in done._asdict().items()}}, OWNER)


def read_state(path: Path, origin: dict[str, Any], iterations: int) -> Fit | None:
    """The fit that `path` holds, None if there is no file; `UserError` unless it is of the same points and settings."""
    remove_temporaries(path.parent, OWNER, path.name)
    path.with_name(f"{path.name}.unfinished").unlink(missing_ok=True)  # what earlier versions left
    if not path.exists():
        return None
    try:
        arrays = read_npz(path, ("origin", *Fit._fields))
        text = arrays["origin"]  # of earlier versions a string
        stored = json.loads(str(text) if text.dtype.kind == "U" else text.tobytes())
        done = Fit(arrays["centroids"], arrays["objectives"], int(arrays["iteration"]))
        differing = [name for name in sorted(origin | stored) if stored.get(name) != origin.get(name)]
    except (ValueError, TypeError, AttributeError) as error:
        raise UserError(f"{path} holds no state of a k-means fit ({error}); remove it or name another file") from error
    if differing:
        listed = ", ".join(f"{name} {stored.get(name)} there, {origin.get(name)} here" for name in differing)
        raise UserError(f"{path} is of a fit of other points or settings: {listed}; remove it or name another file")
    if done.iteration > iterations:
        raise UserError(f"{path} holds {done.iteration} iterations; valid: iterations = {done.iteration} or more")
    return done
