"""Will the transition fit? Asked before anything changes."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import torch

from megatron_tenplex.layout import ParallelConfig
from megatron_tenplex.ptc import ParallelTensorCollection
from tiered_memory.host_memory import available_bytes

if TYPE_CHECKING:
    from megatron_tenplex.membership import World

_GRADIENT_BYTES = 4


def needed_bytes(
    source: ParallelTensorCollection,
    parallel: ParallelConfig,
    staging_bytes: int,
    target: ParallelTensorCollection | None = None,
) -> int:
    """Bytes the busiest rank has to allocate for the new layout, beside the old one.

    Its state and fp32 gradients, and staging. Exact for the state where ``target`` is known; otherwise
    weights are taken to be spread evenly over tp x pp, and optimizer state over all ranks.
    """
    weights = sum(math.prod(spec.shape) for key, spec in source.tensors.items() if key.startswith("model."))
    gradients = weights // (parallel.tp * parallel.pp) * _GRADIENT_BYTES
    if target is not None:
        return max(target.held_bytes(r) for r in range(target.world_size)) + gradients + staging_bytes
    state = 0
    for key, spec in source.tensors.items():
        parts = parallel.tp * parallel.pp if key.startswith("model.") else parallel.world_size
        state += math.prod(spec.shape) * spec.dtype.itemsize // parts
    return state + gradients + staging_bytes


def free_bytes() -> int:
    """Bytes this process can still allocate where the model lives."""
    if not torch.cuda.is_available():
        return available_bytes()
    free, _ = torch.cuda.mem_get_info()
    return free + torch.cuda.memory_reserved() - torch.cuda.memory_allocated()


def check_memory(
    world: World, needed: int, freed: int, *, sharing: int = 1, release_source: bool = False
) -> None:
    """Raise MemoryError on every worker if one of them cannot hold both layouts. Collective.

    Args:
        needed: bytes of the new layout, see :func:`needed_bytes`.
        freed: bytes that the old layout gives back beforehand.
        sharing: workers that draw on the same free memory.
    """
    free = free_bytes() // sharing + freed
    for rank, (wanted, available) in enumerate(world.all_gather_json([needed, free])):
        if wanted > available:
            advice = "" if release_source else "; use release_source=True"
            raise MemoryError(
                f"reshard needs {wanted / 2**30:.3f} GiB on rank {rank}, {available / 2**30:.3f} GiB free; "
                f"nothing has moved; use a smaller staging_bytes{advice}"
            )
