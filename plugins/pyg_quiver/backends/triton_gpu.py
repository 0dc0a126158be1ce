"""GPU sampler in Triton: the graph in GPU memory, or its edges in pinned host memory read in place.

A hop is four kernels and two prefix sums. Nodes are numbered by the smallest edge that names them (an atomic
minimum), so that the result does not depend on the order in which threads run. Buffers are allocated for the
most edges there can be and counts stay on the device, so that a batch waits for the GPU once, at its end, and
the launches of a batch shape can be replayed as one CUDA graph.

A node of group g is entered as the key ``g * N + v``, so that groups never meet.
"""

# Jitted functions take no annotations but constexpr, and every argument by position.
# ruff: noqa: ANN001, ANN202, PLR0917
# mypy: disallow-untyped-defs=False

from __future__ import annotations

import os
import threading
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.utils.weak import WeakIdKeyDictionary

from pyg_quiver.backends.contract import Draws, Frontier, Graph, Sampled
from pyg_quiver.backends.hops import sample_one_type
from pyg_quiver.backends.torch_ops import TorchBackend, TorchTable

MAX_FANOUT = 32  # a program holds the draws of a node in registers, and compiling grows with their number
MAX_BUFFER = 1 << 28  # edges; batches that might need more are sampled hop by hop, to exact sizes
MAX_MAP = 1 << 28  # entries (4 bytes) of the map from key to position; more groups are sampled hop by hop
MAX_CAPTURED = 1 << 21  # edges; beyond, launching takes no share worth saving and buffers are large
CAPTURED_SHAPES = 24  # batch shapes kept as CUDA graphs, by graph and thread

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


@triton.jit(do_not_specialize=["num_nodes"])
def _seed_kernel(
    slot_ptr, node_ptr, seed_ptr, group_ptr, ends_ptr, num_nodes, GROUPED: tl.constexpr, BLOCK: tl.constexpr
):
    """Enter the seeds; a repeated seed keeps its first position."""
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    live = i < tl.load(ends_ptr + 1)
    key = tl.load(seed_ptr + i, mask=live, other=0)
    if GROUPED:
        key += tl.load(group_ptr + i, mask=live, other=0) * num_nodes
    tl.store(node_ptr + i, key, mask=live)
    tl.atomic_min(slot_ptr + key, i + _SEEN, mask=live)


