"""SiT checkpoints of willisma/SiT: DiT's keys and 2 c output channels, of which a flow process uses the first c.

The network was built with room for a variance that nothing was ever trained to predict. What is read here has c output
channels, as a flow process trains and samples it.
"""

import logging
from collections.abc import Mapping
from typing import Any

import flax.linen as nn
import numpy as np

from diffjax.weights import dit, outputs

SIZED = dit.SIZED


def from_reference(state_dict: Mapping[str, Any], **config: Any) -> tuple[nn.Module, dict[str, Any]]:
    """The module and its parameters; `config` as for DiT, see `diffjax.weights.from_reference`."""
    module, params = dit.from_reference(state_dict, **config)
    model: Any = module
    if not model.learn_sigma:
        return module, params
    logging.getLogger("diffjax").info(outputs.said("SiT", model.channels))
    final = {path: outputs.first_half(array, model.channels) for path, array in params["final"]["linear"].items()}
    return model.clone(learn_sigma=False), params | {"final": params["final"] | {"linear": final}}


def to_reference(module: nn.Module, params: Mapping[str, Any]) -> dict[str, np.ndarray]:
    """The state_dict of the reference with `learn_sigma=False`."""
    return dit.to_reference(module, params)


def fixed(module: nn.Module, size: int) -> dict[str, np.ndarray]:
    """The reference's table of positions, that of DiT."""
    return dit.fixed(module, size)
