"""One table over several processes: each holds a shard, all draw from the whole."""

from __future__ import annotations

import os
import socket
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from rl_replay_gear.batch import Part, Segments, TrajectoryBatch
from rl_replay_gear.collect import ReadPlan, Windows, segment_bounds
from rl_replay_gear.loops import GENERATION_BITS, SLOT_BITS
from rl_replay_gear.randomness import Generator, uniforms
from rl_replay_gear.selection import Selection
from rl_replay_gear.selectors import Drawn, Selector, TopK
from rl_replay_gear.spec import DTYPE_NAMES, TableSpec
from rl_replay_gear.table import Anchor, TrajectoryTable

_SHARD_SHIFT = SLOT_BITS + GENERATION_BITS


@dataclass(frozen=True)
class ParallelLayout:
    """Where this process stands. Processes of one ``dp_rank`` receive the same batch.

    Args:
        dp_rank, dp_size: Data-parallel position.
        pp_stage, pp_size, tp_rank, tp_size: Pipeline and tensor-parallel positions.
        group: Process group of all shards; None is the default group.
        columns_by_stage: Pipeline stage -> columns it needs; other columns do not travel to it.
    """

    dp_rank: int
    dp_size: int
    pp_stage: int = 0
    pp_size: int = 1
    tp_rank: int = 0
    tp_size: int = 1
    group: Any = None
    columns_by_stage: Mapping[int, Sequence[str]] | None = None

    @classmethod
    def single(cls) -> ParallelLayout:
        """One process."""
        return cls(0, 1)

    @classmethod
    def from_mesh(
        cls, mesh: Any, *, columns_by_stage: Mapping[int, Sequence[str]] | None = None
    ) -> ParallelLayout:
        """From a ``torch.distributed.device_mesh.DeviceMesh`` with dimensions among ``dp``, ``pp``,
        ``tp``.
        """
        names = mesh.mesh_dim_names or ()
        if "dp" not in names:
            raise ValueError(f"the mesh needs a dimension named 'dp', it has {names}")
        place = {name: (mesh.get_local_rank(name), mesh.size(names.index(name))) for name in names}
        pp, tp = place.get("pp", (0, 1)), place.get("tp", (0, 1))
        return cls(*place["dp"], *pp, *tp, columns_by_stage=columns_by_stage)

    @classmethod
    def from_deepspeed(
        cls, engine: Any, *, columns_by_stage: Mapping[int, Sequence[str]] | None = None
    ) -> ParallelLayout:
        """From a DeepSpeed engine: its ``mpu`` or pipeline grid where it has one, else its data-parallel
        group.
        """
        grid = getattr(engine, "grid", None) or getattr(engine, "mpu", None)
        if grid is None:
            return cls(
                dist.get_rank(engine.data_parallel_group),
                dist.get_world_size(engine.data_parallel_group),
                columns_by_stage=columns_by_stage,
            )
        pipe = getattr(grid, "get_pipe_parallel_rank", None)
        return cls(
            grid.get_data_parallel_rank(),
            grid.get_data_parallel_world_size(),
            pipe() if pipe else 0,
            grid.get_pipe_parallel_world_size() if pipe else 1,
            grid.get_model_parallel_rank(),
            grid.get_model_parallel_world_size(),
            columns_by_stage=columns_by_stage,
        )


@dataclass(frozen=True)
class GlobalSelection(Selection):
    """This process's items, and those of every data-parallel rank: int64 [dp_size, B]."""

    all_handles: Tensor | None = None
    all_anchors: Tensor | None = None


