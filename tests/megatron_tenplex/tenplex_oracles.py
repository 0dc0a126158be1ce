"""Counting by marking every element, and random collections to count in."""

from __future__ import annotations

import random
from itertools import pairwise

import numpy as np
import torch

from megatron_tenplex import Box, ParallelTensorCollection, Shard, TensorSpec


def mask_of(collection: ParallelTensorCollection, rank: int, key: str) -> np.ndarray:
    """Which elements of a tensor a rank holds."""
    marked = np.zeros(collection.tensors[key].shape, dtype=bool)
    for shard in collection.shards[rank]:
        if shard.key != key:
            continue
        box = shard.box
        inside = np.zeros(box.shape, dtype=bool)
        low, high = shard.flat or (0, box.numel)
        inside.reshape(-1)[low:high] = True
        marked[tuple(slice(o, o + n) for o, n in zip(box.offset, box.shape, strict=True))] |= inside
    return marked


def missing_bytes(source, target, placement) -> int:
    """Elements that a role needs and its worker does not hold, in bytes."""
    total = 0
    for role, worker in enumerate(placement):
        for key, spec in target.tensors.items():
            need = mask_of(target, role, key)
            if worker < source.world_size:
                need &= ~mask_of(source, worker, key)
            total += int(need.sum()) * spec.dtype.itemsize
    return total


def random_pair(seed: int) -> tuple[ParallelTensorCollection, ParallelTensorCollection]:
    """Two collections of the same tensors: boxes, flat ranges, replicas, gaps, overlaps and empty ranks.

    Every element has a holder in the first one.
    """
    rng = random.Random(seed)
    tensors = {}
    for number in range(rng.randint(1, 4)):
        dims = rng.randint(0, 3)
        shape = tuple(rng.randint(1, 9) for _ in range(dims))
        tensors[f"t{number}"] = TensorSpec(shape, rng.choice([torch.float32, torch.bfloat16, torch.int64]))
    source = _random_shards(rng, tensors, rng.randint(1, 5), complete=True)
    target = _random_shards(rng, tensors, rng.randint(1, 5), complete=False)
    return ParallelTensorCollection(tensors, source), ParallelTensorCollection(tensors, target)


def _random_shards(rng, tensors, ranks, *, complete):
    shards = [[] for _ in range(ranks)]
    for key, spec in tensors.items():
        whole = Box((0,) * len(spec.shape), spec.shape)
        pieces = _cut(rng, whole, rng.randint(0, 4))
        for box in pieces:
            holders = rng.sample(range(ranks), rng.randint(1 if complete else 0, ranks))
            for holder in holders:
                if rng.random() < 0.5 or box.numel == 0:
                    shards[holder].append(Shard(key, box))
                    continue
                cuts = sorted({0, box.numel, *(rng.randint(0, box.numel) for _ in range(2))})
                parts = [Shard(key, box, (a, b)) for a, b in pairwise(cuts)]
                shards[holder] += parts if complete else parts[: rng.randint(1, len(parts))]
    for of_rank in shards:
        if of_rank and rng.random() < 0.2:
            of_rank.append(rng.choice(of_rank))
        rng.shuffle(of_rank)
    return shards


def _cut(rng, box, times):
    boxes = [box]
    for _ in range(times):
        chosen = boxes.pop(rng.randrange(len(boxes)))
        axes = [d for d, n in enumerate(chosen.shape) if n > 1]
        if not axes:
            boxes.append(chosen)
            continue
        axis = rng.choice(axes)
        at = rng.randint(1, chosen.shape[axis] - 1)
        first = list(chosen.shape)
        first[axis] = at
        second, offset = list(chosen.shape), list(chosen.offset)
        second[axis] -= at
        offset[axis] += at
        boxes += [Box(chosen.offset, tuple(first)), Box(tuple(offset), tuple(second))]
    return boxes


def values_of(tensors) -> dict[str, torch.Tensor]:
    """A different value for every element of every tensor (bfloat16 as bit patterns)."""
    made, start = {}, 1
    for key, spec in tensors.items():
        count = int(np.prod(spec.shape))
        numbers = torch.arange(start, start + count, dtype=torch.int64)
        start += count
        if spec.dtype == torch.bfloat16:
            made[key] = numbers.to(torch.int16).view(torch.bfloat16).reshape(spec.shape)
        else:
            made[key] = numbers.to(spec.dtype).reshape(spec.shape)
    return made


def tensor_of(shard: Shard, whole: torch.Tensor) -> torch.Tensor:
    """What a shard of ``whole`` holds, made without the code under test."""
    box = shard.box
    part = whole[tuple(slice(o, o + n) for o, n in zip(box.offset, box.shape, strict=True))].clone()
    return part if shard.flat is None else part.reshape(-1)[shard.flat[0] : shard.flat[1]].clone()


def same_bits(one: torch.Tensor, other: torch.Tensor) -> bool:
    """Equal shape and equal bytes."""
    flat = [t.contiguous().reshape(-1).view(torch.uint8) for t in (one, other)]
    return one.shape == other.shape and torch.equal(*flat)
