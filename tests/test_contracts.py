"""Conditions: what "none" is of each kind, and which plain values mean one."""

import numpy as np
import pytest

from diffjax import contracts
from diffjax.contracts import Batch, Condition
from diffjax.errors import UserError


@pytest.mark.parametrize(
    "condition, null",
    [
        (Condition("labels", 10), np.int32(10)),
        (Condition("tokens", 50, (3,)), np.int32([50, 50, 50])),
        (Condition("vectors", 0, (2,)), np.float32([0, 0])),
    ],
)
def test_null_and_blank_conditions(condition, null):
    found, blank = condition.null(), condition.blank(4)
    assert (found.shape, found.dtype) == (condition.shape, null.dtype) == (null.shape, condition.dtype)
    np.testing.assert_array_equal(found, null)
    assert (blank.shape, blank.dtype) == ((4, *condition.shape), null.dtype)
    assert not blank.any()


def test_conditions_by_plain_values():
    assert contracts.labels(0) is None
    assert contracts.labels(7) == contracts.condition("labels", 7, 0) == Condition("labels", 7)
    assert contracts.condition("labels", 0, 0) is None
    assert contracts.condition("tokens", 50, 3) == Condition("tokens", 50, (3,))
    assert contracts.condition("vectors", 0, 3) == Condition("vectors", 0, (3,))


@pytest.mark.parametrize(
    "values, match",
    [
        (("labels", 7, 3), "data.condition_size = 3: labels have none; valid: 0$"),
        (("tokens", 0, 3), "data.condition = 'tokens' with num_classes = 0, condition_size = 3: valid: tokens with"),
        (("tokens", 50, 0), "condition_size = 0: valid: .* above 0"),
        (("vectors", 0, 0), "condition_size = 0: valid: .* above 0"),
        (("vectors", 7, 3), "'vectors' with num_classes = 7.* vectors with num_classes = 0$"),
    ],
)
def test_values_that_contradict_each_other(values, match):
    with pytest.raises(UserError, match=match):
        contracts.condition(*values)


def test_a_batch_is_a_tree_of_its_arrays():
    import jax

    batch = Batch(np.zeros((2, 4, 4, 1)), np.zeros(2, np.int32), np.arange(2), {"image_depth": np.ones((2, 4, 4))})
    shapes = jax.tree.map(np.shape, batch)
    assert shapes == Batch((2, 4, 4, 1), (2,), (2,), {"image_depth": (2, 4, 4)})
    assert Batch(0, 0, 0).aux == {}
