"""Stored cases of the public reference implementations: `<oracles>/<family>/<case>.{json,npz,safetensors}`.

`DIFFJAX_ORACLES` names another folder of the same layout. A family without cases is one failing test, not a pass.
"""

import json
import os
import zlib
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file

ORACLES = Path(os.environ.get("DIFFJAX_ORACLES", Path(__file__).parent / "oracles"))


@dataclass(frozen=True)
class Case:
    path: Path  # of the json

    @cached_property
    def info(self) -> dict[str, Any]:
        return json.loads(self.path.read_text())

    @cached_property
    def arrays(self) -> dict[str, np.ndarray]:
        with np.load(self.path.with_suffix(".npz")) as arrays:
            return dict(arrays)

    @cached_property
    def state_dict(self) -> dict[str, np.ndarray]:
        """The reference's weights: stored, or redrawn from the recipe and checked against its sums."""
        stored = self.path.with_suffix(".safetensors")
        return load_file(stored) if stored.exists() else recipe_weights(self.info)


def cases(family: str, having: str | None = None) -> list:
    """pytest parameters, one per stored case of `family` (whose arrays have a key starting with `having`)."""
    found = [Case(path) for path in sorted((ORACLES / family).glob("*.json"))]
    if having is not None:
        found = [case for case in found if any(key.startswith(having) for key in case.arrays)]
    if not found:
        return [pytest.param(None, id=f"{family}-no-cases-in-{ORACLES}")]
    return [pytest.param(case, id=f"{family}-{case.path.stem}") for case in found]


def recipe_weights(info: dict[str, Any]) -> dict[str, np.ndarray]:
    """Every weight drawn from a generator that its own name seeds; the kept ones are left to the caller."""
    weights = {}
    for key, shape in info["shapes"].items():
        if any(key == kept.split()[0] for kept in info["kept_as_initialised"]):
            continue
        z = np.random.RandomState((zlib.crc32(key.encode()) + info["base_seed"]) % 2**32).standard_normal(shape)
        if key.endswith("logit_scale"):
            z = 3.0 + 1.5 * z
        elif key.endswith("embedding_table.weight"):
            z = 0.5 * z
        elif key.endswith(".bias"):
            z = 0.2 * z
        else:
            z = z / np.sqrt(np.prod(shape[1:]))
        weights[key] = z.astype(np.float32)
    for key, (total, absolute) in info.get("checksums_sum_abssum", {}).items():
        if key in weights:
            drawn = weights[key].astype(np.float64)
            np.testing.assert_allclose([drawn.sum(), np.abs(drawn).sum()], [total, absolute], rtol=1e-6, atol=1e-6)
    return weights
