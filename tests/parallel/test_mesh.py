import numpy as np
import pytest

from diffjax.errors import UserError
from diffjax.parallel.mesh import AXES, check_batch, check_processes, make_mesh


def test_minus_one_takes_the_rest():
    assert dict(make_mesh({"data": -1, "tensor": 2}).shape) == {"data": 4, "fsdp": 1, "tensor": 2}


@pytest.mark.parametrize(
    "sizes, words",
    [
        ({"data": 3}, "'data': 3.*does not fit the 8 devices"),
        ({"data": -1, "fsdp": -1}, "at most one is -1"),
        ({"data": 0}, "sizes are positive"),
        ({"rows": 8}, "unknown axes .*rows.*valid: data, fsdp, tensor"),
        ({"data": -1, "fsdp": 16}, "does not fit the 8 devices"),
    ],
)
def test_a_mesh_that_does_not_fit_is_an_error(sizes, words):
    with pytest.raises(UserError, match=words):
        make_mesh(sizes)


def test_batch_must_divide():
    mesh = make_mesh({"data": 4, "fsdp": 2})
    check_batch(16, mesh, microbatches=2)
    with pytest.raises(UserError, match="batch_size = 12 .* 4 x 2 x 1"):
        check_batch(12, mesh)
    with pytest.raises(UserError, match="4 x 2 x 2"):
        check_batch(24, mesh, microbatches=2)


class FakeDevice:
    def __init__(self, process_index):
        self.process_index = process_index


def test_processes_must_hold_different_parts_of_the_batch():
    devices = np.array([FakeDevice(i // 4) for i in range(8)])

    class FakeMesh:
        def __init__(self, *shape):
            self.devices, self.shape = devices.reshape(shape), dict(zip(AXES, shape))

    for shape in ((8, 1, 1), (2, 1, 4), (2, 2, 2), (1, 8, 1)):
        check_processes(FakeMesh(*shape))
    with pytest.raises(UserError, match="'tensor': 8.*several of the 2 processes"):
        check_processes(FakeMesh(1, 1, 8))
