"""Where to start a model. Policies are pure: they read the cluster and answer, or say None for "wait"."""

from __future__ import annotations

import math
import random
from collections.abc import Mapping, Sequence
from typing import Protocol

from vllm_serverless_loader.scheduling.cluster import Allocation, Instance, Migration, ModelInfo, ServerState

INF = math.inf


class Policy(Protocol):
    """Decides where a model starts."""

    def allocate(self, model: str, cluster: Sequence[ServerState], now: float) -> Allocation | None:
        """The allocation, or None if the request must wait; the cluster is not changed."""


class _Base:
    """What all policies share: reuse of idle instances, free GPUs, loading time."""

    def __init__(self, models: Mapping[str, ModelInfo]) -> None:
        self.models = models

    def _reuse(self, model: str, cluster: Sequence[ServerState]) -> Allocation | None:
        for server in cluster:
            for instance in server.instances:
                if instance.model == model and not instance.busy:
                    return Allocation(server.id, "device", 0.0, reuse=instance.id)
        return None

    def _free(self, server: ServerState) -> int:
        """GPUs without an instance, and those of idle ones."""
        models = self.models
        return server.num_gpus - sum(models[one.model].num_gpus for one in server.instances if one.busy)

    def _evictions(self, server: ServerState, needed: int) -> tuple[str, ...]:
        """Idle instances to stop so that ``needed`` GPUs are free, least recently used first."""
        truly_free = server.num_gpus - sum(self.models[one.model].num_gpus for one in server.instances)
        evicted = []
        for instance in sorted(
            (one for one in server.instances if not one.busy), key=lambda one: one.last_used
        ):
            if truly_free >= needed:
                break
            evicted.append(instance.id)
            truly_free += self.models[instance.model].num_gpus
        return tuple(evicted)

    def _loading(self, server: ServerState, model: str, now: float) -> float:
        tier = server.tiers.get(model, "remote")
        queue = 0.0 if tier == "host" else max(0.0, server.io_free_at - now)
        return server.loading.estimate(self.models[model].partition_bytes, tier, queue_s=queue)

    def _start_on(self, server: ServerState, model: str, now: float) -> Allocation:
        return Allocation(
            server.id,
            server.tiers.get(model, "remote"),
            self._loading(server, model, now),
            evictions=self._evictions(server, self.models[model].num_gpus),
        )


class FirstAvailablePolicy(_Base):
    """The first server with free GPUs, blind to where bytes are (load only)."""

    def allocate(self, model: str, cluster: Sequence[ServerState], now: float) -> Allocation | None:
        """As :class:`Policy`."""
        found = self._reuse(model, cluster)
        if found is not None:
            return found
        for server in cluster:
            if self._free(server) >= self.models[model].num_gpus:
                return self._start_on(server, model, now)
        return None


class LocalityPolicy(_Base):
    """The server with the least loading time, free or not; waits while it is full."""

    def allocate(self, model: str, cluster: Sequence[ServerState], now: float) -> Allocation | None:
        """As :class:`Policy`."""
        found = self._reuse(model, cluster)
        if found is not None or not cluster:
            return found
        fit = [server for server in cluster if server.num_gpus >= self.models[model].num_gpus]
        if not fit:
            return None
        best = min(fit, key=lambda server: self._loading(server, model, now))
        return self._start_on(best, model, now) if self._free(best) >= self.models[model].num_gpus else None


class RandomPolicy(_Base):
    """Any server with free GPUs, uniformly."""

    def __init__(self, models: Mapping[str, ModelInfo], seed: int = 0) -> None:
        super().__init__(models)
        self._random = random.Random(seed)

    def allocate(self, model: str, cluster: Sequence[ServerState], now: float) -> Allocation | None:
        """As :class:`Policy`."""
        found = self._reuse(model, cluster)
        if found is not None:
            return found
        fit = [server for server in cluster if self._free(server) >= self.models[model].num_gpus]
        return self._start_on(self._random.choice(fit), model, now) if fit else None


class StartupTimePolicy(_Base):
    """The server, and the instances to migrate away from it, with the least estimated start-up time.

    Exact: the answer equals that of trying everything. Ties go to the least sum of migration times, then to
    the fewest migrations, then to the first server.

    Args:
        models: all models by name.
        migration: whether instances may be moved.
        parallel_migrations: a plan takes as long as its longest migration; otherwise as long as their sum.
        staging: while instances are moved away, the model's bytes already go to the server's host memory.
    """

    def __init__(
        self,
        models: Mapping[str, ModelInfo],
        *,
        migration: bool = True,
        parallel_migrations: bool = True,
        staging: bool = False,
    ) -> None:
        super().__init__(models)
        self.migration = migration
        self.parallel_migrations = parallel_migrations
        self.staging = staging

    def allocate(self, model: str, cluster: Sequence[ServerState], now: float) -> Allocation | None:
        """As :class:`Policy`."""
        found = self._reuse(model, cluster)
        if found is not None:
            return found
        needed = self.models[model].num_gpus
        free = [self._free(server) for server in cluster]
        if sum(free) < needed:
            return None
        loading = [self._loading(server, model, now) for server in cluster]
        order = sorted(range(len(cluster)), key=lambda number: loading[number])
        best: tuple[float, float, int, int] = (INF, INF, 0, 0)
        plan: tuple[Migration, ...] = ()
        chosen = -1
        search = _VictimSearch(self, cluster, free, now)
        for number in order:
            if loading[number] > best[0]:
                break  # every plan there starts later
            if free[number] >= needed:
                score = (loading[number], 0.0, 0, number)
                if score < best:
                    best, plan, chosen = score, (), number
            elif self.migration and cluster[number].num_gpus >= needed:
                after = self._after_migrations(cluster[number], model, loading[number])
                limit = (best[0] - after, best[1], best[2], best[3] > number)
                least = loading[number] - after
                moved = search.run(number, model, needed - free[number], limit, least)
                if moved is not None:
                    longest, total, migrations = moved
                    score = (after + longest, total, len(migrations), number)
                    if score < best:
                        best, plan, chosen = score, migrations, number
        if chosen < 0:
            return None
        server = cluster[chosen]
        moved_gpus = {one.instance for one in plan}
        left = [one for one in server.instances if one.id not in moved_gpus]
        view = ServerState(server.id, server.num_gpus, server.tiers, server.loading, server.migration, left)
        tier = server.tiers.get(model, "remote")
        staged = bool(plan) and self._stages(server, model)
        return Allocation(server.id, tier, best[0], plan, self._evictions(view, needed), staged=staged)

    def _stages(self, server: ServerState, model: str) -> bool:
        fits = self.models[model].num_bytes <= server.host_cache_bytes
        return self.staging and fits and server.tiers.get(model, "remote") != "host"

    def _after_migrations(self, server: ServerState, model: str, loading: float) -> float:
        """What is left of loading when the migrations have ended, if they take long enough."""
        if not self._stages(server, model):
            return loading
        return min(loading, server.loading.estimate(self.models[model].partition_bytes, "host"))


