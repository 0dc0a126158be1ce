"""Count the rows of many passes at once, on any device, in a fixed number of operations."""

from __future__ import annotations

import torch
from torch import Tensor


def count_passes(entries: Tensor, end: Tensor, used: Tensor, num_experts: int) -> Tensor:
    """Experts and tokens of consecutive passes.

    Args:
        entries: int32 ``[layers + 2, capacity, top_k]``, one entry per row of a pass: by layer its expert
            ids, then its token id, then its number within its pass; both are repeated ``top_k`` times. Number
            0 begins a pass.
        end: int64 ``[1]``, entries that were written; what lies behind counts nowhere.
        used: int32 ``[passes]``, rows of each pass that are not padding.
        num_experts: ids from 0; any other id counts nowhere.

    Returns:
        int32, flat. For each pass: (token, expert) pairs of unpadded rows by layer and expert, distinct
        experts of all rows by layer, distinct tokens of unpadded rows. Then passes found, and ``end``.
    """
    passes, tokens, number = used.shape[0], entries[-2, :, 0], entries[-1, :, 0]
    is_written = torch.arange(entries.shape[1], device=entries.device) < end
    owner = (is_written & (number == 0)).cumsum(0) - 1
    found = owner[-1:] + 1
    # Rows of no announced pass belong to one more, which is dropped in the end and holds no token.
    owner = torch.where(is_written & (owner < passes), owner, passes)
    is_token = number < torch.cat((used, used.new_zeros(1)))[owner]

    counts = _histogram(entries[:-2], owner, is_token, num_experts, passes + 1)[:-1]
    touched, padding = counts[..., :num_experts], counts[..., num_experts:]
    values = torch.cat(
        (
            touched.flatten(1),
            ((touched + padding) > 0).sum(2, dtype=torch.int32),
            _distinct(tokens, owner, is_token, passes)[:, None],
        ),
        dim=1,
    )
    return torch.cat((values.flatten(), found.int(), end.int()))


def _histogram(ids: Tensor, owner: Tensor, is_token: Tensor, num_experts: int, owners: int) -> Tensor:
    """int32 [owners, layers, 2 * num_experts] of int32 [layers, rows, top_k]; padding has bins of its own."""
    layers, bins = ids.shape[0], 2 * num_experts
    layer = torch.arange(layers, device=ids.device)[:, None, None]
    first = torch.where(is_token, 0, num_experts)[None, :, None]
    place = (owner[None, :, None] * layers + layer) * bins + first + ids
    nowhere = owners * layers * bins
    place = torch.where((ids >= 0) & (ids < num_experts), place, nowhere).flatten()
    counts = torch.zeros(nowhere + 1, dtype=torch.int32, device=ids.device)
    counts.scatter_add_(0, place, torch.ones((), dtype=torch.int32, device=ids.device).expand(place.shape))
    return counts[:-1].view(owners, layers, bins)


def _distinct(tokens: Tensor, owner: Tensor, is_token: Tensor, passes: int) -> Tensor:
    """int32 [passes]: distinct tokens of each pass among the rows that hold one."""
    keys = torch.where(is_token, (owner << 32) + tokens, -1).sort().values
    new = torch.ones_like(keys, dtype=torch.bool)
    new[1:] = keys[1:] != keys[:-1]
    distinct = torch.zeros(passes, dtype=torch.int32, device=tokens.device)
    return distinct.scatter_add_(0, (keys >> 32).clamp(min=0), (new & (keys >= 0)).int())
