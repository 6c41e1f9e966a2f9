"""DiGIT: a transformer over the tokens of an image, one token after the other (arXiv 2410.12490).

    x = sqrt(d) E[token] + P[position]
    x = LN(x + Attention(x)),   x = LN(x + Mlp(x))                                       (norm "post": stage 1)
    x = x + Attention(LN(x)),   x = x + Mlp(LN(x)),   and one LN after the last block    (norm "pre": stage 2)
    logits = W x

Three uses of one module:

    stage 1            [start, s_1 .. s_n]                 causal; start is </s>, or the row of the class
    stage 2            [r_1 .. r_m | </s>, v_1 .. v_n]     causal; the source r has tables of its own
    stage 2, masked    [r_1 .. r_m | </s>, v_1 .. v_n]     every position sees every other; some v are hidden

Tokens of stage 1 are clusters of image features; stage 2 turns them (r) into tokens of a decoder to pixels (v). A
causal model's output at a position predicts the next one and at the last </s>; a masked model's predicts the token at
its own.
"""

import functools
import math
from typing import Annotated, Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from einops import rearrange

from diffjax import rng
from diffjax.errors import UserError
from diffjax.models.layers import (
    REMAT_POLICIES,
    Attention,
    Depth,
    Heads,
    MlpRatio,
    Remat,
    Width,
    check_counts,
    check_heads,
    check_options,
    check_see,
    drop,
    norm,
    normal,
    run_stack,
    stacked,
    uniform,
)
from diffjax.ops.attention import attention, cached_attention
from diffjax.ops.dtypes import DTYPES, Dtype
from diffjax.ops.vocabulary import END, MASK, NO_TOKEN, PAD, SPECIALS
from diffjax.options import Leaf, at_least, fraction, one_of
from diffjax.parallel.rules import LogicalAxes, constrain

# Depth, width, heads, vocabulary of stage 1. The heads of L are not published; they change no parameter count.
SIZES = {"B": (16, 1024, 16, 8192), "L": (24, 1536, 16, 16384)}
VQGAN_VOCABULARY = 1024  # of stage 2

FIRST_POSITION = PAD + 1  # the tables of positions begin with rows that no position has, as fairseq's do

LOGICAL_AXES: LogicalAxes = (
    (r"token_embed", ("vocab", "embed")),
    (r"positions", (None, "embed")),
    (r"attention/(query|key|value)/kernel", ("embed", "heads", "kv")),
    (r"attention/(query|key|value)/bias", ("heads", "kv")),
    (r"attention/out/kernel", ("heads", "kv", "embed")),
    (r"mlp/fc1/kernel", ("embed", "mlp")),
    (r"mlp/fc1/bias", ("mlp",)),
    (r"mlp/fc2/kernel", ("mlp", "embed")),
    (r"output/kernel", ("embed", "vocab")),
    (r"bias", (None,)),
    (r"scale", (None,)),
)


class Cache(NamedTuple):
    """The key-value cache of decoding.

    Attributes:
        keys, values: [layers, b, heads, m, k] in the compute dtype, with room for m positions.
        filled: how many of them are there. target: how many of these are of the target, the start included.
    """

    keys: jax.Array
    values: jax.Array
    filled: jax.Array
    target: jax.Array


def table(key: jax.Array, shape: tuple[int, int]) -> jax.Array:
    """N(0, 1/d) for embeddings [rows, d]; zeros for the padding, which no sequence has and no gradient reaches."""
    return normal(shape[1] ** -0.5)(key, shape).at[PAD].set(0.0)


