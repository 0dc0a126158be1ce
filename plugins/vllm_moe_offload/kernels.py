"""Remapping of expert ids to slots."""

from __future__ import annotations

import torch
from torch import Tensor


def remap_expert_ids(topk_ids: Tensor, slot_of_expert: Tensor) -> Tensor:
    """Slots of the experts that the router chose.

    Args:
        topk_ids: ``[T, k]`` expert ids, any integer dtype.
        slot_of_expert: int32 ``[E]``, -1 for an absent expert, on the same device.

    Returns:
        int32 ``[T, k]``.
    """
    return slot_of_expert[topk_ids.to(torch.int64)]
