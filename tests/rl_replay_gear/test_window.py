"""Windows (GR-02) against a naive loop, and the sequence helpers built on them."""

from __future__ import annotations

import itertools

import pytest
import torch

from rl_replay_gear import (
    ColumnSpec,
    Selection,
    TableSpec,
    TrajectoryTable,
    Uniform,
    Window,
    agents_as_sequence,
    chain_episodes,
    split_burn_in,
)


def naive(rows, anchor, window, fill):
    """One window by hand: values, mask, timesteps."""
    n = len(rows)
    first = min(max(anchor + window.offset, 0), n)
    stop = min(max(anchor + window.offset + window.length, 0), n)
    count = max(stop - first, 0)
    shift = {"tail": 0, "head": window.length - count, "around": first - anchor - window.offset}[window.pad]
    values, mask, steps = [fill] * window.length, [False] * window.length, [0] * window.length
    for j in range(count):
        values[shift + j], mask[shift + j], steps[shift + j] = rows[first + j], True, first + j
    return values, mask, steps


@pytest.mark.parametrize("pad", ["head", "tail", "around"])
@pytest.mark.parametrize("final", [False, True])
def test_gr02_equals_a_naive_loop_for_all_small_cases(pad, final):
    columns = (ColumnSpec("x", (), torch.int64, fill=-7, final=final), ColumnSpec("y"))
    table = TrajectoryTable(TableSpec(columns, 100, 10))
    rows = {}
    for n in (1, 2, 3, 5):
        handle = table.write({"x": torch.arange(100 * n, 100 * n + n + int(final)), "y": torch.ones(n)})
        rows[handle] = list(range(100 * n, 100 * n + n + int(final)))
    cases = [(h, a) for h in rows for a in range(len(rows[h]) - int(final))]
    selection = Selection(
        torch.tensor([h for h, _ in cases]), torch.tensor([a for _, a in cases]), torch.ones(len(cases))
    )
    for length, offset in itertools.product((1, 2, 4, 7), (-8, -3, -1, 0, 1, 2, 9)):
        window = Window(length, offset, pad)
        batch = table.collect(selection, {"x": window})
        for i, (handle, anchor) in enumerate(cases):
            values, mask, steps = naive(rows[handle], anchor, window, -7)
            assert batch["x"][i].tolist() == values
            assert batch.mask["x"][i].tolist() == mask
            assert batch.timesteps["x"][i].tolist() == steps


def test_gr02_each_column_may_have_its_own_window(filled):
    selection = filled.select(Uniform(), 16)
    windows = {"obs": Window(4, -3, "head"), "reward": Window(2, 1), "done": Window(4, -3, "head")}
    batch = filled.collect(selection, windows)
    assert batch.columns == ("obs", "reward", "done")
    for i, handle in enumerate(selection.handles.tolist()):
        trajectory, anchor = filled.read(handle), int(selection.anchors[i])
        for name, window in windows.items():
            fill = torch.zeros_like(trajectory[name][0])
            values, mask, _ = naive(list(trajectory[name]), anchor, window, fill)
            assert torch.equal(batch[name][i], torch.stack(values))
            assert batch.mask[name][i].tolist() == mask
    assert batch.mask["obs"] is batch.mask["done"]


def test_window_refuses_nonsense():
    with pytest.raises(ValueError, match="length of at least 1"):
        Window(0)
    with pytest.raises(ValueError, match="'head', 'tail' or 'around'"):
        Window(3, 0, "left")


def test_windows_that_are_none_are_refused_by_column(filled):
    selection = filled.select(Uniform(), 2)
    with pytest.raises(TypeError, match="the window of column 'reward' must be a Window, got 3"):
        filled.collect(selection, {"reward": 3})


def test_burn_in_windows_keep_the_trained_steps_in_place(filled):
    selection = filled.select(Uniform(), 32)
    batch = filled.collect(selection, {"reward": Window(2 + 3, -2, "around"), "obs": Window(1, -2)})
    burn, train = split_burn_in(batch["reward"], 2)
    burn_mask, train_mask = split_burn_in(batch.mask["reward"], 2)
    for i, handle in enumerate(selection.handles.tolist()):
        reward, anchor = filled.read(handle)["reward"], int(selection.anchors[i])
        expected = reward[anchor : anchor + 3]
        assert torch.equal(train[i, : len(expected)], expected)
        assert train_mask[i].sum() == len(expected)
        before = reward[max(anchor - 2, 0) : anchor]
        assert torch.equal(burn[i, 2 - len(before) :], before)
        assert burn_mask[i].sum() == len(before)
    with pytest.raises(ValueError, match="burn_in=5"):
        split_burn_in(train, 5)


def test_agent_axis_becomes_the_sequence():
    table = TrajectoryTable(TableSpec((ColumnSpec("obs", (4, 3)),), 50, 5))
    obs = torch.randn(6, 4, 3)
    table.write({"obs": obs})
    batch = table.collect(table.select(Uniform(), 5, anchor="start"), Window(6))
    tokens = agents_as_sequence(batch["obs"])
    assert tokens.shape == (30, 4, 3)
    assert torch.equal(tokens[6 + 2], obs[2])
    with pytest.raises(ValueError, match="agents"):
        agents_as_sequence(torch.zeros(3, 4))


def test_cross_episode_windows_carry_first_and_last_flags():
    episodes = [{"x": torch.arange(n, dtype=torch.float32) + 10 * n} for n in (3, 1, 2)]
    chain = chain_episodes(episodes)
    table = TrajectoryTable(TableSpec.infer(chain, 50, 5))
    handle = table.write(chain)
    selection = Selection(torch.tensor([handle]), torch.tensor([1]), torch.ones(1))
    batch = table.collect(selection, Window(5))
    assert batch["x"][0].tolist() == [31, 32, 10, 20, 21]
    assert batch["is_first"][0].tolist() == [False, False, True, True, False]
    assert batch["is_last"][0].tolist() == [False, True, True, False, True]
    assert batch["episode"][0].tolist() == [0, 0, 1, 2, 2]
    assert batch["episode_step"][0].tolist() == [1, 2, 0, 0, 1]
    with pytest.raises(ValueError, match="different columns"):
        chain_episodes([{"x": [1.0]}, {"y": [1.0]}])
