"""Optimizers and learning-rate schedules: one row of a table each, chosen by the config's section `optim`.

Every optimizer is the chain  clipping, scaling, weight decay, learning rate:

    (1)  θ_n = θ_{n-1} - η_n (u_n + λ θ_{n-1}),

with decoupled decay λ (arXiv 1711.05101), and differs in the clipping of the gradients g_n and in u_n. Adam's u_n has a
first and a second moment of every entry. Adafactor (arXiv 1804.04235, algorithms 4 and 5 without the relative step
size, since η is the schedule's) has no first moment; of the second moment of a matrix G [rows, columns] it keeps the
means over columns and over rows (section 3), with a decay that grows (section 7.2) and a limit d = 1 on the root mean
square of the update (section 6):

    (2)  β_n = 1 - n^-0.8
    (3)  R_n = β_n R_{n-1} + (1 - β_n) mean over columns of (G² + ε²),   [rows]
    (4)  C_n = β_n C_{n-1} + (1 - β_n) mean over rows of (G² + ε²),      [columns]
    (5)  V_n = R_n C_n / mean(R_n),                                      [rows, columns]
    (6)  u_n = U / max(1, RMS(U) / d),  U = G / sqrt(V_n).

Leaves that are no matrices keep V_n = β_n V_{n-1} + (1 - β_n) (G² + ε²). The paper's ε1 is ε² here, so that ε bounds
the root as it does in Adam; in the paper it is 1e-15. Every layer of a stack has statistics of its own.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from diffjax.errors import UserError
from diffjax.options import Leaf, at_least, between, check, fraction, one_of, options
from diffjax.parallel.rules import Names, Parameter, StateAxes, key_path

DECAY_EXPONENT, UPDATE_LIMIT = 0.8, 1.0  # of (2); d of (6)


# Schedules: (lr, total_steps, warmup_steps, *, options) -> rate of a count that begins after the warm-up.


def constant(lr: float, total_steps: int, warmup_steps: int) -> optax.Schedule:
    return optax.constant_schedule(lr)


def cosine(
    lr: float,
    total_steps: int,
    warmup_steps: int,
    *,
    final: Annotated[float, Leaf("last rate over the first", valid=between(0, 1))] = 0.0,
) -> optax.Schedule:
    """Half a cosine from lr to `final` lr at `total_steps`."""
    return optax.cosine_decay_schedule(lr, max(total_steps - warmup_steps, 1), alpha=final)


def cosine_to_hundredth(lr: float, total_steps: int, warmup_steps: int) -> optax.Schedule:
    return cosine(lr, total_steps, warmup_steps, final=0.01)


def inverse_sqrt(
    lr: float,
    total_steps: int,
    warmup_steps: int,
    *,
    decay_after_steps: Annotated[int, Leaf("constant until then", valid=at_least(1))],
) -> optax.Schedule:
    """lr / sqrt(max(step / decay_after_steps, 1)) (EDM2, arXiv 2312.02696).

    The schedule that fairseq calls inverse_sqrt has `decay_after_steps` = `warmup_steps`.
    """
    if decay_after_steps < max(warmup_steps, 1):
        raise UserError(f"optim.decay_after_steps = {decay_after_steps}: valid: 1 or more, not in the warm-up")

    def rate(count: jax.Array) -> jax.Array:
        return lr / jnp.sqrt(jnp.maximum((count + warmup_steps) / decay_after_steps, 1.0))

    return rate


SCHEDULES: dict[str, Callable[..., optax.Schedule]] = {
    "constant": constant,
    "cosine": cosine,
    "cosine_to_hundredth": cosine_to_hundredth,
    "inverse_sqrt": inverse_sqrt,
}


@dataclass(frozen=True)
class Optimizer:
    """A row of `OPTIMIZERS`.

    Attributes:
        build: (schedule, parameters, section) -> gradients to updates.
        reads: the fields of `Optim` that it reads; the schedule's options are not among them.
        state_axes: names of the last dimensions of a leaf of its state that has not its parameter's shape.
    """

    build: Callable[[optax.Schedule, Sequence[Parameter], "Optim"], optax.GradientTransformation]
    reads: tuple[str, ...]
    state_axes: StateAxes


def _chain(
    clip: Callable[[float], optax.GradientTransformation],
    scale: optax.GradientTransformation,
    learning_rate: optax.Schedule,
    leaves: Sequence[Parameter],
    optim: "Optim",
) -> optax.GradientTransformation:
    """(1). The same tree of states whatever the numbers, so that a run can continue with another `clip` or decay."""
    rest = optax.chain(scale, _decay(leaves, optim), optax.scale_by_learning_rate(learning_rate))
    return optax.chain(clip(optim.clip) if optim.clip else optax.identity(), rest)


def _adamw(learning_rate: optax.Schedule, leaves: Sequence[Parameter], optim: "Optim") -> optax.GradientTransformation:
    scale = optax.scale_by_adam(b1=optim.b1, b2=optim.b2, eps=optim.eps)
    return _chain(optax.clip_by_global_norm, scale, learning_rate, leaves, optim)


def _fairseq_adam(
    learning_rate: optax.Schedule, leaves: Sequence[Parameter], optim: "Optim"
) -> optax.GradientTransformation:
    scale = _scale_by_fairseq_adam(b1=optim.b1, b2=optim.b2, eps=optim.eps)
    return _chain(_clip_like_fairseq, scale, learning_rate, leaves, optim)


def _adafactor(
    learning_rate: optax.Schedule, leaves: Sequence[Parameter], optim: "Optim"
) -> optax.GradientTransformation:
    scale = scale_by_factored_moments(leaves, optim.eps)
    return _chain(optax.clip_by_global_norm, scale, learning_rate, leaves, optim)


def _scale_by_fairseq_adam(b1: float, b2: float, eps: float) -> optax.GradientTransformation:
    """m / (1 - b1^t) over (sqrt(v) + eps) / sqrt(1 - b2^t): `eps` too is divided, unlike in Adam's algorithm 1."""

    def init(params: Any) -> optax.ScaleByAdamState:
        zeros = jax.tree.map(jnp.zeros_like, params)
        return optax.ScaleByAdamState(jnp.zeros((), jnp.int32), zeros, zeros)

    def update(gradients: Any, state: Any, params: Any = None) -> tuple[Any, optax.ScaleByAdamState]:
        mu = jax.tree.map(lambda m, g: b1 * m + (1 - b1) * g, state.mu, gradients)
        nu = jax.tree.map(lambda v, g: b2 * v + (1 - b2) * jnp.square(g), state.nu, gradients)
        count = optax.safe_increment(state.count)
        size = jnp.sqrt(1 - b2**count) / (1 - b1**count)
        updates = jax.tree.map(lambda m, v: size * m / (jnp.sqrt(v) + eps), mu, nu)
        return updates, optax.ScaleByAdamState(count, mu, nu)

    return optax.GradientTransformation(init, update)


