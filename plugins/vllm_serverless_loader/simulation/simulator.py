"""Replays a trace on simulated servers with the policies of the cluster; no randomness of its own."""

from __future__ import annotations

import heapq
import itertools
import math
from collections import OrderedDict
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt

from vllm_serverless_loader.scheduling.cluster import Allocation, ModelInfo, ServerState
from vllm_serverless_loader.scheduling.estimators import (
    CacheTransfer,
    CheapestTransport,
    LoadingTimeEstimator,
    MigrationTimeEstimator,
)
from vllm_serverless_loader.scheduling.policies import Policy
from vllm_serverless_loader.simulation.trace import Trace

_HAND_OVER_TOKENS = 16  # the gap that a migrated request waits for
DEFAULT_BANDWIDTH = {"remote": 1.25e9, "disk": 5e9, "host": 25e9}


@dataclass(frozen=True)
class ServerSpec:
    """A simulated server.

    Attributes:
        num_gpus: GPUs.
        host_cache_bytes, disk_bytes: room for models, least recently used ones leave.
        bandwidth: bytes per second of the links ``remote``, ``disk`` and ``host``.
        load_fixed_s: part of every load that does not depend on its size.
        prefill_s_per_token, prefill_fixed_s, decode_s_per_token: speed of an instance.
        cache_transfer: how key-value caches may come here; None: a migration recomputes them.
    """

    num_gpus: int = 4
    host_cache_bytes: float = 64e9
    disk_bytes: float = math.inf
    bandwidth: Mapping[str, float] = field(default_factory=lambda: dict(DEFAULT_BANDWIDTH))
    load_fixed_s: float = 0.0
    prefill_s_per_token: float = 1e-4
    prefill_fixed_s: float = 0.0
    decode_s_per_token: float = 0.02
    cache_transfer: CacheTransfer | None = None

    def migration(self) -> MigrationTimeEstimator:
        """What migrations to such a server take."""
        speed = (self.prefill_s_per_token, self.prefill_fixed_s)
        if self.cache_transfer is None:
            return MigrationTimeEstimator(*speed)
        return CheapestTransport(self.cache_transfer, *speed)


@dataclass(frozen=True)
class SimulationResult:
    """What became of each request, in order of arrival.

    Attributes:
        queue_s: waiting for GPUs, migrations and the disk's queue.
        load_s: loading.
        startup_s: ``queue_s + load_s``: arrival to begin of prefill.
        finish_s: end of the answer, seconds of simulated time.
        server: number of the server it started on.
        tier: where the model came from.
        migrated: whether it was moved while it ran.
    """

    arrival_s: npt.NDArray[np.float64]
    queue_s: npt.NDArray[np.float64]
    load_s: npt.NDArray[np.float64]
    startup_s: npt.NDArray[np.float64]
    finish_s: npt.NDArray[np.float64]
    server: npt.NDArray[np.int64]
    tier: list[str]
    migrated: npt.NDArray[np.bool_]

    def summary(self) -> dict[str, Any]:
        """Mean and percentiles of the start-up time, shares of tiers, share of migrated requests."""
        share = {
            tier: self.tier.count(tier) / len(self.tier) for tier in ("device", "host", "disk", "remote")
        }
        middle, high, highest = np.percentile(self.startup_s, [50, 95, 99])
        return {
            "requests": len(self.tier),
            "startup_mean_s": float(self.startup_s.mean()),
            "startup_p50_s": float(middle),
            "startup_p95_s": float(high),
            "startup_p99_s": float(highest),
            "tiers": share,
            "migrated": float(self.migrated.mean()),
        }


def simulate(
    trace: Trace,
    models: Sequence[ModelInfo],
    servers: Sequence[ServerSpec],
    policy: Policy,
    *,
    on_disk: Sequence[Collection[str]] | None = None,
    keep_alive_s: float = 0.0,
) -> SimulationResult:
    """Replay ``trace``.

    An instance serves one request at a time. Loads from disk and remote of a server run one after another.
    Waiting requests are tried in order of arrival whenever something is freed. After a load the model is in
    the server's host cache and on its disk. A migrated request pauses for the hand-over of 16 tokens;
    its GPUs count as moved at once, and the new model's load starts when the longest migration of the plan
    has ended; a staged one starts at once, as far as host memory.

    Args:
        trace: requests; its models must be among ``models``.
        models: what they load.
        servers: the cluster.
        policy: decides.
        on_disk: for each server the models on its disk at the start; None: all everywhere.
        keep_alive_s: how long an instance stays after its last request.

    Raises:
        ValueError: a model of the trace is unknown, or a request can never be placed.
    """
    known = {model.name: model for model in models}
    for name in trace.models:
        if name not in known:
            raise ValueError(f"simulate: model {name!r} of the trace is not among the models")
    run = _Simulation(trace, known, servers, policy, on_disk=on_disk, keep_alive_s=keep_alive_s)
    return run.run()


