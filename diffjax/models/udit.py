"""U-DiT: a U-shaped DiT whose self-attention runs on down-sampled tokens (arXiv 2405.02730).

    e1 = stage(conv(x), c1);  e2 = stage(shrink(e1), c2);  m = stage(shrink(e2), c3)
    d2 = stage(Linear[grow(m), e2], c2);  d1 = stage(Linear[grow(d2), e1], c2)
    out = conv(LN(conv(d1)) (1 + scale) + shift),   c_i = time_i(t) + label_i(y)

on maps of width D, 2D, 4D, 2D and 2D; shrink halves the grid, grow doubles it. Every block of a stage is two layers

    x = x + gate_a Attention(LN(x) (1 + scale_a) + shift_a)
    x = x + gate_m Mlp(LN(x) (1 + scale_m) + shift_m)

whose shifts, scales and gates are linear in SiLU(c) and start at zero. The attention looks at s x s interleaved
sub-images, each on its own, after a depthwise convolution y = x + conv(x) at full resolution:

    softmax(exp(min(l, 4.6052)) q k / (|q| |k|)) v,   q and k rotated by 2-D positions (RoPE2D)

The feed-forward network is trained in a re-parameterised form with G hidden channels,

    z = GELU(W1 (W0 x)),   u = z + conv5(z) + conv3(z) + conv1(z),   out = V1 (V0 u)          ("rep")

and deployed as GELU(W x), one 5 x 5 convolution and one linear map: exactly `fuse`, which the published sizes count.
"""

import math
from collections.abc import Mapping
from typing import Annotated, Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from einops import rearrange

from diffjax import rng
from diffjax.errors import UserError
from diffjax.models.layers import (
    REMAT_POLICIES,
    FinalLayer,
    ImageBackbone,
    Mlp,
    MlpRatio,
    Remat,
    TimeEmbed,
    check_counts,
    check_heads,
    check_options,
    check_see,
    conv3,
    layer_norm,
    modulate,
    per_example,
    sinusoidal_time,
    stacked,
    xavier,
    zeros,
)
from diffjax.ops.attention import attention
from diffjax.ops.depthwise import IMPLEMENTATIONS, add_kernels, depthwise_conv
from diffjax.ops.dtypes import DTYPES, Dtype
from diffjax.ops.rotary import rope_angles, rotate
from diffjax.options import Leaf, Valid, at_least, one_of
from diffjax.parallel.rules import LogicalAxes, constrain

# Width, heads and blocks per stage. T is in the published code alone: no row of the paper has its cost.
SIZES = {
    "T": (48, 2, (2, 3, 4, 3, 2)),
    "S": (96, 4, (2, 5, 8, 5, 2)),
    "B": (192, 8, (2, 5, 8, 5, 2)),
    "L": (384, 16, (2, 5, 8, 5, 2)),
}

STAGES = ("encoder_1", "encoder_2", "latent", "decoder_2", "decoder_1")
WIDTHS = (1, 2, 4, 2, 2)  # of the stages, in multiples of `width`
SCALES = (1, 2, 4, 2, 1)  # how much smaller than the input their maps are

FIVE = Valid(
    lambda: "five positive integers, one per stage", lambda values: len(values) == len(STAGES) and min(values) >= 1
)
ONE_OR_FIVE = Valid(
    lambda: "a positive integer, or five positive integers, one per stage",
    lambda value: value >= 1 if isinstance(value, int) else FIVE.test(value),
)
ODD_OR_0 = Valid(
    lambda: "an odd number, or 0 for no convolution", lambda side: side == 0 or (side > 0 and side % 2 == 1)
)

LOGICAL_AXES: LogicalAxes = (
    (r"image_embed/kernel", (None, None, None, "embed")),
    (r"time_embed_\d/fc\d/kernel", (None, "embed")),
    (r"label_embed_\d/embedding", ("vocab", "embed")),
    (r"modulation/kernel", ("embed", None)),
    (r"attention/logit_scale", ("heads",)),
    (r"downsample/kernel", (None, None, None, "embed")),
    (r"attention/qkv/kernel", ("embed", "heads", None, "kv")),
    (r"attention/qkv/bias", ("heads", None, "kv")),
    (r"attention/out/kernel", ("heads", "kv", "embed")),
    (r"mlp/(in_0|out_1)/kernel", ("embed", None)),
    (r"mlp/(in|in_1|fc1)/kernel", ("embed", "mlp")),
    (r"mlp/(in|in_1|fc1)/bias", ("mlp",)),
    (r"mlp/kernel_\d", (None, None, None, "channels")),
    (r"mlp/bias_\d", ("channels",)),
    (r"mlp/(out|out_0|fc2)/kernel", ("mlp", "embed")),
    (r"(shrink|grow)_\d/conv/kernel", (None, None, "embed", None)),
    (r"reduce_\d/kernel", ("embed", None)),
    (r"output/kernel", (None, None, "embed", None)),
    (r"final/conv/kernel", (None, None, "embed", "patch")),
    (r"bias", (None,)),
)


