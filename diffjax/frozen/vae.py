"""The autoencoder of latent diffusion (arXiv 2112.10752, section 3.1), as `AutoencoderKL` of the public checkpoints.

    mean, log-variance = encoder(image);  z = mean + exp(log-variance / 2) eps;  latent = (z - shift) scale
    image = decoder(latent / scale + shift)

Both halves are residual blocks at several resolutions with one head of self-attention in the middle, and images lie in
[-1, 1] on either side. `scale` and `shift` belong to the latents of the diffusion model: `encode` and `decode` work
with z, which `from_latent` makes of a latent.
"""

from typing import Annotated, Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from einops import rearrange

from diffjax.errors import UserError
from diffjax.frozen.layers import GroupNorm, check_sizes, conv, enlarged, norm_silu_conv
from diffjax.frozen.strips import Inside, Layer, in_strips
from diffjax.ops.attention import attention
from diffjax.ops.dtypes import DTYPES, Dtype
from diffjax.options import Leaf, Valid, at_least
from diffjax.parallel.rules import LogicalAxes, constrain

LOWEST, HIGHEST = -30.0, 20.0  # what the log-variance is cut to
COUNT = at_least(1)
EACH = Valid(lambda: "a positive integer per level", lambda widths: bool(widths) and min(widths) >= 1)

LOGICAL_AXES: LogicalAxes = (
    (r"attention/(query|key|value|out)/kernel", ("embed", None)),
    (r"(decoder/conv_in|quant_conv)/kernel", (None, None, None, "embed")),
    (r"encoder/conv_in/kernel", (None, None, None, "embed")),
    (r"kernel", (None, None, "embed", None)),
    (r"(scale|bias)", (None,)),
)


class ResBlock(nn.Module):
    """out = x + conv(silu(GN(conv(silu(GN(x)))))), with W x where the channels change; [b, h, w, c] -> features."""

    features: int
    groups: int
    dtype: Any

    @nn.compact
    def __call__(self, x: jax.Array, strips: int = 1) -> jax.Array:
        x = constrain(x, "batch")
        first, second = (conv(self.features, 3, True, self.dtype, name) for name in ("conv1", "conv2"))
        shortcuts = [conv(self.features, 1, True, self.dtype, "shortcut")] if x.shape[-1] != self.features else []
        h = norm_silu_conv(x, GroupNorm(self.groups, self.dtype, name="norm1"), first, strips)
        normal = GroupNorm(self.groups, self.dtype, name="norm2")(h)

        def rest(inside: Inside, second: Layer, *given: Any) -> jax.Array:
            *shortcut, x, h = given
            return (shortcut[0](x) if shortcut else x) + second(inside(nn.silu(normal(h))))

        return in_strips(rest, strips, 1, (second, *shortcuts), x, h)


class Attention(nn.Module):
    """x + W softmax(q k^T / sqrt(c)) v over all positions of a map, one head; [b, h, w, c] -> the same.

    The scores of one strip of queries with all keys exist at a time.
    """

    groups: int
    dtype: Any

    @nn.compact
    def __call__(self, x: jax.Array, strips: int = 1) -> jax.Array:
        features = x.shape[-1]
        normal = GroupNorm(self.groups, self.dtype, name="norm")(x)
        query, key, value, out = (
            nn.Dense(features, dtype=self.dtype, name=name) for name in ("query", "key", "value", "out")
        )
        keys, values = (rearrange(each(normal(x)), "b h w c -> b (h w) 1 c") for each in (key, value))

        def attend(inside: Inside, query: Layer, out: Layer, x: jax.Array) -> jax.Array:
            queries = rearrange(query(normal(x)), "b h w c -> b (h w) 1 c")
            found = rearrange(attention(queries, keys, values), "b (h w) 1 c -> b h w c", h=x.shape[1])
            return x + out(found)

        return in_strips(attend, strips, 0, (query, out), x)


class Middle(nn.Module):
    """Block, attention, block at the smallest map."""

    groups: int
    attention: bool
    dtype: Any

    @nn.compact
    def __call__(self, x: jax.Array, strips: int = 1) -> jax.Array:
        x = ResBlock(x.shape[-1], self.groups, self.dtype, name="block_1")(x, strips)
        if self.attention:
            x = Attention(self.groups, self.dtype, name="attention")(x, strips)
        return ResBlock(x.shape[-1], self.groups, self.dtype, name="block_2")(x, strips)


class Encoder(nn.Module):
    """Images [b, h, w, c] -> [b, h/f, w/f, features]; widths are those of the levels, from the largest map down."""

    widths: tuple[int, ...]
    depth: int
    features: int
    groups: int
    attention: bool
    dtype: Any

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        x = conv(self.widths[0], 3, True, self.dtype, "conv_in")(x)
        for level, width in enumerate(self.widths):
            for block in range(self.depth):
                x = ResBlock(width, self.groups, self.dtype, name=f"level_{level}_block_{block}")(x)
            if level < len(self.widths) - 1:
                # One row and column of zeros at the right and the bottom alone.
                down = nn.Conv(width, (3, 3), 2, ((0, 1), (0, 1)), dtype=self.dtype, name=f"level_{level}_down")
                x = down(x)
        x = Middle(self.groups, self.attention, self.dtype, name="middle")(x)
        out = conv(self.features, 3, True, self.dtype, "conv_out")
        return norm_silu_conv(x, GroupNorm(self.groups, self.dtype, name="norm_out"), out)


