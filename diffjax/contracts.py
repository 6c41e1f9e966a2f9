"""The interfaces of the package as types: batches, conditions, backbones, processes, methods, samplers and evaluators.

A backbone computes, a process says how data and noise mix, a method says how a backbone is trained and how it makes
samples, an evaluator looks at a training run from outside. Whoever adds one of them finds here what it has to offer.

The processes that prepare batches import this module, too, so it knows JAX and flax by their types alone.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol, TypeAlias

import numpy as np

from diffjax.errors import UserError
from diffjax.options import Options

if TYPE_CHECKING:
    import flax.linen as nn
    from jax import Array
    from jax.sharding import Mesh

    from diffjax.parallel.rules import LogicalAxes

Tree = Any  # nested containers of arrays; which ones is said beside each use
Apply = Callable[..., Any]  # (params, *inputs, **options) -> what the model returns
Metrics: TypeAlias = "dict[str, Array]"


class Stored(NamedTuple):
    """Part of the training stream as the data are stored, numpy arrays of this host; `training.batches` prepares it.

    raw: uint8 pixels [b, h, w, c], float16 moments [b, 2, h, w, c], or tokens int32 [b, codebooks, n].
    mirrored: bool [b], which examples are seen mirrored; of raw values with both views stored it is that view.
    condition: as in `Batch`.
    index: int32 [b], the example's position in the global batch. number: int32 [b], that of the batch in the stream.
    aux: more arrays per example, [b, ...], by name, not mirrored.
    """

    raw: Any
    mirrored: Any
    condition: Any
    index: Any
    number: Any
    aux: Mapping[str, Any] = {}


class Batch(NamedTuple):
    """What training sees of a part of the stream, arrays of the global batch.

    x: float32 [b, h, w, c], pixels in [-1, 1] or scaled latents; or tokens, int32 [b, n].
    condition: labels int32 [b], zeros where there are none; tokens int32 [b, n]; or vectors float32 [b, k].
    index: int32 [b], the example's position in the global batch.
    aux: more arrays per example, [b, ...], by name; those that the source gives.
    """

    x: Any
    condition: Any
    index: Any
    aux: Mapping[str, Any] = {}


@dataclass(frozen=True)
class Condition:
    """The condition of a model.

    Attributes:
        kind: "labels", int32 [b]; "tokens", int32 [b, n]; or "vectors", float32 [b, k].
        count: how many labels or tokens there are; 0 for vectors.
        shape: of one example: (), (n,) or (k,).
    """

    kind: str
    count: int
    shape: tuple[int, ...] = ()

    @property
    def dtype(self) -> np.dtype:
        return np.dtype(np.float32 if self.kind == "vectors" else np.int32)

    def null(self) -> np.ndarray:
        """The condition of an example that has none: the label or tokens after the last, or a vector of zeros."""
        return np.full(self.shape, self.count, self.dtype)

    def blank(self, batch: int = 1) -> np.ndarray:
        """Conditions of so many examples, to trace a model with."""
        return np.zeros((batch, *self.shape), self.dtype)


class Backbone(Protocol):
    """A trainable model: a Flax module.

    Its constructor fields annotated with `options.Leaf` are the leaves of section `model`. Fields that follow from the
    data and the method: channels, num_classes, null_class, learn_sigma; of models conditioned on vectors [b, k]
    condition_width = k, on tokens [b, n] condition_tokens = (vocabulary, n), whose null is the index `vocabulary`.
    A model that drops labels by itself, at several levels, says so by `label_drop_per_level`, and has `label_drop`.
    """

    logical_axes: LogicalAxes  # path pattern -> names of the last dimensions, for every parameter

    def validate(self) -> None:
        """Raise UserError for options that exclude each other."""

    def check_input(self, height: int, width: int) -> None:
        """Raise UserError for an image size that the model cannot take."""

    def __call__(
        self,
        x: Array,
        t: Array,
        y: Array | None,
        train: bool = False,
        keys: Array | None = None,
        *,
        see: int | None = None,
        augment: Array | None = None,
    ) -> Any:
        """x [b, h, w, c], t [b] in the process's units, condition y [b, ...] -> float32 [b, h, w, c or 2c].

        keys: typed keys [b], one per example, of what is dropped in training. see: return (output, output of that
        block) instead. augment: [b, augment_labels], how each example was augmented. A model that cannot do the last
        two leaves them out.
        """


class Device(Protocol):
    """What the values of a batch are prepared with, where they are prepared; see `data.source.Source.draw`."""

    def normal(self, shape: tuple[int, ...]) -> Any:
        """Standard normal values, float32 [b, *shape], of each example its own."""

    def divide(self, x: Any, by: float) -> Any:
        """x / by, rounded once."""


class Process(Protocol):
    """How data and noise mix, and what a network predicts of them; see diffusion/process.py and gaussian.py.

    uncertainty: whether `losses` wants the log variance that the method trains, see diffusion/weighting.py.
    """

    uncertainty: bool

    def sample_times(self, keys: Array) -> Array:
        """Typed keys [b] -> times t [b] of a training step."""

    def q_sample(self, x0: Array, t: Array, eps: Array) -> Array:
        """Noisy data at t from data x0 and noise eps, [b, ..., c] each."""

    def c_in(self, t: Array) -> Array:
        """c_in [b]: what the network's input is multiplied by."""

    def c_noise(self, t: Array) -> Array:
        """c_noise [b]: the time that the network is given."""

    def losses(self, output: Array, x0: Array, xt: Array, t: Array, eps: Array, **log_variance: Array) -> Metrics:
        """Terms [b] of each example, among them "loss"."""

    def noise_fraction(self, t: Array) -> Array:
        """How far t [b] is from the data, 0 to 1."""

    def grid(self, t: np.ndarray) -> Any:
        """The process at float64 times [n], as samplers see it: a `diffusion.process.Grid`."""


