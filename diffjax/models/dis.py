"""DiS: a state-space model on image patches, every block scanning the tokens in both directions (arXiv 2402.05608).

    r = [label(y), time(t), patches(x)] + positions,  h = 0          (no label token in an unconditional model)
    r = r + droppath(h),  h = Mixer(Norm(r))                         (per block: add, norm, mixer)
    h = Norm(r + droppath(h)),  out = Linear(LN(h) (1 + scale) + shift)

The first half of the blocks keeps its h; the last half takes them back in reverse order, h = Linear[h, kept], before
the addition. r accumulates untouched, in float32. Shift and scale are linear maps of SiLU(time + label), in a
conditional model only. The mixer is Mamba's (arXiv 2312.00752) in both directions, which share the projections in
and out and the gate (arXiv 2401.09417, "v2"):

    x, z = Linear(n);  c = silu(conv(x));  delta, B, C = Linear(c);  h_t = exp(delta A) h_(t-1) + delta B c
    out  = Linear(sum over directions of (C h + D c) silu(z))

The published depth is not the number of blocks: there are depth // 2 blocks on either side of a middle one.
"""

import math
from typing import Annotated, Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax.ad_checkpoint import checkpoint_name

from diffjax import rng
from diffjax.errors import UserError
from diffjax.models import layers
from diffjax.models.layers import (
    FinalLayer,
    ImageBackbone,
    Patch,
    Remat,
    TimeEmbed,
    Width,
    check_counts,
    check_options,
    check_see,
    layer_norm,
    patchify,
    run_stack,
    sinusoidal_time,
    stacked,
    uniform,
    unpatchify,
    zeros,
)
from diffjax.ops.dtypes import DTYPES, Dtype
from diffjax.ops.selective_scan import IMPLEMENTATIONS, selective_scan
from diffjax.options import Leaf, at_least, fraction, one_of
from diffjax.parallel.rules import LogicalAxes, constrain

# Depth and width of the published sizes; S is no multiple of 64.
SIZES = {"S": (24, 368), "B": (24, 768), "M": (48, 768), "L": (48, 1024), "H": (48, 1536)}

LOGICAL_AXES: LogicalAxes = (
    (r"positions", (None, None, "embed")),
    (r"patch_embed/kernel", ("patch", "embed")),
    (r"time_embed/fc\d/kernel", (None, "embed")),
    (r"label_embed/embedding", ("vocab", "embed")),
    (r"mixer/in_proj", (None, "embed", "channels")),
    (r"mixer/out_proj/kernel", ("channels", "embed")),
    (r"x_proj/kernel", ("channels", None)),
    (r"dt_proj/kernel", (None, "channels")),
    (r"conv_kernel", (None, "channels")),
    (r"A_log", ("channels", None)),
    (r"(conv_bias|dt_bias|D)", ("channels",)),
    (r"skip/kernel", (None, "embed")),
    (r"final/modulation/kernel", ("embed", None)),
    (r"final/linear/kernel", ("embed", "patch")),
    (r"(scale|bias)", (None,)),
)

# "dots" keeps what is costly, products and scans; convolutions, step sizes and elementwise functions come anew.
KEPT = ("skip", "in_proj", "x_proj", "mixed", "selective_scan")
REMAT_POLICIES = layers.REMAT_POLICIES | {"dots": jax.checkpoint_policies.save_only_these_names(*KEPT)}


def fan_in(gain: float = 1.0) -> nn.initializers.Initializer:
    """U(-b, b) with b = gain / sqrt(second to last axis): with gain 1 the default of the reference's framework."""
    return lambda key, shape, dtype=jnp.float32: uniform(gain / math.sqrt(shape[-2]))(key, shape, dtype)


def step_bias(key: jax.Array, shape: tuple[int, ...], dtype: Any = jnp.float32) -> jax.Array:
    """softplus^-1 of step sizes that are log-uniform in 0.001 .. 0.1 (Mamba, section 3.6)."""
    low, high = math.log(0.001), math.log(0.1)
    step = jnp.exp(jax.random.uniform(key, shape, dtype, low, high))
    return step + jnp.log(-jnp.expm1(-step))


def state_decay(key: jax.Array, shape: tuple[int, int], dtype: Any = jnp.float32) -> jax.Array:
    """log(1), ..., log(n) in every row: A = -(1, ..., n), the real S4D initialisation."""
    return jnp.broadcast_to(jnp.log(jnp.arange(1, shape[1] + 1, dtype=dtype)), shape)


def dense(features: int, dtype: Any, name: str, bias: bool = False, init: Any = fan_in()) -> nn.Dense:  # noqa: B008
    return nn.Dense(features, use_bias=bias, kernel_init=init, dtype=dtype, name=name)


