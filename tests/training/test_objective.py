"""Who drops labels in training: the loss, once for all, or a backbone with several label tables."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from ml_collections import ConfigDict

from configs import common
from diffjax.training.objective import build_model, build_objective

SIZES = {"name": "U-DiT", "width": 8, "heads": 2, "depth": (1, 1, 1, 1, 1)}


def config(**model):
    c = common.base()
    c.model = ConfigDict({**SIZES, **model})
    c.data.num_classes, c.data.size, c.data.channels = 5, 8, 4
    c.diffusion.label_drop = 0.4
    return c


@pytest.mark.parametrize("per_level", [True, False])
def test_labels_are_dropped_by_the_loss_or_by_the_model(per_level):
    c, seen = config(label_drop_per_level=per_level), []

    def apply(params, x, t, y, train=False, keys=None):
        seen.append(y)
        return jnp.zeros((*x.shape[:-1], 2 * x.shape[-1]))

    batch = {"image": jnp.zeros((500, 8, 8, 4)), "label": jnp.full(500, 3), "index": jnp.arange(500)}
    build_objective(c).loss(apply, None, batch, jax.random.key(0))
    dropped = np.mean(seen[0] == 5)
    assert dropped == 0 if per_level else dropped == pytest.approx(0.4, abs=0.06)
    model = build_model(c)
    assert model.label_drop_per_level == per_level
    assert not per_level or model.label_drop == 0.4


def test_the_published_default_is_per_level():
    assert build_model(config()).label_drop_per_level
