"""Compare the content of a job's tensors before and after a change of layout."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from megatron_tenplex.cells import cells_of
from megatron_tenplex.executor import view_of
from megatron_tenplex.membership import World
from megatron_tenplex.ptc import Box, ParallelTensorCollection, Shard

_CHUNK = 1 << 22
_INTEGER = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
_MULTIPLIERS = (-7046029254386353131, -4417276706812531889)  # odd constants of splitmix64 and xxHash


def digest(values: Tensor, box: Box, shape: tuple[int, ...]) -> int:
    """Sum over elements of a mix of their bits and their place in the global tensor, modulo 2^64.

    Independent of how the tensor is cut: digests of disjoint boxes add up.
    """
    if values.numel() > _CHUNK and values.ndim and values.shape[0] > 1:
        step = max(1, values.shape[0] * _CHUNK // values.numel())
        total = 0
        for low in range(0, values.shape[0], step):
            part = values[low : low + step]
            offset = (box.offset[0] + low, *box.offset[1:])
            total += digest(part, Box(offset, tuple(part.shape)), shape)
        return _wrap(total)
    strides = [math.prod(shape[d + 1 :]) for d in range(len(shape))]
    index = torch.zeros((), dtype=torch.int64, device=values.device)
    for d, (first, count) in enumerate(zip(box.offset, box.shape, strict=True)):
        along = torch.arange(first, first + count, device=values.device) * strides[d]
        index = index + along.view([-1 if i == d else 1 for i in range(len(shape))])
    bits = values.detach().contiguous().view(_INTEGER[values.element_size()]).to(torch.int64)
    mixed = (bits ^ (index * _MULTIPLIERS[0])) * _MULTIPLIERS[1]
    mixed = mixed ^ (mixed >> 29)
    return int(mixed.sum())


def _wrap(value: int) -> int:
    return (value + 2**63) % 2**64 - 2**63


def expected_digests(
    source: ParallelTensorCollection,
    target: ParallelTensorCollection,
    placement: Sequence[int],
    held: Mapping[Shard, Tensor],
    world: World,
) -> dict[str, int]:
    """Per tensor, the digest that all target shards must have together, replicas counted. Collective."""
    mine: dict[str, int] = {}
    for key, cells in cells_of(source, target, placement):
        total = 0
        for cell in cells:
            owner = min(cell.holders, default=-1)
            if owner == world.worker:
                copies = sum(len(shards) for shards in cell.needers.values())
                shard = cell.holders[owner]
                view = view_of(shard, held[shard], cell.box)
                total += copies * digest(view, cell.box, target.tensors[key].shape)
        mine[key] = _wrap(total)
    return _sum_over_workers(mine, world)


def check_target(
    expected: Mapping[str, int], target: ParallelTensorCollection, into: Mapping[Shard, Tensor], world: World
) -> None:
    """Raise ValueError on every worker if a tensor's content differs from what it was. Collective."""
    mine = dict.fromkeys(expected, 0)
    for shard, tensor in into.items():
        for box in shard.boxes():
            part = digest(view_of(shard, tensor, box), box, target.tensors[shard.key].shape)
            mine[shard.key] = _wrap(mine[shard.key] + part)
    found = _sum_over_workers(mine, world)
    wrong = [key for key in expected if expected[key] != found[key]]
    if wrong:
        raise ValueError(f"content of {len(wrong)} tensors changed while it moved: {', '.join(wrong[:5])}")


def _sum_over_workers(mine: Mapping[str, int], world: World) -> dict[str, int]:
    keys = sorted(mine)
    values = world.all_gather(torch.tensor([mine[key] for key in keys], dtype=torch.int64))
    return {key: _wrap(sum(int(v[i]) for v in values)) for i, key in enumerate(keys)}
