"""Activation sheets: closed forms, conservation, storage."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moecap_eval.routing import RoutingTrace, expected_distinct_experts


def uniform_trace(passes: int, tokens: int, experts: int, top_k: int, seed: int = 0) -> RoutingTrace:
    """Tokens that each pick top_k distinct experts uniformly, in two layers."""
    generator = np.random.default_rng(seed)
    picks = np.argsort(generator.random((passes, 2, tokens, experts)), axis=-1)[..., :top_k]
    counts = np.zeros((passes, 2, experts), np.int32)
    for index in np.ndindex(passes, 2):
        counts[index] = np.bincount(picks[index].ravel(), minlength=experts)
    return RoutingTrace(counts, np.full(passes, tokens, np.int32), (0, 3), top_k)


@pytest.mark.parametrize(("experts", "top_k", "tokens"), [(8, 2, 1), (8, 2, 4), (32, 4, 8), (5, 5, 3)])
def test_expected_distinct_is_the_mean_over_all_routings(experts: int, top_k: int, tokens: int) -> None:
    passes = 4000
    distinct = uniform_trace(passes, tokens, experts, top_k).distinct()
    standard_error = distinct.std(ddof=1) / np.sqrt(distinct.size)
    expected = expected_distinct_experts(experts, top_k, tokens)
    assert abs(distinct.mean() - expected) <= 4 * standard_error + 1e-9


def test_expected_distinct_by_enumeration() -> None:
    # Two tokens, each one of the three pairs of {0, 1, 2}: nine routings, three of them with two experts.
    assert expected_distinct_experts(3, 2, 2) == pytest.approx((3 * 2 + 6 * 3) / 9)
    assert expected_distinct_experts(128, 8, 0) == 0
    with pytest.raises(ValueError, match="0 < top_k <= num_experts"):
        expected_distinct_experts(4, 5, 1)


@pytest.mark.parametrize("recorded_tokens", [1, 6])
@pytest.mark.parametrize("batch", [1, 2, 8, 32])
def test_cap20_resampling_a_uniform_trace_gives_the_closed_form(batch: int, recorded_tokens: int) -> None:
    experts, top_k = 16, 4
    trace = uniform_trace(3000, recorded_tokens, experts, top_k, seed=1)
    distinct = trace.resample(batch, seed=batch).distinct()
    standard_error = distinct.std(ddof=1) / np.sqrt(distinct.size)
    expected = expected_distinct_experts(experts, top_k, batch)
    assert abs(distinct.mean() - expected) <= 3 * standard_error + 1e-9


@settings(max_examples=40, deadline=None)
@given(
    experts=st.integers(2, 12),
    data=st.data(),
    tokens=st.integers(1, 9),
    batch=st.integers(1, 20),
    seed=st.integers(0, 2**16),
)
def test_cap20_resampling_conserves_tokens(experts, data, tokens, batch, seed) -> None:
    top_k = data.draw(st.integers(1, experts))
    sample = uniform_trace(4, tokens, experts, top_k, seed).resample(batch, seed)
    assert sample.counts.shape == (4, 2, experts)
    assert (sample.counts.sum(axis=2) == batch * top_k).all()
    assert (sample.counts <= batch).all()
    assert (sample.distinct() >= top_k).all()


def test_cap20_idle_experts_stay_idle() -> None:
    counts = np.zeros((5, 1, 6), np.int32)
    counts[:, 0, [1, 4, 5]] = [3, 3, 2]
    trace = RoutingTrace(counts, np.full(5, 4, np.int32), (2,), 2)
    assert set(np.flatnonzero(trace.resample(50).counts.sum(axis=(0, 1)))) == {1, 4, 5}


def test_cap20_saved_sheets_come_back(tmp_path: Path) -> None:
    trace = uniform_trace(3, 2, 8, 2)
    trace.save(tmp_path / "sheet.npz")
    loaded = RoutingTrace.load(tmp_path / "sheet.npz")
    assert (loaded.counts == trace.counts).all()
    assert (loaded.tokens == trace.tokens).all()
    assert (loaded.layer_ids, loaded.top_k) == ((0, 3), 2)
    (tmp_path / "other.npz").write_bytes(b"PK\x05\x06" + b"\0" * 18)
    with pytest.raises(ValueError, match="is not a saved RoutingTrace"):
        RoutingTrace.load(tmp_path / "other.npz")


def test_a_trace_that_loses_tokens_is_refused() -> None:
    counts = np.zeros((2, 1, 4), np.int32)
    counts[:, 0, :2] = [[1, 1], [2, 1]]
    with pytest.raises(ValueError, match=r"pass 1, layer 7: 3 routed pairs, expected tokens\*k = 4"):
        RoutingTrace(counts, np.array([1, 2]), (7,), 2)
    with pytest.raises(ValueError, match=r"needs counts \[passes, layers, experts\]"):
        RoutingTrace(counts[0], np.array([1, 2]), (7,), 2)
    with pytest.raises(ValueError, match="at least 1"):
        uniform_trace(2, 1, 4, 2).resample(0)
