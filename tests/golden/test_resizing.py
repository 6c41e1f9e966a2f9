"""What feature networks are fed, against stored outputs of Pillow, clean-fid and PyTorch; DINOv2's positions."""

import functools

import jax.numpy as jnp
import numpy as np
import pytest

from diffjax.data.resizing import pillow, pillow_float
from diffjax.errors import UserError
from diffjax.frozen import dinov2
from tests.golden.cases import ORACLES

pytestmark = pytest.mark.golden
FILE = ORACLES / "evaluation/resize_bicubic_and_pos_embed.npz"
SIDE = pytest.mark.parametrize("side", [256, 64])
CLEAN_FID = 299


@functools.cache
def arrays():
    with np.load(FILE) as file:
        return dict(file)


def image(side):
    return arrays()[f"resize_{side}_input"][None]


@SIDE
def test_pillow_to_the_bit(side):
    [found] = pillow(image(side), dinov2.SIDE)
    for name, part in {"topleft": found[:24, :24], "bottomright": found[-24:, -24:]}.items():
        np.testing.assert_array_equal(part, arrays()[f"resize_{side}_pil_uint8_{name}"], err_msg=name)


@SIDE
def test_clean_fid(side):
    [found] = pillow_float(image(side), CLEAN_FID)
    assert found.dtype == np.float32
    np.testing.assert_array_equal(found[:24, :24], arrays()[f"resize_{side}_clean_fid_299_topleft"])


@SIDE
def test_antialiased_bicubic_of_pytorch(side):
    """To float32's rounding of its positions: a millionth of the range."""
    [found] = pillow_float(image(side), dinov2.SIDE, limited=False)
    np.testing.assert_allclose(found[:24, :24], arrays()[f"resize_{side}_torch_antialias_topleft"], rtol=0, atol=255e-6)


@pytest.mark.parametrize("side", [16, 18])
def test_positions_of_dinov2(side):
    grid = arrays()["pos_embed_37x37"]
    table = np.concatenate([np.full((1, grid.shape[-1]), 7, np.float32), grid.reshape(-1, grid.shape[-1])])
    found = np.asarray(dinov2.interpolate(jnp.asarray(table), side, side))
    np.testing.assert_array_equal(found[0], 7)
    stored = arrays()[f"pos_embed_{side}x{side}"].reshape(side * side, -1)
    np.testing.assert_allclose(found[1:], stored, rtol=0, atol=1e-5)


def test_limits_and_filters():
    edges = np.zeros((1, 8, 8, 3), np.uint8)
    edges[:, :, 4:] = 255
    free = pillow_float(edges, 32, limited=False)
    assert free.min() < -1
    assert free.max() > 256
    for filter in ("bicubic", "bilinear", "box", "lanczos"):
        found = pillow_float(edges, 32, filter)
        assert 0 <= found.min() <= found.max() <= 255
        np.testing.assert_allclose(pillow(edges, 32, filter), found, rtol=0, atol=1.01)


def test_others_than_squares_are_squashed():
    wide = np.repeat(np.arange(6, dtype=np.uint8), 2)[None, None, :, None].repeat(4, 1).repeat(3, 3)
    np.testing.assert_array_equal(pillow(wide, 2, "box")[0, :, :, 0], [[1, 4], [1, 4]])
    np.testing.assert_array_equal(pillow_float(wide, 2, "box")[0, :, :, 0], [[1, 4], [1, 4]])


def test_what_is_refused():
    with pytest.raises(UserError, match="filter 'cubic' is unknown; valid: bicubic, bilinear, box, lanczos"):
        pillow(edges := np.zeros((1, 8, 8, 3), np.uint8), 4, "cubic")
    with pytest.raises(UserError, match=r"images are float32 .*; valid: uint8 \[n, h, w, 3\]"):
        pillow_float(edges.astype(np.float32), 4)
