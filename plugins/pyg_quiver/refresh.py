"""Keep a placement up to date: FAP from the requests that came in, rows moved while others are read."""

from __future__ import annotations

import threading
import warnings
from collections import deque
from collections.abc import Callable, Sequence

from torch import Tensor, cat

from pyg_quiver.feature_store import QuiverFeatureStore
from pyg_quiver.metrics import fap, seed_probability
from pyg_quiver.placement import PlacementPlan
from pyg_quiver.topology import CSCTopology


class PlacementRefresher:
    """Follows the popularity of nodes; a context manager while it runs in the background.

    Args:
        store: the store whose rows move.
        topology: the graph.
        num_neighbors: fan-outs, seeds first.
        plan: makes a plan from hotness ``[N]``, e.g. ``plan_placement`` with everything else bound.
        batch_size: seeds of a batch, in the mean.
        window: requested nodes remembered; older ones are forgotten.
    """

    def __init__(
        self,
        store: QuiverFeatureStore,
        topology: CSCTopology,
        num_neighbors: Sequence[int],
        plan: Callable[[Tensor], PlacementPlan],
        *,
        batch_size: int,
        window: int = 100_000,
    ) -> None:
        if window < 1:
            raise ValueError(f"window is {window}; it must be at least 1")
        self._store = store
        self._topology = topology
        self._num_neighbors = list(num_neighbors)
        self._plan = plan
        self._batch_size = batch_size
        self._window = window
        self._lock = threading.Lock()
        self._requests: deque[Tensor] = deque()
        self._remembered = 0
        self._stop = threading.Event()
        self._thread: threading.Thread | None = None

    def observe(self, node: Tensor) -> None:
        """Remember a request, int64 ``[n]``; callable from any thread."""
        with self._lock:
            self._requests.append(node)
            self._remembered += node.numel()
            while self._remembered - self._requests[0].numel() >= self._window:
                self._remembered -= self._requests.popleft().numel()

    def refresh(self) -> PlacementPlan | None:
        """Plan from the remembered requests and move the rows; None while there are no requests."""
        with self._lock:
            if not self._remembered:
                return None
            log = cat(list(self._requests))
        prior = seed_probability(self._topology.num_nodes, self._batch_size, log)
        plan = self._plan(fap(self._topology, self._num_neighbors, prior, mode="count"))
        self._store.place(plan)
        return plan

    def start(self, interval_s: float) -> None:
        """Refresh every ``interval_s`` seconds in a thread named pyg_quiver-refresh, until :meth:`close`.

        A refresh that fails warns and leaves the placement as it is.
        """
        if self._thread is not None:
            raise RuntimeError("PlacementRefresher runs already")

        def run() -> None:
            while not self._stop.wait(interval_s):
                try:
                    self.refresh()
                except Exception as error:
                    warnings.warn(f"the placement was not refreshed: {error!r}", RuntimeWarning)

        self._thread = threading.Thread(target=run, name="pyg_quiver-refresh", daemon=True)
        self._thread.start()

    def close(self) -> None:
        """End the thread. Idempotent."""
        self._stop.set()
        if self._thread is not None:
            self._thread.join()

    def __enter__(self) -> PlacementRefresher:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
