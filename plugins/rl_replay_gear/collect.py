"""From a selection to a batch: plan the reads once, then one gather a row group and window."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

import numpy as np
import torch
from torch import Tensor

from rl_replay_gear import loops
from rl_replay_gear.batch import Part, Segments, TrajectoryBatch
from rl_replay_gear.selection import Selection
from rl_replay_gear.spec import ROW_ALIGNMENT, Field, RowGroup
from rl_replay_gear.window import Window

if TYPE_CHECKING:
    from rl_replay_gear.index import SlotIndex

Backend = Literal["auto", "torch", "triton"]
Windows = Window | Mapping[str, Window]
_WORD = 8  # rows are handled as int64 words


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
    segments: dict[tuple[Window, bool], None] = {}
    for number, (group, words) in enumerate(zip(groups, storage, strict=True)):
        by_window: dict[Window, list[Field]] = {}
        for field in group.fields:
            if field.column.name in windows:
                by_window.setdefault(windows[field.column.name], []).append(field)
        fill_row = group.fill_row().view(torch.int64)
        for window, fields in by_window.items():
            low = min(field.offset for field in fields) // ROW_ALIGNMENT * ROW_ALIGNMENT
            high = -(-max(field.stop for field in fields) // ROW_ALIGNMENT) * ROW_ALIGNMENT
            fill = fill_row[low // _WORD : high // _WORD].clone()
            reads.append(
                Read(
                    words[:, low // _WORD : high // _WORD],
                    fill if bool(fill.any()) else None,
                    window,
                    group.final,
                    tuple(Field(field.column, field.offset - low) for field in fields),
                    number,
                    low // _WORD,
                )
            )
            segments.setdefault((window, group.final))
    return ReadPlan(tuple(reads), tuple(segments), tuple(windows))


def collect_batch(
    plan: ReadPlan,
    index: SlotIndex,
    slots: np.ndarray,
    selection: Selection,
    *,
    device: torch.device,
    backend: Backend,
    out: Sequence[Tensor] | None = None,
) -> TrajectoryBatch:
    """Gather the windows of live ``slots`` into a batch on ``device``.

    ``out``: one int64 tensor [B, L, W] a read, in the order of ``plan.reads``, to be filled instead of new
    ones.
    """
    bounds: dict[tuple[Window, bool], tuple[Tensor, Segments]] = {}
    anchors = selection.anchors.numpy()
    for window, final in plan.segments:
        pinned = device.type == "cuda"
        host = segment_bounds(index, slots, anchors, window, final=final, pinned=pinned)
        there = host if device.type == "cpu" else host.to(device, non_blocking=True)
        bounds[window, final] = host, Segments(there, window.length)
    parts: dict[str, Part] = {}
    buffers: list[Tensor] = []
    bytes_read = 0
    for position, read in enumerate(plan.reads):
        host, segments = bounds[read.window, read.final]
        words = _gather(
            read, host, segments, device=device, backend=backend, out=None if out is None else out[position]
        )
        buffers.append(words)
        bytes_read += int(host[1].sum()) * read.source.shape[1] * _WORD
        for field in read.fields:
            parts[field.column.name] = Part(words, field.offset, field.column, segments)
    if len(plan.order) > 1:
        parts = {name: parts[name] for name in plan.order}
    return TrajectoryBatch(parts, selection, bytes_read, buffers)


def segment_bounds(
    index: SlotIndex,
    slots: np.ndarray,
    anchors: np.ndarray,
    window: Window,
    *,
    final: bool,
    pinned: bool = False,
) -> Tensor:
    """First row, count, shift and first step of each slot's window: int64 [4, B] on the CPU."""
    bounds = torch.empty((4, len(slots)), dtype=torch.int64, pin_memory=pinned)
    loops.window_segments(
        slots,
        anchors,
        index.start,
        index.length,
        int(final),
        window.offset,
        window.length,
        window.pad_code,
        bounds.numpy(),
    )
    return bounds


def _gather(
    read: Read,
    host: Tensor,
    segments: Segments,
    *,
    device: torch.device,
    backend: Backend,
    out: Tensor | None,
) -> Tensor:
    from tiered_memory import gather_segments

    source, fill, length = read.source, read.fill, read.window.length
    on_device = source.is_cuda or (device.type == "cuda" and backend != "torch" and source.is_pinned())
    if on_device and device.type == "cuda":
        first, count, shift, _ = segments.bounds
        fill = fill if fill is None else fill.to(device, non_blocking=True)
        return gather_segments(source, first, count, shift, length, fill=fill, out=out, backend=backend)
    if source.is_cuda:  # a device table read for the CPU: gather there, copy the batch
        bounds = host.to(source.device)
        fill = fill if fill is None else fill.to(source.device)
        words = gather_segments(source, bounds[0], bounds[1], bounds[2], length, fill=fill, backend=backend)
        return words.cpu() if out is None else out.copy_(words)
    if device.type == "cpu":
        return _gather_on_cpu(read, host, backend, out)
    staged = torch.empty((host.shape[1], length, source.shape[1]), dtype=torch.int64, pin_memory=True)
    _gather_on_cpu(read, host, "torch", staged)
    return staged.to(device, non_blocking=True) if out is None else out.copy_(staged, non_blocking=True)


def _gather_on_cpu(read: Read, host: Tensor, backend: Backend, out: Tensor | None) -> Tensor:
    """Windows of whole rows are single runs of memory: one wide row each of an overlapping view.

    A run that begins ``shift`` rows early brings every step to its place; what it brings besides is padding
    and is overwritten.
    """
    from tiered_memory import gather_rows, gather_segments

    source, fill, length = read.source, read.fill, read.window.length
    first, count, shift, _ = host
    rows, width = source.shape
    begin = first - shift
    inside = len(begin) > 0 and rows >= length and int(begin.min()) >= 0 and int(begin.max()) <= rows - length
    if backend == "triton" or source.stride(0) != width or not inside:
        return gather_segments(source, first, count, shift, length, fill=fill, out=out, backend=backend)
    runs = source.as_strided((rows - length + 1, length * width), (width, 1))
    flat = None if out is None else out.view(len(first), length * width)
    words = gather_rows(runs, begin, out=flat, backend=backend).view(len(first), length, width)
    fill_row = np.zeros(width, np.int64) if fill is None else fill.numpy()
    loops.fill_padding(words.numpy(), count.numpy(), shift.numpy(), fill_row)
    return words
