"""GPU sampler in Triton: the graph in GPU memory, or its edges in pinned host memory read in place.

A hop is five kernels and two prefix sums. Nodes are numbered by the smallest edge that names them (an atomic
minimum), so that the result does not depend on the order in which threads run. Buffers are allocated for the
most edges there can be and counts stay on the device, so that a batch waits for the GPU once, at its end.
"""

# Jitted functions take no annotations but constexpr, and every argument by position.
# ruff: noqa: ANN001, ANN202, PLR0917
# mypy: disallow-untyped-defs=False

from __future__ import annotations

import os
import threading
from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from pyg_quiver.backends.contract import Draws, Frontier, Graph, Sampled
from pyg_quiver.backends.hops import sample_one_type
from pyg_quiver.backends.torch_ops import TorchBackend, TorchTable

MAX_FANOUT = 32  # a program holds the draws of a node in registers, and compiling grows with their number
MAX_BUFFER = 1 << 28  # edges; batches that might need more are sampled hop by hop, to exact sizes

_UNSEEN = tl.constexpr(2**31 - 1)
_SEEN = tl.constexpr(-(2**31))  # a node with position p is entered as p + _SEEN, below every edge number
_GOLDEN = tl.constexpr(0x9E3779B97F4A7C15)
_BLOCK = 1024


@triton.jit
def _mix(z):
    """``rng.mix`` of uint64."""
    z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9
    z = (z ^ (z >> 27)) * 0x94D049BB133111EB
    return z ^ (z >> 31)


@triton.jit
def _or(a, b):
    return a | b


@triton.jit
def _seed_kernel(slot_ptr, node_ptr, count, BLOCK: tl.constexpr):
    """Enter the seeds; a repeated seed keeps its first position."""
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    live = i < count
    v = tl.load(node_ptr + i, mask=live, other=0)
    tl.atomic_min(slot_ptr + v, i + _SEEN, mask=live)


