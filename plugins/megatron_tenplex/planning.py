"""Plans by the digests of both layouts, computed when asked for or ahead while training goes on."""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Literal

from megatron_tenplex.placement import assign_roles
from megatron_tenplex.planner import ReshardPlan, plan_reshard
from megatron_tenplex.ptc import ParallelTensorCollection
from megatron_tenplex.stages import Trace
from megatron_tenplex.topology import Topology

_KEPT_PLANS = 16
_Key = tuple[str, str, tuple[int, ...]]


class Planning:
    """Placements and plans of one job.

    Args:
        placement: ``"optimal"`` or ``"identity"``.
        topology: hosts; None if all workers are on one.
        trace: gets a span ``plan`` for whatever is computed here, in the thread, too.

    Attributes:
        computed: number of plans that were computed.
    """

    def __init__(
        self, placement: Literal["optimal", "identity"], topology: Topology | None, trace: Trace
    ) -> None:
        self.placement, self.topology, self.trace = placement, topology, trace
        self.computed = 0
        self._members: dict[tuple[str, str], tuple[int, ...]] = {}
        self._plans: dict[_Key, Future[ReshardPlan]] = {}
        self._thread: ThreadPoolExecutor | None = None

    def members(self, source: ParallelTensorCollection, target: ParallelTensorCollection) -> tuple[int, ...]:
        """Which worker takes which role of ``target``."""
        if self.placement == "identity":
            return tuple(range(target.world_size))
        key = (source.digest, target.digest)
        if key not in self._members:
            with self.trace.timed("plan"):
                self._members[key] = assign_roles(source, target, topology=self.topology)
            _shrink(self._members)
        return self._members[key]

    def plan(
        self, source: ParallelTensorCollection, target: ParallelTensorCollection, members: Sequence[int]
    ) -> ReshardPlan:
        """The plan, waited for where a thread is at it.

        Raises:
            UncoveredRangeError, ValueError: see :func:`plan_reshard`.
        """
        key = (source.digest, target.digest, tuple(members))
        if key not in self._plans:
            done: Future[ReshardPlan] = Future()
            done.set_result(self._compute(source, target, key))
            self._plans[key] = done
            _shrink(self._plans)
        return self._plans[key].result()

    def plan_ahead(
        self, source: ParallelTensorCollection, target: ParallelTensorCollection, members: Sequence[int]
    ) -> None:
        """Start to compute a plan in a thread unless it is known."""
        key = (source.digest, target.digest, tuple(members))
        if key not in self._plans:
            self._thread = self._thread or ThreadPoolExecutor(1, "tenplex-plan")
            self._plans[key] = self._thread.submit(self._compute, source, target, key)
            _shrink(self._plans)

    def wait(self) -> None:
        """Return when no plan is being computed."""
        for future in list(self._plans.values()):
            future.exception()

    def _compute(
        self, source: ParallelTensorCollection, target: ParallelTensorCollection, key: _Key
    ) -> ReshardPlan:
        with self.trace.timed("plan"):
            plan = plan_reshard(source, target, placement=key[2], topology=self.topology, fan_out=True)
            _ = plan.digest  # computed once, here, and not where all workers compare it
        self.computed += 1
        return plan


def _shrink(kept: dict[_Key, Future[ReshardPlan]] | dict[tuple[str, str], tuple[int, ...]]) -> None:
    while len(kept) > _KEPT_PLANS:
        del kept[next(iter(kept))]  # type: ignore[arg-type]
