"""Paired statistics without random resampling: a report is reproducible to the last digit.

Ratios for cost and performance (blocks are the pairs), differences for accuracy (items are the pairs).
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
from scipy import optimize, stats

from moecap_eval.workload import Axis

Verdict = Literal["better", "worse", "equivalent", "inconclusive", "noisy"]
Effect = Literal["ratio", "difference"]

EXACT_FLIPS_UP_TO = 16
SEEDED_FLIPS = 65_536
_CHUNK = 4096


@dataclass(frozen=True)
class Estimate:
    """A value with its confidence interval.

    ``low``, ``high`` and ``p_value`` are None where they do not exist: a single measurement has no interval,
    a jackknife no exact test. ``n`` counts pairs.
    """

    value: float
    low: float | None
    high: float | None
    p_value: float | None
    n: int
    confidence: float


def paired_ratio(
    baseline: Sequence[float], candidate: Sequence[float], *, confidence: float = 0.95
) -> Estimate:
    """Candidate over baseline, from values measured in pairs.

    Args:
        baseline: positive values, one a block.
        candidate: positive values of the same blocks.
        confidence: of the two-sided interval.

    Returns:
        exp of the mean log ratio, its Student-t interval with n-1 degrees of freedom, and the two-sided
        sign-flip p-value: exact over all 2^n flips for n <= 16, else over 65,536 seeded ones.

    Raises:
        ValueError: different lengths, fewer than two pairs, or a value that is not positive and finite.
    """
    first, second = np.asarray(baseline, dtype=np.float64), np.asarray(candidate, dtype=np.float64)
    if first.shape != second.shape or first.ndim != 1:
        raise ValueError(f"paired_ratio needs pairs, got {first.shape} and {second.shape} values")
    if first.size < 2:
        raise ValueError(f"paired_ratio needs at least 2 pairs, got {first.size}")
    for name, values in (("baseline", first), ("candidate", second)):
        if not (np.isfinite(values).all() and (values > 0).all()):
            raise ValueError(f"paired_ratio needs positive finite values, {name} has {values.min()}")
    logs = np.log(second) - np.log(first)
    mean, half = _mean_and_half_width(logs, confidence)
    return Estimate(
        value=math.exp(mean),
        low=math.exp(mean - half),
        high=math.exp(mean + half),
        p_value=sign_flip_p(logs),
        n=int(logs.size),
        confidence=confidence,
    )


def paired_difference(
    baseline: Mapping[str, float], candidate: Mapping[str, float], *, confidence: float = 0.95
) -> Estimate:
    """Candidate minus baseline, paired by item id.

    Where every score is 0 or 1: Tango's score interval for paired proportions (Statistics in Medicine 17,
    1998) and the exact McNemar test. Otherwise Student-t and the sign-flip test.

    Raises:
        ValueError: different ids, no item, or one item whose score is not 0 or 1.
    """
    if baseline.keys() != candidate.keys():
        only_first, only_second = sorted(baseline.keys() - candidate), sorted(candidate.keys() - baseline)
        example = (only_first or only_second)[0]
        raise ValueError(
            f"item ids differ: {len(only_first)} only in the baseline, {len(only_second)} only in the "
            f"candidate (e.g. {example!r})"
        )
    ids = sorted(baseline)
    if not ids:
        raise ValueError("paired_difference needs at least one item")
    first = np.array([baseline[name] for name in ids], dtype=np.float64)
    second = np.array([candidate[name] for name in ids], dtype=np.float64)
    if not (np.isfinite(first).all() and np.isfinite(second).all()):
        raise ValueError("paired_difference needs finite scores")
    if np.isin(first, (0.0, 1.0)).all() and np.isin(second, (0.0, 1.0)).all():
        lost = int(((first == 1.0) & (second == 0.0)).sum())
        gained = int(((first == 0.0) & (second == 1.0)).sum())
        low, high = tango_interval(lost, gained, len(ids), confidence)
        value = (gained - lost) / len(ids)
        return Estimate(value, low, high, mcnemar_exact(lost, gained), len(ids), confidence)
    if len(ids) < 2:
        raise ValueError("paired_difference needs at least 2 items with such scores")
    differences = second - first
    mean, half = _mean_and_half_width(differences, confidence)
    return Estimate(mean, mean - half, mean + half, sign_flip_p(differences), len(ids), confidence)


def ratio_of_sums(
    numerators: Sequence[float], denominators: Sequence[float], *, confidence: float = 0.95
) -> Estimate:
    """Sum over sum, with a delete-one jackknife on the logarithm and Student-t.

    The right average where the ratio's parts add up over blocks: S-MBU, USD per correct answer.

    Raises:
        ValueError: fewer than two pairs, or a sum (also with one pair left out) that is not positive.
    """
    top, bottom = np.asarray(numerators, dtype=np.float64), np.asarray(denominators, dtype=np.float64)
    if top.shape != bottom.shape or top.size < 2:
        raise ValueError(f"ratio_of_sums needs at least 2 pairs, got {top.size} and {bottom.size} values")
    return _jackknife(_log_ratio_of_sums(top, bottom), confidence)


def paired_ratio_of_sums(
    baseline: tuple[Sequence[float], Sequence[float]],
    candidate: tuple[Sequence[float], Sequence[float]],
    *,
    confidence: float = 0.95,
) -> Estimate:
    """How the ``ratio_of_sums`` of a candidate compares with the baseline's over the same blocks.

    Args:
        baseline: (numerators, denominators), one of each a block.
        candidate: the same for the candidate; block i is left out of both at once.
        confidence: of the interval.

    Raises:
        ValueError: different lengths, or as ``ratio_of_sums``.
    """
    arrays = [np.asarray(values, dtype=np.float64) for values in (*baseline, *candidate)]
    if len({array.shape for array in arrays}) != 1 or arrays[0].size < 2:
        raise ValueError("paired_ratio_of_sums needs the same 2 or more blocks on both sides")
    logs = _log_ratio_of_sums(arrays[2], arrays[3]) - _log_ratio_of_sums(arrays[0], arrays[1])
    return _jackknife(logs, confidence)


def sign_flip_p(differences: Sequence[float] | np.ndarray) -> float:
    """Two-sided p-value of a symmetric distribution around zero, by flipping signs.

    Exact for up to 16 values; beyond, the seeded flips count the observed signs among them, so p is never 0.
    """
    values = np.asarray(differences, dtype=np.float64)
    n = values.size
    observed = abs(values.sum())
    threshold = observed - 1e-12 * np.abs(values).sum()
    if n <= EXACT_FLIPS_UP_TO:
        sums = np.zeros(1)
        for value in values:
            sums = np.concatenate((sums + value, sums - value))
        return float((np.abs(sums) >= threshold).mean())
    generator = np.random.default_rng(0)
    extreme = 0
    for _ in range(SEEDED_FLIPS // _CHUNK):
        signs = generator.integers(0, 2, size=(_CHUNK, n), dtype=np.int8) * 2.0 - 1.0
        extreme += int((np.abs(signs @ values) >= threshold).sum())
    return (extreme + 1) / (SEEDED_FLIPS + 1)


def mcnemar_exact(b: int, c: int) -> float:
    """Two-sided exact McNemar p-value from the two counts of discordant pairs; 1.0 without any."""
    if b < 0 or c < 0:
        raise ValueError(f"mcnemar_exact needs counts, got {b} and {c}")
    return 1.0 if b + c == 0 else float(stats.binomtest(b, b + c, 0.5).pvalue)


def tango_interval(lost: int, gained: int, n: int, confidence: float = 0.95) -> tuple[float, float]:
    """Tango's score interval for the difference of paired proportions, (gained - lost)/n.

    Args:
        lost: pairs right at first and wrong then.
        gained: pairs wrong at first and right then.
        n: all pairs.
        confidence: of the two-sided interval.
    """
    if n < 1 or lost < 0 or gained < 0 or lost + gained > n:
        raise ValueError(f"tango_interval needs 0 <= lost + gained <= n, got {lost}, {gained}, {n}")
    z = float(stats.norm.ppf(0.5 + confidence / 2))
    return _tango_bound(lost, gained, n, z, -1.0), _tango_bound(lost, gained, n, z, 1.0)


def wilson_interval(correct: int, total: int, confidence: float = 0.95) -> tuple[float, float]:
    """Wilson's score interval of a proportion (E. B. Wilson, JASA 22, 1927)."""
    if not 0 <= correct <= total or total < 1:
        raise ValueError(f"wilson_interval needs 0 <= correct <= total and total >= 1, got {correct}/{total}")
    interval = stats.binomtest(correct, total).proportion_ci(confidence_level=confidence, method="wilson")
    return float(interval.low), float(interval.high)


