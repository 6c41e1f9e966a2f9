"""Parameters on disk, their hash, and the whole way from a torch file."""

import hashlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from diffjax.errors import UserError
from diffjax.models import create
from diffjax.parallel.mesh import make_mesh
from diffjax.weights import store
from tests.weights.test_dit import module_and_params


def test_saved_and_loaded(tmp_path):
    module, params = module_and_params(mlp_ratio=2.9)
    saved = store.save(tmp_path / "p", module, params, {"family": "dit"})
    loaded_module, loaded, model = store.load(tmp_path / "p")
    assert loaded_module == module
    jax.tree.map(np.testing.assert_array_equal, loaded, params)
    assert model == saved
    assert model["family"] == "dit"
    assert model["sha256"] == store.tree_sha256(loaded)
    assert model["parameters"] == sum(leaf.size for leaf in jax.tree.leaves(params))


@pytest.mark.slow
def test_a_model_stored_under_earlier_names_of_its_options(tmp_path):
    module = create("DiGIT", vocabulary=6, source_vocabulary=5, depth=1, width=8, heads=2, length=4)
    tokens = jnp.zeros((1, 2), jnp.int32)
    store.save(tmp_path / "a", module, module.init(jax.random.key(0), tokens, None, tokens)["params"], {})
    path = tmp_path / "a" / "model.json"
    path.write_text(path.read_text().replace("source_vocabulary", "source_codes").replace('"vocabulary"', '"codes"'))
    assert '"codes": 6' in path.read_text()
    assert store.load(tmp_path / "a")[0] == module


def test_loaded_into_given_shardings(tmp_path):
    module, params = module_and_params()
    store.save(tmp_path / "p", module, params, {})
    sharding = NamedSharding(make_mesh({"data": -1}), PartitionSpec())
    abstract = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding), params)
    loaded = store.load_params(tmp_path / "p", abstract)
    assert {leaf.sharding for leaf in jax.tree.leaves(loaded)} == {sharding}
    assert store.tree_sha256(loaded) == store.tree_sha256(params)


def test_another_model_is_refused(tmp_path):
    module, params = module_and_params()
    store.save(tmp_path / "p", module, params, {})
    _, other = module_and_params(num_classes=7)
    with pytest.raises(UserError, match=r"holds DiT\(.*patch=2.*label_embed/embedding \(6, 24\) not \(8, 24\)$"):
        store.load_params(tmp_path / "p", other)


def test_outputs_of_a_variance_are_left_out_where_there_is_no_room_for_them(tmp_path, caplog):
    module, params = module_and_params()
    store.save(tmp_path / "p", module, params, {})
    _, half = module_and_params(learn_sigma=False)
    sharding = NamedSharding(make_mesh({"data": -1}), PartitionSpec())
    abstract = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding), half)
    with caplog.at_level("INFO"):
        loaded = store.load_params(tmp_path / "p", abstract)
    assert "p has 6 output channels; the last 3, of a variance, are not used and left out" in caplog.text
    assert jax.tree.map(np.shape, loaded) == jax.tree.map(np.shape, half)
    assert {leaf.sharding for leaf in jax.tree.leaves(loaded)} == {sharding}
    bias = params["final"]["linear"]["bias"].reshape(4, 2, 3)
    np.testing.assert_array_equal(loaded["final"]["linear"]["bias"], bias[:, 0].reshape(-1))
    store.save(tmp_path / "q", module.clone(learn_sigma=False), half, {})
    with pytest.raises(UserError, match="another model than asked for: final/linear/bias"):
        store.load_params(tmp_path / "q", params)


def test_values_that_are_not_finite_are_named(tmp_path):
    module, params = module_and_params()
    params["final"]["linear"]["bias"][3] = np.nan
    store.save(tmp_path / "p", module, params, {})
    with pytest.raises(UserError, match=r"p: values that are not finite in final/linear/bias$"):
        store.load(tmp_path / "p")


def test_folders_that_are_none(tmp_path):
    with pytest.raises(UserError, match="holds no converted parameters"):
        store.load(tmp_path)
    (tmp_path / "params").mkdir()
    for text in ("{", "[]", '{"name": "DiT"}'):
        (tmp_path / "model.json").write_text(text)
        with pytest.raises(UserError, match=r"model\.json: damaged"):
            store.load(tmp_path)
    with pytest.raises(UserError, match="is not an empty folder"):
        store.save(tmp_path, *module_and_params(), {})


def test_hash_sees_paths_types_shapes_and_values():
    a = {"x": np.zeros((2, 3), np.float32), "y": {"z": np.float32(1)}}
    b = {"y": {"z": jax.numpy.float32(1)}, "x": jax.numpy.zeros((2, 3))}
    assert store.tree_sha256(a) == store.tree_sha256(b)
    changes = [
        {"w": a["x"], "y": a["y"]},
        a | {"x": np.zeros((3, 2), np.float32)},
        a | {"x": np.zeros((2, 3), np.int32)},
    ]
    changes += [a | {"x": -a["x"]}, a | {"y": {"z": np.float32(2)}}, a | {"y": {"z": np.ones(1, np.float32)}}]
    hashes = {store.tree_sha256(tree) for tree in [a, *changes]}
    assert len(hashes) == 1 + len(changes)


def test_hash_is_a_fixed_function():
    """Stored hashes must stay valid: a change of the rule breaks this."""
    tree = {"b": np.arange(3, dtype=np.float32), "a": [np.int32(7)]}
    text = b"a/0 int32 ()\n" + np.int32(7).tobytes() + b"b float32 (3,)\n" + tree["b"].tobytes()
    assert store.tree_sha256(tree) == hashlib.sha256(text).hexdigest()
