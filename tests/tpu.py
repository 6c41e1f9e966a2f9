"""TPUs that are not there: topologies to compile for, with the libtpu package alone."""

import os

import jax
import numpy as np
import pytest
from jax.experimental import topologies
from jax.sharding import Mesh, NamedSharding, PartitionSpec

os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")


def mesh(generation: str, shape: tuple[int, ...] = (1,), names: tuple[str, ...] = ("data",)) -> Mesh:
    """A mesh over chips of a 2x2 slice of `generation` (v5e, v6e); skips the test where libtpu is not installed."""
    pytest.importorskip("libtpu", reason="NOT COMPILED FOR TPU: install libtpu (pip install 'jax[tpu]') to check it")
    topology = topologies.get_topology_desc(platform="tpu", topology_name=f"{generation}:2x2")
    return Mesh(np.array(topology.devices[: np.prod(shape)]).reshape(shape), names)


def placed(mesh: Mesh, tree, specs=PartitionSpec()):
    """Shapes of `tree` as arguments that lie on `mesh`; `specs` is one spec or a tree of them."""
    if isinstance(specs, PartitionSpec):
        specs = jax.tree.map(lambda _: specs, tree)
    place = lambda x, spec: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=NamedSharding(mesh, spec))  # noqa: E731
    return jax.tree.map(place, tree, specs)
