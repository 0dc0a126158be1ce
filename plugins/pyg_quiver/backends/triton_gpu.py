"""GPU sampler in Triton: the graph in GPU memory, or its edges in pinned host memory read in place.

A batch has a slot for every seed and every edge there can be, hop after hop, ``fanout`` of them for each slot
of the hop before. A hop is one kernel: it draws for the slots that named their node first and enters the
nodes drawn, each at the smallest slot that names it (an atomic minimum), so that the order in which threads
run changes nothing. At the end one prefix sum numbers nodes and edges, and one kernel writes them out.
Nothing in between depends on a count, so that a batch waits for the GPU once, at its end, and the launches of
a batch shape can be replayed as one CUDA graph; seeds and counts cross in pinned memory, without a copy.

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
from dataclasses import dataclass, replace
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
MAX_SLOTS = 1 << 27  # 60 bytes each; batches that might need more are sampled hop by hop, to exact sizes
MAX_MAP = 1 << 28  # entries (4 bytes) of the map from key to slot; more groups are sampled hop by hop
MAX_CAPTURED = 1 << 21  # slots; beyond, launching takes no share worth saving and buffers are large
CAPTURED_SHAPES = 24  # batch shapes kept as CUDA graphs, by graph and thread

_UNSEEN = tl.constexpr(2**31 - 1)  # above every slot
_GOLDEN = tl.constexpr(0x9E3779B97F4A7C15)
_NODES = tl.constexpr(2**32 - 1)  # ranks count nodes in their low half, edges in the high one
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


@triton.jit(do_not_specialize=["seeds", "groups", "num_nodes"])
def _seed_kernel(
    staged_ptr, slot_ptr, source_ptr, stream_ptr, seeds, groups, num_nodes,
    GROUPED: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Enter the seeds (a repeated one at its first slot) and take the streams.

    ``staged`` is in host memory: their number, seeds, streams, groups of the seeds.
    """
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    live = i < tl.load(staged_ptr)
    key = tl.load(staged_ptr + 1 + i, mask=live, other=-1)
    if GROUPED:
        key += tl.load(staged_ptr + 1 + seeds + groups + i, mask=live, other=0) * num_nodes
    tl.store(source_ptr + i, key, mask=i < seeds)
    tl.atomic_min(slot_ptr + key, i, mask=live)
    is_group = i < groups
    tl.store(stream_ptr + i, tl.load(staged_ptr + 1 + seeds + i, mask=is_group, other=0), mask=is_group)


