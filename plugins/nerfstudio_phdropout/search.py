"""The largest drop ratio that training views hardly notice (PH-Dropout, arXiv 2410.05468, section 3)."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

from nerfstudio_phdropout.checks import check_open_unit


@dataclass(frozen=True)
class DropoutSearchResult:
    """What a search found.

    Attributes:
        ratio: the drop ratio to use.
        baseline: quality at ratio 0.
        threshold: a ratio passes iff its quality exceeds this.
        evaluations: every (ratio, quality) asked for, in order, the baseline first.
        saturated: not even the largest ratio failed.
    """

    ratio: float
    baseline: float
    threshold: float
    evaluations: tuple[tuple[float, float], ...]
    saturated: bool


def max_dropout_ratio(
    quality: Callable[[float], float],
    margin: float = 0.05,
    *,
    step: float = 0.01,
    max_ratio: float = 0.99,
    method: Literal["bisection", "linear"] = "bisection",
    first_violating: bool = False,
) -> DropoutSearchResult:
    """Largest multiple of ``step`` up to ``max_ratio`` with quality(ratio) > (1 - margin) * quality(0).

    Bisection takes the quality to fall as the ratio grows (nested masks make it so, nearly) and asks
    at most 1 + ceil(log2(max_ratio / step + 1)) times: 8 on the default grid.

    Args:
        quality: ratio -> quality of training views; higher is better, positive at 0.
        margin: in (0, 1).
        step: distance of the ratios tried.
        max_ratio: largest one tried, below 1.
        method: ``linear`` walks up and stops at the first ratio that fails.
        first_violating: return the first failing ratio instead of the last passing one (the authors' code).

    Raises:
        ValueError: margin or step outside (0, 1), quality(0) <= 0, or a quality that is not a number.

    Warns:
        RuntimeWarning: no ratio passes (the result is 0), or every one does (``saturated``).
    """
    check_open_unit("margin", margin)
    check_open_unit("step", step)
    check_open_unit("max_ratio", max_ratio)
    if method not in ("bisection", "linear"):
        raise ValueError(f"method must be 'bisection' or 'linear', got {method!r}")
    asked: list[tuple[float, float]] = []

    def ask(ratio: float) -> float:
        value = float(quality(ratio))
        if math.isnan(value):
            raise ValueError(f"quality({ratio}) returned nan; the search needs numbers")
        asked.append((ratio, value))
        return value

    baseline = ask(0.0)
    if baseline <= 0:
        raise ValueError(
            f"quality(0.0) returned {baseline}; the search needs a positive quality without dropout"
        )
    threshold = (1 - margin) * baseline
    count = int(max_ratio / step + 1e-9)

    def passes(index: int) -> bool:
        return ask(round(index * step, 10)) > threshold

    best = _linear(passes, count) if method == "linear" else _bisect(passes, count)
    saturated = best == count
    if saturated:
        warnings.warn(
            f"no drop ratio up to {max_ratio} costs {margin:.0%} of quality; the ratio says little",
            RuntimeWarning,
            stacklevel=2,
        )
    elif best == 0:
        warnings.warn(
            f"no drop ratio >= {step} keeps {1 - margin:.0%} of quality; use a smaller step",
            RuntimeWarning,
            stacklevel=2,
        )
    index = best + 1 if first_violating and not saturated else best
    return DropoutSearchResult(round(index * step, 10), baseline, threshold, tuple(asked), saturated)


def _linear(passes: Callable[[int], bool], count: int) -> int:
    for index in range(1, count + 1):
        if not passes(index):
            return index - 1
    return count


def _bisect(passes: Callable[[int], bool], count: int) -> int:
    low, high = 0, count + 1
    while high - low > 1:
        middle = (low + high) // 2
        if passes(middle):
            low = middle
        else:
            high = middle
    return low
