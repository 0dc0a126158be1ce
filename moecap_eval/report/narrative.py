"""What a comparison means, in sentences: per arm what it gains and gives up, and which arm to choose."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal

from moecap_eval.axes import FAST_MEMORY, STARTUP, THROUGHPUT, USD_PER_MILLION, USD_PER_THOUSAND_CORRECT
from moecap_eval.comparison import Comparison, Row
from moecap_eval.report.numbers import change, interval
from moecap_eval.stats import zone
from moecap_eval.values import effect_of
from moecap_eval.workload import Axis

Outcome = Literal["better", "trade-off", "worse", "no difference", "unclear", "failed"]

TITLES = {
    THROUGHPUT: "throughput",
    USD_PER_MILLION: "cost per unit of work",
    USD_PER_THOUSAND_CORRECT: "cost per right answer",
    STARTUP: "start-up time",
    FAST_MEMORY: "fast memory",
    "ttft_s": "time to first token",
    "tpot_s": "time per output token",
    "s_mbu": "bandwidth use (S-MBU)",
    "s_mfu": "compute use (S-MFU)",
    "hit_rate": "cache hit rate",
    "moved_bytes_per_s": "traffic between memory tiers",
    "expert_memory_bytes": "memory for experts",
}
_UNIT_ENDINGS = ("_s", "_bytes", "_usd", "_db")


@dataclass(frozen=True)
class ArmStory:
    """One arm in words. ``gains``, ``losses``, ``same`` and ``unclear`` are phrases with figures.

    ``gain`` and ``loss`` are what to say in a sentence: the headline axes, and how many others there are.
    ``decisive``: a headline axis is among the gains.
    ``accuracy_open``: a headline accuracy is not settled and the outputs are not all the baseline's.
    """

    arm: str
    outcome: Outcome
    gains: tuple[str, ...]
    losses: tuple[str, ...]
    same: tuple[str, ...]
    unclear: tuple[str, ...]
    gain: str
    loss: str
    sentence: str
    improvement: float
    decisive: bool
    accuracy_open: bool


@dataclass(frozen=True)
class Recommendation:
    """Which arm to choose, why, and when another one is the right choice."""

    arm: str
    headline: str
    reason: str
    otherwise: tuple[str, ...]


def _why_unclear(comparison: Comparison, stories: list[ArmStory]) -> str:
    """What kept a run from a verdict, what it shows nevertheless, and what to do about it."""
    same = [name for name in stories[0].same if all(name in story.same for story in stories)]
    held = f" What holds for every arm: {_join(same)} is the same within the margin." if same else ""
    rows = [row for row in comparison.rows if row.verdict == "noisy" and row.effect == "ratio"]
    noisy = sorted({row.axis for row in rows}, key=list(comparison.axes).index)
    if not noisy:
        return f"No arm was shown to differ from it; more blocks or items would narrow the intervals.{held}"
    control = comparison.aa_control[noisy[0]]
    differs = f"{title(noisy[0])} by {interval(control, effect_of(comparison.axes[noisy[0]]))}"
    return (
        "This run was too noisy to tell the arms apart: "
        f"{comparison.baseline} against itself already differs in {differs}. "
        f"Leave the machine to the run alone, or raise compare.blocks.{held}"
    )


def title(axis: str) -> str:
    """An axis's name for readers."""
    base, _, rest = axis.partition(":")
    if base not in TITLES:
        ending = next(
            (end for end in _UNIT_ENDINGS if base.endswith(end) and not base.endswith("_per" + end)), ""
        )
        base = base.removesuffix(ending)
    return TITLES.get(base, base.replace("_", " ")) + (f" ({rest})" if rest else "")


def tell(comparison: Comparison, arm: str) -> ArmStory:
    """One arm's story, from its judged rows."""
    gains: list[tuple[Axis, str]] = []
    losses: list[tuple[Axis, str]] = []
    same, unclear = [], []
    for row in comparison.of_arm(arm):
        axis = comparison.axes[row.axis]
        if row.axis.startswith(USD_PER_THOUSAND_CORRECT):
            continue  # follows from cost and accuracy
        side = _side(row, axis, comparison)
        if side == "better":
            gains.append((axis, _phrase(row, axis)))
        elif side == "worse":
            losses.append((axis, _phrase(row, axis)))
        elif side == "equivalent" and axis.headline:
            same.append(title(row.axis))
        elif side == "unclear" and axis.headline:
            unclear.append(_open_question(row))
    story = ArmStory(
        arm,
        _outcome(comparison, arm, gains=bool(gains), losses=bool(losses), settled=bool(same and not unclear)),
        tuple(text for _, text in gains),
        tuple(text for _, text in losses),
        tuple(same),
        tuple(unclear),
        _in_a_sentence(gains),
        _in_a_sentence(losses),
        "",
        _improvement(comparison, arm),
        any(axis.headline for axis, _ in gains),
        _accuracy_open(comparison, arm),
    )
    return replace(story, sentence=_sentence(comparison, story))


