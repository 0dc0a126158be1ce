"""Replay of a routing trace through the engine's own cache, with a link and compute in simulated time."""

from __future__ import annotations

import copy
import itertools
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from tiered_memory import SimulatedClock, SimulatedCopyEngine
from vllm_moe_offload.cache import ExpertCache
from vllm_moe_offload.eam import EAMCollection
from vllm_moe_offload.policy import EvictionPolicy, make_policy
from vllm_moe_offload.prefetch import PrefetchQueue, by_priority
from vllm_moe_offload.shares import ShareEstimator
from vllm_moe_offload.store import ExpertStore, Field, SlabLayout
from vllm_moe_offload.trace import RoutingTrace

PREFETCHERS = ("none", "eam", "oracle")


@dataclass(frozen=True, kw_only=True)
class LinkModel:
    """Time of the simulation.

    Attributes:
        copy_seconds: one expert over the link.
        layer_seconds: compute of one layer in one step.
    """

    copy_seconds: float
    layer_seconds: float


@dataclass(frozen=True)
class ReplayResult:
    """Outcome of a replay; counts are those of :class:`vllm_moe_offload.counters.CacheStats`.

    Attributes:
        bytes_moved: copies times ``expert_nbytes``.
        stall_seconds: time that layers waited for experts.
        total_seconds: layers served times ``layer_seconds``, plus the stalls.
    """

    accesses: int
    hits: int
    late: int
    misses: int
    evictions: int
    prefetched: int
    bytes_moved: int
    stall_seconds: float
    total_seconds: float

    @property
    def hit_rate(self) -> float:
        """Hits of all accesses; 0 without any."""
        return self.hits / self.accesses if self.accesses else 0.0

    def as_dict(self) -> dict[str, Any]:
        """The fields and the hit rate by name."""
        return {**asdict(self), "hit_rate": self.hit_rate}


