"""Small charts as SVG text; colours are classes, so that one chart reads in light and in dark."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from html import escape

import numpy as np
from numpy.typing import ArrayLike

MARGIN_LEFT, MARGIN_RIGHT, MARGIN_TOP, MARGIN_BOTTOM = 58, 10, 10, 36
MOST_POINTS = 1000


@dataclass(frozen=True)
class Scale:
    """Values ``low`` to ``high`` on pixels ``start`` to ``end``.

    ``power`` below 1 draws the values ``sign(v) * |v| ** power`` apart, where most are small.
    """

    low: float
    high: float
    start: float
    end: float
    power: float = 1.0

    def __call__(self, value: float) -> float:
        low, high = self._bend(self.low), self._bend(self.high)
        ratio = (self._bend(value) - low) / (high - low) if high > low else 0.5
        return round(self.start + ratio * (self.end - self.start), 1)

    def _bend(self, value: float) -> float:
        return math.copysign(abs(value) ** self.power, value)


@dataclass
class Chart:
    """One pair of axes.

    Parameters
    ----------
    x_range, y_range : (float, float)
        Values at the ends of the axes.
    x_label, y_label : str
    width, height : int
        Pixels at natural size; the page scales it.
    percent : bool
        Whether the y axis shows ratios.
    x_power : float
        Power of the x axis; see `Scale`.
    """

    x_range: tuple[float, float]
    y_range: tuple[float, float]
    x_label: str
    y_label: str
    width: int = 360
    height: int = 220
    percent: bool = False
    x_power: float = 1.0
    parts: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.x = Scale(*self.x_range, MARGIN_LEFT, self.width - MARGIN_RIGHT, self.x_power)
        self.y = Scale(*self.y_range, self.height - MARGIN_BOTTOM, MARGIN_TOP)

    def line(self, xs: Sequence[float], ys: Sequence[float | None], kind: str) -> None:
        """A line through the points; a missing y leaves a gap."""
        pen, steps = "M", []
        for x, y in zip(xs, ys, strict=True):
            if y is None:
                pen = "M"
                continue
            steps.append(f"{pen}{self.x(x):g} {self.y(y):g}")
            pen = "L"
        self.parts.append(f'<path class="line {kind}" d="{"".join(steps)}"/>')

    def band(
        self, xs: Sequence[float], lows: Sequence[float], highs: Sequence[float], kind: str
    ) -> None:
        """The area between two lines."""
        upper = [f"{self.x(x):g} {self.y(y):g}" for x, y in zip(xs, highs, strict=True)]
        lower = [f"{self.x(x):g} {self.y(y):g}" for x, y in zip(xs, lows, strict=True)]
        path = "M" + "L".join([*upper, *reversed(lower)]) + "Z"
        self.parts.append(f'<path class="band {kind}" d="{path}"/>')

    def dots(self, xs: ArrayLike, ys: ArrayLike, kind: str) -> None:
        """Points, all in one path; of more than `MOST_POINTS`, evenly picked ones."""
        pairs = thin(np.stack([np.asarray(xs, dtype=float), np.asarray(ys, dtype=float)], 1))
        steps = "".join(f"M{self.x(x):g} {self.y(y):g}h0" for x, y in pairs)
        self.parts.append(f'<path class="dots {kind}" d="{steps}"/>')

    def hints(self, xs: Sequence[float], ys: Sequence[float | None], texts: Sequence[str]) -> None:
        """Invisible spots that say their text when pointed at."""
        for x, y, text in zip(xs, ys, texts, strict=True):
            if y is not None:
                self.parts.append(
                    f'<circle class="hint" cx="{self.x(x):g}" cy="{self.y(y):g}" r="5">'
                    f"<title>{escape(text)}</title></circle>"
                )

    def mark_x(self, value: float, kind: str, text: str = "") -> None:
        """A vertical line, with a word at its top."""
        x = self.x(value)
        self.parts.append(
            f'<path class="mark {kind}" d="M{x:g} {MARGIN_TOP}V{self.height - MARGIN_BOTTOM}"/>'
        )
        if text:
            left = x > self.width * 0.6
            at, anchor = (x - 4, "end") if left else (x + 4, "start")
            self.parts.append(
                f'<text class="word {kind}" x="{at:g}" y="{MARGIN_TOP + 9}" '
                f'text-anchor="{anchor}">{escape(text)}</text>'
            )

    def mark_y(self, value: float, kind: str) -> None:
        """A horizontal line."""
        end = self.width - MARGIN_RIGHT
        self.parts.append(f'<path class="mark {kind}" d="M{MARGIN_LEFT} {self.y(value):g}H{end}"/>')

    def render(self, label: str) -> str:
        """The chart as an ``<svg>`` element; ``label`` says in words what it shows."""
        return (
            f'<svg class="chart" viewBox="0 0 {self.width} {self.height}" role="img" '
            f'aria-label="{escape(label, quote=True)}">'
            f"{self._axes()}{''.join(self.parts)}</svg>"
        )

    def _axes(self) -> str:
        left, bottom = MARGIN_LEFT, self.height - MARGIN_BOTTOM
        right = self.width - MARGIN_RIGHT
        grid, words = [], []
        for value, text in label_ticks(*self.y_range, percent=self.percent):
            y = self.y(value)
            grid.append(f"M{left} {y:g}H{right}")
            words.append(f'<text x="{left - 6}" y="{y + 3.5:g}" text-anchor="end">{text}</text>')
        for value, text in label_ticks(*self.x_range):
            x = self.x(value)
            words.append(f'<text x="{x:g}" y="{bottom + 15}" text-anchor="middle">{text}</text>')
        middle = (MARGIN_TOP + bottom) / 2
        return (
            f'<path class="grid" d="{"".join(grid)}"/>'
            f'<path class="axis" d="M{left} {bottom}H{right}"/>{"".join(words)}'
            f'<text class="title" x="{(left + right) / 2:g}" y="{self.height - 5}" '
            f'text-anchor="middle">{escape(self.x_label)}</text>'
            f'<text class="title" x="12" y="{middle:g}" text-anchor="middle" '
            f'transform="rotate(-90 12 {middle:g})">{escape(self.y_label)}</text>'
        )


def label_ticks(low: float, high: float, percent: bool = False) -> list[tuple[float, str]]:
    """Round values within a range, with their text."""
    from matplotlib.ticker import MaxNLocator

    values = MaxNLocator(nbins=4, steps=[1, 2, 2.5, 5, 10]).tick_values(low, high)
    slack = 1e-9 * (high - low)
    inside = [float(v) + 0.0 for v in values if low - slack <= v <= high + slack]
    return [(v, f"{100 * v:.3g} %" if percent else write_number(v)) for v in inside]


def write_number(value: float) -> str:
    """A number in at most four digits, large and small ones with a power of ten."""
    if value and not 1e-3 <= abs(value) < 1e5:
        mantissa, power = f"{value:.2e}".split("e")
        return f"{float(mantissa):g}e{int(power)}".replace("-", "−")
    return f"{value:.4g}".replace("-", "−")


def span(values: ArrayLike, margin: float = 0.06) -> tuple[float, float]:
    """The range of some values with a margin; of a constant, one around it."""
    array = np.asarray(values, dtype=float)
    low, high = float(array.min()), float(array.max())
    room = margin * (high - low) or margin * abs(high) or 1.0
    return low - room, high + room


def thin(points: np.ndarray, most: int = MOST_POINTS) -> np.ndarray:
    """At most so many of the rows, at equal distances, the first and the last among them."""
    if len(points) <= most:
        return points
    return points[np.linspace(0, len(points) - 1, most).round().astype(int)]
