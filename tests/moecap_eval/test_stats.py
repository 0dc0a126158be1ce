"""Statistics against hand-computed values, published tables, enumeration and simulation."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import optimize, stats

from moecap_eval import (
    Axis,
    Estimate,
    holm,
    judge,
    mcnemar_exact,
    paired_difference,
    paired_ratio,
    ratio_of_sums,
    wilson_interval,
)
from moecap_eval.stats import paired_ratio_of_sums, sign_flip_p, tango_interval

SPEED = Axis("throughput", "performance", "1/s", "higher", margin=0.05)
SCORE = Axis("exact_match", "accuracy", "1", "higher", level="item", margin=0.02)
Z95 = 1.959963984540054


def test_paired_ratio_by_hand():
    # log ratios ln 2 and ln 8: mean ln 4, standard deviation ln 4 / sqrt 2, t(1) = 12.7062
    estimate = paired_ratio([1.0, 1.0], [2.0, 8.0])
    half = 12.706204736432095 * (math.log(4) / math.sqrt(2)) / math.sqrt(2)
    assert estimate.value == pytest.approx(4.0, rel=1e-12)
    assert estimate.low == pytest.approx(math.exp(math.log(4) - half), rel=1e-9)
    assert estimate.high == pytest.approx(math.exp(math.log(4) + half), rel=1e-9)
    assert (estimate.p_value, estimate.n) == (0.5, 2)


@pytest.mark.parametrize(
    ("first", "second"),
    [([1.0], [2.0]), ([1.0, 2.0], [1.0]), ([1.0, 0.0], [1.0, 1.0]), ([1.0, 2.0], [1.0, math.nan])],
)
def test_paired_ratio_refuses(first, second):
    with pytest.raises(ValueError, match="paired_ratio needs"):
        paired_ratio(first, second)


@given(st.lists(st.floats(-5, 5), min_size=2, max_size=8))
def test_sign_flip_equals_full_enumeration(differences):
    observed = abs(math.fsum(differences))
    scale = 1e-12 * math.fsum(map(abs, differences))
    flips = [
        abs(math.fsum(s * d for s, d in zip(signs, differences, strict=True))) >= observed - scale
        for signs in itertools.product((1, -1), repeat=len(differences))
    ]
    assert sign_flip_p(differences) == pytest.approx(sum(flips) / len(flips), abs=2 / len(flips))


def test_sign_flip_smallest_p_values():
    assert sign_flip_p([1.0] * 8) == 2 / 256
    assert sign_flip_p([1.0] * 16) == 2 / 65536
    assert sign_flip_p([1.0] * 17) == pytest.approx(2 / 65536, rel=4)  # seeded flips, never zero
    assert sign_flip_p(np.zeros(5)) == 1.0


def test_mcnemar_by_hand():
    assert mcnemar_exact(0, 0) == 1.0
    assert mcnemar_exact(2, 12) == pytest.approx(2 * (1 + 14 + 91) / 2**14, rel=1e-12)
    assert mcnemar_exact(5, 5) == 1.0


def tango_by_definition(lost: int, gained: int, n: int) -> tuple[float, float]:
    """Bounds where the score statistic with a numerically maximised likelihood falls to z."""

    def statistic(delta: float) -> float:
        # p_lost = q, p_gained = q + delta, concordant 1 - 2q - delta
        low, high = max(0.0, -delta), (1 - delta) / 2

        def negative(q: float) -> float:
            terms = [(lost, q), (gained, q + delta), (n - lost - gained, 1 - 2 * q - delta)]
            return -sum(count * math.log(max(p, 1e-300)) for count, p in terms if count)

        q = optimize.minimize_scalar(
            negative, bounds=(low, high), method="bounded", options={"xatol": 1e-12}
        ).x
        return (gained - lost - n * delta) / math.sqrt(n * (2 * q + delta - delta * delta))

    estimate = (gained - lost) / n
    low = optimize.brentq(lambda d: statistic(d) - Z95, -0.9999, estimate - 1e-9)
    high = optimize.brentq(lambda d: statistic(d) + Z95, estimate + 1e-9, 0.9999)
    return low, high


@pytest.mark.parametrize(("lost", "gained", "n"), [(2, 12, 50), (1, 9, 44), (7, 3, 30), (20, 25, 100)])
def test_cap13_tango_equals_its_definition(lost, gained, n):
    assert tango_interval(lost, gained, n) == pytest.approx(tango_by_definition(lost, gained, n), abs=2e-6)


@pytest.mark.parametrize("n", [10, 381, 512])
def test_cap13_tango_without_discordant_pairs(n):
    bound = Z95**2 / (n + Z95**2)
    assert tango_interval(0, 0, n) == pytest.approx((-bound, bound), abs=1e-9)
    assert (bound < 0.01) == (n >= 381)


def test_tango_is_symmetric_and_reaches_the_ends():
    low, high = tango_interval(3, 8, 40)
    assert tango_interval(8, 3, 40) == pytest.approx((-high, -low), abs=1e-12)
    assert tango_interval(0, 20, 20)[1] == 1.0
    assert tango_interval(20, 0, 20)[0] == -1.0


@pytest.mark.parametrize(("p_lost", "p_gained"), [(0.05, 0.05), (0.02, 0.12), (0.1, 0.3)])
def test_cap13_tango_coverage_by_enumeration(p_lost, p_gained):
    """Exact coverage over the trinomial of 40 pairs: at least 94 %, as published for score intervals."""
    n, coverage = 40, 0.0
    for lost in range(n + 1):
        for gained in range(n + 1 - lost):
            probability = stats.multinomial.pmf(
                [lost, gained, n - lost - gained], n, [p_lost, p_gained, 1 - p_lost - p_gained]
            )
            if probability < 1e-9:
                continue
            low, high = tango_interval(lost, gained, n)
            coverage += probability * (low <= p_gained - p_lost <= high)
    assert 0.93 < coverage < 0.985


def test_wilson_by_hand():
    # 8 of 10: centre (0.8 + z^2/20)/(1 + z^2/10), half-width z sqrt(0.016 + z^2/400)/(1 + z^2/10)
    z2 = Z95**2
    centre, half = (0.8 + z2 / 20) / (1 + z2 / 10), Z95 * math.sqrt(0.016 + z2 / 400) / (1 + z2 / 10)
    assert wilson_interval(8, 10) == pytest.approx((centre - half, centre + half), rel=1e-9)
    assert wilson_interval(0, 10)[0] == 0.0
    with pytest.raises(ValueError, match="wilson_interval needs"):
        wilson_interval(11, 10)


def test_holm_by_hand():
    assert holm({"a": 0.01, "b": 0.04, "c": 0.03, "d": 0.005}) == pytest.approx(
        {"a": 0.03, "b": 0.06, "c": 0.06, "d": 0.02}
    )
    assert holm({"a": 0.9, "b": 0.8}) == {"a": 1.0, "b": 1.0}
    assert holm({}) == {}


def test_paired_difference_of_right_and_wrong():
    before = {str(i): float(i < 14) for i in range(20)}
    after = {str(i): float(i < 10 or i >= 18) for i in range(20)}
    estimate = paired_difference(before, after)
    assert estimate.value == pytest.approx(-0.1)
    assert (estimate.low, estimate.high) == tango_interval(4, 2, 20)
    assert estimate.p_value == mcnemar_exact(4, 2)
    assert estimate.n == 20


def test_paired_difference_of_scores_is_students():
    before = {"a": 0.5, "b": 0.25, "c": 0.75}
    after = {"c": 1.0, "b": 0.5, "a": 0.5}
    estimate = paired_difference(before, after)
    reference = stats.ttest_rel([0.5, 0.5, 1.0], [0.5, 0.25, 0.75]).confidence_interval(0.95)
    assert (estimate.low, estimate.high) == pytest.approx((reference.low, reference.high), rel=1e-9)


def test_paired_difference_needs_the_same_items():
    with pytest.raises(ValueError, match="1 only in the baseline, 0 only in the candidate"):
        paired_difference({"a": 1.0, "b": 1.0}, {"a": 1.0})


def test_ratio_of_sums_by_hand():
    # 6/3; leaving one out: log(4/2), log(2/1) ... equal ratios give no spread
    estimate = ratio_of_sums([2.0, 4.0], [1.0, 2.0])
    assert (estimate.value, estimate.low, estimate.high) == pytest.approx((2.0, 2.0, 2.0))
    assert estimate.p_value is None
    spread = ratio_of_sums([2.0, 6.0], [1.0, 2.0])
    logs = [math.log(3.0), math.log(2.0)]
    error = math.sqrt(0.5 * sum((log - sum(logs) / 2) ** 2 for log in logs))
    assert spread.value == pytest.approx(8 / 3)
    assert spread.high == pytest.approx(8 / 3 * math.exp(12.706204736432095 * error), rel=1e-9)


def test_paired_ratio_of_sums_cancels_what_both_share():
    common = [1.0, 5.0, 2.0, 9.0]
    estimate = paired_ratio_of_sums((common, [1.0] * 4), ([2 * value for value in common], [1.0] * 4))
    assert (estimate.value, estimate.low, estimate.high) == pytest.approx((2.0, 2.0, 2.0))


def ratio(value: float, low: float, high: float, p: float | None = 0.001) -> Estimate:
    return Estimate(value, low, high, p, 8, 0.95)


@pytest.mark.parametrize(
    ("estimate", "aa", "adjusted", "verdict"),
    [
        (ratio(1.20, 1.10, 1.30), None, None, "better"),
        (ratio(0.80, 0.70, 0.90), None, None, "worse"),
        (ratio(1.02, 1.01, 1.04), None, None, "equivalent"),
        (ratio(1.20, 0.95, 1.40), None, None, "inconclusive"),
        (ratio(1.20, 1.10, 1.30), None, 0.2, "inconclusive"),
        (ratio(1.20, 1.10, 1.30, None), None, None, "better"),
        (ratio(1.20, 1.10, 1.30), ratio(1.00, 0.99, 1.01), None, "better"),
        (ratio(1.20, 1.10, 1.30), ratio(1.02, 1.01, 1.03), None, "noisy"),
        (ratio(1.01, 1.00, 1.02), ratio(1.00, 0.90, 1.10), None, "noisy"),
        (Estimate(2.0, None, None, None, 1, 0.95), None, None, "inconclusive"),
    ],
)
def test_cap13_judge_in_its_order(estimate, aa, adjusted, verdict):
    assert judge(estimate, SPEED, effect="ratio", aa=aa, adjusted_p=adjusted) == verdict


def test_judge_lower_is_better_and_differences():
    cost = Axis("usd", "cost", "USD", "lower", margin=0.05)
    assert judge(ratio(1.2, 1.1, 1.3), cost, effect="ratio") == "worse"
    assert judge(ratio(-0.1, -0.15, -0.05), SCORE, effect="difference") == "worse"
    assert judge(ratio(0.0, -0.007, 0.007, 1.0), SCORE, effect="difference") == "equivalent"


def verdicts(shift: float, noise: float, blocks: int, runs: int, margin: float, seed: int) -> list[str]:
    """Verdicts on throughput over simulated runs, A/A control included, as a report makes them."""
    axis = Axis("throughput", "performance", "1/s", "higher", margin=margin)
    generator = np.random.default_rng(seed)
    found = []
    for _ in range(runs):
        drift = np.exp(0.1 * generator.standard_normal(blocks))  # shared by all arms of a block
        plain, control, other = (drift * np.exp(noise * generator.standard_normal(blocks)) for _ in range(3))
        aa = paired_ratio(plain, control)
        found.append(judge(paired_ratio(plain, other * shift), axis, effect="ratio", aa=aa))
    return found


@pytest.mark.parametrize(("blocks", "noise"), [(8, 0.01), (12, 0.03), (16, 0.03)])
def test_cap13_no_difference_is_reported_at_most_5_percent(blocks, noise):
    runs = 2000
    found = verdicts(1.0, noise, blocks, runs, 0.05, seed=1)
    false = sum(verdict in {"better", "worse"} for verdict in found) / runs
    assert false <= 0.05 + 2.6 * math.sqrt(0.05 * 0.95 / runs)


@pytest.mark.parametrize("shift", [1.05, 1 / 1.05])
def test_cap13_5_percent_shift_with_3_percent_noise_and_12_blocks_is_found(shift):
    """Found = interval and exact test agree on the right direction, before equivalence is asked."""
    runs, hits = 2000, 0
    generator = np.random.default_rng(2)
    for _ in range(runs):
        plain = np.exp(0.03 * generator.standard_normal(12))
        other = shift * np.exp(0.03 * generator.standard_normal(12))
        estimate = paired_ratio(plain, other)
        excluded = estimate.low > 1 if shift > 1 else estimate.high < 1
        hits += excluded and estimate.p_value <= 0.05
    assert hits / runs >= 0.9


def test_cap13_3_percent_slowdown_is_found():
    """With the block noise of a quiet machine (1 %) and a margin that such a run can resolve."""
    found = verdicts(0.97, 0.01, 12, 1000, 0.02, seed=3)
    assert found.count("worse") / 1000 >= 0.9


@settings(max_examples=50)
@given(st.lists(st.floats(0.1, 10), min_size=2, max_size=10), st.floats(0.1, 10))
def test_paired_ratio_is_scale_free_and_antisymmetric(values, factor):
    other = [value * (1 + 0.1 * index) for index, value in enumerate(values)]
    there, back = paired_ratio(values, other), paired_ratio(other, values)
    assert there.value * back.value == pytest.approx(1.0)
    assert there.low * back.high == pytest.approx(1.0)
    scaled = paired_ratio([factor * v for v in values], other)
    assert scaled.value * factor == pytest.approx(there.value)
