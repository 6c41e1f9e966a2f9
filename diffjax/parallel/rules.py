"""Map logical axis names to mesh axes: one table per strategy for parameters, one for activations.

A model names the axes of its parameters (`embed`, `mlp`, `heads`, ...) in a table of path patterns and the axes of
its activations in calls of `constrain`; only this file knows the mesh. The names of a parameter are those of its
*last* dimensions: a stacked layer axis in front is never sharded, and the same patterns match the optimizer's and
the average's copies, whose paths end alike. A leaf of the optimizer's state that has another shape than its parameter
takes the names that the optimizer declares (`state_axes`); scalars are replicated.
"""

import functools
import math
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple, ParamSpec, TypeVar

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from diffjax.errors import UserError
from diffjax.parallel.mesh import BATCH_AXES

P = ParamSpec("P")
R = TypeVar("R")
Names = tuple[str | None, ...]
LogicalAxes = Sequence[tuple[str, Names]]


class Parameter(NamedTuple):
    """A leaf of the parameters: its path ("blocks/mlp/fc1/kernel"), shape, and the names of its last dimensions."""

    path: str
    shape: tuple[int, ...]
    axes: Names


# Names of the last dimensions of a leaf of the optimizer's state, from its path, its shape and its parameter.
StateAxes = Callable[[str, tuple[int, ...], Parameter], Names]

STRATEGIES: dict[str, dict[str, str]] = {
    "dp": {},
    "fsdp": {"embed": "fsdp", "channels": "fsdp"},
    "fsdp_tp": {"embed": "fsdp", "heads": "tensor", "mlp": "tensor", "channels": "tensor"},
}

ACTIVATIONS: dict[str, str | tuple[str, ...] | None] = {
    "batch": BATCH_AXES,
    "length": None,
    "embed": None,
    "heads": "tensor",
    "mlp": "tensor",
    "channels": "tensor",
}


def constrain(x: jax.Array, *names: str | None) -> jax.Array:
    """Fix the sharding of an activation by the names of its leading axes; without a mesh in context, nothing.

    Without these on block inputs and outputs and on the conditioning vector the partitioner gathers activations.
    A model called alone needs none; programs for a mesh are made with `on_mesh`, so that it cannot be forgotten.
    """
    if jax.sharding.get_abstract_mesh().empty:
        return x
    return jax.lax.with_sharding_constraint(x, PartitionSpec(*(ACTIVATIONS[name] if name else None for name in names)))


def on_mesh(function: Callable[P, R], mesh: Mesh) -> Callable[P, R]:
    """`function`, to be compiled: `constrain` and the others here see `mesh`, whatever is in context at the call."""

    @functools.wraps(function)
    def traced(*args: P.args, **kwargs: P.kwargs) -> R:
        with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
            return function(*args, **kwargs)

    return traced


def mesh_axes(**sizes: int) -> dict[str, tuple[str, ...]]:
    """For each named dimension of an activation the axes of the mesh in context that split it, by `ACTIVATIONS`.

    None without a mesh, inside another `shard_map`, and where they do not divide the size, as with the single example
    that a model is initialised with.
    """
    mesh = jax.sharding.get_abstract_mesh()
    found: dict[str, tuple[str, ...]] = dict.fromkeys(sizes, ())
    if mesh.empty or mesh.manual_axes:
        return found
    if mesh.explicit_axes:
        raise UserError(
            f"the mesh in context has explicit axes {mesh.explicit_axes}; valid: automatic axes, AxisType.Auto"
        )
    for name, size in sizes.items():
        axes = ACTIVATIONS[name] or ()
        for axis in (axes,) if isinstance(axes, str) else axes:
            parts = math.prod(mesh.shape[a] for a in found[name]) * mesh.shape.get(axis, 1)
            if mesh.shape.get(axis, 1) > 1 and size % parts == 0:
                found[name] += (axis,)
    return found


def per_device(
    function: Callable, axes: Mapping[str, tuple[str, ...]], in_names: Any, out_names: Any, whole: bool
) -> Callable:
    """`function`, run by every device on its own part of the arrays; without a mesh, `function` itself.

    Args:
        axes: from `mesh_axes`. in_names, out_names: trees of PartitionSpecs whose entries are its names.
        whole: where no axis splits anything, run it on every device nevertheless, as Pallas calls need; else
            `function` itself, and the compiler divides it.
    """
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty or mesh.manual_axes or not (whole or any(axes.values())):
        return function

    def specs(names: Any) -> Any:
        return jax.tree.map(lambda spec: PartitionSpec(*(axes[name] if name else None for name in spec)), names)

    # The check of varying axes has no rule for Pallas calls.
    return jax.shard_map(function, in_specs=specs(in_names), out_specs=specs(out_names), check_vma=False)


def sum_over_devices(tree: Any, axes: Mapping[str, tuple[str, ...]], names: Any) -> Any:
    """Inside `per_device`: sums every array over the mesh axes that its own names do not mention."""

    def total(spec: PartitionSpec, x: jax.Array) -> jax.Array:
        over = tuple(axis for name, split in axes.items() if name not in spec for axis in split)
        return jax.lax.psum(x.astype(jnp.float32), over).astype(x.dtype) if over else x

    return jax.tree.map(lambda spec, x: None if x is None else total(spec, x), names, tree)


