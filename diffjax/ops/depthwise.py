"""Depthwise convolution of images: one kernel per channel, zero padding, same size."""

from collections.abc import Sequence

import jax
import jax.numpy as jnp

from diffjax.errors import UserError
from diffjax.parallel.mesh import platform

IMPLEMENTATIONS = ("shifts", "grouped", "separate")


def depthwise_conv(
    x: jax.Array, kernels: Sequence[jax.Array], *, shortcut: bool = False, implementation: str | None = None
) -> jax.Array:
    """Sum over the kernels of y[i, j] = sum over a, b of kernel[a, b] x[i + a - k // 2, j + b - k // 2].

    Args:
        x: [b, h, w, d].
        kernels: [k, k, 1, d] each, k odd; the sizes may differ.
        shortcut: add x to the sum.
        implementation: "separate" (every kernel a grouped convolution), "grouped" (the kernels added first, then one
            grouped convolution) or "shifts" (added first, then k^2 shifted multiply-adds in float32, with a backward
            pass of the same form). None: "shifts" on a CPU, "grouped" elsewhere.

    Returns:
        [b, h, w, d] in the dtype of x.

    Measured for one 5 x 5 kernel, forward / with gradients. CPU, 2 cores, float32: grouped 95 / 481 ms and shifts
    8 / 66 ms at [8, 32, 32, 384]; 13 / 131 and 0.8 / 4 ms at [8, 8, 8, 768]. TPU v5e, bfloat16, thousands of cycles by
    the compiler's estimate: grouped 560 / 1430 at [32, 32, 32, 192] and 110 / 280 at [32, 8, 8, 768], where shifts
    take 2410 and 690 forwards alone. GPU: not measured.
    """
    if implementation is None:
        implementation = "shifts" if platform() == "cpu" else "grouped"
    if implementation not in IMPLEMENTATIONS:
        raise UserError(f"depthwise = {implementation!r} is unknown; valid: {', '.join(IMPLEMENTATIONS)}")
    if implementation == "shifts":
        # The shortcut as a kernel: x from elsewhere would be computed again within the sum, 44 against 15 ms for a
        # feed-forward network of U-DiT at [8, 32, 32, 192], forward.
        return _shifts(x, add_kernels([*kernels, *([jnp.ones_like(kernels[0][:1, :1])] if shortcut else [])]))
    parts = kernels if implementation == "separate" else [add_kernels(kernels)]
    return sum((_grouped(x, kernel) for kernel in parts), start=x if shortcut else jnp.zeros((), x.dtype))


def add_kernels(kernels: Sequence[jax.Array]) -> jax.Array:
    """The one kernel [..., k, k, 1, d], k the largest size, that does what all of them together do."""
    size = max(kernel.shape[-3] for kernel in kernels)

    def widen(kernel: jax.Array) -> jax.Array:
        margin = ((size - kernel.shape[-3]) // 2,) * 2
        return jnp.pad(kernel, [(0, 0)] * (kernel.ndim - 4) + [margin, margin, (0, 0), (0, 0)])

    return sum(map(widen, kernels[1:]), start=widen(kernels[0]))


def _grouped(x: jax.Array, kernel: jax.Array) -> jax.Array:
    layout = ("NHWC", "HWIO", "NHWC")
    kernel = kernel.astype(x.dtype)
    return jax.lax.conv_general_dilated(
        x, kernel, (1, 1), "SAME", dimension_numbers=layout, feature_group_count=x.shape[-1]
    )


@jax.custom_vjp
def _shifts(x: jax.Array, kernel: jax.Array) -> jax.Array:
    size, (height, width) = kernel.shape[0], x.shape[1:3]
    padded, kernel = _pad(x, size), kernel.astype(jnp.float32)
    positions = [(a, b) for a in range(size) for b in range(size)]
    total = sum(padded[:, a : a + height, b : b + width].astype(jnp.float32) * kernel[a, b, 0] for a, b in positions)
    return total.astype(x.dtype)  # type: ignore[union-attr]


def _shifts_backward(saved: tuple[jax.Array, jax.Array], grad: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Of x the mirrored kernel's convolution; of the kernel, row after row of the image, sums of shifted products.

    A sum of a product over all of [b, h, w] at once is several times slower on a CPU, which then cannot vectorise it.
    """
    x, kernel = saved
    size, (height, width, d) = kernel.shape[0], x.shape[1:]
    padded = _pad(x, size)

    def add_row(total: jax.Array, i: jax.Array) -> tuple[jax.Array, None]:
        here = jax.lax.dynamic_index_in_dim(grad, i, axis=1, keepdims=False).astype(jnp.float32)

        def of_kernel_row(a: jax.Array) -> jax.Array:
            row = jax.lax.dynamic_index_in_dim(padded, i + a, axis=1, keepdims=False).astype(jnp.float32)
            return jnp.stack([jnp.sum(row[:, b : b + width] * here, axis=0) for b in range(size)])

        return total + jax.lax.map(of_kernel_row, jnp.arange(size)), None

    total, _ = jax.lax.scan(add_row, jnp.zeros((size, size, width, d), jnp.float32), jnp.arange(height))
    grad_kernel = jnp.sum(total, axis=2)[:, :, None].astype(kernel.dtype)
    return _shifts(grad, kernel[::-1, ::-1]), grad_kernel


def _pad(x: jax.Array, size: int) -> jax.Array:
    margin = (size // 2, size // 2)
    # A barrier, since XLA would compute what x comes from anew: 37 against 13 ms for Linear, GELU, this and Linear at
    # [8, 32, 32, 192] with 384 hidden channels, forward.
    return jax.lax.optimization_barrier(jnp.pad(x, ((0, 0), margin, margin, (0, 0))))


_shifts.defvjp(lambda x, kernel: (_shifts(x, kernel), (x, kernel)), _shifts_backward)
