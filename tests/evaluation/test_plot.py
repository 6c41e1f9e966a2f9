"""The plot: which points are on the front, and that every point is drawn in the colour of its series."""

import importlib.util

import numpy as np
import pytest

from diffjax.evaluation import plot
from diffjax.evaluation.plot import Point

POINTS = [
    Point("a", 10, 3.0, "10"),
    Point("a", 20, 2.0, "20"),
    Point("b", 20, 2.5, "20"),
    Point("b", 40, 2.0, "40"),
    Point("b", 100, 1.0, "100"),
]


def colours(picture):
    return {tuple(colour) for colour in picture.reshape(-1, 3).tolist() if max(colour) - min(colour) > 60}


def test_the_front_is_what_nothing_beats_on_both_axes():
    assert plot.pareto_front(POINTS) == [POINTS[0], POINTS[1], POINTS[4]]
    assert plot.pareto_front(POINTS[::-1]) == plot.pareto_front(POINTS)
    assert plot.pareto_front([]) == []


def test_every_series_has_its_colour():
    one, two = (plot.scatter(points, "title", "NFE", "score") for points in (POINTS[:2], POINTS))
    assert (one.dtype, one.shape) == (np.uint8, (600, 960, 3))
    blue, orange = (lambda c: c[2] > c[0] + 60), (lambda c: c[0] > c[2] + 60)
    assert any(map(blue, colours(one)))
    assert not any(map(orange, colours(one)))
    assert any(map(blue, colours(two)))
    assert any(map(orange, colours(two)))


def test_a_single_point_can_be_drawn():
    assert plot.scatter(POINTS[:1], "title", "x", "y").std() > 0


def test_what_is_missing_is_said(monkeypatch):
    assert plot.missing() is None
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert plot.missing() == "a plot needs matplotlib: pip install -e '.[plot]'"


@pytest.fixture(autouse=True)
def no_state_of_matplotlib():
    """Nothing is drawn through pyplot, which keeps figures."""
    import sys

    yield
    assert "matplotlib.pyplot" not in sys.modules
