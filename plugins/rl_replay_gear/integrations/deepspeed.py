"""DeepSpeed: batches for an engine, on its device, sharded over its data-parallel ranks."""

from __future__ import annotations

from typing import Any

import torch.distributed as dist

from rl_replay_gear.collect import Windows
from rl_replay_gear.layout import ParallelLayout
from rl_replay_gear.loader import TrajectoryLoader
from rl_replay_gear.selectors import Selector
from rl_replay_gear.sharded import ShardedTable
from rl_replay_gear.table import TrajectoryTable


def gear_dataloader(
    engine: Any,
    table: TrajectoryTable | ShardedTable,
    selector: Selector,
    windows: Windows,
    **loader_kwargs: Any,
) -> TrajectoryLoader:
    """A loader of ready batches for ``engine`` (do not pass ``training_data`` to ``deepspeed.initialize``).

    Args:
        engine: What ``deepspeed.initialize`` returned first.
        table: This rank's shard; a plain table becomes a ``ShardedTable`` over the engine's ranks when there
            is more than one.
        selector, windows: As in ``TrajectoryLoader``.
        loader_kwargs: Others of ``TrajectoryLoader``; ``batch_size`` is the engine's micro batch size and
            ``device`` its device by default.
    """
    if not hasattr(engine, "train_micro_batch_size_per_gpu"):
        raise TypeError(f"expected a DeepSpeed engine, got {type(engine).__name__}")
    source: Any = table
    if isinstance(table, TrajectoryTable) and dist.is_initialized() and dist.get_world_size() > 1:
        source = ShardedTable(table, ParallelLayout.from_deepspeed(engine))
    batch_size = loader_kwargs.pop("batch_size", None) or engine.train_micro_batch_size_per_gpu()
    device = loader_kwargs.pop("device", None) or engine.device
    return TrajectoryLoader(source, selector, windows, batch_size, device=device, **loader_kwargs)
