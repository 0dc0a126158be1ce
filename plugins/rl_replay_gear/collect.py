"""From a selection to a batch: plan the reads once, then one gather a row group and window."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Literal

import numpy as np
import torch
from torch import Tensor

from rl_replay_gear import loops
from rl_replay_gear.batch import Part, Segments, TrajectoryBatch
from rl_replay_gear.memory import WORD, BufferPool
from rl_replay_gear.selection import Selection
from rl_replay_gear.spec import ROW_ALIGNMENT, Field, RowGroup
from rl_replay_gear.window import Window

if TYPE_CHECKING:
    from rl_replay_gear.index import SlotIndex

Backend = Literal["auto", "torch", "triton"]
Windows = Window | Mapping[str, Window]


@dataclass(frozen=True)
class Read:
    """One gather: the words ``source`` [rows, W] of a row group under one window."""

    source: Tensor
    fill: Tensor | None
    window: Window
    final: bool
    fields: tuple[Field, ...]  # offsets relative to the first byte read
    group: int
    first_word: int
    segment: int  # position in the plan's segments

    @property
    def row_bytes(self) -> int:
        """Bytes read of each row."""
        return self.source.shape[1] * WORD

    @cached_property
    def pinned(self) -> bool:
        """Whether kernels may read the source in host memory."""
        return not self.source.is_cuda and self.source.is_pinned()

    @cached_property
    def fill_words(self) -> np.ndarray:
        """``fill`` as int64 [W], zeros if it is None."""
        return np.zeros(self.source.shape[1], np.int64) if self.fill is None else self.fill.numpy()

    @cached_property
    def _fills(self) -> dict[torch.device, Tensor]:
        return {}

    def fill_on(self, device: torch.device) -> Tensor | None:
        """``fill`` on a device, copied there once."""
        if self.fill is None or self.fill.device == device:
            return self.fill
        if device not in self._fills:
            self._fills[device] = self.fill.to(device)
        return self._fills[device]

    def source_in(self, storage: Sequence[Tensor]) -> Tensor:
        """The same words of another shard's row groups."""
        return storage[self.group][:, self.first_word : self.first_word + self.source.shape[1]]


@dataclass(frozen=True)
class ReadPlan:
    """All reads of a subscription, and the distinct (window, final) pairs whose segments they use."""

    reads: tuple[Read, ...]
    segments: tuple[tuple[Window, bool], ...]
    order: tuple[str, ...]


