"""Figures as inline SVG, by matplotlib. Colours are CSS variables, so that dark mode and print apply.

Every series has a colour, a marker and a line style of its own; nothing is told by colour alone.
"""

from __future__ import annotations

import hashlib
import io
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import matplotlib as mpl
from matplotlib.figure import Figure

INK, MUTED, LINE, ZONE = "#101418", "#5b6571", "#d4d9df", "#e9edf1"
PALETTE = ("#101418", "#0072b2", "#d55e00", "#009e73", "#cc79a7", "#b58900", "#56b4e9", "#8b5cf6")
MARKERS = ("o", "s", "^", "D", "v", "P", "X", "*")
DASHES: tuple[Any, ...] = (
    "-",
    (0, (6, 2)),
    (0, (2, 2)),
    (0, (7, 2, 2, 2)),
    (0, (1, 1)),
    (0, (9, 3)),
    (0, (4, 1)),
    "-.",
)
_VARIABLES = {MUTED: "--muted", LINE: "--line", ZONE: "--zone", INK: "--ink"} | {
    colour: f"--arm{index}" for index, colour in enumerate(PALETTE) if index
}
WIDTH_IN = 5.6
_STYLE = {
    "svg.fonttype": "none",
    "font.family": "sans-serif",
    "font.size": 12,
    "axes.facecolor": "none",
    "axes.edgecolor": MUTED,
    "axes.labelcolor": INK,
    "axes.linewidth": 0.8,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "text.color": INK,
    "xtick.color": MUTED,
    "ytick.color": MUTED,
    "xtick.labelcolor": INK,
    "ytick.labelcolor": INK,
    "grid.color": LINE,
    "grid.linewidth": 0.7,
    "legend.frameon": False,
}


@dataclass(frozen=True)
class Mark:
    """A value with its interval on a line of a forest plot."""

    label: str
    value: float
    low: float
    high: float
    style: int


@dataclass(frozen=True)
class Group:
    """Lines of a forest plot under one heading, with the equivalence zone they are judged by."""

    heading: str
    zone: tuple[float, float]
    marks: Sequence[Mark]


def forest(groups: Sequence[Group], *, log: bool, label: str, none: float) -> str:
    """Intervals against the line of no effect; on a log scale for ratios."""
    lines = sum(len(group.marks) + 1 for group in groups)
    with mpl.rc_context(_STYLE):
        figure = _figure(0.95 + 0.3 * lines)
        axes = figure.add_subplot()
        y = 0.0
        for group in groups:
            axes.text(0.0, y, group.heading, transform=axes.get_yaxis_transform(), va="center", weight="bold")
            depth = len(group.marks)
            axes.fill_between(group.zone, y + 0.5, y + depth + 0.45, color=ZONE, linewidth=0)
            for mark in group.marks:
                y += 1
                _draw_mark(axes, mark, y)
            y += 1
        axes.axvline(none, color=MUTED, linewidth=1)
        axes.set_ylim(y - 0.4, -0.7)
        bounds = [
            bound for group in groups for mark in group.marks for bound in (mark.low, mark.high, *group.zone)
        ]
        _scale_x(axes, bounds, log=log, none=none)
        ticks = [(number, mark.label) for number, mark in _positions(groups)]
        axes.set_yticks([number for number, _ in ticks], [text for _, text in ticks])
        axes.tick_params(axis="y", length=0)
        axes.spines["left"].set_visible(False)
        axes.set_xlabel(label)
        axes.grid(axis="x")
        axes.set_axisbelow(True)
        return _svg(figure, "forest" + label)