class _Running:
    """An instance, as policies see it; its context grows with simulated time."""

    __slots__ = (
        "_clock",
        "_spec",
        "_trace",
        "busy",
        "gone",
        "id",
        "last_used",
        "migratable",
        "model",
        "request",
        "serving_from",
        "version",
    )

    def __init__(self, name: str, model: str, clock: _Simulation, spec: ServerSpec) -> None:
        self.id, self.model = name, model
        self.busy, self.migratable, self.gone = True, False, False
        self.last_used = clock.now
        self.request, self.serving_from, self.version = -1, 0.0, 0
        self._clock, self._spec, self._trace = clock, spec, clock.trace

    @property
    def context_tokens(self) -> int:
        if self.request < 0:
            return 0
        spec, inputs = self._spec, int(self._trace.input_tokens[self.request])
        decoding = (
            self._clock.now - self.serving_from - spec.prefill_fixed_s - inputs * spec.prefill_s_per_token
        )
        return inputs + max(0, int(decoding // spec.decode_s_per_token))


class _Cache:
    """Models by bytes, least recently used first out."""

    def __init__(self, capacity: float) -> None:
        self.capacity = capacity
        self.models: OrderedDict[str, int] = OrderedDict()

    def use(self, model: str, num_bytes: int) -> list[str]:
        """Put or touch a model; returns those that left."""
        left: list[str] = []
        self.models.pop(model, None)
        if num_bytes > self.capacity:
            return left
        while sum(self.models.values()) + num_bytes > self.capacity:
            left.append(self.models.popitem(last=False)[0])
        self.models[model] = num_bytes
        return left


class _Simulation:
    def __init__(
        self,
        trace: Trace,
        models: Mapping[str, ModelInfo],
        servers: Sequence[ServerSpec],
        policy: Policy,
        *,
        on_disk: Sequence[Collection[str]] | None,
        keep_alive_s: float,
    ) -> None:
        self.trace, self.models, self.specs, self.policy = trace, models, servers, policy
        self.keep_alive_s = keep_alive_s
        self.now = 0.0
        self.states: list[ServerState] = []
        self.hosts = [_Cache(spec.host_cache_bytes) for spec in servers]
        self.disks = [_Cache(spec.disk_bytes) for spec in servers]
        for number, spec in enumerate(servers):
            for name in models if on_disk is None else on_disk[number]:
                self.disks[number].use(name, models[name].num_bytes)
            self.states.append(
                ServerState(
                    str(number),
                    spec.num_gpus,
                    dict.fromkeys(self.disks[number].models, "disk"),
                    LoadingTimeEstimator(spec.bandwidth, fixed_s=spec.load_fixed_s),
                    spec.migration(),
                    host_cache_bytes=spec.host_cache_bytes,
                )
            )
        self.number_of = {state.id: number for number, state in enumerate(self.states)}
        self.instances: dict[str, _Running] = {}
        self.place: dict[str, int] = {}
        self.names = (f"i{number}" for number in itertools.count())
        self.events: list[tuple[float, int, str, Any]] = []
        self.order = itertools.count()
        self.waiting: list[int] = []
        self.fewest_gpus = min(model.num_gpus for model in models.values())
        self.free_gpus = sum(spec.num_gpus for spec in servers)  # without an instance, or with an idle one
        count = len(trace)
        self.queue, self.load, self.finish = np.zeros(count), np.zeros(count), np.zeros(count)
        self.server = np.full(count, -1, dtype=np.int64)
        self.tier = [""] * count
        self.migrated = np.zeros(count, dtype=np.bool_)

    def run(self) -> SimulationResult:
        for request, arrival in enumerate(self.trace.arrival_s):
            self._push(float(arrival), "arrival", request)
        while self.events:
            self.now, _, kind, what = heapq.heappop(self.events)
            if kind == "arrival":
                self.waiting.append(what)
                self._place_waiting(only=what)
            elif kind == "serving":
                what.migratable = True
            elif kind == "finished":
                self._finished(*what)
            elif kind == "expired":
                instance, version = what
                if not instance.gone and not instance.busy and instance.version == version:
                    self._remove(instance)
                    self._place_waiting()
        if self.waiting:
            name = self.trace.models[self.trace.model[self.waiting[0]]]
            raise ValueError(f"simulate: a request for {name!r} can never be placed")
        startup = self.queue + self.load
        arrival = self.trace.arrival_s
        return SimulationResult(
            arrival, self.queue, self.load, startup, self.finish, self.server, self.tier, self.migrated
        )

    def _push(self, when: float, kind: str, what: Any) -> None:
        heapq.heappush(self.events, (when, next(self.order), kind, what))

    def _place_waiting(self, only: int | None = None) -> None:
        """Try waiting requests in order of arrival; one that cannot be placed blocks none behind it."""
        refused: set[int] = set()
        for request in [only] if only is not None else list(self.waiting):
            if self.free_gpus < self.fewest_gpus:
                break
            model = int(self.trace.model[request])
            name = self.trace.models[model]
            if model in refused or self.models[name].num_gpus > self.free_gpus:
                continue  # no policy could place it
            allocation = self.policy.allocate(name, self.states, self.now)
            if allocation is None:
                refused.add(model)
            else:
                self.waiting.remove(request)
                self._start(request, allocation)

    def _start(self, request: int, allocation: Allocation) -> None:
        number = self.number_of[allocation.server]
        state, spec = self.states[number], self.specs[number]
        name = self.trace.models[self.trace.model[request]]
        begin = self.now
        if allocation.reuse is not None:
            instance = self.instances[allocation.reuse]
            duration = 0.0
        else:
            for victim in allocation.evictions:
                self._remove(self.instances[victim])
            for move in allocation.migrations:
                self._migrate(self.instances[move.instance], self.number_of[move.destination])
                begin = max(begin, self.now + move.estimated_s)
            instance = self._add(name, number)
            duration = state.loading.estimate(self.models[name].partition_bytes, allocation.tier)
            if allocation.staged:
                staged_at = max(self.now, state.io_free_at) + duration
                from_host = state.loading.estimate(self.models[name].partition_bytes, "host")
                duration = max(staged_at - begin, from_host)
                state.io_free_at = staged_at
            elif allocation.tier != "host":
                begin = max(begin, state.io_free_at)
                state.io_free_at = begin + duration
            self._loaded(number, name)
        self.tier[request], self.server[request] = allocation.tier, number
        self.queue[request] = begin - self.trace.arrival_s[request]
        self.load[request] = duration
        self._serve(instance, request, begin + duration, spec)

    def _serve(self, instance: _Running, request: int, begin: float, spec: ServerSpec) -> None:
        self.free_gpus -= self.models[instance.model].num_gpus
        instance.busy, instance.request, instance.serving_from = True, request, begin
        instance.migratable = begin <= self.now
        if not instance.migratable:
            self._push(begin, "serving", instance)
        inputs, outputs = int(self.trace.input_tokens[request]), int(self.trace.output_tokens[request])
        service = spec.prefill_fixed_s + inputs * spec.prefill_s_per_token + outputs * spec.decode_s_per_token
        self.finish[request] = begin + service
        instance.version += 1
        self._push(begin + service, "finished", (instance, instance.version))

    def _finished(self, instance: _Running, version: int) -> None:
        if instance.version != version:
            return  # it was migrated meanwhile, and ends later
        self.free_gpus += self.models[instance.model].num_gpus
        instance.busy, instance.request, instance.last_used = False, -1, self.now
        if self.keep_alive_s > 0:
            self._push(self.now + self.keep_alive_s, "expired", (instance, version))
        else:
            self._remove(instance)
        self._place_waiting()

    def _migrate(self, instance: _Running, destination: int) -> None:
        """Move a running instance; its request goes on after a short pause."""
        self.states[self.place[instance.id]].instances.remove(instance)  # type: ignore[arg-type]
        state = self.states[destination]
        state.instances.append(instance)  # type: ignore[arg-type]
        tier = state.tiers.get(instance.model, "remote")
        if tier != "host":
            load = state.loading.estimate(self.models[instance.model].partition_bytes, tier)
            state.io_free_at = max(state.io_free_at, self.now) + load
        self.place[instance.id] = destination
        self._loaded(destination, instance.model)
        pause = state.migration.estimate(_HAND_OVER_TOKENS)
        request = instance.request
        self.migrated[request] = True
        self.finish[request] += pause
        instance.version += 1
        self._push(float(self.finish[request]), "finished", (instance, instance.version))

    def _loaded(self, number: int, model: str) -> None:
        num_bytes, tiers = self.models[model].num_bytes, self.states[number].tiers
        for left in self.disks[number].use(model, num_bytes):
            tiers.pop(left, None)
        for left in self.hosts[number].use(model, num_bytes):
            if left in self.disks[number].models:
                tiers[left] = "disk"
            else:
                tiers.pop(left, None)
        if model in self.hosts[number].models:
            tiers[model] = "host"
        elif model in self.disks[number].models:
            tiers[model] = "disk"

    def _add(self, model: str, number: int) -> _Running:
        instance = _Running(next(self.names), model, self, self.specs[number])
        self.instances[instance.id] = instance
        self.place[instance.id] = number
        self.states[number].instances.append(instance)  # type: ignore[arg-type]
        return instance

    def _remove(self, instance: _Running) -> None:
        instance.gone = True
        self.states[self.place.pop(instance.id)].instances.remove(instance)  # type: ignore[arg-type]
        del self.instances[instance.id]