@triton.jit(do_not_specialize=["hop", "first", "frontier", "fanout", "num_nodes", "seeds"])
def _draw_kernel(
    colptr_ptr, row_ptr, hot_row_ptr, hot_start_ptr, stream_ptr, group_ptr, slot_ptr,
    source_ptr, edge_ptr, target_ptr, hop, first, frontier, fanout, num_nodes, seeds,
    WIDTH: tl.constexpr, REPLACE: tl.constexpr, GROUPED: tl.constexpr, CLAIM: tl.constexpr,
    CACHED: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Draw for the nodes at BLOCK slots of the frontier ``first + [0, frontier)``; enter the sources.

    Draw s of a node: t = u(s, j + 1) with j = degree - fanout + s, or j where t was drawn before (Floyd).
    The slots behind the frontier get the source of each draw (-1 where there is none), its CSC position and
    the slot of its target. With CLAIM sources are keys and only slots that named their node first draw;
    without it they are plain nodes whose groups are in ``group_ptr``, all draw and none is entered.
    """
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    at = first + i
    inside = i < frontier
    v = tl.load(source_ptr + at, mask=inside, other=-1)
    live = v >= 0
    if CLAIM:
        # Seeds all draw. This hop enters only larger slots, so what is read here stays.
        named_first = tl.load(slot_ptr + v, mask=live & (at >= seeds), other=0) == at
        live = live & (named_first | (at < seeds))
    v = tl.where(live, v, 0)
    first_key = tl.zeros_like(v)
    if GROUPED:
        if CLAIM:
            group = v // num_nodes
            first_key = group * num_nodes
            v = v - first_key
        else:
            group = tl.load(group_ptr + i, mask=live, other=0)
        stream = tl.load(stream_ptr + group, mask=live, other=0).to(tl.uint64)
    else:
        stream = tl.load(stream_ptr).to(tl.uint64)
    start = tl.load(colptr_ptr + v, mask=live, other=0)
    degree = tl.load(colptr_ptr + v + 1, mask=live, other=0) - start
    if REPLACE:
        count = tl.where(degree > 0, fanout, 0)
        drawn = degree > 0
    else:
        count = tl.minimum(degree, fanout)
        drawn = degree > fanout
    key = _mix(stream ^ _mix(((v << 8) | hop).to(tl.uint64)))
    step = tl.arange(0, WIDTH)
    picks = tl.broadcast_to(step[None, :], (BLOCK, WIDTH)).to(tl.int64)
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
    if CACHED:
        hot = tl.load(hot_start_ptr + v, mask=live, other=-1)[:, None]
        near = tl.load(hot_row_ptr + hot + picks, mask=keep & (hot >= 0), other=0)
        far = tl.load(row_ptr + edge, mask=keep & (hot < 0), other=0)
        source = tl.where(hot >= 0, near, far).to(tl.int64) + first_key[:, None]
    else:
        source = tl.load(row_ptr + edge, mask=keep, other=0).to(tl.int64) + first_key[:, None]
    slot = (first + frontier) + (i.to(tl.int64) * fanout)[:, None] + step[None, :]
    tl.store(source_ptr + slot, tl.where(keep, source, -1), mask=inside[:, None] & (step < fanout)[None, :])
    tl.store(edge_ptr + slot, edge, mask=keep)
    tl.store(target_ptr + slot, tl.broadcast_to(at[:, None], (BLOCK, WIDTH)), mask=keep)
    if CLAIM:
        tl.atomic_min(slot_ptr + source, slot.to(tl.int32), mask=keep)


@triton.jit(do_not_specialize=["seeds", "slots"])
def _flag_kernel(source_ptr, slot_ptr, flag_ptr, seeds, slots, BLOCK: tl.constexpr):
    """What a slot adds to the ranks: 1 for a node that it names first (every seed), 2^32 for an edge."""
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    source = tl.load(source_ptr + i, mask=i < slots, other=-1)
    is_edge = (source >= 0) & (i >= seeds)
    is_first = tl.load(slot_ptr + source, mask=is_edge, other=-1) == i
    is_new = is_first | ((source >= 0) & (i < seeds))
    tl.store(flag_ptr + i, is_new.to(tl.int64) | (is_edge.to(tl.int64) << 32), mask=i < slots)


@triton.jit(do_not_specialize=["seeds", "slots", "hops", "num_nodes"])
def _write_kernel(
    source_ptr, edge_ptr, target_ptr, slot_ptr, rank_ptr, end_ptr, out_ptr, count_ptr,
    seeds, slots, hops, num_nodes,
    GROUPED: tl.constexpr, HOPS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Rows, columns, CSC positions, nodes, groups in one buffer; ranks at the ends of hops to the host."""
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    whole = tl.load(rank_ptr + slots - 1)
    edges, nodes = whole >> 32, whole & _NODES
    source = tl.load(source_ptr + i, mask=i < slots, other=-1)
    live = source >= 0
    is_edge = live & (i >= seeds)
    rank = tl.load(rank_ptr + i, mask=live, other=0)
    named_at = tl.load(slot_ptr + source, mask=live, other=0)
    is_new = live & ((named_at == i) | (i < seeds))
    row = (tl.load(rank_ptr + named_at, mask=is_edge, other=0) & _NODES) - 1
    target = tl.load(target_ptr + i, mask=is_edge, other=0)
    col = (tl.load(rank_ptr + target, mask=is_edge, other=0) & _NODES) - 1
    to_edge = out_ptr + (rank >> 32) - 1
    tl.store(to_edge, row, mask=is_edge)
    tl.store(to_edge + edges, col, mask=is_edge)
    tl.store(to_edge + 2 * edges, tl.load(edge_ptr + i, mask=is_edge, other=0), mask=is_edge)
    to_node = out_ptr + 3 * edges + (rank & _NODES) - 1
    if GROUPED:
        tl.store(to_node, source % num_nodes, mask=is_new)
        tl.store(to_node + nodes, source // num_nodes, mask=is_new)
    else:
        tl.store(to_node, source, mask=is_new)
    if tl.program_id(0) == 0:
        hop = tl.arange(0, HOPS)
        end = tl.load(end_ptr + hop, mask=hop <= hops, other=1)
        tl.store(count_ptr + hop, tl.load(rank_ptr + end - 1), mask=hop <= hops)


@triton.jit(do_not_specialize=["slots"])
def _reset_kernel(source_ptr, slot_ptr, slots, BLOCK: tl.constexpr):
    """Leave the map as it was found."""
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    source = tl.load(source_ptr + i, mask=i < slots, other=-1)
    tl.store(slot_ptr + source, _UNSEEN, mask=source >= 0)


_local = threading.local()
_capturing = threading.Lock()  # PyTorch registers its random generators with every recording


def _slot_map(size: int, device: torch.device) -> Tensor:
    """This thread's int32 map from key to slot, ``size`` entries or more, all unseen between calls."""
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

    def hops(self) -> list[tuple[int, int, int]]:
        """First slot of the frontier, its slots and the fan-out, of each hop."""
        hops, first, frontier = [], 0, self.seeds
        for fanout in self.fanouts:
            hops.append((first, frontier, fanout))
            first, frontier = first + frontier, frontier * fanout
        return hops

    @property
    def slots(self) -> int:
        """Seeds and most edges of the batch."""
        return self.seeds + sum(frontier * fanout for _, frontier, fanout in self.hops())

    def rounded_up(self) -> _Shape:
        """The shape whose captured launches serve this one: few shapes, and never four times too large."""
        groups = 1 if self.groups == 1 else _power_of_four(self.groups)
        return _Shape(_power_of_four(self.seeds), groups, self.fanouts, self.replace, self.num_nodes)


def _power_of_four(count: int) -> int:
    return 1 << (max(count - 1, 0).bit_length() + 1) // 2 * 2


def sample(graph: Graph, seeds: Frontier, fanouts: Sequence[int], draws: Draws) -> Sampled:
    """Sample a homogeneous graph (arguments: ``hops.sample_one_type``), on the device of ``graph.colptr``.

    Seeds, groups and streams are best on the CPU; from a device they are copied there first, which waits.
    """
    device = graph.colptr.device
    _check_device(device)
    num_nodes = max(graph.colptr.numel() - 1, graph.num_src_nodes)
    shape = _Shape(seeds.node.numel(), draws.streams.numel(), tuple(fanouts), draws.replace, num_nodes)
    usable = shape.seeds > 0 and graph.row.numel() > 0 and draws.group_time is None
    usable = usable and all(0 < fanout <= MAX_FANOUT for fanout in fanouts)
    if not usable or shape.slots > MAX_SLOTS or shape.groups * num_nodes > MAX_MAP:
        seeds = Frontier(seeds.node.to(device), seeds.group.to(device))
        draws = replace(draws, streams=draws.streams.to(device))
        return sample_one_type(TritonBackend(), graph, seeds, fanouts, draws)
    if device.type == "cpu":
        return _Batch(graph, shape).run(seeds, draws)
    with torch.cuda.device(device):
        rounded = shape.rounded_up()
        if rounded.slots > MAX_CAPTURED or rounded.groups * num_nodes > MAX_MAP:
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
    """Buffers of one batch shape and the launches that fill them."""

    def __init__(self, graph: Graph, shape: _Shape) -> None:
        device = graph.colptr.device
        self.shape = shape
        self._graph: Graph | None = graph
        self._recorded: torch.cuda.CUDAGraph | None = None
        self._free: torch.cuda.Event | None = None

        def empty(size: int, dtype: torch.dtype = torch.int64) -> Tensor:
            return torch.empty(size, dtype=dtype, device=device)

        def on_host(size: int) -> Tensor:
            return torch.zeros(size, dtype=torch.int64, pin_memory=device.type == "cuda")

        ends = [first + frontier for first, frontier, _ in shape.hops()] + [shape.slots]
        nodes = min(shape.slots, shape.num_nodes * shape.groups + shape.seeds)
        self.staged, self.counts = on_host(1 + 2 * shape.seeds + shape.groups), on_host(len(ends))
        self.slot = _slot_map(shape.groups * shape.num_nodes, device)
        self.streams, self.zero = empty(shape.groups), torch.zeros(1, dtype=torch.int64, device=device)
        self.source, self.edge, self.flag, self.rank = (empty(shape.slots) for _ in range(4))
        self.target = empty(shape.slots, torch.int32)
        self.out = empty(3 * (shape.slots - shape.seeds) + 2 * nodes)
        self.ends = torch.tensor(ends, device=device)

    def capture(self, graph: Graph) -> None:
        """Record the launches; later runs replay them with one call."""
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
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
        self._stage(seeds, draws)
        if self._free is not None:
            self._free.wait()
        if self._recorded is not None:
            self._recorded.replay()
        else:
            assert self._graph is not None
            self._enqueue(self._graph)
        if self.out.is_cuda:
            torch.cuda.current_stream().synchronize()
        counts = self.counts.tolist()
        node_ends, edge_ends = [c & _NODES.value for c in counts], [c >> 32 for c in counts]
        nodes, total, grouped = node_ends[-1], edge_ends[-1], self.shape.groups > 1
        used = self.out[: 3 * total + (2 if grouped else 1) * nodes]
        if self._free is not None:  # the buffers are used again
            used = used.clone()
            self._free.record()
        row, col, edge, node, *group = used.split([total] * 3 + [nodes] * (2 if grouped else 1))
        return Sampled(
            node, row, col, edge, group[0] if grouped else self.zero.expand(nodes),
            [node_ends[0], *(b - a for a, b in pairwise(node_ends))], [b - a for a, b in pairwise(edge_ends)],
        )  # fmt: skip

    def _stage(self, seeds: Frontier, draws: Draws) -> None:
        """Put the batch where the first kernel reads it; the last batch has been waited for."""
        count, groups, staged = seeds.node.numel(), draws.streams.numel(), self.staged.numpy()
        at = 1 + self.shape.seeds
        staged[0] = count
        staged[1 : 1 + count] = seeds.node.cpu().numpy()
        staged[at : at + groups] = draws.streams.cpu().numpy()
        if self.shape.groups > 1:
            at += self.shape.groups
            staged[at : at + count] = seeds.group.cpu().numpy()

    def _enqueue(self, graph: Graph) -> None:
        shape, slot, source = self.shape, self.slot, self.source
        grouped, num_nodes, slots = shape.groups > 1, shape.num_nodes, shape.slots
        _launch(
            _seed_kernel, max(shape.seeds, shape.groups), _BLOCK, self.staged, slot, source, self.streams,
            shape.seeds, shape.groups, num_nodes, GROUPED=grouped,
        )  # fmt: skip
        for hop, (first, frontier, fanout) in enumerate(shape.hops()):
            _launch_draw(
                graph, (self.streams, self.streams, slot, source, self.edge, self.target),
                (hop, first, frontier, fanout, num_nodes, shape.seeds),
                replace=shape.replace, grouped=grouped, claim=True,
            )  # fmt: skip
        _launch(_flag_kernel, slots, _BLOCK, source, slot, self.flag, shape.seeds, slots)
        torch.cumsum(self.flag, 0, out=self.rank)
        hops = len(shape.fanouts)
        _launch(
            _write_kernel, slots, _BLOCK, source, self.edge, self.target, slot, self.rank, self.ends,
            self.out, self.counts, shape.seeds, slots, hops, num_nodes,
            GROUPED=grouped, HOPS=_width(hops + 1),
        )  # fmt: skip
        _launch(_reset_kernel, slots, _BLOCK, source, slot, slots)


def _launch_draw(
    graph: Graph, buffers: tuple[Tensor | None, ...], numbers: tuple[int, ...],
    *, replace: bool, grouped: bool, claim: bool,
) -> None:  # fmt: skip
    width = _width(numbers[3])
    _launch(
        _draw_kernel, numbers[2], max(1024 // width, 16),
        graph.colptr, graph.row, graph.hot_row, graph.hot_start, *buffers, *numbers,
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
        source, edge, target = (
            torch.empty(size * (1 + fanout), dtype=torch.int64, device=device) for _ in range(3)
        )
        source[:size] = frontier.node
        _launch_draw(
            graph, (draws.streams, frontier.group, None, source, edge, target),
            (hop, 0, size, fanout, 0, size),
            replace=draws.replace, grouped=True, claim=False,
        )  # fmt: skip
        drawn = (source[size:] >= 0).nonzero().squeeze(1) + size
        return edge[drawn], target[drawn], source[drawn]

    def table(self, num_nodes: int, seeds: Frontier, groups: int) -> TorchTable:
        """See the contract."""
        return TorchTable(num_nodes, seeds, dense=groups == 1)
