"""What the TPU compiler says of DiS: a block of the largest size trains on one chip, thanks to the scan kernel."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import pytest

from diffjax.models import dis
from tests import tpu

pytestmark = pytest.mark.slow
GIB = 2**30
BATCH, TOKENS = 8, 64**2 // 4 + 2  # latents of 512 px, patch 2, with label and time


def gradient(scan):
    """Compiled for one v5e: the gradient of one out-block of DiS-H/2 and its inputs, in bfloat16."""
    depth, width = dis.SIZES["H"]
    mixer = {"depth": depth, "d_state": 16, "d_conv": 4, "expand": 2, "scan": scan}
    block = nn.remat(dis.DiSBlock, policy=dis.REMAT_POLICIES["dots"])("rms", mixer, jnp.bfloat16)
    narrow, wide = (jax.ShapeDtypeStruct((BATCH, TOKENS, width), dtype) for dtype in (jnp.bfloat16, jnp.float32))
    key = jax.random.key(0)
    mesh = tpu.mesh("v5e")

    def loss(params, h, r, skip):
        (h, r), _ = block.apply(params, (h, r), None, skip)
        return jnp.sum(h.astype(jnp.float32)) + jnp.sum(r)

    with jax.set_mesh(mesh):
        params = jax.eval_shape(block.init, key, (narrow, wide), None, narrow)
        arguments = tpu.placed(mesh, (params, narrow, wide, narrow))
        return jax.jit(jax.grad(loss, argnums=(0, 1, 2, 3))).lower(*arguments).compile()


def test_a_block_of_dis_h_needs_a_gibibyte_and_a_half():
    memory = gradient("pallas").memory_analysis()
    assert memory.temp_size_in_bytes < 1.5 * GIB


def test_the_same_block_does_not_fit_with_a_differentiated_associative_scan(monkeypatch):
    def plain(u, delta, A, B, C, D, z, bias, *, reverse, implementation):
        u32, d = u.astype(jnp.float32), jax.nn.softplus(delta.astype(jnp.float32) + bias)
        maps = jnp.exp(d[..., None, :] * A.T), (d * u32)[..., None, :] * B.astype(jnp.float32)[..., None]
        compose = lambda p, q: (p[0] * q[0], q[0] * p[1] + q[1])  # noqa: E731
        _, h = jax.lax.associative_scan(compose, maps, axis=1, reverse=reverse)
        y = jnp.sum(h * C.astype(jnp.float32)[..., None], axis=2) + D * u32
        return (y * jax.nn.silu(z.astype(jnp.float32))).astype(u.dtype)

    monkeypatch.setattr(dis, "selective_scan", plain)
    tpu.mesh("v5e")  # skips without libtpu
    with pytest.raises(jax.errors.JaxRuntimeError, match="exceeds available HBM"):
        gradient("")
