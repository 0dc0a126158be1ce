"""How the rows of a batch travel from the shards that hold them to the process that asked."""

from __future__ import annotations

import inspect
import os
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from rl_replay_gear.batch import Segments, TrajectoryBatch
from rl_replay_gear.collect import (
    Backend,
    ReadPlan,
    assemble_batch,
    fill_plan,
    gather_on_gpu,
    gather_windows,
)
from rl_replay_gear.communicator import Communicator
from rl_replay_gear.loops import GENERATION_BITS, SLOT_BITS
from rl_replay_gear.selection import Selection
from rl_replay_gear.table import TrajectoryTable

SHARD_SHIFT = SLOT_BITS + GENERATION_BITS
MAX_MAPPED = 8  # sources of one gather


@dataclass(frozen=True)
class GlobalSelection(Selection):
    """This process's items, and those of every data-parallel rank: int64 [dp_size, B]."""

    all_handles: Tensor | None = None
    all_anchors: Tensor | None = None

    def of(self, dp_rank: int) -> tuple[Tensor, Tensor]:
        """Handles and anchors [B] of a data-parallel rank."""
        assert self.all_handles is not None
        assert self.all_anchors is not None
        return self.all_handles[dp_rank], self.all_anchors[dp_rank]

    def every_handle(self) -> Tensor:
        """Handles [dp_size * B] of all ranks."""
        assert self.all_handles is not None
        return self.all_handles.flatten()


class Exchange(ABC):
    """Brings a process its part of a selection. ``collect`` is collective.

    Args:
        table: This process's shard.
        comm: The processes of all shards.
        dp_ranks, stages: Data-parallel rank and pipeline stage of each process.
    """

    def __init__(
        self, table: TrajectoryTable, comm: Communicator, dp_ranks: Sequence[int], stages: Sequence[int]
    ) -> None:
        self.table, self.comm = table, comm
        self.dp_ranks, self.stages = dp_ranks, stages
        self.bytes_received = 0

    @abstractmethod
    def collect(
        self,
        selection: GlobalSelection,
        plans: Mapping[int, ReadPlan],
        target: torch.device,
        backend: Backend,
    ) -> TrajectoryBatch:
        """This process's batch on ``target``; ``plans`` are the reads of each pipeline stage."""

    def bounds_for(self, selection: GlobalSelection, plan: ReadPlan, process: int) -> list[Tensor]:
        """Segments int64 [4, k] on the CPU, one a plan segment, of what ``process`` asks of this shard."""
        handles, anchors = (
            part.numpy()[self._held(selection, process)] for part in selection.of(self.dp_ranks[process])
        )
        slots, _ = self.table.index.locate(np.ascontiguousarray(handles))
        shape = (len(plan.segments), 4, len(slots))
        bounds = torch.empty(shape, dtype=torch.int64, pin_memory=self.comm.device.type == "cuda")
        fill_plan(plan, self.table.index, slots, np.ascontiguousarray(anchors), bounds)
        return list(bounds.unbind())

    def _held(self, selection: GlobalSelection, process: int) -> np.ndarray:
        handles, _ = selection.of(self.dp_ranks[process])
        return np.flatnonzero((handles.numpy() >> SHARD_SHIFT) == self.comm.rank)

    def _places(self, selection: Selection) -> list[Tensor]:
        """Positions in this process's batch that each process fills, on the CPU."""
        owner = selection.handles >> SHARD_SHIFT
        return [torch.nonzero(owner == process)[:, 0] for process in range(self.comm.size)]

    def _batch(
        self,
        selection: Selection,
        plan: ReadPlan,
        bounds: Sequence[Tensor],
        words: Sequence[Tensor],
        target: torch.device,
    ) -> TrajectoryBatch:
        batch = assemble_batch(plan, bounds, words, selection)
        return batch if batch.device == target else batch.to(target)


