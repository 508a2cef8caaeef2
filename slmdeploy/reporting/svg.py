"""Charts by hand: axes, marks and lines as one SVG element, with everything that a keyboard and a reader need.

ElementTree builds it, so text from artifacts is escaped wherever it lands. Colours and sizes of text are classes of
page.css, which is how one drawing serves light, dark, paper and a phone; a series has a colour and a shape, so that no
colour has to be told from another. Marks carry their sentence in ``aria-label``; page.js shows it and moves between
them. Knows nothing of metrics.
"""

import math
import xml.etree.ElementTree as ET
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal

WIDTH, HEIGHT = 480.0, 340.0
LEFT, RIGHT, TOP, BOTTOM = 74.0, 14.0, 16.0, 58.0
_RADIUS = 5.0
SERIES = 7
"""Colours in page.css beside the baseline's."""
_CORNERS = {
    "square": ((-0.89, -0.89), (0.89, -0.89), (0.89, 0.89), (-0.89, 0.89)),
    "triangle": ((0.0, -1.3), (1.2, 0.85), (-1.2, 0.85)),
    "diamond": ((0.0, -1.3), (1.2, 0.0), (0.0, 1.3), (-1.2, 0.0)),
    "drop": ((0.0, 1.3), (1.2, -0.85), (-1.2, -0.85)),
    "cross": (
        (0.42, -1.25), (0.42, -0.42), (1.25, -0.42), (1.25, 0.42), (0.42, 0.42), (0.42, 1.25),
        (-0.42, 1.25), (-0.42, 0.42), (-1.25, 0.42), (-1.25, -0.42), (-0.42, -0.42), (-0.42, -1.25),
    ),
    "hourglass": ((-1.0, -1.2), (1.0, -1.2), (0.2, 0.0), (1.0, 1.2), (-1.0, 1.2), (-0.2, 0.0)),
}  # fmt: skip
_SHAPES = ("circle", *_CORNERS)

Kind = Literal["linear", "log", "percentile"]


@dataclass(frozen=True)
class Axis:
    """A range of values on a line from 0 to 1. ``percentile`` stretches towards 100 %: each nine is one step."""

    label: str
    low: float
    high: float
    kind: Kind = "linear"

    def place(self, value: float) -> float:
        """Where a value is: 0 at the low end, 1 at the high end."""
        low, high, here = (self._bend(end) for end in (self.low, self.high, value))
        return (here - low) / (high - low)

    def _bend(self, value: float) -> float:
        if self.kind == "log":
            return math.log10(value)
        return -math.log10(1 - value / 100) if self.kind == "percentile" else value

    def holds(self, value: float) -> bool:
        """Whether a value is in the picture."""
        return self.low <= value <= self.high

    def ticks(self) -> list[float]:
        """Round values within the range, at most seven."""
        if self.kind == "percentile":
            return [value for value in (0.0, 50.0, 90.0, 99.0, 99.9) if self.low <= value <= self.high]
        return _log_ticks(self.low, self.high) if self.kind == "log" else _linear_ticks(self.low, self.high)

    def named_ticks(self) -> list[tuple[float, str]]:
        """The ticks with what is written at them: as many decimals as tell one from the next."""
        ticks = self.ticks()
        names = [_tick(value) for value in ticks]
        if len(set(names)) < len(names) or (self.kind == "linear" and len(ticks) > 1):
            places = max(0, -math.floor(math.log10(ticks[1] - ticks[0])))
            names = [f"{value:,.{places}f}" for value in ticks]
        return list(zip(ticks, names, strict=True))


def _linear_ticks(low: float, high: float, most: int = 6) -> list[float]:
    rough = (high - low) / most
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(power * factor for factor in (1, 2, 5, 10) if power * factor >= rough)
    return [round(at * step, 12) for at in range(math.ceil(low / step), math.floor(high / step) + 1)]


def _log_ticks(low: float, high: float) -> list[float]:
    decades = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    for factors in ((1, 1.5, 2, 3, 5, 7), (1, 2, 5), (1, 3), (1,)):
        ticks = [f * 10.0**d for d in decades for f in factors if low <= f * 10.0**d <= high]
        if len(ticks) <= 7:
            break
    return ticks if len(ticks) >= 2 else _linear_ticks(low, high)


def axis(label: str, values: Sequence[float], kind: Kind = "linear", room: float = 0.08) -> Axis:
    """An axis that holds ``values`` with some room at both ends; a log axis where any is 0 or less becomes linear."""
    low, high = min(values), max(values)
    if kind == "log" and low > 0:
        margin = max((high / low) ** room, 1.05)
        return Axis(label, low / margin, high * margin, "log")
    margin = (high - low) * room or abs(high) * room or 1.0
    return Axis(label, low - margin, high + margin)