def holm(p_values: Mapping[str, float]) -> dict[str, float]:
    """Holm's step-down adjustment, by name, in the order given."""
    ordered = sorted(p_values, key=lambda name: p_values[name])
    adjusted: dict[str, float] = {}
    running = 0.0
    for rank, name in enumerate(ordered):
        running = max(running, min(1.0, (len(ordered) - rank) * p_values[name]))
        adjusted[name] = running
    return {name: adjusted[name] for name in p_values}


def zone(axis: Axis, effect: Effect) -> tuple[float, float]:
    """The equivalence zone: [1/(1+m), 1+m] for ratios, [-m, m] for differences."""
    return (1 / (1 + axis.margin), 1 + axis.margin) if effect == "ratio" else (-axis.margin, axis.margin)


def is_noisy(aa: Estimate, axis: Axis, effect: Effect) -> bool:
    """Whether the A/A control shows that this measurement cannot resolve the margin.

    So it is when the interval of "no change at all" excludes no effect, or is wider than the equivalence
    zone (on the logarithm for ratios) and hence could never lie inside it.
    """
    if aa.low is None or aa.high is None:
        return False
    none = 1.0 if effect == "ratio" else 0.0
    low, high = zone(axis, effect)
    if effect == "ratio":
        wide = math.log(aa.high) - math.log(aa.low) > math.log(high) - math.log(low)
    else:
        wide = aa.high - aa.low > high - low
    return wide or not aa.low <= none <= aa.high


