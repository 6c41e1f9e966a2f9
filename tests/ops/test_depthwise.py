import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

from diffjax.errors import UserError
from diffjax.ops.depthwise import IMPLEMENTATIONS, add_kernels, depthwise_conv
from diffjax.parallel.mesh import make_mesh
from tests import tpu


def drawn(sizes=(5, 3, 1), shape=(2, 4, 7, 3), dtype=jnp.float32):
    keys = jax.random.split(jax.random.key(0), 1 + len(sizes))
    kernels = [jax.random.normal(key, (size, size, 1, shape[-1])) for key, size in zip(keys[1:], sizes)]
    return jax.random.normal(keys[0], shape, dtype), kernels


def by_hand(x, kernels):
    """Float64 loops over the definition."""
    x, out = np.asarray(x, np.float64), np.zeros(x.shape)
    for kernel in kernels:
        size = kernel.shape[0]
        padded = np.pad(x, ((0, 0), (size // 2,) * 2, (size // 2,) * 2, (0, 0)))
        for i, j in np.ndindex(x.shape[1:3]):
            window = padded[:, i : i + size, j : j + size]
            out[:, i, j] += np.einsum("bxyc,xyc->bc", window, kernel[:, :, 0])
    return out


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("sizes", [(5, 3, 1), (3,)], ids=str)
@pytest.mark.parametrize("shortcut", [False, True])
def test_matches_the_definition(implementation, sizes, shortcut):
    x, kernels = drawn(sizes)
    with jax.default_matmul_precision("highest"):
        out = depthwise_conv(x, kernels, shortcut=shortcut, implementation=implementation)
    np.testing.assert_allclose(out, by_hand(x, kernels) + shortcut * x, rtol=0, atol=2e-5)


def test_all_gradients_agree():
    x, kernels = drawn()

    def gradients(implementation):
        def loss(x, kernels):
            return jnp.sum(jnp.sin(depthwise_conv(x, kernels, shortcut=True, implementation=implementation)))

        with jax.default_matmul_precision("highest"):
            return jax.jit(jax.grad(loss, argnums=(0, 1)))(x, kernels)

    expected = gradients("separate")
    for implementation in ("grouped", "shifts"):
        jax.tree.map(
            lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-4), gradients(implementation), expected
        )


@pytest.mark.parametrize("implementation", ["grouped", "shifts"])
def test_bfloat16_in_bfloat16_out(implementation):
    x, kernels = drawn(dtype=jnp.bfloat16)
    out = depthwise_conv(x, kernels, implementation=implementation)
    assert out.dtype == jnp.bfloat16
    expected = by_hand(x, kernels)
    assert np.abs(np.asarray(out, np.float64) - expected).max() < 0.02 * np.abs(expected).max()


def test_kernels_add_at_their_centres_also_when_stacked():
    five, one = jnp.zeros((2, 5, 5, 1, 3)), jnp.ones((2, 1, 1, 1, 3))
    total = add_kernels([one, five])
    assert total.shape == five.shape
    np.testing.assert_array_equal(np.argwhere(total)[:, 1:3], [[2, 2]] * 6)


def test_the_backend_decides_by_default():
    x, kernels = drawn()
    np.testing.assert_array_equal(depthwise_conv(x, kernels), depthwise_conv(x, kernels, implementation="shifts"))

    def program(mesh):
        with jax.set_mesh(mesh):
            return jax.jit(lambda x, k: depthwise_conv(x, k)).trace(x, kernels).jaxpr

    assert "conv_general_dilated" not in str(program(make_mesh({"data": 1}, jax.devices()[:1])))
    assert "conv_general_dilated" in str(program(tpu.mesh("v5e")))


def test_split_channels_stay_where_they_are():
    """Nothing but the sums over the batch for the kernel's gradient crosses devices."""
    x, kernels = drawn(shape=(4, 8, 8, 16))
    mesh = make_mesh({"data": 2, "tensor": 4})
    split = jax.device_put(x, jax.NamedSharding(mesh, P("data", None, None, "tensor")))
    kernels = jax.device_put(kernels, jax.NamedSharding(mesh, P(None, None, None, "tensor")))
    with jax.set_mesh(mesh):
        gradient = jax.jit(jax.grad(lambda x, k: jnp.sum(jnp.sin(depthwise_conv(x, k))), argnums=(0, 1)))
        program = gradient.lower(split, kernels).compile().as_text()
    assert not any(word in program for word in ("all-gather", "all-to-all", "collective-permute"))


def test_unknown_implementation_is_an_error():
    with pytest.raises(UserError, match="valid: shifts, grouped, separate"):
        depthwise_conv(*drawn(), implementation="fast")
