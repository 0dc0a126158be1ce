"""Derived columns and sequence statistics (GR-10, GR-25) against closed forms."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from rl_replay_gear import (
    ColumnSpec,
    GeneralizedAdvantage,
    NStepReturn,
    ReturnsToGo,
    RunningMoments,
    TableSpec,
    TrajectoryTable,
    Window,
    sequence_priority,
)
from rl_replay_gear.selectors import Uniform


def one(derived, **columns):
    tensors = {name: torch.as_tensor(value) for name, value in columns.items()}
    inferred = TableSpec.infer(tensors, 2000, 3)
    table = TrajectoryTable(TableSpec(inferred.columns, 2000, 3, (derived,)))
    return table.read(table.write(tensors))[derived.name]


def ulp(reference):
    return np.spacing(np.abs(reference).astype(np.float32))


@pytest.mark.parametrize("gamma", [1.0, 0.99, 0.0])
@pytest.mark.parametrize("length", [1, 2, 1000])
def test_gr10_returns_to_go_equal_float64_suffix_sums_to_one_ulp(gamma, length):
    reward = np.random.default_rng(0).normal(size=length).astype(np.float32)
    found = one(ReturnsToGo(gamma=gamma, scale=0.5), rewards=reward).numpy()
    powers = gamma ** np.arange(length)
    exact = np.array(
        [0.5 * (powers[: length - t] * reward[t:].astype(np.float64)).sum() for t in range(length)]
    )
    assert found.dtype == np.float32
    assert np.all(np.abs(found - exact) <= ulp(exact))


def test_gr10_returns_to_go_are_exact_at_the_episode_end_and_have_the_rewards_shape():
    reward = torch.tensor([[1.0, 10.0], [2.0, 20.0], [4.0, 40.0]])
    assert one(ReturnsToGo(), rewards=reward).tolist() == [[7, 70], [6, 60], [4, 40]]


@settings(max_examples=30, deadline=None)
@given(st.lists(st.floats(-10, 10, width=32), min_size=1, max_size=12), st.integers(1, 6))
def test_gr25_n_step_returns_equal_the_sum(reward, steps):
    found = one(NStepReturn(gamma=0.9, steps=steps), rewards=np.array(reward, np.float32))
    for t in range(len(reward)):
        exact = sum(0.9**k * r for k, r in enumerate(reward[t : t + steps]))
        assert float(found[t]) == pytest.approx(exact, rel=1e-6, abs=1e-5)


def test_gr25_generalized_advantage_equals_the_double_sum():
    random = np.random.default_rng(3)
    reward, value = random.normal(size=(9, 2)), random.normal(size=(10, 2))
    found = one(
        GeneralizedAdvantage(gamma=0.97, lam=0.9),
        rewards=torch.from_numpy(reward).float(),
        values=torch.from_numpy(value).float(),
    )
    delta = reward + 0.97 * value[1:] - value[:-1]
    exact = np.array([sum((0.97 * 0.9) ** k * delta[t + k] for k in range(9 - t)) for t in range(9)])
    assert np.allclose(found.numpy(), exact, atol=1e-5)
    with pytest.raises(ValueError, match="must be final"):
        _ = TableSpec(
            (ColumnSpec("rewards"), ColumnSpec("values")), 10, 2, (GeneralizedAdvantage(),)
        ).all_columns


def test_gr25_sequence_priority_equals_r2d2s_formula():
    error = torch.tensor([[1.0, -3.0, 2.0], [0.5, 9.0, 9.0], [7.0, 7.0, 7.0]])
    mask = torch.tensor([[True, True, True], [True, False, False], [False, False, False]])
    found = sequence_priority(error, mask)
    assert found.tolist() == pytest.approx([0.9 * 3 + 0.1 * 2, 0.5, 0.0])
    assert sequence_priority(error, mask, eta=0.0)[0] == pytest.approx(2.0)


def test_gr25_running_moments_equal_numpys():
    random = np.random.default_rng(0)
    parts = [random.normal(1e4, 3, size=(n, 4)) for n in (1, 50, 7, 0, 300)]
    moments = RunningMoments((4,))
    for part in parts:
        moments.add(part)
    joined = np.concatenate(parts)
    assert np.allclose(moments.mean.numpy(), joined.mean(0), rtol=1e-13)
    assert np.allclose(moments.std.numpy(), joined.std(0), rtol=1e-10)
    with pytest.raises(ValueError, match="expected"):
        moments.add(np.zeros((3, 5)))


def test_gr25_relabelled_returns_reach_the_next_batch():
    table = TrajectoryTable(TableSpec((ColumnSpec("rewards"),), 100, 5, (ReturnsToGo(),)))
    handle = table.write({"rewards": torch.ones(3)})
    selection = table.select(Uniform(), 4, anchor="start")
    before = table.collect(selection, Window(3))["returns_to_go"].clone()
    table.relabel(handle, {"rewards": torch.tensor([0.0, 0.0, 5.0])})
    after = table.collect(selection, Window(3))["returns_to_go"]
    assert before[0].tolist() == [3, 2, 1]
    assert after[0].tolist() == [5, 5, 5]
