"""A request router of Ray Serve for own deployments: where would the request's model start soonest?"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, TypeVar

from ray.serve.request_router import PendingRequest, RequestRouter, RunningReplica

from vllm_serverless_loader.scheduling.cluster import ModelInfo
from vllm_serverless_loader.scheduling.estimators import LoadingTimeEstimator

_Any = TypeVar("_Any")


def startup_stats(
    models: Mapping[str, ModelInfo],
    tiers: Mapping[str, str],
    loading: LoadingTimeEstimator,
    *,
    queue_s: float = 0.0,
) -> dict[str, Any]:
    """What a replica's ``record_routing_stats`` returns.

    Args:
        models: those it may be asked for.
        tiers: model -> ``"device"``, ``"host"`` or ``"disk"``; a model not in it is ``"remote"``.
        loading: of the replica's server.
        queue_s: until its queue of loads from disk and remote ends.

    Returns:
        ``{"startup_s": {model: seconds}}``.
    """
    found = {}
    for name, model in models.items():
        tier = tiers.get(name, "remote")
        queue = queue_s if tier in ("disk", "remote") else 0.0
        found[name] = loading.estimate(model.partition_bytes, tier, queue_s=queue)
    return {"startup_s": found}


def ranks(seconds: Sequence[tuple[float, _Any]], tolerance_s: float) -> list[list[_Any]]:
    """Groups by time, soonest first; a group spans at most ``tolerance_s`` from its first member."""
    groups: list[list[_Any]] = []
    begin = -math.inf
    for value, item in sorted(seconds, key=lambda pair: pair[0]):
        if not groups or value > begin + tolerance_s:
            groups.append([])
            begin = value
        groups[-1].append(item)
    return groups


class StartupTimeRequestRouter(RequestRouter):
    """Sends a request to the replica with the least estimated start-up time for its multiplexed model id.

    Replicas return :func:`startup_stats` from ``record_routing_stats``. Among replicas of about the same time
    Serve takes the one with the shortest queue; when all of them are full, it goes on to the next. A replica
    that has reported nothing about a model comes last.
    """

    def initialize_state(self, tolerance_s: float = 0.05) -> None:
        """Take ``request_router_kwargs``.

        Args:
            tolerance_s: differences up to this are none.

        Raises:
            ValueError: it is negative.
        """
        if not tolerance_s >= 0:
            raise ValueError(f"tolerance_s must not be negative, got {tolerance_s!r}")
        self._tolerance_s = tolerance_s

    async def choose_replicas(
        self, candidate_replicas: list[RunningReplica], pending_request: PendingRequest | None = None
    ) -> list[list[RunningReplica]]:
        """Groups of replicas in the order in which they are to be tried."""
        model = pending_request.metadata.multiplexed_model_id if pending_request is not None else ""
        if not model:
            return [candidate_replicas]
        known = [replica.routing_stats.get("startup_s", {}).get(model) for replica in candidate_replicas]
        seconds = [math.inf if value is None else float(value) for value in known]
        return ranks(list(zip(seconds, candidate_replicas, strict=True)), self._tolerance_s)
