"""A weighted mixture of tables, one a task."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from rl_replay_gear.batch import TrajectoryBatch
from rl_replay_gear.collect import Windows
from rl_replay_gear.randomness import Generator, uniforms
from rl_replay_gear.selectors import Selector
from rl_replay_gear.table import Anchor, TrajectoryTable


class Mixture:
    """Draws each item's task with probability proportional to its weight, then from that task's table.

    Tasks may have different columns, so a batch is one ``TrajectoryBatch`` a task.

    Args:
        tables: Task name -> table.
        selectors: Task name -> selector.
        weights: Task name -> weight >= 0; a task of weight 0 is never drawn.
    """

    def __init__(
        self,
        tables: Mapping[str, TrajectoryTable],
        selectors: Mapping[str, Selector],
        weights: Mapping[str, float],
    ) -> None:
        if not tables or set(tables) != set(selectors) or set(tables) != set(weights):
            raise ValueError("tables, selectors and weights must name the same tasks, at least one")
        mass = np.array([weights[name] for name in tables], np.float64)
        if not np.isfinite(mass).all() or (mass < 0).any() or not mass.sum() > 0:
            raise ValueError(f"weights must be finite, >= 0 and not all 0, got {dict(weights)}")
        self.tables, self.selectors = dict(tables), dict(selectors)
        self._cumulative = np.cumsum(mass)

    def sample(
        self,
        batch_size: int,
        windows: Mapping[str, Windows],
        *,
        anchor: Anchor = "uniform",
        generator: Generator | None = None,
        **collect_options: Any,
    ) -> dict[str, TrajectoryBatch]:
        """``batch_size`` items over all tasks; tasks that were not drawn are absent."""
        u = uniforms(generator, batch_size) * self._cumulative[-1]
        task = np.searchsorted(self._cumulative, u, side="right")
        out = {}
        for number, name in enumerate(self.tables):
            count = int((task == number).sum())
            if count:
                table = self.tables[name]
                selection = table.select(self.selectors[name], count, anchor=anchor, generator=generator)
                out[name] = table.collect(selection, windows[name], **collect_options)
        return out