def _in_a_sentence(phrases: Sequence[tuple[Axis, str]]) -> str:
    """The headline axes' phrases, all of them where there are none; what is left out is counted."""
    chosen = [text for axis, text in phrases if axis.headline] or [text for _, text in phrases]
    rest = len(phrases) - len(chosen)
    return _join(chosen) + (f" ({rest} more below)" if rest else "")


def recommend(comparison: Comparison) -> Recommendation:
    """The arm to choose.

    An arm replaces the baseline when it is better on a headline axis, worse on nothing, and its accuracy is
    settled; of several such arms the one with the largest mean improvement over the headline axes does.
    Trade-offs are named as such.
    """
    stories = [tell(comparison, arm) for arm in comparison.arms]
    baseline = comparison.baseline
    if not stories:
        text = "Only one arm was run, so there is nothing to compare it with; its figures are below."
        return Recommendation(baseline, f"Only {baseline} was measured", text, ())
    better = [story for story in stories if story.outcome == "better" and story.decisive]
    winners = sorted(
        (story for story in better if not story.accuracy_open),
        key=lambda story: story.improvement,
        reverse=True,
    )
    unsettled = tuple(
        f"{story.arm} has {story.gain}, but {_join(story.unclear)} is not settled: run more items."
        for story in better
        if story.accuracy_open
    )
    tips = unsettled + tuple(
        f"Choose {story.arm} only if {story.gain} {_is(story.gain)} worth {story.loss} to you."
        for story in stories
        if story.outcome == "trade-off"
        and not (winners and _dominated(comparison, story.arm, winners[0].arm))
    )
    if winners:
        best = winners[0]
        held = f"; {_join(best.same)} stays the same within the margin" if best.same else ""
        open_points = f" Not settled: {_join(best.unclear)}." if best.unclear else ""
        gained = f"Against {baseline} it has {best.gain}{held}"
        reason = f"{gained}, and nothing measured got worse.{open_points}"
        return Recommendation(best.arm, f"Choose {best.arm}", reason, tips)
    if all(story.outcome in {"unclear", "failed"} for story in stories):
        return Recommendation(baseline, f"Keep {baseline}", _why_unclear(comparison, stories), tips)
    if unsettled:
        reason = "Another arm looks better, but whether it stays as accurate is not settled."
    elif all(story.outcome == "no difference" for story in stories):
        reason = "Every arm does the same within the margins, so there is no reason to change."
    elif any(story.outcome == "trade-off" for story in stories):
        reason = "No other arm is better without giving something up."
    elif any(story.outcome == "better" for story in stories):
        reason = "No other arm is better on a headline axis; what else differs is below."
    else:
        reason = "No other arm is better on anything that was measured."
    return Recommendation(baseline, f"Keep {baseline}", reason, tips)


def improvement(row: Row, axis: Axis) -> float | None:
    """How many times better than the baseline, more being better whatever the axis; None if unknown.

    Accuracy compares (score + 0.01) / (baseline + 0.01), so that a score of zero has a place.
    """
    if row.value is None or row.baseline_value is None:
        return None
    if row.effect == "difference":
        ratio = (row.value + 0.01) / (row.baseline_value + 0.01)
    elif row.estimate is not None:
        ratio = row.estimate.value
    else:
        return None
    if ratio <= 0:
        return None
    return ratio if axis.better == "higher" else 1 / ratio


def beyond_noise(row: Row, axis: Axis, comparison: Comparison) -> bool:
    """Whether an effect judged noisy still is clear of the margin and of the A/A control's interval."""
    control, estimate = comparison.aa_control.get(row.axis), row.estimate
    if row.verdict != "noisy" or estimate is None or control is None:
        return False
    if estimate.low is None or estimate.high is None or control.low is None or control.high is None:
        return False
    low, high = zone(axis, row.effect)
    return estimate.high < min(low, control.low) or estimate.low > max(high, control.high)


