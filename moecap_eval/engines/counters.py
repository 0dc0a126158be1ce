"""Which experts each pass touched, recorded by the device that routed it.

The last MoE layer of a pass joins the expert ids that all layers handed over, and the pass's token ids, and
appends them to a ring at positions which the device itself advances. Inside a CUDA graph these are four nodes
of the graph, so a replayed pass costs the host two readings of the clock and no operation on a tensor,
whatever the number of layers. Every few hundred passes the ring is copied and counted beside the main stream.
Nothing here knows an engine.
"""

from __future__ import annotations

from bisect import bisect_left, insort
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np
import torch
from torch import Tensor

from moecap_eval.engines.counting import count_passes
from moecap_eval.engines.lanes import CudaLane, HostLane

_CHUNK_PASSES = 256
_RING_BYTES = 1 << 24


@dataclass(frozen=True)
class PassCounts:
    """One pass, on the host.

    ``counts`` is int32 ``[layers, experts]``: unpadded (token, expert) pairs. ``loaded`` is int64
    ``[layers]``: distinct experts including those only padding rows use. ``problem`` says why a pass was not
    recorded whole, None if it was. ``note`` is what the pass was announced with.
    """

    duration_s: float
    counts: np.ndarray
    loaded: np.ndarray
    distinct_tokens: int
    problem: str | None = None
    note: Any = None


