"""The report's contents as plain values, section by section; the template only lays them out."""

from __future__ import annotations

from collections.abc import Mapping
from datetime import UTC, datetime
from typing import Any

from moecap_eval.axes import THROUGHPUT, USD_PER_MILLION
from moecap_eval.comparison import Comparison
from moecap_eval.config import AA_SUFFIX
from moecap_eval.records import SCHEMA_VERSION, Records
from moecap_eval.report import figures, radar
from moecap_eval.report.axis_table import CONTROL
from moecap_eval.report.narrative import improvement, title
from moecap_eval.report.numbers import PREFIXED, UNKNOWN, change, interval, quantity
from moecap_eval.stats import Effect, Estimate, wilson_interval, zone
from moecap_eval.values import arm_value, binary_axes, effect_of, item_scores
from moecap_eval.workload import Axis

BASELINE_STYLE = 0


def styles(records: Records, comparison: Comparison) -> dict[str, int]:
    """Arm -> number of its colour, marker and dash: the baseline 0, the others as in the config."""
    others = [arm for arm in records.arm_names if arm != comparison.baseline]
    numbers = {comparison.baseline: BASELINE_STYLE} | {arm: i for i, arm in enumerate(others, start=1)}
    return numbers | {
        comparison.baseline + AA_SUFFIX: BASELINE_STYLE,
        records.baseline + AA_SUFFIX: BASELINE_STYLE,
    }


def radar_figure(records: Records, comparison: Comparison) -> dict[str, Any] | None:
    """Polygons over the headline axes with raw values for the legend; None without three such axes."""
    axes = [axis for axis in comparison.axes.values() if axis.headline]
    if not axes:
        return None
    numbers = styles(records, comparison)
    factors = {
        arm: [_improvement(comparison, arm, axis) for axis in axes]
        for arm in (comparison.baseline, *comparison.arms)
    }
    arms = [arm for arm, own in factors.items() if any(factor is not None for factor in own)]
    titles = [title(axis.name) for axis in axes]
    return {
        "titles": titles,
        "units": ["" if axis.unit in PREFIXED else axis.unit for axis in axes],
        "spokes": radar.spokes(titles),
        "rings": radar.rings(len(axes)),
        "centre": radar.CENTRE,
        "polygons": [radar.polygon(arm, numbers[arm], factors[arm]) for arm in arms],
        "entries": [
            {
                "arm": arm,
                "style": numbers[arm],
                "values": [_legend_value(arm_value(records, arm, axis), axis) for axis in axes],
            }
            for arm in arms
        ],
        "bars": [
            {"axis": name, "items": [_bar(arm, factors[arm][place]) for arm in arms]}
            for place, name in enumerate(titles)
        ]
        if len(axes) < 3
        else [],
    }


def _legend_value(value: float | None, axis: Axis) -> str:
    """With a unit where that has prefixes; the others have theirs in the head of the column."""
    return quantity(value, axis.unit if axis.unit in PREFIXED else "")


def forest_figures(records: Records, comparison: Comparison) -> list[str]:
    """The paired effects: ratios turned so that right is better, then accuracy differences."""
    numbers = styles(records, comparison)
    groups: dict[str, list[figures.Group]] = {"ratio": [], "difference": []}
    for axis in comparison.axes.values():
        if not axis.headline:
            continue
        marks = [
            _mark(row.arm, row.estimate, row.effect, axis, numbers[row.arm])
            for row in comparison.rows
            if row.axis == axis.name and row.estimate is not None and row.estimate.low is not None
        ]
        effect = effect_of(axis)
        control = comparison.aa_control.get(axis.name)
        if control is not None:
            marks.append(_mark(CONTROL, control, effect, axis, -1))
        if marks:
            low, high = zone(axis, effect)
            groups[effect].append(figures.Group(title(axis.name), (low, high), marks))
    drawn = []
    if groups["ratio"]:
        drawn.append(
            figures.forest(
                groups["ratio"], log=True, label="times better than the baseline (right is better)", none=1.0
            )
        )
    if groups["difference"]:
        drawn.append(
            figures.forest(
                groups["difference"],
                log=False,
                label="score minus the baseline's (right is better)",
                none=0.0,
            )
        )
    return drawn


