"""TPUs that are not there: the libtpu package alone compiles for them."""

import math
import os
from typing import Any

import jax
import pytest
from jax.experimental import topologies
from jax.experimental.layout import Format, Layout
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from diffjax.parallel.mesh import make_mesh

os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")


def mesh(generation: str, **sizes: int) -> Mesh:
    """A mesh of chips of a 2x2 slice of `generation` ("v5e", "v6e"); skips the test where libtpu is not installed."""
    pytest.importorskip("libtpu", reason="NOTHING WAS COMPILED FOR TPU: libtpu is not installed (pip install jax[tpu])")
    devices = topologies.get_topology_desc(platform="tpu", topology_name=f"{generation}:2x2").devices
    return make_mesh(sizes, devices[: math.prod(sizes.values())])


def placed(mesh: Mesh, tree: Any, specs: Any = None) -> Any:
    """The shapes in `tree` as arguments that lie on `mesh`, split by a tree of PartitionSpecs or whole."""

    def place(x: Any, spec: PartitionSpec) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=NamedSharding(mesh, spec))

    return jax.tree.map(place, tree, jax.tree.map(lambda _: PartitionSpec(), tree) if specs is None else specs)


def in_order(tree: Any) -> Any:
    """The same arguments, laid out in memory in the order of their axes whatever the compiler would choose."""

    def place(x: Any) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=Format(Layout(tuple(range(len(x.shape)))), x.sharding))

    return jax.tree.map(place, tree)
