"""DiT against stored outputs of facebookresearch/DiT.

The reference's own float32 error is about 2e-6 at outputs of order one, so values are held to 2e-5, or to four times
the error that the case states.
"""

import functools
import re

import jax
import numpy as np
import pytest

from tests.golden.cases import atol, cases, check_guidance, gradients, load, rtol_of_gradient, run

pytestmark = pytest.mark.golden
ATOL = 2e-5


@pytest.mark.parametrize("case", cases("dit"))
def test_outputs(case):
    assert case is not None, "no stored cases"
    arrays = case.arrays
    out, _ = run("dit", case, arrays["x"], arrays["t"], arrays["y"])
    np.testing.assert_allclose(out, arrays["out"], rtol=0, atol=atol(case, ATOL))


@pytest.mark.parametrize("case", cases("dit", "out_null"))
def test_null_label(case):
    assert case is not None, "no stored cases"
    arrays = case.arrays
    null = np.full_like(arrays["y"], load("dit", case)[0].num_classes)
    out, _ = run("dit", case, arrays["x"], arrays["t"], null)
    np.testing.assert_allclose(out, arrays["out_null"], rtol=0, atol=atol(case, ATOL))


@pytest.mark.parametrize("case", cases("dit", "out_t_float"))
def test_times_between_steps(case):
    assert case is not None, "no stored cases"
    arrays = case.arrays
    out, _ = run("dit", case, arrays["x"], arrays["t_float"], arrays["y"])
    np.testing.assert_allclose(out, arrays["out_t_float"], rtol=0, atol=atol(case, ATOL))


@pytest.mark.parametrize("case", cases("dit", "out_cfg"))
def test_guidance(case):
    assert case is not None, "no stored cases"
    arrays = case.arrays
    for name in (name for name in arrays if name.startswith("out_cfg")):
        given = [arrays[key] for key in ("cfg_x", "cfg_t", "cfg_y")]
        forward = lambda *inputs: run("dit", case, *inputs)[0]  # noqa: E731
        check_guidance(case, forward, given, float(name.removeprefix("out_cfg")), arrays[name], ATOL)


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
    _, captured = run("dit", case, arrays["x"], arrays["t"], arrays["y"])
    for key in (key for key in arrays if key.startswith("inter/")):
        value = returned(captured, key.removeprefix("inter/"))
        np.testing.assert_allclose(value, arrays[key], rtol=0, atol=atol(case, ATOL), err_msg=key)


@pytest.mark.parametrize("case", cases("dit", "grad/"))
def test_gradients(case):
    """Of mean(out^2). Held to 2e-5 of the largest entry of each: the bar of the outputs, relative to the scale of the
    gradient, since a gradient sums terms as large as its largest entry with the float32 error of the activations."""
    assert case is not None, "no stored cases"
    arrays = case.arrays
    value, found = gradients("dit", case)
    np.testing.assert_allclose(value, arrays["loss"], rtol=1e-5)
    for key in (key for key in arrays if key.startswith("grad/")):
        bound = rtol_of_gradient(case, key.removeprefix("grad/"), 2e-5) * np.abs(arrays[key]).max()
        np.testing.assert_allclose(found[key.removeprefix("grad/")], arrays[key], rtol=0, atol=bound, err_msg=key)