@dataclass
class Plot:
    """One chart under construction: made with its axes and a sentence that says what it shows; `xml` ends it."""

    says: str
    x: Axis
    y: Axis
    root: ET.Element = field(init=False)
    _taken: list[tuple[float, float, float, float]] = field(init=False, default_factory=list)

    def __post_init__(self) -> None:
        box = f"0 0 {WIDTH:g} {HEIGHT:g}"
        self.root = ET.Element("svg", {"viewBox": box, "role": "group", "aria-label": self.says, "class": "chart"})
        self._grid()

    def at(self, x: float, y: float) -> tuple[float, float]:
        """Values to coordinates."""
        across, up = self.x.place(x), self.y.place(y)
        return LEFT + across * (WIDTH - LEFT - RIGHT), TOP + (1 - up) * (HEIGHT - TOP - BOTTOM)

    def _grid(self) -> None:
        group = ET.SubElement(self.root, "g", {"class": "grid", "aria-hidden": "true"})
        bottom, right = HEIGHT - BOTTOM, WIDTH - RIGHT
        for value, words in self.x.named_ticks():
            here = self.at(value, self.y.low)[0]
            _line(group, here, TOP, here, bottom)
            text(group, here, bottom + 19, words, "tick middle")
        for value, words in self.y.named_ticks():
            here = self.at(self.x.low, value)[1]
            _line(group, LEFT, here, right, here)
            text(group, LEFT - 8, here + 4, words, "tick end")
        text(group, (LEFT + right) / 2, HEIGHT - 10, self.x.label, "axis middle")
        turn = f"rotate(-90 16 {(TOP + bottom) / 2:g})"
        text(group, 16, (TOP + bottom) / 2, self.y.label, "axis middle").set("transform", turn)

    def mark(
        self, x: float, y: float, series: int, says: str, *, hollow: bool = False, area: float = 1.0, ring: bool = False
    ) -> None:
        """A point that can be focused. ``area`` 1 is usual, ``hollow`` is an estimate, ``ring`` the chosen one."""
        across, up = self.at(x, y)
        radius = _RADIUS * math.sqrt(area)
        names = f"mark {css(series)}" + (" hollow" if hollow else "")
        place = {"transform": f"translate({across:.1f} {up:.1f})", "data-series": str(series)}
        group = ET.SubElement(
            self.root, "g", {"class": names, "role": "img", "aria-label": says, "tabindex": "-1", **place}
        )
        if ring:
            ET.SubElement(group, "circle", {"class": "ring", "r": f"{radius + 5:.1f}"})
        ET.SubElement(group, "circle", {"class": "hit", "r": f"{max(radius, 12):.1f}"})
        ET.SubElement(group, "path", {"d": shape(series, radius)})
        self._taken.append((across - radius, up - radius, across + radius, up + radius))

    def line(self, points: Sequence[tuple[float, float]], series: int, *, dashed: bool = False) -> None:
        """A line of a series through ``points``, in values."""
        way = " ".join(f"{x:.1f},{y:.1f}" for x, y in (self.at(*point) for point in points))
        names = f"line {css(series)}" + (" dashed" if dashed else "")
        ET.SubElement(self.root, "polyline", {"class": names, "points": way, "data-series": str(series)})

    def whisker(self, x: float, low: float, high: float, series: int) -> None:
        """An interval of y at one x."""
        (across, bottom), (_, top) = self.at(x, low), self.at(x, high)
        _line(self.root, across, top, across, bottom, f"whisker {css(series)}").set("data-series", str(series))

    def path(self, points: Sequence[tuple[float, float]], name: str) -> None:
        """A line that belongs to no series: a front."""
        way = " ".join(f"{x:.1f},{y:.1f}" for x, y in (self.at(*point) for point in points))
        ET.SubElement(self.root, "polyline", {"class": name, "points": way, "aria-hidden": "true"})

    def limit(self, which: str, value: float, beyond: str, label: str) -> None:
        """A limit on "x" or "y" as a line, with the side that is outside of it, "above" or "below", shaded."""
        scale = self.x if which == "x" else self.y
        here = min(1.0, max(0.0, scale.place(value)))
        start, end = (here, 1.0) if beyond == "above" else (0.0, here)
        width, height = WIDTH - LEFT - RIGHT, HEIGHT - TOP - BOTTOM
        if which == "x":
            left, top, wide, high = LEFT + start * width, TOP, (end - start) * width, height
        else:
            left, top, wide, high = LEFT, TOP + (1 - end) * height, width, (end - start) * height
        box = {"x": left, "y": top, "width": wide, "height": high}
        group = ET.SubElement(self.root, "g", {"class": "limit", "role": "img", "aria-label": label})
        ET.SubElement(group, "rect", {name: f"{size:.1f}" for name, size in box.items()})
        if not 0 < here < 1:
            return
        if which == "x":
            across = LEFT + here * width
            _line(group, across, TOP, across, TOP + height)
        else:
            up = TOP + (1 - here) * height
            _line(group, LEFT, up, LEFT + width, up)

    def name(self, x: float, y: float, series: int, words: str, *, area: float = 1.0) -> None:
        """A name beside a point of ``area``, on the first side where it covers nothing; left out where none is."""
        across, up = self.at(x, y)
        wide, away = 8.2 * len(words), _RADIUS * math.sqrt(area) + 7
        for side, dx, dy in (("start", away, 4), ("end", -away, 4), ("middle", 0, -away), ("middle", 0, away + 11)):
            left = across + dx - {"start": 0.0, "end": wide, "middle": wide / 2}[side]
            box = (left, up + dy - 13, left + wide, up + dy + 3)
            inside = box[0] >= LEFT and box[2] <= WIDTH - RIGHT and box[1] >= TOP and box[3] <= HEIGHT - BOTTOM
            if inside and not any(_overlap(box, other) for other in self._taken):
                text(self.root, across + dx, up + dy, words, f"name {side}").set("data-series", str(series))
                self._taken.append(box)
                return

    def xml(self) -> str:
        """The SVG; its first mark is where Tab arrives."""
        first = self.root.find("g[@tabindex]")
        if first is not None:
            first.set("tabindex", "0")
        return ET.tostring(self.root, encoding="unicode")