class AllToAll(Exchange):
    """Every shard gathers what others ask for and sends it: one ``all_to_all`` a batch.

    With NCCL the rows are gathered by the GPU, from pinned or device memory, and never touch the host.
    """

    def collect(
        self,
        selection: GlobalSelection,
        plans: Mapping[int, ReadPlan],
        target: torch.device,
        backend: Backend,
    ) -> TrajectoryBatch:
        """See ``Exchange.collect``."""
        plan = plans[self.stages[self.comm.rank]]
        asked = [
            (plans[stage], self.bounds_for(selection, plans[stage], process))
            for process, stage in enumerate(self.stages)
        ]
        sent = [_item_words(theirs) * bounds[0].shape[1] for theirs, bounds in asked]
        places = self._places(selection)
        received = [_item_words(plan) * len(where) for where in places]
        outgoing = torch.empty(sum(sent), dtype=torch.int64, device=self.comm.device)
        for message, (theirs, bounds) in zip(outgoing.split(sent), asked, strict=True):
            self._write(message, theirs, bounds, backend)
        incoming = self.comm.exchange(outgoing, sent, received)
        self.bytes_received += incoming.nbytes
        into_bounds, into_words = self._read(plan, incoming.split(received), places, len(selection))
        return self._batch(selection, plan, into_bounds, into_words, target)

    def _write(self, message: Tensor, plan: ReadPlan, bounds: Sequence[Tensor], backend: Backend) -> None:
        """A message is the segments of the plan, then the rows of its reads."""
        items = bounds[0].shape[1]
        if items == 0:
            return
        here: dict[Any, tuple[Tensor, Segments]] = {}
        begin = 0
        for (window, final), host in zip(plan.segments, bounds, strict=True):
            there = message[begin : begin + 4 * items].view(4, items)
            there.copy_(host, non_blocking=True)
            here[window, final] = host, Segments(there, window.length)
            begin += 4 * items
        for read in plan.reads:
            host, segments = here[read.window, read.final]
            shape = (items, read.window.length, read.source.shape[1])
            size = items * shape[1] * shape[2]
            out = message[begin : begin + size].view(shape)
            gather_windows(read, host, segments, device=self.comm.device, backend=backend, out=out)
            begin += size

    def _read(
        self, plan: ReadPlan, messages: Sequence[Tensor], places: Sequence[Tensor], batch: int
    ) -> tuple[list[Tensor], list[Tensor]]:
        device = self.comm.device
        bounds = [torch.empty((4, batch), dtype=torch.int64, device=device) for _ in plan.segments]
        words = [
            torch.empty((batch, read.window.length, read.source.shape[1]), dtype=torch.int64, device=device)
            for read in plan.reads
        ]
        for message, where in zip(messages, places, strict=True):
            at, begin = where.to(device), 0
            for into in bounds:
                into.index_copy_(1, at, message[begin : begin + 4 * len(at)].view(4, -1))
                begin += 4 * len(at)
            for into in words:
                size = len(at) * into.shape[1] * into.shape[2]
                into.index_copy_(0, at, message[begin : begin + size].view(len(at), *into.shape[1:]))
                begin += size
        return bounds, words


class Mapped(Exchange):
    """Every process reads the rows of all shards in place: shared host memory, or a peer GPU's memory.

    Only the segments of a batch are exchanged; one gather then reads up to 8 shards.
    """

    def __init__(
        self,
        table: TrajectoryTable,
        comm: Communicator,
        dp_ranks: Sequence[int],
        stages: Sequence[int],
        shards: Sequence[Sequence[Tensor]],
    ) -> None:
        super().__init__(table, comm, dp_ranks, stages)
        self.shards = shards
        self.on_device = shards[comm.rank][0].is_cuda

    def collect(
        self,
        selection: GlobalSelection,
        plans: Mapping[int, ReadPlan],
        target: torch.device,
        backend: Backend,
    ) -> TrajectoryBatch:
        """See ``Exchange.collect``."""
        plan = plans[self.stages[self.comm.rank]]
        near = self._reader(target)
        if self.on_device:  # what this process has written must be there before a peer reads it
            torch.cuda.synchronize(near)
        bounds = self._exchange_bounds(selection, plan, plans)
        there = [tensor.to(near, non_blocking=True) for tensor in bounds]
        by_segment = dict(zip(plan.segments, there, strict=True))
        owner = (selection.handles >> SHARD_SHIFT).to(near)
        words = [
            self._gather(read, owner, by_segment[read.window, read.final], backend) for read in plan.reads
        ]
        if near.type == "cuda":
            torch.cuda.current_stream(near).synchronize()
        self.comm.barrier()  # no shard may be overwritten while a peer still reads it
        return self._batch(selection, plan, there, words, target)

    def _reader(self, target: torch.device) -> torch.device:
        """What gathers the rows: the GPU where it reaches all of them, else the CPU."""
        if self.on_device:
            return self.shards[self.comm.rank][0].device
        reachable = all(words.is_pinned() for storage in self.shards for words in storage)
        return target if target.type == "cpu" or reachable else torch.device("cpu")

    def _exchange_bounds(
        self, selection: GlobalSelection, plan: ReadPlan, plans: Mapping[int, ReadPlan]
    ) -> list[Tensor]:
        asked = [
            torch.stack(self.bounds_for(selection, plans[stage], process)).flatten()
            for process, stage in enumerate(self.stages)
        ]
        places = self._places(selection)
        received = [4 * len(plan.segments) * len(where) for where in places]
        outgoing = torch.cat(asked).to(self.comm.device)
        incoming = self.comm.exchange(outgoing, [len(part) for part in asked], received).cpu()
        self.bytes_received += incoming.nbytes
        bounds = torch.empty((len(plan.segments), 4, len(selection)), dtype=torch.int64)
        for message, where in zip(incoming.split(received), places, strict=True):
            bounds[:, :, where] = message.view(len(plan.segments), 4, len(where))
        return list(bounds.unbind())

    def _gather(self, read: Any, owner: Tensor, bounds: Tensor, backend: Backend) -> Tensor:
        from tiered_memory import gather_segments, row_code

        sources = [read.source_in(storage) for storage in self.shards]
        code = row_code(owner, bounds[0])
        if bounds.is_cuda:
            coded = torch.cat([code[None], bounds[1:]])
            return gather_on_gpu(read, sources, coded, backend=backend)
        return gather_segments(
            sources, code, bounds[1], bounds[2], read.window.length, fill=read.fill, backend=backend
        )