def pareto_figures(records: Records, comparison: Comparison) -> list[str]:
    """Cost against throughput, and accuracy against cost (without prices: throughput), as far as known."""
    arms = [comparison.baseline, *comparison.arms]
    accuracy = next((a for a in comparison.axes.values() if a.kind == "accuracy" and a.headline), None)
    pairs = [(comparison.axes.get(USD_PER_MILLION), comparison.axes.get(THROUGHPUT))]
    if accuracy is not None:
        pairs.append((comparison.axes.get(USD_PER_MILLION), accuracy))
        pairs.append((comparison.axes.get(THROUGHPUT), accuracy))
    drawn: list[str] = []
    for x_axis, y_axis in pairs:
        if x_axis is None or y_axis is None:
            continue
        points = {}
        for arm in arms:
            x, y = arm_value(records, arm, x_axis), arm_value(records, arm, y_axis)
            if x is not None and y is not None:
                points[arm] = (x, y)
        if len(points) > 1:
            drawn.append(
                figures.pareto(
                    _label(x_axis),
                    _label(y_axis),
                    points,
                    arms,
                    x_up=x_axis.better == "higher",
                    y_up=y_axis.better == "higher",
                )
            )
    return drawn[:2]


def timeline_figure(records: Records, comparison: Comparison) -> str | None:
    """Speed of each block over time."""
    series = {}
    begin_s = min((block.started_s for arm in records.slots for block in records.blocks[arm]), default=0.0)
    for arm in records.slots:
        blocks = sorted(records.blocks[arm], key=lambda block: block.started_s)
        if len(blocks) < 2:
            continue
        mean = sum(b.work for b in blocks) / sum(b.wall_s for b in blocks)
        series[arm] = [((b.started_s - begin_s) / 60, 100 * (b.work / b.wall_s / mean - 1)) for b in blocks]
    return figures.timeline(series, styles(records, comparison)) if series else None


def accuracy_tasks(records: Records, comparison: Comparison) -> list[dict[str, Any]]:
    """For each 0/1 accuracy axis: score per task (an id's first part) and arm, with Wilson's interval."""
    numbers = styles(records, comparison)
    arms = [arm for arm in (comparison.baseline, *comparison.arms) if records.blocks.get(arm)]
    confidence = float(records.config["compare"]["confidence"])
    sections = []
    for name in binary_axes(records):
        scores = {arm: item_scores(records, arm, name) for arm in arms}
        tasks = sorted({_task(item) for own in scores.values() for item in own})
        rows, marks = [], {}
        for task in [*tasks, "all tasks"] if len(tasks) > 1 else tasks:
            cells, dots = [], []
            for arm in arms:
                own = [v for item, v in scores[arm].items() if task == "all tasks" or _task(item) == task]
                if not own:
                    continue
                correct = int(sum(own))
                low, high = wilson_interval(correct, len(own), confidence)
                share = correct / len(own)
                dots.append(figures.Mark(arm, share, low, high, numbers[arm]))
                cells.append(
                    {
                        "arm": arm,
                        "count": f"{correct} of {len(own)}",
                        "share": f"{share:.3f}",
                        "interval": f"{low:.3f} to {high:.3f}",
                    }
                )
            rows.append({"task": task, "cells": cells})
            marks[task] = dots
        unit = f"share of items right, {100 * confidence:g} % Wilson interval"
        sections.append({"axis": title(name), "rows": rows, "figure": figures.task_dots(marks, arms, unit)})
    return sections