def pareto(
    x_label: str,
    y_label: str,
    points: Mapping[str, tuple[float, float]],
    arms: Sequence[str],
    *,
    x_up: bool,
    y_up: bool,
) -> str:
    """Arms on two measures with the Pareto front; filled marks are on it.

    Args:
        x_label: with unit.
        y_label: with unit.
        points: arm -> (x, y).
        arms: all arms in the order that gives each its style.
        x_up: whether more of x is better.
        y_up: whether more of y is better.
    """
    with mpl.rc_context(_STYLE):
        figure = _figure(3.9)
        axes = figure.add_subplot()
        front = pareto_front(points, x_up=x_up, y_up=y_up)
        chain = sorted(points[arm] for arm in front)
        axes.plot([x for x, _ in chain], [y for _, y in chain], color=MUTED, linewidth=1.2, zorder=1)
        for arm, (x, y) in points.items():
            style = arms.index(arm)
            colour = PALETTE[style % len(PALETTE)]
            axes.plot(
                x,
                y,
                MARKERS[style % len(MARKERS)],
                color=colour,
                markerfacecolor=colour if arm in front else "none",
                markersize=9,
                markeredgewidth=1.6,
                label=arm,
            )
        axes.set_xlabel(f"{x_label} ({'right' if x_up else 'left'} is better)")
        axes.set_ylabel(y_label)
        axes.margins(0.16)
        axes.xaxis.set_major_locator(mpl.ticker.MaxNLocator(5))
        axes.grid()
        axes.set_axisbelow(True)
        _legend(figure, axes, len(points))
        return _svg(figure, "pareto" + x_label + y_label)


def pareto_front(points: Mapping[str, tuple[float, float]], *, x_up: bool, y_up: bool) -> list[str]:
    """Arms that no other arm beats on one measure without losing on the other."""

    def beats(first: tuple[float, float], second: tuple[float, float]) -> bool:
        x = (first[0] - second[0]) * (1 if x_up else -1)
        y = (first[1] - second[1]) * (1 if y_up else -1)
        return x >= 0 and y >= 0 and (x > 0 or y > 0)

    return [arm for arm, own in points.items() if not any(beats(other, own) for other in points.values())]


def timeline(series: Mapping[str, Sequence[tuple[float, float]]], styles: Mapping[str, int]) -> str:
    """Speed of each block against the arm's own mean, over time: drift shows as a slope, a hiccup as a spike.

    Args:
        series: arm -> (minutes since the start, speed relative to the arm's mean in per cent), in time order.
        styles: arm -> place in the config; the A/A slot has the baseline's style, drawn hollow.
    """
    with mpl.rc_context(_STYLE):
        figure = _figure(3.6)
        axes = figure.add_subplot()
        axes.axhline(0, color=MUTED, linewidth=1)
        for arm, points in series.items():
            style = styles[arm]
            colour = PALETTE[style % len(PALETTE)]
            axes.plot(
                [x for x, _ in points],
                [y for _, y in points],
                color=colour,
                linestyle=DASHES[style % len(DASHES)],
                marker=MARKERS[style % len(MARKERS)],
                markersize=5 if len(points) <= 16 else 2.5,
                markerfacecolor="none" if arm.endswith("#aa") else colour,
                linewidth=1.2 if len(points) <= 16 else 0.8,
                label=arm.replace("#aa", " (control)"),
            )
        axes.xaxis.set_major_locator(mpl.ticker.MaxNLocator(5))
        axes.set_xlabel("minutes since the first block")
        axes.set_ylabel("speed, % from own mean")
        axes.grid()
        axes.set_axisbelow(True)
        _legend(figure, axes, len(series))
        return _svg(figure, "timeline")


def task_dots(tasks: Mapping[str, Sequence[Mark]], arms: Sequence[str], unit: str) -> str:
    """Score of each arm on each task with its interval."""
    with mpl.rc_context(_STYLE):
        rows = sum(0.55 + 0.2 * len(marks) for marks in tasks.values())
        figure = _figure(1.3 + 0.62 * rows)
        axes = figure.add_subplot()
        y, ticks = 0.0, []
        for task, marks in tasks.items():
            ticks.append((y + 0.1 * (len(marks) - 1), task))
            for mark in marks:
                _draw_mark(axes, mark, y)
                y += 0.2
            y += 0.35
        handles = [
            axes.plot([], [], MARKERS[i % len(MARKERS)], color=PALETTE[i % len(PALETTE)], label=arm)[0]
            for i, arm in enumerate(arms)
        ]
        axes.set_yticks([at for at, _ in ticks], [task for _, task in ticks])
        axes.set_ylim(y - 0.15, -0.3)
        axes.tick_params(axis="y", length=0)
        axes.set_xlabel(unit)
        axes.grid(axis="x")
        axes.set_axisbelow(True)
        _legend(figure, axes, len(handles))
        return _svg(figure, "tasks" + unit)