def _clip_like_fairseq(limit: float) -> optax.GradientTransformation:
    """Gradients times min(1, limit / (norm + 1e-6))."""

    def update(gradients: Any, state: Any, params: Any = None) -> tuple[Any, Any]:
        factor = jnp.minimum(1.0, limit / (optax.tree.norm(gradients) + 1e-6))
        return jax.tree.map(lambda g: factor * g, gradients), state

    return optax.GradientTransformation(lambda params: optax.EmptyState(), update)


def _decay(leaves: Sequence[Parameter], optim: "Optim") -> optax.GradientTransformation:
    """Adds λ θ, to all leaves or to those that `optim.decayed` names; without a state either way."""
    if optim.decayed == "all":
        return optax.add_decayed_weights(optim.weight_decay)
    decayed = {leaf.path for leaf in leaves if is_matrix(leaf)}

    def update(updates: Any, state: Any, params: Any = None) -> tuple[Any, Any]:
        def add(path: tuple, update: jax.Array, leaf: jax.Array) -> jax.Array:
            return update + optim.weight_decay * leaf if key_path(path) in decayed else update

        return jax.tree_util.tree_map_with_path(add, updates, params), state

    return optax.GradientTransformation(lambda params: optax.EmptyState(), update)


def is_matrix(leaf: Parameter) -> bool:
    """Is it the kernel of a matrix product or of a convolution across channels?

    Such leaves have two dimensions or more, not counting that of stacked layers, and are named `kernel` or have axes of
    both sides, the residual stream and another. Tables of embeddings start with `vocab`; a depthwise convolution [h, w,
    1, c] has no sum over channels.
    """
    sides = {name for name in leaf.axes if name}
    depthwise = leaf.axes[:2] == (None, None) and leaf.shape[-2] == 1
    if len(leaf.axes) < 2 or leaf.axes[0] == "vocab" or depthwise:
        return False
    return leaf.path.split("/")[-1] == "kernel" or ("embed" in sides and len(sides) > 1)


class FactoredState(NamedTuple):
    """Each of the three has the parameters' tree, with a scalar 0 for leaves that do not need it.

    steps []: number of updates. v_row [layers..., rows...]: R of (3). v_col [layers..., columns...]: C of (4).
    v: the second moment of leaves that are not factored.
    """

    steps: jax.Array
    v_row: Any
    v_col: Any
    v: Any


