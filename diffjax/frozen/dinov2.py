"""DINOv2 (arXiv 2304.07193), with registers (2309.16588) the feature extractor of DiGIT (arXiv 2410.12490), without
them that of FD-DINOv2 (2306.04675).

    x = [class, patches(pixels)] + positions;  the registers, which have no position, go between class and patches
    x = x + s_a Attention(LN(x))                                                         per block; s_a, s_m: LayerScale
    x = x + s_m Mlp(LN(x))
    features = LN(x) of the patches, after block depth - layer, with the network's last norm

`layer` counts from the end: 1 is the last block. Blocks after it are not run.

The weights are the published `dinov2_vit{s,b,l,g}14_reg4_pretrain.pth`, but the positions are those of the networks
without registers, as DiGIT has them: the stored 37 x 37 grid is sampled with scale (h + 0.1) / 37 and no antialiasing,
where the constructors of the register weights take h / 37 and antialias. Its codebooks need this variant.

FD-DINOv2 takes `class_token` of `dinov2_vitl14_pretrain.pth`.
"""

import math
from collections.abc import Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from einops import rearrange

from diffjax.errors import UserError
from diffjax.frozen.layers import check_sizes
from diffjax.ops.attention import attention
from diffjax.ops.dtypes import DTYPES
from diffjax.ops.resize import cubic_matrix, resize
from diffjax.parallel.rules import constrain

# Depth, width, heads of ViT-S/14 .. ViT-g/14; the hidden width of their Mlp, which in g is gated.
SIZES = {
    "S": {"depth": 12, "width": 384, "heads": 6, "hidden": 1536},
    "B": {"depth": 12, "width": 768, "heads": 12, "hidden": 3072},
    "L": {"depth": 24, "width": 1024, "heads": 16, "hidden": 4096},
    "g": {"depth": 40, "width": 1536, "heads": 24, "hidden": 4096, "gated": True},
}
LAYER = 3  # of DiGIT's codebooks
MEAN = np.array([0.485, 0.456, 0.406], np.float32)
STD = np.array([0.229, 0.224, 0.225], np.float32)
SIDE, LARGER_SIDE = 224, 256  # of the network's image, and of one that is made smaller
OFFSET = 0.1
EPSILON = 1e-6


def features(module: "DINOv2", params: Mapping[str, Any], images: jax.Array, layer: int = LAYER) -> jax.Array:
    """The patches' features of images, row by row: float32 [b, n, width], n = (224 / patch)^2 = 256.

    Args:
        images: float [b, h, w, 3], RGB in [0, 1]; 224 x 224, or 256 x 256, which is shrunk after normalisation.
        layer: which block's output, counted from the end. The parameters of later blocks are passed in vain, and a CPU
            copies those of the others in every call: `cut` the network once and ask for layer 1 to spare both.

    Raises:
        UserError: images of another size or of integers; no such layer.
    """
    return patches(module, params, shrink(normalise(images)), layer)


def class_token(module: "DINOv2", params: Mapping[str, Any], images: jax.Array) -> jax.Array:
    """The last norm of the class token, of FD-DINOv2: float32 [b, width].

    images: float [b, 224, 224, 3], RGB in [0, 1]. UserError for other sizes and for integers.

    Products are of float32 on every device: lower precision changes the features and so the distance.
    """
    if images.shape[1:3] != (SIDE, SIDE):
        raise UserError(f"DINOv2: images of shape {images.shape}; valid: [b, {SIDE}, {SIDE}, 3]")
    with jax.default_matmul_precision("highest"):
        tokens: Any = module.apply({"params": params}, normalise(images))
    return tokens[:, 0]


def patches(module: "DINOv2", params: Mapping[str, Any], pixels: jax.Array, layer: int = LAYER) -> jax.Array:
    """As `features`, of normalised pixels [b, h, w, 3] whose sides are multiples of the patch."""
    module, params = cut(module, params, layer)
    tokens: Any = module.apply({"params": params}, pixels)
    return tokens[:, 1 + module.registers :]


def cut(module: "DINOv2", params: Mapping[str, Any], layer: int) -> tuple["DINOv2", dict[str, Any]]:
    """The network without the last layer - 1 blocks; of the result the same layer is the last, 1."""
    if not 1 <= layer <= module.depth:
        raise UserError(f"DINOv2: layer = {layer} counts from the end of {module.depth} blocks; valid: 1 to that")
    depth = module.depth - layer + 1
    return module.clone(depth=depth), {**params, "blocks": jax.tree.map(lambda x: x[:depth], params["blocks"])}


def normalise(images: jax.Array) -> jax.Array:
    """RGB in [0, 1] to the deviations from ImageNet's mean that the network takes; float32 [b, h, w, 3]."""
    if images.ndim != 4 or images.shape[-1] != 3 or not jnp.issubdtype(images.dtype, jnp.floating):
        raise UserError(
            f"DINOv2: images are {images.dtype} {images.shape}; valid: floats in [0, 1] of shape [b, h, w, 3]"
        )
    return (images.astype(jnp.float32) - MEAN) / STD


def shrink(pixels: jax.Array) -> jax.Array:
    """[b, 256, 256, c] to float32 [b, 224, 224, c], bicubic without antialiasing; 224 x 224 as they are."""
    size = pixels.shape[1:3]
    if size == (SIDE, SIDE):
        return pixels
    if size != (LARGER_SIDE, LARGER_SIDE):
        raise UserError(f"DINOv2: images of {size[0]} x {size[1]} pixels; valid: 224 x 224 and 256 x 256")
    matrix = cubic_matrix(LARGER_SIDE, SIDE, SIDE / LARGER_SIDE)
    return resize(pixels, matrix, matrix)


