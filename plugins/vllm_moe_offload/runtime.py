"""What one engine's layers share: options, pools of slots, the current step. No framework in here.

Layers announce themselves while the model is built (``announce``), hand over their experts once these are
loaded (``take_over``), and then ask their pool for experts at every forward pass (``caches``). A pool is
managed by the device (:class:`DirectCache`) or by the host (:class:`ExpertCache`); where all experts have a
slot there is nothing to manage, and the layer stays vLLM's own.
"""

from __future__ import annotations

import itertools
import logging
from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from vllm_moe_offload.cache import ExpertCache
from vllm_moe_offload.config import GIB, MoEOffloadConfig
from vllm_moe_offload.counters import CacheStats
from vllm_moe_offload.direct import DirectCache, StepReport
from vllm_moe_offload.disk_store import DiskExpertStore, TieredExpertStore
from vllm_moe_offload.eam import EAMCollection
from vllm_moe_offload.live import LivePublisher
from vllm_moe_offload.predictor import GatePredictor
from vllm_moe_offload.shares import ShareEstimator
from vllm_moe_offload.store import ExpertStore, HostExpertStore, SlabLayout
from vllm_moe_offload.trace import RoutingTrace, TraceRecorder

logger = logging.getLogger("vllm.moe_offload")
_KEPT_REQUESTS = 1024


@dataclass
class LayerHandle:
    """One MoE layer of the model.

    Attributes:
        name: its name in the model.
        num_experts: experts it holds.
        top_k: experts of each token.
        tensors: gives the layer's expert tensors, ``[experts, ...]`` each.
        replace: puts other tensors in their place, by name.
        expert_map: under expert parallelism, for each expert of the model its index here, or -1.
        predictor: names the layer's experts ahead of its turn, where the options ask for it.
        following: the next layer, if it is of the same pool.
        pool: index of its pool; set by :meth:`ModelOffload.take_over`. -1: all its experts are on the device.
        index: its place among the layers of its pool.
    """

    name: str
    num_experts: int
    top_k: int
    tensors: Callable[[], Mapping[str, Tensor]]
    replace: Callable[[Mapping[str, Tensor]], None]
    expert_map: tuple[int, ...] | None = None
    predictor: GatePredictor | None = None
    following: LayerHandle | None = None
    pool: int = -1
    index: int = -1


Rows = list[tuple[str, slice]]


@dataclass
class Step:
    """A forward pass over scheduled tokens; dummy and profiling passes have none.

    Attributes:
        num_tokens: rows that are tokens; later rows are padding.
        number: steps before it.
        requests: gives ``(request, tokens)`` in order of rows, once the batch is laid out; empty where that
            is not known for this model runner.
        traced: pools whose estimator knows of the step.
    """

    num_tokens: int
    number: int
    requests: Callable[[], list[tuple[str, int]]]
    traced: set[int] = field(default_factory=set)

    @cached_property
    def rows(self) -> Rows:
        """The rows of each request; to be read when the step's batch is laid out, before the next one is."""
        rows, start = [], 0
        for request, tokens in self.requests():
            rows.append((request, slice(start, start + tokens)))
            start += tokens
        return rows


@dataclass
class Ended:
    """Requests that ended, and those that lost their cache and will be computed anew from the first token."""

    finished: list[str] = field(default_factory=list)
    restarted: list[str] = field(default_factory=list)


@dataclass
class StepNote:
    """What the host knows of a launched step: requests that ended before it, rows of those in it."""

    number: int
    ended: Ended
    rows: Rows