class _VictimSearch:
    """The cheapest set of instances to move away from a server, each to a destination with room."""

    def __init__(
        self, policy: StartupTimePolicy, cluster: Sequence[ServerState], free: Sequence[int], now: float
    ) -> None:
        self._policy = policy
        self._cluster = cluster
        self._free = free
        self._now = now
        self._roomy = [number for number, count in enumerate(free) if count > 0]
        self._ranked: dict[str, list[tuple[float, int, bool]]] = {}

    def run(
        self,
        server: int,
        model: str,
        shortage: int,
        limit: tuple[float, float, int, bool],
        least: float = 0.0,
    ) -> tuple[float, float, tuple[Migration, ...]] | None:
        """(time, sum of times, migrations) better than ``limit``; None if there is none.

        A plan that takes less than ``least`` counts as one that takes so long: staging takes that time.
        """
        policy, models = self._policy, self._policy.models
        victims = [
            one
            for one in self._cluster[server].instances
            if one.busy and one.migratable and one.model != model
        ]
        victims.sort(key=lambda one: one.id)
        gpus = [models[one.model].num_gpus for one in victims]
        if sum(gpus) < shortage or sum(self._free) - self._free[server] < shortage:
            return None
        # Of a victim's destinations only so many of the cheapest can matter: the others of its set can fill
        # all but one of them.
        options = [self._destinations(one, server, len(victims)) for one in victims]
        with_options = [place for place, choice in enumerate(options) if choice]
        victims, gpus = [victims[place] for place in with_options], [gpus[place] for place in with_options]
        options = [options[place] for place in with_options]
        if sum(gpus) < shortage or min(choice[0][0] for choice in options) > limit[0]:
            return None
        best_time, best_sum, best_count, wins_ties = limit
        best_key = (best_time, best_sum, best_count, 1 if wins_ties else 0)
        best: tuple[Migration, ...] | None = None
        found_key: tuple[float, float] = (INF, INF)
        room = dict.fromkeys({number for choice in options for _, number, _ in choice}, 0)
        for number in room:
            room[number] = self._free[number]
        waiting = dict.fromkeys(room, 0.0)
        suffix = [0] * (len(victims) + 1)
        for place in range(len(victims) - 1, -1, -1):
            suffix[place] = suffix[place + 1] + gpus[place]
        chosen: list[Migration] = []

        def visit(place: int, missing: int, longest: float, total: float) -> None:
            nonlocal best, best_key, found_key
            time = max(least, longest if policy.parallel_migrations else total)
            if (time, total, len(chosen), 0) >= best_key:
                return
            if missing <= 0:
                best, best_key, found_key = tuple(chosen), (time, total, len(chosen), 0), (time, total)
                return
            if suffix[place] < missing:
                return
            victim, size = victims[place], gpus[place]
            for cost, number, queues in options[place]:
                if room[number] < size:
                    continue
                seconds = cost + (waiting[number] if queues else 0.0)
                added = self._queue_time(victim, number) if queues else 0.0
                room[number] -= size
                waiting[number] += added
                destination = self._cluster[number].id
                chosen.append(Migration(victim.id, self._cluster[server].id, destination, seconds))
                visit(place + 1, missing - size, max(longest, seconds), total + seconds)
                chosen.pop()
                room[number] += size
                waiting[number] -= added
            visit(place + 1, missing, longest, total)

        visit(0, shortage, 0.0, 0.0)
        return None if best is None else (*found_key, best)

    def _destinations(self, victim: Instance, server: int, count: int) -> list[tuple[float, int, bool]]:
        """(time without waiting for other victims, server, whether it waits for them), cheapest first."""
        ranked = self._ranked.get(victim.id)
        if ranked is None:
            policy = self._policy
            size = policy.models[victim.model].num_gpus
            ranked = []
            for number in self._roomy:
                if self._free[number] < size:
                    continue
                there = self._cluster[number]
                cost = policy._loading(there, victim.model, self._now)
                cost += there.migration.estimate(victim.context_tokens)
                ranked.append((cost, number, there.tiers.get(victim.model, "remote") != "host"))
            ranked.sort()
            self._ranked[victim.id] = ranked
        return [one for one in ranked if one[1] != server][: count + 1]

    def _queue_time(self, victim: Instance, number: int) -> float:
        there = self._cluster[number]
        tier = there.tiers.get(victim.model, "remote")
        return there.loading.estimate(self._policy.models[victim.model].partition_bytes, tier)
