import jax
import pytest

from diffjax.errors import UserError
from diffjax.parallel.mesh import check_batch, make_mesh


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
    with pytest.raises(UserError, match="3 processes"):
        check_batch(16, make_mesh({}, jax.devices()[:1]), processes=3)