def _item_words(plan: ReadPlan) -> int:
    rows = sum(read.window.length * read.source.shape[1] for read in plan.reads)
    return 4 * len(plan.segments) + rows


def choose_exchange(wish: str, facts: Sequence[Mapping[str, Any]]) -> str:
    """``"mapped"`` or ``"all_to_all"`` for what all processes said of themselves (``shard_facts``).

    Raises:
        ValueError: an unknown wish, or shards that cannot be mapped although that was asked for.
    """
    if wish not in ("auto", "all_to_all", "mapped"):
        raise ValueError(f"exchange must be 'auto', 'all_to_all' or 'mapped', got {wish!r}")
    obstacles = []
    if len({fact["host"] for fact in facts}) > 1:
        obstacles.append("the processes are on several hosts")
    if not all(fact["shared"] for fact in facts):
        obstacles.append("a table is not shared=True")
    if len({fact["on_device"] for fact in facts}) > 1:
        obstacles.append("some tables are in device memory, others are not")
    if len(facts) > MAX_MAPPED:
        obstacles.append(f"{len(facts)} processes are more than {MAX_MAPPED}")
    if wish == "mapped" and obstacles:
        raise ValueError(f"exchange='mapped' is not possible: {'; '.join(obstacles)}")
    if wish == "auto":
        unwise = len(facts) == 1 or facts[0]["on_device"]
        return "all_to_all" if obstacles or unwise else "mapped"
    return wish


def shard_facts(table: TrajectoryTable, wish: str) -> dict[str, Any]:
    """What other processes need to know of this shard, and to map it unless ``wish`` rules that out."""
    on_device = all(words.is_cuda for words in table.storage)
    facts: dict[str, Any] = {
        "shared": table.shared,
        "on_device": on_device,
        "pid": os.getpid(),
        "fd": None if table.arena is None else table.arena.fd,
        "rows": table.spec.num_rows,
    }
    if table.shared and on_device and wish != "all_to_all":
        from torch.multiprocessing.reductions import reduce_tensor

        torch.cuda.synchronize(table.storage[0].device)
        facts["handles"] = [reduce_tensor(words) for words in table.storage]
        facts["gpu"] = _gpu_name(table.storage[0].device.index)
    return facts


def map_shards(
    table: TrajectoryTable, comm: Communicator, facts: Sequence[Mapping[str, Any]]
) -> list[list[Tensor]]:
    """The row groups of every shard, readable here (collective)."""
    shards = []
    for process, fact in enumerate(facts):
        if process == comm.rank:
            shards.append(list(table.storage))
        elif fact["on_device"]:
            shards.append(_open_device_shard(table, fact))
        else:
            shards.append(_open_host_shard(table, fact))
    comm.barrier()
    return shards


def _gpu_name(number: int) -> str:
    return str(torch.cuda.get_device_properties(number).uuid)


def _open_device_shard(table: TrajectoryTable, fact: Mapping[str, Any]) -> list[Tensor]:
    here = table.storage[0].device
    # The number of a GPU depends on what each process is allowed to see; its UUID does not.
    seen = {_gpu_name(number): number for number in range(torch.cuda.device_count())}
    owner = seen.get(fact["gpu"])
    if owner is None or (owner != here.index and not torch.cuda.can_device_access_peer(here.index, owner)):
        raise RuntimeError(
            f"{here} cannot read the memory of the GPU {fact['gpu']}: every process must see all GPUs of the "
            "host, and they must be peers; use exchange='all_to_all'"
        )
    shard = []
    for rebuild, arguments in fact["handles"]:
        bound = inspect.signature(rebuild).bind(*arguments)
        missing = {"storage_device", "event_sync_required"} - bound.arguments.keys()
        if missing:
            raise RuntimeError(f"this torch shares CUDA tensors without {missing}; use exchange='all_to_all'")
        # Kernels can read only what is opened in their own context. The owner has synchronised.
        bound.arguments |= {"storage_device": here.index, "event_sync_required": False}
        shard.append(rebuild(*bound.args, **bound.kwargs))
    return shard


def _open_host_shard(table: TrajectoryTable, fact: Mapping[str, Any]) -> list[Tensor]:
    from tiered_memory import PinnedArena

    descriptor = os.open(f"/proc/{fact['pid']}/fd/{fact['fd']}", os.O_RDWR)
    try:
        arena = PinnedArena.attach(descriptor, pinned=table.arena.pinned or False)
    finally:
        os.close(descriptor)
    return [arena.empty((fact["rows"], words.shape[1]), torch.int64) for words in table.storage]