class Decoder(nn.Module):
    """The way back: [b, h/f, w/f, c] -> images [b, h, w, channels]; one block more at each level than the encoder."""

    widths: tuple[int, ...]
    depth: int
    channels: int
    groups: int
    attention: bool
    dtype: Any

    @nn.compact
    def __call__(self, x: jax.Array, strips: int = 1) -> jax.Array:
        x = conv(self.widths[-1], 3, True, self.dtype, "conv_in")(x)
        x = Middle(self.groups, self.attention, self.dtype, name="middle")(x, strips)
        for level in reversed(range(len(self.widths))):
            width = self.widths[level]
            for block in range(self.depth + 1):
                x = ResBlock(width, self.groups, self.dtype, name=f"level_{level}_block_{block}")(x, strips)
            if level:
                x = enlarged(x, conv(width, 3, True, self.dtype, f"level_{level}_up"), strips)
        out = conv(self.channels, 3, True, self.dtype, "conv_out")
        return norm_silu_conv(x, GroupNorm(self.groups, self.dtype, name="norm_out"), out, strips)


class VAE(nn.Module):
    """The network; see the module docstring. The defaults are the published sizes, those of Stable Diffusion.

    Attributes:
        channels: of images.
        scale, shift: latent = (z - shift) scale; they belong to the models of latents, and nothing here uses them but
            `from_latent`.
        dtype: norm statistics, softmax and what is returned are float32 in any.
    """

    channels: int = 3
    latent_channels: Annotated[int, Leaf("channels of latents", valid=COUNT, fixed=True)] = 4
    widths: Annotated[
        tuple[int, ...], Leaf("channels of the levels, each half the side of the one before", valid=EACH, fixed=True)
    ] = (128, 256, 512, 512)
    depth: Annotated[int, Leaf("blocks of a level; the decoder has one more", valid=COUNT, fixed=True)] = 2
    groups: Annotated[int, Leaf("groups of every GroupNorm; they divide every width", valid=COUNT, fixed=True)] = 32
    quant: Annotated[bool, Leaf("1 x 1 convolutions of the moments and of latents", fixed=True)] = True
    attention: Annotated[bool, Leaf("attention over the smallest map", fixed=True)] = True
    scale: Annotated[
        float | tuple[float, ...],
        Leaf("models see latents times this, 1 / their deviation; one number, or one a channel", fixed=True),
    ] = 0.18215
    shift: Annotated[float | tuple[float, ...], Leaf("subtracted from latents before", fixed=True)] = 0.0
    dtype: Dtype = "float32"

    logical_axes = LOGICAL_AXES

    @property
    def factor(self) -> int:
        """How many pixels of a side become one of a latent's."""
        return 2 ** (len(self.widths) - 1)

    def validate(self) -> None:
        """Raise UserError for sizes that exclude each other, before anything is traced."""
        check_sizes(self, "channels", "latent_channels", "depth", "groups")
        if not self.widths or any(width < 1 or width % self.groups for width in self.widths):
            raise UserError(f"VAE: widths = {tuple(self.widths)}; valid: multiples of groups = {self.groups}")
        if not np.all(np.asarray(self.scale) > 0):
            raise UserError(f"VAE: scale = {self.scale}; valid: above 0")

    def check_input(self, height: int, width: int) -> None:
        """Raise UserError for images whose sides do not become whole numbers of a latent's."""
        if height % self.factor or width % self.factor:
            raise UserError(f"VAE: images of {height} x {width} pixels; valid: sides divisible by {self.factor}")

    def setup(self) -> None:
        dtype, features = DTYPES[self.dtype], 2 * self.latent_channels
        sizes: dict[str, Any] = {
            "widths": self.widths,
            "depth": self.depth,
            "groups": self.groups,
            "attention": self.attention,
        }
        self.encoder = Encoder(**sizes, features=features, dtype=dtype)
        self.decoder = Decoder(**sizes, channels=self.channels, dtype=dtype)
        if self.quant:
            self.quant_conv = nn.Conv(features, (1, 1), dtype=dtype)
            self.post_quant_conv = nn.Conv(self.latent_channels, (1, 1), dtype=dtype)

    def __call__(self, images: jax.Array) -> jax.Array:
        """Images [b, h, w, c] reconstructed from the means of their posteriors, of the same shape, not cut."""
        return self.decode(self.encode(images)[0])

    def encode(self, images: jax.Array) -> tuple[jax.Array, jax.Array]:
        """Mean and log-variance, float32 [b, h/f, w/f, latent channels] each, of images [b, h, w, c] in [-1, 1]."""
        self.check_input(*images.shape[1:3])
        moments = self.encoder(images)
        if self.quant:
            moments = self.quant_conv(moments)
        mean, log_variance = jnp.split(moments.astype(jnp.float32), 2, axis=-1)
        return mean, jnp.clip(log_variance, LOWEST, HIGHEST)

    def decode(self, z: jax.Array, strips: int = 1) -> jax.Array:
        """z [b, h, w, latent channels] -> images float32 [b, f h, f w, c] in about [-1, 1], not cut.

        strips: a divisor of h; into how many every map is divided on the way, see strips.py.
        """
        return self.decoder(self.post_quant_conv(z) if self.quant else z, strips).astype(jnp.float32)

    def from_latent(self, latent: jax.Array) -> jax.Array:
        """z of a latent as diffusion models know it."""
        return latent / np.asarray(self.scale, np.float32) + np.asarray(self.shift, np.float32)
