"""Objectives: what a run optimises and how it makes images, as pure functions.

    loss(apply, params, batch, key) -> (scalar, metrics)            batch: see data/pipeline.py
    sample(apply, params, labels, keys, plan) -> images [b,h,w,c]   one key per image

`apply(params, *inputs, **options)` is the backbone. The training loop knows nothing else of the method. A config with a
section `tokens` is that of a model of codes (codes.py), any other that of a diffusion backbone (diffusion.py).
"""

from typing import Any

import flax.linen as nn
import jax
from ml_collections import ConfigDict

from diffjax.errors import UserError
from diffjax.training.objective import codes, diffusion
from diffjax.training.objective.base import Apply, Objective, bind

__all__ = ["EXTRA_AXES", "Apply", "Objective", "bind", "build_model", "build_objective", "example", "init_extra"]

EXTRA_AXES = diffusion.EXTRA_AXES


def _method(config: ConfigDict) -> Any:
    return codes if "tokens" in config else diffusion


def build_model(config: ConfigDict) -> nn.Module:
    """The backbone of a config; its input, output and label table follow from the data and the objective."""
    return _method(config).build_model(config)


def build_objective(config: ConfigDict, *, autoguided: bool = False) -> Objective:
    """The objective of a config. Raises UserError for unknown or contradictory options.

    autoguided: `sampling.guidance` is the weight of a guide that `sample` will be given, not of the null class.
    """
    if "tokens" not in config:
        return diffusion.build_objective(config, autoguided=autoguided)
    if autoguided:
        raise UserError(f"autoguidance is for diffusion backbones, and {config.model.name} is a model of codes")
    return codes.build_objective(config)


def example(config: ConfigDict) -> tuple[Any, ...]:
    """Blank inputs of the backbone for one example, from which it is initialised and its operations are counted."""
    return _method(config).example(config)


def init_extra(config: ConfigDict) -> dict[str, jax.Array]:
    """Parameters that belong to the loss and not to the backbone, by their place beside those of the backbone."""
    return {} if "tokens" in config else diffusion.init_extra(config)
