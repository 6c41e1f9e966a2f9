"""Linear probes: what they learn, that one block does not know of the others, and that they repeat."""

import jax
import numpy as np
import pytest

from diffjax.errors import UserError
from diffjax.evaluation import linear_probe
from diffjax.parallel.mesh import make_mesh

CLASSES = 5


@pytest.fixture
def mesh():
    return make_mesh({"data": -1})


def clusters(n: int, blocks: int = 3, d: int = 6, noise: float = 0.1) -> tuple[np.ndarray, np.ndarray]:
    """Features [n, blocks, d] around one centre per class and block, and labels [n]."""
    generator = np.random.default_rng(0)
    labels = generator.integers(CLASSES, size=n)
    centres = generator.standard_normal((CLASSES, blocks, d))
    features = centres[labels] + noise * generator.standard_normal((n, blocks, d))
    return features.astype(np.float32), labels


def test_separable_classes_are_told_apart_also_of_new_examples(mesh):
    features, labels = clusters(400)
    probe = linear_probe.fit(features[:200], labels[:200], CLASSES, mesh, steps=200, batch_size=64)
    assert [leaf.shape for leaf in probe] == [(3, 6, CLASSES), (3, CLASSES)]
    assert {leaf.dtype for leaf in probe} == {np.dtype(np.float32)}
    np.testing.assert_array_equal(linear_probe.accuracy(probe, features[200:], labels[200:]), 1.0)


def test_a_block_without_information_is_at_chance(mesh):
    features, labels = clusters(2000)
    features[:, 1] = np.random.default_rng(1).standard_normal(features[:, 1].shape)
    probe = linear_probe.fit(features[:1000], labels[:1000], CLASSES, mesh, steps=100, batch_size=64)
    accuracy = linear_probe.accuracy(probe, features[1000:], labels[1000:])
    assert accuracy[0] == accuracy[2] == 1
    assert accuracy[1] == pytest.approx(1 / CLASSES, abs=0.06)


def test_all_blocks_at_once_are_those_one_by_one(mesh):
    features, labels = clusters(100, noise=1.0)
    settings = {"steps": 30, "batch_size": 32}
    together = linear_probe.fit(features, labels, CLASSES, mesh, **settings)
    for block in range(3):
        alone = linear_probe.fit(features[:, block : block + 1], labels, CLASSES, mesh, **settings)
        for leaf, expected in zip(alone, together):
            np.testing.assert_allclose(leaf[0], expected[block], atol=1e-5)


def plain(features, labels, steps, batch_size, learning_rate, seed):
    """The docstring's equations for one block, in float64."""
    n, d = features.shape
    order = linear_probe._order(seed, n, steps * batch_size).reshape(steps, batch_size)
    start = linear_probe._initial(seed, 1, d, CLASSES)
    probe = [np.float64(start.weights[0]), np.float64(start.bias[0])]
    velocity = [0.0, 0.0]
    for step, rows in enumerate(order):
        x, y = np.float64(features[rows]), np.eye(CLASSES)[labels[rows]]
        logits = x @ probe[0] + probe[1]
        p = np.exp(logits - logits.max(axis=1, keepdims=True))
        wrong = (p / p.sum(axis=1, keepdims=True) - y) / batch_size
        rate = learning_rate * (1 + np.cos(np.pi * step / steps)) / 2
        velocity = [0.9 * v + g for v, g in zip(velocity, (x.T @ wrong, wrong.sum(axis=0)))]
        probe = [w - rate * v for w, v in zip(probe, velocity)]
    return probe


def test_the_steps_are_those_of_the_equations_in_chunks_of_any_length(mesh, monkeypatch):
    features, labels = clusters(50, blocks=1, noise=1.0)
    settings = {"steps": 25, "batch_size": 16, "learning_rate": 0.3, "seed": 7}
    expected = plain(features[:, 0], labels, **settings)
    for chunk in (linear_probe.CHUNK, 4 * 16 * features[0].nbytes):
        monkeypatch.setattr(linear_probe, "CHUNK", chunk)
        for leaf, wanted in zip(linear_probe.fit(features, labels, CLASSES, mesh, **settings), expected):
            np.testing.assert_allclose(leaf[0], wanted, atol=1e-5)


def test_first_weights_and_order():
    start = linear_probe._initial(3, 2, 400, 50)
    np.testing.assert_array_equal(start.weights[0], start.weights[1])
    assert np.std(start.weights) == pytest.approx(0.01, rel=0.05)
    assert not start.bias.any()
    order = linear_probe._order(3, 7, 17)
    assert sorted(order[:7]) == sorted(order[7:14]) == list(range(7))
    assert list(order[:7]) != list(order[7:14])
    np.testing.assert_array_equal(order[:10], linear_probe._order(3, 7, 10))


def test_a_seed_gives_its_bits_and_the_devices_only_round():
    features, labels = clusters(100, noise=1.0)
    eight, one = make_mesh({"data": 4, "fsdp": 2}), make_mesh({"data": 1}, jax.devices()[:1])
    fit = lambda mesh, seed: linear_probe.fit(features, labels, CLASSES, mesh, steps=20, batch_size=32, seed=seed)  # noqa: E731
    first, again, alone, other = fit(eight, 0), fit(eight, 0), fit(one, 0), fit(eight, 1)
    for a, b, c, d in zip(first, again, alone, other):
        np.testing.assert_array_equal(a, b)
        np.testing.assert_allclose(a, c, atol=1e-5)
        assert np.abs(a - d).max() > 1e-3


REFUSED = {
    "shape": ({"features": np.zeros((10, 3), np.float32)}, "features (10, 3) and labels (10,); valid: [n, blocks, d]"),
    "count": ({"labels": np.zeros(9, np.int32)}, "features (10, 2, 3) and labels (9,)"),
    "label": ({"labels": np.full(10, CLASSES)}, "labels 5 to 5; valid: 0 to 4"),
    "nan": ({"features": np.full((10, 2, 3), np.nan, np.float32)}, "features hold values that are not finite"),
    "steps": ({"steps": 0}, "steps = 0"),
    "rate": ({"learning_rate": 0.0}, "learning rate 0.0; valid: 1 or more, and above 0"),
    "batch": ({"batch_size": 12}, "batch size 12 cannot be divided among 8 devices"),
    "diverges": ({"learning_rate": 1e38}, "diverged with learning rate 1e+38; give a smaller one"),
}


@pytest.mark.parametrize("change, reason", REFUSED.values(), ids=REFUSED)
def test_refusals(mesh, change, reason):
    given = {"features": np.ones((10, 2, 3), np.float32), "labels": np.arange(10) % CLASSES, "steps": 8} | change
    features, labels = given.pop("features"), given.pop("labels")
    with pytest.raises(UserError) as raised:
        linear_probe.fit(features, labels, CLASSES, mesh, **({"batch_size": 8} | given))
    assert reason in str(raised.value)
    assert "\n" not in str(raised.value)