@dataclass
class PlainPool:
    """Layers of one shape whose experts are all on the device."""

    layout: SlabLayout
    num_layers: int
    num_experts: int


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
        groups: dict[tuple[SlabLayout, int, tuple[int, ...] | None], list[LayerHandle]] = {}
        for layer in self.layers:
            layout = SlabLayout.from_tensors(layer.tensors())
            groups.setdefault((layout, layer.num_experts, layer.expert_map), []).append(layer)
        experts_nbytes = sum(
            layout.expert_nbytes * experts * len(layers) for (layout, experts, _), layers in groups.items()
        )
        for (layout, experts, _), layers in groups.items():
            config = self.config
            if config.cache_size is not None and len(groups) > 1:
                # Each shape of layer gets the share of the budget that it has of the experts.
                share = layout.expert_nbytes * experts * len(layers) / experts_nbytes
                config = MoEOffloadConfig(cache_size=max(int(config.cache_size * share), 1))
            num_slots = config.num_slots(
                len(layers), experts, max(layer.top_k for layer in layers), layout.expert_nbytes
            )
            if num_slots == experts * len(layers) and not self.config.record_trace:
                self._keep_all(layout, layers)
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

    def _keep_all(self, layout: SlabLayout, layers: list[LayerHandle]) -> None:
        for layer in layers:
            layer.replace({name: tensor.to(self.device) for name, tensor in layer.tensors().items()})
        pool = PlainPool(layout, len(layers), layers[0].num_experts)
        self.plain.append(pool)
        total = pool.num_layers * pool.num_experts
        logger.info(
            "moe_offload: %d layers x %d experts, all %d (%.2f GiB) have a slot: plain vLLM",
            pool.num_layers,
            pool.num_experts,
            total,
            total * layout.expert_nbytes / GIB,
        )

    def _offload(self, layers: list[LayerHandle], num_slots: int) -> None:
        """Move the experts of layers of one shape into a store and give the layers a pool of slots."""
        layout = SlabLayout.from_tensors(layers[0].tensors())
        slabs = None
        if self.direct:
            slabs = torch.empty(num_slots, layout.nbytes, dtype=torch.uint8, device=self.device)
        store: ExpertStore
        if self.config.disk_path is None:
            store = self._host_store(layers, slabs)
        else:
            store = self._disk_store(layers, self.config.disk_path)
        cache = self._make_cache(store, num_slots, slabs, layers)
        self.caches.append(cache)
        for layer in layers:
            layer.replace(cache.views)
        for layer, following in itertools.pairwise(self.layers):
            if layer.pool == following.pool == len(self.caches) - 1:
                layer.following = following
        self._start_tracing(store.num_layers, len(layers[0].expert_map or ()) or store.num_experts, layers)
        total = store.num_layers * store.num_experts
        nbytes = store.layout.expert_nbytes
        logger.info(
            "moe_offload: %d layers x %d experts, %d slots (%.2f GiB) for %d experts (%.2f GiB), policy %s, "
            "misses served by the %s",
            store.num_layers,
            store.num_experts,
            num_slots,
            num_slots * nbytes / GIB,
            total,
            total * nbytes / GIB,
            self.config.policy,
            "device" if self.direct else "host",
        )

    def _take(self, layers: list[LayerHandle]) -> Iterator[Mapping[str, Tensor]]:
        """The tensors of layers of a new pool; its own copy goes before the next is asked for."""
        for index, layer in enumerate(layers):
            tensors = layer.tensors()
            yield tensors
            layer.replace({name: tensor.new_empty(0) for name, tensor in tensors.items()})
            layer.pool, layer.index = len(self.caches), index

    def _host_store(self, layers: list[LayerHandle], slabs: Tensor | None) -> HostExpertStore:
        store: HostExpertStore | None = None
        pin = None if slabs is None else slabs.is_cuda
        try:
            for tensors in self._take(layers):
                if store is None:
                    address = None if slabs is None else slabs.data_ptr()
                    store = HostExpertStore([tensors], pin_memory=pin, aligned_to=address)
                else:
                    store.add_layer(tensors)
        except MemoryError as error:
            hint = "; without locked memory choose miss='copy', which is slower" if pin else ""
            raise MemoryError(f"moe_offload: {error}{hint}") from error
        assert store is not None
        return store

    def _disk_store(self, layers: list[LayerHandle], disk_path: str) -> TieredExpertStore:
        # A file for each shape of layer and each rank, which holds its own part of the weights.
        name = f"{disk_path}.{len(self.caches)}" if self.caches else disk_path
        path = Path(name if self.num_ranks == 1 else f"{name}.rank{self.rank}")
        if path.exists():
            disk = DiskExpertStore.open(path, model_id=self.model_id)
            for layer, tensors in enumerate(self._take(layers)):
                disk.check(layer, tensors)
        else:
            disk = DiskExpertStore.create(path, self._take(layers), model_id=self.model_id)
        assert self.config.host_memory is not None
        return TieredExpertStore(disk, self.config.host_memory)

    def _make_cache(
        self, store: ExpertStore, num_slots: int, slabs: Tensor | None, layers: list[LayerHandle]
    ) -> ExpertCache | DirectCache:
        if slabs is not None:
            assert isinstance(store, HostExpertStore)
            return DirectCache(
                store,
                slabs,
                policy=self.config.policy,
                top_k=max(layer.top_k for layer in layers),
                max_tokens=self.max_tokens,
                host_slots=int(self.config.prefetch_budget * num_slots) if self._prefetches else 0,
                expert_map=layers[0].expert_map,
            )
        cache = ExpertCache(
            store,
            num_slots,
            policy=self.config.policy,
            device=self.device,
            prefetch_budget=self.config.prefetch_budget,
            debug_checks=self.config.debug_checks,
        )
        if cache.holds_all:
            cache.preload()
        return cache

    def _start_tracing(self, num_layers: int, num_experts: int, layers: list[LayerHandle]) -> None:
        known = self._known_requests(num_layers, num_experts) if not self.estimators else None
        if known is None:
            known = EAMCollection(num_layers, num_experts, self.config.eam_capacity)
            known.model_id = self.model_id
        from vllm_moe_offload import eam_kernels  # noqa: F401 - compiled here rather than in a step

        self.estimators.append(ShareEstimator(known, temperature=self.config.eam_temperature))
        if self.config.record_trace and self.recorder is None:
            self.recorder = TraceRecorder(num_layers, num_experts, layers[0].top_k)

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
