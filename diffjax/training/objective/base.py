"""What the training loop and the verbs know of a method."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import flax.linen as nn
import jax

from diffjax.training.step import Batch, Metrics

Apply = Callable[..., Any]


@dataclass(frozen=True)
class Objective:
    """What `build_objective` makes of a config.

    Attributes:
        loss: (apply, params, batch, key) -> (scalar, metrics).
        sample: (apply, params, labels [b], keys [b], plan, guide=None) -> images float32 [b, h, w, c], each a function
            of its own label and key. `guide(x, t, y)` is a worse denoiser, with its parameters bound, for autoguidance.
            Of models that draw one kind of codes from another, the latter, int32 [b, n], stand in the place of labels.
        plan: () -> what `sample` needs besides: a tree, to be an argument of a jitted function. Reads the files that
            the config names, if it names any. Another plan of the same structure may take its place.
        makes: what `sample` makes, in words: "pictures", or what else.
    """

    loss: Callable[[Apply, Any, Batch, jax.Array], tuple[jax.Array, Metrics]]
    sample: Callable[..., jax.Array]
    plan: Callable[[], Any]
    makes: str


def bind(model: nn.Module) -> Apply:
    """`apply(params, *inputs, **options)` of a model; an option `method` names another than its `__call__`."""

    def apply(params: Any, *inputs: Any, **options: Any) -> Any:
        return model.apply({"params": params}, *inputs, **options)

    return apply
