"""Exact draws (GR-06): enumeration, more than 2^24 items, no drift, twins."""

from __future__ import annotations

import os
import subprocess
import sys

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from rl_replay_gear import PrefixSumTree


def reference(weights, u):
    cumulative = np.cumsum(weights)
    return np.array([np.flatnonzero(cumulative > x * cumulative[-1])[0] for x in u])


@settings(max_examples=60, deadline=None)
@given(st.lists(st.integers(0, 9), min_size=1, max_size=300).filter(any))
def test_gr06_draw_is_the_inverse_cumulative_sum(weights):
    tree = PrefixSumTree(len(weights))
    tree.update(torch.arange(len(weights)), torch.tensor(weights, dtype=torch.float64))
    u = (np.arange(997) + 0.5) / 997
    index, weight = tree.draw(torch.from_numpy(u))
    assert index.tolist() == reference(weights, u).tolist()
    assert weight.tolist() == [weights[i] for i in index.tolist()]
    twin, _ = tree.draw_torch(torch.from_numpy(u))
    assert torch.equal(twin, index)
    assert tree.total == sum(weights)
    assert tree.minimum == min(w for w in weights if w)


def test_gr06_every_one_of_2e7_unit_weights_is_reached():
    count = 20_000_000
    tree = PrefixSumTree(count)
    tree.update(torch.arange(count), torch.ones(count, dtype=torch.float64))
    for begin in (0, 2**24 - 5000, 2**24 + 1 - 5000, count - 10_000):
        i = torch.arange(begin, begin + 10_000)
        index, _ = tree.draw((i.double() + 0.5) / count)
        assert torch.equal(index, i)
    sample = torch.randint(0, count, (200_000,), generator=torch.Generator().manual_seed(0))
    assert torch.equal(tree.draw((sample.double() + 0.5) / count)[0], sample)


def test_gr06_zero_weights_are_never_drawn_even_at_the_ends():
    weights = torch.zeros(10_000, dtype=torch.float64)
    positive = torch.tensor([3, 64, 65, 4095, 4096, 9_001])
    weights[positive] = torch.tensor([1e-300, 0.1, 0.2, 1e-12, 0.3, 1e-9], dtype=torch.float64)
    tree = PrefixSumTree(10_000)
    tree.update(torch.arange(10_000), weights)
    edge = torch.tensor([0.0, 2.0**-53, 0.5, 1 - 2.0**-53, 1 - 2.0**-52], dtype=torch.float64)
    for u in (edge, torch.rand(20_000, dtype=torch.float64)):
        for draw in (tree.draw, tree.draw_torch):
            assert bool((weights[draw(u)[0]] > 0).all())
    with pytest.raises(ValueError, match="no item has positive weight"):
        PrefixSumTree(5).draw(edge)


def test_gr06_sums_do_not_drift_and_twins_agree():
    generator = torch.Generator().manual_seed(3)
    tree, twin = PrefixSumTree(5000), PrefixSumTree(5000)
    weights = torch.zeros(5000, dtype=torch.float64)
    for _ in range(300):
        index = torch.randperm(5000, generator=generator)[:50]
        weight = torch.rand(50, dtype=torch.float64, generator=generator) * 10.0 ** torch.randint(
            -12, 12, (50,)
        )
        tree.update(index, weight)
        twin._update_torch(index, weight)
        weights[index] = weight
    tree.update(torch.arange(5000), torch.zeros(5000, dtype=torch.float64))
    small = torch.full((5000,), 1e-12, dtype=torch.float64)
    tree.update(torch.arange(5000), small)
    assert tree.total == pytest.approx(5e-9, rel=1e-12)
    assert twin.total == pytest.approx(float(weights.sum()), rel=1e-12)
    assert twin.minimum == float(weights[weights > 0].min())


def test_gr06_bad_weights_change_nothing():
    tree = PrefixSumTree(10)
    tree.update(torch.arange(10), torch.ones(10, dtype=torch.float64))
    for bad in (float("nan"), -1.0, float("inf")):
        with pytest.raises(ValueError, match="index 1 is"):
            tree.update(torch.tensor([0, 1]), torch.tensor([5.0, bad], dtype=torch.float64))
    with pytest.raises(IndexError, match=r"outside 0\.\.9"):
        tree.update(torch.tensor([10]), torch.ones(1, dtype=torch.float64))
    assert tree.total == 10.0


def test_gr06_bulk_and_single_updates_give_the_same_sums():
    weights = torch.rand(3000, dtype=torch.float64)
    bulk, single = PrefixSumTree(3000), PrefixSumTree(3000)
    bulk.update(torch.arange(3000), weights)
    for i in range(0, 3000, 10):
        single.update(torch.arange(i, i + 10), weights[i : i + 10])
    assert torch.equal(bulk._values, single._values)
    assert torch.equal(bulk._minima, single._minima)


INTERPRETED = """
import torch
from rl_replay_gear import PrefixSumTree, kernels
generator = torch.Generator().manual_seed(0)
weights = torch.rand(5000, dtype=torch.float64, generator=generator)
weights[::3] = 0
twin, tree = PrefixSumTree(5000), PrefixSumTree(5000)
for t in (twin, tree):
    t.update(torch.arange(5000), weights)
index = torch.randperm(5000, generator=generator)[:40]
value = torch.rand(40, dtype=torch.float64, generator=generator)
value[:5] = 0
twin._update_torch(index, value)
kernels.tree_update(tree._values, tree._minima, tree._offsets, tree.fanout, index, value)
assert torch.allclose(tree._values, twin._values, rtol=1e-14, atol=0)
assert torch.equal(tree._minima, twin._minima)
u = torch.rand(60, dtype=torch.float64, generator=generator)
u[:2] = torch.tensor([0.0, 1 - 2.0**-53], dtype=torch.float64)
found, weight = kernels.tree_draw(tree._values, tree._offsets, tree.fanout, u)
expected, expected_weight = twin.draw_torch(u)
assert torch.equal(found, expected)
assert torch.equal(weight, expected_weight)
print("equal")
"""


def test_gr06_the_interpreted_kernels_equal_their_twins():
    pytest.importorskip("triton")
    result = subprocess.run(
        [sys.executable, "-c", INTERPRETED],
        env={**os.environ, "TRITON_INTERPRET": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 0, result.stderr
    assert result.stdout.strip() == "equal"
