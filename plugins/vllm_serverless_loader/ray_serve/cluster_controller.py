"""The controller: knows the cluster, runs the policy, starts and stops engines."""

from __future__ import annotations

import asyncio
import itertools
import time
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any

import ray
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from vllm_serverless_loader.ray_serve.config import ClusterConfig
from vllm_serverless_loader.ray_serve.engine_actor import EngineActor
from vllm_serverless_loader.ray_serve.node_agent import NodeAgent
from vllm_serverless_loader.scheduling.cluster import Allocation, Instance, Migration, ServerState
from vllm_serverless_loader.scheduling.estimators import LoadingTimeEstimator, MigrationTimeEstimator
from vllm_serverless_loader.scheduling.policies import (
    FirstAvailablePolicy,
    LocalityPolicy,
    Policy,
    RandomPolicy,
    StartupTimePolicy,
)

_RETRY_S = 0.5


@dataclass
class _Engine:
    actor: Any
    instance: Instance
    server: str
    owner: str
    requests: int = 0
    carries: tuple[str, ...] = ()
    ready: asyncio.Event = field(default_factory=asyncio.Event)


class ClusterController:
    """A named actor. It decides; the ingress, which holds the tokens, carries out migrations."""

    def __init__(self, config: ClusterConfig) -> None:
        self._config = config
        self._models = config.model_infos()
        self._policy = self._make_policy(config)
        self._servers: dict[str, ServerState] = {}
        self._agents: dict[str, Any] = {}
        self._sockets: dict[str, str] = {}
        self._engines: dict[str, _Engine] = {}
        self._names = itertools.count()
        self._changed = asyncio.Condition()
        self._waiting: dict[str, str] = {}
        self._tasks: set[asyncio.Future[None]] = set()

    def _make_policy(self, config: ClusterConfig) -> Policy:
        if config.policy == "startup_time":
            migration = config.migration
            return StartupTimePolicy(
                self._models,
                migration=migration.get("enabled", True),
                staging=migration.get("staging", True),
            )
        others: dict[str, type[FirstAvailablePolicy | LocalityPolicy | RandomPolicy]]
        others = {"first_available": FirstAvailablePolicy, "locality": LocalityPolicy, "random": RandomPolicy}
        return others[config.policy](self._models)

    async def start(self) -> list[str]:
        """Start an agent on each node with GPUs, or find that of an earlier controller; ids of the nodes."""
        for node in ray.nodes():
            gpus = int(node["Resources"].get("GPU", 0))
            if not node["Alive"] or not gpus or node["NodeID"] in self._agents:
                continue
            options = {
                "name": f"serverless-loader-agent-{node['NodeID'][:16]}",
                "get_if_exists": True,
                "lifetime": "detached",
                "num_cpus": 0,
                "scheduling_strategy": NodeAffinitySchedulingStrategy(node["NodeID"], soft=False),
            }
            agent = ray.remote(NodeAgent).options(**options).remote(self._config, gpus)
            self._add_server(agent, await agent.describe.remote())
        return list(self._servers)

    def _add_server(self, agent: Any, facts: dict[str, Any]) -> None:
        name = facts["node"]
        self._agents[name], self._sockets[name] = agent, facts["socket"]
        loading = LoadingTimeEstimator(self._config.bandwidth)
        self._servers[name] = ServerState(
            name,
            facts["num_gpus"],
            facts["tiers"],
            loading,
            MigrationTimeEstimator(),
            host_cache_bytes=self._config.host_cache_bytes,
        )
        for instance_id, (model, actor) in facts["engines"].items():
            # Left by a controller that crashed: idle as far as anyone knows.
            instance = Instance(instance_id, model, busy=False, last_used=time.monotonic())
            engine = _Engine(actor, instance, name, owner="")
            engine.ready.set()
            self._engines[instance_id] = engine
            self._servers[name].instances.append(instance)

    async def acquire(self, model: str, owner: str) -> dict[str, Any]:
        """Reserve an instance of ``model``; waits until the policy finds a place.

        Returns:
            ``instance``, ``engine``, ``tier``, ``estimated_s`` and ``migrations``, which the caller must
            carry out before it calls :meth:`begin`.

        Raises:
            ValueError: unknown model.
        """
        if model not in self._models:
            raise ValueError(f"unknown model {model!r}; known are {', '.join(self._models)}")
        if not self._servers:
            await self.start()  # after a crash Ray makes the controller anew
        async with self._changed:
            while True:
                shared = self._with_room(model)
                if shared is not None:
                    return self._grant(shared, "device", 0.0, [])
                allocation = self._allocate(model, owner)
                if allocation is not None:
                    self._waiting.pop(model, None)
                    return await self._carry_out(model, owner, allocation)
                self._waiting[model] = (
                    f"{self._models[model].num_gpus} GPUs on one of {len(self._servers)} servers"
                )
                with suppress(TimeoutError):
                    await asyncio.wait_for(self._changed.wait(), _RETRY_S)

    def _with_room(self, model: str) -> _Engine | None:
        for engine in self._engines.values():
            in_use = engine.instance.busy and engine.requests < self._config.requests_per_instance
            if engine.instance.model == model and in_use and engine.ready.is_set():
                return engine
        return None

    def _allocate(self, model: str, owner: str) -> Allocation | None:
        for engine in self._engines.values():
            # The router of a request is in the ingress that took it; only that one can move it.
            engine.instance.migratable = engine.owner == owner and engine.ready.is_set()
        return self._policy.allocate(model, list(self._servers.values()), time.monotonic())

    async def _carry_out(self, model: str, owner: str, allocation: Allocation) -> dict[str, Any]:
        if allocation.reuse is not None:
            engine = self._engines[allocation.reuse]
            engine.instance.busy, engine.owner = True, owner
            return self._grant(engine, "device", 0.0, [])
        if allocation.staged:
            self._agents[allocation.server].stage.remote(self._config.models[model].path)
        for victim in allocation.evictions:
            await self._stop(victim)
        moves = [await self._prepare_move(move, owner) for move in allocation.migrations]
        engine = self._reserve(model, allocation.server, owner)
        return self._grant(engine, allocation.tier, allocation.estimated_startup_s, moves)

    async def _prepare_move(self, move: Migration, owner: str) -> dict[str, Any]:
        victim = self._engines[move.instance]
        victim.instance.migratable = False
        # It holds no GPU of its server any more as far as the policy is concerned.
        self._servers[victim.server].instances.remove(victim.instance)
        target = self._reserve(victim.instance.model, move.destination, owner)
        return {"instance": move.instance, "target": target.instance.id, "estimated_s": move.estimated_s}

    def _reserve(self, model: str, server: str, owner: str) -> _Engine:
        instance = Instance(f"{model}-{next(self._names)}-{int(time.time() * 1e3) % 10**8}", model)
        engine = _Engine(None, instance, server, owner)
        self._engines[instance.id] = engine
        self._servers[server].instances.append(instance)
        return engine

    def _grant(
        self, engine: _Engine, tier: str, estimated_s: float, moves: list[dict[str, Any]]
    ) -> dict[str, Any]:
        engine.requests += 1
        return {
            "instance": engine.instance.id,
            "engine": engine.actor,
            "carries": engine.carries,
            "server": engine.server,
            "tier": tier,
            "estimated_s": estimated_s,
            "migrations": moves,
        }

    async def begin(self, instance_id: str) -> dict[str, Any]:
        """Start and load a reserved instance: ``engine``, and what :meth:`EngineActor.load` returned."""
        engine = self._engines[instance_id]
        server = self._servers[engine.server]
        model = self._config.models[engine.instance.model]
        if engine.actor is None:
            options = {
                "num_gpus": model.num_gpus,
                "num_cpus": 0,
                "max_concurrency": 1000,
                "scheduling_strategy": NodeAffinitySchedulingStrategy(engine.server, soft=False),
            }
            socket = self._sockets[engine.server]
            engine.actor = (
                ray.remote(EngineActor).options(**options).remote(self._config.engine, model, socket)
            )
        begin = time.monotonic()
        estimate = server.loading.estimate(self._models[engine.instance.model].partition_bytes, "disk")
        server.io_free_at = max(server.io_free_at, begin) + estimate
        try:
            measured = await engine.actor.load.remote()
        except BaseException:
            await self.release(instance_id, failed=True)
            raise
        server.io_free_at = min(server.io_free_at, time.monotonic())
        engine.carries = tuple(measured["carries"])
        parts = self._models[engine.instance.model].partition_bytes
        server.loading.observe(parts, measured["tier"], measured["seconds"])
        agent = self._agents[engine.server]
        await agent.register.remote(instance_id, engine.instance.model, engine.actor)
        server.tiers = await agent.tiers.remote()
        engine.ready.set()
        return {"engine": engine.actor, **measured}

    async def moved(self, source: str, target: str, *, tokens: int, seconds: float) -> None:
        """A migration is complete: the old instance is stopped, the new one has its requests."""
        old, new = self._engines[source], self._engines[target]
        new.requests, new.owner = old.requests, old.owner
        if tokens:
            self._servers[new.server].migration.observe(tokens, seconds)
        await self._stop(source)
        if not new.requests:
            await self.release(target)

    async def not_moved(self, source: str, target: str, instance_id: str) -> None:
        """A migration failed: the old instance goes on, what was reserved for it and by it is given back."""
        old = self._engines[source]
        if old.instance not in self._servers[old.server].instances:
            self._servers[old.server].instances.append(old.instance)
        for name in (target, instance_id):
            if name in self._engines:
                await self.release(name, failed=True)

    async def release(self, instance_id: str, *, failed: bool = False) -> None:
        """One request fewer on an instance; an idle one stays for ``keep_alive_s``."""
        engine = self._engines.get(instance_id)
        if engine is None:
            return
        engine.requests = max(0, engine.requests - 1)
        if failed:
            await self._stop(instance_id)
        elif not engine.requests:
            engine.instance.busy, engine.instance.last_used = False, time.monotonic()
            task = asyncio.ensure_future(self._expire(instance_id, engine.instance.last_used))
            self._tasks.add(task)
            task.add_done_callback(self._tasks.discard)
        async with self._changed:
            self._changed.notify_all()

    async def _expire(self, instance_id: str, last_used: float) -> None:
        await asyncio.sleep(self._config.keep_alive_s)
        engine = self._engines.get(instance_id)
        if engine is not None and not engine.instance.busy and engine.instance.last_used == last_used:
            await self._stop(instance_id)
            async with self._changed:
                self._changed.notify_all()

    async def _stop(self, instance_id: str) -> None:
        engine = self._engines.pop(instance_id)
        with suppress(ValueError):
            self._servers[engine.server].instances.remove(engine.instance)
        if engine.actor is not None:
            ray.kill(engine.actor)
            await self._agents[engine.server].forget.remote(instance_id)

    async def status(self) -> dict[str, Any]:
        """Servers with tiers, instances and learnt bandwidths, and what waiting requests wait for."""
        return {
            "servers": {
                name: {
                    "tiers": dict(server.tiers),
                    "instances": {one.id: one.model for one in server.instances},
                    "bandwidth": dict(server.loading.bandwidth),
                }
                for name, server in self._servers.items()
            },
            "waiting": dict(self._waiting),
        }

    async def close(self) -> None:
        """Stop all engines and agents."""
        for instance_id in list(self._engines):
            await self._stop(instance_id)
        for agent in self._agents.values():
            await agent.close.remote()
            ray.kill(agent)
        self._agents.clear()
        self._servers.clear()