class MakeModel(Protocol):
    """Builds the configured backbone; a method calls it with the arguments that follow from data and process."""

    def __call__(self, *, optional: Mapping[str, Any] = {}, **arguments: Any) -> nn.Module:
        """arguments: constructor arguments that the backbone must have. optional: those that it may have."""


class Loss(Protocol):
    def __call__(self, apply: Apply, params: Tree, frozen: Tree, batch: Batch, key: Array) -> tuple[Array, Metrics]:
        """The mean loss over a batch, and float32 scalars to report. key: of this step."""


class Terms(Protocol):
    def __call__(
        self, apply: Apply, params: Tree, frozen: Tree, batch: Batch, key: Array, train: bool
    ) -> tuple[Metrics, Array]:
        """({"loss": [b], ...}, noise [b] from 0 at the data to 1 at pure noise) of each example of a batch."""


class Frozen(NamedTuple):
    """Parameters that a method uses and never trains: float arrays, and the logical axes that shard them."""

    load: Callable[[], Tree]  # reads them; called once, when they are needed
    logical_axes: LogicalAxes


class Sampler(NamedTuple):
    """A sampler of a method.

    Attributes:
        sample: (apply, params, schedule, conditions [b, ...], keys [b], guide=None) -> x as in `Batch`; every example a
            function of its own condition and key. guide(x, t, conditions): a worse denoiser, for autoguidance.
        schedule: what `sample` needs besides, a tree of arrays and an argument of the compiled program: a sampler
            schedule, or the sampling parameters of tokens.
    """

    sample: Callable[..., Array]
    schedule: Tree


class MakeSampler(Protocol):
    def __call__(self, sampling: Any, *, autoguided: bool = False, max_steps: int | None = None) -> Sampler:
        """The sampler of the method's sampling options; UserError for contradictory ones.

        autoguided: the guidance scale is the weight of a guide that `sample` is given, not of the null condition.
        max_steps: room in the schedule, so that samplers of fewer steps share a compilation; of methods with steps.
        """


class Decoder(NamedTuple):
    """Decodes a method's samples to pictures.

    Attributes:
        load: -> a callable tree (`jax.tree_util.Partial`): x -> float32 [b, h, w, c] in [-1, 1].
        described: what the protocol of samples says of it beside its sha256; None: nothing, and no sha256, since how
            the samples were made says it already.
    """

    load: Callable[[], Tree]
    described: Mapping[str, Any] | None = None


@dataclass(frozen=True)
class Method:
    """How a backbone is trained and how it makes samples.

    Attributes:
        model: the backbone, whose parameters are trained.
        inputs: of the model for one example, blank; None for what it does not take.
        condition: what the model is conditioned on; None: nothing.
        loss: see `Loss`.
        sampler: see `MakeSampler`; None: nothing is drawn.
        makes: what it draws, in words: "pictures", or what else.
        terms: per-example losses for evaluation; None: only their mean is known.
        reconstruct: (apply, params, x) -> images like x, of an autoencoder.
        decoder: of what it draws to pictures; None: nothing has to be done, or nothing can.
        extra: key -> parameters of the loss that are trained beside the model's, with `extra_axes` to shard them.
        frozen: networks that the loss uses, by name.
        takes_source: whether the conditions are tokens that another run made, with a record of what they mean.
    """

    model: Any
    inputs: tuple[Any, ...]
    condition: Condition | None
    loss: Loss
    sampler: MakeSampler | None
    makes: str = "pictures"
    terms: Terms | None = None
    reconstruct: Callable[[Apply, Tree, Array], Array] | None = None
    decoder: Decoder | None = None
    extra: Callable[[Array], dict[str, Tree]] = lambda key: {}
    extra_axes: LogicalAxes = ()
    frozen: Mapping[str, Frozen] = field(default_factory=dict)
    takes_source: bool = False


