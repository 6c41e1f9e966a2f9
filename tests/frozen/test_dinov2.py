"""DINOv2: the published sizes, which blocks run, what it takes, its switches."""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from diffjax.errors import UserError
from diffjax.frozen import create, dinov2
from diffjax.frozen.dinov2 import DINOv2
from diffjax.ops.macs import count_macs
from diffjax.parallel.mesh import batch_sharding, make_mesh
from diffjax.weights import to_reference

# With the token of masked patches, which the files hold.
COUNTS = {"S": 22_058_112, "B": 86_583_552, "L": 304_372_736, "g": 1_136_486_912}


def tiny(**kwargs):
    return create("DINOv2", **{"depth": 4, "width": 16, "heads": 2, "hidden": 24, **kwargs})


def shapes(module):
    return jax.eval_shape(module.init, jax.random.key(0), jnp.zeros((1, 2 * module.patch, 2 * module.patch, 3)))[
        "params"
    ]


def some_params(module):
    leaves, structure = jax.tree.flatten(shapes(module))
    rng = np.random.default_rng(0)
    return structure.unflatten([0.3 * rng.standard_normal(leaf.shape, np.float32) for leaf in leaves])


def images(side=224, batch=1):
    return jnp.asarray(np.random.default_rng(1).random((batch, side, side, 3), np.float32))


@functools.cache
def compiled(module, layer=dinov2.LAYER):
    return jax.jit(functools.partial(dinov2.features, module, layer=layer))


@pytest.mark.parametrize("size", COUNTS)
def test_parameter_counts_are_those_of_the_published_files(size):
    module = create("DINOv2", **dinov2.SIZES[size])
    assert sum(leaf.size for leaf in jax.tree.leaves(shapes(module))) == COUNTS[size]


@pytest.mark.parametrize("gated", [False, True])
def test_features(gated):
    module = tiny(gated=gated)
    found = compiled(module)(some_params(module), images())
    assert found.shape == (1, 256, 16)
    assert found.dtype == jnp.float32
    assert jnp.isfinite(found).all()


def test_gated_mlp():
    """By its definition, of which no stored output exists."""
    params = jax.tree.map(lambda leaf: leaf[0], some_params(tiny(gated=True))["blocks"]["mlp"])
    x = np.random.default_rng(2).standard_normal((1, 3, 16), np.float32)
    a, b = np.split(x @ params["fc1"]["kernel"] + params["fc1"]["bias"], 2, axis=-1)
    expected = (a / (1 + np.exp(-a)) * b) @ params["fc2"]["kernel"] + params["fc2"]["bias"]
    found = dinov2.Mlp(24, True, jnp.float32).apply({"params": params}, x)
    np.testing.assert_allclose(found, expected, atol=1e-5)


@pytest.mark.parametrize("size", ["B", "L"])
def test_later_blocks_are_not_computed(size):
    """Multiply-accumulates, from the shapes: shrinking, patches, positions and the blocks up to the layer."""
    module = create("DINOv2", **dinov2.SIZES[size])
    n, d, f = 1 + 4 + 256, module.width, module.hidden
    block = n * (4 * d * d + 2 * d * f) + 2 * n * n * d
    shrink = 224 * 256 * 256 * 3 + 224 * 224 * 256 * 3
    embed = 256 * 14 * 14 * 3 * d + 16 * 37 * 37 * d + 16 * 16 * 37 * d
    image = jax.ShapeDtypeStruct((1, 256, 256, 3), jnp.float32)
    for layer in (1, 3):
        macs = count_macs(lambda p, x, layer=layer: dinov2.features(module, p, x, layer), shapes(module), image)
        assert macs == shrink + embed + (module.depth - layer + 1) * block


def test_later_blocks_play_no_part():
    module = tiny()
    params = some_params(module)
    found = compiled(module)(params, images())
    spoilt = params | {
        "blocks": jax.tree.map(lambda leaf: np.concatenate([leaf[:2], leaf[2:] * np.nan]), params["blocks"])
    }
    np.testing.assert_array_equal(compiled(module)(spoilt, images()), found)
    assert jnp.isnan(compiled(module, 2)(spoilt, images())).all()


def test_cut():
    """The network without the later blocks, for a program that keeps or copies none of them."""
    module = tiny()
    params = some_params(module)
    shorter, rest = dinov2.cut(module, params, 3)
    assert shorter == tiny(depth=2)
    assert {leaf.shape[0] for leaf in jax.tree.leaves(rest["blocks"])} == {2}
    np.testing.assert_array_equal(compiled(shorter, 1)(rest, images()), compiled(module)(params, images()))


def test_larger_images_are_shrunk_after_normalisation():
    module = tiny()
    params, larger = some_params(module), images(256)
    shrunk = dinov2.shrink(dinov2.normalise(larger))
    assert shrunk.shape == (1, 224, 224, 3)
    direct = jax.jit(functools.partial(dinov2.patches, module))(params, shrunk)
    np.testing.assert_allclose(compiled(module)(params, larger), direct, atol=1e-4)


def test_a_grid_of_its_own_size_is_not_resampled():
    table = jnp.asarray(np.random.default_rng(0).standard_normal((1 + 36, 8), np.float32))
    assert dinov2.interpolate(table, 6, 6) is table
    other = dinov2.interpolate(table, 6, 3)
    assert other.shape == (1 + 18, 8)
    np.testing.assert_array_equal(other[0], table[0])


def test_bfloat16_is_near():
    module = tiny()
    params = some_params(module)
    exact, near = (compiled(m)(params, images()) for m in (module, module.clone(dtype="bfloat16")))
    assert near.dtype == jnp.float32
    assert 0 < np.linalg.norm(near - exact) < 0.02 * np.linalg.norm(exact)