def _side(row: Row, axis: Axis, comparison: Comparison) -> str:
    """``better``, ``worse``, ``equivalent`` or ``unclear``, for the story."""
    if row.verdict in {"better", "worse", "equivalent"}:
        return row.verdict
    estimate = row.estimate
    if estimate is not None and (row.axis == FAST_MEMORY or beyond_noise(row, axis, comparison)):
        low, high = zone(axis, row.effect)
        if low <= estimate.value <= high:
            return "equivalent"
        return "better" if (estimate.value > high) == (axis.better == "higher") else "worse"
    return "unclear"


def _dominated(comparison: Comparison, arm: str, winner: str) -> bool:
    """Whether the winner does at least as well wherever the arm gains something."""
    for row in comparison.of_arm(arm):
        axis = comparison.axes[row.axis]
        if _side(row, axis, comparison) != "better" or row.axis.startswith(USD_PER_THOUSAND_CORRECT):
            continue
        own, other = improvement(row, axis), improvement(comparison.row(row.axis, winner), axis)
        if own is not None and (other is None or other < own):
            return False
    return True


def _open_question(row: Row) -> str:
    """An axis without a verdict: its name and why, since its figure is not to be relied on."""
    if row.estimate is None:
        return f"{title(row.axis)} (not measured)"
    if row.verdict != "noisy":
        return f"{title(row.axis)} (interval too wide)"
    return f"{title(row.axis)} ({'noisy run' if row.effect == 'ratio' else 'too few items'})"


def _phrase(row: Row, axis: Axis) -> str:
    """An effect as part of a sentence: ``24 % lower throughput``, ``0.250× the fast memory``."""
    assert row.estimate is not None
    value, name = row.estimate.value, title(row.axis)
    noisy = " (noisy run)" if row.verdict == "noisy" else ""
    if row.effect == "difference":
        return f"{abs(value):.3f} {'higher' if value > 0 else 'lower'} {name}{noisy}"
    if 0.5 < value < 2:
        return f"{100 * abs(value - 1):.1f}\u00a0% {'higher' if value > 1 else 'lower'} {name}{noisy}"
    return f"{change(value, row.effect)} the {name}{noisy}"


def _outcome(comparison: Comparison, arm: str, *, gains: bool, losses: bool, settled: bool) -> Outcome:
    if arm in comparison.failures and not any(row.estimate for row in comparison.of_arm(arm)):
        return "failed"
    if gains and losses:
        return "trade-off"
    if gains or losses:
        return "better" if gains else "worse"
    return "no difference" if settled else "unclear"


def _sentence(comparison: Comparison, story: ArmStory) -> str:
    arm, same = story.arm, _join(story.same)
    if story.outcome == "failed":
        return f"It failed before it could be compared: {comparison.failures[arm]}"
    text = {
        "trade-off": f"It has {story.gain}, but {story.loss}",
        "better": f"It has {story.gain}, and nothing measured got worse",
        "worse": f"It has {story.loss}, and no gain was shown",
        "no difference": f"It does the same as the baseline within the margins: {same}",
        "unclear": "It could not be told apart from the baseline",
    }[story.outcome]
    if same and story.outcome != "no difference":
        text += f"; the same within the margin: {same}"
    if story.unclear:
        text += f"; not settled: {_join(story.unclear)}"
    if arm in comparison.identical_outputs:
        equal, total = comparison.identical_outputs[arm]
        every = "all" if equal == total else f"{equal} of"
        text += f"; {every} {total} outputs are identical to the baseline's"
    if arm in comparison.failures:
        text += "; it failed before the end"
    return f"{text}."


def _accuracy_open(comparison: Comparison, arm: str) -> bool:
    same, total = comparison.identical_outputs.get(arm, (0, -1))
    if same == total:
        return False
    rows = [row for row in comparison.of_arm(arm) if comparison.axes[row.axis].headline]
    return any(
        row.effect == "difference" and _side(row, comparison.axes[row.axis], comparison) == "unclear"
        for row in rows
    )


def _improvement(comparison: Comparison, arm: str) -> float:
    logs = []
    for row in comparison.of_arm(arm):
        axis = comparison.axes[row.axis]
        factor = improvement(row, axis) if axis.headline else None
        if factor is not None:
            logs.append(math.log(factor))
    return math.exp(sum(logs) / len(logs)) if logs else 1.0


def _is(phrases: str) -> str:
    return "are" if " and " in phrases else "is"


def _join(phrases: Sequence[str]) -> str:
    if len(phrases) < 2:
        return "".join(phrases)
    return f"{', '.join(phrases[:-1])} and {phrases[-1]}"
