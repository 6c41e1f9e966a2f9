"""Scatter plots drawn with Pillow: a logarithmic x axis, one colour per series, and the Pareto front."""

import itertools
import math
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import numpy as np
from PIL import Image, ImageDraw, ImageFont

WIDTH, HEIGHT = 960, 600
LEFT, TOP, BOTTOM = 84, 56, 72  # margins; the legend makes the right one
FINER = 3  # drawn larger by this, for smooth edges
INK, GREY, PALE = (34, 34, 34), (120, 120, 120), (228, 228, 228)
COLOURS = (  # told apart also with colour blindness, Okabe and Ito
    (0, 114, 178), (230, 159, 0), (0, 158, 115), (204, 121, 167), (86, 180, 233), (213, 94, 0), (150, 130, 40), INK
)  # fmt: skip


# Where a label may stand from its point: offsets, and which part of its width lies to the left.
SIDES = ((12, -6, 0.0), (-12, -6, 1.0), (0, -24, 0.5), (0, 12, 0.5), (9, -20, 0.0), (9, 8, 0.0), (-9, -20, 1.0))

Colour = tuple[int, int, int]


class Point(NamedTuple):
    series: str
    x: float
    y: float
    label: str


def pareto_front(points: Sequence[Point]) -> list[Point]:
    """The points that no other beats with as little x and as little y, by rising x."""
    front: list[Point] = []
    for point in sorted(points, key=lambda p: (p.x, p.y)):
        if not front or point.y < front[-1].y:
            front.append(point)
    return front


def ticks(low: float, high: float, count: int = 6) -> list[float]:
    """About `count` round numbers from `low` or below to `high` or above, evenly spaced."""
    rough = max(high - low, 1e-12) / count
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(factor * power for factor in (1, 2, 5, 10) if factor * power >= rough * 0.999)
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    return [i * step for i in range(first, last + 1)]


def log_ticks(low: float, high: float) -> list[float]:
    """1, 2 and 5 times the powers of ten, as many as enclose low and high (both above 0)."""
    every = [
        f * 10.0**e for e in range(math.floor(math.log10(low)) - 1, math.ceil(math.log10(high)) + 1) for f in (1, 2, 5)
    ]
    first = max(i for i, tick in enumerate(every) if tick <= low * 1.001)
    last = min(i for i, tick in enumerate(every) if tick >= high * 0.999)
    return every[first : max(last, first + 1) + 1]


def scatter(points: Sequence[Point], title: str, x_name: str, y_name: str) -> np.ndarray:
    """A picture uint8 [600, 960, 3] of the points, of which less is better on both axes; x is above 0."""
    colours = dict(zip(dict.fromkeys(point.series for point in points), itertools.cycle(COLOURS)))
    canvas = Canvas(right=60 + max(text_width(name) for name in [*colours, "Pareto front"]))
    xs, ys = [point.x for point in points], [point.y for point in points]
    room = 0.04 * (max(ys) - min(ys)) or 0.1 * abs(ys[0]) or 1.0
    x_ticks, y_ticks = log_ticks(min(xs) / 1.1, max(xs) * 1.1), ticks(min(ys) - room, max(ys) + room)
    place = canvas.axes(x_ticks, y_ticks, title, x_name, y_name)
    front = pareto_front(points)
    lines = {name: sorted(place(point) for point in points if point.series == name) for name in colours}
    for name, line in lines.items():
        canvas.line(line, _paler(colours[name]))
    lines["front"] = [place(point) for point in front]
    canvas.line(lines["front"], INK, dash=5)
    for point in points:
        canvas.dot(place(point), colours[point.series], ringed=point in front)
    canvas.labels([(place(point), point.label) for point in points], list(lines.values()))
    canvas.legend(colours)
    return canvas.pixels()