class PassCounters:
    """Counts experts and input tokens of each pass on ``device`` and hands them over in order.

    Args:
        num_layers: MoE layers observed; 0 for a dense model.
        num_experts: routed experts of a layer.
        top_k: experts per token.
        input_ids: the buffer in which every pass finds its token ids, ``[largest pass]``.
        device: where the routers run.
        ring_bytes: memory for passes that wait to be counted; one pass of the largest size always fits.
    """

    def __init__(
        self,
        *,
        num_layers: int,
        num_experts: int,
        top_k: int,
        input_ids: Tensor,
        device: torch.device,
        ring_bytes: int = _RING_BYTES,
    ) -> None:
        self._num_layers, self._num_experts = num_layers, num_experts
        self._input_ids, self._max_rows, self._width = input_ids, input_ids.shape[0], max(top_k, 1)
        self._capacity = max(self._max_rows + 1, ring_bytes // (4 * (num_layers + 2) * self._width))
        # Layer by layer the expert ids of a row, then its token id and its number within its pass. What does
        # not fit goes to one row more.
        ring = (num_layers + 2, self._capacity + 1, self._width)
        self._ring = torch.zeros(ring, dtype=torch.int32, device=device)
        # Where the next rows go: moved on by the device, graphs included; the host only sets it back.
        self._origin = torch.arange(self._max_rows, device=device)
        self._positions = self._origin.clone()
        numbers = torch.arange(self._max_rows, dtype=torch.int32, device=device)
        self._row_numbers = numbers[:, None].repeat(1, self._width)
        self._nobody = torch.full_like(self._row_numbers, num_experts)

        # Made once a size: slicing a tensor takes the host as long as an operation on it.
        self._views = lru_cache(maxsize=256)(self._make_views)

        self._kept: list[tuple[int, Tensor]] = []
        self._appended = 0  # rows of the current pass
        self._active = False
        self._graph_sizes: list[int] = []
        self._rows: list[int] = []  # unpadded, of each pass in the ring
        self._notes: list[Any] = []  # of the same passes: whoever drains one gets its note with it
        self._filled = 0  # rows of the ring in use, by the host's account
        self._reckoned = 0  # of these, for the current pass
        self._chunks: list[tuple[list[Any], int]] = []
        self._lane = CudaLane(device) if device.type == "cuda" else HostLane()

    def capture(self, slot: int) -> Callable[[Tensor], None]:
        """The function that layer ``slot`` calls with its expert ids, ``[rows, top_k]``.

        The ids must stay as they are until the last layer has called.
        """

        def keep_ids(topk_ids: Tensor) -> None:
            if self._active or self._lane.is_capturing():
                self._keep(slot, topk_ids)

        return keep_ids

    def _keep(self, slot: int, topk_ids: Tensor) -> None:
        if slot == 0 and self._appended and not self._active:
            self._start_pass()  # the next graph is captured
        self._kept.append((slot, topk_ids))
        if slot == self._num_layers - 1:
            self._append(*self._next_part())
            if not self._active and self._appended not in self._graph_sizes:
                insort(self._graph_sizes, self._appended)

    def _start_pass(self) -> None:
        self._kept.clear()
        self._appended = 0

    def _next_part(self) -> tuple[list[Tensor | None], int]:
        """What each layer handed over first and its rows: a pass may come in several micro-batches."""
        part: list[Tensor | None] = [None] * self._num_layers
        later = []
        for slot, ids in self._kept:
            if part[slot] is None:
                part[slot] = ids
            else:
                later.append((slot, ids))
        self._kept = later
        given = [ids for ids in part if ids is not None and ids.shape[0]]
        if len({ids.data_ptr() for ids in given}) < len(given):
            raise RuntimeError(
                "several MoE layers hand over their expert ids in one buffer, where only the last layer's "
                "are left at the end of a pass: this router cannot be observed"
            )
        return part, max((ids.shape[0] for ids in given), default=0)

    def _append(self, part: Sequence[Tensor | None], rows: int) -> None:
        """Add rows to the ring, in the same few operations for any number of layers."""
        first, last = self._appended, min(self._appended + rows, self._max_rows)
        rows = last - first
        ids = [self._fitted(layer, rows) for layer in part]
        tokens, numbers, positions = self._views(first, last)
        if tokens.dtype != torch.int32:
            tokens = tokens.to(torch.int32)
        joined = torch.cat((*ids, tokens, numbers))
        entries = joined.view(self._num_layers + 2, rows, self._width)
        self._ring.index_copy_(1, positions, entries)
        self._positions.add_(rows).clamp_(max=self._capacity)
        self._appended = last

    def _make_views(self, first: int, last: int) -> tuple[Tensor, Tensor, Tensor]:
        """Token ids and numbers of a pass's rows ``first`` to ``last``, and where they go in the ring."""
        tokens = self._input_ids[first:last, None].expand(-1, self._width)
        return tokens, self._row_numbers[first:last], self._positions[: last - first]

    def _fitted(self, ids: Tensor | None, rows: int) -> Tensor:
        """Int32 ids of exactly ``rows`` rows; those a layer left out name no expert."""
        if ids is None:
            return self._nobody[:rows]
        if ids.dtype != torch.int32:
            ids = ids.to(torch.int32)
        if ids.shape[0] < rows:
            return torch.cat((ids, self._nobody[ids.shape[0] : rows]))
        return ids if ids.shape[0] == rows else ids[:rows]

    def begin(self, rows: int, note: Any = None) -> None:
        """Announce a pass of ``rows`` unpadded rows and start the clock.

        Its ``PassCounts`` carry ``note``. Expert ids outside a pass (dummy runs) are not kept.
        """
        if self._active:
            self.end()  # the pass before raised
        needed = self._padded(rows)
        if len(self._rows) == _CHUNK_PASSES or self._filled + needed > self._capacity - 1:
            self.flush()
        if not self._rows:
            self._positions.copy_(self._origin)  # graphs may have been replayed outside of passes
        self._rows.append(rows)
        self._notes.append(note)
        self._filled += needed
        self._reckoned = needed
        self._start_pass()
        self._active = True
        self._lane.begin()

    def _padded(self, rows: int) -> int:
        place = bisect_left(self._graph_sizes, rows)
        return self._graph_sizes[place] if place < len(self._graph_sizes) else max(rows, 1)

    def end(self) -> None:
        """Stop the clock; without effect if no pass runs."""
        if not self._active:
            return
        self._lane.end()
        self._active = False
        rows = self._rows[-1]
        if not self._num_layers:
            self._append((), rows)
        elif self._kept or not (self._appended or (self._graph_sizes and rows <= self._graph_sizes[-1])):
            # Layers are missing, and no graph stands for them: the pass is known to be a hole.
            part, seen = self._next_part()
            self._append(part, max(seen, 1))
        self._kept.clear()
        self._filled += max(0, self._appended - self._reckoned)

    def flush(self) -> None:
        """Count what is in the ring, beside what the device does next, and begin anew; not within a pass."""
        if self._active or not self._rows:
            return
        rows, filled = self._rows, self._filled
        entries, end = self._ring[:, :filled].clone(), self._positions[:1].clone()
        self._lane.run(lambda: self._count(entries, end, rows), len(rows))
        self._chunks.append((self._notes, filled))
        self._rows, self._notes, self._filled = [], [], 0

    def _count(self, entries: Tensor, end: Tensor, rows: list[int]) -> Tensor:
        used = torch.tensor(rows, dtype=torch.int32, pin_memory=entries.is_cuda)
        return count_passes(entries, end, used.to(entries.device, non_blocking=True), self._num_experts)

    def drain(self) -> list[PassCounts]:
        """Passes since the last call, in order; waits for the device, and closes a pass that raised."""
        self.end()
        self.flush()
        chunks, self._chunks = self._chunks, []
        found: list[PassCounts] = []
        for (notes, filled), (seconds, values) in zip(chunks, self._lane.take(), strict=True):
            passes = len(notes)
            recorded, end = int(values[-2]), int(values[-1])
            pairs = self._num_layers * self._num_experts
            for number, one in enumerate(values[:-2].reshape(passes, -1)):
                found.append(
                    PassCounts(
                        duration_s=seconds[number],
                        counts=one[:pairs].reshape(self._num_layers, self._num_experts),
                        loaded=one[pairs:-1].astype(np.int64),
                        distinct_tokens=int(one[-1]),
                        problem=_problem(number, passes, recorded, end > filled, self._capacity),
                        note=notes[number],
                    )
                )
        return found


def _problem(number: int, announced: int, recorded: int, overflowed: bool, capacity: int) -> str | None:
    """Why pass ``number`` of a chunk is not whole; passes before an overflow are."""
    if overflowed:
        lost = number >= recorded - 1
        return f"the recorder's ring ({capacity} rows) overflowed before this pass's end" if lost else None
    if recorded != announced:
        return f"{recorded} passes were recorded where {announced} ran: which of them is not known"
    return None