class Norm(nn.Module):
    """RMSNorm or, for "layer", LayerNorm with bias; epsilon 1e-5, computed in float32, result in `dtype`."""

    kind: str
    dtype: Any

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        scale = self.param("scale", nn.initializers.ones, x.shape[-1:])
        if self.kind == "layer":
            bias = self.param("bias", zeros, x.shape[-1:])
            return (layer_norm(x.astype(jnp.float32), 1e-5) * scale + bias).astype(self.dtype)
        x = x.astype(jnp.float32)
        mean_square = jnp.mean(jnp.square(x), axis=-1, keepdims=True)
        return (x * jax.lax.rsqrt(mean_square + 1e-5) * scale).astype(self.dtype)


def depthwise_conv(x: jax.Array, kernel: jax.Array, bias: jax.Array, reverse: bool) -> jax.Array:
    """Causal depthwise convolution, summed in float32: x [b, n, e], kernel [w, e], bias [e] -> float32 [b, n, e].

    y_t = bias + sum_k kernel_k x_(t - (w - 1) + k), or with `reverse` the mirror image, x_(t + (w - 1) - k); zeros
    outside. Shifted products fuse with what stands around them; a convolution of one channel per group does not.
    """
    taps, length = kernel.shape[0], x.shape[1]
    padded = jnp.pad(x, ((0, 0), (0, taps - 1) if reverse else (taps - 1, 0), (0, 0))).astype(jnp.float32)
    starts = range(taps - 1, -1, -1) if reverse else range(taps)
    return bias + sum(kernel[k] * padded[:, start : start + length] for k, start in enumerate(starts))


class Direction(nn.Module):
    """One direction of the mixer, with its own convolution, step sizes and state: x, z [b, n, e] -> [b, n, e]."""

    d_state: int
    d_conv: int
    rank: int
    dtype: Any
    scan: str | None
    reverse: bool

    @nn.compact
    def __call__(self, x: jax.Array, z: jax.Array) -> jax.Array:
        e = x.shape[-1]
        kernel = self.param("conv_kernel", fan_in(), (self.d_conv, e))
        bias = self.param("conv_bias", uniform(1 / math.sqrt(self.d_conv)), (e,))
        # The reference zeroes the bias of the backward direction, which so starts with steps of softplus(0) = 0.69.
        dt_bias = self.param("dt_bias", zeros if self.reverse else step_bias, (e,))
        A = -jnp.exp(self.param("A_log", state_decay, (e, self.d_state)))
        D = self.param("D", nn.initializers.ones, (e,))

        c = nn.silu(depthwise_conv(x, kernel, bias, self.reverse)).astype(self.dtype)
        c = constrain(c, "batch", "length", "channels")
        parts = checkpoint_name(dense(self.rank + 2 * self.d_state, self.dtype, "x_proj")(c), "x_proj")
        steps, B, C = jnp.split(parts, [self.rank, self.rank + self.d_state], axis=-1)
        delta = dense(e, self.dtype, "dt_proj")(steps)
        delta = constrain(delta, "batch", "length", "channels")
        return selective_scan(c, delta, A, B, C, D, z, dt_bias, reverse=self.reverse, implementation=self.scan)


class Mixer(nn.Module):
    """Mamba in both directions, summed; [b, n, d] -> [b, n, d]. `depth` scales the initial projection out."""

    depth: int
    d_state: int
    d_conv: int
    expand: int
    dtype: Any
    scan: str | None

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        d = x.shape[-1]
        e = self.expand * d
        # The two halves on an axis of their own, so that splitting channels over devices splits each of them.
        kernel = self.param("in_proj", fan_in(), (2, d, e)).astype(self.dtype)
        x, z = (checkpoint_name(constrain(x @ half, "batch", "length", "channels"), "in_proj") for half in kernel)
        sizes = (self.d_state, self.d_conv, math.ceil(d / 16), self.dtype, self.scan)
        mixed = Direction(*sizes, reverse=False, name="forward")(x, z)
        mixed = mixed + Direction(*sizes, reverse=True, name="backward")(x, z)
        mixed = checkpoint_name(constrain(mixed, "batch", "length", "channels"), "mixed")
        out = dense(d, self.dtype, "out_proj", init=fan_in(1 / math.sqrt(self.depth)))(mixed)
        return constrain(out, "batch", "length", "embed")


def add(r: jax.Array, h: jax.Array, kept: jax.Array | None) -> jax.Array:
    """r + droppath(h) in float32; kept [b] is 0 where an example drops h, else 1 / (1 - rate); None keeps all."""
    h = h.astype(jnp.float32)
    return r + (h if kept is None else h * kept[:, None, None])


