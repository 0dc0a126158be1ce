"""What one engine's layers share: options, pools of slots (``pools.py``), the current step. No framework.

Layers announce themselves while the model is built (``announce``), hand over their experts once these are
loaded (``take_over``), and then ask their pool for experts at every forward pass (``caches``). A pool is
managed by the device (:class:`DirectCache`) or by the host (:class:`ExpertCache`); where all experts have a
slot there is nothing to manage, and the layer stays vLLM's own.
"""

from __future__ import annotations

import itertools
from collections import OrderedDict
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from vllm_moe_offload.cache import ExpertCache
from vllm_moe_offload.config import MoEOffloadConfig
from vllm_moe_offload.counters import CacheStats
from vllm_moe_offload.direct import DirectCache, StepReport
from vllm_moe_offload.disk_store import TieredExpertStore
from vllm_moe_offload.eam import EAMCollection
from vllm_moe_offload.live import LivePublisher
from vllm_moe_offload.pools import LayerHandle, PlainPool, PoolMaker, alike, keep_all, slots_of
from vllm_moe_offload.shares import ShareEstimator
from vllm_moe_offload.steps import Ended, Step, StepNote
from vllm_moe_offload.trace import RoutingTrace, TraceRecorder

_KEPT_REQUESTS = 1024


@dataclass
class ModelOffload:
    """Expert offload of one engine in one process.

    Attributes:
        config: the options.
        device: where the model runs.
        direct: whether pools are managed by the device.
        max_tokens: most tokens of a step.
        model_id: names the model; files of experts and matrices are tied to it.
        rank, num_ranks: of the tensor parallel group. Each has its own part of every expert.
        layers: announced layers, in order of the model.
        caches: one for each shape of layer that does not fit; empty before :meth:`take_over`.
        plain: shapes of layer that do.
        step: the step that is running, or None.
        steps: steps so far.
        estimators: one for each pool.
        recorder: present if the options ask for a trace.
        publisher: shows the counters to other processes, if there is one.
        finished: matrices of the last finished requests, of the first pool.
    """

    config: MoEOffloadConfig
    device: torch.device
    direct: bool
    max_tokens: int
    model_id: str
    rank: int = 0
    num_ranks: int = 1
    layers: list[LayerHandle] = field(default_factory=list)
    caches: list[ExpertCache | DirectCache] = field(default_factory=list)
    plain: list[PlainPool] = field(default_factory=list)
    step: Step | None = None
    steps: int = 0
    estimators: list[ShareEstimator] = field(default_factory=list)
    recorder: TraceRecorder | None = None
    publisher: LivePublisher | None = None
    finished: OrderedDict[str, npt.NDArray[np.int64]] = field(default_factory=OrderedDict)
    _ended: Ended = field(default_factory=Ended)

    def announce(self, layer: LayerHandle) -> LayerHandle:
        """Register a layer while the model is built."""
        self.layers.append(layer)
        return layer

    def take_over(self) -> None:
        """Move all experts from the loaded layers into stores and give the layers slots. Idempotent.

        Raises:
            ValueError: the slots do not hold the experts of one token.
            MemoryError: the host or the device lacks the memory.
        """
        if self.caches or self.plain:
            return
        groups = alike(self.layers)
        for (layout, layers), num_slots in zip(groups, slots_of(self.config, groups), strict=True):
            if num_slots == layers[0].num_experts * len(layers) and not self.config.record_trace:
                self.plain.append(keep_all(layout, layers, self.device))
            else:
                self._offload(layers, num_slots)
        if self.publisher is not None:
            self.publisher.publish(self._report())

    def begin_step(self, step: Step | None, finished: Iterable[str], restarted: Iterable[str]) -> None:
        """Before a forward pass, or in place of one (None), with what the scheduler says of requests."""
        self.step = step
        self._ended.finished += finished
        self._ended.restarted += restarted
        if not self.direct:
            ended, self._ended = self._ended, Ended()
            for pool in range(len(self.estimators)):
                self._forget(pool, ended)
        elif step is not None:
            for cache in self._direct_caches():
                cache.begin_step(step.num_tokens)

    def end_step(self) -> None:
        """After a forward pass was launched. Here the host learns, while the device works."""
        step, self.step = self.step, None
        if step is None:
            return
        if self.direct:
            ended, self._ended = self._ended, Ended()
            for cache in self._direct_caches():
                cache.end_step(step.num_tokens, StepNote(step.number, ended, step.rows))
            self.learn()
        if self.publisher is not None:
            self.publisher.publish(self._report())

    def learn(self, *, wait: bool = False) -> None:
        """Learn from the steps that the device completed, or, with ``wait``, from all."""
        for pool, cache in enumerate(self._direct_caches()):
            report = None
            for report in cache.reports(wait=wait):
                self._trace(pool, report)
            if report is None:
                continue
            tokens = {request: rows.stop - rows.start for request, rows in report.note.rows}
            if tokens and (self.config.policy == "eam" or self._prefetches):
                cache.share = self.estimators[pool].step_share(tokens)
            cache.plan_ahead()
            if self.config.debug_checks:
                cache.verify()
        if wait:
            ended, self._ended = self._ended, Ended()
            for pool in range(len(self.estimators)):
                self._forget(pool, ended)

    def before_layer(self, layer: LayerHandle) -> None:
        """Give the pool of the host the shares that are predicted for the running step."""
        estimator, cache = self.estimators[layer.pool], self.caches[layer.pool]
        assert self.step is not None
        if not self.step.rows:
            return
        if layer.pool not in self.step.traced:
            self.step.traced.add(layer.pool)
            tokens = {request: rows.stop - rows.start for request, rows in self.step.rows}
            estimator.start_step(tokens)
        if self.config.policy == "eam" and not cache.holds_all:
            cache.share = estimator.share()

    def after_layer(self, layer: LayerHandle, chosen: npt.NDArray[np.integer]) -> None:
        """Trace what the router chose, ``[tokens, top_k]``, for the step's requests."""
        assert self.step is not None
        rows = self.step.rows
        if not rows:
            return
        self.estimators[layer.pool].observe(layer.index, {request: chosen[part] for request, part in rows})
        if self.recorder is not None and layer.pool == 0:
            self.recorder.record(self.step.number, layer.index, rows, chosen)

    @property
    def _prefetches(self) -> bool:
        return self.direct and "eam" in self.config.prefetch

    def _prefetching(self) -> str:
        """The option as far as it is in effect."""
        parts = self.config.prefetch.split("+")
        return "+".join(part for part in parts if part != "eam" or self.direct) or "none"

    def _trace(self, pool: int, report: StepReport) -> None:
        note = report.note
        self._forget(pool, note.ended)
        self.estimators[pool].observe_step(note.rows, report.chosen)
        if self.recorder is not None and pool == 0 and note.rows:
            for layer in range(report.chosen.shape[1]):
                self.recorder.record(note.number, layer, note.rows, report.chosen[:, layer])

    def _forget(self, pool: int, ended: Ended) -> None:
        estimator = self.estimators[pool]
        for request in ended.finished:
            if request in estimator.tracer.live:
                matrix = estimator.finish(request)
                if pool == 0:
                    self.finished[request] = matrix
        for request in ended.restarted:
            estimator.discard(request)
        while len(self.finished) > _KEPT_REQUESTS:
            self.finished.popitem(last=False)

    def _direct_caches(self) -> Iterator[DirectCache]:
        return (cache for cache in self.caches if isinstance(cache, DirectCache))

    def request_eams(self) -> dict[str, npt.NDArray[np.int64]]:
        """Matrices of the last finished requests."""
        self.learn(wait=True)
        return dict(self.finished)

    def collect_trace(self) -> RoutingTrace:
        """The routing recorded so far, which is cleared; RuntimeError unless ``record_trace`` is set."""
        if self.recorder is None:
            raise RuntimeError("moe_offload: nothing is recorded; set record_trace in the options")
        self.learn(wait=True)
        return self.recorder.collect()

    def _offload(self, layers: list[LayerHandle], num_slots: int) -> None:
        pool = len(self.caches)
        maker = PoolMaker(
            self.config,
            self.device,
            self.direct,
            self.max_tokens,
            self.model_id,
            self.rank,
            self.num_ranks,
            pool,
        )
        cache = maker.make(layers, num_slots)
        self.caches.append(cache)
        for layer, following in itertools.pairwise(self.layers):
            if layer.pool == following.pool == pool:
                layer.following = following
        num_experts = cache.num_experts if isinstance(cache, DirectCache) else cache.store.num_experts
        self._start_tracing(cache.store.num_layers, num_experts, layers[0].top_k)

    def _start_tracing(self, num_layers: int, num_experts: int, top_k: int) -> None:
        known = self._known_requests(num_layers, num_experts) if not self.estimators else None
        if known is None:
            known = EAMCollection(num_layers, num_experts, self.config.eam_capacity)
            known.model_id = self.model_id
        self.estimators.append(ShareEstimator(known, temperature=self.config.eam_temperature))
        if self.config.record_trace and self.recorder is None:
            self.recorder = TraceRecorder(num_layers, num_experts, top_k)

    def _known_requests(self, num_layers: int, num_experts: int) -> EAMCollection | None:
        """The collection that the options name, for the first pool; None if there is no file yet."""
        path = self.config.eam_path
        if path is None or not Path(path).exists():
            return None
        known = EAMCollection.load(path)
        if known.model_id and known.model_id != self.model_id:
            raise ValueError(
                f"moe_offload: {path} was recorded with model {known.model_id!r}, not {self.model_id!r}"
            )
        if (known.num_layers, known.num_experts) != (num_layers, num_experts):
            raise ValueError(
                f"moe_offload: {path} was recorded with {known.num_layers} layers of "
                f"{known.num_experts} experts, this model has {num_layers} of {num_experts}"
            )
        return known

    def close(self) -> None:
        """At the engine's end: finish what is in flight, save the collection where the options ask for it."""
        self.learn(wait=True)
        if self.publisher is not None:
            self.publisher.close()
        for cache in self.caches:
            cache.close()
        if self.config.eam_path is not None and self.estimators and self.rank == 0:
            self.estimators[0].collection.save(self.config.eam_path)

    def stats(self) -> dict[str, int | float | str]:
        """Counters of all pools, summed, with the sizes of the pools."""
        self.learn(wait=True)
        report = self._report()
        report.pop("live_requests")
        return report

    def _report(self) -> dict[str, int | float | str]:
        totals = CacheStats().as_dict()
        for cache in self.caches:
            for name, value in vars(cache.counters).items():
                totals[name] += value
            if isinstance(cache.store, TieredExpertStore):
                totals["bytes_disk_to_host"] += cache.store.bytes_from_disk
        live = len(self.estimators[0].tracer) if self.estimators else 0
        return {**totals, **self._sizes, "live_requests": live}

    @cached_property
    def _sizes(self) -> dict[str, int | str]:
        """What reports say of pools; to be asked for once these are there."""
        pools: list[Any] = [*(cache.store for cache in self.caches), *self.plain]
        shapes = [(pool.layout, pool.num_layers, pool.num_experts) for pool in pools]
        slots = sum(cache.num_slots for cache in self.caches)
        slots += sum(pool.num_layers * pool.num_experts for pool in self.plain)
        return {
            "num_slots": slots,
            "num_layers": sum(layers for _, layers, _ in shapes),
            "num_experts": max(experts for _, _, experts in shapes),
            "expert_nbytes": max(layout.expert_nbytes for layout, _, _ in shapes),
            "policy": self.config.policy,
            "prefetch": self._prefetching(),
        }
