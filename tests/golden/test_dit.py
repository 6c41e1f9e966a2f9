"""DiT against stored outputs of facebookresearch/DiT.

The reference's own float32 error is about 2e-6 at outputs of order one, so values are held to 2e-5.
"""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from einops import rearrange

from diffjax.weights import from_reference, to_reference
from tests.golden.cases import Case, cases

pytestmark = pytest.mark.golden
ATOL = 2e-5


def to_nhwc(x: np.ndarray) -> np.ndarray:
    return rearrange(x, "b c h w -> b h w c")


def to_nchw(x: jax.Array) -> np.ndarray:
    return rearrange(np.asarray(x), "b h w c -> b c h w")


@functools.cache
def load(case: Case):
    """Module, parameters and a jitted forward (params, x, t, y) -> (out, {path: captured output})."""
    assert case is not None, "no stored cases"
    module, params = from_reference("dit", case.state_dict, **case.info.get("config", {}))

    @jax.jit
    def forward(params, x, t, y):
        out, captured = module.apply({"params": params}, x, t, y, capture_intermediates=True)
        return out, captured["intermediates"]

    return module, params, forward


def run(case: Case, x: np.ndarray, t: np.ndarray, y: np.ndarray) -> tuple[np.ndarray, dict]:
    """The stored NCHW input -> NCHW output, and what the modules returned on the way."""
    _, params, forward = load(case)
    with jax.default_matmul_precision("highest"):
        out, captured = forward(params, to_nhwc(x), t.astype(np.float32), y.astype(np.int32))
    return to_nchw(out), captured


@pytest.mark.parametrize("case", cases("dit"))
def test_outputs(case):
    assert case is not None, "no stored cases"
    arrays = case.arrays
    out, _ = run(case, arrays["x"], arrays["t"], arrays["y"])
    np.testing.assert_allclose(out, arrays["out"], rtol=0, atol=ATOL)


@pytest.mark.parametrize("case", cases("dit", "out_null"))
def test_null_label(case):
    assert case is not None, "no stored cases"
    arrays = case.arrays
    null = np.full_like(arrays["y"], load(case)[0].num_classes)
    out, _ = run(case, arrays["x"], arrays["t"], null)
    np.testing.assert_allclose(out, arrays["out_null"], rtol=0, atol=ATOL)


@pytest.mark.parametrize("case", cases("dit", "out_t_float"))
def test_times_between_steps(case):
    assert case is not None, "no stored cases"
    arrays = case.arrays
    out, _ = run(case, arrays["x"], arrays["t_float"], arrays["y"])
    np.testing.assert_allclose(out, arrays["out_t_float"], rtol=0, atol=ATOL)


@pytest.mark.parametrize("case", cases("dit", "out_cfg"))
def test_guidance(case):
    """Both halves see the first half of x; three noise channels are extrapolated, the rest stays as it is."""
    assert case is not None, "no stored cases"
    arrays = case.arrays
    [name] = [name for name in arrays if name.startswith("out_cfg")]
    scale = float(name.removeprefix("out_cfg"))
    half = arrays["cfg_x"][: len(arrays["cfg_x"]) // 2]
    out, _ = run(case, np.concatenate([half, half]), arrays["cfg_t"], arrays["cfg_y"])
    conditional, null = np.split(out[:, :3], 2)
    guided = null + scale * (conditional - null)
    out = np.concatenate([np.concatenate([guided, guided]), out[:, 3:]], axis=1)
    np.testing.assert_allclose(out, arrays[name], rtol=0, atol=ATOL)


# stored name -> path of our module; those below "blocks" return every layer's value
MODULES = {
    "x_embedder": "patch_embed",
    "t_embedder": "time_embed",
    "y_embedder": "label_embed",
    "final_layer": "final",
    "blocks": "blocks",
    "blocks.attn": "blocks/attention",
    "blocks.mlp": "blocks/mlp",
}


def returned(captured: dict, key: str) -> jax.Array:
    """What our counterpart of the reference's module `key` returned."""
    layer = re.search(r"\.(\d+)", key)
    path = MODULES[key.replace(layer[0], "") if layer else key]
    value = functools.reduce(lambda tree, name: tree[name], path.split("/"), captured)["__call__"][0]
    value = value[0] if isinstance(value, tuple) else value  # a block returns its carry and None
    return value[int(layer[1])] if layer else value


@pytest.mark.parametrize("case", cases("dit", "inter/"))
def test_intermediates(case):
    assert case is not None, "no stored cases"
    arrays = case.arrays
    _, captured = run(case, arrays["x"], arrays["t"], arrays["y"])
    for key in (key for key in arrays if key.startswith("inter/")):
        value = returned(captured, key.removeprefix("inter/"))
        np.testing.assert_allclose(value, arrays[key], rtol=0, atol=ATOL, err_msg=key)


@pytest.mark.parametrize("case", cases("dit", "grad/"))
def test_gradients(case):
    """Of mean(out^2). Held to 2e-5 of the largest entry of each: the bar of the outputs, relative to the scale of the
    gradient, since a gradient sums terms as large as its largest entry with the float32 error of the activations."""
    assert case is not None, "no stored cases"
    arrays = case.arrays
    module, params, _ = load(case)

    @jax.jit
    def loss(params, x):
        out = module.apply({"params": params}, x, arrays["t"].astype(np.float32), arrays["y"].astype(np.int32))
        return jnp.mean(jnp.square(out))

    with jax.default_matmul_precision("highest"):
        value, (grads, grad_x) = jax.value_and_grad(loss, argnums=(0, 1))(params, to_nhwc(arrays["x"]))
    np.testing.assert_allclose(value, arrays["loss"], rtol=1e-5)
    gradients = to_reference("dit", module, grads) | {"x": to_nchw(grad_x)}
    for key in (key for key in arrays if key.startswith("grad/")):
        bound = 2e-5 * np.abs(arrays[key]).max()
        np.testing.assert_allclose(gradients[key.removeprefix("grad/")], arrays[key], rtol=0, atol=bound, err_msg=key)
