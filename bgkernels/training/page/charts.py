"""Curves as numbers of an SVG."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field

WIDTH, HEIGHT = 400, 250
"""Of a chart, in the SVG's own units, which a page scales to its columns."""
LEFT, RIGHT, TOP, BOTTOM = 44, 18, 10, 40
"""Margins for labels."""


@dataclass(frozen=True)
class Line:
    """A curve.

    Args:
        name: of a model; gives colour, dashes and marks.
        points: ``(step, value)``, at least one.
    """

    name: str
    points: tuple[tuple[float, float], ...]


@dataclass(frozen=True)
class Chart:
    """Curves on one pair of axes.

    Args:
        title: what is measured.
        unit: of the values.
        lines: the curves.
        levels: by name, values that do not change, drawn across.
        from_zero: whether the axis begins at 0.

    Example:
        >>> chart = Chart("Loss", "nats", (Line("soft", ((0, 2.0), (100, 1.0))),))
        >>> chart.points(chart.lines[0])
        [(44.0, 10.0), (382.0, 210.0)]
    """

    title: str
    unit: str
    lines: tuple[Line, ...]
    levels: Mapping[str, float] = field(default_factory=dict)
    from_zero: bool = False

    @property
    def bounds(self) -> tuple[float, float, float, float]:
        """Least and largest step, and least and largest value but for the steep beginning."""
        steps = [x for line in self.lines for x, _ in line.points]
        tops = [line.points[len(line.points) // 5][1] for line in self.lines]
        values = [y for line in self.lines for _, y in line.points]
        low = 0.0 if self.from_zero else min([*values, *self.levels.values()])
        high = max([*tops, *self.levels.values()])
        return min(steps), max(steps), low, high if high > low else low + 1.0

    def across(self, x: float) -> float:
        """Where a step is."""
        first, last, _, _ = self.bounds
        width = WIDTH - LEFT - RIGHT
        return round(LEFT + width * ((x - first) / (last - first) if last > first else 0.5), 1)

    def down(self, y: float) -> float:
        """Where a value is."""
        _, _, low, high = self.bounds
        return round(TOP + (HEIGHT - TOP - BOTTOM) * (high - y) / (high - low), 1)

    def points(self, line: Line) -> list[tuple[float, float]]:
        """Where the points of a curve are; what is above the axes is left out."""
        top = self.bounds[3]
        return [(self.across(x), self.down(y)) for x, y in line.points if y <= top]

    def steps(self) -> list[tuple[float, str]]:
        """Where steps are written, and what."""
        first, last, _, _ = self.bounds
        return [(self.across(x), f"{x:g}") for x in ticks(first, last)]

    def values(self) -> list[tuple[float, str]]:
        """Where values are written, and what."""
        _, _, low, high = self.bounds
        return [(self.down(y), f"{y:g}") for y in ticks(low, high)]

    def summary(self, names: Mapping[str, str]) -> str:
        """The curves in words: where each of them ends.

        Args:
            names: of the models, by key.
        """
        ends = (
            f"{names.get(line.name, line.name)} ends at {line.points[-1][1]:.3f}"
            for line in self.lines
        )
        levels = (f"{names.get(key, key)} is at {value:.3f}" for key, value in self.levels.items())
        return f"{self.title}, {self.unit}: {', '.join([*ends, *levels])}"


def ticks(low: float, high: float, count: int = 5) -> list[float]:
    """About so many round numbers between two.

    Example:
        >>> ticks(0, 1000), ticks(0.66, 1.02)
        ([0.0, 200.0, 400.0, 600.0, 800.0, 1000.0], [0.7, 0.8, 0.9, 1.0])
    """
    if not high > low:
        return [low]
    rough = (high - low) / count
    size = 10.0 ** math.floor(math.log10(rough))
    step = next(size * x for x in (1, 2, 5, 10) if size * x >= rough)
    first, last = math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9)
    return [float(f"{i * step:.10g}") for i in range(first, last + 1)]