class AutoencoderOptions(Protocol):
    """Section `autoencoder`, see `weights.autoencoders.Autoencoder`."""

    @property
    def weights(self) -> str: ...

    @property
    def dtype(self) -> str: ...

    @property
    def tile(self) -> int: ...


class DataSpec(NamedTuple):
    """Properties of the training data that a method uses, without opening them; see `data` in config/schema.py."""

    name: str
    size: int
    channels: int
    condition: Condition | None
    flip: bool
    augment: float
    options: Options  # of the source
    autoencoder: AutoencoderOptions  # of latents


@dataclass(frozen=True)
class MethodRecord:
    """A row of the table of methods.

    Attributes:
        build: (make_model, data, options) -> Method; options an instance of `section`.
        section: the dataclass of its options in training: the config's section of the method's name.
        sampling: the dataclass of its options in sampling: the config's section `sampling`.
        unread: leaves of other sections that it does not read.
        images: whether it is trained on what `tokenize` makes of the images in the config's section of that name.
    """

    build: Callable[..., Method]
    section: type
    sampling: type
    unread: tuple[str, ...] = ()
    images: bool = False


class Result(NamedTuple):
    """The result of an evaluator: numbers by name, and optionally a picture uint8 [h, w, 3]."""

    values: Mapping[str, float]
    picture: np.ndarray | None = None
    protocol: Mapping[str, Any] = {}  # json-able: how the numbers came about
    judge: str = ""  # the value of which the lowest is the best; "": it has none


Evaluator = Callable[[Tree], Result]  # of the averaged parameters


class Subject(Protocol):
    """The part of an experiment that evaluators use."""

    @property
    def method(self) -> Method: ...

    @property
    def mesh(self) -> Mesh: ...

    @property
    def seed(self) -> int: ...

    @property
    def batch_size(self) -> int: ...

    @property
    def source(self) -> Any:
        """The training data, a `data.source.Source`."""

    @property
    def source_options(self) -> Options:
        """The options that `other_source` accepts."""

    def other_source(self, **leaves: Any) -> Any:
        """The same data with other options, such as another split."""

    def batches(self, source: Any, num: int) -> Iterator[tuple[Batch, int]]:
        """The first `num` examples of a source: global batches, of which rows with an index below that number count."""

    def terms(self, params: Tree, batch: Batch, key: Array) -> tuple[Metrics, Array, Array]:
        """`Method.terms` without dropout and the index [b] of each row, compiled."""

    def reconstructions(self, params: Tree, batch: Batch) -> np.ndarray:
        """`Method.reconstruct` of a batch, on every process all of it, in the order of its `index`."""

    def images(self, params: Tree, conditions: np.ndarray) -> Iterator[np.ndarray]:
        """Samples 0, 1, ... as float32 [b, h, w, c], one per condition."""

    @property
    def picture_size(self) -> tuple[int, int]:
        """Height and width of the pictures that are drawn, or decoded of what is drawn."""

    def sampled_by(self, sampler: str, steps: int) -> Subject:
        """The same with another sampler ("": the same) and number of steps (0: the same)."""

    def draw(self, params: Tree, conditions: np.ndarray) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        """This process's part of samples 0, 1, ..., one per condition: numbers [n], float32 [n, h, w, c]."""

    def description(self) -> dict[str, Any]:
        """What samples depend on, json-able."""

    def conditions(self, first: int, num: int) -> np.ndarray:
        """Conditions of samples first, first + 1, ...: classes in equal parts, or those of the training data."""


def bind(model: nn.Module) -> Apply:
    """`apply(params, *inputs, **options)` of a model; an option `method` names another than its `__call__`."""

    def apply(params: Tree, *inputs: Any, **options: Any) -> Any:
        return model.apply({"params": params}, *inputs, **options)

    return apply


def labels(num_classes: int) -> Condition | None:
    """The condition of so many classes; None for 0."""
    return Condition("labels", num_classes) if num_classes else None


def condition(kind: str, count: int, size: int) -> Condition | None:
    """A condition by plain values: `count` classes or tokens, `size` tokens or numbers an example; None: nothing."""
    if kind == "labels":
        if size:
            raise UserError(f"data.condition_size = {size}: labels have none; valid: 0")
        return labels(count)
    if size < 1 or (kind == "tokens") != bool(count):
        raise UserError(
            f"data.condition = {kind!r} with num_classes = {count}, condition_size = {size}: valid: tokens with "
            "num_classes (how many there are) and condition_size above 0; vectors with num_classes = 0"
        )
    return Condition(kind, count, (size,))
