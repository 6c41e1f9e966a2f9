"""The autoencoders: their published sizes, bfloat16, what they take, a mesh."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from diffjax.errors import UserError
from diffjax.frozen import create, vae
from diffjax.parallel.mesh import batch_sharding, make_mesh
from tests import slow

SMALL = {
    "VAE": {"widths": (16, 24), "depth": 1, "groups": 8},
    "TinyVAE": {"width": 8, "encoder_blocks": (1, 2), "decoder_blocks": (2, 1)},
}
BOTH = pytest.mark.parametrize("name", SMALL)


def shapes(module, side=16):
    blank = jnp.zeros((1, side, side, getattr(module, "channels", 3)))
    return jax.eval_shape(module.init, jax.random.key(0), blank)["params"]


def some_params(module):
    leaves, structure = jax.tree.flatten(shapes(module))
    rng = np.random.default_rng(0)
    return structure.unflatten([0.1 * rng.standard_normal(leaf.shape, np.float32) for leaf in leaves])


def images(batch=2, side=16):
    return np.random.default_rng(1).uniform(-1, 1, (batch, side, side, 3)).astype(np.float32)


@functools.cache
def compiled(module, method=None):
    return jax.jit(functools.partial(module.apply, method=method))


@pytest.mark.parametrize(
    "name, parts, tensors",
    [
        ("VAE", {"encoder": 34_163_592, "decoder": 49_490_179, "quant_conv": 72, "post_quant_conv": 20}, 248),
        ("TinyVAE", {"encoder": 1_222_532, "decoder": 1_222_531}, 134),
    ],
)
def test_parameter_counts_are_those_of_the_published_files(name, parts, tensors):
    params = shapes(create(name))
    assert {part: sum(leaf.size for leaf in jax.tree.leaves(params[part])) for part in params} == parts
    assert len(jax.tree.leaves(params)) == tensors


@BOTH
def test_published_shapes(name):
    module = create(name)
    params = shapes(module)
    mean, log_variance = jax.eval_shape(compiled(module, "encode"), {"params": params}, jnp.zeros((2, 256, 256, 3)))
    assert mean.shape == log_variance.shape == (2, 32, 32, 4)
    image = jax.eval_shape(compiled(module, "decode"), {"params": params}, mean)
    assert (image.shape, image.dtype) == ((2, 256, 256, 3), jnp.float32)


@pytest.mark.slow
@BOTH
def test_bfloat16_computes_in_it_and_returns_float32(name):
    module, half = (create(name, **SMALL[name], dtype=dtype) for dtype in ("float32", "bfloat16"))
    params = {"params": some_params(module)}
    for method, given in (("encode", images()), ("decode", images()[:, :8, :8, [0, 1, 2, 0]])):
        full, found = (compiled(each, method)(params, given) for each in (module, half))
        full, found = (jax.tree.leaves(out)[0] for out in (full, found))
        assert found.dtype == jnp.float32
        assert 1e-4 < float(jnp.abs(found - full).max() / jnp.abs(full).max()) < 0.05


@BOTH
@pytest.mark.parametrize("strips", slow.but([2], [2, 4, 8]))
def test_a_decoder_in_strips_is_the_whole_one(name, strips):
    """Also at the borders of strips and of the map, with statistics and attention over all of it."""
    module = create(name, **SMALL[name])
    params = {"params": some_params(module)}
    z = np.random.default_rng(2).standard_normal((2, 8, 6, 4), np.float32)
    whole = compiled(module, "decode")(params, z)
    found = jax.jit(lambda params, z: module.apply(params, z, strips, method="decode"))(params, z)
    np.testing.assert_allclose(found, whole, rtol=0, atol=2e-6 * float(jnp.abs(whole).max()))


def test_strips_take_less_memory():
    """Without attention, whose temporaries on a CPU the analysis of the whole program does not count."""
    module = create("VAE", **SMALL["VAE"], attention=False)
    params = {"params": shapes(module)}
    z = jax.ShapeDtypeStruct((1, 64, 64, 4), jnp.float32)

    def temporaries(strips):
        decode = jax.jit(lambda params, z: module.apply(params, z, strips, method="decode"))
        return decode.lower(params, z).compile().memory_analysis().temp_size_in_bytes

    assert temporaries(8) < 0.75 * temporaries(1)


@pytest.mark.slow
@BOTH
def test_a_mesh_changes_nothing(name):
    module = create(name, **SMALL[name])
    params = {"params": some_params(module)}
    mesh = make_mesh({"data": 8})
    with jax.set_mesh(mesh):
        found = compiled(module)(params, jax.device_put(images(8), batch_sharding(mesh)))
    assert len(found.sharding.device_set) == 8
    np.testing.assert_allclose(found, jax.jit(module.apply)(params, images(8)), atol=1e-5)


def test_the_log_variance_is_cut():
    module = create("VAE", **SMALL["VAE"])
    params = some_params(module)
    params["quant_conv"]["bias"] = np.array([0, 0, 0, 0, -100, 100, 0, 0], np.float32)
    _, log_variance = compiled(module, "encode")({"params": params}, images())
    assert (np.asarray(log_variance[..., 0]) == vae.LOWEST).all()
    assert (np.asarray(log_variance[..., 1]) == vae.HIGHEST).all()


def test_latents_of_a_shifted_scale():
    module = create("VAE", **SMALL["VAE"], scale=0.5, shift=2.0)
    assert module.from_latent(0.5) == 3.0


@pytest.mark.parametrize(
    "name, changed, message",
    [
        ("VAE", {"widths": (16, 20)}, r"widths = \(16, 20\); valid: multiples of groups = 8"),
        ("VAE", {"depth": 0}, "depth = 0; valid: a positive integer"),
        ("VAE", {"scale": 0.0}, "scale = 0.0; valid: above 0"),
        ("VAE", {"dtype": "float16"}, "dtype = 'float16' is unknown; valid: float32, bfloat16"),
        ("TinyVAE", {"decoder_blocks": (1,)}, "valid: as many levels in both"),
        ("TinyVAE", {"width": -1}, "width = -1; valid: a positive integer"),
        ("TinyVAE", {"dtype": "float16"}, "dtype = 'float16' is unknown; valid: float32, bfloat16"),
    ],
)
def test_sizes_that_cannot_be(name, changed, message):
    with pytest.raises(UserError, match=message):
        create(name, **{**SMALL[name], **changed})


@BOTH
def test_images_that_cannot_be_halved(name):
    module = create(name, **SMALL[name])
    with pytest.raises(UserError, match="images of 15 x 16 pixels; valid: sides divisible by 2"):
        module.apply({"params": some_params(module)}, images()[:, :15], method="encode")
