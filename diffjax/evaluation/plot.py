"""Plots by matplotlib (optional extra `plot`): scores against cost with their Pareto front, and a score over steps."""

import importlib.util
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np


class Point(NamedTuple):
    series: str
    x: float
    y: float
    label: str


def missing() -> str | None:
    """What to install before a plot can be drawn; None if nothing."""
    return None if importlib.util.find_spec("matplotlib") else "a plot needs matplotlib: pip install -e '.[plot]'"


def pareto_front(points: Sequence[Point]) -> list[Point]:
    """The points that no other beats with as little x and as little y, by rising x."""
    front: list[Point] = []
    for point in sorted(points, key=lambda p: (p.x, p.y)):
        if not front or point.y < front[-1].y:
            front.append(point)
    return front


def scatter(points: Sequence[Point], title: str, x_name: str, y_name: str) -> np.ndarray:
    """A picture uint8 [600, 960, 3] of the points, of which less is better on both axes; x is above 0."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.ticker import LogLocator, NullFormatter, StrMethodFormatter

    figure = Figure(figsize=(9.6, 6.0), dpi=100, layout="constrained")
    axes = figure.subplots()
    axes.set(title=title, xlabel=x_name, ylabel=y_name, xscale="log")
    axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axes.xaxis.set_major_formatter(StrMethodFormatter("{x:g}"))
    axes.xaxis.set_minor_formatter(NullFormatter())
    axes.grid(color="0.9")
    axes.set_axisbelow(True)
    axes.margins(0.08)
    lines = {}
    for name in dict.fromkeys(point.series for point in points):
        places = sorted((point.x, point.y) for point in points if point.series == name)
        [lines[name]] = axes.plot(*zip(*places), "o-", alpha=0.8)
    for point in points:
        axes.annotate(point.label, (point.x, point.y), (9, 5), textcoords="offset points", fontsize="small")
    front = [(point.x, point.y) for point in pareto_front(points)]
    [lines["Pareto front"]] = axes.plot(*zip(*front), "o:", color="black", fillstyle="none", markersize=13)
    columns = 1 if max(map(len, lines)) > 40 else 3
    figure.legend(list(lines.values()), list(lines), loc="outside lower left", ncols=columns, fontsize="small")
    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    return np.asarray(canvas.buffer_rgba())[..., :3]


def curve(points: Sequence[tuple[float, float]], title: str, x_name: str, y_name: str) -> np.ndarray:
    """A picture uint8 [450, 720, 3] of values over steps, the lowest one marked; the scale of y is logarithmic."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.ticker import LogLocator, NullFormatter, StrMethodFormatter

    figure = Figure(figsize=(7.2, 4.5), dpi=100, layout="constrained")
    axes = figure.subplots()
    axes.set(title=title, xlabel=x_name, ylabel=y_name)
    if min(y for _, y in points) > 0:
        axes.set_yscale("log")
        axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axes.yaxis.set_major_formatter(StrMethodFormatter("{x:g}"))
        axes.yaxis.set_minor_formatter(NullFormatter())
    axes.grid(color="0.9")
    axes.set_axisbelow(True)
    axes.plot(*zip(*points), "o-")
    x, y = min(points, key=lambda point: point[1])
    axes.plot([x], [y], "o", color="black", fillstyle="none", markersize=13)
    axes.margins(0.1)  # room for the words at either end
    axes.annotate(f"{y:.4g} at {x:g}", (x, y), (0, 12), textcoords="offset points", ha="center", fontsize="small")
    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    return np.asarray(canvas.buffer_rgba())[..., :3]
