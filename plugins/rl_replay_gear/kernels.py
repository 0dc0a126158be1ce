"""Triton kernels of PrefixSumTree; the torch twins stand in prefix.py."""

# Triton arguments have no useful annotations, and kernels take many of them.
# ruff: noqa: ANN001, ANN202, PLR0917
# mypy: disallow-untyped-defs=False

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor


@triton.jit
def _draw_kernel(
    values,
    offsets,
    u,
    index,
    weight,
    TOP: tl.constexpr,
    FANOUT: tl.constexpr,
):
    i = tl.program_id(0)
    child = tl.arange(0, FANOUT)
    rest = tl.load(u + i) * tl.load(values + tl.load(offsets + TOP))
    node = tl.zeros((), tl.int64)
    value = rest
    for down in tl.static_range(TOP):
        base = tl.load(offsets + (TOP - 1 - down)) + node * FANOUT
        children = tl.load(values + base + child)
        cumulative = tl.cumsum(children, 0)
        below = tl.sum((cumulative <= rest).to(tl.int32), 0)
        last = tl.max(tl.where(children > 0, child, 0), 0)
        chosen = tl.minimum(below, last)
        value = tl.sum(tl.where(child == chosen, children, 0.0), 0)
        before = tl.sum(tl.where(child == chosen, cumulative, 0.0), 0) - value
        rest = tl.where(below > last, value, rest - before)
        node = node * FANOUT + chosen
    tl.store(index + i, node)
    tl.store(weight + i, value)


@triton.jit
def _sum_kernel(
    values,
    minima,
    index,
    divisor,
    below,
    here,
    first_inner,
    LEAVES: tl.constexpr,
    FANOUT: tl.constexpr,
):
    # One program a touched leaf; programs of one block write the same sum.
    node = tl.load(index + tl.program_id(0)) // divisor
    child = tl.arange(0, FANOUT)
    position = below + node * FANOUT + child
    children = tl.load(values + position)
    if LEAVES:
        low = children
    else:
        low = tl.load(minima + position - first_inner)
    low = tl.where(children > 0, low, float("inf"))
    tl.store(values + here + node, tl.sum(children, 0))
    tl.store(minima + here + node - first_inner, tl.min(low, 0))


def _offset_tensor(offsets: list[int], device: torch.device) -> Tensor:
    key = (tuple(offsets), device)
    if key not in _OFFSETS:
        _OFFSETS[key] = torch.tensor(offsets, dtype=torch.int64, device=device)
    return _OFFSETS[key]


_OFFSETS: dict[tuple[tuple[int, ...], torch.device], Tensor] = {}


def tree_draw(values: Tensor, offsets: list[int], fanout: int, u: Tensor) -> tuple[Tensor, Tensor]:
    """See ``PrefixSumTree.draw``; one program a draw, one block of children a level."""
    u = u.to(values.device, non_blocking=True)
    index = torch.empty(len(u), dtype=torch.int64, device=values.device)
    weight = torch.empty(len(u), dtype=torch.float64, device=values.device)
    if len(u):
        _draw_kernel[(len(u),)](
            values,
            _offset_tensor(offsets, values.device),
            u,
            index,
            weight,
            TOP=len(offsets) - 1,
            FANOUT=fanout,
        )
    return index, weight


def tree_update(
    values: Tensor, minima: Tensor, offsets: list[int], fanout: int, index: Tensor, weight: Tensor
) -> None:
    """See ``PrefixSumTree.update``; one launch a level, since a level reads the sums of the one below."""
    values[index] = weight
    divisor = 1
    for level in range(1, len(offsets)):
        divisor *= fanout
        _sum_kernel[(len(index),)](
            values,
            minima,
            index,
            divisor,
            offsets[level - 1],
            offsets[level],
            offsets[1],
            LEAVES=level == 1,
            FANOUT=fanout,
        )