def test_the_same_on_eight_devices():
    module, mesh = tiny(), make_mesh({"data": -1})
    params, x = some_params(module), images(batch=8)
    one = compiled(module)(params, x)
    with jax.set_mesh(mesh):
        split = jax.jit(functools.partial(dinov2.features, module))(params, jax.device_put(x, batch_sharding(mesh)))
    assert len(split.sharding.device_set) == 8
    assert split.sharding.shard_shape(split.shape)[0] == 1
    np.testing.assert_allclose(split, one, atol=1e-5)


@pytest.mark.parametrize(
    "x, layer, message",
    [
        (jnp.zeros((1, 240, 224, 3)), 3, r"images of 240 x 224 pixels; valid: 224 x 224 and 256 x 256"),
        (jnp.zeros((1, 224, 224, 3), jnp.uint8), 3, r"images are uint8 \(1, 224, 224, 3\); valid: floats in \[0, 1\]"),
        (jnp.zeros((224, 224, 3)), 3, r"images are float32 \(224, 224, 3\)"),
        (jnp.zeros((1, 224, 224, 3)), 5, r"layer = 5 counts from the end of 4 blocks; valid: 1 to that"),
        (jnp.zeros((1, 224, 224, 3)), 0, r"layer = 0 counts from the end"),
    ],
)
def test_mistakes_in_the_input(x, layer, message):
    module = tiny()
    with pytest.raises(UserError, match=message):
        dinov2.features(module, some_params(module), x, layer)


def test_images_that_patches_do_not_cover():
    with pytest.raises(UserError, match="images of 28 x 30 pixels; valid: sides divisible by the patch, 14"):
        jax.eval_shape(tiny().init, jax.random.key(0), jnp.zeros((1, 28, 30, 3)))


@pytest.mark.parametrize(
    "kwargs, message",
    [
        ({"dtype": "float16"}, "dtype = 'float16' is unknown; valid: float32, bfloat16"),
        ({"patch": 0}, "patch = 0; valid: a positive integer"),
        ({"registers": -1}, "registers = -1; valid: a number from 0 on"),
        ({"heads": 3}, "width = 16 is not divisible by heads = 3"),
        ({"antialias": True}, "unexpected keyword argument 'antialias'"),
    ],
)
def test_impossible_sizes(kwargs, message):
    with pytest.raises(UserError, match=message):
        tiny(**kwargs)


def test_unknown_networks():
    with pytest.raises(UserError, match="frozen network 'DINO' is unknown; valid: DINOv2, VQGAN"):
        create("DINO")
    with pytest.raises(UserError, match="missing 3 required positional arguments"):
        create("DINOv2", depth=1)
    assert isinstance(tiny(), DINOv2)


def plain_class_token(weights, pixels, heads):
    """The last norm of the class token by the definition, in float64, from the names of the public files."""
    w = {key: value.astype(np.float64) for key, value in weights.items()}
    kernel, depth = w["patch_embed.proj.weight"], 1 + max(int(key.split(".")[1]) for key in w if "blocks." in key)

    def norm(x, name):
        x = (x - x.mean(-1, keepdims=True)) / np.sqrt(x.var(-1, keepdims=True) + 1e-6)
        return x * w[f"{name}.weight"] + w[f"{name}.bias"]

    def linear(x, name):
        return x @ w[f"{name}.weight"].T + w[f"{name}.bias"]

    b, side, p = len(pixels), pixels.shape[1], kernel.shape[-1]
    patches = pixels.astype(np.float64).reshape(b, side // p, p, side // p, p, 3)
    x = np.einsum("bhpwqc,dcpq->bhwd", patches, kernel).reshape(b, -1, len(kernel)) + w["patch_embed.proj.bias"]
    x = np.concatenate([np.broadcast_to(w["cls_token"], (b, 1, len(kernel))), x], axis=1) + w["pos_embed"]
    for block in (f"blocks.{i}" for i in range(depth)):
        qkv = linear(norm(x, f"{block}.norm1"), f"{block}.attn.qkv").reshape(*x.shape[:2], 3, heads, -1)
        q, k, v = np.moveaxis(qkv, (2, 3), (0, 2))
        scores = np.exp(q @ np.swapaxes(k, -1, -2) / np.sqrt(q.shape[-1]))
        mixed = np.swapaxes(scores / scores.sum(-1, keepdims=True) @ v, 1, 2).reshape(x.shape)
        x = x + w[f"{block}.ls1.gamma"] * linear(mixed, f"{block}.attn.proj")
        h = linear(norm(x, f"{block}.norm2"), f"{block}.mlp.fc1")
        h = h * (1 + np.vectorize(math.erf)(h / np.sqrt(2))) / 2
        x = x + w[f"{block}.ls2.gamma"] * linear(h, f"{block}.mlp.fc2")
    return norm(x, "norm")[:, 0]


def test_class_token_without_registers():
    """A grid of the size of the image, so that no position is resized."""
    module = tiny(registers=0, patch=56, grid=4)
    params = some_params(module)
    assert "registers" not in params
    pixels = images(batch=2)
    found = jax.jit(functools.partial(dinov2.class_token, module))(params, pixels)
    assert found.dtype == jnp.float32
    normal = (np.asarray(pixels) - dinov2.MEAN) / dinov2.STD
    expected = plain_class_token(to_reference("dinov2", module, params), normal, module.heads)
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-4)


def test_class_token_takes_images_of_224():
    module = tiny()
    with pytest.raises(UserError, match=r"images of shape \(1, 256, 256, 3\); valid: \[b, 224, 224, 3\]"):
        dinov2.class_token(module, {}, images(256))
