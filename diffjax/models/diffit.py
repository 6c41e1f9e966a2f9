"""DiffiT: a vision transformer whose attention depends on time (arXiv 2312.02139). This is its latent model.

    x = patches(x) + positions,  c = time(t) + label(y)
    x = x + TMSA(LN(x), c);  x = x + Mlp(LN(x))                                            (per block, eq. 7-8)
    out = Linear(SiLU(LN(x)))

TMSA, time-dependent multi-head self-attention (eq. 3-6), adds a linear map of the one vector c of an example to the
queries, keys and values of all its tokens, and to the logits a learned bias B of the offset between two tokens:

    q = x Wq + c Wqt,  k = x Wk + c Wkt,  v = x Wv + c Wvt,   softmax(q k^T / sqrt(k) + B) v

There is no modulation of norms and no gate: c enters nowhere else, and nothing but the last linear map starts at zero.
What c adds to the keys changes no output, as it adds the same to all logits of a query; the published weights have it.
"""

import math
from typing import Annotated, Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from diffjax.errors import UserError
from diffjax.models.layers import (
    REMAT_POLICIES,
    Attention,
    Depth,
    Heads,
    ImageBackbone,
    Mlp,
    MlpRatio,
    Patch,
    Remat,
    TimeEmbed,
    Width,
    check_counts,
    check_heads,
    check_options,
    check_see,
    check_sincos,
    norm,
    normal,
    patchify,
    per_example,
    run_stack,
    sincos_positions,
    sinusoidal_time,
    stacked,
    unpatchify,
    xavier,
    zeros,
)
from diffjax.ops import windows
from diffjax.ops.attention import attention
from diffjax.ops.dtypes import DTYPES, Dtype
from diffjax.options import Leaf, at_least, one_of
from diffjax.parallel.rules import LogicalAxes, constrain

# Depth, width, heads. The paper writes depth 30, which agrees with neither its 561 M parameters nor the release: 28.
SIZES = {"XL": (28, 1152, 16)}

# Tables 6 and 7 of the paper. "values" is what a separate attention to the time token gives.
TimeIn = Annotated[
    str,
    Leaf(
        "where the time enters: queries, keys and values (attention), values alone, or the feed-forward networks (mlp)",
        valid=one_of(("attention", "values", "mlp")),
        fixed=True,
    ),
]

BLOCK_AXES: LogicalAxes = (
    (r"attention/qkv(_time)?/kernel", ("embed", "heads", None, "kv")),
    (r"attention/qkv(_time)?/bias", ("heads", None, "kv")),
    (r"attention/v_time/kernel", ("embed", "heads", "kv")),
    (r"attention/v_time/bias", ("heads", "kv")),
    (r"attention/relative_bias", (None, "heads")),
    (r"attention/out/kernel", ("heads", "kv", "embed")),
    (r"mlp/fc1(_time)?/kernel", ("embed", "mlp")),
    (r"mlp/fc1(_time)?/bias", ("mlp",)),
    (r"mlp/fc2/kernel", ("mlp", "embed")),
)
LOGICAL_AXES: LogicalAxes = (
    *BLOCK_AXES,
    (r"patch_embed/kernel", ("patch", "embed")),
    (r"time_embed/fc\d/kernel", (None, "embed")),
    (r"label_embed/embedding", ("vocab", "embed")),
    (r"final/kernel", ("embed", "patch")),
    (r"bias", (None,)),
)


