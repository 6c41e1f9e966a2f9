"""What the golden test of the augmentation cannot see: its draws, other shapes, and what an image depends on."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from diffjax import rng
from diffjax.ops import augment
from diffjax.parallel.mesh import batch_sharding, make_mesh

P = 0.12
transform = jax.jit(augment.transform)
draw = jax.jit(lambda keys, probability: augment.gated(augment.draw(keys), probability))


def images(n, height, width, channels=3):
    return jax.random.uniform(jax.random.key(1), (n, height, width, channels), minval=-1)


def keys(n):
    return rng.per_example(jax.random.key(0), jnp.arange(n))


def draws(n, **fields):
    """Those of n images that stay as they are but for `fields`."""
    zero, pair = jnp.zeros(n), jnp.zeros((n, 2))
    none = augment.Draws(zero, zero, zero, zero, zero, zero, translation=pair, gates=jnp.zeros((n, 6)))
    return none._replace(**{name: jnp.asarray(value, jnp.float32) for name, value in fields.items()})


@pytest.mark.parametrize("height, width, channels", [(32, 32, 3), (8, 8, 1), (9, 16, 2)])
def test_nothing_drawn_changes_nothing(height, width, channels):
    x, none = images(2, height, width, channels), draws(2)
    np.testing.assert_allclose(transform(x, none), x, atol=5e-6)
    assert not augment.labels(none).any()


def test_at_probability_0_nothing_is_drawn():
    drawn = draw(keys(50), 0.0)
    for name in drawn._fields[:-1]:
        assert not getattr(drawn, name).any(), name


def test_mirrors_move_pixels_exactly():
    x = images(4, 6, 8)
    drawn = draws(4, xflip=[0, 1, 0, 1], yflip=[0, 0, 1, 1])
    expected = np.stack([x[0], x[1][:, ::-1], x[2][::-1], x[3][::-1, ::-1]])
    np.testing.assert_array_equal(augment.mirrored(x, drawn), expected)
    np.testing.assert_allclose(transform(x, drawn), expected, atol=5e-6)
    np.testing.assert_array_equal(augment.labels(drawn)[:, :2], [[0, 0], [1, 0], [0, 1], [1, 1]])


def test_whole_pixels_of_translation_move_the_image_mirrored_at_its_edges():
    """w is in eighths of a side, of the width in x and of the height in y: here 3 pixels right and 1 up."""
    x = images(2, 8, 16)
    found = transform(x, draws(2, translation=[[3 * 8 / 16, -1 * 8 / 8]] * 2))
    padded = np.pad(x, ((0, 0), (1, 1), (3, 3), (0, 0)), mode="reflect")
    np.testing.assert_allclose(found, padded[:, 2:, :16], atol=1e-5)


def test_far_outside_is_black():
    found = transform(images(1, 8, 8), draws(1, translation=[[-40.0, 0.0]]))
    assert np.isfinite(found).all()
    assert not found.any()


def test_draws_have_their_distributions():
    n = 20_000
    drawn = draw(keys(n), P)
    rates = {"xflip": 1 / 2, "yflip": P / 2, "scale": P, "rotation": P, "aniso": P, "translation": P, "axis": P / 2}
    for name, rate in rates.items():
        assert np.mean(np.asarray(getattr(drawn, name)) != 0) == pytest.approx(rate, abs=0.01), name
    geometry = np.stack([drawn.scale, drawn.rotation, drawn.aniso, drawn.translation[:, 0]], axis=-1) != 0
    assert np.mean(~geometry.any(axis=1)) == pytest.approx((1 - P) ** 4, abs=0.015)  # 60 %
    np.testing.assert_allclose(np.corrcoef(geometry.T), np.eye(4), atol=0.04)

    every = draw(keys(n), 1.0)
    told = np.asarray(augment.labels(every))
    normal = np.stack([every.scale, every.aniso, *every.translation.T])
    np.testing.assert_allclose(np.cov(normal), np.eye(4), atol=0.04)
    np.testing.assert_allclose(np.mean(told[:, 3:5], axis=0), [-1, 0], atol=0.03)  # all angles alike
    np.testing.assert_allclose(np.var(told[:, 3:5], axis=0), [0.5, 0.5], atol=0.02)


def test_an_image_depends_on_its_key_alone():
    """Not on its place, on the images beside it, or on the number of devices, which exchange nothing; one program."""
    x, k = images(16, 16, 16), keys(16)
    augmented = jax.jit(lambda *args: augment.augment(*args))  # not the program of another test
    found, told = augmented(x, k, 0.8)
    assert float(jnp.abs(found - x).max(axis=(1, 2, 3)).min()) > 0.1  # each changed, at this probability and root key
    order = np.random.default_rng(0).permutation(16)
    again, told_again = augmented(x[order] + 0.0, k[order], 0.8)
    np.testing.assert_array_equal(told_again, told[order])
    np.testing.assert_allclose(again, found[order], atol=1e-6)
    assert augmented._cache_size() == 1

    alone, told_alone = augmented(x[5:6], k[5:6], 0.8)
    np.testing.assert_array_equal(told_alone[0], told[5])
    np.testing.assert_allclose(alone[0], found[5], atol=5e-6)

    split = batch_sharding(make_mesh({"data": 8}))
    program = augmented.lower(jax.device_put(x, split), jax.device_put(k, split), 0.8).compile()
    for operation in ("all-gather", "all-reduce", "all-to-all", "collective-permute"):
        assert operation not in program.as_text()
    apart, told_apart = program(jax.device_put(x, split), jax.device_put(k, split), 0.8)
    assert apart.sharding.is_equivalent_to(split, 4)
    np.testing.assert_array_equal(told_apart, told)
    np.testing.assert_allclose(apart, found, atol=5e-6)
