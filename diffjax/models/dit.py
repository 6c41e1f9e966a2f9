"""DiT: a transformer on image patches, conditioned through adaptive LayerNorm (arXiv 2212.09748).

    x = patches(x) + positions,  c = time(t) + label(y)
    x = x + gate_a Attention(LN(x) (1 + scale_a) + shift_a)          (per block, figure 3: adaLN-Zero)
    x = x + gate_m Mlp(LN(x) (1 + scale_m) + shift_m)
    out = Linear(LN(x) (1 + scale) + shift)

where every shift, scale and gate is a linear map of SiLU(c) that starts at zero, so a fresh model returns zeros.
"""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from diffjax.errors import UserError
from diffjax.models.layers import (
    REMAT_POLICIES,
    Attention,
    Depth,
    FinalLayer,
    Heads,
    ImageBackbone,
    Mlp,
    MlpRatio,
    Patch,
    Remat,
    SelfAttention,
    TimeEmbed,
    Width,
    check_counts,
    check_heads,
    check_options,
    check_see,
    check_sincos,
    layer_norm,
    modulate,
    patchify,
    run_stack,
    sincos_positions,
    sinusoidal_time,
    stacked,
    unpatchify,
    xavier,
    zeros,
)
from diffjax.ops.dtypes import DTYPES, Dtype
from diffjax.parallel.rules import LogicalAxes, constrain

# Table 1 of the paper: depth, width, heads.
SIZES = {"S": (12, 384, 6), "B": (12, 768, 12), "L": (24, 1024, 16), "XL": (28, 1152, 16)}

LOGICAL_AXES: LogicalAxes = (
    (r"patch_embed/kernel", ("patch", "embed")),
    (r"time_embed/fc\d/kernel", (None, "embed")),
    (r"label_embed/embedding", ("vocab", "embed")),
    (r"modulation/kernel", ("embed", None)),
    (r"attention/qkv/kernel", ("embed", "heads", None, "kv")),
    (r"attention/qkv/bias", ("heads", None, "kv")),
    (r"attention/out/kernel", ("heads", "kv", "embed")),
    (r"mlp/fc1/kernel", ("embed", "mlp")),
    (r"mlp/fc1/bias", ("mlp",)),
    (r"mlp/fc2/kernel", ("mlp", "embed")),
    (r"final/linear/kernel", ("embed", "patch")),
    (r"bias", (None,)),
)


class DiTBlock(nn.Module):
    heads: int
    hidden: int
    dtype: Any
    attention: str

    @nn.compact
    def __call__(self, x: jax.Array, c: jax.Array) -> tuple[jax.Array, None]:
        """x [b, n, d], c = SiLU(conditioning) [b, d] -> (x, None), the carry of `nn.scan`."""
        d = x.shape[-1]
        x = constrain(x, "batch", "length", "embed")
        parameters = nn.Dense(6 * d, kernel_init=zeros, dtype=self.dtype, name="modulation")(c)
        shift_a, scale_a, gate_a, shift_m, scale_m, gate_m = jnp.split(parameters, 6, axis=-1)
        attend = SelfAttention(self.heads, self.dtype, self.attention, name="attention")
        x = x + gate_a[:, None] * attend(modulate(layer_norm(x), shift_a, scale_a))
        x = constrain(x, "batch", "length", "embed")
        x = x + gate_m[:, None] * Mlp(self.hidden, self.dtype, name="mlp")(modulate(layer_norm(x), shift_m, scale_m))
        return constrain(x, "batch", "length", "embed"), None


class DiT(ImageBackbone):
    """The backbone; see the module docstring."""

    patch: Patch
    depth: Depth
    width: Width
    heads: Heads
    mlp_ratio: MlpRatio = 4.0
    dtype: Dtype = "float32"
    remat: Remat = "dots"
    attention: Attention = "xla"

    logical_axes = LOGICAL_AXES

    @property
    def blocks_to_see(self) -> int:
        """How many values `see` can have: one per block."""
        return self.depth

    def validate(self) -> None:
        """Raise UserError for options that exclude each other, before anything is traced."""
        check_options("DiT", self)
        check_counts("DiT", self, channels=1, num_classes=0)
        check_heads("DiT", self.width, self.heads)
        check_sincos("DiT", self.width)

    def check_input(self, height: int, width: int) -> None:
        """Raise UserError unless an image of this size can be cut into patches."""
        if height % self.patch or width % self.patch:
            raise UserError(f"image size {height} x {width} is not divisible by the model's patch = {self.patch}")

    @nn.compact
    def __call__(
        self,
        x: jax.Array,
        t: jax.Array,
        y: jax.Array | None,
        train: bool = False,
        keys: jax.Array | None = None,
        see: int | None = None,
    ) -> jax.Array | tuple[jax.Array, jax.Array]:
        """x [b, h, w, c], t [b] in 0..999, y [b] int32 or None -> float32 [b, h, w, c or 2c].

        `train` and `keys` change nothing here: DiT has no dropout but that of labels, which happens before. With `see`
        also the output of that block, 0 the first: [b, n, d] in the compute dtype.
        """
        del train, keys
        check_see("DiT", self, see)
        dtype = DTYPES[self.dtype]
        height, width = x.shape[1] // self.patch, x.shape[2] // self.patch
        self.check_input(*x.shape[1:3])
        x = nn.Dense(self.width, kernel_init=xavier, dtype=dtype, name="patch_embed")(patchify(x, self.patch))
        x = x + sincos_positions(height, width, self.width).astype(dtype)
        c = TimeEmbed(self.width, self.width, name="time_embed")(sinusoidal_time(t))
        c = self.add_label(c, y)
        c = constrain(nn.silu(c), "batch", "embed")
        x, seen = self._blocks(x, c, see)
        x = FinalLayer(self.patch**2 * self.out_channels, dtype, name="final")(x, c)
        out = unpatchify(x, self.patch, height, width).astype(jnp.float32)
        return out if seen is None else (out, seen)

    def _blocks(self, x: jax.Array, c: jax.Array, see: int | None) -> tuple[jax.Array, jax.Array | None]:
        stack = stacked(DiTBlock, self.depth, REMAT_POLICIES[self.remat], nn.broadcast)
        hidden = int(self.width * self.mlp_ratio)
        blocks = stack(self.heads, hidden, DTYPES[self.dtype], self.attention, name="blocks")
        x, _, seen = run_stack(blocks, DiTBlock, x, c, policy=REMAT_POLICIES[self.remat], see=see, broadcast=True)
        return x, seen