def _figure(height_in: float) -> Figure:
    figure = Figure(figsize=(WIDTH_IN, height_in), layout="constrained")
    figure.patch.set_alpha(0)
    return figure


def _draw_mark(axes: Any, mark: Mark, y: float) -> None:
    colour = MUTED if mark.style < 0 else PALETTE[mark.style % len(PALETTE)]
    marker = "|" if mark.style < 0 else MARKERS[mark.style % len(MARKERS)]
    axes.plot([mark.low, mark.high], [y, y], color=colour, linewidth=2.2, solid_capstyle="butt")
    axes.plot(mark.value, y, marker, color=colour, markersize=7.5)


def _positions(groups: Sequence[Group]) -> list[tuple[float, Mark]]:
    placed, y = [], 0.0
    for group in groups:
        for mark in group.marks:
            y += 1
            placed.append((y, mark))
        y += 1
    return placed


def _scale_x(axes: Any, bounds: Sequence[float], *, log: bool, none: float) -> None:
    low, high = min(*bounds, none), max(*bounds, none)
    if not log:
        span = max(high - low, 1e-9)
        axes.set_xlim(low - 0.08 * span, high + 0.08 * span)
        axes.xaxis.set_major_locator(mpl.ticker.MaxNLocator(5))
        return
    axes.set_xscale("log")
    axes.set_xlim(low / 1.12, high * 1.12)
    choices = (
        [1 / 64, 1 / 32, 1 / 16, 1 / 8, 1 / 4, 1 / 2, 1, 2, 4, 8, 16, 32, 64],
        [0.5, 0.6, 0.7, 0.8, 0.9, 1, 1.2, 1.5, 2],
        [0.9, 0.95, 1, 1.05, 1.1],
    )
    for ticks in choices:
        inside = [tick for tick in ticks if low / 1.12 <= tick <= high * 1.12]
        if len(inside) >= 3:
            break
    axes.set_xticks(inside, [f"{tick:g}×" if tick >= 0.1 else f"1/{1 / tick:g}×" for tick in inside])
    axes.xaxis.set_minor_locator(mpl.ticker.NullLocator())


def _legend(figure: Figure, axes: Any, entries: int) -> None:
    handles, labels = axes.get_legend_handles_labels()
    if entries > 1:
        longest = max(len(label) for label in labels)
        columns = max(1, min(entries, 42 // (longest + 5)))
        figure.legend(handles, labels, loc="outside lower center", ncols=columns, handlelength=2.6)


def _svg(figure: Figure, salt: str) -> str:
    """The figure as a bare ``<svg>``: no fixed size, no metadata, no namespaces, colours as CSS variables."""
    buffer = io.StringIO()
    with mpl.rc_context({"svg.hashsalt": salt}):
        figure.savefig(buffer, format="svg", metadata={"Date": None})
    text = buffer.getvalue()
    text = text[text.index("<svg") :]
    text = re.sub(r"<metadata>.*?</metadata>", "", text, flags=re.DOTALL)
    head, _, body = text.partition(">")
    view_box = re.search(r'viewBox="[^"]*"', head)
    assert view_box is not None
    body = body.replace("xlink:href", "href")
    for colour, variable in _VARIABLES.items():
        body = body.replace(colour, f"var({variable})")
    body = re.sub(r"font: ([^;\"']*?)px [^;\"]*", r"font: \1px var(--sans)", body)
    # Ids of different figures must not meet in one page.
    prefix = f"f{hashlib.sha256(salt.encode()).hexdigest()[:8]}"
    body = re.sub(r'id="', f'id="{prefix}-', body)
    body = re.sub(r"url\(#", f"url(#{prefix}-", body)
    body = re.sub(r'href="#', f'href="#{prefix}-', body)
    return f'<svg {view_box.group()} role="presentation">{body}'
