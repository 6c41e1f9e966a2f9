"""Layers that the backbones share: embeddings, positions, modulation, attention and feed-forward blocks.

Parameters are float32; `dtype` is the compute dtype. Norm statistics, softmax and the time embedding stay float32.
"""

import dataclasses
import functools
import math
from collections.abc import Callable
from typing import Annotated, Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from einops import rearrange

from diffjax.errors import UserError
from diffjax.ops.attention import IMPLEMENTATIONS, attention
from diffjax.options import Leaf, above, at_least, check, one_of, options
from diffjax.parallel.rules import constrain

# What the blocks of a model keep for the backward pass; None is everything. A family with costly operations that JAX
# does not know as products has a table of its own. "dots" recomputes attention weights and elementwise functions and
# keeps a third of the memory of "none", which on a CPU is also the fastest.
REMAT_POLICIES: dict[str, Any] = {
    "none": None,
    "full": jax.checkpoint_policies.nothing_saveable,
    "dots": jax.checkpoint_policies.dots_with_no_batch_dims_saveable,
}

# Options that several backbones have.
Patch = Annotated[int, Leaf("side of a patch in pixels or latent pixels", valid=at_least(1), fixed=True)]
Depth = Annotated[int, Leaf("number of blocks", valid=at_least(1), fixed=True)]
Width = Annotated[int, Leaf("channels of a token", valid=at_least(1), fixed=True)]
Heads = Annotated[int, Leaf("attention heads; they divide the width", valid=at_least(1), fixed=True)]
MlpRatio = Annotated[
    float, Leaf("hidden channels of the feed-forward networks per channel of a token", valid=above(0), fixed=True)
]
Remat = Annotated[
    str,
    Leaf(
        "what a block keeps for its backward pass: everything (none), its large products (dots) or its input (full)",
        "compute",
        one_of(REMAT_POLICIES),
    ),
]
Attention = Annotated[str, Leaf("implementation of attention", "compute", one_of(IMPLEMENTATIONS))]

xavier = nn.initializers.xavier_uniform()
normal = nn.initializers.normal
zeros = nn.initializers.zeros_init()


def uniform(bound: float) -> nn.initializers.Initializer:
    """U(-bound, bound)."""
    return lambda key, shape, dtype=jnp.float32: jax.random.uniform(key, shape, dtype, -bound, bound)


def stacked(block: Any, depth: int, policy: Any, in_axes: Any = 0) -> Any:
    """`depth` blocks as one scanned module, compiled once: parameters [depth, ...].

    block: its call maps a carry and inputs to (carry, output). policy: what is kept for the backward pass, an entry of
    the family's REMAT_POLICIES; None keeps everything. in_axes: of the inputs other than the carry, `nn.broadcast` for
    what is the same for all blocks.
    """
    if policy is not None:
        block = nn.remat(block, policy=policy, prevent_cse=False)
    return nn.scan(
        block,
        variable_axes={"params": 0, "intermediates": 0},
        split_rngs={"params": True},
        in_axes=in_axes,
        length=depth,
    )


