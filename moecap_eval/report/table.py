"""Comparison tables for a terminal and for Markdown."""

from __future__ import annotations

import io
from collections.abc import Sequence
from typing import TYPE_CHECKING

from rich.console import Console
from rich.table import Table

from moecap_eval.comparison import Comparison, Row
from moecap_eval.report.narrative import recommend, tell
from moecap_eval.report.numbers import (
    MARKS,
    PREFIXED,
    byte_size,
    change,
    interval,
    number,
    p_value,
    quantity,
)

if TYPE_CHECKING:
    from moecap_eval.plan import PlanRow

COLUMNS = ("axis", "arm", "baseline", "value", "unit", "change", "interval", "p", "verdict")
UNKNOWN_CELL = "–"


def comparison_table(comparison: Comparison) -> Table:
    """The comparison as a rich table; rows with no value at all are left out."""
    table = Table(title=f"Compared with {comparison.baseline}", header_style="bold", pad_edge=False)
    for name in COLUMNS:
        table.add_column(name, justify="right" if name in {"baseline", "value", "change", "p"} else "left")
    last = ""
    for row in _ordered(comparison):
        if last and row.axis != last:
            table.add_section()
        table.add_row(*_cells(comparison, row, show_axis=row.axis != last))
        last = row.axis
    return table


def comparison_text(comparison: Comparison, width: int = 140) -> str:
    """The table and the sentences below it, without colour."""
    console = Console(file=io.StringIO(), width=width, color_system=None, legacy_windows=False)
    if comparison.rows:
        console.print(comparison_table(comparison))
    for line in summary_lines(comparison):
        console.print(line, soft_wrap=True, markup=False, highlight=False)
    assert isinstance(console.file, io.StringIO)
    return console.file.getvalue()


def comparison_markdown(comparison: Comparison) -> str:
    """The table and the sentences below it in Markdown."""
    lines = [f"| {' | '.join(COLUMNS)} |", f"|{'---|' * len(COLUMNS)}"]
    lines += [f"| {' | '.join(_cells(comparison, row))} |" for row in _ordered(comparison)]
    return "\n".join([*lines, "", *(f"{line}  " for line in summary_lines(comparison))]) + "\n"


def plan_text(rows: Sequence[PlanRow], *, s_mbu: float, s_mfu: float) -> str:
    """A plan as a table with the demand and the assumed utilisation below it."""
    names = (
        "machine",
        "meets it",
        "limit",
        "time per output token",
        "memory needed / present",
        "USD per 1e6 tokens",
    )
    table = Table(*names, header_style="bold", pad_edge=False)
    for row in rows:
        table.add_row(
            row.profile,
            "yes" if row.meets else "no",
            row.limit,
            UNKNOWN_CELL if row.tpot_s is None else quantity(row.tpot_s, "s"),
            f"{byte_size(row.resident_bytes)} / {byte_size(row.memory_bytes)}",
            UNKNOWN_CELL if row.usd_per_million is None else number(row.usd_per_million),
        )
    console = Console(file=io.StringIO(), width=120, color_system=None)
    console.print(table)
    if rows:
        bandwidth, compute = (
            quantity(rows[0].needed_bytes_per_s, "B/s"),
            quantity(rows[0].needed_flops_per_s, "FLOP/s"),
        )
        console.print(f"needed of one device: {bandwidth} and {compute}", highlight=False)
    bound = " (the bound that no engine can beat)" if s_mbu == s_mfu == 1 else ""
    console.print(f"assumed: S-MBU {s_mbu:g}, S-MFU {s_mfu:g}{bound}; uniform routing", highlight=False)
    assert isinstance(console.file, io.StringIO)
    return console.file.getvalue()


def summary_lines(comparison: Comparison) -> list[str]:
    """One sentence an arm, then the recommendation."""
    lines = [f"{arm}: {tell(comparison, arm).sentence}" for arm in comparison.arms]
    advice = recommend(comparison)
    return [*lines, f"{advice.headline}. {advice.reason}", *advice.otherwise]


def _ordered(comparison: Comparison) -> list[Row]:
    rows = [row for row in comparison.rows if row.value is not None or row.estimate is not None]
    order = list(comparison.axes)
    return sorted(rows, key=lambda row: order.index(row.axis))


def _cells(comparison: Comparison, row: Row, *, show_axis: bool = True) -> list[str]:
    axis = comparison.axes[row.axis]
    estimate = row.estimate
    tested = estimate is not None and estimate.low is not None
    unit = axis.unit if axis.unit in PREFIXED else ""  # the others stand in a column of their own
    return [
        row.axis if show_axis else "",
        row.arm,
        quantity(row.baseline_value, unit),
        quantity(row.value, unit),
        axis.unit,
        change(estimate.value, row.effect) if estimate else "",
        interval(estimate, row.effect) if estimate else "",
        p_value(estimate.p_value if row.adjusted_p is None else row.adjusted_p)
        if estimate and tested
        else "",
        f"{MARKS[row.verdict]} {row.verdict}" if tested else "not tested",
    ]
