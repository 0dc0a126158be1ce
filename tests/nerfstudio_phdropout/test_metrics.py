"""Metrics against scipy, closed forms and slow direct definitions."""

from __future__ import annotations

import math
from itertools import pairwise

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from nerfstudio_phdropout import (
    auce,
    ause,
    calibrate_scale,
    coverage,
    ece,
    nll,
    pearson,
    sparsification_curve,
    spearman,
    uncertainty_metrics,
)


def sample(seed: int, size: int = 500, levels: int | None = None) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    std = rng.random(size) * 0.3
    if levels:
        std = np.round(std * levels) / levels
    return np.abs(rng.normal(size=size)) * (0.05 + std), std


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 1000), st.sampled_from([None, 3, 10]))
def test_ph11_correlations_equal_scipy(seed, levels):
    error, std = sample(seed, levels=levels)
    assert spearman(error, std) == pytest.approx(stats.spearmanr(error, std).statistic, abs=1e-12)
    assert pearson(error, std) == pytest.approx(stats.pearsonr(error, std).statistic, abs=1e-12)


@settings(max_examples=30, deadline=None)
@given(
    st.integers(0, 1000),
    st.sampled_from(["normalized", "reference"]),
    st.sampled_from(["mae", "mse", "rmse"]),
)
def test_ph11_ause_does_not_depend_on_pixel_order(seed, definition, metric):
    error, std = sample(seed, levels=5)
    order = np.random.default_rng(seed + 1).permutation(error.size)
    first = ause(error, std, definition=definition, metric=metric)
    assert first == pytest.approx(
        ause(error[order], std[order], definition=definition, metric=metric), abs=1e-13
    )


def test_ph11_ause_definitions_against_slow_loops():
    error, std = sample(7, size=730)

    def curve(key: np.ndarray) -> list[float]:
        ranked = error[np.argsort(key, kind="stable")]
        return [float(ranked[: 730 * (100 - t) // 100].mean()) for t in range(100)]

    by_std, by_error = curve(std), curve(error)
    np.testing.assert_allclose(sparsification_curve(error, std), by_std, rtol=1e-12)
    gap = [a - b for a, b in zip(by_std, by_error, strict=True)]
    top = max(by_std + by_error)
    normalized = sum((a + b) / 2 * 0.01 for a, b in pairwise(gap)) / top
    reference = sum((a + b) / 2 for a, b in pairwise(gap[1:]))
    assert ause(error, std) == pytest.approx(normalized, abs=1e-12)
    assert ause(error, std, definition="reference") == pytest.approx(reference, abs=1e-10)


def test_ph11_perfect_and_constant_uncertainty():
    error, _ = sample(3)
    assert ause(error, error) == pytest.approx(0, abs=1e-12)
    flat = np.ones_like(error)
    np.testing.assert_allclose(sparsification_curve(error, flat), error.mean(), rtol=1e-12)
    assert math.isnan(spearman(error, flat))
    assert ause(np.zeros(200), np.arange(200)) == 0.0


def test_ph11_too_few_or_odd_values_are_refused():
    with pytest.raises(ValueError, match="at least 100 entries, got 99"):
        ause(np.ones(99), np.ones(99))
    with pytest.raises(ValueError, match=r"shapes differ: errors \(100,\), uncertainties \(101,\)"):
        ause(np.ones(100), np.ones(101))
    with pytest.raises(ValueError, match="must not be negative"):
        ause(-np.ones(100), np.ones(100))
    with pytest.raises(ValueError, match="metric must be"):
        ause(np.ones(100), np.ones(100), metric="max")
    with pytest.raises(ValueError, match="confidence must lie"):
        coverage(np.ones(3), np.ones(3), np.ones(3), confidence=95)


def test_ph11_nll_equals_scipy_with_a_floor():
    rng = np.random.default_rng(0)
    y, m, s = rng.random(50), rng.random(50), rng.random(50) * 0.02
    expected = -stats.norm.logpdf(y, m, np.maximum(s, 1e-2)).mean()
    assert nll(y, m, s) == pytest.approx(expected, abs=1e-12)


def test_ph11_ece_counts_the_largest_std():
    std = np.array([0.05, 0.15, 0.95, 1.0])
    error = np.array([0.10, 0.15, 0.55, 0.0])
    assert ece(error, std) == pytest.approx((0.05 + 0.0 + abs(0.55 - 1.95)) / 4)
    assert ece(np.full(4, 0.3), np.zeros(4)) == pytest.approx(0.3)


def test_ph11_coverage_and_auce_of_a_true_gaussian():
    rng = np.random.default_rng(1)
    std = rng.random(40_000) + 0.1
    y = rng.normal(size=40_000) * std
    zero = np.zeros_like(y)
    assert coverage(y, zero, std) == pytest.approx(0.95, abs=5 * math.sqrt(0.95 * 0.05 / 40_000))
    assert auce(y, zero, std) < 0.01
    assert auce(y, zero, 1e-6 * std) == pytest.approx(0.5, abs=1e-3)
    assert coverage(np.zeros(3), np.zeros(3), np.zeros(3)) == 1.0
    assert coverage(np.ones(3), np.zeros(3), np.zeros(3)) == 0.0


def test_ph17_scale_calibration_minimises_the_likelihood_loss():
    rng = np.random.default_rng(2)
    std = rng.random(2000) + 0.1
    error = np.abs(rng.normal(size=2000)) * std * 3
    factor = calibrate_scale(error, std)
    assert factor == pytest.approx(3, rel=0.1)
    zero = np.zeros(2000)
    best = nll(error, zero, factor * std)
    assert best < nll(error, zero, 0.98 * factor * std)
    assert best < nll(error, zero, 1.02 * factor * std)


def test_ph17_foreground_metrics_stand_beside_the_whole():
    rng = np.random.default_rng(3)
    mean, target = torch.rand(20, 20, 3), torch.rand(20, 20, 3)
    std = torch.from_numpy(rng.random((20, 20, 3)))
    mask = torch.zeros(20, 20, 1)
    mask[5:15, 5:15] = 1
    values = uncertainty_metrics(mean, std, target, mask)
    inside = uncertainty_metrics(mean[5:15, 5:15], std[5:15, 5:15], target[5:15, 5:15])
    whole = uncertainty_metrics(mean, std, target)
    assert len(values) == 20
    for name, value in whole.items():
        assert values[name] == value
        assert values[f"foreground_{name}"] == pytest.approx(inside[name], abs=1e-12)