class TMSA(nn.Module):
    """Attention inside windows of tokens, with the time: x [b, ..., n, d], c [b, d_t] -> [b, ..., n, d].

    The n tokens are those of a square window, row by row; the axes between b and n number the windows, which exchange
    nothing. The projections' outputs are ordered (heads, qkv, k), so that splitting heads over devices splits the
    kernels. The time is projected once per example, and the bias gathered once for all.

    Attributes:
        time_in: "attention", as above; "values" = added to the values alone, which is what a separate attention to the
            one time token would give; "mlp" = not here.
    """

    heads: int
    dtype: Any
    implementation: str = "xla"
    time_in: str = "attention"

    @nn.compact
    def __call__(self, x: jax.Array, c: jax.Array) -> jax.Array:
        n, d = x.shape[-2:]
        features = (self.heads, 3, d // self.heads)
        qkv = constrain(self._linear(features, "qkv")(x), "batch", *(None,) * (x.ndim - 2), "heads")
        if self.time_in == "attention":
            time = self._linear(features, "qkv_time")(c)
            qkv = qkv + per_example(constrain(time, "batch", "heads"), qkv)
        q, k, v = (qkv[..., i, :] for i in range(3))
        if self.time_in == "values":
            time = self._linear(v.shape[-2:], "v_time")(c)
            v = v + per_example(constrain(time, "batch", "heads"), v)
        q, k, v = (part.reshape(-1, n, *part.shape[-2:]) for part in (q, k, v))
        attended = attention(q, k, v, bias=self._bias(n), implementation=self.implementation)
        return self._linear(d, "out", axis=(-2, -1))(attended.reshape(*x.shape[:-1], *v.shape[-2:]))

    def _linear(self, features: Any, name: str, axis: Any = -1) -> nn.DenseGeneral:
        return nn.DenseGeneral(features, axis=axis, kernel_init=xavier, dtype=self.dtype, name=name)

    def _bias(self, n: int) -> jax.Array:
        """B of the n tokens of a window, float32 [heads, n, n], out of the table of this module."""
        side = math.isqrt(n)
        if side**2 != n:
            raise UserError(f"DiffiT: {n} tokens are no square window, which the bias of relative positions needs")
        rows = (2 * side - 1) ** 2
        if self.has_variable("params", "relative_bias"):
            made: int = self.get_variable("params", "relative_bias").shape[0]
            if made != rows:
                made_side = (math.isqrt(made) + 1) // 2
                raise UserError(
                    f"this DiffiT has a bias for windows of {made_side} x {made_side} tokens, not of {side} x {side}"
                )
        # The reference cuts the normal values at two, a hundred standard deviations: never.
        table = self.param("relative_bias", normal(0.02), (rows, self.heads))
        return constrain(windows.relative_bias(table, side), "heads")


class DiffiTBlock(nn.Module):
    """The transformer block, of the latent and of the image-space model; norms with parameters if `affine`."""

    heads: int
    hidden: int
    dtype: Any
    attention: str
    time_in: str = "attention"
    affine: bool = False
    dropout: float = 0.0

    @nn.compact
    def __call__(self, x: jax.Array, c: jax.Array, keys: jax.Array | None = None) -> tuple[jax.Array, None]:
        """x [b, ..., n, d], c [b, d_t], keys [b] in training with dropout -> (x, None), the carry of `nn.scan`."""
        x = constrain(x, "batch", *(None,) * (x.ndim - 2), "embed")
        attend = TMSA(self.heads, self.dtype, self.attention, self.time_in, name="attention")
        x = x + attend(norm(self.dtype, "norm_1", epsilon=1e-6, affine=self.affine)(x), c)
        x = constrain(x, "batch", *(None,) * (x.ndim - 2), "embed")
        mlp = Mlp(self.hidden, self.dtype, self.time_in == "mlp", self.dropout, name="mlp")
        x = x + mlp(norm(self.dtype, "norm_2", epsilon=1e-6, affine=self.affine)(x), c, keys)
        return constrain(x, "batch", *(None,) * (x.ndim - 2), "embed"), None


class DiffiT(ImageBackbone):
    """The latent model; see the module docstring. It is made for one image size, `patch * window`."""

    patch: Patch
    depth: Depth
    width: Width
    heads: Heads
    window: Annotated[
        int,
        Leaf("tokens along a side of the image, all of which attend to each other", valid=at_least(1), fixed=True),
    ]
    mlp_ratio: MlpRatio = 4.0
    time_in: TimeIn = "attention"
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
        check_options("DiffiT", self)
        check_counts("DiffiT", self, channels=1, num_classes=0)
        check_heads("DiffiT", self.width, self.heads)
        check_sincos("DiffiT", self.width)

    def check_input(self, height: int, width: int) -> None:
        """Raise UserError unless an image of this size is what the tables of B are made for."""
        side = self.patch * self.window
        if (height, width) != (side, side):
            raise UserError(
                f"image size {height} x {width}: this DiffiT takes {side} x {side}, its patch = {self.patch} times "
                f"its window = {self.window}"
            )

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
        """x [b, h, h, c], t [b] in 0..999, y [b] int32 or None -> float32 [b, h, h, c or 2c].

        `train` and `keys` change nothing here: there is no dropout but that of labels, which happens before. With `see`
        also the output of that block, 0 the first: [b, n, d] in the compute dtype.
        """
        del train, keys
        check_see("DiffiT", self, see)
        dtype, side = DTYPES[self.dtype], self.window
        self.check_input(*x.shape[1:3])
        x = nn.Dense(self.width, kernel_init=xavier, dtype=dtype, name="patch_embed")(patchify(x, self.patch))
        x = x + sincos_positions(side, side, self.width).astype(dtype)
        c = TimeEmbed(self.width, self.width, name="time_embed")(sinusoidal_time(t))
        c = self.add_label(c, y)
        x, seen = self._blocks(x, constrain(c, "batch", "embed"), see)
        x = nn.silu(norm(dtype, epsilon=1e-6, affine=False)(x))
        x = nn.Dense(self.patch**2 * self.out_channels, kernel_init=zeros, dtype=dtype, name="final")(x)
        out = unpatchify(x, self.patch, side, side).astype(jnp.float32)
        return out if seen is None else (out, seen)

    def _blocks(self, x: jax.Array, c: jax.Array, see: int | None) -> tuple[jax.Array, jax.Array | None]:
        stack = stacked(DiffiTBlock, self.depth, REMAT_POLICIES[self.remat], nn.broadcast)
        hidden = int(self.width * self.mlp_ratio)
        blocks = stack(self.heads, hidden, DTYPES[self.dtype], self.attention, self.time_in, name="blocks")
        x, _, seen = run_stack(blocks, DiffiTBlock, x, c, policy=REMAT_POLICIES[self.remat], see=see, broadcast=True)
        return x, seen