class ShardedTable:
    """A table whose trajectories lie in the processes of a group, one shard each.

    ``write`` and ``read`` are local. ``select``, ``collect``, ``count_stale`` and ``update_priorities`` are
    collective: every process of the group calls them in the same order, with generators in the same state.

    A draw over trajectories or steps with replacement is exact: each shard sends three numbers (total weight,
    number of items, smallest weight), every process draws the same ``dp_size * B`` uniforms, and each
    resolves those that fall in its range by its own inverse cumulative sum. The items are those one table
    holding the shards in rank order would draw, except within rounding of a boundary. ``TopK`` and draws
    without replacement compare ``dp_size * B`` candidates a shard.

    Args:
        table: This process's shard.
        layout: Where this process stands; None: every process of the default group is a data-parallel rank.
        scope: ``"global"`` draws from all shards, ``"local"`` each process from its own.
        exchange: How rows travel: ``"all_to_all"``; ``"mapped"`` reads the shards of this host in place
            (their tables need ``shared=True``); ``"auto"`` is mapped where every process is on this host and
            shares.

    Raises:
        ValueError: the shards' schemas differ (names ranks and columns), or more than 8 mapped shards.
    """

    def __init__(
        self,
        table: TrajectoryTable,
        layout: ParallelLayout | None = None,
        *,
        scope: Literal["global", "local"] = "global",
        exchange: Literal["auto", "all_to_all", "mapped"] = "auto",
    ) -> None:
        if scope not in ("global", "local"):
            raise ValueError(f"scope must be 'global' or 'local', got {scope!r}")
        self.table = table
        self.group = layout.group if layout is not None else None
        self.distributed = dist.is_available() and dist.is_initialized()
        self.rank = dist.get_rank(self.group) if self.distributed else 0
        self.world = dist.get_world_size(self.group) if self.distributed else 1
        self.layout = layout if layout is not None else ParallelLayout(self.rank, self.world)
        self.scope = scope
        self._comm = _comm_device(self.group) if self.distributed else torch.device("cpu")
        table.index.shard = self.rank
        facts = self._gather_objects(
            {
                "spec": table.spec.to_json(),
                "fingerprint": table.spec.fingerprint(),
                "dp_rank": self.layout.dp_rank,
                "dp_size": self.layout.dp_size,
                "stage": self.layout.pp_stage,
                "host": socket.gethostname(),
                "pid": os.getpid(),
                "fd": None if table.arena is None else table.arena.fd,
                "rows": table.spec.num_rows,
            }
        )
        _check_schemas(facts)
        self._dp_ranks = [fact["dp_rank"] for fact in facts]
        self._stages = [fact["stage"] for fact in facts]
        self.exchange = self._choose_exchange(exchange, facts)
        self._shards = self._map_shards(facts) if self.exchange == "mapped" else None
        self.bytes_received = 0

    @property
    def spec(self) -> TableSpec:
        """The schema and this shard's capacity."""
        return self.table.spec

    def __len__(self) -> int:
        return len(self.table)

    def write(self, columns: Mapping[str, Any], *, priority: float | None = None) -> int:
        """Store a trajectory in this process's shard."""
        return self.table.write(columns, priority=priority)

    def read(self, handle: int) -> dict[str, Tensor]:
        """A trajectory of this process's shard."""
        return self.table.read(handle)

    def attach(self, selector: Selector) -> None:
        """See ``TrajectoryTable.attach``."""
        self.table.attach(selector)

    def count_stale(self, handles: Tensor) -> int:
        """How many of the processes' handles are stale, summed over all (collective)."""
        return int(self._reduce(torch.tensor([self._count_stale_here(handles)]))[0])

    def select(
        self,
        selector: Selector,
        batch_size: int,
        *,
        anchor: Anchor = "uniform",
        generator: Generator | None = None,
    ) -> Selection:
        """Draw ``batch_size`` items for each data-parallel rank (collective); returns this rank's.

        Raises:
            RuntimeError: all shards are empty.
            ValueError: a selector that has no global meaning (Fifo, Lifo, Shuffle: use ``scope="local"``).
        """
        self.attach(selector)
        if self.scope == "local":
            return self._select_local(selector, batch_size, anchor, generator)
        wanted = self.layout.dp_size * batch_size
        if isinstance(selector, TopK) or (isinstance(selector, Drawn) and not selector.replacement):
            mine, slots, probability, weights = self._candidates(selector, wanted, generator)
        elif isinstance(selector, Drawn):
            mine, slots, probability, weights = self._draw(selector, wanted, generator)
        else:
            raise ValueError(
                f"{type(selector).__name__} has no order over shards; use ShardedTable(scope='local')"
            )
        anchors = self._anchors(uniforms(generator, wanted), mine, slots, anchor)
        handles = self.table.index.handles(slots)
        table = torch.zeros((3, wanted), dtype=torch.int64)
        table[0, mine], table[1, mine] = torch.from_numpy(handles), torch.from_numpy(anchors)
        table[2, mine] = torch.from_numpy(probability).view(torch.int64)
        table = self._reduce(table).view(3, self.layout.dp_size, batch_size)
        own = self.layout.dp_rank
        drawn = table[2, own].contiguous().view(torch.float64)
        return GlobalSelection(
            table[0, own].contiguous(),
            table[1, own].contiguous(),
            drawn,
            weights(drawn),
            table[0],
            table[1],
        )

    def update_priorities(self, handles: Any, priorities: Any, *, strict: bool = False) -> int:
        """Send priorities to the shards that hold the trajectories (collective); returns stale ones of this
        call.

        A bad value in any process raises ValueError in all, and nothing is changed.
        """
        keys = torch.as_tensor(handles, dtype=torch.int64).cpu()
        values = torch.as_tensor(priorities).detach().cpu().double()
        bad = torch.tensor([int(not bool((torch.isfinite(values) & (values >= 0)).all()))])
        if int(self._reduce(bad)[0]):
            raise ValueError("priorities must be finite and >= 0 in every process")
        owner = keys >> _SHARD_SHIFT
        order = torch.argsort(owner, stable=True)
        counts = torch.bincount(owner, minlength=self.world)[: self.world]
        payload = torch.stack([keys[order], values[order].view(torch.int64)], 1)
        received, _ = self._all_to_all(payload, counts)
        stale = self.table.update_priorities(
            received[:, 0].contiguous(), received[:, 1].contiguous().view(torch.float64), strict=strict
        )
        return int(self._reduce(torch.tensor([stale]))[0])

    def collect(
        self,
        selection: Selection,
        windows: Windows,
        *,
        columns: Sequence[str] | None = None,
        device: torch.device | str | None = None,
        backend: Literal["auto", "torch", "triton"] = "auto",
        out: Sequence[Tensor] | None = None,
    ) -> TrajectoryBatch:
        """Gather this process's items from all shards (collective). See ``TrajectoryTable.collect``.

        Raises:
            RuntimeError: a trajectory was evicted after it was selected, in any shard.
        """
        del out  # rows arrive in new memory
        stale = self.count_stale(selection.handles)
        if stale:
            raise RuntimeError(f"{stale} handles are stale: select again")
        if not isinstance(selection, GlobalSelection) and self.scope == "global":
            selection = self._share(selection)
        if self.scope == "local" or self.world == 1:
            return self.table.collect(
                selection, windows, columns=columns or self._own_columns(), device=device, backend=backend
            )
        plans = {stage: self._stage_plan(windows, columns, stage) for stage in set(self._stages)}
        target = torch.device("cpu" if device is None else device)
        assert isinstance(selection, GlobalSelection)
        if self.exchange == "mapped":
            return self._collect_mapped(selection, plans, target, backend)
        return self._collect_exchanged(selection, plans, target)

    def _select_local(
        self, selector: Selector, batch_size: int, anchor: Anchor, generator: Generator | None
    ) -> Selection:
        return self.table.select(selector, batch_size, anchor=anchor, generator=generator)

    def _draw(self, selector: Drawn, wanted: int, generator: Generator | None) -> tuple[Any, ...]:
        total, items, smallest = selector.mass()
        masses = self._gather_floats([total, float(items), smallest])
        cumulative = np.cumsum(masses[:, 0])
        if not cumulative[-1] > 0:
            if masses[:, 1].sum() == 0:
                raise RuntimeError("table is empty: write a trajectory into a shard before selecting")
            raise ValueError("no trajectory has positive weight")
        point = uniforms(generator, wanted) * cumulative[-1]
        last = int(np.flatnonzero(masses[:, 0])[-1])
        owner = np.minimum(np.searchsorted(cumulative, point, side="right"), last)
        mine = np.flatnonzero(owner == self.rank)
        before = cumulative[self.rank] - total
        slots = probability = np.empty(0)
        if len(mine):
            local = np.clip((point[mine] - before) / total, 0.0, 1.0 - 2.0**-53)
            slots, probability = selector.draw(local)
        share = total / cumulative[-1]
        weights = selector.global_weights(
            int(masses[:, 1].sum()), float(masses[:, 2].min()) / float(cumulative[-1])
        )
        return mine, slots.astype(np.int64), probability.astype(np.float64) * share, weights

    def _candidates(self, selector: Selector, wanted: int, generator: Generator | None) -> tuple[Any, ...]:
        slots = self.table.index.candidates()
        weight = np.ones(len(slots))
        if isinstance(selector, Drawn):
            total = selector.mass()[0]
            weight = selector.slot_probability(slots) * total if total > 0 else np.zeros(len(slots))
            # The first W draws of successive sampling are the W smallest of exponential clocks.
            seed = int(uniforms(generator, 1)[0] * 2**53)
            u = np.random.Generator(np.random.Philox(key=[seed, self.rank])).random(len(slots))
            keys = np.full(len(slots), np.inf)
            np.divide(-np.log1p(-u), weight, out=keys, where=weight > 0)
        else:
            assert isinstance(selector, TopK)
            keys = self.table.index.priority[slots].astype(np.float64) * (-1 if selector.largest else 1)
        best = np.argsort(keys, kind="stable")[:wanted]
        offered = torch.full((wanted,), float("inf"), dtype=torch.float64)
        offered[: len(best)] = torch.from_numpy(keys[best])
        everyone = self._gather_tensor(offered).view(-1)
        order = torch.argsort(everyone, stable=True)[:wanted]
        found = int(torch.isfinite(everyone[order]).sum())
        if found < wanted:
            raise ValueError(f"cannot select {wanted} distinct trajectories from a table of {found}")
        mine = torch.nonzero(order // wanted == self.rank)[:, 0].numpy()
        chosen = best[(order[mine] % wanted).numpy()]
        total_weight = self._gather_floats([float(weight.sum())]).sum()
        drawn = isinstance(selector, Drawn)
        probability = weight[chosen] / total_weight if drawn else np.ones(len(chosen))
        return mine, slots[chosen], probability, lambda _: None

    def _anchors(self, u: np.ndarray, mine: np.ndarray, slots: np.ndarray, anchor: Anchor) -> np.ndarray:
        length = self.table.index.length[slots]
        if anchor == "start":
            return np.zeros(len(slots), np.int64)
        if anchor == "end":
            return length - 1
        if anchor != "uniform":
            raise ValueError(f"anchor must be 'uniform', 'start' or 'end', got {anchor!r}")
        return np.minimum((u[mine] * length).astype(np.int64), length - 1)

    def _share(self, selection: Selection) -> GlobalSelection:
        # A selection restored from a saved loader knows only its own items.
        both = self._gather_tensor(torch.stack([selection.handles, selection.anchors]))
        by_rank = {dp: both[i] for i, dp in enumerate(self._dp_ranks)}
        every = torch.stack([by_rank[dp] for dp in range(self.layout.dp_size)])
        return GlobalSelection(
            selection.handles,
            selection.anchors,
            selection.probability,
            selection.weight,
            every[:, 0],
            every[:, 1],
        )

    def _own_columns(self) -> Sequence[str] | None:
        by_stage = self.layout.columns_by_stage
        return None if by_stage is None else by_stage[self.layout.pp_stage]

    def _stage_plan(self, windows: Windows, columns: Sequence[str] | None, stage: int) -> ReadPlan:
        by_stage = self.layout.columns_by_stage
        return self.table.plan(windows, columns if by_stage is None else by_stage[stage])

    def _requests(self, selection: GlobalSelection, process: int) -> np.ndarray:
        """Positions in the batch of ``process`` whose trajectories this shard holds."""
        assert selection.all_handles is not None
        handles = selection.all_handles[self._dp_ranks[process]]
        return torch.nonzero((handles >> _SHARD_SHIFT) == self.rank)[:, 0].numpy()

    def _bounds_for(self, selection: GlobalSelection, plan: ReadPlan, process: int) -> list[Tensor]:
        """The segments, int64 [4, k] each, of this shard's part of a process's batch; one a plan segment."""
        assert selection.all_handles is not None
        assert selection.all_anchors is not None
        where = self._requests(selection, process)
        dp = self._dp_ranks[process]
        handles = selection.all_handles[dp].numpy()[where]
        slots, _ = self.table.index.locate(np.ascontiguousarray(handles))
        anchors = np.ascontiguousarray(selection.all_anchors[dp].numpy()[where])
        return [
            segment_bounds(self.table.index, slots, anchors, window, final=final)
            for window, final in plan.segments
        ]

    def _collect_exchanged(
        self, selection: GlobalSelection, plans: Mapping[int, ReadPlan], target: torch.device
    ) -> TrajectoryBatch:
        from tiered_memory import gather_segments

        outgoing, counts = [], []
        for process in range(self.world):
            plan = plans[self._stages[process]]
            bounds = self._bounds_for(selection, plan, process)
            items = bounds[0].shape[1]
            message = [torch.stack(bounds).flatten()]
            by_segment = dict(zip(plan.segments, bounds, strict=True))
            for read in plan.reads:
                first, count, shift, _ = by_segment[read.window, read.final]
                rows = gather_segments(
                    read.source, first, count, shift, read.window.length, fill=read.fill, backend="auto"
                )
                message.append(rows.flatten())
            flat = torch.cat(message)
            outgoing.append(flat)
            counts.append(len(flat))
            assert items == len(self._requests(selection, process))
        received, sizes = self._all_to_all(torch.cat(outgoing)[:, None], torch.tensor(counts))
        self.bytes_received += received.nbytes
        return self._assemble(
            selection, plans[self.layout.pp_stage], received[:, 0].split(sizes.tolist()), target
        )

    def _assemble(
        self, selection: GlobalSelection, plan: ReadPlan, messages: Sequence[Tensor], target: torch.device
    ) -> TrajectoryBatch:
        batch = len(selection.handles)
        owner = selection.handles >> _SHARD_SHIFT
        bounds = [torch.empty((4, batch), dtype=torch.int64) for _ in plan.segments]
        words = [
            torch.empty((batch, read.window.length, read.source.shape[1]), dtype=torch.int64)
            for read in plan.reads
        ]
        for process, message in enumerate(messages):
            where = torch.nonzero(owner == process)[:, 0]
            begin = 0
            for into in bounds:
                into[:, where] = message[begin : begin + 4 * len(where)].view(4, -1).cpu()
                begin += 4 * len(where)
            for into in words:
                size = len(where) * into.shape[1] * into.shape[2]
                into[where] = message[begin : begin + size].view(len(where), *into.shape[1:]).cpu()
                begin += size
        return self._batch(selection, plan, bounds, words, target)

    def _batch(
        self,
        selection: GlobalSelection,
        plan: ReadPlan,
        bounds: Sequence[Tensor],
        words: Sequence[Tensor],
        target: torch.device,
    ) -> TrajectoryBatch:
        segments = {
            key: Segments(tensor, key[0].length) for key, tensor in zip(plan.segments, bounds, strict=True)
        }
        parts = {
            field.column.name: Part(tensor, field.offset, field.column, segments[read.window, read.final])
            for read, tensor in zip(plan.reads, words, strict=True)
            for field in read.fields
        }
        made = TrajectoryBatch(
            {name: parts[name] for name in plan.order},
            selection,
            sum(tensor.nbytes for tensor in words),
            words,
        )
        return made if target.type == "cpu" else made.to(target)

    def _collect_mapped(
        self, selection: GlobalSelection, plans: Mapping[int, ReadPlan], target: torch.device, backend: Any
    ) -> TrajectoryBatch:
        from tiered_memory import gather_segments, row_code

        plan = plans[self.layout.pp_stage]
        outgoing = [
            torch.stack(self._bounds_for(selection, plans[self._stages[process]], process)).flatten()
            for process in range(self.world)
        ]
        counts = torch.tensor([len(part) for part in outgoing])
        received, sizes = self._all_to_all(torch.cat(outgoing)[:, None], counts)
        owner = selection.handles >> _SHARD_SHIFT
        bounds = [torch.empty((4, len(owner)), dtype=torch.int64) for _ in plan.segments]
        for process, message in enumerate(received[:, 0].split(sizes.tolist())):
            where = torch.nonzero(owner == process)[:, 0]
            for into, part in zip(bounds, message.view(len(bounds), 4, len(where)), strict=True):
                into[:, where] = part
        by_segment = dict(zip(plan.segments, bounds, strict=True))
        assert self._shards is not None
        words = []
        for read in plan.reads:
            first, count, shift, _ = by_segment[read.window, read.final]
            sources = [read.source_in(storage) for storage in self._shards]
            code = row_code(owner, first)
            on_gpu = target.type == "cuda"
            words.append(
                gather_segments(
                    sources,
                    code.to(target) if on_gpu else code,
                    count.to(target) if on_gpu else count,
                    shift.to(target) if on_gpu else shift,
                    read.window.length,
                    fill=read.fill if read.fill is None or not on_gpu else read.fill.to(target),
                    backend=backend,
                )
            )
        self.bytes_received += received.nbytes
        if target.type == "cuda":
            torch.cuda.current_stream(target).synchronize()
        if self.distributed:
            dist.barrier(self.group)  # no shard may be overwritten while a peer still reads it
        return self._batch(selection, plan, bounds, words, target)

    def _count_stale_here(self, handles: Tensor) -> int:
        if self.scope == "local" or self.world == 1:
            return self.table.count_stale(handles)
        every = self._gather_tensor(handles)
        here = every[(every >> _SHARD_SHIFT) == self.rank]
        return self.table.count_stale(here)

    def _choose_exchange(self, wish: str, facts: Sequence[Mapping[str, Any]]) -> str:
        if wish not in ("auto", "all_to_all", "mapped"):
            raise ValueError(f"exchange must be 'auto', 'all_to_all' or 'mapped', got {wish!r}")
        same_host = len({fact["host"] for fact in facts}) == 1
        shared = all(fact["fd"] is not None for fact in facts)
        possible = same_host and shared and self.world <= 8
        if wish == "mapped" and not possible:
            raise ValueError(
                f"exchange='mapped' needs at most 8 processes of one host whose tables are shared=True; here "
                f"{self.world} processes, one host: {same_host}, shared: {shared}"
            )
        if wish == "auto":
            return "mapped" if possible and self.world > 1 else "all_to_all"
        return wish

    def _map_shards(self, facts: Sequence[Mapping[str, Any]]) -> list[list[Tensor]]:
        from tiered_memory import PinnedArena

        shards = []
        widths = [words.shape[1] for words in self.table.storage]
        for process, fact in enumerate(facts):
            if process == self.rank:
                shards.append(list(self.table.storage))
                continue
            descriptor = os.open(f"/proc/{fact['pid']}/fd/{fact['fd']}", os.O_RDWR)
            try:
                arena = PinnedArena.attach(descriptor, pinned=self.table.arena.pinned or False)
            finally:
                os.close(descriptor)
            shards.append([arena.empty((fact["rows"], width), torch.int64) for width in widths])
        if self.distributed:
            dist.barrier(self.group)
        return shards

    def _reduce(self, tensor: Tensor) -> Tensor:
        if not self.distributed or self.world == 1:
            return tensor
        there = tensor.to(self._comm)
        dist.all_reduce(there, group=self.group)
        return there.cpu()

    def _gather_tensor(self, tensor: Tensor) -> Tensor:
        if not self.distributed or self.world == 1:
            return tensor[None]
        there = tensor.contiguous().to(self._comm)
        out = [torch.empty_like(there) for _ in range(self.world)]
        dist.all_gather(out, there, group=self.group)
        return torch.stack(out).cpu()

    def _gather_floats(self, values: list[float]) -> np.ndarray:
        return self._gather_tensor(torch.tensor(values, dtype=torch.float64)).numpy()

    def _gather_objects(self, value: dict[str, Any]) -> list[dict[str, Any]]:
        if not self.distributed or self.world == 1:
            return [value]
        out: list[Any] = [None] * self.world
        dist.all_gather_object(out, value, group=self.group)
        return out

    def _all_to_all(self, rows: Tensor, counts: Tensor) -> tuple[Tensor, Tensor]:
        """Send ``counts[p]`` rows of int64 [N, K] to each process p; what arrives, and how much from each."""
        if not self.distributed or self.world == 1:
            return rows, counts
        sizes = torch.empty_like(counts, device=self._comm)
        dist.all_to_all_single(sizes, counts.to(self._comm), group=self.group)
        sizes = sizes.cpu()
        out = torch.empty((int(sizes.sum()), rows.shape[1]), dtype=rows.dtype, device=self._comm)
        dist.all_to_all_single(
            out,
            rows.contiguous().to(self._comm),
            sizes.tolist(),
            counts.tolist(),
            group=self.group,
        )
        return out.cpu(), sizes


def _comm_device(group: Any) -> torch.device:
    if dist.get_backend(group) == "nccl":
        return torch.device("cuda", torch.cuda.current_device())
    return torch.device("cpu")


def _check_schemas(facts: Sequence[Mapping[str, Any]]) -> None:
    first = TableSpec.from_json(facts[0]["spec"])
    for rank, fact in enumerate(facts):
        if fact["fingerprint"] != facts[0]["fingerprint"]:
            other = TableSpec.from_json(fact["spec"])
            ours, theirs = _described(first), _described(other)
            columns = sorted(
                name for name in ours.keys() | theirs.keys() if ours.get(name) != theirs.get(name)
            )
            raise ValueError(
                f"table schema differs between ranks: rank 0 and rank {rank} disagree on {', '.join(columns)}"
            )
        if fact["dp_size"] != facts[0]["dp_size"]:
            raise ValueError(
                f"dp_size differs between ranks: 0 has {facts[0]['dp_size']}, {rank} has {fact['dp_size']}"
            )


def _described(spec: TableSpec) -> dict[str, str]:
    return {
        column.name: f"{DTYPE_NAMES[column.dtype]} {column.shape} {column.final} {column.group}"
        for column in spec.all_columns
    } | {derived.name: str(derived.to_dict()) for derived in spec.derived}
