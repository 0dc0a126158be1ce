"""DeepSpeed ZeRO-1 and ZeRO-2: how the optimizer's flat partitions lie over the parameters.

Both stages keep whole weights on every rank and split one flat buffer of each parameter group evenly: fp32
masters and Adam's moments. Computed from shapes alone, for the planner; no DeepSpeed is imported.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Literal

import torch

from megatron_tenplex.ptc import Box, ParallelTensorCollection, Shard, TensorSpec

_ALIGNMENT = 2  # DeepSpeed's nccl_start_alignment_factor, per rank


def zero_layout(
    groups: list[Mapping[str, tuple[int, ...]]],
    world_size: int,
    *,
    precision: Literal["fp32", "bf16"] = "bf16",
) -> ParallelTensorCollection:
    """The collection of a model under ZeRO-1 or ZeRO-2 on ``world_size`` data-parallel ranks.

    Args:
        groups: parameter groups in the optimizer's order, each parameter name -> shape in DeepSpeed's order
            (``round_robin_gradients`` off).

    Keys: ``model.<name>``, ``optimizer.{param,exp_avg,exp_avg_sq}.<name>``; the masters are separate in fp32,
    too.

    Raises:
        ValueError: a name occurs twice, or ``world_size`` is below 1.
    """
    if world_size < 1:
        raise ValueError(f"world_size must be at least 1, got {world_size}")
    tensors: dict[str, TensorSpec] = {}
    shards: list[list[Shard]] = [[] for _ in range(world_size)]
    weight = torch.float32 if precision == "fp32" else torch.bfloat16
    for group in groups:
        unit = _ALIGNMENT * world_size
        numel = sum(math.prod(shape) for shape in group.values())
        share = -(-numel // unit) * unit // world_size
        start = 0
        for name, shape in group.items():
            if f"model.{name}" in tensors:
                raise ValueError(f"parameter {name!r} occurs twice")
            tensors[f"model.{name}"] = TensorSpec(shape, weight)
            box = Box((0,) * len(shape), shape)
            for kind in ("param", "exp_avg", "exp_avg_sq"):
                tensors[f"optimizer.{kind}.{name}"] = TensorSpec(shape, torch.float32)
            for rank in range(world_size):
                shards[rank].append(Shard(f"model.{name}", box))
                flat = (max(rank * share - start, 0), min((rank + 1) * share - start, box.numel))
                if flat[0] < flat[1]:
                    shards[rank] += [
                        Shard(f"optimizer.{kind}.{name}", box, flat)
                        for kind in ("param", "exp_avg", "exp_avg_sq")
                    ]
            start += box.numel
    return ParallelTensorCollection(tensors, shards)
