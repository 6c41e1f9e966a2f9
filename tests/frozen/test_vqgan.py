"""The VQGAN: its published size, tokens, what it takes, its switches."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from diffjax.errors import UserError
from diffjax.frozen import create, vqgan
from diffjax.parallel.mesh import batch_sharding, make_mesh


def tiny(**kwargs):
    return create(
        "VQGAN", **{"vocabulary": 40, "features": 8, "width": 32, "multipliers": (1, 2), "depth": 1, **kwargs}
    )


def shapes(module, side=16):
    return jax.eval_shape(module.init, jax.random.key(0), jnp.zeros((1, side, side, 3)))["params"]


def some_params(module):
    leaves, structure = jax.tree.flatten(shapes(module))
    rng = np.random.default_rng(0)
    return structure.unflatten([0.1 * rng.standard_normal(leaf.shape, np.float32) for leaf in leaves])


def images(batch=2, side=16):
    return jnp.asarray(np.random.default_rng(1).random((batch, side, side, 3), np.float32))


@functools.cache
def compiled(function, module):
    return jax.jit(functools.partial(function, module))


def test_parameter_counts_are_those_of_the_published_file():
    params = shapes(create("VQGAN"), 256)
    counts = {part: sum(leaf.size for leaf in jax.tree.leaves(params[part])) for part in params}
    assert counts == {"encoder": 23_775_104, "decoder": 30_478_339, "codebook": 262_144}
    assert sum(counts.values()) == 54_515_587
    assert len(jax.tree.leaves(params)) == 168


def test_published_shapes():
    module = create("VQGAN")
    params = shapes(module, 256)
    tokens = jax.eval_shape(compiled(vqgan.encode, module), params, jnp.zeros((2, 256, 256, 3)))
    assert (tokens.shape, tokens.dtype) == ((2, 256), jnp.int32)
    image = jax.eval_shape(compiled(vqgan.decode, module), params, tokens)
    assert (image.shape, image.dtype) == ((2, 256, 256, 3), jnp.float32)


def test_encode_and_decode():
    module = tiny()
    params = some_params(module)
    tokens = compiled(vqgan.encode, module)(params, images())
    assert tokens.shape == (2, 64)
    assert len(np.unique(tokens)) > 1
    decoded = compiled(vqgan.decode, module)(params, tokens)
    assert decoded.shape == (2, 16, 16, 3)
    assert 0 <= decoded.min() < decoded.max() <= 1


def test_nearest_entry():
    module = tiny()
    params = some_params(module)
    z = np.random.default_rng(2).standard_normal((2, 3, 5, 8), np.float32)
    found = module.apply({"params": params}, z, method="quantise")
    distances = np.square(z[..., None, :] - params["codebook"]).sum(-1)
    np.testing.assert_array_equal(found, distances.argmin(-1))


def test_no_array_of_differences():
    """The largest array of the search has a number for every place and token, not for every feature of them too."""
    module = create("VQGAN")
    z = jax.ShapeDtypeStruct((2, 16, 16, 256), jnp.float32)
    search = jax.make_jaxpr(lambda p, z: module.apply({"params": p}, z, method="quantise"))(shapes(module, 256), z)
    sizes = [variable.aval.size for equation in search.jaxpr.eqns for variable in equation.outvars]
    assert max(sizes) == 2 * 16 * 16 * 1024


@pytest.mark.parametrize("token", [-1, 40])
def test_a_token_that_is_none_spoils_its_image_alone(token):
    module = tiny()
    tokens = np.zeros((2, 64), np.int32)
    tokens[1, 5] = token
    decoded = compiled(vqgan.decode, module)(some_params(module), tokens)
    assert jnp.isfinite(decoded[0]).all()
    assert jnp.isnan(decoded[1]).any()


def test_bfloat16_is_near():
    module = tiny()
    params = some_params(module)
    tokens = np.arange(64, dtype=np.int32).reshape(1, 64) % 40
    exact, near = (compiled(vqgan.decode, m)(params, tokens) for m in (module, module.clone(dtype="bfloat16")))
    assert near.dtype == jnp.float32
    assert 0 < jnp.abs(near - exact).max() < 0.05


@pytest.mark.slow
def test_the_same_on_eight_devices():
    module, mesh = tiny(), make_mesh({"data": -1})
    params, x = some_params(module), images(batch=8)

    def reconstruct(params, x):
        tokens = vqgan.encode(module, params, x)
        return tokens, vqgan.decode(module, params, tokens)

    tokens, decoded = jax.jit(reconstruct)(params, x)
    with jax.set_mesh(mesh):
        split, decoded_split = jax.jit(reconstruct)(params, jax.device_put(x, batch_sharding(mesh)))
    assert decoded_split.sharding.shard_shape(decoded_split.shape)[0] == 1
    np.testing.assert_array_equal(split, tokens)
    np.testing.assert_allclose(decoded_split, decoded, atol=1e-5)


@pytest.mark.parametrize(
    "function, x, message",
    [
        (vqgan.encode, jnp.zeros((1, 16, 15, 3)), "images of 16 x 15 pixels; valid: sides divisible by 2"),
        (vqgan.encode, jnp.zeros((1, 16, 16, 3), jnp.uint8), r"images are uint8 \(1, 16, 16, 3\); valid: floats in"),
        (vqgan.encode, jnp.zeros((1, 16, 16, 4)), r"images are float32 \(1, 16, 16, 4\)"),
        (
            vqgan.decode,
            jnp.zeros((1, 15), jnp.int32),
            r"tokens are int32 \(1, 15\); valid: integers \[b, n\], n a square",
        ),
        (vqgan.decode, jnp.zeros((1, 16)), r"tokens are float32 \(1, 16\)"),
        (vqgan.decode, jnp.zeros((1, 4, 4), jnp.int32), r"tokens are int32 \(1, 4, 4\)"),
    ],
)
def test_mistakes_in_the_input(function, x, message):
    module = tiny()
    with pytest.raises(UserError, match=message):
        function(module, some_params(module), x)


@pytest.mark.parametrize(
    "kwargs, message",
    [
        ({"dtype": "half"}, "dtype = 'half' is unknown; valid: float32, bfloat16"),
        ({"depth": 0}, "depth = 0; valid: a positive integer"),
        ({"width": 48}, "width = 48, multipliers = .1, 2.; valid: multiples of 32, and a positive integer per level"),
        ({"multipliers": ()}, "multipliers = ..; valid"),
    ],
)
def test_impossible_sizes(kwargs, message):
    with pytest.raises(UserError, match=message):
        tiny(**kwargs)