@triton.jit
def _plan_kernel(
    colptr_ptr, node_ptr, ends_ptr, start_ptr, degree_ptr, count_ptr, hop, bound,
    FANOUT: tl.constexpr, REPLACE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """First edge, degree and number of draws of each frontier node; 0 draws beyond the frontier."""
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    begin = tl.load(ends_ptr + hop)
    live = i < tl.load(ends_ptr + hop + 1) - begin
    v = tl.load(node_ptr + begin + i, mask=live, other=0)
    start = tl.load(colptr_ptr + v, mask=live, other=0)
    degree = tl.load(colptr_ptr + v + 1, mask=live, other=0) - start
    if REPLACE:
        count = tl.where(degree > 0, FANOUT, 0)
    else:
        count = tl.minimum(degree, FANOUT)
    inside = i < bound
    tl.store(start_ptr + i, start, mask=inside)
    tl.store(degree_ptr + i, degree, mask=inside)
    tl.store(count_ptr + i, tl.where(live, count, 0), mask=inside)


@triton.jit
def _draw_kernel(
    row_ptr, node_ptr, ends_ptr, start_ptr, degree_ptr, count_ptr, offset_ptr, stream_ptr, group_ptr,
    edge_ptr, col_ptr, local_ptr, slot_ptr, hop, base_ptr, bound,
    FANOUT: tl.constexpr, WIDTH: tl.constexpr, REPLACE: tl.constexpr, GROUPED: tl.constexpr,
    CLAIM: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Draw the edges of BLOCK frontier nodes and read their sources; with CLAIM also enter those.

    Draw s of a node: t = u(s, j + 1) with j = degree - FANOUT + s, or j where t was drawn before (Floyd).
    """
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = i < bound
    begin = tl.load(ends_ptr + hop)
    count = tl.load(count_ptr + i, mask=inside, other=0)
    live = count > 0
    degree = tl.load(degree_ptr + i, mask=live, other=0)
    start = tl.load(start_ptr + i, mask=live, other=0)
    v = tl.load(node_ptr + begin + i, mask=live, other=0)
    if GROUPED:
        group = tl.load(group_ptr + begin + i, mask=live, other=0)
        stream = tl.load(stream_ptr + group, mask=live, other=0).to(tl.uint64)
    else:
        stream = tl.load(stream_ptr).to(tl.uint64)
    key = _mix(stream ^ _mix(((v << 8) | hop).to(tl.uint64)))
    step = tl.arange(0, WIDTH)
    picks = tl.broadcast_to(step[None, :], (BLOCK, WIDTH)).to(tl.int64)
    drawn = live if REPLACE else degree > FANOUT
    for s in tl.static_range(FANOUT):
        random = _mix(key + ((s * _GOLDEN) & 0xFFFFFFFFFFFFFFFF)) >> 32
        if REPLACE:
            value = ((random * degree.to(tl.uint64)) >> 32).to(tl.int64)
        else:
            last = degree - FANOUT + s
            limit = tl.where(drawn, last + 1, 1)
            value = ((random * limit.to(tl.uint64)) >> 32).to(tl.int64)
            before = (picks == value[:, None]) & (step[None, :] < s)
            taken = tl.reduce(before.to(tl.int32), 1, _or)
            value = tl.where(taken > 0, last, value)
        here = (step[None, :] == s) & drawn[:, None]
        picks = tl.where(here, value[:, None], picks)
    edge = start[:, None] + picks
    keep = step[None, :] < count[:, None]
    at = tl.load(offset_ptr + i, mask=live, other=0) - count
    place = tl.load(base_ptr + hop) + at[:, None] + step[None, :]
    source = tl.load(row_ptr + edge, mask=keep, other=0).to(tl.int64)
    tl.store(edge_ptr + place, edge, mask=keep)
    tl.store(col_ptr + place, tl.broadcast_to((begin + i)[:, None], (BLOCK, WIDTH)), mask=keep)
    tl.store(local_ptr + place, source, mask=keep)
    if CLAIM:
        order = (at[:, None] + step[None, :]).to(tl.int32)
        tl.atomic_min(slot_ptr + source, order, mask=keep)


@triton.jit
def _flag_kernel(
    local_ptr, slot_ptr, flag_ptr, base_ptr, offset_ptr, hop, frontier, bound, BLOCK: tl.constexpr
):
    """1 for the edge that names a node for the first time; also fixes where the next hop's edges begin."""
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    base = tl.load(base_ptr + hop)
    total = tl.load(offset_ptr + frontier - 1)
    live = i < total
    source = tl.load(local_ptr + base + i, mask=live, other=0)
    first = tl.load(slot_ptr + source, mask=live, other=-1)
    tl.store(flag_ptr + i, (first == i).to(tl.int32), mask=i < bound)
    if tl.program_id(0) == 0:
        tl.store(base_ptr + hop + 1, base + total)


@triton.jit
def _enter_kernel(
    local_ptr, slot_ptr, flag_ptr, rank_ptr, node_ptr, ends_ptr, base_ptr, hop, bound, BLOCK: tl.constexpr
):
    """Number the new nodes in the order of their first edges."""
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    count = tl.load(ends_ptr + hop + 1)
    new = tl.load(flag_ptr + i, mask=i < bound, other=0) > 0
    source = tl.load(local_ptr + tl.load(base_ptr + hop) + i, mask=new, other=0)
    position = count + tl.load(rank_ptr + i, mask=new, other=1) - 1
    tl.store(node_ptr + position, source, mask=new)
    tl.store(slot_ptr + source, (position + _SEEN).to(tl.int32), mask=new)
    if tl.program_id(0) == 0:
        tl.store(ends_ptr + hop + 2, count + tl.load(rank_ptr + bound - 1))


@triton.jit
def _number_kernel(local_ptr, slot_ptr, base_ptr, hop, BLOCK: tl.constexpr):
    """Replace sources by their positions."""
    base = tl.load(base_ptr + hop)
    i = base + tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    live = i < tl.load(base_ptr + hop + 1)
    source = tl.load(local_ptr + i, mask=live, other=0)
    position = tl.load(slot_ptr + source, mask=live, other=0).to(tl.int64) - _SEEN
    tl.store(local_ptr + i, position, mask=live)


@triton.jit
def _reset_kernel(slot_ptr, node_ptr, ends_ptr, hops, BLOCK: tl.constexpr):
    """Leave the map as it was found."""
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    live = i < tl.load(ends_ptr + hops + 1)
    v = tl.load(node_ptr + i, mask=live, other=0)
    tl.store(slot_ptr + v, _UNSEEN, mask=live)


_local = threading.local()


def _slot_map(num_nodes: int, device: torch.device) -> Tensor:
    """This thread's int32 map from node to position, all unseen between calls."""
    maps = _local.__dict__.setdefault("maps", {})
    if (num_nodes, device) not in maps:
        maps[num_nodes, device] = torch.full((num_nodes,), _UNSEEN.value, dtype=torch.int32, device=device)
    return maps[num_nodes, device]


def _launch(kernel: Any, work: int, block: int, *arguments: Any, **constants: Any) -> None:
    if work > 0:
        kernel[(triton.cdiv(work, block),)](*arguments, **constants, BLOCK=block)


def _width(fanout: int) -> int:
    return max(1 << (fanout - 1).bit_length(), 2)


def _check_device(device: torch.device) -> None:
    if device.type == "cpu" and os.environ.get("TRITON_INTERPRET") != "1":
        raise RuntimeError("backend='triton' on the CPU needs TRITON_INTERPRET=1 before Triton is imported")


def _bounds(seeds: int, fanouts: Sequence[int], num_nodes: int) -> list[tuple[int, int]]:
    """Most frontier nodes and edges of each hop."""
    bounds, frontier = [], seeds
    for fanout in fanouts:
        bounds.append((frontier, frontier * fanout))
        frontier = min(frontier * fanout, num_nodes)
    return bounds


def sample(graph: Graph, seeds: Frontier, fanouts: Sequence[int], draws: Draws) -> Sampled:
    """Sample a homogeneous graph (arguments: ``hops.sample_one_type``), on the device of ``graph.colptr``."""
    device = graph.colptr.device
    _check_device(device)
    num_nodes = max(graph.colptr.numel() - 1, graph.num_src_nodes)
    usable = all(0 < fanout <= MAX_FANOUT for fanout in fanouts) and seeds.node.numel() > 0
    bounds = _bounds(seeds.node.numel(), fanouts, num_nodes) if usable else []
    single = draws.streams.numel() == 1 and draws.group_time is None
    if not bounds or not single or graph.row.numel() == 0 or sum(edges for _, edges in bounds) > MAX_BUFFER:
        return sample_one_type(TritonBackend(), graph, seeds, fanouts, draws)
    return _sample_at_once(graph, seeds, fanouts, draws, bounds)


def _sample_at_once(
    graph: Graph, seeds: Frontier, fanouts: Sequence[int], draws: Draws, bounds: list[tuple[int, int]]
) -> Sampled:
    device, count, hops = graph.colptr.device, seeds.node.numel(), len(fanouts)
    num_nodes = max(graph.colptr.numel() - 1, graph.num_src_nodes)
    slot = _slot_map(num_nodes, device)
    edges = sum(bound for _, bound in bounds)
    node = torch.empty(min(count + edges, num_nodes + count), dtype=torch.int64, device=device)
    node[:count] = seeds.node
    edge, col, local = (torch.empty(edges, dtype=torch.int64, device=device) for _ in range(3))
    # The frontier of hop h is node[ends[h] : ends[h + 1]], its edges begin at base[h].
    ends = torch.zeros(hops + 2, dtype=torch.int64, device=device)
    ends[1] = count
    base = torch.zeros(hops + 1, dtype=torch.int64, device=device)
    _launch(_seed_kernel, count, _BLOCK, slot, node, count)
    for hop, (fanout, (frontier, bound)) in enumerate(zip(fanouts, bounds, strict=True)):
        start, degree, drawn = (torch.empty(frontier, dtype=torch.int64, device=device) for _ in range(3))
        _launch(
            _plan_kernel, frontier, _BLOCK, graph.colptr, node, ends, start, degree, drawn, hop, frontier,
            FANOUT=fanout, REPLACE=draws.replace,
        )  # fmt: skip
        offset = drawn.cumsum(0)
        _launch_draw(
            graph, draws, (node, ends, start, degree, drawn, offset, node), (edge, col, local), (slot, base),
            hop=hop, fanout=fanout, frontier=frontier, grouped=False, claim=True,
        )  # fmt: skip
        flag = torch.empty(bound, dtype=torch.int32, device=device)
        _launch(_flag_kernel, bound, _BLOCK, local, slot, flag, base, offset, hop, frontier, bound)
        rank = flag.cumsum(0)
        _launch(_enter_kernel, bound, _BLOCK, local, slot, flag, rank, node, ends, base, hop, bound)
        _launch(_number_kernel, bound, _BLOCK, local, slot, base, hop)
    _launch(_reset_kernel, node.numel(), _BLOCK, slot, node, ends, hops)
    counts = torch.cat([ends, base]).tolist()
    node_ends, edge_ends = counts[: hops + 2], counts[hops + 2 :]
    nodes, total = node_ends[-1], edge_ends[-1]
    return Sampled(
        node[:nodes], local[:total], col[:total], edge[:total], torch.zeros_like(node[:nodes]),
        [b - a for a, b in pairwise(node_ends)], [b - a for a, b in pairwise(edge_ends)],
    )  # fmt: skip


def _launch_draw(
    graph: Graph, draws: Draws, arrays: tuple[Tensor, ...], outputs: tuple[Tensor, ...],
    scratch: tuple[Tensor, ...], *, hop: int, fanout: int, frontier: int, grouped: bool, claim: bool,
) -> None:  # fmt: skip
    node, ends, start, degree, drawn, offset, group = arrays
    edge, col, local = outputs
    slot, base = scratch
    width = _width(fanout)
    block = max(1024 // width, 16)
    _launch(
        _draw_kernel, frontier, block,
        graph.row, node, ends, start, degree, drawn, offset, draws.streams, group, edge, col, local, slot,
        hop, base, frontier,
        FANOUT=fanout, WIDTH=width, REPLACE=draws.replace, GROUPED=grouped, CLAIM=claim,
    )  # fmt: skip


class TritonBackend:
    """:class:`~pyg_quiver.backends.contract.HopBackend`: draws in Triton, tables in torch operations.

    For disjoint groups, heterogeneous graphs and batches whose bounds are too wide; each hop waits for its
    size.
    """

    def draw(
        self, graph: Graph, frontier: Frontier, draws: Draws, hop: int, fanout: int
    ) -> tuple[Tensor, Tensor, Tensor]:
        """See the contract."""
        device = graph.colptr.device
        _check_device(device)
        size = frontier.node.numel()
        plain = not 0 < fanout <= MAX_FANOUT or draws.group_time is not None
        if plain or size == 0 or graph.row.numel() == 0:
            return TorchBackend().draw(graph, frontier, draws, hop, fanout)
        start = graph.colptr[frontier.node]
        degree = graph.colptr[frontier.node + 1] - start
        drawn = torch.where(degree > 0, fanout, 0) if draws.replace else degree.clamp(max=fanout)
        offset = drawn.cumsum(0)
        total = int(offset[-1])
        edge, col, source = (torch.empty(total, dtype=torch.int64, device=device) for _ in range(3))
        # One hop by itself: both tables of ends begin at this frontier.
        zeros = torch.zeros(hop + 1, dtype=torch.int64, device=device)
        _launch_draw(
            graph, draws, (frontier.node, zeros, start, degree, drawn, offset, frontier.group),
            (edge, col, source), (zeros, zeros),
            hop=hop, fanout=fanout, frontier=size, grouped=True, claim=False,
        )  # fmt: skip
        return edge, col, source

    def table(self, num_nodes: int, seeds: Frontier, groups: int) -> TorchTable:
        """See the contract."""
        return TorchTable(num_nodes, seeds, dense=groups == 1)
