"""Collection replayed from a CUDA graph: for small batches, where launching costs more than copying."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from rl_replay_gear.batch import Segments, TrajectoryBatch
from rl_replay_gear.collect import Windows, assemble_batch, fill_bounds, gather_on_gpu
from rl_replay_gear.selection import Selection
from rl_replay_gear.table import TrajectoryTable


class GraphedCollect:
    """``collect`` of batches of one size from pinned or device memory, without its host work.

    Calls take turns over ``buffers`` sets of memory: a batch is valid until as many later calls. It has the
    bits that ``table.collect`` gives.

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
        host, there, words, graph, done = self._sets[self._calls % len(self._sets)]
        with self.table.lock:
            slots, stale = self.table.index.locate(selection.handles.numpy())
            if stale:
                raise RuntimeError(f"{stale} of {len(slots)} handles are stale: select again")
            self._calls += 1
            done.synchronize()  # the copy from `host` of this set's last turn
            self._fill(host, slots, selection.anchors.numpy())
            there.copy_(host, non_blocking=True)
            done.record()
            graph.replay()
            self.table.note_reading()
        return assemble_batch(self.plan, list(there.unbind()), words, selection, counts=list(host.unbind()))

    def _fill(self, host: Tensor, slots: np.ndarray, anchors: np.ndarray) -> None:
        for bounds, (window, final) in zip(host.numpy(), self.plan.segments, strict=True):
            fill_bounds(self.table.index, slots, anchors, window, final=final, out=bounds)

    def _captured(self) -> tuple[Tensor, Tensor, list[Tensor], torch.cuda.CUDAGraph, torch.cuda.Event]:
        shape = (len(self.plan.segments), 4, self.batch_size)
        host = torch.zeros(shape, dtype=torch.int64, pin_memory=True)
        there = host.to(self.device)
        segments = {
            key: Segments(bounds, key[0].length)
            for key, bounds in zip(self.plan.segments, there.unbind(), strict=True)
        }

        def gather(out: list[Tensor] | None) -> list[Tensor]:
            return [
                gather_on_gpu(
                    read, [read.source], segments[read.window, read.final].bounds, backend="auto",
                    out=None if out is None else out[position],
                )
                for position, read in enumerate(self.plan.reads)
            ]  # fmt: skip

        words = gather(None)  # also compiles the kernels and copies the padding, which no graph may do
        graph = torch.cuda.CUDAGraph()
        torch.cuda.synchronize(self.device)
        with torch.cuda.graph(graph):
            gather(words)
        return host, there, words, graph, torch.cuda.Event()
