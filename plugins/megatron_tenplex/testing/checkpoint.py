"""The way without Tenplex: save with Megatron's dist_checkpointing in one layout, load in another."""

from __future__ import annotations

import os
import shutil
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

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


def load_checkpoint(state: TrainingState, folder: str | os.PathLike[str]) -> None:
    """Fill a freshly built ``state``. Adam's state must exist. Collective over the default group.

    Megatron's own load fails without TransformerEngine or Apex, and leaves all parameters with one step
    counter (see ``megatron_adapter``): both are mended here, on the optimizers of ``state`` only.
    """
    from megatron.core import dist_checkpointing, parallel_state
    from megatron.core.dist_checkpointing.serialization import get_default_load_sharded_strategy
    from megatron.core.dist_checkpointing.strategies.fully_parallel import FullyParallelLoadStrategyWrapper
    from megatron.core.utils import unwrap_model

    group = parallel_state.get_data_parallel_group(with_context_parallel=True)
    strategy = FullyParallelLoadStrategyWrapper(get_default_load_sharded_strategy(str(folder)), group)
    content = dist_checkpointing.load(_described(state, loading=True), str(folder), strategy)
    inner = getattr(state.optimizer, "chained_optimizers", [state.optimizer])
    for optimizer in inner:
        optimizer._set_main_param_and_optimizer_states = partial(_write_states, optimizer)
    state.optimizer.load_state_dict(content["optimizer"])
    for optimizer in inner:
        for of_parameter in optimizer.optimizer.state.values():
            of_parameter["step"] = of_parameter["step"].clone()
    unwrap_model(state.model[0]).load_state_dict(content["model"], strict=False)
    dist.barrier()


def _write_states(optimizer: Any, parameter: Any, tensors: dict[str, Tensor]) -> None:
    """Write master weights and moments; ``step`` is not among what was loaded."""
    group, order = optimizer.model_param_group_index_map[parameter]
    main = optimizer.optimizer.param_groups[group]["params"][order]
    with torch.no_grad():
        for name, target in {"param": main, **optimizer.optimizer.state[main]}.items():
            if name in tensors:
                target.copy_(tensors[name])
