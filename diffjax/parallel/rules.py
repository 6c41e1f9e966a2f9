"""From logical axis names to mesh axes: one table per strategy, for parameters; one for activations.

A model names the axes of its parameters (`embed`, `mlp`, `heads`, ...) in a table of path patterns and the axes of
its activations in calls of `constrain`; only this file knows the mesh. The names of a parameter are those of its
*last* dimensions: a stacked layer axis in front is never sharded, and the same patterns match the optimizer's and
the average's copies, whose paths end alike.
"""

import math
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from diffjax.errors import UserError
from diffjax.parallel.mesh import BATCH_AXES

LogicalAxes = Sequence[tuple[str, tuple[str | None, ...]]]

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
    """
    if jax.sharding.get_abstract_mesh().empty:
        return x
    return jax.lax.with_sharding_constraint(x, PartitionSpec(*(ACTIVATIONS[name] if name else None for name in names)))


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


def shardings(tree: Any, mesh: Mesh, strategy: str, axes: LogicalAxes, replicate_below: int) -> Any:
    """A NamedSharding for every leaf of a tree of arrays or shapes (parameters, optimizer state, averages).

    Args:
        strategy: a key of `STRATEGIES`.
        axes: the model's table, path pattern -> names of the last dimensions; the first match counts.
        replicate_below: leaves of fewer bytes are kept whole on every device.

    Raises:
        UserError: unknown strategy; a mesh axis the strategy leaves idle; a leaf that cannot be divided.
    """
    table = rule_table(mesh, strategy)

    def leaf_sharding(path: tuple, leaf: Any) -> NamedSharding:
        return NamedSharding(mesh, _leaf_spec(key_path(path), leaf, mesh, table, axes, replicate_below))

    return jax.tree_util.tree_map_with_path(leaf_sharding, tree)


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
    path: str, leaf: Any, mesh: Mesh, table: dict[str, str], axes: LogicalAxes, replicate_below: int
) -> PartitionSpec:
    if leaf.ndim == 0:
        return PartitionSpec()
    names = next((names for pattern, names in axes if re.search(pattern + "$", path)), None)
    if names is None:
        raise ValueError(f"no row of the model's table of logical axes matches {path} {leaf.shape}")
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