@triton.jit(do_not_specialize=["hop", "bound", "fanout", "num_nodes"])
def _plan_kernel(
    colptr_ptr, node_ptr, ends_ptr, start_ptr, degree_ptr, count_ptr, hop, bound, fanout, num_nodes,
    REPLACE: tl.constexpr, GROUPED: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """First edge, degree and number of draws of each frontier node; 0 draws beyond the frontier."""
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    begin = tl.load(ends_ptr + hop)
    live = i < tl.load(ends_ptr + hop + 1) - begin
    v = tl.load(node_ptr + begin + i, mask=live, other=0)
    if GROUPED:
        v = v % num_nodes
    start = tl.load(colptr_ptr + v, mask=live, other=0)
    degree = tl.load(colptr_ptr + v + 1, mask=live, other=0) - start
    if REPLACE:
        count = tl.where(degree > 0, fanout, 0)
    else:
        count = tl.minimum(degree, fanout)
    inside = i < bound
    tl.store(start_ptr + i, start, mask=inside)
    tl.store(degree_ptr + i, degree, mask=inside)
    tl.store(count_ptr + i, tl.where(live, count, 0), mask=inside)


@triton.jit(do_not_specialize=["hop", "bound", "fanout", "num_nodes"])
def _draw_kernel(
    row_ptr, hot_row_ptr, hot_start_ptr,
    node_ptr, ends_ptr, start_ptr, degree_ptr, count_ptr, offset_ptr, stream_ptr, group_ptr,
    edge_ptr, col_ptr, local_ptr, slot_ptr, base_ptr, hop, bound, fanout, num_nodes,
    WIDTH: tl.constexpr, REPLACE: tl.constexpr, GROUPED: tl.constexpr, CLAIM: tl.constexpr,
    CACHED: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Draw the edges of BLOCK frontier nodes and read their sources; with CLAIM also enter those.

    Draw s of a node: t = u(s, j + 1) with j = degree - fanout + s, or j where t was drawn before (Floyd).
    With CLAIM nodes and sources are keys, without it plain nodes whose groups are in ``group_ptr``.
    """
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = i < bound
    begin = tl.load(ends_ptr + hop)
    count = tl.load(count_ptr + i, mask=inside, other=0)
    live = count > 0
    degree = tl.load(degree_ptr + i, mask=live, other=0)
    start = tl.load(start_ptr + i, mask=live, other=0)
    v = tl.load(node_ptr + begin + i, mask=live, other=0)
    first_key = tl.zeros_like(v)
    if GROUPED:
        if CLAIM:
            group = v // num_nodes
            first_key = group * num_nodes
            v = v - first_key
        else:
            group = tl.load(group_ptr + begin + i, mask=live, other=0)
        stream = tl.load(stream_ptr + group, mask=live, other=0).to(tl.uint64)
    else:
        stream = tl.load(stream_ptr).to(tl.uint64)
    key = _mix(stream ^ _mix(((v << 8) | hop).to(tl.uint64)))
    step = tl.arange(0, WIDTH)
    picks = tl.broadcast_to(step[None, :], (BLOCK, WIDTH)).to(tl.int64)
    drawn = live if REPLACE else degree > fanout
    for s in range(fanout):
        random = _mix(key) >> 32
        key += _GOLDEN
        if REPLACE:
            value = ((random * degree.to(tl.uint64)) >> 32).to(tl.int64)
        else:
            last = degree - fanout + s
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
    if CACHED:
        hot = tl.load(hot_start_ptr + v, mask=live, other=-1)[:, None]
        near = tl.load(hot_row_ptr + hot + picks, mask=keep & (hot >= 0), other=0)
        far = tl.load(row_ptr + edge, mask=keep & (hot < 0), other=0)
        source = tl.where(hot >= 0, near, far).to(tl.int64) + first_key[:, None]
    else:
        source = tl.load(row_ptr + edge, mask=keep, other=0).to(tl.int64) + first_key[:, None]
    tl.store(edge_ptr + place, edge, mask=keep)
    tl.store(col_ptr + place, tl.broadcast_to((begin + i)[:, None], (BLOCK, WIDTH)), mask=keep)
    tl.store(local_ptr + place, source, mask=keep)
    if CLAIM:
        order = (at[:, None] + step[None, :]).to(tl.int32)
        tl.atomic_min(slot_ptr + source, order, mask=keep)


@triton.jit(do_not_specialize=["hop", "frontier", "bound"])
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


@triton.jit(do_not_specialize=["hop", "bound"])
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


@triton.jit(do_not_specialize=["hops"])
def _number_kernel(local_ptr, slot_ptr, base_ptr, hops, BLOCK: tl.constexpr):
    """Replace sources by their positions."""
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    live = i < tl.load(base_ptr + hops)
    source = tl.load(local_ptr + i, mask=live, other=0)
    position = tl.load(slot_ptr + source, mask=live, other=0).to(tl.int64) - _SEEN
    tl.store(local_ptr + i, position, mask=live)


@triton.jit(do_not_specialize=["hops", "num_nodes"])
def _reset_kernel(
    slot_ptr, node_ptr, group_ptr, ends_ptr, hops, num_nodes, GROUPED: tl.constexpr, BLOCK: tl.constexpr
):
    """Leave the map as it was found; turn keys into nodes and groups."""
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    live = i < tl.load(ends_ptr + hops + 1)
    key = tl.load(node_ptr + i, mask=live, other=0)
    tl.store(slot_ptr + key, _UNSEEN, mask=live)
    if GROUPED:
        tl.store(node_ptr + i, key % num_nodes, mask=live)
        tl.store(group_ptr + i, key // num_nodes, mask=live)


_local = threading.local()
_capturing = threading.Lock()  # PyTorch registers its random generators with every recording


def _slot_map(size: int, device: torch.device) -> Tensor:
    """This thread's int32 map from key to position, ``size`` entries or more, all unseen between calls."""
    maps = _local.__dict__.setdefault("maps", {})
    if device not in maps or maps[device].numel() < size:
        maps[device] = torch.full((size,), _UNSEEN.value, dtype=torch.int32, device=device)
    return maps[device]


def _launch(kernel: Any, work: int, block: int, *arguments: Any, **constants: Any) -> None:
    if work > 0:
        kernel[(triton.cdiv(work, block),)](*arguments, **constants, BLOCK=block)


def _width(fanout: int) -> int:
    return max(1 << (fanout - 1).bit_length(), 2)


def _check_device(device: torch.device) -> None:
    if device.type == "cpu" and os.environ.get("TRITON_INTERPRET") != "1":
        raise RuntimeError("backend='triton' on the CPU needs TRITON_INTERPRET=1 before Triton is imported")


@dataclass(frozen=True)
class _Shape:
    """Upper bounds of a batch, and how it is drawn."""

    seeds: int
    groups: int
    fanouts: tuple[int, ...]
    replace: bool
    num_nodes: int

    def bounds(self) -> list[tuple[int, int]]:
        """Most frontier nodes and edges of each hop."""
        bounds, frontier = [], self.seeds
        for fanout in self.fanouts:
            bounds.append((frontier, frontier * fanout))
            frontier = min(frontier * fanout, self.num_nodes * self.groups)
        return bounds

    @property
    def edges(self) -> int:
        """Most edges of the batch."""
        return sum(edges for _, edges in self.bounds())

    def rounded_up(self) -> _Shape:
        """The shape whose captured launches serve this one: few shapes, and never four times too large."""
        groups = 1 if self.groups == 1 else _power_of_four(self.groups)
        return _Shape(_power_of_four(self.seeds), groups, self.fanouts, self.replace, self.num_nodes)


def _power_of_four(count: int) -> int:
    return 1 << (max(count - 1, 0).bit_length() + 1) // 2 * 2


def sample(graph: Graph, seeds: Frontier, fanouts: Sequence[int], draws: Draws) -> Sampled:
    """Sample a homogeneous graph (arguments: ``hops.sample_one_type``), on the device of ``graph.colptr``."""
    device = graph.colptr.device
    _check_device(device)
    num_nodes = max(graph.colptr.numel() - 1, graph.num_src_nodes)
    shape = _Shape(seeds.node.numel(), draws.streams.numel(), tuple(fanouts), draws.replace, num_nodes)
    usable = shape.seeds > 0 and graph.row.numel() > 0 and draws.group_time is None
    usable = usable and all(0 < fanout <= MAX_FANOUT for fanout in fanouts)
    if not usable or shape.edges > MAX_BUFFER or shape.groups * num_nodes > MAX_MAP:
        return sample_one_type(TritonBackend(), graph, seeds, fanouts, draws)
    if device.type == "cpu":
        return _Batch(graph, shape).run(seeds, draws)
    with torch.cuda.device(device):
        rounded = shape.rounded_up()
        if rounded.edges > MAX_CAPTURED or rounded.groups * num_nodes > MAX_MAP:
            return _Batch(graph, shape).run(seeds, draws)
        return _captured(graph, rounded).run(seeds, draws)


def _captured(graph: Graph, shape: _Shape) -> _Batch:
    """This thread's batch of a shape; the graph is not kept alive by it."""
    by_graph = _local.__dict__.setdefault("batches", WeakIdKeyDictionary())
    batches = by_graph.setdefault(graph, OrderedDict())
    if shape in batches:
        batches.move_to_end(shape)
        return batches[shape]
    batch = _Batch(graph, shape)
    batch.capture(graph)
    batches[shape] = batch
    if len(batches) > CAPTURED_SHAPES:
        batches.popitem(last=False)
    return batch


class _Batch:
    """Device buffers of one batch shape and the launches that fill them."""

    def __init__(self, graph: Graph, shape: _Shape) -> None:
        device = graph.colptr.device
        self.shape = shape
        self._graph: Graph | None = graph
        self._recorded: torch.cuda.CUDAGraph | None = None
        self._free: torch.cuda.Event | None = None

        def empty(size: int, dtype: torch.dtype = torch.int64) -> Tensor:
            return torch.empty(size, dtype=dtype, device=device)

        bounds = shape.bounds()
        frontier = max((nodes for nodes, _ in bounds), default=0)
        widest = max((edges for _, edges in bounds), default=0)
        most = min(shape.seeds + shape.edges, shape.num_nodes * shape.groups + shape.seeds)
        self.slot = _slot_map(shape.groups * shape.num_nodes, device)
        self.seed, self.seed_group = empty(shape.seeds), empty(shape.seeds)
        self.streams = empty(shape.groups)
        self.node, self.group = empty(most), empty(most if shape.groups > 1 else 1)
        self.edge, self.col, self.local = (empty(shape.edges) for _ in range(3))
        self.start, self.degree, self.drawn, self.offset = (empty(frontier) for _ in range(4))
        self.flag, self.rank = empty(widest, torch.int32), empty(widest)
        # The frontier of hop h is node[ends[h] : ends[h + 1]], its edges begin at base[h].
        hops = len(shape.fanouts)
        self.counts = torch.zeros(2 * hops + 3, dtype=torch.int64, device=device)
        self.ends, self.base = self.counts[: hops + 2], self.counts[hops + 2 :]

    def capture(self, graph: Graph) -> None:
        """Record the launches; later runs replay them with one call."""
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            self.ends[1] = 0
            self._enqueue(graph)  # compiles
            side.synchronize()
            self._recorded = torch.cuda.CUDAGraph()
            with _capturing:
                self._recorded.capture_begin(capture_error_mode="thread_local")
                self._enqueue(graph)
                self._recorded.capture_end()
        torch.cuda.current_stream().wait_stream(side)
        self._graph = None
        self._free = torch.cuda.Event()
        self._free.record()

    def run(self, seeds: Frontier, draws: Draws) -> Sampled:
        """Sample one batch; waits for the device once."""
        count, groups = seeds.node.numel(), draws.streams.numel()
        if self._free is not None:
            self._free.wait()
        self.seed[:count] = seeds.node
        self.streams[:groups] = draws.streams
        if self.shape.groups > 1:
            self.seed_group[:count] = seeds.group
        self.ends[1:2].fill_(count)
        if self._recorded is not None:
            self._recorded.replay()
        else:
            assert self._graph is not None
            self._enqueue(self._graph)
        counts = self.counts.tolist()
        hops = len(self.shape.fanouts)
        node_ends, edge_ends = counts[: hops + 2], counts[hops + 2 :]
        nodes, total = node_ends[-1], edge_ends[-1]
        parts = [self.node[:nodes], self.local[:total], self.col[:total], self.edge[:total]]
        group = self.group[:nodes] if self.shape.groups > 1 else None
        if self._free is not None:  # the buffers are used again
            parts = [part.clone() for part in parts]
            group = None if group is None else group.clone()
            self._free.record()
        node, row, col, edge = parts
        return Sampled(
            node, row, col, edge, torch.zeros_like(node) if group is None else group,
            [b - a for a, b in pairwise(node_ends)], [b - a for a, b in pairwise(edge_ends)],
        )  # fmt: skip

    def _enqueue(self, graph: Graph) -> None:
        shape, slot, node, ends, base = self.shape, self.slot, self.node, self.ends, self.base
        grouped, num_nodes = shape.groups > 1, shape.num_nodes
        _launch(
            _seed_kernel, shape.seeds, _BLOCK, slot, node, self.seed, self.seed_group, ends, num_nodes,
            GROUPED=grouped,
        )  # fmt: skip
        for hop, (fanout, (frontier, bound)) in enumerate(zip(shape.fanouts, shape.bounds(), strict=True)):
            offset, flag, rank = self.offset[:frontier], self.flag[:bound], self.rank[:bound]
            _launch(
                _plan_kernel, frontier, _BLOCK, graph.colptr, node, ends, self.start, self.degree, self.drawn,
                hop, frontier, fanout, num_nodes, REPLACE=shape.replace, GROUPED=grouped,
            )  # fmt: skip
            torch.cumsum(self.drawn[:frontier], 0, out=offset)
            _launch_draw(
                graph, (node, ends, self.start, self.degree, self.drawn, offset, self.streams, node),
                (self.edge, self.col, self.local, slot, base), (hop, frontier, fanout, num_nodes),
                replace=shape.replace, grouped=grouped, claim=True,
            )  # fmt: skip
            _launch(_flag_kernel, bound, _BLOCK, self.local, slot, flag, base, offset, hop, frontier, bound)
            torch.cumsum(flag, 0, out=rank)
            _launch(_enter_kernel, bound, _BLOCK, self.local, slot, flag, rank, node, ends, base, hop, bound)
        hops = len(shape.fanouts)
        _launch(_number_kernel, shape.edges, _BLOCK, self.local, slot, base, hops)
        _launch(
            _reset_kernel, node.numel(), _BLOCK, slot, node, self.group, ends, hops, num_nodes,
            GROUPED=grouped,
        )  # fmt: skip


def _launch_draw(
    graph: Graph, inputs: tuple[Tensor, ...], outputs: tuple[Tensor, ...], numbers: tuple[int, ...],
    *, replace: bool, grouped: bool, claim: bool,
) -> None:  # fmt: skip
    width = _width(numbers[2])
    _launch(
        _draw_kernel, numbers[1], max(1024 // width, 16), graph.row, graph.hot_row, graph.hot_start,
        *inputs, *outputs, *numbers,
        WIDTH=width, REPLACE=replace, GROUPED=grouped, CLAIM=claim, CACHED=graph.hot_row is not None,
    )  # fmt: skip


class TritonBackend:
    """:class:`~pyg_quiver.backends.contract.HopBackend`: draws in Triton, tables in torch operations.

    For heterogeneous graphs and batches whose bounds are too wide; each hop waits for its size.
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
            graph,
            (frontier.node, zeros, start, degree, drawn, offset, draws.streams, frontier.group),
            (edge, col, source, zeros, zeros), (hop, size, fanout, 0),
            replace=draws.replace, grouped=True, claim=False,
        )  # fmt: skip
        return edge, col, source

    def table(self, num_nodes: int, seeds: Frontier, groups: int) -> TorchTable:
        """See the contract."""
        return TorchTable(num_nodes, seeds, dense=groups == 1)
