"""The plot: which points are on the front, and that every series and the front are drawn and named."""

import importlib.util
import sys

import numpy as np
import pytest
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from diffjax.evaluation import plot
from diffjax.evaluation.plot import Point

POINTS = [
    Point("_a", 20, 2.0, "20"),
    Point("_a", 10, 3.0, "10"),
    Point("b", 20, 2.5, "20"),
    Point("b", 40, 2.0, "40"),
    Point("b", 100, 1.0, "100"),
]


@pytest.fixture
def drawn(monkeypatch):
    """(x, y) of the lines and the names in the legend that a plot was drawn with."""
    lines, names, of_axes, of_figure = [], [], Axes.plot, Figure.legend

    def spy_lines(self, x, y, *args, **options):
        lines.append((x, y))
        return of_axes(self, x, y, *args, **options)

    def spy_names(self, handles, labels, **options):
        names.extend(labels)
        return of_figure(self, handles, labels, **options)

    monkeypatch.setattr(Axes, "plot", spy_lines)
    monkeypatch.setattr(Figure, "legend", spy_names)
    return lines, names


def test_the_front_is_what_nothing_beats_on_both_axes():
    assert plot.pareto_front(POINTS) == [POINTS[1], POINTS[0], POINTS[4]]
    assert plot.pareto_front(POINTS[::-1]) == plot.pareto_front(POINTS)
    assert plot.pareto_front([]) == []


def test_every_series_and_the_front_are_drawn_and_named(drawn):
    picture = plot.scatter(POINTS, "title", "NFE", "score")
    assert (picture.dtype, picture.shape) == (np.uint8, (600, 960, 3))
    lines, names = drawn
    assert lines == [((10, 20), (3.0, 2.0)), ((20, 40, 100), (2.5, 2.0, 1.0)), ((10, 20, 100), (3.0, 2.0, 1.0))]
    assert names == ["_a", "b", "Pareto front"]


@pytest.mark.filterwarnings("error")
def test_long_names_leave_room_for_the_points():
    named = [point._replace(series=f"runs/{'long-' * 20}{point.series}") for point in POINTS]
    picture = plot.scatter(named, "title", "NFE", "score")
    blue = np.abs(picture.astype(int) - (31, 119, 180)).max(axis=-1) < 60
    assert np.ptp(np.flatnonzero(blue.any(axis=0))) > 200  # pixels from the first to the last point of its line


def test_a_single_point_is_its_own_front(drawn):
    plot.scatter(POINTS[:1], "title", "x", "y")
    assert drawn[0] == [((20,), (2.0,))] * 2


def test_what_is_missing_is_said(monkeypatch):
    assert plot.missing() is None
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert plot.missing() == "a plot needs matplotlib: pip install -e '.[plot]'"


def test_nothing_is_drawn_through_pyplot_which_keeps_figures(monkeypatch):
    monkeypatch.delitem(sys.modules, "matplotlib.pyplot", raising=False)
    plot.scatter(POINTS, "title", "NFE", "score")
    assert "matplotlib.pyplot" not in sys.modules
