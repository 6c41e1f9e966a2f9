"""The device mesh: `data` and `fsdp` share the batch, `fsdp` and `tensor` share the parameters."""

from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from diffjax.errors import UserError

AXES = ("data", "fsdp", "tensor")
BATCH_AXES = ("data", "fsdp")


def make_mesh(sizes: Mapping[str, int], devices: Sequence[jax.Device] | None = None) -> Mesh:
    """A mesh with axes `AXES`; one size may be -1 and takes what is left of `devices` (default: all there are).

    Raises:
        UserError: unknown axis, or sizes that do not multiply to the number of devices.
    """
    present = jax.devices() if devices is None else list(devices)
    if unknown := set(sizes) - set(AXES):
        raise UserError(f"parallel.mesh has unknown axes {sorted(unknown)}; valid: {', '.join(AXES)}")
    shape = [sizes.get(axis, 1) for axis in AXES]
    if shape.count(-1) > 1 or any(size < 1 and size != -1 for size in shape):
        raise UserError(f"parallel.mesh = {dict(zip(AXES, shape))}: sizes are positive, at most one is -1 (the rest)")
    if -1 in shape:
        known = int(np.prod([size for size in shape if size != -1]))
        shape[shape.index(-1)] = max(len(present) // known, 1)
    if np.prod(shape) != len(present):
        raise UserError(f"parallel.mesh = {dict(zip(AXES, shape))} does not fit the {len(present)} devices present")
    axis_types = (AxisType.Auto,) * len(AXES)
    if devices is None:
        return jax.make_mesh(shape, AXES, axis_types=axis_types)  # neighbouring chips along the inner axes
    return Mesh(np.asarray(present).reshape(shape), AXES, axis_types=axis_types)


def platform() -> str:
    """The platform that a program traced now is for: "cpu", "tpu" or "gpu".

    That of the mesh in context (`jax.set_mesh`), which can be another than this machine's when a program is only
    compiled here; else of jax's default device, else of its default backend.
    """
    config: Any = jax.config
    device = jax.sharding.get_abstract_mesh().abstract_device or config.jax_default_device
    name = jax.default_backend() if device is None else getattr(device, "platform", str(device).split(":")[0])
    return "gpu" if name in ("cuda", "rocm") else name


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """The leading axis split over `BATCH_AXES`, everything else whole."""
    return NamedSharding(mesh, PartitionSpec(BATCH_AXES))


def replicated(mesh: Mesh) -> NamedSharding:
    return NamedSharding(mesh, PartitionSpec())


def check_batch(batch_size: int, mesh: Mesh, microbatches: int = 1) -> None:
    """Raise UserError unless every device gets the same whole number of examples of every micro-batch."""
    shards = mesh.shape["data"] * mesh.shape["fsdp"]
    if batch_size < 1 or batch_size % (shards * microbatches):
        raise UserError(
            f"batch_size = {batch_size} is not divisible by data x fsdp x optim.accumulate = "
            f"{mesh.shape['data']} x {mesh.shape['fsdp']} x {microbatches}"
        )


def check_processes(mesh: Mesh) -> None:
    """Raise UserError unless the processes hold different parts of the batch, equally many each.

    Every process reads its own examples, so two that share a part (a tensor axis over both) would fill it differently.
    """
    parts: dict[int, set[tuple[int, int]]] = {}
    for (data, fsdp, _), device in np.ndenumerate(mesh.devices):
        parts.setdefault(device.process_index, set()).add((data, fsdp))
    if sum(map(len, parts.values())) != mesh.shape["data"] * mesh.shape["fsdp"] or len({*map(len, parts.values())}) > 1:
        raise UserError(
            f"parallel.mesh = {dict(mesh.shape)} spreads its tensor axis over several of the {len(parts)} processes; "
            "parallel.mesh.tensor must divide the devices of one process"
        )
