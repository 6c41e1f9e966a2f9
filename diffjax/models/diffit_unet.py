"""The image-space DiffiT: a U of convolutions and transformer blocks inside windows (arXiv 2312.02139).

    x1 = stage(conv(x)),  x2 = stage(down(x1)),  ...                                       encoder, to the lowest map
    x = stage([up(x), x_i]) for every map but the lowest, from low to high                 decoder
    out = conv(Swish(GN(x)))                                                               starts at zero

A stage is a row of residual blocks (eq. 9-10), whose transformer block, that of `diffit.py` with norms that have
parameters, has two residuals of its own:

    h = conv(Swish(GN(x)));  out = block(windows of h, c) + x

with a 1x1 convolution of the last x where the width changes. The one vector c of an example is a map of its time, which
here is that of EDM, ln(sigma) / 4 (arXiv 2206.00364), of its augmentation, and of its label if there are classes.

The paper gives the U, the widths, the windows, the width of c and the block; two of its pages contradict each other on
the number of blocks (table S.2: 4 at every resolution; appendix I.1: 1 or 2), whence the two sizes. What it leaves open
(heads of width 32, GroupNorm of 32 groups, strided convolutions down, nearest neighbours and a convolution up, skips of
the last map of a stage, joined once) are choices: no published code or count could tell.

Of the paper's ablations there are the windows (figure 8), the widths of c (table 3), where the time enters (tables 6
and 7, but for "in the bias alone", of which the paper says no more) and its features (table 8); not the mixtures with
other networks (TMSA in DDPM++, table 5; encoders and decoders of ViT and SETR, table 4).
"""

from typing import Annotated, Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax.ad_checkpoint import checkpoint_name

from diffjax import rng
from diffjax.errors import UserError
from diffjax.models import layers
from diffjax.models.diffit import BLOCK_AXES, DiffiTBlock, TimeIn
from diffjax.models.layers import (
    Attention,
    ImageBackbone,
    MlpRatio,
    Remat,
    TimeEmbed,
    check_counts,
    check_options,
    check_see,
    conv3,
    xavier,
    zeros,
)
from diffjax.ops import windows
from diffjax.ops.dtypes import DTYPES, Dtype
from diffjax.options import Leaf, Valid, at_least, fraction, one_of
from diffjax.parallel.rules import LogicalAxes, constrain

# Widths and blocks of the stages, window, dropout: table S.2 (all but `_l2`), appendix I.1 (`_l2`); EDM's dropout.
# Of CIFAR-10 the first width is open; that "only the first transition changes channels" says 128.
SIZES = {
    "CIFAR10": ((128, 256, 256), (4, 4, 4), 4, 0.13),
    "CIFAR10_l2": ((128, 256, 256), (2, 2, 2), 4, 0.13),
    "CIFAR10_w256": ((256, 256, 256), (4, 4, 4), 4, 0.13),
    "FFHQ64": ((128, 256, 256, 256), (4, 4, 4, 4), 8, 0.05),
    "FFHQ64_l2": ((128, 256, 256, 256), (1, 2, 2, 2), 8, 0.05),
}

# "dots" keeps the convolutions too, which are no matrix products to JAX.
REMAT_POLICIES = layers.REMAT_POLICIES | {
    "dots": jax.checkpoint_policies.save_from_both_policies(
        layers.REMAT_POLICIES["dots"], jax.checkpoint_policies.save_only_these_names("conv")
    )
}

PER_STAGE = Valid(lambda: "a positive integer per stage", lambda values: bool(values) and min(values) >= 1)

LOGICAL_AXES: LogicalAxes = (
    *((rf"block/{pattern}", axes) for pattern, axes in BLOCK_AXES),
    (r"image_embed/kernel", (None, None, None, "embed")),
    (r"augment_embed/kernel", (None, "embed")),
    (r"time_embed/fc\d/kernel", (None, "embed")),
    (r"label_embed/embedding", ("vocab", "embed")),
    (r"(conv|down_\d|up_\d)/kernel", (None, None, "embed", None)),
    (r"shortcut/kernel", ("embed", None)),
    (r"final/kernel", (None, None, "embed", "patch")),
    (r"(scale|bias)", (None,)),
)


def group_norm(groups: int, dtype: Any, name: str) -> nn.GroupNorm:
    """GroupNorm with epsilon 1e-6 and statistics in float32."""
    return nn.GroupNorm(groups, epsilon=1e-6, use_fast_variance=False, dtype=dtype, name=name)


