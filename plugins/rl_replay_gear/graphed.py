"""Collection replayed from a CUDA graph: for small batches, where launching costs more than copying."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from rl_replay_gear.batch import TrajectoryBatch
from rl_replay_gear.collect import Windows, assemble_batch, fill_plan, gather_on_gpu
from rl_replay_gear.selection import Selection
from rl_replay_gear.table import TrajectoryTable


class GraphedCollect:
    """``collect`` of batches of one size from pinned or device memory, without its host work.

    A call is one transfer of segments and one launch, however many columns, windows and masks there are:
    masks and timesteps come with the rows. Calls take turns over ``buffers`` sets of memory: a batch is valid
    until as many later calls. It has the bits that ``table.collect`` gives.

    Args:
        table: A table in pinned or device memory.
        windows, columns: As in ``TrajectoryTable.collect``.
        batch_size: B of every selection.
        device: Where batches are wanted.
        buffers: Sets of memory.

    Raises:
        ValueError: rows in pageable memory, which no kernel can read; or a selection of another size.
        RuntimeError: a trajectory was evicted after it was selected.
    """

    def __init__(
        self,
        table: TrajectoryTable,
        windows: Windows,
        batch_size: int,
        *,
        columns: Sequence[str] | None = None,
        device: torch.device | str = "cuda",
        buffers: int = 2,
    ) -> None:
        if buffers < 1 or batch_size < 1:
            raise ValueError(f"buffers={buffers} and batch_size={batch_size} must be at least 1")
        self.table, self.batch_size = table, batch_size
        self.plan = table.plan(windows, columns)
        if not all(read.source.is_cuda or read.pinned for read in self.plan.reads):
            raise ValueError("a graph reads rows in pinned or device memory; this table has rows elsewhere")
        self.device = torch.device(device)
        self._sets = [self._captured() for _ in range(buffers)]
        self._calls = 0

    def __call__(self, selection: Selection) -> TrajectoryBatch:
        """The batch of a selection, on ``device``."""
        if len(selection) != self.batch_size:
            raise ValueError(f"this graph takes selections of {self.batch_size}, got {len(selection)}")
        turn = self._sets[self._calls % len(self._sets)]
        with self.table.lock:
            slots, stale = self.table.index.locate(selection.handles.numpy())
            if stale:
                raise RuntimeError(f"{stale} of {len(slots)} handles are stale: select again")
            self._calls += 1
            turn.sent.synchronize()  # its last transfer may still read `host`
            fill_plan(self.plan, self.table.index, slots, selection.anchors.numpy(), turn.host)
            turn.there.copy_(turn.host, non_blocking=True)
            turn.sent.record()
            turn.graph.replay()
            self.table.note_reading()
        return turn.batch.refilled(selection)

    def _captured(self) -> _Set:
        shape = (len(self.plan.segments), 4, self.batch_size)
        host = torch.zeros(shape, dtype=torch.int64, pin_memory=True)
        there = host.to(self.device)
        bounds = there.unbind()
        nobody = torch.zeros(self.batch_size, dtype=torch.int64)

        def collect(out: Sequence[Tensor] | None) -> TrajectoryBatch:
            words = [
                gather_on_gpu(
                    read, [read.source], bounds[read.segment], backend="auto",
                    out=None if out is None else out[position],
                )
                for position, read in enumerate(self.plan.reads)
            ]  # fmt: skip
            selection = Selection(nobody, nobody, nobody.double())
            batch = assemble_batch(self.plan, bounds, words, selection, counts=[part[1] for part in host])
            for name in batch:  # masks and timesteps are made when they are read: read them here
                batch[name], batch.mask[name], batch.timesteps[name]
            return batch

        first = collect(None)  # also compiles the kernels and copies the padding, which no graph may do
        graph = torch.cuda.CUDAGraph()
        torch.cuda.synchronize(self.device)
        with torch.cuda.graph(graph):
            batch = collect(first.buffers)
        return _Set(host, there, batch, graph, torch.cuda.Event())


@dataclass(frozen=True)
class _Set:
    """Memory of one turn: segments on both sides, the batch that the graph fills, the last transfer's end."""

    host: Tensor
    there: Tensor
    batch: TrajectoryBatch
    graph: torch.cuda.CUDAGraph
    sent: torch.cuda.Event