def _paler(colour: Colour) -> Colour:
    r, g, b = ((value + 255) // 2 for value in colour)
    return r, g, b


def _font(size: float) -> ImageFont.FreeTypeFont:
    font = ImageFont.load_default(size)
    assert isinstance(font, ImageFont.FreeTypeFont)  # as Pillow is built everywhere
    return font


def text_width(text: str, size: float = 14) -> int:
    return math.ceil(_font(size).getlength(text))


Place = tuple[float, float]  # pixels from the upper left corner


class Canvas:
    """The picture while it is drawn, in units of its final pixels."""

    def __init__(self, right: int):
        self._image = Image.new("RGB", (WIDTH * FINER, HEIGHT * FINER), "white")
        self._draw = ImageDraw.Draw(self._image)
        self._box = (LEFT, TOP, WIDTH - right, HEIGHT - BOTTOM)

    def axes(
        self, x_ticks: list[float], y_ticks: list[float], title: str, x_name: str, y_name: str
    ) -> Callable[[Point], Place]:
        """Draws them; where a point goes."""
        left, top, right, bottom = self._box

        def across(x: float) -> float:
            low, high = math.log(x_ticks[0]), math.log(x_ticks[-1])
            return left + (right - left) * (math.log(x) - low) / (high - low)

        def up(y: float) -> float:
            return bottom - (bottom - top) * (y - y_ticks[0]) / (y_ticks[-1] - y_ticks[0])

        for tick in x_ticks:
            self.line([(across(tick), top), (across(tick), bottom)], PALE)
            self.text((across(tick), bottom + 8), f"{tick:g}", "ma", GREY)
        for tick in y_ticks:
            self.line([(left, up(tick)), (right, up(tick))], PALE)
            self.text((left - 8, up(tick)), f"{tick:.6g}", "rm", GREY)
        self.line([(left, top), (left, bottom), (right, bottom)], INK)
        self.text((left, 18), title, "la", size=18)
        self.text(((left + right) / 2, HEIGHT - 34), x_name, "ma")
        self._upright((16, (top + bottom) / 2), y_name)
        return lambda point: (across(point.x), up(point.y))

    def line(self, places: Sequence[Place], colour: Colour, dash: float = 0) -> None:
        for (x0, y0), (x1, y1) in itertools.pairwise(places):
            count = max(1, round(math.hypot(x1 - x0, y1 - y0) / (2 * dash))) if dash else 1
            for i in range(count):
                a, b = i / count, (i + (0.5 if dash else 1)) / count
                ends = [x0 + a * (x1 - x0), y0 + a * (y1 - y0), x0 + b * (x1 - x0), y0 + b * (y1 - y0)]
                self._draw.line([FINER * value for value in ends], fill=colour, width=round(1.3 * FINER))

    def dot(self, place: Place, colour: Colour, ringed: bool) -> None:
        """A disc; on the Pareto front with a ring around it."""
        if ringed:
            self._draw.circle(self._finer(place), 9 * FINER, fill="white", outline=INK, width=round(1.6 * FINER))
        self._draw.circle(self._finer(place), 5 * FINER, fill=colour)

    def labels(self, labels: Sequence[tuple[Place, str]], lines: Sequence[Sequence[Place]]) -> None:
        """Draw the labels of points, on the side with the least overlap with other labels and lines."""
        taken = [(x - 9, y - 9, x + 9, y + 9) for (x, y), _ in labels]
        taken += [(x - 1, y - 1, x + 1, y + 1) for line in lines for x, y in _spaced(line)]
        for (x, y), text in labels:
            width = text_width(text, 12)
            corners = [(x + dx - shift * width, y + dy) for dx, dy, shift in SIDES]
            boxes = [(a, b, a + width, b + 12) for a, b in corners]
            best = min(boxes, key=lambda box: sum(_overlap(box, other) for other in taken))
            taken.append(best)
            self.text((best[0], best[1] + 6), text, "lm", size=12)

    def legend(self, colours: Mapping[str, Colour]) -> None:
        x, y = self._box[2] + 24, self._box[1] + 10
        for i, (name, colour) in enumerate(colours.items()):
            self.dot((x, y + 24 * i), colour, ringed=False)
            self.text((x + 16, y + 24 * i), name, "lm")
        last = y + 24 * len(colours)
        self.dot((x, last), (255, 255, 255), ringed=True)
        self.text((x + 16, last), "Pareto front", "lm")

    def text(self, place: Place, text: str, anchor: str, colour: Colour = INK, size: float = 14) -> None:
        self._draw.text(self._finer(place), text, fill=colour, font=_font(size * FINER), anchor=anchor)

    def _upright(self, place: Place, text: str) -> None:
        """Text that is read from below, centred at the place."""
        width, height = text_width(text) * FINER, 20 * FINER
        line = Image.new("RGB", (width, height), "white")
        ImageDraw.Draw(line).text((width / 2, height / 2), text, fill=INK, font=_font(14 * FINER), anchor="mm")
        x, y = self._finer(place)
        self._image.paste(line.rotate(90, expand=True), (round(x), round(y - width / 2)))

    def _finer(self, place: Place) -> tuple[float, float]:
        return place[0] * FINER, place[1] * FINER

    def pixels(self) -> np.ndarray:
        return np.asarray(self._image.resize((WIDTH, HEIGHT), Image.Resampling.LANCZOS))


def _spaced(line: Sequence[Place]) -> list[Place]:
    """Places about two pixels apart along a line."""
    found = []
    for (x0, y0), (x1, y1) in itertools.pairwise(line):
        parts = np.linspace(0, 1, 2 + round(math.hypot(x1 - x0, y1 - y0) / 2)).tolist()
        found += [(x0 + part * (x1 - x0), y0 + part * (y1 - y0)) for part in parts]
    return found


def _overlap(a: tuple[float, float, float, float], b: tuple[float, float, float, float]) -> float:
    """The area that two boxes share."""
    width, height = min(a[2], b[2]) - max(a[0], b[0]), min(a[3], b[3]) - max(a[1], b[1])
    return max(width, 0.0) * max(height, 0.0)
