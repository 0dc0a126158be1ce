"""The CAP radar's geometry. Each arm's polygon depends on the baseline and itself alone."""

from __future__ import annotations

import math
import textwrap
from collections.abc import Sequence
from dataclasses import dataclass

RADIUS = 120.0
CENTRE = (220.0, 172.0)
LABEL_CHARACTERS = 12
LINE_HEIGHT = 15.0
RINGS = (
    (0.125, "8× worse"),
    (0.25, "4×"),
    (0.5, "2×"),
    (1.0, "baseline"),
    (2.0, "2×"),
    (4.0, "4×"),
    (8.0, "8× better"),
)


@dataclass(frozen=True)
class Spoke:
    """An axis of the radar: where it ends and where its label stands."""

    lines: tuple[str, ...]
    x: float
    y: float
    label_x: float
    label_y: float
    anchor: str


@dataclass(frozen=True)
class Ring:
    """A circle of equal improvement and where its label stands."""

    radius: float
    label: str
    x: float
    y: float


@dataclass(frozen=True)
class Polygon:
    """An arm's outline. ``clipped`` are vertices beyond 8x, drawn on the rim or the centre and marked."""

    arm: str
    style: int
    points: tuple[tuple[float, float], ...]
    clipped: tuple[tuple[float, float], ...]

    @property
    def path(self) -> str:
        """The ``points`` attribute."""
        return " ".join(f"{x:.2f},{y:.2f}" for x, y in self.points)


def radius(improvement: float) -> float:
    """R * (1/2 + log2(improvement) / 6), within [0, R]: middle ring baseline, rim 8x better."""
    return RADIUS * min(1.0, max(0.0, 0.5 + math.log2(improvement) / 6))


def spokes(labels: Sequence[str]) -> list[Spoke]:
    """One spoke an axis, clockwise from the top."""
    drawn = []
    for index, label in enumerate(labels):
        x, y = _at(index, len(labels), RADIUS)
        label_x, label_y = _at(index, len(labels), RADIUS + 16)
        side = label_x - CENTRE[0]
        anchor = "middle" if abs(side) < 20 else ("start" if side > 0 else "end")
        lines = tuple(textwrap.wrap(label, LABEL_CHARACTERS, break_long_words=False))
        lift = LINE_HEIGHT * (len(lines) - 1) * (0.5 if anchor != "middle" else float(label_y < CENTRE[1]))
        drawn.append(Spoke(lines, x, y, label_x, label_y + 4 - lift, anchor))
    return drawn


def polygon(arm: str, style: int, improvements: Sequence[float | None]) -> Polygon:
    """An arm's polygon; an axis that was not measured has no vertex."""
    points, clipped = [], []
    for index, improvement in enumerate(improvements):
        if improvement is None:
            continue
        point = _at(index, len(improvements), radius(improvement))
        points.append(point)
        if not 1 / 8 <= improvement <= 8:
            clipped.append(point)
    return Polygon(arm, style, tuple(points), tuple(clipped))


def rings(count: int) -> list[Ring]:
    """The rings but the centre, labelled between the first two of ``count`` spokes."""
    drawn = []
    for level, label in RINGS:
        size = radius(level)
        if size > 0:
            drawn.append(Ring(size, label, *_at(0.25, count, size)))
    return drawn


def _at(index: float, count: int, distance: float) -> tuple[float, float]:
    angle = 2 * math.pi * index / count
    return CENTRE[0] + distance * math.sin(angle), CENTRE[1] - distance * math.cos(angle)
