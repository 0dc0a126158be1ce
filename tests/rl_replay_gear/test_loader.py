"""The loader (GR-11) and exact resume (GR-13)."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest
import torch

from rl_replay_gear import (
    Prioritized,
    Shuffle,
    TableSpec,
    TrajectoryLoader,
    TrajectoryTable,
    Uniform,
    Window,
    load_table,
    save_table,
)

WINDOW = Window(4, -3, "head")


def same(a, b):
    return torch.equal(a.handles, b.handles) and all(torch.equal(a[name], b[name]) for name in a)


def test_gr11_same_seed_same_batches_at_any_prefetch(filled):
    runs = [
        [next(loader) for _ in range(12)]
        for loader in (
            TrajectoryLoader(filled, Prioritized(), WINDOW, 16, prefetch=p, seed=7) for p in (0, 1, 4)
        )
    ]
    for run in runs[1:]:
        assert all(same(a, b) for a, b in zip(runs[0], run, strict=True))
    other = next(TrajectoryLoader(filled, Prioritized(), WINDOW, 16, seed=8))
    assert not torch.equal(other.anchors, runs[0][0].anchors)


def test_gr11_length_epochs_and_transform(filled):
    loader = TrajectoryLoader(filled, Uniform(), WINDOW, 4, steps_per_epoch=5, transform=lambda b: b["obs"])
    assert len(loader) == 5
    first, second = list(loader), list(loader)
    assert len(first) == len(second) == 5
    assert first[0].shape == (4, 4, 3)
    assert not torch.equal(first[0], second[0])
    with pytest.raises(TypeError, match="steps_per_epoch"):
        len(TrajectoryLoader(filled, Uniform(), WINDOW, 4))
    with pytest.raises(ValueError, match="batch_size=0"):
        TrajectoryLoader(filled, Uniform(), WINDOW, 0)


def test_gr11_shuffle_epochs_do_not_depend_on_prefetch(filled):
    seen = []
    for prefetch in (0, 3):
        loader = TrajectoryLoader(filled, Shuffle(), WINDOW, 5, prefetch=prefetch)
        seen.append([next(loader).handles.tolist() for _ in range(4)])
    assert seen[0] == seen[1]
    assert all(sorted(batch) == filled.handles().tolist() for batch in seen[0])


def test_gr11_evicted_batches_are_redrawn_and_counted(spec, make_trajectory):
    table = TrajectoryTable(TableSpec(spec.columns, 1000, 3))
    for seed in range(3):
        table.write(make_trajectory(5, seed))
    loader = TrajectoryLoader(table, Uniform(), WINDOW, 8, prefetch=2)
    next(loader)
    for seed in range(3):
        table.write(make_trajectory(6, 10 + seed))
    batch = next(loader)
    assert loader.redrawn == 1
    assert set(batch.handles.tolist()) <= set(table.handles().tolist())


def test_gr11_reused_buffers_stay_valid_for_prefetch_plus_two_batches(filled):
    plain = TrajectoryLoader(filled, Uniform(), WINDOW, 8, prefetch=1)
    reusing = TrajectoryLoader(filled, Uniform(), WINDOW, 8, prefetch=1, reuse_buffers=True)
    held, addresses = [], set()
    for _ in range(20):
        expected, batch = next(plain), next(reusing)
        held = [*held, (batch, expected["obs"].clone())][-3:]
        for kept, value in held:
            assert torch.equal(kept.parts["obs"].tensor(), value)
        addresses.add(batch.buffers[0].data_ptr())
    assert len(addresses) == 3


def run(table, loader, steps, make_trajectory, begin):
    """A learner that writes, updates priorities and reads: what it saw."""
    seen = []
    for step in range(begin, begin + steps):
        batch = next(loader)
        seen.append([batch.handles.tolist(), batch["obs"].sum().item(), batch.weight.tolist()])
        loader.update_priorities(batch.handles, batch["reward"].abs().sum(1))
        if step % 3 == 0:
            table.write(make_trajectory(3 + step % 7, 100 + step))
    return seen


RESUME = """
import json, sys
sys.path.insert(0, {here!r})
from conftest import trajectory
from test_loader import WINDOW, run
from rl_replay_gear import Prioritized, TrajectoryLoader, load_table
table = load_table({path!r})
loader = TrajectoryLoader(table, Prioritized(), WINDOW, 16, prefetch=2)
loader.load_state_dict(json.load(open({state!r})))
print(json.dumps(run(table, loader, 15, trajectory, 20)))
"""


def test_gr13_a_new_process_goes_on_exactly(spec, make_trajectory, tmp_path):
    table = TrajectoryTable(TableSpec(spec.columns, 60, 8))
    for seed in range(8):
        table.write(make_trajectory(4 + seed % 3, seed))
    loader = TrajectoryLoader(table, Prioritized(), WINDOW, 16, prefetch=2, seed=3)
    run(table, loader, 20, make_trajectory, 0)
    assert loader.redrawn > 0  # pending batches went stale on the way
    save_table(table, tmp_path / "table")
    (tmp_path / "loader.json").write_text(json.dumps(loader.state_dict()))
    expected = run(table, loader, 15, make_trajectory, 20)
    script = RESUME.format(
        here=os.path.dirname(__file__), path=str(tmp_path / "table"), state=str(tmp_path / "loader.json")
    )
    result = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    assert json.loads(result.stdout) == json.loads(json.dumps(expected))


def test_gr13_shuffle_resumes_inside_an_epoch(filled, tmp_path):
    loader = TrajectoryLoader(filled, Shuffle(), WINDOW, 2, prefetch=1, seed=1)
    next(loader)
    state = json.loads(json.dumps(loader.state_dict()))
    save_table(filled, tmp_path)
    resumed = TrajectoryLoader(load_table(tmp_path), Shuffle(), WINDOW, 2, prefetch=1)
    resumed.load_state_dict(state)
    assert all(same(next(loader), next(resumed)) for _ in range(10))