def run_stack(
    stack: nn.Module,
    block: Any,
    carry: Any,
    *inputs: Any,
    policy: Any,
    see: int | None,
    broadcast: bool = False,
    output: Callable[[Any], jax.Array] = lambda carry: carry,
) -> tuple[Any, Any, jax.Array | None]:
    """Run a scanned stack and see the output of one block: (carry, stacked outputs, seen).

    With `see` None this calls `stack`, and seen is None. Else the scan runs over the same parameters with one buffer
    more, which the step of block `see` overwrites. The buffer lies outside the rematerialised block, so that neither
    the outputs nor the residuals of the scan grow by [depth, ...]; intermediates of the blocks are not collected.

    stack: of `stacked(block, depth, policy, ...)`, bound. block: its class. inputs: other than the carry; shared by all
    blocks if `broadcast`, else [depth, ...]. output: the block's output out of the carry that it returns.
    """
    if see is None:
        return *stack(carry, *inputs), None
    if stack.is_initializing():
        stack(carry, *inputs)  # creates the parameters
    names = [f.name for f in dataclasses.fields(block) if f.name not in ("parent", "name")]
    single = block(**{name: getattr(stack, name) for name in names}, parent=None)

    def call(params: Any, carry: Any, *inputs: Any) -> Any:
        return single.apply({"params": params}, carry, *inputs)

    if policy is not None:
        call = jax.checkpoint(call, policy=policy, prevent_cse=False)

    def step(state: Any, layer: Any) -> Any:
        (carry, seen), (index, params, scanned) = state, layer
        carry, stacked_output = call(params, carry, *(inputs if broadcast else scanned))
        return (carry, jnp.where(index == see, output(carry), seen)), stacked_output

    params = stack.variables["params"]
    indices = jnp.arange(len(jax.tree.leaves(params)[0]))
    start = carry, jnp.zeros_like(output(carry))
    (carry, seen), outputs = jax.lax.scan(step, start, (indices, params, () if broadcast else inputs))
    return carry, outputs, seen


def check_see(model: str, module: Any, see: int | None) -> None:
    """Raise UserError unless `see` is None or the index of a block, of which there are `module.blocks_to_see`."""
    if see is not None and not (isinstance(see, int) and 0 <= see < module.blocks_to_see):
        raise UserError(f"{model}: see = {see!r}: valid: 0 to {module.blocks_to_see - 1}, or None")


def check_options(model: str, module: nn.Module) -> None:
    """Raise UserError, in the name of `model`, unless the value of every option of `module` is valid."""
    for name, option in options(type(module)).items():
        check(f"{model}: {name}", option, getattr(module, name))


def check_heads(model: str, width: int, heads: int) -> None:
    """Raise UserError unless the heads divide the width."""
    if width % heads:
        raise UserError(f"{model}: width = {width} is not divisible by heads = {heads}")


def check_counts(model: str, module: nn.Module, **least: int) -> None:
    """Raise UserError unless these fields, which are no options, are integers of at least 1 or 0, as given."""
    for name, low in least.items():
        value = getattr(module, name)
        if not isinstance(value, int) or value < low:
            valid = "a positive integer" if low else "0 (none) or a positive integer"
            raise UserError(f"{model}: {name} = {value!r}; valid: {valid}")


def check_sincos(model: str, width: int) -> None:
    """Raise UserError unless `sincos_positions` exist for a width."""
    if width % 4:
        raise UserError(f"{model}: width = {width} is not divisible by 4, as its sine-cosine positions need")


