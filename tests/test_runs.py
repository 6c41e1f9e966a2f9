"""What parameters are sampled as: the backbone is the one that was written with them."""

import jax
import numpy as np
import pytest

from diffjax.errors import UserError
from diffjax.experiment import build
from diffjax.runs import open_run
from diffjax.weights import store
from tests import slow
from tests.programs import BACKBONES, tiny_config

OTHER = {"dit": "model.depth=3", "dis": "model.depth=3", "udit": "model.width=8", "diffit": "model.widths=16,16"}
OTHER |= {"diffit-latent": "model.depth=3", "digit": "model.depth=3"}


@pytest.mark.parametrize("model", slow.but(["dit"], BACKBONES))
def test_converted_parameters_bring_their_backbone(tmp_path, model):
    """The recipe says the process and the sampler; sizes of a backbone that it names are not read."""
    trained = build(tiny_config(OTHER[model], model=model), training=False)
    params = jax.tree.map(lambda leaf: np.zeros(leaf.shape, leaf.dtype), trained.abstract.params)
    store.save(tmp_path, trained.model, params, {"family": model})
    with pytest.raises(UserError, match="no run made these parameters; --config says how to sample them"):
        open_run(tmp_path)
    recipe = tiny_config(model=model)
    assert recipe.model.options != trained.config.model.options
    run = open_run(tmp_path, config=recipe)
    assert run.experiment.model == trained.model
    assert run.experiment.config.model.options == trained.config.model.options