def block_table(records: Records) -> list[dict[str, str]]:
    """Every block in the order in which it ran."""
    blocks = sorted(
        (b for arm in records.slots for b in records.blocks[arm]), key=lambda b: (b.started_s, b.block)
    )
    return [
        {
            "when": f"{block.started_s:.1f} s",
            "block": str(block.block + 1),
            "slot": str(block.slot + 1),
            "arm": block.arm,
            "wall": quantity(block.wall_s, "s"),
            "work": quantity(block.work, records.work_unit),
            "energy": "not measured"
            if block.energy_j is None
            else f"{block.energy_j:.1f} J ({block.energy_source})",
        }
        for block in blocks
    ]


def facts(records: Records, comparison: Comparison) -> dict[str, Any]:
    """What was compared, in numbers."""
    items = records.num_blocks * records.items_per_block
    created = datetime.fromtimestamp(records.created_s, tz=UTC)
    return {
        "item_count": items,
        "blocks": records.num_blocks,
        "items_per_block": records.items_per_block,
        "left_out": records.left_out,
        "date": f"{created:%Y-%m-%d %H:%M} UTC",
        "confidence": f"{100 * float(records.config['compare']['confidence']):g} %",
        "incomplete": [
            f"{arm} has {len(records.blocks[arm])} of {records.num_blocks} blocks"
            for arm in records.slots
            if len(records.blocks[arm]) < records.num_blocks
        ],
        "arms": [
            {
                "name": arm,
                "style": number,
                "options": _options(records.config["arms"][arm]),
                "baseline": number == 0,
            }
            for arm, number in styles(records, comparison).items()
            if AA_SUFFIX not in arm
        ],
    }


def control_sentence(comparison: Comparison) -> str:
    """How far apart the baseline and itself came out, in words."""
    estimate = comparison.aa_control.get(THROUGHPUT)
    if estimate is None:
        return "The run had no A/A control, so nothing shows how much two runs of the same thing differ here."
    found = f"{change(estimate.value, 'ratio')} (interval {interval(estimate, 'ratio')})"
    return (
        f"Control: {comparison.baseline} was also run against itself. Its throughput differed by {found}: "
        "the noise of this machine."
    )


def signature(records: Records) -> str:
    """One line that says what was measured with what."""
    packages = (records.environment.get("packages") or {}).items()
    compare = records.config["compare"]
    parts = [
        f"workload {records.workload}",
        f"config {records.config_digest[:16]}",
        f"seed {records.config['params'].get('seed', 0)}",
        f"blocks {records.num_blocks}x{records.items_per_block}",
        f"baseline {compare['baseline']}",
        f"confidence {compare['confidence']:g}",
        f"schema v{SCHEMA_VERSION}",
        *(f"{name} {version}" for name, version in packages),
        f"commit {records.environment.get('git_commit') or 'unknown'}",
    ]
    return " | ".join(parts)


def _mark(label: str, estimate: Estimate, effect: Effect, axis: Axis, style: int) -> figures.Mark:
    """A line of the forest plot, turned so that right is better."""
    value = estimate.value
    low, high = (value if bound is None else bound for bound in (estimate.low, estimate.high))
    if axis.better == "lower":
        value, low, high = (1 / value, 1 / high, 1 / low) if effect == "ratio" else (-value, -high, -low)
    return figures.Mark(label, value, low, high, style)


def _bar(arm: str, factor: float | None) -> dict[str, Any]:
    """A bar for reports with too few axes for a radar; its middle is the baseline."""
    if factor is None:
        return {"arm": arm, "width": 0.0, "text": UNKNOWN}
    return {
        "arm": arm,
        "width": round(100 * radar.radius(factor) / radar.RADIUS, 1),
        "text": f"{factor:.2f}×",
    }


def _improvement(comparison: Comparison, arm: str, axis: Axis) -> float | None:
    if arm == comparison.baseline:
        return 1.0
    return improvement(comparison.row(axis.name, arm), axis)


def _label(axis: Axis) -> str:
    return f"{title(axis.name)}, {axis.unit}"


def _task(item: str) -> str:
    return item.partition("/")[0]


def _options(options: Mapping[str, Any]) -> str:
    return ", ".join(f"{key}: {value}" for key, value in options.items()) or "no options"
