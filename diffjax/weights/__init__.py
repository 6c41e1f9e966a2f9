"""Public checkpoints: reading their files, and mapping their weights to our parameters and back."""

from collections.abc import Mapping
from types import ModuleType
from typing import Any

import flax.linen as nn
import numpy as np

from diffjax.errors import UserError
from diffjax.weights import diffit, digit, dinov2, dis, dit, udit, vqgan

FAMILIES: dict[str, ModuleType | digit.Family] = {
    "dit": dit,
    "dis": dis,
    "udit": udit,
    "diffit": diffit,
    **{family.name: family for family in (digit.STAGE1, digit.STAGE2_AR, digit.STAGE2_NAR)},
    "dinov2": dinov2,
    "vqgan": vqgan,
}


def from_reference(family: str, state_dict: Mapping[str, Any], **config: Any) -> tuple[nn.Module, dict[str, Any]]:
    """Our module and its float32 parameters out of a reference's weights.

    Args:
        family: a key of FAMILIES.
        state_dict: the reference's key names to arrays in PyTorch layout; also a training checkpoint, see `unwrap`.
        config: the reference's constructor arguments; what the shapes tell need not be given.

    Raises:
        UserError: unknown family or argument; arguments that contradict the shapes or that are needed and missing;
            unexpected, missing and wrongly shaped keys, all in one message.
    """
    return _family(family).from_reference(_inner(state_dict), **config)


def to_reference(family: str, module: nn.Module, params: Mapping[str, Any]) -> dict[str, np.ndarray]:
    """The reference's weights, its key names to float32 arrays in PyTorch layout, out of our parameters."""
    return _family(family).to_reference(module, params)


def unwrap(checkpoint: Any) -> dict[str, Any]:
    """The weights inside a file: its "ema", "model" or "state_dict", else itself, without a prefix "module.".

    Training checkpoints keep them beside the optimizer; the published results use the averaged weights. The prefix
    comes from saving a model that was wrapped for data parallelism.
    """
    weights = _inner(checkpoint)
    if not any(hasattr(value, "shape") for value in weights.values()):
        found = ", ".join(map(str, checkpoint))[:200] or "nothing"
        raise UserError(
            f"the checkpoint holds no weights: found {found}; expected ema, model, state_dict or named arrays"
        )
    return weights


def _inner(checkpoint: Any) -> dict[str, Any]:
    if not isinstance(checkpoint, Mapping):
        raise UserError(f"the checkpoint holds no weights but a {type(checkpoint).__name__}")
    candidates = (*map(checkpoint.get, ("ema", "model", "state_dict")), checkpoint)
    inner: Mapping[str, Any] = next(weights for weights in candidates if isinstance(weights, Mapping))
    prefix = "module." if inner and all(str(key).startswith("module.") for key in inner) else ""
    return {str(key).removeprefix(prefix): value for key, value in inner.items()}


def _family(family: str) -> Any:
    if family not in FAMILIES:
        raise UserError(f"weights of family {family!r} are unknown; valid: {', '.join(FAMILIES)}")
    return FAMILIES[family]
