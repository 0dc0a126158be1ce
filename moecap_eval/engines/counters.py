"""Which experts a pass touched, counted on the host for routers that run there.

`device_counters` is the same for devices that run ahead of the host.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from torch import Tensor


@dataclass(frozen=True)
class PassCounts:
    """One pass, on the host.

    ``counts`` is int32 ``[layers, experts]``: unpadded (token, expert) pairs. ``loaded`` is int64
    ``[layers]``: distinct experts including those only padding rows use.
    """

    duration_s: float
    counts: np.ndarray
    loaded: np.ndarray
    distinct_tokens: int


class HostPassCounters:
    """Counts experts and input tokens of each pass and hands them over in order. Passes are never padded.

    Args:
        num_layers: MoE layers observed; 0 for a dense model.
        num_experts: routed experts of a layer.
        top_k: experts per token.
        max_rows: largest number of rows of a pass.
        input_ids: the buffer in which every pass finds its token ids, int32 ``[max_rows]``.
    """

    def __init__(
        self, *, num_layers: int, num_experts: int, top_k: int, max_rows: int, input_ids: Tensor
    ) -> None:
        self._num_layers, self._num_experts, self._max_rows = num_layers, num_experts, max_rows
        self._input_ids = input_ids
        self._rows_seen = [0] * num_layers
        self._active = False
        # Expert id `num_experts` means "no row was written here".
        self._ids = np.full((num_layers, max_rows, max(top_k, 1)), num_experts, np.int32)
        self._offsets = (np.arange(num_layers) * (num_experts + 1))[:, None, None]
        self._start_s = 0.0
        self._finished: list[PassCounts] = []

    def capture(self, slot: int) -> Callable[[Tensor], None]:
        """The function that layer ``slot`` calls with its expert ids, ``[rows, top_k]``."""

        def copy_ids(topk_ids: Tensor) -> None:
            if self._active:
                # A layer may be called in several micro-batches of one pass.
                start = self._rows_seen[slot]
                end = min(start + topk_ids.shape[0], self._max_rows)
                self._ids[slot, start:end] = topk_ids.numpy()[: end - start]
                self._rows_seen[slot] = end

        return copy_ids

    def begin(self) -> None:
        """Forget the last pass and start the clock; expert ids outside a pass (dummy runs) are not kept."""
        self._rows_seen = [0] * self._num_layers
        self._active = True
        self._start_s = time.perf_counter()

    def end(self, rows: int) -> None:
        """Stop the clock and count the pass of ``rows`` rows."""
        seconds = time.perf_counter() - self._start_s
        self._active = False
        for slot, seen in enumerate(self._rows_seen):
            self._ids[slot, seen:rows] = self._num_experts
        bins = self._num_experts + 1
        flat = (self._ids[:, :rows] + self._offsets).ravel()
        counts = np.bincount(flat, minlength=self._num_layers * bins).reshape(self._num_layers, bins)
        counts = counts[:, : self._num_experts].astype(np.int32)
        distinct_tokens = np.unique(self._input_ids[:rows].numpy()).size
        self._finished.append(PassCounts(seconds, counts, (counts > 0).sum(axis=1), distinct_tokens))

    def drain(self) -> list[PassCounts]:
        """Passes that ended since the last call, in order."""
        finished, self._finished = self._finished, []
        return finished
