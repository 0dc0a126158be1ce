"""Tables and trajectories shared by the tests."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch

from rl_replay_gear import ColumnSpec, TableSpec, TrajectoryTable

sys.path.insert(0, str(Path(__file__).parent))  # the helper modules of this folder


@pytest.fixture
def spec():
    return TableSpec(
        (
            ColumnSpec("obs", (3,)),
            ColumnSpec("action", (), torch.int64, fill=-10),
            ColumnSpec("reward"),
            ColumnSpec("done", (), torch.bool),
        ),
        max_steps=1000,
        max_trajectories=50,
    )


def trajectory(length, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return {
        "obs": torch.randn(length, 3, generator=generator),
        "action": torch.randint(0, 9, (length,), generator=generator),
        "reward": torch.randn(length, generator=generator),
        "done": torch.rand(length, generator=generator) < 0.5,
    }


@pytest.fixture
def make_trajectory():
    return trajectory


@pytest.fixture
def filled(spec):
    """Five trajectories of 3, 7, 1, 12, 5 steps."""
    table = TrajectoryTable(spec)
    for seed, length in enumerate((3, 7, 1, 12, 5)):
        table.write(trajectory(length, seed))
    return table
