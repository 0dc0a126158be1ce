"""What a learner receives: padded windows, their masks and timesteps, each made when it is read."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from rl_replay_gear.selection import Selection
from rl_replay_gear.spec import ColumnSpec


@dataclass(frozen=True)
class Segments:
    """The windows of one read: ``bounds`` int64 [4, B] (first row, count, shift, first step) and L."""

    bounds: Tensor
    length: int

    def mask(self) -> Tensor:
        """bool [B, L], True where a position holds a step."""
        return self._inside(self._positions())

    def timesteps(self) -> Tensor:
        """int64 [B, L], the step's number in its trajectory, 0 where padded."""
        positions = self._positions()
        return (positions + (self.bounds[3] - self.bounds[2])[:, None]) * self._inside(positions)

    def _positions(self) -> Tensor:
        return torch.arange(self.length, device=self.bounds.device)

    def _inside(self, positions: Tensor) -> Tensor:
        # Compared before they are shifted: nothing of eight bytes a position is written.
        begin = self.bounds[2, :, None]
        return (positions >= begin) & (positions < begin + self.bounds[1, :, None])


@dataclass(frozen=True)
class Part:
    """A column inside gathered rows: ``words`` int64 [B, L, W], the column from byte ``offset`` on."""

    words: Tensor
    offset: int
    column: ColumnSpec
    segments: Segments

    def tensor(self) -> Tensor:
        """The column as [B, L, *shape], a view."""
        dtype, shape = self.column.dtype, self.column.shape
        typed = self.words.view(torch.uint8 if dtype is torch.bool else dtype)
        start = self.offset // dtype.itemsize
        width = self.column.nbytes // dtype.itemsize
        view = typed[..., start] if shape == () else typed[..., start : start + width]
        if len(shape) > 1:
            view = view.unflatten(-1, shape)
        return view.view(torch.bool) if dtype is torch.bool else view


class _PerColumn(Mapping[str, Tensor]):
    """Tensors by column name, made on first use; columns of one window share theirs."""

    def __init__(self, parts: Mapping[str, Part], make: Callable[[Segments], Tensor]) -> None:
        self._parts, self._make = parts, make
        self._made: dict[int, Tensor] = {}

    def __getitem__(self, name: str) -> Tensor:
        segments = self._parts[name].segments
        if id(segments) not in self._made:
            self._made[id(segments)] = self._make(segments)
        return self._made[id(segments)]

    def __iter__(self) -> Iterator[str]:
        return iter(self._parts)

    def __len__(self) -> int:
        return len(self._parts)


class TrajectoryBatch(Mapping[str, Tensor]):
    """Windows of one selection.

    ``batch[name]`` is [B, L, *shape] (a view into gathered rows, so not always contiguous);
    ``batch.mask[name]`` bool [B, L]; ``batch.timesteps[name]`` int64 [B, L], 0 where padded.

    Attributes:
        handles, anchors: int64 [B] on the CPU, as selected.
        probability: float64 [B] on the CPU.
        buffers: The gathered rows, one int64 [B, L, W] a read; ``collect(out=...)`` fills them again.
    """

    def __init__(
        self,
        parts: Mapping[str, Part],
        selection: Selection,
        row_counts: Sequence[tuple[Tensor, int]],
        buffers: Sequence[Tensor] = (),
    ) -> None:
        self.parts = parts
        self.selection = selection
        self.handles, self.anchors = selection.handles, selection.anchors
        self.probability = selection.probability
        self._row_counts = row_counts
        self.buffers = tuple(buffers)
        self._weight = selection.weight
        self._views: dict[str, Tensor] = {}
        self.mask: Mapping[str, Tensor] = _PerColumn(parts, Segments.mask)
        self.timesteps: Mapping[str, Tensor] = _PerColumn(parts, Segments.timesteps)

    def __getitem__(self, name: str) -> Tensor:
        if name not in self._views:
            self._views[name] = self.parts[name].tensor()
        return self._views[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self.parts)

    def __len__(self) -> int:
        return len(self.parts)

    @property
    def columns(self) -> tuple[str, ...]:
        """Names of the columns."""
        return tuple(self.parts)

    @property
    def batch_size(self) -> int:
        """B."""
        return len(self.handles)

    @property
    def device(self) -> torch.device:
        """Where the columns lie."""
        return next(iter(self.parts.values())).words.device

    @property
    def bytes_read(self) -> int:
        """Bytes of rows this batch read from the table's memory (or memories, when it is sharded)."""
        return sum(int(count.sum()) * row_bytes for count, row_bytes in self._row_counts)

    @property
    def weight(self) -> Tensor:
        """Importance weights float32 [B] on the batch's device; ones unless the selector is weighted."""
        if self._weight is None:
            self._weight = torch.ones(len(self.handles))
        if self._weight.device != self.device:
            self._weight = self._weight.to(self.device, non_blocking=True)
        return self._weight

    def refilled(self, selection: Selection) -> TrajectoryBatch:
        """The batch that ``selection`` has left in this one's memory; views, masks and timesteps made so far
        are kept.
        """
        batch = TrajectoryBatch(self.parts, selection, self._row_counts, self.buffers)
        batch._views, batch.mask, batch.timesteps = self._views, self.mask, self.timesteps
        return batch

    def to(self, device: torch.device | str) -> TrajectoryBatch:
        """The same batch on another device; gathered rows move once, not once a column."""
        moved_words: dict[int, Tensor] = {}
        moved_segments: dict[int, Segments] = {}
        parts = {}
        for name, part in self.parts.items():
            words, segments = id(part.words), id(part.segments)
            if words not in moved_words:
                moved_words[words] = part.words.to(device, non_blocking=True)
            if segments not in moved_segments:
                bounds = part.segments.bounds.to(device, non_blocking=True)
                moved_segments[segments] = Segments(bounds, part.segments.length)
            parts[name] = Part(moved_words[words], part.offset, part.column, moved_segments[segments])
        return TrajectoryBatch(parts, self.selection, self._row_counts)

    def to_tensordict(self) -> Any:
        """A TensorDict of batch size [B] with the columns, ``mask``, ``timesteps``, ``handle`` and
        ``weight``.

        A column ``"next.reward"`` becomes the nested key ``("next", "reward")``. Where columns have different
        windows, ``mask`` and ``timesteps`` are those of the first column.
        """
        try:
            from tensordict import TensorDict
        except ImportError as error:
            raise ImportError('to_tensordict needs tensordict: pip install "graft-plugins[rl]"') from error
        first = next(iter(self.parts))
        entries: dict[Any, Tensor] = {tuple(name.split(".")): self[name] for name in self}
        entries["mask"], entries["timesteps"] = self.mask[first], self.timesteps[first]
        entries["handle"], entries["weight"] = self.handles.to(self.device), self.weight
        return TensorDict(entries, batch_size=[self.batch_size], device=self.device)