def interpolate(table: jax.Array, height: int, width: int) -> jax.Array:
    """The class row and the grid's rows [1 + side^2, d], resized to 1 + height * width rows, float32."""
    side = math.isqrt(len(table) - 1)
    if height == width == side:
        return table
    grid = rearrange(table[1:], "(h w) d -> h w d", h=side)
    rows, columns = (cubic_matrix(side, size, (size + OFFSET) / side) for size in (height, width))
    return jnp.concatenate([table[:1], rearrange(resize(grid, rows, columns), "h w d -> (h w) d")])


class Attention(nn.Module):
    """Multi-head self-attention; [b, n, d] -> [b, n, d]."""

    heads: int
    dtype: Any

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        d = x.shape[-1]
        qkv = nn.DenseGeneral((self.heads, 3, d // self.heads), dtype=self.dtype, name="qkv")(x)
        x = attention(qkv[..., 0, :], qkv[..., 1, :], qkv[..., 2, :])
        return nn.DenseGeneral(d, axis=(-2, -1), dtype=self.dtype, name="out")(x)


class Mlp(nn.Module):
    """Linear -> exact GELU -> Linear, or gated: W2 (SiLU(a) b), [a, b] = W1 x; [b, n, d] -> [b, n, d]."""

    hidden: int
    gated: bool
    dtype: Any

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        d = x.shape[-1]
        x = nn.Dense(self.hidden * (1 + self.gated), dtype=self.dtype, name="fc1")(x)
        if self.gated:
            gate, x = jnp.split(x, 2, axis=-1)
            x = nn.silu(gate) * x
        else:
            x = nn.gelu(x, approximate=False)
        return nn.Dense(d, dtype=self.dtype, name="fc2")(x)


class DINOv2Block(nn.Module):
    heads: int
    hidden: int
    gated: bool
    dtype: Any

    @nn.compact
    def __call__(self, x: jax.Array) -> tuple[jax.Array, None]:
        """x float32 [b, n, d] -> (x, None), the carry of `nn.scan`; only the two branches are of `dtype`."""
        x = constrain(x, "batch", "length", "embed")
        attend = Attention(self.heads, self.dtype, name="attention")
        mlp = Mlp(self.hidden, self.gated, self.dtype, name="mlp")
        for branch in (attend, mlp):
            scale = self.param(f"{branch.name}_scale", nn.initializers.ones, x.shape[-1:])
            x = x + scale * branch(layer_norm(self.dtype, f"{branch.name}_norm")(x))
        return constrain(x, "batch", "length", "embed"), None


def layer_norm(dtype: Any, name: str) -> nn.LayerNorm:
    """LayerNorm with statistics in float32."""
    return nn.LayerNorm(EPSILON, use_fast_variance=False, dtype=dtype, name=name)


class DINOv2(nn.Module):
    """The network; see the module docstring.

    Attributes:
        hidden: width inside the feed-forward networks. gated: their form, see `Mlp`.
        patch: side of a patch in pixels.
        registers: tokens between class and patches, 0 for none.
        grid: side of the grid of positions that is stored.
        dtype: compute dtype, "float32" or "bfloat16"; norm statistics, softmax and the sum of the branches stay
            float32.
    """

    depth: int
    width: int
    heads: int
    hidden: int
    gated: bool = False
    patch: int = 14
    registers: int = 4
    grid: int = 37
    dtype: str = "float32"

    def validate(self) -> None:
        """Raise UserError for sizes that exclude each other, before anything is traced."""
        check_sizes(self, "depth", "width", "heads", "hidden", "patch", "grid")
        if not isinstance(self.registers, int) or self.registers < 0:
            raise UserError(f"DINOv2: registers = {self.registers!r}; valid: a number from 0 on")
        if self.width % self.heads:
            raise UserError(f"DINOv2: width = {self.width} is not divisible by heads = {self.heads}")

    @nn.compact
    def __call__(self, pixels: jax.Array) -> jax.Array:
        """Normalised pixels [b, h, w, 3] -> the last norm of all tokens, float32 [b, 1 + registers + n, width]."""
        if pixels.shape[1] % self.patch or pixels.shape[2] % self.patch:
            raise UserError(
                f"DINOv2: images of {pixels.shape[1]} x {pixels.shape[2]} pixels; valid: sides divisible by the patch, "
                f"{self.patch}"
            )
        blocks = nn.scan(
            DINOv2Block,
            variable_axes={"params": 0, "intermediates": 0},
            split_rngs={"params": True},
            length=self.depth,
        )
        x = self.embed(pixels)
        x, _ = blocks(self.heads, self.hidden, self.gated, DTYPES[self.dtype], name="blocks")(x)
        return layer_norm(jnp.float32, "norm")(x)

    def embed(self, pixels: jax.Array) -> jax.Array:
        """The input of the first block: float32 [b, 1 + registers + n, width]."""
        batch, height, width = len(pixels), pixels.shape[1] // self.patch, pixels.shape[2] // self.patch
        rows = {"cls_token": 1, "registers": self.registers, "positions": 1 + self.grid**2}
        tokens = {n: self.param(n, nn.initializers.zeros, (size, self.width)) for n, size in rows.items() if size}
        self.param("mask_token", nn.initializers.zeros, (self.width,))  # of the training; kept so that files are whole
        x = rearrange(pixels, "b (h ph) (w pw) c -> b (h w) (ph pw c)", ph=self.patch, pw=self.patch)
        x = nn.Dense(self.width, dtype=DTYPES[self.dtype], name="patch_embed")(x)
        positions = interpolate(tokens["positions"], height, width)
        first = jnp.concatenate(
            [tokens["cls_token"] + positions[:1], *([tokens["registers"]] if self.registers else [])]
        )
        return jnp.concatenate([jnp.broadcast_to(first, (batch, *first.shape)), x + positions[1:]], axis=1)