def bars(says: str, entries: Sequence[tuple[str, float, str]], series: int, label: str) -> str:
    """Horizontal bars from 0: name, value and sentence of each, in the order given."""
    step, top = 34.0, 8.0
    height = top + step * len(entries) + 34
    root = ET.Element("svg", {"viewBox": f"0 0 {WIDTH:g} {height:g}", "role": "group", "aria-label": says})
    root.set("class", "chart")
    most = max(value for _, value, _ in entries) or 1.0
    for at, (words, value, sentence) in enumerate(entries):
        up, wide = top + step * at, max(2.0, value / most * (WIDTH - 100))
        place = {"class": f"mark bar {css(series)}", "role": "img", "aria-label": sentence, "data-series": str(series)}
        group = ET.SubElement(root, "g", {**place, "tabindex": "-1" if at else "0"})
        text(group, 0, up + 11, words, "name start")
        ET.SubElement(group, "rect", {"x": "0", "y": f"{up + 15:g}", "width": f"{wide:.1f}", "height": "10", "rx": "2"})
        text(group, wide + 8, up + 25, _tick(value), "tick start")
    text(root, 0, height - 8, label, "axis start")
    return ET.tostring(root, encoding="unicode")


def css(series: int) -> str:
    """The class of a series: its colour."""
    return "base" if series == 0 else f"s{(series - 1) % SERIES}"


def shape(series: int, radius: float) -> str:
    """The path of a series' mark around 0, 0; all have about the area of the circle of ``radius``."""
    r, kind = radius, _SHAPES[series % len(_SHAPES)]
    if kind == "circle":
        return f"M{-r:.2f} 0a{r:.2f} {r:.2f} 0 1 0 {2 * r:.2f} 0a{r:.2f} {r:.2f} 0 1 0 {-2 * r:.2f} 0z"
    return "M" + "L".join(f"{x * r:.1f} {y * r:.1f}" for x, y in _CORNERS[kind]) + "z"


def legend_mark(series: int, hollow: bool) -> str:
    """A series' mark alone, for the list of builds."""
    root = ET.Element("svg", {"viewBox": "-9 -9 18 18", "class": "key", "aria-hidden": "true"})
    group = ET.SubElement(root, "g", {"class": f"mark {css(series)}" + (" hollow" if hollow else "")})
    ET.SubElement(group, "path", {"d": shape(series, 5.5)})
    return ET.tostring(root, encoding="unicode")


def text(parent: ET.Element, x: float, y: float, words: str, name: str) -> ET.Element:
    """A text whose class says how it is set and which of its ends is at ``x``."""
    element = ET.SubElement(parent, "text", {"x": f"{x:.1f}", "y": f"{y:.1f}", "class": name})
    element.text = words
    return element


def _line(parent: ET.Element, x1: float, y1: float, x2: float, y2: float, name: str = "rule") -> ET.Element:
    ends = {"x1": x1, "y1": y1, "x2": x2, "y2": y2}
    return ET.SubElement(parent, "line", {"class": name, **{key: f"{value:.1f}" for key, value in ends.items()}})


def _overlap(one: tuple[float, float, float, float], other: tuple[float, float, float, float]) -> bool:
    return one[0] < other[2] and other[0] < one[2] and one[1] < other[3] and other[1] < one[3]


def _tick(value: float) -> str:
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.3g}"
