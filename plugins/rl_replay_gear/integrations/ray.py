"""Ray actors as writers: an inbox actor that keeps whole trajectories until the learner drains it."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Mapping
from typing import Any

import torch

from rl_replay_gear.spec import TableSpec
from rl_replay_gear.table import TrajectoryTable, check_priority, check_trajectory

try:
    import ray
except ImportError as error:
    raise ImportError('RayInbox needs Ray: pip install "ray[serve]"') from error


class _Inbox:
    """The actor: a bounded queue of trajectories."""

    def __init__(self, max_trajectories: int) -> None:
        self._queue: deque[tuple[dict[str, Any], float | None]] = deque()
        self._max = max_trajectories

    def put(self, columns: dict[str, Any], priority: float | None) -> bool:
        if len(self._queue) >= self._max:
            return False
        self._queue.append((columns, priority))
        return True

    def take(self) -> list[tuple[dict[str, Any], float | None]]:
        out = list(self._queue)
        self._queue.clear()
        return out


class RayInbox:
    """Receives trajectories from Ray actors on any host.

    Args:
        name: Name of the inbox actor in the cluster; one that exists is joined.
        spec: Schema of the trajectories.
        max_trajectories: A full inbox refuses; the writer waits and tries again.
    """

    def __init__(self, name: str, spec: TableSpec, *, max_trajectories: int = 1024) -> None:
        self.spec = spec
        self._actor = (
            ray.remote(_Inbox).options(name=name, get_if_exists=True, num_cpus=0).remote(max_trajectories)
        )

    def sink(self) -> RaySink:
        """The writing end, to be passed to Ray actors."""
        return RaySink(self.spec, self._actor)

    def drain(self, table: TrajectoryTable) -> int:
        """Write what has arrived into ``table``; returns the number of trajectories."""
        items = ray.get(self._actor.take.remote())
        for columns, priority in items:
            table.write(columns, priority=priority)
        return len(items)


class RaySink:
    """``write`` has the signature of ``TrajectoryTable.write``; a trajectory arrives whole or not at all."""

    def __init__(self, spec: TableSpec, actor: Any) -> None:
        self.spec, self._actor = spec, actor

    def write(
        self, columns: Mapping[str, Any], *, priority: float | None = None, retry_s: float = 0.05
    ) -> None:
        """Send one trajectory, waiting while the inbox is full; raises as ``TrajectoryTable.write`` does."""
        check_priority(priority)
        tensors, _ = check_trajectory(self.spec, columns)
        copies = {name: torch.clone(tensor) for name, tensor in tensors.items()}
        reference = ray.put(copies)
        while not ray.get(self._actor.put.remote(reference, priority)):
            time.sleep(retry_s)