def shardings(
    tree: Any,
    mesh: Mesh,
    strategy: str,
    axes: LogicalAxes,
    replicate_below: int,
    owners: Sequence[Parameter] = (),
    state_axes: StateAxes | None = None,
) -> Any:
    """A NamedSharding for every leaf of a tree of arrays or shapes (parameters, optimizer state, averages).

    Args:
        strategy: a key of `STRATEGIES`.
        axes: the model's table, path pattern -> names of the last dimensions; the first match counts.
        replicate_below: leaves of fewer bytes are kept whole on every device.
        owners, state_axes: the parameters, and the rule for leaves whose path ends in a parameter's but whose shape is
            another, such as row and column statistics.

    Raises:
        UserError: unknown strategy; a mesh axis the strategy leaves idle; a leaf that cannot be divided.
    """
    table = rule_table(mesh, strategy)
    by_path = {parameter.path: parameter for parameter in owners}

    def names(path: str, shape: tuple[int, ...]) -> Names:
        owner = _owner(path, by_path)
        if owner is None or owner.shape == shape or state_axes is None:
            return axis_names(path, shape, axes)
        return state_axes(path, shape, owner)

    def leaf_sharding(key: tuple, leaf: Any) -> NamedSharding:
        if leaf.ndim == 0:
            return NamedSharding(mesh, PartitionSpec())
        path = key_path(key)
        return NamedSharding(mesh, _leaf_spec(path, leaf, mesh, table, names(path, leaf.shape), replicate_below))

    return jax.tree_util.tree_map_with_path(leaf_sharding, tree)


def parameters(tree: Any, axes: LogicalAxes) -> tuple[Parameter, ...]:
    """The leaves of a tree of parameters or their shapes, named by the model's table. ValueError for one without a
    row."""
    leaves = [(key_path(key), tuple(leaf.shape)) for key, leaf in jax.tree_util.tree_leaves_with_path(tree)]
    return tuple(Parameter(path, shape, axis_names(path, shape, axes)) for path, shape in leaves)


def axis_names(path: str, shape: tuple[int, ...], axes: LogicalAxes) -> Names:
    """The axis names of a leaf's last dimensions, from the first matching row of the table; () for a scalar."""
    if not shape:
        return ()
    names = next((names for pattern, names in axes if re.search(pattern + "$", path)), None)
    if names is None:
        raise ValueError(f"no row of the model's table of logical axes matches {path} {shape}")
    return names


def _owner(path: str, parameters: Mapping[str, Parameter]) -> Parameter | None:
    """The parameter in whose path this one ends; of several the one with the longest path."""
    parts = path.split("/")
    ends = ("/".join(parts[start:]) for start in range(len(parts)))
    return next((parameters[end] for end in ends if end in parameters), None)


def rule_table(mesh: Mesh, strategy: str) -> dict[str, str]:
    """The strategy's table, checked against the mesh."""
    if strategy not in STRATEGIES:
        raise UserError(f"parallel.strategy = {strategy!r} is unknown; valid: {', '.join(STRATEGIES)}")
    table = STRATEGIES[strategy]
    for axis in ("fsdp", "tensor"):
        if mesh.shape[axis] > 1 and axis not in table.values():
            able = [name for name, rules in STRATEGIES.items() if axis in rules.values()]
            raise UserError(
                f"parallel.mesh gives axis {axis} {mesh.shape[axis]} devices, but parallel.strategy = {strategy!r} "
                f"shards nothing on it; use {' or '.join(able)}, or put the devices on data"
            )
    return table


def key_path(path: tuple) -> str:
    """`params/blocks/mlp/fc1/kernel` for a key path of `jax.tree_util`."""
    return jax.tree_util.keystr(path, simple=True, separator="/")


def _leaf_spec(
    path: str, leaf: Any, mesh: Mesh, table: dict[str, str], names: Names, replicate_below: int
) -> PartitionSpec:
    small = math.prod(leaf.shape) * leaf.dtype.itemsize < replicate_below
    spec: list[str | None] = [None] * (leaf.ndim - len(names))
    for name, size in zip(names, leaf.shape[-len(names) :]):
        mesh_axis = table.get(name) if name else None
        if mesh_axis in spec:
            mesh_axis = None  # a mesh axis divides one dimension: the first that asks for it
        if mesh_axis and size % mesh.shape[mesh_axis] and not (small and mesh_axis == "fsdp"):
            raise UserError(
                f"{path} {leaf.shape}: its {name} axis of {size} is not divisible by the {mesh.shape[mesh_axis]} "
                f"devices of mesh axis {mesh_axis}; choose parallel.mesh.{mesh_axis} among the divisors of {size}"
            )
        spec.append(mesh_axis)
    return PartitionSpec() if small else PartitionSpec(*spec)