class Belady(EvictionPolicy):
    """Evict the expert whose next request is farthest in the trace: the bound for every policy on demand."""

    name = "belady"

    def __init__(self, num_layers: int, num_experts: int, requests: list[npt.NDArray[np.int64]]) -> None:
        super().__init__(num_layers, num_experts)
        never = len(requests)
        upcoming = np.full(num_layers * num_experts, never, dtype=np.int64)
        following: list[npt.NDArray[np.int64]] = []
        for moment in range(never - 1, -1, -1):
            following.append(upcoming[requests[moment]])
            upcoming[requests[moment]] = moment
        self._following = np.concatenate([*following[::-1], np.zeros(0, dtype=np.int64)])
        self._upcoming = upcoming
        self._seen = 0

    def on_accesses(self, keys: npt.NDArray[np.int64]) -> None:  # noqa: D102
        super().on_accesses(keys)
        self._upcoming[keys] = self._following[self._seen : self._seen + len(keys)]
        self._seen += len(keys)

    def _rank(self, keys: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
        return -self._upcoming[keys]


class _NoBytes(ExpertStore):
    """Experts of one byte: the replay moves none that matter."""

    def __init__(self, num_layers: int, num_experts: int) -> None:
        self.num_layers, self.num_experts = num_layers, num_experts
        self.layout = SlabLayout((Field("byte", (1,), torch.uint8, 0),), 1)
        self._record = torch.zeros(1, dtype=torch.uint8)

    def record(self, layer: int, expert: int) -> Tensor:
        return self._record

    def _read(self, layer: int, expert: int, out: Tensor) -> None:
        out.copy_(self._record)


def replay(
    trace: RoutingTrace,
    *,
    num_slots: int,
    policy: str = "eam",
    prefetch: str = "none",
    collection: EAMCollection | None = None,
    expert_nbytes: int = 1,
    link: LinkModel | None = None,
) -> ReplayResult:
    """Serve a recorded trace from an empty cache, as the engine would.

    For each step and layer the distinct experts of all tokens are requested once, in ascending order; more
    than the slots are served in waves, residents first. Prefetches for later layers are queued when the
    running layer's experts are complete. Each request joins the collection after its last token.

    Args:
        trace: the routing.
        num_slots: slots of the cache.
        policy: an engine policy, or ``"belady"``.
        prefetch: ``"none"``, ``"eam"`` or ``"oracle"``, which knows the next layer served and no more.
        collection: finished requests to begin with; it is copied.
        expert_nbytes: for ``bytes_moved``.
        link: speeds; without it copies and compute take no time.

    Raises:
        ValueError: unknown policy or prefetch, or fewer slots than ``top_k``.
    """
    if prefetch not in PREFETCHERS:
        raise ValueError(f"replay: prefetch must be one of {', '.join(PREFETCHERS)}; got {prefetch!r}")
    if num_slots < trace.top_k:
        raise ValueError(f"replay: {num_slots} slots are fewer than top_k={trace.top_k}")
    return _Replay(trace, num_slots, policy, prefetch, collection, link).run(expert_nbytes)


class _Replay:
    def __init__(  # noqa: PLR0917
        self,
        trace: RoutingTrace,
        num_slots: int,
        policy: str,
        prefetch: str,
        collection: EAMCollection | None,
        link: LinkModel | None,
    ) -> None:
        self._trace, self._prefetch = trace, prefetch
        self._link = link or LinkModel(copy_seconds=0.0, layer_seconds=0.0)
        self._clock = SimulatedClock()
        layers, experts = trace.num_layers, trace.num_experts
        self._needed = [needed for _, _, _, needed in _layer_steps(trace)]
        rule: EvictionPolicy
        if policy == "belady":
            served = [np.arange(layers)[index % layers] for index in range(len(self._needed))]
            keys = [layer * experts + needed for layer, needed in zip(served, self._needed, strict=True)]
            rule = Belady(layers, experts, keys)
        else:
            rule = make_policy(policy, layers, experts)
        engine = SimulatedCopyEngine(
            self._clock, bytes_per_s=1 / self._link.copy_seconds if self._link.copy_seconds else float("inf")
        )
        self._cache = ExpertCache(
            _NoBytes(layers, experts),
            num_slots,
            policy=rule,
            copy_engine=engine,
            prefetch_budget=1.0 if prefetch == "oracle" else 0.25,
            count_traffic=False,
        )
        self._queue = PrefetchQueue(self._cache)
        self._shares: ShareEstimator | None = None
        if prefetch == "eam" or policy.startswith("eam"):
            known = EAMCollection(layers, experts) if collection is None else copy.deepcopy(collection)
            self._shares = ShareEstimator(known)
        self._stalled = 0.0

    def run(self, expert_nbytes: int) -> ReplayResult:
        last_token = {int(request): row for row, request in enumerate(self._trace.request)}
        for moment, (rows, layer, chosen, needed) in enumerate(_layer_steps(self._trace)):
            requests = self._trace.request[rows]
            if self._shares is not None:
                if layer == 0:
                    names, counts = np.unique(requests, return_counts=True)
                    self._shares.start_step(dict(zip(map(str, names), counts.tolist(), strict=True)))
                self._cache.share = self._shares.share()
            self._serve(layer, needed)
            if self._shares is not None:
                self._shares.observe(
                    layer, {str(request): chosen[requests == request] for request in np.unique(requests)}
                )
            self._fetch_ahead(moment, layer)
            self._cache.release(layer)
            if layer == self._trace.num_layers - 1 and self._shares is not None:
                for request in np.unique(requests):
                    if last_token[int(request)] < rows.stop:
                        self._shares.finish(str(request))
        counters = self._cache.counters
        return ReplayResult(
            accesses=counters.accesses,
            hits=counters.hits,
            late=counters.late,
            misses=counters.misses,
            evictions=counters.evictions,
            prefetched=counters.prefetched,
            bytes_moved=counters.copies * expert_nbytes,
            stall_seconds=self._stalled,
            total_seconds=len(self._needed) * self._link.layer_seconds + self._stalled,
        )

    def _serve(self, layer: int, needed: npt.NDArray[np.int64]) -> None:
        started = self._clock.now
        if len(needed) <= self._cache.num_slots:
            self._cache.ensure(layer, needed)
        else:
            here = np.isin(needed, list(self._cache.resident(layer)))
            order = np.concatenate([needed[here], needed[~here]])
            for start in range(0, len(order), self._cache.num_slots):
                self._cache.release(layer)
                self._cache.ensure(layer, order[start : start + self._cache.num_slots])
        self._stalled += self._clock.now - started

    def _fetch_ahead(self, moment: int, layer: int) -> None:
        """Compute of the layer, during which queued prefetches go over the link one after the other."""
        if self._prefetch == "oracle" and moment + 1 < len(self._needed):
            following = (layer + 1) % self._trace.num_layers
            self._queue.replace((following, int(expert)) for expert in self._needed[moment + 1])
        elif self._prefetch == "eam" and self._cache.share is not None:
            self._queue.replace(by_priority(self._cache.share, layer, self._cache.num_slots))
        end = self._clock.now + self._link.layer_seconds
        self._queue.pump()
        while self._cache.in_flight and self._clock.now < end:
            # A little more than the copy takes, so that rounding never leaves it unfinished.
            self._clock.advance(min(self._link.copy_seconds * (1 + 1e-9), end - self._clock.now))
            self._queue.pump()
        self._clock.advance(max(end - self._clock.now, 0.0))


def _layer_steps(
    trace: RoutingTrace,
) -> Iterator[tuple[slice, int, npt.NDArray[np.int32], npt.NDArray[np.int64]]]:
    """Rows, layer, their choices ``[tokens, top_k]`` and the distinct experts, in order of service."""
    bounds = [*np.flatnonzero(np.diff(trace.step, prepend=-1)).tolist(), len(trace.step)]
    for start, stop in itertools.pairwise(bounds):
        rows = slice(start, stop)
        for layer in range(trace.num_layers):
            chosen = trace.expert_ids[rows, layer]
            yield rows, layer, chosen, np.unique(chosen).astype(np.int64)
