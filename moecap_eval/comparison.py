"""Compare arms with the baseline: a pure function of the records."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from moecap_eval.axes import (
    FAST_MEMORY,
    STARTUP,
    USD_PER_THOUSAND_CORRECT,
)
from moecap_eval.config import AA_SUFFIX
from moecap_eval.records import Records, check_item_ids, read_records
from moecap_eval.stats import (
    Effect,
    Estimate,
    Verdict,
    holm,
    is_noisy,
    judge,
    paired_difference,
    paired_ratio,
    paired_ratio_of_sums,
)
from moecap_eval.values import (
    accuracy_of,
    arm_value,
    block_values,
    cost_per_correct_axes,
    effect_of,
    item_scores,
    missing_reason,
    usd_and_correct,
)
from moecap_eval.workload import Axis

SINGLE_VALUE = "one value per arm: shown, not tested"


@dataclass(frozen=True)
class Row:
    """One arm on one axis against the baseline.

    ``value`` and ``baseline_value`` are over all blocks (throughput and cost: a ratio of sums; else a mean);
    ``estimate`` is over pairs. What is None was not measured, and ``reason`` says why.
    """

    axis: str
    arm: str
    baseline_value: float | None
    value: float | None
    estimate: Estimate | None
    effect: Effect
    verdict: Verdict
    reason: str | None = None
    adjusted_p: float | None = None


@dataclass(frozen=True)
class Comparison:
    """Every arm against the baseline on every axis.

    ``identical_outputs``: arm -> (items whose output digest equals the baseline's, items with a digest).
    ``aa_control``: axis -> estimate of the baseline against itself, where the run had that control.
    """

    baseline: str
    rows: list[Row]
    identical_outputs: dict[str, tuple[int, int]]
    axes: dict[str, Axis]
    aa_control: dict[str, Estimate]
    failures: dict[str, str]

    def row(self, axis: str, arm: str) -> Row:
        """The row of an axis and an arm; KeyError if there is none."""
        for row in self.rows:
            if (row.axis, row.arm) == (axis, arm):
                return row
        raise KeyError(f"no row for axis {axis!r} and arm {arm!r}")

    def of_arm(self, arm: str) -> list[Row]:
        """The rows of an arm, in the order of the axes."""
        return [row for row in self.rows if row.arm == arm]

    @property
    def arms(self) -> list[str]:
        """The arms compared, the baseline left out."""
        return list(dict.fromkeys(row.arm for row in self.rows))

    def to_dict(self) -> dict[str, Any]:
        """JSON types only."""
        return {
            "baseline": self.baseline,
            "rows": [dataclasses.asdict(row) for row in self.rows],
            "identical_outputs": {arm: list(counts) for arm, counts in self.identical_outputs.items()},
            "aa_control": {axis: dataclasses.asdict(e) for axis, e in self.aa_control.items()},
            "failures": dict(self.failures),
        }

    def to_text(self) -> str:
        """A table for a terminal."""
        from moecap_eval.report.table import comparison_text

        return comparison_text(self)


def compare(records: Records | str | Path, baseline: str | None = None) -> Comparison:
    """Compare every arm of a run with its baseline.

    Args:
        records: from ``read_records``, or a run's folder.
        baseline: another arm to compare with; the A/A control then still is that of the config's baseline.

    Raises:
        ValueError: the baseline is not an arm or has no blocks, or arms ran different items.
    """
    if not isinstance(records, Records):
        records = read_records(records)
    baseline = baseline or records.baseline
    if baseline not in records.arm_names:
        raise ValueError(
            f"compare.baseline {baseline!r} is not an arm (arms: {', '.join(records.arm_names)})"
        )
    if not records.blocks.get(baseline):
        reason = records.failures.get(baseline, "the run has not got that far; run it again to go on")
        raise ValueError(f"baseline {baseline!r} has no recorded block: {reason}")
    arms = [arm for arm in records.arm_names if arm != baseline]
    control = records.baseline + AA_SUFFIX
    axes = [*records.axes, *cost_per_correct_axes(records)]
    aa: dict[str, Estimate] = {}
    if records.blocks.get(control):
        for axis in axes:
            estimate = _measure(records, axis, records.baseline, control).estimate
            if estimate is not None and estimate.low is not None:
                aa[axis.name] = estimate
    rows: list[Row] = []
    for arm in arms:
        rows += _judged([_measure(records, axis, baseline, arm) for axis in axes], axes, aa)
    return Comparison(
        baseline=baseline,
        rows=rows,
        identical_outputs=_identical_outputs(records, baseline, arms),
        axes={axis.name: axis for axis in axes},
        aa_control=aa,
        failures=dict(records.failures),
    )


def compare_runs(new: Records, old: Records) -> Comparison:
    """Compare each arm of one run with the arm of the same name in another, block by block.

    The runs were not interleaved, so a change of the machine between them counts as an effect; the A/A
    control is the new run's own.

    Raises:
        ValueError: the runs have no arm in common or other items, blocks or axes.
    """
    shared = [arm for arm in new.arm_names if new.blocks.get(arm) and old.blocks.get(arm)]
    if not shared:
        raise ValueError(f"{new.path} and {old.path} have no recorded arm in common")
    if (new.workload, new.num_blocks, new.items_per_block) != (
        old.workload,
        old.num_blocks,
        old.items_per_block,
    ):
        raise ValueError(
            f"{new.path} and {old.path} cannot be paired: {new.workload} with {new.num_blocks} blocks of "
            f"{new.items_per_block} items, {old.workload} with {old.num_blocks} of {old.items_per_block}"
        )
    rows: list[Row] = []
    axes = [*new.axes, *cost_per_correct_axes(new)]
    own = compare(new).aa_control if new.blocks.get(new.baseline) else {}
    for arm in shared:
        pair = _merged(old, new, arm)
        measured = [replace(_measure(pair, axis, "old", "new"), arm=arm) for axis in axes]
        rows += _judged(measured, axes, own)
    return Comparison(str(old.path), rows, {}, {axis.name: axis for axis in axes}, own, dict(new.failures))


def _measure(records: Records, axis: Axis, baseline: str, arm: str) -> Row:
    """An unjudged row."""
    effect = effect_of(axis)
    both = {b.block for b in records.blocks.get(baseline, [])} & {
        b.block for b in records.blocks.get(arm, [])
    }
    check_item_ids(
        {
            name: [sample.item for sample in records.samples.get(name, []) if sample.block in both]
            for name in (baseline, arm)
        }
    )
    row = Row(
        axis.name,
        arm,
        arm_value(records, baseline, axis, both or None),
        arm_value(records, arm, axis, both or None),
        None,
        effect,
        "inconclusive",
    )
    for name, value in ((arm, row.value), (baseline, row.baseline_value)):
        if value is None:
            return replace(row, reason=missing_reason(records, name, axis))
    estimate: Callable[[], Estimate | None]
    if axis.name in (STARTUP, FAST_MEMORY):
        estimate = lambda: _single_ratio(row, records)  # noqa: E731
    elif axis.name.startswith(USD_PER_THOUSAND_CORRECT):
        estimate = lambda: _ratio_of_cost_per_correct(records, axis, baseline, arm, both)  # noqa: E731
    elif axis.kind == "accuracy":
        estimate = lambda: _accuracy_difference(records, axis, baseline, arm, both)  # noqa: E731
    else:
        estimate = lambda: _ratio_of_blocks(records, axis, baseline, arm)  # noqa: E731
    try:
        found = estimate()
    except ValueError as error:
        return replace(row, reason=str(error))
    reason = _left_out(axis, found, len(both) * records.items_per_block)
    if found is not None and found.low is None:
        reason = SINGLE_VALUE
    if arm in records.failures:
        reason = f"arm failed after {len(both)} of {records.num_blocks} blocks: {records.failures[arm]}"
    return replace(row, estimate=found, reason=reason)


def _left_out(axis: Axis, estimate: Estimate | None, items: int) -> str | None:
    """Items without a score in one of the arms make no pair; it must be said, they may be the hard ones."""
    if axis.kind != "accuracy" or axis.level != "item" or estimate is None or estimate.n == items:
        return None
    return f"{items - estimate.n} of {items} items have no score in one of the arms and are left out"


def _single_ratio(row: Row, records: Records) -> Estimate | None:
    if not row.baseline_value or row.value is None:
        return None
    confidence = float(records.config["compare"]["confidence"])
    return Estimate(row.value / row.baseline_value, None, None, None, 1, confidence)


def _ratio_of_blocks(records: Records, axis: Axis, baseline: str, arm: str) -> Estimate:
    first, second = block_values(records, baseline, axis), block_values(records, arm, axis)
    shared = sorted(first.keys() & second.keys())
    confidence = float(records.config["compare"]["confidence"])
    return paired_ratio([first[b] for b in shared], [second[b] for b in shared], confidence=confidence)


def _accuracy_difference(records: Records, axis: Axis, baseline: str, arm: str, both: set[int]) -> Estimate:
    confidence = float(records.config["compare"]["confidence"])
    if axis.level == "block":
        first = {str(b): v for b, v in block_values(records, baseline, axis).items() if b in both}
        second = {str(b): v for b, v in block_values(records, arm, axis).items() if b in both}
        shared = first.keys() & second.keys()
        return paired_difference(
            {b: first[b] for b in shared}, {b: second[b] for b in shared}, confidence=confidence
        )
    before, after = item_scores(records, baseline, axis.name), item_scores(records, arm, axis.name)
    ids = [sample.item for sample in records.samples[baseline] if sample.block in both]
    known = [item for item in ids if item in before and item in after]
    return paired_difference(
        {item: before[item] for item in known}, {item: after[item] for item in known}, confidence=confidence
    )


def _ratio_of_cost_per_correct(
    records: Records, axis: Axis, baseline: str, arm: str, both: set[int]
) -> Estimate:
    accuracy = accuracy_of(records, axis)
    return paired_ratio_of_sums(
        usd_and_correct(records, baseline, accuracy, both),
        usd_and_correct(records, arm, accuracy, both),
        confidence=float(records.config["compare"]["confidence"]),
    )


def _judged(rows: Sequence[Row], axes: Sequence[Axis], aa: Mapping[str, Estimate]) -> list[Row]:
    """Rows of one arm with their verdicts; Holm's correction is over its headline axes."""
    by_name = {axis.name: axis for axis in axes}
    adjusted = holm(
        {
            row.axis: row.estimate.p_value
            for row in rows
            if row.estimate is not None and row.estimate.p_value is not None and by_name[row.axis].headline
        }
    )
    judged = []
    for row in rows:
        if row.estimate is None:
            judged.append(row)
            continue
        axis, control = by_name[row.axis], aa.get(row.axis)
        p_value = adjusted.get(row.axis)
        verdict = judge(row.estimate, axis, effect=row.effect, aa=control, adjusted_p=p_value)
        reason = row.reason
        if verdict == "noisy" and control is not None and is_noisy(control, axis, row.effect):
            sign = "" if row.effect == "ratio" else "+"
            span = f"{control.low:{sign}.3f} to {control.high:{sign}.3f}"
            noise = f"the baseline against itself gave {span}: a margin of {axis.margin:g} cannot be resolved"
            reason = f"{reason}; {noise}" if reason else noise
        judged.append(replace(row, verdict=verdict, reason=reason, adjusted_p=p_value))
    return judged


def _identical_outputs(records: Records, baseline: str, arms: Sequence[str]) -> dict[str, tuple[int, int]]:
    reference = {s.item: s.digest for s in records.samples[baseline] if s.digest is not None}
    counts = {}
    for arm in arms:
        own = {s.item: s.digest for s in records.samples.get(arm, []) if s.digest is not None}
        shared = reference.keys() & own.keys()
        if shared:
            counts[arm] = (sum(reference[item] == own[item] for item in shared), len(shared))
    return counts


def _merged(old: Records, new: Records, arm: str) -> Records:
    """One arm of two runs as the arms ``old`` and ``new`` of one."""
    sides = (("old", old), ("new", new))
    return replace(
        new,
        arms={name: side.arms[arm] for name, side in sides if arm in side.arms},
        blocks={name: side.blocks[arm] for name, side in sides},
        samples={name: side.samples[arm] for name, side in sides},
        slots=("old", "new"),
        failures={},
    )