def plan_reads(
    groups: Sequence[RowGroup], storage: Sequence[Tensor], windows: Mapping[str, Window]
) -> ReadPlan:
    """Group the subscribed columns by row group and window; read only the bytes they span."""
    reads: list[Read] = []
    segments: dict[tuple[Window, bool], int] = {}
    for number, (group, words) in enumerate(zip(groups, storage, strict=True)):
        by_window: dict[Window, list[Field]] = {}
        for field in group.fields:
            if field.column.name in windows:
                by_window.setdefault(windows[field.column.name], []).append(field)
        fill_row = group.fill_row().view(torch.int64)
        for window, fields in by_window.items():
            low = min(field.offset for field in fields) // ROW_ALIGNMENT * ROW_ALIGNMENT
            high = -(-max(field.stop for field in fields) // ROW_ALIGNMENT) * ROW_ALIGNMENT
            fill = fill_row[low // WORD : high // WORD].clone()
            reads.append(
                Read(
                    words[:, low // WORD : high // WORD],
                    fill if bool(fill.any()) else None,
                    window,
                    group.final,
                    tuple(Field(field.column, field.offset - low) for field in fields),
                    number,
                    low // WORD,
                    segments.setdefault((window, group.final), len(segments)),
                )
            )
    return ReadPlan(tuple(reads), tuple(segments), tuple(windows))


def collect_batch(
    plan: ReadPlan,
    index: SlotIndex,
    slots: np.ndarray,
    selection: Selection,
    *,
    device: torch.device,
    backend: Backend,
    pool: BufferPool,
    out: Sequence[Tensor] | None = None,
) -> TrajectoryBatch:
    """Gather the windows of live ``slots`` into a batch on ``device``.

    ``out``: one int64 tensor [B, L, W] a read, in the order of ``plan.reads``, to be filled instead of those
    of ``pool`` (on the CPU) or new ones.
    """
    # One transfer, however many windows there are.
    shape = (len(plan.segments), 4, len(slots))
    near = torch.empty(shape, dtype=torch.int64, pin_memory=device.type == "cuda")
    fill_plan(plan, index, slots, selection.anchors.numpy(), near)
    hosts = near.unbind()
    theirs = hosts if device.type == "cpu" else near.to(device, non_blocking=True).unbind()
    segments = [
        Segments(bounds, window.length) for bounds, (window, _) in zip(theirs, plan.segments, strict=True)
    ]
    buffers: list[Tensor] = []
    for position, read in enumerate(plan.reads):
        into = None if out is None else out[position]
        if into is None and device.type == "cpu":
            into = pool.empty(len(slots), read.window.length, read.source.shape[1])
        which = read.segment
        buffers.append(
            gather_windows(read, hosts[which], segments[which], device=device, backend=backend, out=into)
        )
    return assemble_batch(plan, segments, buffers, selection, counts=[host[1] for host in hosts])


def assemble_batch(
    plan: ReadPlan,
    segments: Sequence[Segments | Tensor],
    words: Sequence[Tensor],
    selection: Selection,
    *,
    counts: Sequence[Tensor] | None = None,
) -> TrajectoryBatch:
    """The batch of gathered ``words``, one a read, and of the segments (or their bounds) of the plan.

    ``counts``: steps of each window, one tensor a plan segment, where they are nearer than in ``segments``.
    """
    of = [
        part if isinstance(part, Segments) else Segments(part, window.length)
        for (window, _), part in zip(plan.segments, segments, strict=True)
    ]
    near = [part.bounds[1] for part in of] if counts is None else counts
    parts: dict[str, Part] = {}
    row_counts = []
    for read, tensor in zip(plan.reads, words, strict=True):
        row_counts.append((near[read.segment], read.row_bytes))
        for field in read.fields:
            parts[field.column.name] = Part(tensor, field.offset, field.column, of[read.segment])
    if len(plan.order) > 1:
        parts = {name: parts[name] for name in plan.order}
    return TrajectoryBatch(parts, selection, row_counts, words)


def fill_plan(plan: ReadPlan, index: SlotIndex, slots: np.ndarray, anchors: np.ndarray, out: Tensor) -> None:
    """The segments of each slot's windows into ``out``, int64 [plan segments, 4, B] on the CPU.

    A segment is the first row, the number of rows, their position in the window, and the first step.
    """
    for bounds, (window, final) in zip(out.numpy(), plan.segments, strict=True):
        loops.window_segments(
            slots,
            anchors,
            index.start,
            index.length,
            int(final),
            window.offset,
            window.length,
            window.pad_code,
            bounds,
        )


def gather_windows(
    read: Read,
    host: Tensor,
    segments: Segments,
    *,
    device: torch.device,
    backend: Backend,
    out: Tensor | None,
) -> Tensor:
    """One read of a batch: int64 [B, L, W] on ``device``.

    Args:
        host: Segments int64 [4, B] on the CPU; ``segments`` holds the same on ``device``.
        out: Where the rows go; allocated when absent.
    """
    if device.type == "cpu" and not read.source.is_cuda:
        return _gather_on_cpu(read, host, backend, out)
    if device.type == "cuda" and (read.source.is_cuda or (backend != "torch" and read.pinned)):
        return gather_on_gpu(read, [read.source], segments.bounds, backend=backend, out=out)
    if read.source.is_cuda:  # a device table read for the CPU: gather there, copy the batch
        words = gather_on_gpu(read, [read.source], host.to(read.source.device), backend=backend)
        return words.cpu() if out is None else out.copy_(words)
    shape = (host.shape[1], read.window.length, read.source.shape[1])
    staged = torch.empty(shape, dtype=torch.int64, pin_memory=True)
    _gather_on_cpu(read, host, "torch", staged)
    return staged.to(device, non_blocking=True) if out is None else out.copy_(staged, non_blocking=True)


def gather_on_gpu(
    read: Read, sources: Sequence[Tensor], bounds: Tensor, *, backend: Backend, out: Tensor | None = None
) -> Tensor:
    """Windows on the device of ``bounds``, int64 [4, B]; ``bounds[0]`` are row codes of ``sources``."""
    first, count, shift, _ = bounds.unbind()
    length, width, device = read.window.length, read.source.shape[1], bounds.device
    fill = read.fill_on(device)
    from tiered_memory import gather_segments, kernels, peer_access

    in_reach = all(
        source.device == device or not source.is_cuda or peer_access(device.index, source.device.index)
        for source in sources
    )
    if backend == "torch" or not in_reach or len(first) == 0:
        return gather_segments(sources, first, count, shift, length, fill=fill, out=out, backend=backend)
    if out is None:
        out = torch.empty((len(first), length, width), dtype=torch.int64, device=device)
    # Rows, offsets and segments were checked when they were made: straight to the kernel, which for a batch
    # of a megabyte takes less time than checking again.
    kernels.gather_segments(
        list(sources),
        first,
        count,
        shift,
        length,
        fill if fill is None else fill[None],
        out.view(-1, width),
        skipped=[],
        unit_bytes=ROW_ALIGNMENT,
    )
    return out


def _gather_on_cpu(read: Read, host: Tensor, backend: Backend, out: Tensor | None) -> Tensor:
    """Windows of whole rows are single runs of memory: one wide row each of an overlapping view.

    A run that begins ``shift`` rows early brings every step to its place; what it brings besides is padding
    and is overwritten.
    """
    source, length = read.source, read.window.length
    rows, width = source.shape
    first, count, shift, _ = host.numpy()
    begin = np.empty(len(first), np.int64)
    low, high = loops.run_starts(first, shift, begin)
    if backend == "triton" or source.stride(0) != width or low < 0 or high > rows - length:
        from tiered_memory import gather_segments

        return gather_segments(
            source, host[0], host[1], host[2], length, fill=read.fill, out=out, backend=backend
        )
    if out is None:
        out = torch.empty((len(first), length, width), dtype=torch.int64)
    runs = source.as_strided((rows - length + 1, length * width), (width, 1))
    torch.index_select(runs, 0, torch.from_numpy(begin), out=out.view(len(first), length * width))
    loops.fill_padding(out.numpy(), count, shift, read.fill_words)
    return out