def scale_by_factored_moments(leaves: Sequence[Parameter], eps: float) -> optax.GradientTransformation:
    """(2) to (6). Optax's own factors the two largest dimensions, of which one may be the layers or the heads."""
    by_path = {leaf.path: leaf for leaf in leaves}

    def init(params: Any) -> FactoredState:
        states = [_zeros(by_path[key_path(key)]) for key, _ in jax.tree_util.tree_leaves_with_path(params)]
        return FactoredState(jnp.zeros((), jnp.int32), *_trees(jax.tree.structure(params), states))

    def update(gradients: Any, state: Any, params: Any = None) -> tuple[Any, FactoredState]:
        steps = optax.safe_increment(state.steps)
        decay = 1.0 - steps.astype(jnp.float32) ** -DECAY_EXPONENT
        moments = [jax.tree.leaves(tree) for tree in (state.v_row, state.v_col, state.v)]
        keyed = jax.tree_util.tree_leaves_with_path(gradients)
        owners = [by_path[key_path(key)] for key, _ in keyed]
        results = [_scaled(leaf, g, decay, eps, *old) for leaf, (_, g), *old in zip(owners, keyed, *moments)]
        updates, *new = _trees(jax.tree.structure(gradients), results)
        return updates, FactoredState(steps, *new)

    return optax.GradientTransformation(init, update)


def _trees(structure: Any, rows: Sequence[tuple]) -> list[Any]:
    """One tuple for every leaf -> one tree for every place of the tuples."""
    return [jax.tree.unflatten(structure, column) for column in zip(*rows)]


def _is_factored(leaf: Parameter) -> bool:
    return is_matrix(leaf) or (len(leaf.axes) > 1 and leaf.axes[0] == "vocab")


def _rows(leaf: Parameter) -> int:
    """How many of the named dimensions are a matrix's rows: the inputs, which come first. The residual stream is one
    dimension; heads and their width, or a convolution's window and channels, are several."""
    return 1 if leaf.axes[0] == "embed" else len(leaf.axes) - 1


def _zeros(leaf: Parameter) -> tuple[jax.Array, jax.Array, jax.Array]:
    """v_row, v_col, v at first."""
    none = jnp.zeros(())
    if not _is_factored(leaf):
        return none, none, jnp.zeros(leaf.shape)
    first = len(leaf.shape) - len(leaf.axes)
    cut = first + _rows(leaf)
    return jnp.zeros(leaf.shape[:cut]), jnp.zeros(leaf.shape[:first] + leaf.shape[cut:]), none


def _scaled(
    leaf: Parameter, gradient: jax.Array, decay: jax.Array, eps: float, row: jax.Array, column: jax.Array, v: jax.Array
) -> tuple[jax.Array, jax.Array, jax.Array, jax.Array]:
    """One leaf's update and new v_row, v_col, v."""
    square = jnp.square(gradient) + eps**2
    own = len(leaf.axes)
    if _is_factored(leaf):
        rows, columns = tuple(range(-own, _rows(leaf) - own)), tuple(range(_rows(leaf) - own, 0))
        row = decay * row + (1 - decay) * jnp.mean(square, columns)  # (3)
        column = decay * column + (1 - decay) * jnp.mean(square, rows)  # (4)
        whole = jnp.expand_dims(row, columns)
        # (5), root by root: products of small squares would underflow
        size = jnp.sqrt(whole / jnp.mean(whole, rows, keepdims=True)) * jnp.sqrt(jnp.expand_dims(column, rows))
    else:
        v = decay * v + (1 - decay) * square
        size = jnp.sqrt(v)
    update = gradient / size
    rms = jnp.sqrt(jnp.mean(jnp.square(update), tuple(range(-own, 0)), keepdims=True))
    return update / jnp.maximum(1.0, rms / UPDATE_LIMIT), row, column, v  # (6)


def _parameter_axes(path: str, shape: tuple[int, ...], parameter: Parameter) -> Names:
    """For states that have the shapes of the parameters."""
    return parameter.axes


def _factored_axes(path: str, shape: tuple[int, ...], parameter: Parameter) -> Names:
    """Row statistics have the axes of the rows, column statistics those of the columns."""
    rows = _rows(parameter)
    return parameter.axes[:rows] if "v_row" in path.split("/") else parameter.axes[rows:]


ALL_READ = (
    *("name", "lr", "schedule", "warmup_steps", "warmup_from", "weight_decay", "decayed"),
    *("clip", "accumulate", "skip_nonfinite"),
)

