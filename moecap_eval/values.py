"""An axis's values from the records: by block, by item, over a whole arm; and why one is missing."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from moecap_eval.axes import (
    FAST_MEMORY,
    STARTUP,
    THROUGHPUT,
    USD_PER_MILLION,
    USD_PER_THOUSAND_CORRECT,
    fast_memory,
)
from moecap_eval.config import AA_SUFFIX
from moecap_eval.records import BlockRecord, Records
from moecap_eval.stats import Effect
from moecap_eval.workload import Axis

SHARE_OF_PEAK = "share of peak"


def effect_of(axis: Axis) -> Effect:
    """Accuracy is compared by difference, everything else by ratio."""
    return "difference" if axis.kind == "accuracy" else "ratio"


def block_values(records: Records, arm: str, axis: Axis) -> dict[int, float]:
    """An axis by block, for one arm; blocks where it is unknown are left out."""
    by_item: dict[int, list[float]] = {}
    if axis.level == "item":
        for sample in records.samples.get(arm, []):
            value = sample.values.get(axis.name)
            if value is not None:
                by_item.setdefault(sample.block, []).append(value)
    values: dict[int, float] = {}
    for block in records.blocks.get(arm, []):
        value = _block_value(block, axis, by_item)
        if value is not None:
            values[block.block] = value
    return values


def item_scores(records: Records, arm: str, axis: str) -> dict[str, float]:
    """An item-level axis by item id, for one arm; items where it is unknown are left out."""
    scores: dict[str, float] = {}
    for sample in records.samples.get(arm, []):
        value = sample.values.get(axis)
        if value is not None:
            scores[sample.item] = value
    return scores


def arm_value(records: Records, arm: str, axis: Axis, blocks: set[int] | None = None) -> float | None:
    """An arm's value over its blocks (or only over ``blocks``), in the axis's unit; None if unknown."""
    if axis.name in (STARTUP, FAST_MEMORY):
        opened = records.arms.get(arm.removesuffix(AA_SUFFIX))
        if opened is None:
            return None
        return opened.startup_s if axis.name == STARTUP else fast_memory(opened.memory_bytes)
    done = [block for block in records.blocks.get(arm, []) if blocks is None or block.block in blocks]
    if not done:
        return None
    if axis.name == THROUGHPUT:
        return sum(block.work for block in done) / sum(block.wall_s for block in done)
    if axis.name == USD_PER_MILLION:
        usd = [block.usd for block in done]
        return None if None in usd else 1e6 * sum(u or 0.0 for u in usd) / sum(block.work for block in done)
    if axis.name.startswith(USD_PER_THOUSAND_CORRECT):
        usd_sums, correct = usd_and_correct(
            records, arm, accuracy_of(records, axis), {block.block for block in done}
        )
        total = sum(correct)
        return sum(usd_sums) / total if usd_sums and total > 0 else None
    if axis.level == "item":
        numbers = [block.block for block in done]
        scores = [
            value
            for sample in records.samples.get(arm, [])
            if sample.block in numbers and (value := sample.values.get(axis.name)) is not None
        ]
        return sum(scores) / len(scores) if scores else None
    known = [(value, block) for block in done if (value := block.values.get(axis.name)) is not None]
    weights = [_weight(records, block, axis) for _, block in known]
    return sum(v * w for (v, _), w in zip(known, weights, strict=True)) / sum(weights) if known else None


def missing_reason(records: Records, arm: str, axis: Axis) -> str:
    """Why an axis has no value for an arm, in words for the report."""
    if not records.blocks.get(arm):
        return f"arm failed: {records.failures[arm]}" if arm in records.failures else "no block recorded"
    for block in records.blocks[arm]:
        if axis.name in block.reasons:
            return block.reasons[axis.name]
    if axis.name == USD_PER_MILLION or axis.name.startswith(USD_PER_THOUSAND_CORRECT):
        return f"no price for {records.config['hardware']['profile']!r}: add cost.device_usd"
    if axis.name == FAST_MEMORY:
        return "the system does not report the memory it uses"
    return "not measured by this arm"


def binary_axes(records: Records) -> list[str]:
    """Item-level accuracy axes whose recorded scores are all 0 or 1."""
    names = []
    for axis in records.axes:
        if axis.kind == "accuracy" and axis.level == "item":
            scores = {
                score for arm in records.slots for score in item_scores(records, arm, axis.name).values()
            }
            if scores and scores <= {0.0, 1.0}:
                names.append(axis.name)
    return names


def cost_per_correct_axes(records: Records) -> list[Axis]:
    """A cost axis per 0/1 accuracy axis; the first has the plain name, others their axis's after a colon."""
    names = binary_axes(records)
    return [
        Axis(
            USD_PER_THOUSAND_CORRECT if number == 0 else f"{USD_PER_THOUSAND_CORRECT}:{name}",
            "cost",
            f"USD per 1000 items right ({name})",
            "lower",
        )
        for number, name in enumerate(names)
    ]


def accuracy_of(records: Records, axis: Axis) -> str:
    """The accuracy axis behind an axis of cost per right answer."""
    return axis.name.partition(":")[2] or binary_axes(records)[0]


def usd_and_correct(
    records: Records, arm: str, accuracy: str, blocks: set[int]
) -> tuple[list[float], list[float]]:
    """USD and thousands of correct answers, by block; empty without a price."""
    correct: dict[int, float] = {}
    for sample in records.samples.get(arm, []):
        correct[sample.block] = correct.get(sample.block, 0.0) + (sample.values.get(accuracy) or 0.0) / 1000
    done = [block for block in records.blocks[arm] if block.block in blocks]
    usd = [block.usd for block in done if block.usd is not None]
    return (usd, [correct.get(block.block, 0.0) for block in done]) if len(usd) == len(done) else ([], [])


def _weight(records: Records, block: BlockRecord, axis: Axis) -> float:
    """A block's weight in an arm's mean: its time for rates, which makes the mean a ratio of sums; else 1."""
    if axis.unit != SHARE_OF_PEAK and not axis.unit.endswith("/s"):
        return 1.0
    return sum(step.duration_s for step in records.steps.get((block.arm, block.block), [])) or block.wall_s


def _block_value(block: BlockRecord, axis: Axis, by_item: Mapping[int, Sequence[float]]) -> float | None:
    if axis.name == THROUGHPUT:
        return block.work / block.wall_s
    if axis.name == USD_PER_MILLION:
        return None if block.usd is None else 1e6 * block.usd / block.work
    if axis.level == "item":
        scores = by_item.get(block.block)
        return sum(scores) / len(scores) if scores else None
    return block.values.get(axis.name)