def judge(
    estimate: Estimate,
    axis: Axis,
    *,
    effect: Effect,
    aa: Estimate | None = None,
    adjusted_p: float | None = None,
) -> Verdict:
    """What an estimate says about an axis, in this order.

    1. ``noisy``: the A/A control cannot resolve the margin (``is_noisy``).
    2. ``equivalent``: the interval lies inside the equivalence zone.
    3. ``better`` or ``worse``: the interval excludes no effect and the adjusted p-value, where there is one,
       is at most 1 - confidence.
    4. ``inconclusive``: neither, or there is no interval.
    """
    if aa is not None and is_noisy(aa, axis, effect):
        return "noisy"
    if estimate.low is None or estimate.high is None:
        return "inconclusive"
    low, high = zone(axis, effect)
    if low <= estimate.low and estimate.high <= high:
        return "equivalent"
    none = 1.0 if effect == "ratio" else 0.0
    p_value = estimate.p_value if adjusted_p is None else adjusted_p
    significant = p_value is None or p_value <= 1 - estimate.confidence + 1e-12
    if estimate.low <= none <= estimate.high or not significant:
        return "inconclusive"
    rises = estimate.low > none
    return "better" if rises == (axis.better == "higher") else "worse"


def _mean_and_half_width(values: np.ndarray, confidence: float) -> tuple[float, float]:
    mean = float(values.mean())
    error = float(values.std(ddof=1)) / math.sqrt(values.size)
    return mean, float(stats.t.ppf(0.5 + confidence / 2, values.size - 1)) * error


def _log_ratio_of_sums(top: np.ndarray, bottom: np.ndarray) -> np.ndarray:
    """Element 0: log of sum/sum; elements 1..n: the same with one pair left out."""
    tops = np.concatenate(([top.sum()], top.sum() - top))
    bottoms = np.concatenate(([bottom.sum()], bottom.sum() - bottom))
    if not (
        np.isfinite(tops).all() and np.isfinite(bottoms).all() and (tops > 0).all() and (bottoms > 0).all()
    ):
        raise ValueError("sums must stay positive and finite when any one pair is left out")
    return np.log(tops) - np.log(bottoms)


def _jackknife(logs: np.ndarray, confidence: float) -> Estimate:
    """Estimate from [log of all, logs with one pair left out]."""
    value, left_out = float(logs[0]), logs[1:]
    n = left_out.size
    error = math.sqrt((n - 1) / n * float(((left_out - left_out.mean()) ** 2).sum()))
    half = float(stats.t.ppf(0.5 + confidence / 2, n - 1)) * error
    return Estimate(math.exp(value), math.exp(value - half), math.exp(value + half), None, n, confidence)


def _tango_bound(lost: int, gained: int, n: int, z: float, side: float) -> float:
    """The bound on one side: where the score statistic falls to z in absolute value."""
    observed = (gained - lost) / n
    if observed == side:
        return side

    def excess(delta: float) -> float:
        linear = (2 * n - gained + lost) * delta - gained - lost
        constant = -lost * delta * (1 - delta)
        root = math.sqrt(max(0.0, linear * linear - 8 * n * constant))
        p_lost = (root - linear) / (4 * n)
        variance = max(0.0, n * (2 * p_lost + delta * (1 - delta)))
        distance = side * (n * delta - (gained - lost))
        return distance - z * math.sqrt(variance)

    inside = observed + side * 1e-12
    return float(optimize.brentq(excess, inside, side, xtol=1e-14))