OPTIMIZERS: dict[str, Optimizer] = {
    "adamw": Optimizer(_adamw, (*ALL_READ, "b1", "b2", "eps"), _parameter_axes),
    "fairseq_adam": Optimizer(_fairseq_adam, (*ALL_READ, "b1", "b2", "eps"), _parameter_axes),
    "adafactor": Optimizer(_adafactor, (*ALL_READ, "eps"), _factored_axes),
}

NAME = "fairseq_adam: fairseq's Adam and clipping, which differ in where epsilons stand"
SCHEDULE = "after the warm-up; cosine ends at zero at total_steps, cosine_to_hundredth at lr / 100"
SKIPPED = "steps in a row whose gradient is not finite that are left out; one more of them ends the run"
DECAYED = "parameters with weight decay; matrices: without biases, scales and tables"


@dataclass(frozen=True)
class Optim:
    """Section `optim` of a config."""

    name: Annotated[str, Leaf(NAME, valid=one_of(OPTIMIZERS))] = "adamw"
    lr: Annotated[float, Leaf("learning rate", valid=at_least(0))] = 1e-4
    b1: Annotated[float, Leaf("decay of the first moment", valid=fraction())] = 0.9
    b2: Annotated[float, Leaf("decay of the second moment", valid=fraction())] = 0.999
    eps: Annotated[float, Leaf("added to the root of the second moment", valid=at_least(0))] = 1e-8
    weight_decay: Annotated[float, Leaf("decoupled: times the learning rate", valid=at_least(0))] = 0.0
    decayed: Annotated[str, Leaf(DECAYED, valid=one_of(("all", "matrices")))] = "all"
    schedule: Annotated[str, Leaf(SCHEDULE, valid=one_of(SCHEDULES))] = "constant"
    warmup_steps: Annotated[int, Leaf("linear warm-up to lr", valid=at_least(0, zero="none"))] = 0
    warmup_from: Annotated[float, Leaf("rate at step 0 of the warm-up", valid=at_least(0))] = 0.0
    decay_after_steps: Annotated[
        int, Leaf("inverse_sqrt: constant until then, counted with the warm-up", valid=at_least(0))
    ] = 0
    clip: Annotated[float, Leaf("global gradient norm", valid=at_least(0, zero="none"))] = 0.0
    accumulate: Annotated[int, Leaf("micro-batches per step", valid=at_least(1))] = 1
    skip_nonfinite: Annotated[int, Leaf(SKIPPED, valid=at_least(0, zero="none"))] = 0

    def unread(self) -> dict[str, str]:
        """The leaves that the chosen optimizer and schedule do not read, and why."""
        chosen = f"with optim.name = {self.name}, optim.schedule = {self.schedule}"
        return {name: chosen for name in options(Optim) if name not in reads(self)}


def reads(optim: Optim) -> tuple[str, ...]:
    """The fields that the chosen optimizer and schedule read."""
    return (*OPTIMIZERS[optim.name].reads, *_schedule_options(optim))


def _schedule_options(optim: Optim) -> dict[str, Any]:
    """The options of the schedule that the section has."""
    names = options(SCHEDULES[optim.schedule])
    return {name: getattr(optim, name) for name in names if name in options(Optim)}


def make(
    optim: Optim, total_steps: int, leaves: Sequence[Parameter]
) -> tuple[optax.GradientTransformation, optax.Schedule]:
    """The optimizer of a section, and its learning rate by the number of updates made before.

    Raises:
        UserError: a value that contradicts another.
    """
    for name, value in vars(optim).items():
        check(f"optim.{name}", options(Optim)[name], value)
    learning_rate = schedule(optim, total_steps)
    optimizer = OPTIMIZERS[optim.name].build(learning_rate, leaves, optim)
    if optim.skip_nonfinite:
        optimizer = optax.apply_if_finite(optimizer, optim.skip_nonfinite)
    return optimizer, learning_rate


def schedule(optim: Optim, total_steps: int) -> optax.Schedule:
    """Linear warm-up from `warmup_from` to `lr`, then the schedule that the section names."""
    if optim.warmup_from and not optim.warmup_steps:
        raise UserError(f"optim.warmup_from = {optim.warmup_from} has no effect without optim.warmup_steps")
    after = SCHEDULES[optim.schedule](optim.lr, total_steps, optim.warmup_steps, **_schedule_options(optim))
    if not optim.warmup_steps:
        return after
    warmup = optax.linear_schedule(optim.warmup_from, optim.lr, optim.warmup_steps)
    return optax.join_schedules([warmup, after], [optim.warmup_steps])