def positional_time(t: jax.Array, d: int = 128) -> jax.Array:
    """[sin(t f), cos(t f)], f_i = 10000^(-i/(d/2 - 1)), as EDM feeds its DDPM++; t [b] -> float32 [b, d]."""
    frequencies = 10000.0 ** (-np.arange(d // 2) / (d // 2 - 1))
    angles = t.astype(jnp.float32)[:, None] * frequencies.astype(np.float32)
    return jnp.concatenate([jnp.sin(angles), jnp.cos(angles)], axis=-1)


def fourier_time(t: jax.Array, d: int = 128) -> jax.Array:
    """[sin(2 pi t f), cos(2 pi t f)] with normal frequencies f of deviation 16, the same ones in every model.

    As EDM feeds its NCSN++, with twice the width; t [b] -> float32 [b, d].
    """
    frequencies = 32 * np.pi * np.random.RandomState(0).standard_normal(d // 2)
    angles = t.astype(jnp.float32)[:, None] * frequencies.astype(np.float32)
    return jnp.concatenate([jnp.sin(angles), jnp.cos(angles)], axis=-1)


class ResBlock(nn.Module):
    """Convolution, then the transformer block inside windows, around them the residual; of a map.

    Attributes:
        features: channels of the result.
        window: largest side of the windows; a smaller map is one window.
        groups: of the GroupNorm.
        block: arguments of DiffiTBlock.
    """

    features: int
    window: int
    groups: int
    block: dict[str, Any]
    dtype: Any

    @nn.compact
    def __call__(self, x: jax.Array, c: jax.Array, keys: jax.Array | None = None) -> jax.Array:
        """x [b, h, w, a], c [b, d_t], keys [b] in training with dropout -> [b, h, w, features]."""
        height, width, channels = x.shape[1:]
        x = constrain(x, "batch", None, None, "embed")
        h = nn.silu(group_norm(self.groups, self.dtype, "norm")(x))
        h = checkpoint_name(conv3(self.features, self.dtype, "conv")(h), "conv")
        tokens = windows.partition(constrain(h, "batch", None, None, "embed"), min(self.window, height, width))
        tokens, _ = DiffiTBlock(**self.block, dtype=self.dtype, affine=True, name="block")(tokens, c, keys)
        if channels != self.features:
            x = nn.Dense(self.features, kernel_init=xavier, dtype=self.dtype, name="shortcut")(x)
        return constrain(x + windows.merge(tokens, height, width), "batch", None, None, "embed")


class DiffiTUNet(ImageBackbone, kw_only=True):
    """The image-space model; see the module docstring."""

    widths: Annotated[
        tuple[int, ...],
        Leaf("channels of the stages, from the largest map to the smallest", valid=PER_STAGE, fixed=True),
    ]
    depth: Annotated[tuple[int, ...], Leaf("blocks of the stages", valid=PER_STAGE, fixed=True)]
    window: Annotated[int, Leaf("largest side of the windows of attention", valid=at_least(1), fixed=True)]
    head_width: Annotated[
        int, Leaf("channels of an attention head; they divide every width", valid=at_least(1), fixed=True)
    ] = 32
    mlp_ratio: MlpRatio = 4.0
    time_width: Annotated[
        int, Leaf("channels of the vector of time, augmentation and label", valid=at_least(1), fixed=True)
    ] = 512
    groups: Annotated[
        int, Leaf("groups of every GroupNorm; they divide every width", valid=at_least(1), fixed=True)
    ] = 32
    channels: int = 3  # of the images
    num_classes: int = 0
    learn_sigma: bool = False
    augment_labels: Annotated[
        int,
        Leaf("numbers per example that describe its augmentation", valid=at_least(0, "no such input"), fixed=True),
    ] = 9
    dropout: Annotated[
        float,
        Leaf(
            "rate at which hidden values of the feed-forward networks are dropped in training",
            valid=fraction(),
            fixed=True,
        ),
    ] = 0.0
    time_in: TimeIn = "attention"
    time_features: Annotated[
        str,
        Leaf("features of the time (table 8 of the paper)", valid=one_of(("positional", "fourier")), fixed=True),
    ] = "positional"
    dtype: Dtype = "float32"
    remat: Remat = "dots"
    attention: Attention = "xla"

    logical_axes = LOGICAL_AXES

    @property
    def blocks_to_see(self) -> int:
        """How many values `see` can have: one per stage."""
        return 2 * len(self.widths) - 1

    def validate(self) -> None:
        """Raise UserError for options that exclude each other, before anything is traced."""
        check_options("DiffiT-UNet", self)
        check_counts("DiffiT-UNet", self, channels=1, num_classes=0)
        if len(self.depth) != len(self.widths):
            raise UserError(
                f"DiffiT-UNet: depth = {tuple(self.depth)}: valid: {PER_STAGE.words}, of which widths = "
                f"{tuple(self.widths)} has {len(self.widths)}"
            )
        for width in self.widths:
            for option in ("head_width", "groups"):
                if width % getattr(self, option):
                    raise UserError(
                        f"DiffiT-UNet: a width of {width} is not divisible by {option} = {getattr(self, option)}"
                    )

    def check_input(self, height: int, width: int) -> None:
        """Raise UserError unless the map of every stage can be cut into windows, or is one."""
        for stage in range(len(self.widths)):
            scale = 2**stage
            side = min(self.window, height // scale, width // scale)
            if side == 0 or height % (scale * side) or width % (scale * side):
                raise UserError(
                    f"image size {height} x {width}: its map at 1/{scale} cannot be cut into windows of side "
                    f"{self.window}; valid: for example {2 ** (len(self.widths) - 1) * self.window} and its multiples"
                )

    @nn.compact
    def __call__(
        self,
        x: jax.Array,
        t: jax.Array,
        y: jax.Array | None,
        train: bool = False,
        keys: jax.Array | None = None,
        augment: jax.Array | None = None,
        see: int | None = None,
    ) -> jax.Array | tuple[jax.Array, jax.Array]:
        """x [b, h, w, c], t [b] = ln(sigma) / 4, y [b] int32 or None -> float32 [b, h, w, c or 2c].

        With `train` and `dropout` the typed keys [b], one per example, say what is dropped. augment [b, augment_labels]
        says how each image was augmented; None: not at all, which is zeros. With `see` also the output of that stage,
        from encoder 0 down to the lowest and up to decoder 0: [b, h / s, w / s, d] in the compute dtype.
        """
        check_see("DiffiT-UNet", self, see)
        self.check_input(*x.shape[1:3])
        if train and self.dropout and keys is None:
            raise UserError("DiffiT: training with dropout above 0 needs keys, one per example")
        keys = rng.fold_name(keys, "dropout") if keys is not None and train and self.dropout else None
        dtype, c, maps = DTYPES[self.dtype], self._condition(t, y, augment), []
        lowest = len(self.widths) - 1
        x = conv3(self.widths[0], dtype, "image_embed")(x)
        for i in range(lowest):
            x = self._stage(f"encoder_{i}", i, x, c, keys)
            maps.append(x)
            x = conv3(self.widths[i], dtype, f"down_{i}", stride=2)(x)
        x = self._stage(f"encoder_{lowest}", lowest, x, c, keys)
        maps.append(x)
        for i in reversed(range(lowest)):
            x = conv3(self.widths[i + 1], dtype, f"up_{i}")(x.repeat(2, axis=1).repeat(2, axis=2))
            x = self._stage(f"decoder_{i}", i, jnp.concatenate([x, maps[i]], axis=-1), c, keys)
            maps.append(x)
        x = nn.silu(group_norm(self.groups, dtype, "norm")(x))
        x = conv3(self.out_channels, dtype, "final", init=zeros)(x).astype(jnp.float32)
        return x if see is None else (x, maps[see])

    def _condition(self, t: jax.Array, y: jax.Array | None, augment: jax.Array | None) -> jax.Array:
        """c, float32 [b, time_width], of time, augmentation and label."""
        features = {"positional": positional_time, "fourier": fourier_time}[self.time_features](t)
        if self.augment_labels:
            augment = jnp.zeros((len(t), self.augment_labels)) if augment is None else augment
            embed = nn.Dense(features.shape[-1], use_bias=False, kernel_init=xavier, name="augment_embed")
            features = features + embed(augment)
        elif augment is not None:
            raise UserError("this DiffiT has augment_labels = 0: it takes none")
        c = TimeEmbed(self.time_width, self.time_width, xavier, name="time_embed")(features)
        c = self.add_label(c, y)
        return constrain(c, "batch", "embed")

    def _stage(self, name: str, stage: int, x: jax.Array, c: jax.Array, keys: jax.Array | None) -> jax.Array:
        """The blocks of a stage. They are no loop in the compiled program: in one the gradient of a convolution takes a
        CPU forty times as long."""
        width = self.widths[stage]
        block = {
            "heads": width // self.head_width,
            "hidden": int(width * self.mlp_ratio),
            "attention": self.attention,
            "time_in": self.time_in,
            "dropout": self.dropout,
        }
        module: Any = ResBlock
        if self.remat != "none":
            module = nn.remat(ResBlock, policy=REMAT_POLICIES[self.remat])
        keys = None if keys is None else rng.fold_name(keys, name)
        for j in range(self.depth[stage]):
            resblock = module(width, self.window, self.groups, block, DTYPES[self.dtype], name=f"{name}_{j}")
            x = resblock(x, c, None if keys is None else rng.fold(keys, j))
        return x