class SelfAttention(nn.Module):
    """Multi-head self-attention; x [b, n, d] -> ([b, n, d], cache).

    With a cache, x is what follows the positions in it: their keys and values are read, those of x are added.
    """

    heads: int
    dtype: Any
    causal: bool
    implementation: str

    @nn.compact
    def __call__(self, x: jax.Array, cache: Cache | None, layer: jax.Array) -> tuple[jax.Array, Cache | None]:
        d = x.shape[-1]
        features = (self.heads, d // self.heads)
        # The reference's range, half the variance of Xavier's, and PyTorch's default for biases.
        inits: dict[str, Any] = {"kernel_init": uniform(math.sqrt(1.5 / d)), "bias_init": uniform(d**-0.5)}
        dense = functools.partial(nn.DenseGeneral, features, dtype=self.dtype, **inits)
        q, k, v = (constrain(dense(name=n)(x), "batch", "length", "heads") for n in ("query", "key", "value"))
        if cache is None:
            x = attention(q, k, v, causal=self.causal, implementation=self.implementation)
        else:
            cache = _remember(cache, k, v, layer)
            x = cached_attention(q, cache.keys[layer], cache.values[layer], cache.filled)
        out = nn.DenseGeneral(d, axis=(-2, -1), kernel_init=uniform(math.sqrt(3 / d)), dtype=self.dtype, name="out")
        return out(x), cache


def _remember(cache: Cache, k: jax.Array, v: jax.Array, layer: jax.Array) -> Cache:
    """The cache with k, v [b, n, heads, k] of one layer behind what it has; all layers share one buffer, so that
    nothing else of it is written."""

    def write(buffer: jax.Array, new: jax.Array) -> jax.Array:
        new = rearrange(new, "b n heads k -> 1 b heads n k").astype(buffer.dtype)
        buffer = jax.lax.dynamic_update_slice(buffer, new, (layer, 0, 0, cache.filled, 0))
        return constrain(buffer, None, "batch", "heads")

    return cache._replace(keys=write(cache.keys, k), values=write(cache.values, v))


class Mlp(nn.Module):
    """Linear -> GELU (exact, in float32) -> Linear; [b, n, d] -> [b, n, d]; PyTorch's default initialisation."""

    hidden: int
    dtype: Any

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        d = x.shape[-1]
        for features, name in ((self.hidden, "fc1"), (d, "fc2")):
            init = uniform(x.shape[-1] ** -0.5)
            x = nn.Dense(features, kernel_init=init, bias_init=init, dtype=self.dtype, name=name)(x)
            if name == "fc1":
                x = constrain(x, "batch", "length", "mlp")
                x = nn.gelu(x.astype(jnp.float32), approximate=False).astype(self.dtype)
        return x


class DiGITBlock(nn.Module):
    heads: int
    hidden: int
    dtype: Any
    attention: str
    norm: str
    causal: bool
    dropout: float

    @nn.compact
    def __call__(
        self, carry: tuple[jax.Array, Cache | None], layer: jax.Array, keys: jax.Array | None
    ) -> tuple[tuple[jax.Array, Cache | None], jax.Array]:
        """carry = (x [b, n, d], cache), its own number, keys [b] in training with dropout -> (carry, the mean of its
        input over all positions, float32 [b, d])."""
        x, cache = carry
        x = constrain(x, "batch", "length", "embed")
        mean = jnp.mean(x.astype(jnp.float32), axis=1)
        pre = self.norm == "pre"
        attention_norm, mlp_norm = (norm(self.dtype, name, epsilon=1e-5) for name in ("attention_norm", "mlp_norm"))
        attend = SelfAttention(self.heads, self.dtype, self.causal, self.attention, name="attention")
        h, cache = attend(attention_norm(x) if pre else x, cache, layer)
        x = x + self._dropped(h, keys, "attention")
        x = constrain(x if pre else attention_norm(x), "batch", "length", "embed")
        h = Mlp(self.hidden, self.dtype, name="mlp")(mlp_norm(x) if pre else x)
        x = x + self._dropped(h, keys, "mlp")
        return (constrain(x if pre else mlp_norm(x), "batch", "length", "embed"), cache), mean

    def _dropped(self, h: jax.Array, keys: jax.Array | None, name: str) -> jax.Array:
        return h if keys is None else drop(h, self.dropout, rng.fold_name(keys, name))


class DiGIT(nn.Module):
    """The backbone; see the module docstring. Tokens are 0 .. vocabulary - 1, in and out; others give NaN."""

    vocabulary: int  # tokens to predict; logits have a column for each, after those of the `SPECIALS`
    depth: Depth
    width: Width
    heads: Heads
    mlp_ratio: MlpRatio = 4.0
    source_vocabulary: int = 0  # size of the vocabulary of a second stage's source; 0: a first stage
    num_classes: int = 0  # of a first stage; 0: an unconditional model
    null_class: bool = False  # one more label, index `num_classes`, for classifier-free guidance: not in the paper
    length: Annotated[
        int, Leaf("largest length of a source, and of a target with its start", valid=at_least(1), fixed=True)
    ] = 1024
    norm: Annotated[
        str,
        Leaf(
            "LayerNorm after every sum (post), or before every map and once at the end (pre)",
            valid=one_of(("post", "pre")),
            fixed=True,
        ),
    ] = "post"
    causal: Annotated[
        bool, Leaf("attend to preceding tokens only; without, to all, for decoding of masked tokens", fixed=True)
    ] = True
    dropout: Annotated[
        float,
        Leaf("rate for the embeddings and for what each block adds, in training", valid=fraction(), fixed=True),
    ] = 0.1
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
        check_options("DiGIT", self)
        check_counts("DiGIT", self, vocabulary=1, source_vocabulary=0, num_classes=0)
        check_heads("DiGIT", self.width, self.heads)
        if self.source_vocabulary and self.num_classes:
            raise UserError(f"DiGIT: a model with a source takes no labels; num_classes = {self.num_classes}, valid: 0")
        if self.null_class and not self.num_classes:
            raise UserError("DiGIT: null_class = True needs num_classes above 0")

    def check_input(self, height: int, width: int) -> None:
        """Raise UserError unless there are positions for an image of so many tokens, its start and its source."""
        if height * width >= self.length:
            raise UserError(
                f"DiGIT: {height} x {width} tokens and their start need {height * width + 1} positions; length = "
                f"{self.length}"
            )

    def setup(self) -> None:
        d, entries = self.width, SPECIALS + self.vocabulary
        more = SPECIALS + self.source_vocabulary if self.source_vocabulary else self.num_classes + self.null_class
        self.token_embed = self.param("token_embed", table, (entries + more, d))
        self.positions = self.param("positions", table, (FIRST_POSITION + self.length, d))
        if self.source_vocabulary:
            self.source_positions = self.param("source_positions", table, (FIRST_POSITION + self.length, d))
        stack = stacked(DiGITBlock, self.depth, REMAT_POLICIES[self.remat])
        fields = (int(d * self.mlp_ratio), DTYPES[self.dtype], self.attention, self.norm, self.causal, self.dropout)
        self.blocks = stack(self.heads, *fields)
        if self.norm == "pre":
            self.final_norm = norm(DTYPES[self.dtype], epsilon=1e-5)
        # A float32 sum of products in the compute dtype.
        self.output = nn.Dense(
            entries,
            use_bias=False,
            kernel_init=normal(d**-0.5),
            dtype=DTYPES[self.dtype],
            dot_general=functools.partial(jax.lax.dot_general, preferred_element_type=jnp.float32),
        )

    def __call__(
        self,
        tokens: jax.Array,
        y: jax.Array | None = None,
        source: jax.Array | None = None,
        train: bool = False,
        keys: jax.Array | None = None,
        see: int | None = None,
    ) -> jax.Array | tuple[jax.Array, jax.Array]:
        """Logits of all predictions.

        Args:
            tokens: int32 [b, n]; of a masked model those that are hidden are `NO_TOKEN`.
            y: int32 [b], for a model with classes. source: int32 [b, m], for a second stage.
            keys: typed keys [b], one per example, which say what each drops; with `train` and dropout.
            see: a block, 0 the first.

        Returns:
            float32 [b, n + 1, SPECIALS + vocabulary], row i for token i and the last for the end; of a masked model
            [b, n, SPECIALS + vocabulary], row i for token i. With `see` also the output of that block at all positions,
            source first: [b, m + 1 + n, d] in the compute dtype, before the last norm of "pre".
        """
        check_see("DiGIT", self, see)
        x, _, seen = self._hidden(tokens, y, source, train, keys, see)
        logits = self.logits(x[:, -tokens.shape[1] - self.causal :])
        return logits if seen is None else (logits, seen)

    def features(self, tokens: jax.Array, y: jax.Array | None = None, source: jax.Array | None = None) -> jax.Array:
        """Features for linear probes: the input of each block, averaged over the positions; float32 [layers, b, d]."""
        return self.hidden(tokens, y, source)[1]

    def hidden(
        self,
        tokens: jax.Array,
        y: jax.Array | None = None,
        source: jax.Array | None = None,
        train: bool = False,
        keys: jax.Array | None = None,
    ) -> tuple[jax.Array, jax.Array]:
        """The final hidden states at all positions, source first: [b, m + 1 + n, d]; and the `features`."""
        x, means, _ = self._hidden(tokens, y, source, train, keys, None)
        return x, means

    def _hidden(
        self,
        tokens: jax.Array,
        y: jax.Array | None,
        source: jax.Array | None,
        train: bool,
        keys: jax.Array | None,
        see: int | None,
    ) -> tuple[jax.Array, jax.Array, jax.Array | None]:
        x = self.embed(tokens, y, source)
        if not (train and self.dropout):
            keys = None
        elif keys is None:
            raise UserError("DiGIT: training with dropout above 0 needs keys, one per example")
        else:
            keys = rng.fold_name(keys, "dropout")
            x = drop(x, self.dropout, rng.fold_name(keys, "embed"))
        x, _, means, seen = self._run(x, None, keys, see)
        return x, means, seen

    def logits(self, x: jax.Array) -> jax.Array:
        """[..., d] -> float32 [..., SPECIALS + vocabulary]."""
        return self.output(x)

    def embed(self, tokens: jax.Array, y: jax.Array | None = None, source: jax.Array | None = None) -> jax.Array:
        """The sequence of the module docstring, embedded: float32 [b, m + 1 + n, d]."""
        self._check_length("target", tokens.shape[1] + 1)
        entries = jnp.concatenate([self._start(tokens.shape[0], y), self._target_entries(tokens)], axis=1)
        x = self._embed(entries, jnp.arange(entries.shape[1]), self.positions)
        if not self.source_vocabulary:
            return x
        if source is None:
            raise UserError(f"this DiGIT has a source of {self.source_vocabulary} tokens: give them, not None")
        self._check_length("source", source.shape[1])
        check_tokens(source, self.source_vocabulary, "source token")
        first = 2 * SPECIALS + self.vocabulary
        before = self._embed(
            _entries(source, self.source_vocabulary, first), jnp.arange(source.shape[1]), self.source_positions
        )
        return jnp.concatenate([before, x], axis=1)

    def init_cache(self, batch: int, length: int, source_length: int = 0) -> Cache:
        """An empty cache with room for a source and for the decoding of `length` tokens; needs no parameters."""
        if not self.causal:
            raise UserError("DiGIT: a masked model (causal = False) has no order to decode in, and no cache")
        self._check_length("target", length)
        self._check_length("source", source_length)
        shape = (self.depth, batch, self.heads, source_length + length, self.width // self.heads)
        empty = constrain(jnp.zeros(shape, DTYPES[self.dtype]), None, "batch", "heads")
        return Cache(empty, empty, jnp.int32(0), jnp.int32(0))

    def prefill(
        self, cache: Cache, y: jax.Array | None = None, source: jax.Array | None = None
    ) -> tuple[jax.Array, Cache]:
        """Start a sequence: y [b] or source [b, m] -> float32 logits [b, SPECIALS + vocabulary] of the first token."""
        none = jnp.zeros((cache.keys.shape[1], 0), jnp.int32)
        return self._next(self.embed(none, y, source), cache)

    def step(self, cache: Cache, tokens: jax.Array) -> tuple[jax.Array, Cache]:
        """Go on by one token each: int32 [b] -> float32 logits [b, SPECIALS + vocabulary] of the next token.

        The cache must have room, which `init_cache` gave for `length` tokens, the last not being fed back.
        """
        return self._next(self._embed(self._target_entries(tokens[:, None]), cache.target[None], self.positions), cache)

    def _next(self, x: jax.Array, cache: Cache) -> tuple[jax.Array, Cache]:
        n = x.shape[1]
        x, full, _, _ = self._run(x, cache, None, None)
        # All that is embedded at once ends with the start of the target, or is one token of it.
        return self.logits(x[:, -1]), full._replace(filled=full.filled + n, target=full.target + 1)

    def _run(
        self, x: jax.Array, cache: Any, keys: jax.Array | None, see: int | None
    ) -> tuple[jax.Array, Any, jax.Array, jax.Array | None]:
        layers = jnp.arange(self.depth)
        if keys is not None:
            base = rng.fold_name(keys, "blocks")
            keys = jax.vmap(lambda layer: rng.fold(base, layer))(layers)
        (x, cache), means, seen = run_stack(
            self.blocks,
            DiGITBlock,
            (x.astype(DTYPES[self.dtype]), cache),
            layers,
            keys,
            policy=REMAT_POLICIES[self.remat],
            see=see,
            output=lambda carry: carry[0],
        )
        return self.final_norm(x) if self.norm == "pre" else x, cache, means, seen

    def _start(self, batch: int, y: jax.Array | None) -> jax.Array:
        """The start entry of every target, [b, 1]: </s>, or the row of the class."""
        if not self.num_classes:
            return jnp.full((batch, 1), END)
        if y is None:
            raise UserError(f"this DiGIT has {self.num_classes} classes: it needs labels y, not None")
        rows = self.num_classes + self.null_class
        check_tokens(y, rows, "label")
        return _entries(y[:, None], rows, SPECIALS + self.vocabulary)

    def _target_entries(self, tokens: jax.Array) -> jax.Array:
        check_tokens(tokens, self.vocabulary, "token", hidden=not self.causal)
        entries = _entries(tokens, self.vocabulary, SPECIALS)
        return entries if self.causal else jnp.where(tokens == NO_TOKEN, MASK, entries)

    def _embed(self, entries: jax.Array, positions: jax.Array, position_table: jax.Array) -> jax.Array:
        """Entries [b, n] at positions [n], whose rows are in the table [m, d] -> float32 [b, n, d]."""
        # Whole on every device for the look-up, as FSDP gathers any weight: rows of a split table would be exchanged.
        embedding, encoding = (constrain(rows, None, None) for rows in (self.token_embed, position_table))
        scaled = math.sqrt(self.width) * jnp.take(embedding, entries, axis=0)
        return scaled + jnp.take(encoding, FIRST_POSITION + positions, axis=0)

    def _check_length(self, part: str, length: int) -> None:
        if length > self.length:
            raise UserError(f"DiGIT: a {part} of {length} positions (the start included); valid: up to {self.length}")


def _entries(tokens: jax.Array, count: int, first: int) -> jax.Array:
    """Entries of the table for tokens 0 .. count - 1; for others a row that no table has, whose look-up gives NaN."""
    tokens = jnp.asarray(tokens, jnp.int32)
    return jnp.where((tokens >= 0) & (tokens < count), first + tokens, np.iinfo(np.int32).max)


def check_tokens(tokens: Any, count: int, what: str, hidden: bool = False) -> None:
    """Raise UserError for tokens outside 0 .. count - 1 (or `NO_TOKEN`), unless they are traced."""
    if isinstance(tokens, jax.core.Tracer):
        return
    values = np.asarray(tokens)
    wrong = values[((values < 0) | (values >= count)) & ~(hidden & (values == NO_TOKEN))]
    if wrong.size:
        allowed = f"0 to {count - 1}" + (f", or {NO_TOKEN} where hidden" if hidden else "")
        raise UserError(f"DiGIT: {what} {wrong[0]}; valid: {allowed}")