def xavier_as_matrix(key: jax.Array, shape: tuple[int, ...], dtype: Any = jnp.float32) -> jax.Array:
    """Xavier-uniform values for a convolution kernel seen as the matrix [height * width * in, out]."""
    return xavier(key, (math.prod(shape[:-1]), shape[-1]), dtype).reshape(shape)


def dense(features: int, dtype: Any, name: str, init: Any = xavier) -> nn.Dense:
    return nn.Dense(features, kernel_init=init, dtype=dtype, name=name)


class Shrink(nn.Module):
    """conv 3x3 to half the channels, then 2 x 2 pixels as channels; [b, h, w, d] -> [b, h / 2, w / 2, 2 d]."""

    dtype: Any

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        x = conv3(x.shape[-1] // 2, self.dtype, "conv", bias=False)(x)
        return rearrange(x, "b (h y) (w x) c -> b h w (c y x)", y=2, x=2)


class Grow(nn.Module):
    """conv 3x3 to twice the channels, then four channels as 2 x 2 pixels; [b, h, w, d] -> [b, 2 h, 2 w, d / 2]."""

    dtype: Any

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        x = conv3(2 * x.shape[-1], self.dtype, "conv", bias=False)(x)
        return rearrange(x, "b h w (y x c) -> b (h y) (w x) c", y=2, x=2)


class Downsample(nn.Module):
    """The interleaved sub-images of x + depthwise conv(x); [b, h, w, d] -> [b, s * s, h / s * w / s, d].

    Sub-image y * s + x holds the pixels (i s + y, j s + x), so that nothing is lost.
    """

    factor: int
    kernel: int
    shortcut: bool
    depthwise: str | None
    dtype: Any

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        d = x.shape[-1]
        if self.kernel:
            kernel = constrain(
                self.param("kernel", xavier, (self.kernel, self.kernel, 1, d)), None, None, None, "embed"
            )
            bias = self.param("bias", zeros, (d,)).astype(self.dtype)
            x = depthwise_conv(x, [kernel], shortcut=self.shortcut, implementation=self.depthwise) + bias
        return rearrange(x, "b (h y) (w x) d -> b (y x) (h w) d", y=self.factor, x=self.factor)


def normalize(x: jax.Array) -> jax.Array:
    """x / max(|x|, 1e-12) over the last axis, with a gradient of zero rather than NaN at zero."""
    return x * jax.lax.rsqrt(jnp.maximum(jnp.sum(jnp.square(x), axis=-1, keepdims=True), 1e-24))


class SubImageAttention(nn.Module):
    """Multi-head self-attention inside each of the interleaved sub-images; [b, h, w, d] -> the same.

    The sub-images are taken before the projection. On a TPU v5e (compiler's estimate, bfloat16, [32, 32, 32, 96], 4
    heads; forward / with gradients) that needed 0.69 / 2.7 million cycles; taken from the projected q, k and v 1.5 /
    5.6; as batch axes of the products, nothing moved, 12 / 38.
    """

    heads: int
    factor: int
    kernel: int
    shortcut: bool
    kind: str
    positions: str
    rope_rows: str
    logit_clamp: float
    depthwise: str | None
    dtype: Any

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        (_, height, width, d), s = x.shape, self.factor
        x = Downsample(s, self.kernel, self.shortcut, self.depthwise, self.dtype, name="downsample")(x)
        x = rearrange(x, "b p n d -> (b p) n d")
        features = (self.heads, 3, d // self.heads)
        qkv = nn.DenseGeneral(features, kernel_init=xavier, dtype=self.dtype, name="qkv")(x)
        qkv = constrain(qkv, "batch", "length", "heads")
        q, k = self._compared(qkv[..., 0, :], qkv[..., 1, :], height // s, width // s)
        x = attention(q, k, qkv[..., 2, :], scale=1.0 if self.kind == "cosine" else None)
        x = nn.DenseGeneral(d, axis=(-2, -1), kernel_init=xavier, dtype=self.dtype, name="out")(x)
        return rearrange(x, "(b y x) (h w) d -> b (h y) (w x) d", y=s, x=s, h=height // s)

    def _compared(self, q: jax.Array, k: jax.Array, height: int, width: int) -> tuple[jax.Array, jax.Array]:
        """Queries and keys [b, n, heads, k] with positions and, for cosine attention, norm and scale: in float32."""
        q, k = q.astype(jnp.float32), k.astype(jnp.float32)
        if self.positions == "rope":
            angles = rope_angles(height, width, q.shape[-1], self.rope_rows)
            q, k = rotate(q, angles), rotate(k, angles)
        if self.kind == "cosine":
            scale = self.param("logit_scale", nn.initializers.constant(math.log(10.0)), (self.heads,))
            q, k = normalize(q) * jnp.exp(jnp.minimum(scale, self.logit_clamp))[:, None], normalize(k)
        return q.astype(self.dtype), k.astype(self.dtype)


class ConvMlp(nn.Module):
    """1x1 -> GELU (erf) -> depthwise 5x5 -> 1x1; [b, h, w, d] -> the same. `rep`: the form that is trained."""

    hidden: int
    rep: bool
    depthwise: str | None
    dtype: Any

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        d, g = x.shape[-1], self.hidden
        if self.rep:
            # constrained between two linear maps too: else small batches are gathered in place of their weights
            x = constrain(dense(g // 2, self.dtype, "in_0")(x), "batch", None, None, "embed")
        x = dense(g, self.dtype, "in_1" if self.rep else "in")(x)
        x = nn.gelu(constrain(x, "batch", None, None, "mlp"), approximate=False)
        sizes = (5, 3, 1) if self.rep else (5,)
        kernels = [self.param(f"kernel_{size}", xavier, (size, size, 1, g)) for size in sizes]
        # constrained, since kernels split over the batch's axes would gather the batch in place of themselves
        kernels = [constrain(kernel, None, None, None, "mlp") for kernel in kernels]
        bias = sum(self.param(f"bias_{size}", zeros, (g,)) for size in sizes)
        x = depthwise_conv(x, kernels, shortcut=self.rep, implementation=self.depthwise)
        x = constrain(x + jnp.asarray(bias, self.dtype), "batch", None, None, "mlp")
        if self.rep:
            x = constrain(dense(g // 2, self.dtype, "out_0")(x), "batch", None, None, "embed")
        return dense(d, self.dtype, "out_1" if self.rep else "out")(x)


class UDiTLayer(nn.Module):
    """Half a block: one attention and one feed-forward network."""

    attention: dict[str, Any]
    ffn: str
    hidden: int
    dtype: Any

    @nn.compact
    def __call__(self, x: jax.Array, c: jax.Array) -> tuple[jax.Array, None]:
        """x [b, h, w, d], c = SiLU(conditioning) [b, d] -> (x, None), the carry of `nn.scan`."""
        x = constrain(x, "batch", None, None, "embed")
        parameters = dense(6 * x.shape[-1], self.dtype, "modulation", init=zeros)(c)
        shift_a, scale_a, gate_a, shift_m, scale_m, gate_m = jnp.split(parameters, 6, axis=-1)
        attend = SubImageAttention(**self.attention, dtype=self.dtype, name="attention")
        x = x + per_example(gate_a, x) * attend(modulate(layer_norm(x), shift_a, scale_a))
        x = constrain(x, "batch", None, None, "embed")
        x = x + per_example(gate_m, x) * self._mlp(modulate(layer_norm(x), shift_m, scale_m))
        return constrain(x, "batch", None, None, "embed"), None

    def _mlp(self, x: jax.Array) -> jax.Array:
        if self.ffn == "basic":
            return Mlp(self.hidden, self.dtype, name="mlp")(rearrange(x, "b h w d -> b (h w) d")).reshape(x.shape)
        depthwise = self.attention["depthwise"]
        return ConvMlp(self.hidden, self.ffn == "rep", depthwise, self.dtype, name="mlp")(x)


class UDiT(ImageBackbone):
    """The backbone; see the module docstring."""

    width: Annotated[int, Leaf("channels of the first stage", valid=at_least(1), fixed=True)]
    heads: Annotated[int, Leaf("attention heads of every stage; they divide the width", valid=at_least(1), fixed=True)]
    depth: Annotated[
        tuple[int, ...],
        Leaf("blocks of the stages encoder 1, encoder 2, latent, decoder 2, decoder 1", valid=FIVE, fixed=True),
    ]
    mlp_ratio: MlpRatio = 2.0
    similarity: Annotated[
        str,
        Leaf(
            "cosine: normalised queries and keys, a learned scale per head; dot: q k / sqrt(k)",
            valid=one_of(("cosine", "dot")),
            fixed=True,
        ),
    ] = "cosine"
    positions: Annotated[str, Leaf("2-D rotary positions, or none", valid=one_of(("rope", "none")), fixed=True)] = (
        "rope"
    )
    rope_rows: Annotated[
        str,
        Leaf(
            "row length that positions are computed with: sqrt of the tokens, as published, or the map's width",
            valid=one_of(("sqrt", "width")),
            fixed=True,
        ),
    ] = "sqrt"
    logit_clamp: Annotated[
        float, Leaf("largest logarithm of the learned scale; the published 4.6052 is about log 100", fixed=True)
    ] = 4.6052
    down_factor: Annotated[
        int | tuple[int, ...],
        Leaf("attention runs in s x s interleaved sub-images; 1: plain self-attention", valid=ONE_OR_FIVE, fixed=True),
    ] = 2
    down_kernel: Annotated[
        int, Leaf("side of the depthwise convolution before the sub-images are taken", valid=ODD_OR_0, fixed=True)
    ] = 5
    down_shortcut: Annotated[bool, Leaf("add the input of that convolution to its output", fixed=True)] = True
    ffn: Annotated[
        str,
        Leaf(
            "feed-forward network: the trained form (rep), the fused form (single), DiT's without convolution (basic)",
            valid=one_of(("rep", "single", "basic")),
            fixed=True,
        ),
    ] = "rep"
    # As published: so all three levels drop the label in one of a thousand cases only.
    label_drop_per_level: Annotated[
        bool, Leaf("each level's label table draws on its own whether to drop the label, in training", fixed=True)
    ] = True
    label_drop: float = 0.1  # with `label_drop_per_level`: the probability, for labels that the batch has undropped
    dtype: Dtype = "float32"
    remat: Remat = "dots"
    depthwise: Annotated[
        str | None,
        Leaf(
            "implementation of depthwise convolutions; none: chosen by the backend",
            "compute",
            one_of((*IMPLEMENTATIONS, "")),
        ),
    ] = None

    logical_axes = LOGICAL_AXES

    @property
    def factors(self) -> tuple[int, ...]:
        """The down-sampling factor of each stage."""
        return (self.down_factor,) * 5 if isinstance(self.down_factor, int) else tuple(self.down_factor)

    @property
    def blocks_to_see(self) -> int:
        """How many values `see` can have: one per stage."""
        return len(STAGES)

    def validate(self) -> None:
        """Raise UserError for options that exclude each other, before anything is traced."""
        check_options("U-DiT", self)
        check_counts("U-DiT", self, channels=1, num_classes=0)
        if not 0 <= self.label_drop < 1:
            raise UserError(f"U-DiT: label_drop = {self.label_drop}; valid: 0 to below 1")
        self._validate_width()

    def _validate_width(self) -> None:
        if self.width % 2:
            raise UserError(f"U-DiT: width = {self.width} is not even, as halving the channels needs")
        check_heads("U-DiT", self.width, self.heads)
        if self.positions == "rope" and self.width // self.heads % 4:
            raise UserError(
                f"U-DiT: width / heads = {self.width} / {self.heads} = {self.width // self.heads} is not divisible "
                "by 4, as positions = 'rope' need"
            )
        if self.ffn == "rep" and any(self._hidden(stage) % 2 for stage in range(5)):
            raise UserError(f"U-DiT: width = {self.width} times mlp_ratio = {self.mlp_ratio} is not even, as ffn needs")

    def check_input(self, height: int, width: int) -> None:
        """Raise UserError unless the maps of every stage can be cut into their sub-images."""
        unit = math.lcm(4, *(scale * factor for scale, factor in zip(SCALES, self.factors)))
        if height % unit or width % unit:
            raise UserError(
                f"image size {height} x {width} is not divisible by {unit}, as two halvings and "
                f"down_factor = {self.down_factor} need"
            )

    def fused(self) -> "UDiT":
        """The model of `fuse(params)` for parameters of this one."""
        return self.clone(ffn="single") if self.ffn == "rep" else self

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

        With `train` and `label_drop_per_level` the typed keys [b], one per example, say which levels drop its label.
        With `see` also the output of that stage of `STAGES`: [b, h / s, w / s, d] in the compute dtype.
        """
        check_see("U-DiT", self, see)
        dtype = DTYPES[self.dtype]
        self.check_input(*x.shape[1:3])
        c1, c2, c3 = self._conditions(t, y, train, keys)
        x = conv3(self.width, dtype, "image_embed", init=xavier_as_matrix)(x)
        e1 = self._stage(0, x, c1)
        e2 = self._stage(1, Shrink(dtype, name="shrink_1")(e1), c2)
        m = self._stage(2, Shrink(dtype, name="shrink_2")(e2), c3)
        x = jnp.concatenate([Grow(dtype, name="grow_2")(m), e2], axis=-1)
        d2 = self._stage(3, dense(2 * self.width, dtype, "reduce_2")(x), c2)
        x = jnp.concatenate([Grow(dtype, name="grow_1")(d2), e1], axis=-1)
        d1 = self._stage(4, dense(2 * self.width, dtype, "reduce_1")(x), c2)
        x = conv3(2 * self.width, dtype, "output")(constrain(d1, "batch", None, None, "embed"))
        out = FinalLayer(self.out_channels, dtype, conv=True, name="final")(x, c2).astype(jnp.float32)
        return out if see is None else (out, (e1, e2, m, d2, d1)[see])

    def _conditions(self, t: jax.Array, y: jax.Array | None, train: bool, keys: jax.Array | None) -> list[jax.Array]:
        """SiLU(time + label) of the three levels, float32 [b, D], [b, 2 D] and [b, 4 D]."""
        features = sinusoidal_time(t)
        conditions = []
        for level in (1, 2, 3):
            width = self.width * 2 ** (level - 1)
            c = TimeEmbed(width, width, name=f"time_embed_{level}")(features)
            seen = self._drop(y, level, keys) if train and y is not None and self.num_classes else y
            c = self.add_label(c, seen, f"label_embed_{level}")
            conditions.append(constrain(nn.silu(c), "batch", "embed"))
        return conditions

    def _drop(self, y: jax.Array, level: int, keys: jax.Array | None) -> jax.Array:
        """The labels that a level sees in training: drawn from (key of the example, "label_drop", level)."""
        if not (self.label_drop_per_level and self.label_drop and self.null_class):
            return y
        if keys is None:
            raise UserError("U-DiT: training with label_drop_per_level needs keys, one per example")
        draws = rng.uniform(rng.fold(rng.fold_name(keys, "label_drop"), level))
        return jnp.where(draws < self.label_drop, self.num_classes, y)

    def _hidden(self, stage: int) -> int:
        return int(WIDTHS[stage] * self.width * self.mlp_ratio)

    def _stage(self, stage: int, x: jax.Array, c: jax.Array) -> jax.Array:
        """The blocks of a stage as one scanned module: parameters [2 depth, ...], compiled once."""
        stack = stacked(UDiTLayer, 2 * self.depth[stage], REMAT_POLICIES[self.remat], nn.broadcast)
        options = {
            "heads": self.heads,
            "factor": self.factors[stage],
            "kernel": self.down_kernel,
            "shortcut": self.down_shortcut,
            "kind": self.similarity,
            "positions": self.positions,
            "rope_rows": self.rope_rows,
            "logit_clamp": self.logit_clamp,
            "depthwise": self.depthwise or None,
        }
        x, _ = stack(options, self.ffn, self._hidden(stage), DTYPES[self.dtype], name=STAGES[stage])(x, c)
        return x


def fuse(params: Mapping[str, Any]) -> dict[str, Any]:
    """The same function with fewer parameters: those of `UDiT.fused` for those of a model with ffn "rep".

    W = W1 W0, b = W1 b0 + b1, and K = K5 + K3 + K1 + 1 at the centre, each kernel in the middle of the largest: exact
    but for rounding. The arguments, which may be stacked, are not changed; parameters of other models come back as
    they are, so that fusing twice is fusing once.
    """
    if "in_0" in params:
        return _fuse_mlp(params)
    return {name: fuse(value) if isinstance(value, Mapping) else value for name, value in params.items()}


def _fuse_mlp(mlp: Mapping[str, Any]) -> dict[str, Any]:
    kernels = [jnp.asarray(mlp[f"kernel_{size}"]) for size in (5, 3, 1)]
    return {
        "in": _fuse_linear(mlp["in_0"], mlp["in_1"]),
        "kernel_5": add_kernels([*kernels, jnp.ones_like(kernels[-1])]),
        "bias_5": mlp["bias_5"] + mlp["bias_3"] + mlp["bias_1"],
        "out": _fuse_linear(mlp["out_0"], mlp["out_1"]),
    }


def _fuse_linear(first: Mapping[str, Any], second: Mapping[str, Any]) -> dict[str, jax.Array]:
    with jax.default_matmul_precision("highest"):
        kernel = jnp.einsum("...io,...oe->...ie", first["kernel"], second["kernel"])
        bias = jnp.einsum("...o,...oe->...e", first["bias"], second["kernel"]) + second["bias"]
    return {"kernel": kernel, "bias": bias}
