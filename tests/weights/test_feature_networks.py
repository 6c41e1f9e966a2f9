"""The mappings of the feature networks of scores: published counts, layouts and wrong files in words."""

import jax
import numpy as np
import pytest

from diffjax.errors import UserError
from diffjax.frozen import create
from diffjax.weights import from_reference, to_reference

COUNTS = {
    "inception": ("Inception", 472, 23_885_392),
    "efficientnet_lite0": ("EfficientNetLite0", 296 - 49, 4_652_008 + 42_016),
}
FAMILY = pytest.mark.parametrize("family", COUNTS)


def state_dict(family):
    """Zeros in the layout of the public file, but a few numbers in order in a kernel that is not square."""
    module = create(COUNTS[family][0])
    shapes = jax.eval_shape(module.init, jax.random.key(0), np.zeros((1, 32, 32, 3), np.uint8))["params"]
    params = jax.tree.map(lambda leaf: np.zeros(leaf.shape, np.float32), shapes)
    return to_reference(family, module, params)


@FAMILY
def test_counts_of_the_published_file(family):
    _, arrays, numbers = COUNTS[family]
    weights = state_dict(family)
    assert len(weights) == arrays
    assert sum(value.size for value in weights.values()) == numbers


def test_rows_and_columns_of_a_kernel():
    weights = state_dict("inception")
    weights["Mixed_6b.branch7x7_2.conv.weight"][5, 7, 0, :] = np.arange(7)
    _, params = from_reference("inception", weights)
    kernel = params["Mixed_6b"]["branch7x7_2"]["conv"]["kernel"]
    assert kernel.shape == (1, 7, 128, 128)
    np.testing.assert_array_equal(kernel[0, :, 7, 5], np.arange(7))


def test_depthwise_kernels():
    weights = state_dict("efficientnet_lite0")
    weights["_blocks.3._depthwise_conv.weight"][9, 0, 1, 4] = 2
    _, params = from_reference("efficientnet_lite0", weights)
    kernel = params["block_3"]["depthwise"]["conv"]["kernel"]
    assert kernel.shape == (5, 5, 1, 144)
    assert kernel[1, 4, 0, 9] == 2


@FAMILY
def test_other_files_are_named_by_their_keys(family):
    weights = state_dict(family)
    name = next(key for key in weights if key.endswith("fc.bias"))
    wrong = {key: value for key, value in weights.items() if key != name} | {"AuxLogits.fc.weight": np.zeros((1, 1))}
    with pytest.raises(UserError, match=rf"unexpected keys: AuxLogits.fc.weight; missing keys: {name}"):
        from_reference(family, wrong)
    with pytest.raises(UserError, match=rf"wrong shapes: {name} is \(3\), expected \("):
        from_reference(family, weights | {name: np.zeros(3)})
    with pytest.raises(UserError, match=rf"{family} has no argument resize; valid: none"):
        from_reference(family, weights, resize="clean")


@FAMILY
@pytest.mark.parametrize("shape", [(2, 3, 32, 32), (2, 32, 32, 1), (32, 32, 3)])
def test_images_of_other_shapes_are_refused(family, shape):
    name = COUNTS[family][0]
    with pytest.raises(UserError, match=rf"{name}: images of shape .*; valid: \[b, h, w, 3\], of 0 .. 255"):
        jax.eval_shape(create(name).init, jax.random.key(0), np.zeros(shape, np.uint8))


def test_unknown_inputs():
    with pytest.raises(UserError, match="inputs = 'clean' is unknown; valid: tensorflow, pytorch-fid"):
        create("Inception", inputs="clean")
