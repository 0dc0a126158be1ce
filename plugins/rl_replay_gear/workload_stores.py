"""The stores that the workload ``replay_gear.train`` compares: this package, TorchRL, a plain row gather."""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from rl_replay_gear.randomness import CounterGenerator
from rl_replay_gear.selectors import Prioritized, Uniform
from rl_replay_gear.sharded import ShardedTable
from rl_replay_gear.spec import ColumnSpec, TableSpec
from rl_replay_gear.table import Memory, TrajectoryTable
from rl_replay_gear.window import Window


@dataclass(frozen=True)
class Store:
    """``fetch(number)``: the windows [B, L, F] of batch ``number`` and their mask [B, L]."""

    fetch: Callable[[int], tuple[Tensor, Tensor]]
    nbytes: int
    close: Callable[[], None] = lambda: None


def gear_store(episodes: Tensor, length: int, batch_size: int, *, access: str, memory: Memory) -> Store:
    """A table of ``episodes`` [N, T, F], read as ``access`` says (see ``moecap_workloads``)."""
    count, steps, features = episodes.shape
    spec = TableSpec((ColumnSpec("obs", (features,)),), count * steps, count)
    table = TrajectoryTable(spec, memory=memory)
    for episode in episodes:
        table.write({"obs": episode}, priority=1.0)
    selector: Any = Prioritized() if access in ("prioritized", "online") else Uniform()
    source: Any = ShardedTable(table) if access == "sharded" else table
    anchor = "start" if access == "trajectories" else "uniform"
    window = Window(length, 0, "head")
    device = None if memory == "host" else "cuda"

    def fetch(number: int) -> tuple[Tensor, Tensor]:
        if access == "online":
            table.write({"obs": episodes[number % count]}, priority=1.0)
        selection = source.select(selector, batch_size, anchor=anchor, generator=CounterGenerator(number))
        batch = source.collect(selection, window, device=device)
        return batch["obs"], batch.mask["obs"]

    return Store(fetch, table.nbytes)


def row_store(episodes: Tensor, length: int, batch_size: int) -> Store:
    """All steps in one tensor, windows by ``index_select`` of rows."""
    count, steps, features = episodes.shape
    rows = episodes.flatten(0, 1)
    relative = torch.arange(length)

    def fetch(number: int) -> tuple[Tensor, Tensor]:
        random = np.random.default_rng(number)
        which = torch.from_numpy(random.integers(0, count, batch_size))
        begin = torch.from_numpy(random.integers(0, steps - length + 1, batch_size))
        index = (which * steps + begin)[:, None] + relative
        windows = rows.index_select(0, index.flatten()).view(*index.shape, features)
        return windows, torch.ones(index.shape, dtype=torch.bool)

    return Store(fetch, rows.nbytes)


def torchrl_store(episodes: Tensor, length: int, batch_size: int) -> Store:
    """TorchRL's memory-mapped storage with its slice sampler."""
    from rl_replay_gear.integrations.torchrl import slice_sampler_buffer

    folder = tempfile.TemporaryDirectory()
    buffer = slice_sampler_buffer(episodes, length, batch_size, folder.name)

    def fetch(number: int) -> tuple[Tensor, Tensor]:
        torch.manual_seed(number)
        windows = buffer.sample()["obs"].view(-1, length, episodes.shape[-1])
        return windows, torch.ones(windows.shape[:2], dtype=torch.bool)

    return Store(fetch, episodes.nbytes, folder.cleanup)
