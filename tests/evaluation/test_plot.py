"""The plot: which points are on the front, round ticks, and that every point is drawn in its colour."""

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


def test_the_front_is_what_nothing_beats_on_both_axes():
    assert plot.pareto_front(POINTS) == [POINTS[0], POINTS[1], POINTS[4]]
    assert plot.pareto_front(POINTS[::-1]) == plot.pareto_front(POINTS)
    assert plot.pareto_front([]) == []


@pytest.mark.parametrize("low, high", [(0.31, 0.97), (-3.0, 12.0), (1e-5, 2e-5), (100.0, 101.0)])
def test_ticks_enclose_the_values_and_are_round(low, high):
    found = plot.ticks(low, high)
    assert found[0] <= low * (1 + 1e-9 * np.sign(low))
    assert found[-1] >= high * (1 - 1e-9 * np.sign(high))
    assert 3 <= len(found) <= 9
    np.testing.assert_allclose(np.diff(found), found[1] - found[0])


def test_ticks_of_a_logarithmic_axis():
    assert plot.log_ticks(18, 499) == [10, 20, 50, 100, 200, 500]
    assert plot.log_ticks(20, 20) == [20, 50]
    assert plot.log_ticks(0.7, 1.1) == [0.5, 1, 2]


@pytest.mark.parametrize("points", [POINTS, POINTS[:1]], ids=["several", "one"])
def test_every_series_and_the_front_are_drawn(points):
    picture = plot.scatter(points, "title", "evaluations", "score")
    assert (picture.dtype, picture.shape) == (np.uint8, (plot.HEIGHT, plot.WIDTH, 3))
    names = list(dict.fromkeys(point.series for point in points))
    for colour in plot.COLOURS[: len(names)]:
        assert (picture == np.array(colour, np.uint8)).all(axis=-1).sum() > 40  # a dot and the legend's
    unused = plot.COLOURS[len(names)]
    assert not (picture == np.array(unused, np.uint8)).all(axis=-1).any()


def test_many_series_repeat_their_colours():
    points = [Point(f"sampler {i}", 10 + i, 1.0 + i, str(i)) for i in range(12)]
    assert plot.scatter(points, "title", "x", "y").std() > 0