def stream(carry: tuple[jax.Array, jax.Array]) -> jax.Array:
    """The output of the block that returned carry = (h, r): r + h, float32 [b, n, d]."""
    h, r = carry
    return add(r, h, None)


class DiSBlock(nn.Module):
    norm: str
    mixer: dict[str, Any]
    dtype: Any

    @nn.compact
    def __call__(self, carry: Any, kept: jax.Array | None, skip: jax.Array | None) -> tuple[Any, jax.Array]:
        """carry = (h [b, n, d], r [b, n, d] float32), a skip [b, n, d] if it takes one -> (carry, h)."""
        h, r = carry
        if skip is not None:
            both = jnp.concatenate([h, skip], axis=-1)
            h = checkpoint_name(dense(h.shape[-1], self.dtype, "skip", bias=True)(both), "skip")
        r = constrain(add(r, h, kept), "batch", "length", "embed")
        h = Mixer(**self.mixer, dtype=self.dtype, name="mixer")(Norm(self.norm, self.dtype, name="norm")(r))
        return (h, r), h


class DiS(ImageBackbone):
    """The backbone; see the module docstring. It is made for one image size, that of its table of positions."""

    patch: Patch
    depth: Annotated[
        int, Leaf("published depth; the number of blocks is 2 (depth // 2) + 1", valid=at_least(1), fixed=True)
    ]
    width: Width
    d_state: Annotated[int, Leaf("states of a channel", valid=at_least(1), fixed=True)] = 16
    d_conv: Annotated[int, Leaf("taps of the depthwise convolution", valid=at_least(1), fixed=True)] = 4
    expand: Annotated[int, Leaf("channels of the mixer per channel of a token", valid=at_least(1), fixed=True)] = 2
    skip: Annotated[
        str,
        Leaf(
            "how the last half of the blocks takes the outputs of the first: concatenated and mapped (concat), or not",
            valid=one_of(("concat", "none")),
            fixed=True,
        ),
    ] = "concat"
    norm: Annotated[str, Leaf("norm before each mixer and at the end", valid=one_of(("rms", "layer")), fixed=True)] = (
        "rms"
    )
    time_mlp: Annotated[
        bool, Leaf("two linear layers on the sinusoidal features of the time; without, these are the token", fixed=True)
    ] = True
    drop_path: Annotated[
        float,
        Leaf(
            "largest rate at which an example drops a block's input to the residual stream, in training",
            valid=fraction(),
            fixed=True,
        ),
    ] = 0.1
    dtype: Dtype = "float32"
    remat: Remat = "dots"
    scan: Annotated[
        str | None,
        Leaf(
            "implementation of the selective scan; none: chosen by the backend",
            "compute",
            one_of((*IMPLEMENTATIONS, "")),
        ),
    ] = None

    logical_axes = LOGICAL_AXES

    @property
    def blocks_to_see(self) -> int:
        """How many values `see` can have: one per block."""
        return 2 * (self.depth // 2) + 1

    def validate(self) -> None:
        """Raise UserError for options that exclude each other, before anything is traced."""
        check_options("DiS", self)
        check_counts("DiS", self, channels=1, num_classes=0)

    def check_input(self, height: int, width: int) -> None:
        """Raise UserError unless an image of this size is square and can be cut into patches."""
        if height != width:
            raise UserError(f"image size {height} x {width}: DiS takes square images only")
        if height % self.patch:
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
        """x [b, h, h, c], t [b] in 0..999, y [b] int32 or None -> float32 [b, h, h, c or 2c].

        With `train` and a positive `drop_path` the typed keys [b], one per example, say what each example drops. With
        `see` also the output of that block, 0 the first and `depth // 2` the middle one: r + h, the residual stream
        with all that the block adds to it, float32 [b, n, d], the tokens of label and time first.
        """
        check_see("DiS", self, see)
        dtype = DTYPES[self.dtype]
        self.check_input(*x.shape[1:3])
        side = x.shape[1] // self.patch
        tokens, c = self._tokens(x, t, y)
        kept = self._kept(keys) if train and self.drop_path else None
        (h, r), seen = self._all_blocks(tokens, kept, see)
        h = Norm(self.norm, dtype, name="norm")(add(r, h, None if kept is None else kept[-1]))
        final = FinalLayer(self.patch**2 * self.out_channels, dtype, fan_in(), name="final")
        h = final(h, constrain(nn.silu(c), "batch", "embed") if self.num_classes else None)
        out = unpatchify(h[:, -(side**2) :], self.patch, side, side).astype(jnp.float32)
        return out if seen is None else (out, seen)

    def _tokens(self, x: jax.Array, t: jax.Array, y: jax.Array | None) -> tuple[jax.Array, jax.Array]:
        """Label, time and patches with positions, and time + label: float32 [b, n, d] and [b, d]."""
        d, dtype = self.width, DTYPES[self.dtype]
        bias = uniform(1 / math.sqrt(self.patch**2 * self.channels))
        embed = nn.Dense(d, kernel_init=fan_in(), bias_init=bias, dtype=dtype, name="patch_embed")
        patches = embed(patchify(x, self.patch)).astype(jnp.float32)
        c = sinusoidal_time(t, d)
        if self.time_mlp:
            c = TimeEmbed(d, 4 * d, fan_in(), name="time_embed")(c)
        tokens = [c[:, None], patches]
        label = self.label(y, d)
        if label is not None:
            tokens, c = [label[:, None], *tokens], c + label
        x = jnp.concatenate(tokens, axis=1)
        return x + self._positions(x.shape[1]), c

    def _positions(self, length: int) -> jax.Array:
        """The learned table [1, n, d], of the image size that the model was initialised with."""
        if self.has_variable("params", "positions"):
            made: int = self.get_variable("params", "positions").shape[1]
            if made != length:
                raise UserError(f"this DiS has positions for {self._images(made)}, not for {self._images(length)}")
        return self.param("positions", zeros, (1, length, self.width))

    def _images(self, length: int) -> str:
        side = self.patch * math.isqrt(length - 1 - bool(self.num_classes))
        return f"images of {side} x {side} ({length} tokens)"

    def _kept(self, keys: jax.Array | None) -> jax.Array:
        """The factors of `add`, float32 [blocks + 1, b]: one row per block, and one for the addition at the end.

        Row j is drawn from (key of the example, "drop_path", j). The rates are 0, then 0 .. drop_path in `depth` equal
        steps over the blocks, then drop_path.
        """
        if keys is None:
            raise UserError("DiS: training with drop_path above 0 needs keys, one per example")
        blocks = 2 * (self.depth // 2) + 1
        rates = np.concatenate([[0.0], np.linspace(0.0, self.drop_path, self.depth)])[:blocks]
        rates = np.append(rates, self.drop_path).astype(np.float32)
        keys = rng.fold_name(keys, "drop_path")
        draws = jax.vmap(lambda j: rng.uniform(rng.fold(keys, j)))(jnp.arange(len(rates)))
        return jnp.where(draws < rates[:, None], 0.0, 1 / (1 - rates[:, None]))

    def _all_blocks(
        self, tokens: jax.Array, kept: jax.Array | None, see: int | None = None
    ) -> tuple[tuple[jax.Array, jax.Array], jax.Array | None]:
        """(h, r) after the last block, and the output of block `see`. The blocks of either side are one scanned module,
        compiled once."""
        half = self.depth // 2
        before, middle, after = (None,) * 3 if kept is None else (kept[:half], kept[half], kept[half + 1 : -1])
        # Starting with r = tokens and h = 0 the first block adds like the others, and r begins in float32.
        carry: Any = jnp.zeros_like(tokens, DTYPES[self.dtype]), tokens
        skips: Any = None
        seen = None
        if half:
            see_before = see if see is not None and see < half else None
            carry, skips, seen = self._side("in_blocks", carry, before, None, see_before)
        carry, _ = self._block()(*self._block_fields(), name="mid_block")(carry, middle, None)
        if see == half:
            seen = stream(carry)
        if half:
            skips = skips[::-1] if self.skip == "concat" else None
            see_after = see - half - 1 if see is not None and see > half else None
            carry, _, seen_after = self._side("out_blocks", carry, after, skips, see_after)
            seen = seen if seen_after is None else seen_after
        return carry, seen

    def _side(
        self, name: str, carry: Any, kept: jax.Array | None, skips: Any, see: int | None
    ) -> tuple[Any, jax.Array, jax.Array | None]:
        """depth // 2 blocks as one scanned module, parameters [depth // 2, ...]: (carry, every block's h, output of
        block `see` of these)."""
        stack = stacked(DiSBlock, self.depth // 2, REMAT_POLICIES[self.remat])(*self._block_fields(), name=name)
        policy = REMAT_POLICIES[self.remat]
        return run_stack(stack, DiSBlock, carry, kept, skips, policy=policy, see=see, output=stream)

    def _block(self) -> Any:
        return DiSBlock if self.remat == "none" else nn.remat(DiSBlock, policy=REMAT_POLICIES[self.remat])

    def _block_fields(self) -> tuple[str, dict[str, Any], Any]:
        sizes = {name: getattr(self, name) for name in ("depth", "d_state", "d_conv", "expand")}
        return self.norm, sizes | {"scan": self.scan or None}, DTYPES[self.dtype]
