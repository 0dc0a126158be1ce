"""The disk tier: a saved table whose rows stay in its files and are read past the page cache."""

from __future__ import annotations

import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import torch
from torch import Tensor

from rl_replay_gear import loops
from rl_replay_gear.batch import TrajectoryBatch
from rl_replay_gear.collect import Backend, Read, Windows, assemble_batch, fill_plan
from rl_replay_gear.randomness import Generator
from rl_replay_gear.selection import Selection
from rl_replay_gear.selectors import Selector
from rl_replay_gear.storage_format import load_table, row_files
from rl_replay_gear.table import Anchor, TrajectoryTable


class ColdTable:
    """Trajectories that no memory holds: what ``save_table`` wrote, read window by window with O_DIRECT.

    A ``TrajectoryLoader`` reads it like any table. Only the index (some 100 B a trajectory) is in memory;
    rows cannot be written. ``promote`` copies trajectories that have become hot into a table in memory.

    Args:
        path: Folder of a saved table.
        threads: Reads under way at once; disks need several to reach their rate.
        cached: Use the page cache for bytes it already holds.

    Raises:
        ValueError: as ``load_table``. Sizes are verified, checksums of rows are not.
    """

    def __init__(self, path: str | os.PathLike[str], *, threads: int = 8, cached: bool = False) -> None:
        from tiered_memory import DirectReader

        if threads < 1:
            raise ValueError(f"threads must be at least 1, got {threads}")
        self.table: TrajectoryTable = load_table(path, memory="host", mmap=True)
        self._readers = [DirectReader(file, mode="auto" if cached else "always") for file in row_files(path)]
        self._pool = ThreadPoolExecutor(threads, thread_name_prefix="cold-table")
        self.bytes_read = 0

    @property
    def spec(self) -> Any:
        """Schema and capacity."""
        return self.table.spec

    def __len__(self) -> int:
        return len(self.table)

    def handles(self) -> Tensor:
        """int64 [len], oldest first."""
        return self.table.handles()

    def attach(self, selector: Selector) -> None:
        """See ``TrajectoryTable.attach``."""
        self.table.attach(selector)

    def count_stale(self, handles: Tensor) -> int:
        """See ``TrajectoryTable.count_stale``."""
        return self.table.count_stale(handles)

    def select(
        self,
        selector: Selector,
        batch_size: int,
        *,
        anchor: Anchor = "uniform",
        generator: Generator | None = None,
    ) -> Selection:
        """See ``TrajectoryTable.select``."""
        return self.table.select(selector, batch_size, anchor=anchor, generator=generator)

    def update_priorities(self, handles: Any, priorities: Any, *, strict: bool = False) -> int:
        """See ``TrajectoryTable.update_priorities``; kept in memory, not written back."""
        return self.table.update_priorities(handles, priorities, strict=strict)

    def collect(
        self,
        selection: Selection,
        windows: Windows,
        *,
        columns: Sequence[str] | None = None,
        device: torch.device | str | None = None,
        backend: Backend = "auto",
        out: Sequence[Tensor] | None = None,
    ) -> TrajectoryBatch:
        """Read the windows of a selection. See ``TrajectoryTable.collect``.

        Raises:
            RuntimeError: a handle is stale.
            OSError: a read failed, or a file has been cut.
        """
        del backend, out  # there is one way, into new memory
        slots, stale = self.table.index.locate(selection.handles.numpy())
        if stale:
            raise RuntimeError(f"{stale} of {len(slots)} handles are stale: select again")
        plan = self.table.plan(windows, columns)
        bounds = torch.empty((len(plan.segments), 4, len(slots)), dtype=torch.int64)
        fill_plan(plan, self.table.index, slots, selection.anchors.numpy(), bounds)
        words = [self._read(read, bounds[read.segment]) for read in plan.reads]
        batch = assemble_batch(plan, list(bounds.unbind()), words, selection)
        return batch if device is None else batch.to(device)

    def promote(self, handles: Any, into: TrajectoryTable) -> Tensor:
        """Copy trajectories into a table in memory; their handles there, int64 [m]."""
        new = []
        for handle in torch.as_tensor(handles, dtype=torch.int64).tolist():
            given = self.read(handle)
            new.append(into.write({column.name: given[column.name] for column in into.spec.columns}))
        return torch.tensor(new, dtype=torch.int64)

    def read(self, handle: int) -> dict[str, Tensor]:
        """A whole trajectory; KeyError for a stale handle. See ``TrajectoryTable.read``."""
        return self.table.read(handle)

    def close(self) -> None:
        """Close the files."""
        self._pool.shutdown()
        for reader in self._readers:
            reader.close()

    def __enter__(self) -> ColdTable:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _read(self, read: Read, bounds: Tensor) -> Tensor:
        """One read of a batch: int64 [B, L, W], a file access for each window."""
        first, count, shift, _ = bounds.numpy()
        length, width = read.window.length, read.source.shape[1]
        out = torch.empty((len(first), length, width), dtype=torch.int64)
        reader = self._readers[read.group]
        row_words = self.table.storage[read.group].shape[1]

        def window(b: int) -> int:
            place = out[b, shift[b] : shift[b] + count[b]]
            # Rows lie whole in the file: what is not asked for is read with the rest and dropped.
            rows = place if width == row_words else torch.empty((int(count[b]), row_words), dtype=torch.int64)
            reader.read_into(rows, int(first[b]) * row_words * 8)
            if rows is not place:
                place.copy_(rows[:, read.first_word : read.first_word + width])
            return rows.nbytes

        self.bytes_read += sum(self._pool.map(window, np.flatnonzero(count).tolist()))
        loops.fill_padding(out.numpy(), count, shift, read.fill_words)
        return out
