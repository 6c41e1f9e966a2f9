"""Sharding rules, and the golden dump of what each strategy does to the largest models."""

import json
import os
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec

from diffjax import models
from diffjax.errors import UserError
from diffjax.models.digit import DiGIT
from diffjax.parallel.mesh import make_mesh
from diffjax.parallel.rules import STRATEGIES, constrain, key_path, shardings
from diffjax.training.optimizer import optimizer
from diffjax.training.state import initial_state
from tests.programs import tiny_config

GOLDEN = Path(__file__).parent.parent / "golden" / "shardings"
MESHES = {"dp": {"data": 8}, "fsdp": {"fsdp": 8}, "fsdp_tp": {"data": 2, "fsdp": 2, "tensor": 2}}
LARGE = ("dit-xl-2", "dis-h-2", "diffit-xl-2", "digit-l", "digit-l-stage2-ar")


def abstract_params(name, **kwargs):
    model = models.create(name, **kwargs)
    inputs = jnp.zeros((1, 32, 32, 4)), jnp.zeros(1), jnp.zeros(1, jnp.int32)
    if isinstance(model, DiGIT):
        codes = jnp.zeros((1, 256), jnp.int32)
        inputs = codes, None, codes
    return model, jax.eval_shape(model.init, jax.random.key(0), *inputs)["params"]


def specs(tree):
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    return {key_path(path): [list(a) if isinstance(a, tuple) else a for a in leaf.spec] for path, leaf in leaves}


@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize("name", LARGE)
def test_shardings_are_the_stored_ones(name, strategy):
    model, params = abstract_params(name)
    found = specs(shardings(params, make_mesh(MESHES[strategy]), strategy, model.logical_axes, 2**20))
    path = GOLDEN / f"{name}.{strategy}.json"
    if os.environ.get("DIFFJAX_WRITE_GOLDEN"):
        path.parent.mkdir(exist_ok=True)
        path.write_text(json.dumps(found, indent=1) + "\n")
    assert found == json.loads(path.read_text())


@pytest.mark.parametrize("name", LARGE)
def test_fsdp_leaves_nothing_large_whole(name):
    """But DiffiT's tables of relative bias: 961 rows cannot be divided, and 1.7 of 2244 MB need not be."""
    model, params = abstract_params(name)
    tree = shardings(params, make_mesh({"fsdp": 8}), "fsdp", model.logical_axes, 2**20)
    pairs = zip(jax.tree_util.tree_leaves_with_path(params), jax.tree.leaves(tree))
    sizes = [(p.size, np.prod(s.shard_shape(p.shape))) for (path, p), s in pairs if "relative_bias" not in str(path)]
    total, per_device = np.sum(sizes, axis=0)
    assert per_device < total / 8 * 1.01


def test_optimizer_and_average_follow_their_parameters():
    model, params = abstract_params("DiT-S/2")
    optim = optimizer(tiny_config("optim.clip=1.0").optim, 10)
    state = jax.eval_shape(lambda p: initial_state(p, optim), params)
    found = specs(shardings(state, make_mesh({"fsdp": 8}), "fsdp", model.logical_axes, 0))
    weights = {path: spec for path, spec in found.items() if path.endswith("mlp/fc1/kernel")}
    assert len(weights) == 4  # params, mu, nu, ema
    assert set(map(tuple, weights.values())) == {(None, "fsdp", None)}


def test_heads_that_do_not_divide_are_an_error_naming_the_leaf():
    model, params = abstract_params("DiT-S/2", heads=3, depth=1)
    with pytest.raises(
        UserError, match="attention/.*heads axis of 3 is not divisible by the 2 devices of mesh axis tensor"
    ):
        shardings(params, make_mesh({"data": -1, "tensor": 2}), "fsdp_tp", model.logical_axes, 2**20)


def test_a_large_leaf_that_does_not_divide_is_an_error_and_a_small_one_stays_whole():
    model, params = abstract_params("DiT-S/2", width=36, heads=3, depth=1)
    mesh = make_mesh({"fsdp": 8})
    with pytest.raises(UserError, match="embed axis of 36 is not divisible by the 8 devices of mesh axis fsdp"):
        shardings(params, mesh, "fsdp", model.logical_axes, 0)
    tree = shardings(params, mesh, "fsdp", model.logical_axes, 2**20)
    assert all(s.spec == PartitionSpec() for s in jax.tree.leaves(tree))


@pytest.mark.parametrize(
    "mesh, strategy, words",
    [
        ({"fsdp": 8}, "dp", "axis fsdp 8 devices.*use fsdp or fsdp_tp"),
        ({"data": 4, "tensor": 2}, "fsdp", "axis tensor 2 devices.*use fsdp_tp"),
        ({"data": 8}, "zero", "'zero' is unknown; valid: dp, fsdp, fsdp_tp"),
    ],
)
def test_a_strategy_that_leaves_devices_idle_is_an_error(mesh, strategy, words):
    with pytest.raises(UserError, match=words):
        shardings({}, make_mesh(mesh), strategy, (), 0)


def test_a_parameter_without_a_row_is_an_error():
    with pytest.raises(ValueError, match=r"no row .* matches new/kernel"):
        shardings({"new": {"kernel": jnp.zeros((2, 2))}}, make_mesh({"data": 8}), "dp", (), 0)


def test_constrain_does_nothing_without_a_mesh_and_splits_the_batch_with_one():
    x = jnp.zeros((8, 2, 4))
    assert constrain(x, "batch", "length", "embed") is x
    mesh = make_mesh({"data": 4, "fsdp": 2})
    with jax.set_mesh(mesh):
        y = jax.jit(lambda a: constrain(a * 2, "batch", "length", "embed"))(x)
    assert y.sharding.shard_shape(y.shape) == (1, 2, 4)
