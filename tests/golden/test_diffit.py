"""DiffiT against stored outputs of NVlabs/DiffiT: the latent model, and residual blocks around its attention.

The reference's own float32 error is about 1e-6 at outputs of order one. Values of the latent model are held to 2e-5,
those of a residual block to 3e-5, gradients to 2e-5 of the largest entry of each.
"""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from einops import rearrange

from diffjax.diffusion import guidance
from diffjax.models import diffit
from diffjax.models.diffit_unet import ResBlock
from diffjax.ops.windows import relative_positions
from diffjax.weights import from_reference, to_reference
from tests.golden.cases import atol, cases, conditions, load, run, to_nchw, to_nhwc

pytestmark = pytest.mark.golden
ATOL = 2e-5
ATOL_BLOCK = 3e-5
LATENT = cases("diffit", "out_f32")


@pytest.mark.parametrize("case", LATENT)
def test_outputs(case):
    assert case is not None, "no stored cases"
    out, _ = run("diffit", case, *(case.arrays[name] for name in "xty"))
    for name in ("out_f32", "out_f64"):
        np.testing.assert_allclose(out, case.arrays[name], rtol=0, atol=atol(case, ATOL), err_msg=name)


@pytest.mark.parametrize("case", cases("diffit", "t_freq"))
def test_time_features(case):
    """At t = 999 the last bit of an angle moves a feature by 6e-5."""
    assert case is not None, "no stored cases"
    ours = diffit.sinusoidal_time(case.arrays["t"].astype(np.float32))
    np.testing.assert_allclose(ours, case.arrays["t_freq"], rtol=0, atol=1e-4)


def guidance_weights(info: dict, t: np.ndarray) -> np.ndarray:
    """By the rule of the reference: rising from 1 as a power of a cosine for small latents, else constant."""
    scale, power = info["cfg"]["cfg_scale"], info["cfg"]["scale_pow"]
    if info["config"]["input_size"] > 32:
        return np.full(len(t), scale)
    return guidance.power_cosine(t.astype(np.float64) / 1000, scale, power)


@pytest.mark.parametrize("case", cases("diffit", "cfg_out"))
def test_guidance(case):
    """Both halves see the first half of x; three channels are extrapolated, the rest stays as it is."""
    assert case is not None, "no stored cases"
    arrays = case.arrays
    half = len(arrays["x"]) // 2
    x = np.concatenate([arrays["x"][:half]] * 2)
    out, _ = run("diffit", case, x, arrays["cfg_t"], arrays["cfg_y"])
    weights = guidance_weights(case.info, arrays["cfg_t"][:half])
    conditional, null = np.split(to_nhwc(out), 2)
    for i, weight in enumerate(weights):
        rows = jnp.stack([conditional[i], null[i]])  # what the network gives the two rows of an example
        denoise = guidance.classifier_free(lambda x, t, y, rows=rows: rows, jnp.zeros(1, jnp.int32), 1, channels=3)
        found = to_nchw(denoise(to_nhwc(x[i : i + 1]), jnp.zeros(1), weight))[0]
        for name in ("cfg_out_f32", "cfg_out_f64"):
            np.testing.assert_allclose(found, arrays[name][i], rtol=0, atol=atol(case, ATOL), err_msg=name)
            np.testing.assert_allclose(
                found[:3], arrays[name][half + i, :3], rtol=0, atol=atol(case, ATOL), err_msg=name
            )


# stored name -> path of our module; those with a number return every layer's value
MODULES = {
    "x_embed": "patch_embed",
    "t_emb": "time_embed",
    "y_emb": "label_embed",
    "tmsa": "blocks/attention",
    "block": "blocks",
}


def returned(captured: dict, key: str) -> jax.Array:
    name, layer = re.fullmatch(r"mid_(\w+?)(\d*)_f64", key).groups()
    value = functools.reduce(lambda tree, part: tree[part], MODULES[name].split("/"), captured)["__call__"][0]
    value = value[0] if isinstance(value, tuple) else value  # a block returns its carry and None
    return value[int(layer)] if layer else value


@pytest.mark.parametrize("case", cases("diffit", "mid_"))
def test_intermediates(case):
    assert case is not None, "no stored cases"
    _, captured = run("diffit", case, *(case.arrays[name] for name in "xty"))
    for key in (key for key in case.arrays if key.startswith("mid_")):
        np.testing.assert_allclose(
            returned(captured, key), case.arrays[key], rtol=0, atol=atol(case, ATOL), err_msg=key
        )


