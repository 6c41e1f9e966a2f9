"""Stored cases of the public reference implementations: `<oracles>/<family>/<case>.{json,npz,safetensors}`.

`DIFFJAX_ORACLES` names another folder of the same layout. A family without cases is one failing test, not a pass.
"""

import functools
import json
import os
import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from einops import rearrange
from safetensors.numpy import load_file

from diffjax.diffusion import guidance
from diffjax.weights import from_reference, to_reference

ORACLES = Path(os.environ.get("DIFFJAX_ORACLES", Path(__file__).parent / "oracles"))

STATED = ("max_abs_float32_minus_float64", "max_abs_f32_minus_f64")  # of the reference's output, in a case's json


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
        """The reference's weights: stored, here or beside, or redrawn from the recipe and checked against its sums."""
        inside = {
            key.removeprefix(prefix): value
            for prefix in ("param/", "buffer/")
            for key, value in self.arrays.items()
            if key.startswith(prefix)
        }
        stored = self.path.with_suffix(".safetensors")
        return inside or (load_file(stored) if stored.exists() else recipe_weights(self.info))


def cases(family: str, having: str | None = None, slow: Sequence[str] = ()) -> list:
    """pytest parameters, one per stored case of `family` (whose arrays have a key starting with `having`).

    Slow are the cases named so, and those of a published size, whose weights are drawn from a recipe, where there are
    smaller ones.
    """
    found = [Case(path) for path in sorted((ORACLES / family).glob("*.json"))]
    if having is not None:
        found = [case for case in found if any(key.startswith(having) for key in case.arrays)]
    if not found:
        return [pytest.param(None, id=f"{family}-no-cases-in-{ORACLES}")]
    large = [case.path.stem for case in found if "shapes" in case.info]  # as `recipe_weights` wants them
    left_out = {*slow, *(large if len(large) < len(found) else [])}
    return [
        pytest.param(
            case, id=f"{family}-{case.path.stem}", marks=[pytest.mark.slow] if case.path.stem in left_out else []
        )
        for case in found
    ]


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


def to_nhwc(x: np.ndarray) -> np.ndarray:
    return rearrange(x, "b c h w -> b h w c")


def to_nchw(x: jax.Array) -> np.ndarray:
    return rearrange(np.asarray(x), "b h w c -> b c h w")


@functools.cache
def load(family: str, case: Case):
    """Module, parameters and a jitted forward (params, x, t, y) -> (out, {path: captured output})."""
    assert case is not None, "no stored cases"
    module, params = from_reference(family, case.state_dict, **case.info.get("config", {}))

    @jax.jit
    def forward(params, x, t, y):
        out, captured = module.apply({"params": params}, x, t, y, capture_intermediates=True)
        return out, captured["intermediates"]

    return module, params, forward


def conditions(t: np.ndarray, y: np.ndarray | None) -> tuple[np.ndarray, np.ndarray | None]:
    """Time and labels as our models take them."""
    return t.astype(np.float32), None if y is None else y.astype(np.int32)


def run(family: str, case: Case, x: np.ndarray, t: np.ndarray, y: np.ndarray | None) -> tuple[np.ndarray, dict]:
    """The stored NCHW input -> NCHW output, and what the modules returned on the way."""
    _, params, forward = load(family, case)
    with jax.default_matmul_precision("highest"):
        out, captured = forward(params, to_nhwc(x), *conditions(t, y))
    return to_nchw(out), captured


def check_guidance(
    case: Case,
    forward: Callable[..., np.ndarray],
    given: Sequence[np.ndarray | None],
    scale: float,
    stored: np.ndarray,
    usual: float,
) -> None:
    """The package's guidance of forward(x, t, y), NCHW, against the references' forward_with_cfg of `given`, (x, t, y).

    Those take the first half of x twice, with labels and then without; three channels are extrapolated in both halves,
    the rest is what the network gives either half, of which the package keeps the conditional one.
    """
    x, t, y = given
    assert x is not None
    assert t is not None
    half = len(x) // 2
    labels, null = (np.zeros((2, half)) if y is None else y.reshape(2, half)).astype(np.int32)

    times = t.reshape(2, half).T.reshape(-1)  # of the rows as the package has them: some cases give the halves others

    def network(x: jax.Array, _: jax.Array, labels: jax.Array) -> np.ndarray:
        return to_nhwc(forward(to_nchw(x), times, None if y is None else np.asarray(labels)))

    denoise = guidance.classifier_free(network, jnp.asarray(labels), null, channels=3)
    found = to_nchw(denoise(jnp.asarray(to_nhwc(x[:half])), jnp.asarray(t[:half], jnp.float32), scale))
    bound = atol(case, usual, amplified=abs(scale) + abs(scale - 1))
    np.testing.assert_allclose(found, stored[:half], rtol=0, atol=bound)
    np.testing.assert_allclose(found[:, :3], stored[half:, :3], rtol=0, atol=bound)


def atol(case: Case, usual: float, amplified: float = 1.0) -> float:
    """The usual absolute bound of a value, or what the reference's own float32 error, stated by the case, asks for.

    Two float32 results are each as far from the exact one; four times the stated error leaves room for another order
    of sums. amplified: by what is done with the network's output.
    """
    stated = [case.info[name] for name in STATED if name in case.info]
    stated += [case.info.get("float32_reference_error", {}).get("out_max_abs", 0.0)]
    if {"out_f32", "out_f64"} <= case.arrays.keys():
        stated.append(float(np.abs(case.arrays["out_f32"] - case.arrays["out_f64"]).max()))
    return max(usual, 4 * max(stated) * amplified)


def rtol_of_gradient(case: Case, name: str, usual: float) -> float:
    """Likewise of a gradient, relative to its largest entry."""
    stated = case.info.get("rel_grad_f32_vs_f64", {}).get(name, 0.0)
    return max(usual, 4 * stated, 4 * case.info.get("float32_reference_error", {}).get(f"grad_rel_max:{name}", 0.0))


@functools.cache
def gradients(family: str, case: Case) -> tuple[float, dict[str, np.ndarray]]:
    """mean(out^2) on the stored inputs and its gradients by the reference's names, that of the input as "x"."""
    module, params, _ = load(family, case)
    t, y = conditions(case.arrays["t"], case.arrays.get("y"))

    @jax.jit
    def loss(params, x):
        return jnp.mean(jnp.square(module.apply({"params": params}, x, t, y)))

    with jax.default_matmul_precision("highest"):
        value, (grads, grad_x) = jax.value_and_grad(loss, argnums=(0, 1))(params, to_nhwc(case.arrays["x"]))
    return float(value), to_reference(family, module, grads) | {"x": to_nchw(grad_x)}
