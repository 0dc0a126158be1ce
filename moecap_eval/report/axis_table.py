"""The comparison table: every axis with every arm, as plain values."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from moecap_eval.comparison import SINGLE_VALUE, Comparison, Row
from moecap_eval.config import AA_SUFFIX
from moecap_eval.records import Records
from moecap_eval.report.narrative import title
from moecap_eval.report.numbers import MARKS, UNKNOWN, change, interval, p_value, quantity
from moecap_eval.values import arm_value, effect_of, missing_reason
from moecap_eval.workload import Axis

CONTROL = "control (A/A)"
KINDS = ("cost", "accuracy", "performance")


@dataclass(frozen=True)
class Cell:
    """One arm's line under an axis."""

    arm: str
    value: str
    change: str
    interval: str
    p_value: str
    verdict: str
    mark: str
    reason: str


@dataclass(frozen=True)
class AxisBlock:
    """One axis of the comparison table."""

    title: str
    name: str
    kind: str
    note: str
    headline: bool
    unknown: str
    cells: Sequence[Cell]
    notes: Sequence[str]


def axis_blocks(records: Records, comparison: Comparison) -> list[AxisBlock]:
    """The comparison table, headline axes first."""
    axes = sorted(comparison.axes.values(), key=lambda axis: (not axis.headline, KINDS.index(axis.kind)))
    blocks = []
    for axis in axes:
        cells = [_baseline_cell(records, comparison, axis)]
        cells += [_cell(row, axis) for row in comparison.rows if row.axis == axis.name]
        if AA_SUFFIX not in comparison.baseline and axis.name in comparison.aa_control:
            cells.append(_control_cell(comparison, axis))
        relative = axis.kind != "accuracy"
        margin = f"±{100 * axis.margin:g}\u00a0%" if relative else f"±{axis.margin:g}"
        note = f"{axis.unit}; {axis.better} is better; margin {margin}"
        reasons = {cell.reason for cell in cells if cell.verdict}
        nowhere = all(cell.value == UNKNOWN for cell in cells) and len(reasons) == 1
        blocks.append(
            AxisBlock(
                title(axis.name),
                axis.name,
                axis.kind,
                note,
                axis.headline,
                reasons.pop() if nowhere else "",
                [] if nowhere else cells,
                [] if nowhere else _notes(cells),
            )
        )
    return blocks


def _notes(cells: Sequence[Cell]) -> list[str]:
    """Reasons below an axis, each once, with the arms they hold for."""
    arms: dict[str, list[str]] = {}
    for cell in cells:
        if cell.reason:
            arms.setdefault(cell.reason, []).append(cell.arm)
    return [f"{', '.join(names)}: {reason}" for reason, names in arms.items()]


def _baseline_cell(records: Records, comparison: Comparison, axis: Axis) -> Cell:
    value = arm_value(records, comparison.baseline, axis)
    reason = missing_reason(records, comparison.baseline, axis) if value is None else ""
    return Cell(comparison.baseline, quantity(value, _short(axis)), "", "", "", "baseline", "", reason)


def _control_cell(comparison: Comparison, axis: Axis) -> Cell:
    estimate = comparison.aa_control[axis.name]
    effect = effect_of(axis)
    return Cell(CONTROL, "", change(estimate.value, effect), interval(estimate, effect), "", "", "", "")


def _cell(row: Row, axis: Axis) -> Cell:
    estimate = row.estimate
    tested = estimate is not None and estimate.low is not None
    p = None if estimate is None else (estimate.p_value if row.adjusted_p is None else row.adjusted_p)
    return Cell(
        arm=row.arm,
        value=quantity(row.value, _short(axis)),
        change=change(estimate.value, row.effect) if estimate else "",
        interval=interval(estimate, row.effect) if estimate else "",
        p_value=p_value(p) if tested else "",
        verdict=row.verdict if tested else _untested(row),
        mark=MARKS[row.verdict] if tested else "",
        reason=""
        if row.reason in (None, SINGLE_VALUE) or _untested(row) == "no baseline"
        else str(row.reason),
    )


def _untested(row: Row) -> str:
    if row.estimate is not None:
        return "not tested"
    return "unknown" if row.value is None else "no baseline"


def _short(axis: Axis) -> str:
    """The unit beside a value; the axis's heading has the full one."""
    if axis.unit.startswith("USD"):
        return "USD"
    return axis.unit if len(axis.unit) <= 9 and axis.unit != "1" else ""