@pytest.mark.parametrize("case", cases("diffit", "grad/"))
def test_gradients(case):
    """Of mean((out - target)^2), for every parameter."""
    assert case is not None, "no stored cases"
    arrays = case.arrays
    module, params, _ = load("diffit", case)
    x, target = to_nhwc(arrays["x"]), to_nhwc(arrays["grad_target"]).astype(np.float32)
    t, y = conditions(arrays["t"], arrays["y"])

    def loss(params):
        return jnp.mean(jnp.square(module.apply({"params": params}, x, t, y) - target))

    with jax.default_matmul_precision("highest"):
        value, grads = jax.jit(jax.value_and_grad(loss))(params)
    assert float(value) == pytest.approx(float(arrays["grad_loss_f64"]), rel=1e-5)
    found = to_reference("diffit", module, grads)
    stored = {key.removeprefix("grad/"): value for key, value in arrays.items() if key.startswith("grad/")}
    parameters = {key for key in found if key != "pos_embed" and not key.endswith("relative_position_index")}
    assert stored.keys() == parameters
    for key, expected in stored.items():
        np.testing.assert_allclose(found[key], expected, rtol=0, atol=2e-5 * np.abs(expected).max(), err_msg=key)


@pytest.mark.parametrize("case", LATENT)
def test_counts_tables_and_what_the_shapes_tell(case):
    assert case is not None, "no stored cases"
    module, params, _ = load("diffit", case)
    assert sum(leaf.size for leaf in jax.tree.leaves(params)) == case.info["n_params_trainable"]
    assert from_reference("diffit", case.state_dict)[0] == module


@pytest.mark.parametrize("case", cases("diffit", "buffer/"))
def test_relative_positions_are_the_stored_ones(case):
    assert case is not None, "no stored cases"
    stored = {key: value for key, value in case.arrays.items() if key.startswith("buffer/")}
    for key, value in stored.items():
        assert key.endswith("relative_position_index")
        np.testing.assert_array_equal(relative_positions(round(len(value) ** 0.5)), value)


def block_params(weights: dict[str, np.ndarray], heads: int) -> dict:
    """Our parameters of a residual block of the stored ones."""

    def linear(name: str) -> dict:
        return {"kernel": weights[f"{name}.weight"].T, "bias": weights[f"{name}.bias"]}

    def qkv(name: str) -> dict:
        return {
            "kernel": rearrange(weights[f"{name}.weight"], "(three h k) d -> d h three k", three=3, h=heads),
            "bias": rearrange(weights[f"{name}.bias"], "(three h k) -> h three k", three=3, h=heads),
        }

    def affine(name: str) -> dict:
        return {"scale": weights[f"{name}/scale"], "bias": weights[f"{name}/bias"]}

    out = linear("tmsa/proj")
    attention = {
        "relative_bias": weights["tmsa/relative_position_bias_table"],
        "qkv": qkv("tmsa/qkv"),
        "qkv_time": qkv("tmsa/qkv_temb"),
        "out": out | {"kernel": rearrange(out["kernel"], "(h k) d -> h k d", h=heads)},
    }
    params = {
        "norm": affine("gn"),
        "conv": {
            "kernel": rearrange(weights["conv/weight"], "o i y x -> y x i o"),
            "bias": weights["conv/bias"],
        },
        "block": {
            "norm_1": affine("ln1"),
            "attention": attention,
            "norm_2": affine("ln2"),
            "mlp": {
                name: {"kernel": weights[f"{name}/weight"].T, "bias": weights[f"{name}/bias"]}
                for name in ("fc1", "fc2")
            },
        },
    }
    if "shortcut/weight" in weights:
        params["shortcut"] = {"kernel": weights["shortcut/weight"][:, :, 0, 0].T, "bias": weights["shortcut/bias"]}
    return jax.tree.map(lambda a: a.astype(np.float32), params)


@pytest.mark.parametrize("case", cases("diffit", "tmsa_tokens"))
def test_residual_blocks(case):
    assert case is not None, "no stored cases"
    config, arrays = case.info["config"], case.arrays
    weights = {key: value for key, value in case.state_dict.items() if not key.startswith("buffer/")}
    block = {"heads": config["heads"], "hidden": len(weights["fc1/bias"]), "attention": "xla"}
    module = ResBlock(config["c_out"], config["window"], config["gn_groups"], block, jnp.float32)
    params = block_params(weights, config["heads"])
    x, c = to_nhwc(arrays["x"]).astype(np.float32), arrays["temb"].astype(np.float32)
    shapes = jax.eval_shape(module.init, jax.random.key(0), x, c)["params"]
    assert jax.tree.map(jnp.shape, params) == jax.tree.map(jnp.shape, shapes)
    with jax.default_matmul_precision("highest"):
        forward = jax.jit(lambda p: module.apply({"params": p}, x, c, capture_intermediates=True))
        out, captured = forward(params)
    captured = captured["intermediates"]
    found = {
        "out": to_nchw(out),
        "after_conv": to_nchw(captured["conv"]["__call__"][0]),
        "ln1_tokens": rearrange(captured["block"]["norm_1"]["__call__"][0], "b m n d -> (b m) n d"),
        "tmsa_tokens": rearrange(captured["block"]["attention"]["__call__"][0], "b m n d -> (b m) n d"),
    }
    for name, value in found.items():
        np.testing.assert_allclose(value, arrays[name], rtol=0, atol=ATOL_BLOCK, err_msg=name)
