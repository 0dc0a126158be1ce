"""The axes every workload has for nothing, and a run's full list of them."""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from moecap_eval.workload import Axis, Workload

THROUGHPUT = "throughput"
USD_PER_MILLION = "usd_per_million"
STARTUP = "startup_s"
FAST_MEMORY = "fast_memory_bytes"
USD_PER_THOUSAND_CORRECT = "usd_per_thousand_correct"
FAST_TIERS = ("hbm", "dram")


def free_axes(work_unit: str) -> tuple[Axis, ...]:
    """Axes made from a block's work, its wall time, the cost model and ``System.memory_bytes``."""
    return (
        Axis(THROUGHPUT, "performance", f"{work_unit}/s", "higher", headline=True),
        Axis(USD_PER_MILLION, "cost", f"USD per 1e6 {work_unit}", "lower", headline=True),
        Axis(STARTUP, "performance", "s", "lower"),
        Axis(FAST_MEMORY, "cost", "B", "lower"),
    )


def run_axes(
    workload: Workload, margins: Mapping[str, float], params: Mapping[str, Any] | None = None
) -> tuple[Axis, ...]:
    """The workload's axes under ``params`` and the free ones, with the config's equivalence margins.

    Raises:
        ValueError: two axes of one name, or a margin for an axis that does not exist.
    """
    axes = (*free_axes(workload.work_unit), *workload.axes_for(params or {}))
    names = [axis.name for axis in axes]
    doubled = sorted({name for name in names if names.count(name) > 1})
    if doubled:
        raise ValueError(f"workload {workload.name}: axis {doubled[0]!r} is defined twice")
    for name in margins:
        if name not in names:
            near = difflib.get_close_matches(name, names, n=1, cutoff=0.5)
            hint = f"did you mean {near[0]!r}?" if near else f"known axes: {', '.join(names)}"
            raise ValueError(f"compare.margins.{name}: unknown key; {hint}")
    return tuple(replace(axis, margin=margins.get(axis.name, axis.margin)) for axis in axes)


def fast_memory(memory_bytes: Mapping[str, int]) -> int | None:
    """Bytes in the fastest tier an arm reports, or None when it reports none."""
    return next((memory_bytes[tier] for tier in FAST_TIERS if tier in memory_bytes), None)
