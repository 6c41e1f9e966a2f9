"""Exponential moving average of the parameters, in float32, sharded as they are."""

from typing import Any

import jax


def update(average: Any, params: Any, decay: float) -> Any:
    """decay * average + (1 - decay) * params, leaf by leaf."""
    return jax.tree.map(lambda a, p: a + (1.0 - decay) * (p - a), average, params)
