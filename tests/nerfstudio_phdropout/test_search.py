"""The search of the drop ratio on curves whose answer is known."""

from __future__ import annotations

import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nerfstudio_phdropout import PHDropoutConfig, max_dropout_ratio


@settings(max_examples=60, deadline=None)
@given(st.floats(0.015, 0.98), st.floats(0.5, 6))
def test_ph08_bisection_equals_the_linear_scan_in_eight_calls(limit, power):
    def quality(r: float) -> float:
        return 1.0 - 0.05 * (r / limit) ** power

    fast = max_dropout_ratio(quality)
    slow = max_dropout_ratio(quality, method="linear")
    assert fast.ratio == slow.ratio
    assert len(fast.evaluations) <= 8
    assert fast.evaluations[0] == (0.0, 1.0)
    assert quality(fast.ratio) > fast.threshold >= quality(round(fast.ratio + 0.01, 10))
    assert slow.evaluations[-1][0] == round(slow.ratio + 0.01, 10)


def test_ph08_first_violating_is_one_step_further():
    def quality(r: float) -> float:
        return 1 - r

    assert max_dropout_ratio(quality, 0.055).ratio == 0.05
    assert max_dropout_ratio(quality, 0.055, first_violating=True, method="linear").ratio == 0.06


def test_ph08_saturation_and_zero_warn():
    with pytest.warns(RuntimeWarning, match="no drop ratio up to 0.99 costs"):
        result = max_dropout_ratio(lambda _: 1.0)
    assert (result.ratio, result.saturated) == (0.99, True)
    with pytest.warns(RuntimeWarning, match="no drop ratio >= 0.01 keeps 95%"):
        result = max_dropout_ratio(lambda r: 1.0 if r == 0 else 0.1)
    assert (result.ratio, result.saturated) == (0.0, False)


def test_ph08_nan_and_nonsense_raise():
    with pytest.raises(ValueError, match=r"quality\(0.5\) returned nan"):
        max_dropout_ratio(lambda r: math.nan if r else 1.0)
    with pytest.raises(ValueError, match=r"quality\(0.0\) returned -1.0"):
        max_dropout_ratio(lambda _: -1.0)
    for margin in (0.0, 1.0, math.nan):
        with pytest.raises(ValueError, match="margin must lie in"):
            max_dropout_ratio(lambda _: 1.0, margin)
    with pytest.raises(ValueError, match="method must be"):
        max_dropout_ratio(lambda _: 1.0, method="golden")


def test_config_refuses_impossible_values_and_knows_the_reference():
    with pytest.raises(ValueError, match="dropout_ratio must lie"):
        PHDropoutConfig(ratio=1.0)
    with pytest.raises(ValueError, match="margin must lie"):
        PHDropoutConfig(margin=0.0)
    with pytest.raises(ValueError, match="num_trials must be at least 2"):
        PHDropoutConfig(num_trials=1)
    reference = PHDropoutConfig.reference("splat")
    assert (reference.num_trials, reference.search, reference.quantize) == (100, "linear", True)
    assert PHDropoutConfig.reference("nerf").num_trials == 30
    with pytest.raises(ValueError, match="kind must be"):
        PHDropoutConfig.reference("mesh")