def sincos_positions(height: int, width: int, d: int) -> np.ndarray:
    """Fixed 2-D position table of MAE and DiT, float32 [height * width, d], row-major tokens.

    Channels [0, d/2) encode the column and [d/2, d) the row; each half is d/4 sines, then d/4 cosines.
    """
    frequencies = 10000.0 ** (-np.arange(d // 4, dtype=np.float64) / (d // 4))
    rows, columns = np.meshgrid(np.arange(height), np.arange(width), indexing="ij")
    angles = [np.outer(position.ravel(), frequencies) for position in (columns, rows)]
    return np.concatenate([f(a) for a in angles for f in (np.sin, np.cos)], axis=1).astype(np.float32)


def sinusoidal_time(t: jax.Array, d: int = 256) -> jax.Array:
    """[cos(t f), sin(t f)], f_k = 10000^(-k/(d//2)); t [b] -> float32 [b, d] (DDPM, arXiv 2006.11239).

    For odd d the last is zero.
    The exponent is rounded to float32 before exp, as in the references: t reaches 1000, so that rounding is visible.
    """
    half = d // 2
    exponent = np.float32(-math.log(10000.0)) * np.arange(half, dtype=np.float32) / np.float32(half)
    angles = t.astype(jnp.float32)[:, None] * jnp.exp(exponent)
    return jnp.pad(jnp.concatenate([jnp.cos(angles), jnp.sin(angles)], axis=-1), ((0, 0), (0, d % 2)))


def patchify(x: jax.Array, patch: int) -> jax.Array:
    """[b, h * patch, w * patch, c] -> [b, h * w, patch * patch * c]."""
    return rearrange(x, "b (h ph) (w pw) c -> b (h w) (ph pw c)", ph=patch, pw=patch)


def unpatchify(x: jax.Array, patch: int, height: int, width: int) -> jax.Array:
    """[b, h * w, patch * patch * c] -> [b, h * patch, w * patch, c]; `height` and `width` count tokens."""
    return rearrange(x, "b (h w) (ph pw c) -> b (h ph) (w pw) c", h=height, w=width, ph=patch, pw=patch)


def layer_norm(x: jax.Array, epsilon: float = 1e-6) -> jax.Array:
    """LayerNorm over the last axis without affine parameters; statistics in float32, result in the dtype of x."""
    x32 = x.astype(jnp.float32)
    centred = x32 - jnp.mean(x32, axis=-1, keepdims=True)
    variance = jnp.mean(jnp.square(centred), axis=-1, keepdims=True)
    return (centred * jax.lax.rsqrt(variance + epsilon)).astype(x.dtype)


def norm(dtype: Any, name: str | None = None, *, epsilon: float, affine: bool = True) -> nn.LayerNorm:
    """LayerNorm with statistics in float32, by default with scale and bias."""
    return nn.LayerNorm(epsilon, use_scale=affine, use_bias=affine, use_fast_variance=False, dtype=dtype, name=name)


def conv3(features: int, dtype: Any, name: str, *, stride: int = 1, bias: bool = True, init: Any = xavier) -> nn.Conv:
    """3x3 with one zero around the map, also where the stride is 2."""
    return nn.Conv(features, (3, 3), stride, padding=1, use_bias=bias, kernel_init=init, dtype=dtype, name=name)


def modulate(x: jax.Array, shift: jax.Array, scale: jax.Array) -> jax.Array:
    """x (1 + scale) + shift, with one shift and scale [b, d] per example for x [b, ..., d]."""
    return x * (1 + per_example(scale, x)) + per_example(shift, x)


def per_example(value: jax.Array, like: jax.Array) -> jax.Array:
    """value [b, d ...] as [b, 1, ..., d ...], ready to multiply `like` [b, ..., d ...]."""
    return jnp.expand_dims(value, tuple(range(1, 1 + like.ndim - value.ndim)))


def drop(x: jax.Array, rate: float, keys: jax.Array) -> jax.Array:
    """x [b, ...] with its values zeroed with probability `rate`, else divided by 1 - rate; one key [b] per example."""
    kept = jax.vmap(lambda key: jax.random.bernoulli(key, 1 - rate, x.shape[1:]))(keys)
    return jnp.where(kept, x / (1 - rate), 0)


class TimeEmbed(nn.Module):
    """Linear -> SiLU -> Linear on the features of `sinusoidal_time`; [b, w] -> float32 [b, width]."""

    width: int
    hidden: int
    kernel_init: nn.initializers.Initializer = normal(0.02)

    @nn.compact
    def __call__(self, features: jax.Array) -> jax.Array:
        # Products in full float32, also where the default is less.
        dense = functools.partial(nn.Dense, kernel_init=self.kernel_init, precision=jax.lax.Precision.HIGHEST)
        return dense(self.width, name="fc2")(nn.silu(dense(self.hidden, name="fc1")(features)))


class LabelEmbed(nn.Module):
    """A row per class, and one more for the null class when there is one; y [b] int32 -> float32 [b, width]."""

    rows: int
    width: int

    @nn.compact
    def __call__(self, y: jax.Array) -> jax.Array:
        table = self.param("embedding", normal(0.02), (self.rows, self.width))
        # Whole on every device for the look-up, as FSDP gathers any weight: rows of a split table would be exchanged.
        return jnp.take(constrain(table, None, None), y, axis=0)


class SelfAttention(nn.Module):
    """Multi-head self-attention with a fused projection; [b, n, d] -> [b, n, d].

    The projection's outputs are ordered (heads, qkv, k), so that splitting heads over devices splits the kernel.
    """

    heads: int
    dtype: Any
    implementation: str = "xla"

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        d = x.shape[-1]
        features = (self.heads, 3, d // self.heads)
        qkv = nn.DenseGeneral(features, kernel_init=xavier, dtype=self.dtype, name="qkv")(x)
        qkv = constrain(qkv, "batch", "length", "heads")
        x = attention(qkv[..., 0, :], qkv[..., 1, :], qkv[..., 2, :], implementation=self.implementation)
        return nn.DenseGeneral(d, axis=(-2, -1), kernel_init=xavier, dtype=self.dtype, name="out")(x)


class Mlp(nn.Module):
    """Linear -> GELU (tanh form) -> dropout -> Linear; x [b, ..., n, d] -> the same.

    With `time` a linear map of c [b, d_t] is added before the GELU. Keys [b], one per example, draw what `dropout`
    drops; without keys nothing is.
    """

    hidden: int
    dtype: Any
    time: bool = False
    dropout: float = 0.0

    @nn.compact
    def __call__(self, x: jax.Array, c: jax.Array | None = None, keys: jax.Array | None = None) -> jax.Array:
        hidden = nn.Dense(self.hidden, kernel_init=xavier, dtype=self.dtype, name="fc1")(x)
        hidden = constrain(hidden, "batch", *(None,) * (x.ndim - 2), "mlp")
        if self.time:
            time = nn.Dense(self.hidden, kernel_init=xavier, dtype=self.dtype, name="fc1_time")(c)
            hidden = hidden + per_example(constrain(time, "batch", "mlp"), hidden)
        hidden = nn.gelu(hidden, approximate=True)
        if keys is not None and self.dropout:
            hidden = drop(hidden, self.dropout, keys)
        return nn.Dense(x.shape[-1], kernel_init=xavier, dtype=self.dtype, name="fc2")(hidden)


class FinalLayer(nn.Module):
    """LayerNorm, shift and scale linear in c [b, d_t] if there is one, Linear (3x3 `conv` of a map); of [b, ..., d]."""

    features: int
    dtype: Any
    kernel_init: nn.initializers.Initializer = zeros
    conv: bool = False

    @nn.compact
    def __call__(self, x: jax.Array, c: jax.Array | None) -> jax.Array:
        if c is None:
            x = layer_norm(x)
        else:
            modulation = nn.Dense(2 * x.shape[-1], kernel_init=self.kernel_init, dtype=self.dtype, name="modulation")
            parameters = modulation(c)
            x = modulate(layer_norm(x), *jnp.split(parameters, 2, axis=-1))
        if self.conv:
            return conv3(self.features, self.dtype, "conv", init=self.kernel_init)(x)
        return nn.Dense(self.features, kernel_init=self.kernel_init, dtype=self.dtype, name="linear")(x)


class ImageBackbone(nn.Module, kw_only=True):
    """Fields of image backbones that follow from the data and the method."""

    channels: int = 4  # of the input; the output has twice as many with `learn_sigma`
    num_classes: int = 1000  # 0: an unconditional model
    null_class: bool = True  # one more label, index `num_classes`, for classifier-free guidance
    learn_sigma: bool = True

    @property
    def out_channels(self) -> int:
        return self.channels * (1 + self.learn_sigma)

    def label(self, y: jax.Array | None, width: int, name: str = "label_embed") -> jax.Array | None:
        """The rows of labels y [b], float32 [b, width]; None in an unconditional model, which does not look at y."""
        if not self.num_classes:
            return None
        if y is None:
            raise UserError(f"this {type(self).__name__} has {self.num_classes} classes: it needs labels y, not None")
        return LabelEmbed(self.num_classes + self.null_class, width, name=name)(y)

    def add_label(self, c: jax.Array, y: jax.Array | None, name: str = "label_embed") -> jax.Array:
        """c [b, width] with the rows of labels y [b] added, if there are any."""
        label = self.label(y, c.shape[-1], name)
        return c if label is None else c + label
