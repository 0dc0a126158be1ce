"""The way without Tenplex: save with Megatron's dist_checkpointing in one layout, load in another."""

from __future__ import annotations

import os
import shutil
from pathlib import Path
from typing import Any

import torch.distributed as dist

from megatron_tenplex.reconfigure import TrainingState


def _described(state: TrainingState, *, loading: bool) -> dict[str, Any]:
    from megatron.core import parallel_state
    from megatron.core.utils import unwrap_model

    metadata = {
        "distrib_optim_sharding_type": "fully_reshardable",
        "dp_cp_group": parallel_state.get_data_parallel_group(with_context_parallel=True),
    }
    model = unwrap_model(state.model[0]).sharded_state_dict(metadata=metadata)
    optimizer = state.optimizer.sharded_state_dict(model, is_loading=loading, metadata=metadata)
    return {"model": model, "optimizer": optimizer}


def save_checkpoint(state: TrainingState, folder: str | os.PathLike[str]) -> None:
    """Save model and optimizer (torch_dist, fully parallel). Collective over the default group."""
    from megatron.core import dist_checkpointing, parallel_state
    from megatron.core.dist_checkpointing.serialization import get_default_save_sharded_strategy
    from megatron.core.dist_checkpointing.strategies.fully_parallel import FullyParallelSaveStrategyWrapper

    if dist.get_rank() == 0:
        shutil.rmtree(folder, ignore_errors=True)
        Path(folder).mkdir(parents=True)
    dist.barrier()
    group = parallel_state.get_data_parallel_group(with_context_parallel=True)
    strategy = FullyParallelSaveStrategyWrapper(get_default_save_sharded_strategy("torch_dist"), group)
    dist_checkpointing.save(_described(state, loading=False), str(folder), strategy)
    dist.barrier()


def read_checkpoint(state: TrainingState, folder: str | os.PathLike[str]) -> dict[str, Any]:
    """Read what the layout of ``state`` needs. Adam's state must exist. Collective over the default group.

    Nothing is written to the optimizer: without TransformerEngine that fails (see ``megatron_adapter``).
    """
    from megatron.core import dist_checkpointing, parallel_state
    from megatron.core.dist_checkpointing.serialization import get_default_load_sharded_strategy
    from megatron.core.dist_checkpointing.strategies.fully_parallel import FullyParallelLoadStrategyWrapper

    group = parallel_state.get_data_parallel_group(with_context_parallel=True)
    strategy = FullyParallelLoadStrategyWrapper(get_default_load_sharded_strategy(str(folder)), group)
    content = dist_checkpointing.load(_described(state, loading=True), str(folder), strategy)
    dist.barrier()
    return content
