"""What one engine's layers share: options, pools of slots, the current step. No framework in here.

Layers announce themselves while the model is built (``announce``), hand over their experts once these are
loaded (``take_over``), and then ask their pool for experts at every forward pass (``caches``).
"""

from __future__ import annotations

import logging
from collections import OrderedDict
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from vllm_moe_offload.cache import ExpertCache
from vllm_moe_offload.config import GIB, MoEOffloadConfig
from vllm_moe_offload.eam import EAMCollection
from vllm_moe_offload.shares import ShareEstimator
from vllm_moe_offload.store import HostExpertStore, SlabLayout
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
        pool: index of its pool; set by :meth:`ModelOffload.take_over`.
        index: its place among the layers of its pool.
    """

    name: str
    num_experts: int
    top_k: int
    tensors: Callable[[], Mapping[str, Tensor]]
    replace: Callable[[Mapping[str, Tensor]], None]
    pool: int = -1
    index: int = -1


@dataclass
class Step:
    """A forward pass over scheduled tokens; dummy and profiling passes have none.

    Attributes:
        num_tokens: rows that are tokens; later rows are padding.
        number: steps before it.
        requests: gives ``(request, tokens)`` in order of rows, once the batch is laid out; None where that is
            not known for this model runner.
        traced: pools whose estimator knows of the step.
    """

    num_tokens: int
    number: int
    requests: Callable[[], list[tuple[str, int]]] | None = None
    traced: set[int] = field(default_factory=set)

    @cached_property
    def rows(self) -> list[tuple[str, slice]]:
        """The rows of each request; to be read inside the forward pass."""
        rows, start = [], 0
        for request, tokens in self.requests() if self.requests else ():
            rows.append((request, slice(start, start + tokens)))
            start += tokens
        return rows


@dataclass
class ModelOffload:
    """Expert offload of one engine in one process.

    Attributes:
        config: the options.
        device: where the model runs.
        contiguous: see :class:`ExpertCache`.
        layers: announced layers, in order of the model.
        caches: one for each shape of layer; empty before :meth:`take_over`.
        step: the step that is running, or None.
        steps: steps so far.
        estimators: one for each pool.
        recorder: present if the options ask for a trace.
        finished: matrices of the last finished requests, of the first pool.
    """

    config: MoEOffloadConfig
    device: torch.device
    contiguous: bool
    layers: list[LayerHandle] = field(default_factory=list)
    caches: list[ExpertCache] = field(default_factory=list)
    step: Step | None = None
    steps: int = 0
    estimators: list[ShareEstimator] = field(default_factory=list)
    recorder: TraceRecorder | None = None
    finished: OrderedDict[str, npt.NDArray[np.int64]] = field(default_factory=OrderedDict)

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
        if self.caches:
            return
        groups: dict[tuple[SlabLayout, int], list[LayerHandle]] = {}
        for layer in self.layers:
            layout = SlabLayout.from_tensors(layer.tensors())
            groups.setdefault((layout, layer.num_experts), []).append(layer)
        experts_nbytes = sum(
            layout.expert_nbytes * experts * len(layers) for (layout, experts), layers in groups.items()
        )
        for pool, ((layout, experts), layers) in enumerate(groups.items()):
            config = self.config
            if config.cache_size is not None and len(groups) > 1:
                # Each shape of layer gets the share of the budget that it has of the experts.
                share = layout.expert_nbytes * experts * len(layers) / experts_nbytes
                config = MoEOffloadConfig(cache_size=max(int(config.cache_size * share), 1))
            num_slots = config.num_slots(
                len(layers), experts, max(layer.top_k for layer in layers), layout.expert_nbytes
            )
            self.caches.append(self._make_cache(pool, layers, num_slots))

    def before_layer(self, layer: LayerHandle) -> None:
        """Give the layer's pool the shares that are predicted for the running step."""
        estimator = self.estimators[layer.pool]
        assert self.step is not None
        if self.step.requests is None:
            return
        if layer.pool not in self.step.traced:
            self.step.traced.add(layer.pool)
            tokens = {request: rows.stop - rows.start for request, rows in self.step.rows}
            estimator.start_step(tokens)
        cache = self.caches[layer.pool]
        if self.config.policy == "eam" and not cache.holds_all:
            cache.share = estimator.share()

    def after_layer(self, layer: LayerHandle, chosen: npt.NDArray[np.integer]) -> None:
        """Trace what the router chose, ``[tokens, top_k]``, for the step's requests."""
        assert self.step is not None
        if self.step.requests is None:
            return
        rows = self.step.rows
        self.estimators[layer.pool].observe(layer.index, {request: chosen[part] for request, part in rows})
        if self.recorder is not None and layer.pool == 0:
            self.recorder.record(self.step.number, layer.index, rows, chosen)

    def forget(self, finished: Iterable[str], restarted: Iterable[str]) -> None:
        """Requests ended, or lost their cache and will be computed anew from their first token."""
        for pool, estimator in enumerate(self.estimators):
            for request in finished:
                if request in estimator.tracer.live:
                    matrix = estimator.finish(request)
                    if pool == 0:
                        self.finished[request] = matrix
            for request in restarted:
                estimator.discard(request)
        while len(self.finished) > _KEPT_REQUESTS:
            self.finished.popitem(last=False)

    def request_eams(self) -> dict[str, npt.NDArray[np.int64]]:
        """Matrices of the last finished requests."""
        return dict(self.finished)

    def collect_trace(self) -> RoutingTrace:
        """The routing recorded so far, which is cleared; RuntimeError unless ``record_trace`` is set."""
        if self.recorder is None:
            raise RuntimeError("moe_offload: nothing is recorded; set record_trace in the options")
        return self.recorder.collect()

    def _make_cache(self, pool: int, layers: list[LayerHandle], num_slots: int) -> ExpertCache:
        store: HostExpertStore | None = None
        for index, layer in enumerate(layers):
            tensors = layer.tensors()
            if store is None:
                store = HostExpertStore([tensors])
            else:
                store.add_layer(tensors)
            # The layer's own copy goes at once, so that the host holds at most one layer twice.
            layer.replace({name: tensor.new_empty(0) for name, tensor in tensors.items()})
            layer.pool, layer.index = pool, index
            del tensors
        assert store is not None
        cache = ExpertCache(
            store,
            num_slots,
            policy=self.config.policy,
            device=self.device,
            prefetch_budget=self.config.prefetch_budget,
            contiguous=self.contiguous,
            debug_checks=self.config.debug_checks,
        )
        for layer in layers:
            layer.replace(cache.views)
        known = EAMCollection(store.num_layers, store.num_experts, self.config.eam_capacity)
        if self.config.eam_path is not None and Path(self.config.eam_path).exists():
            known = EAMCollection.load(self.config.eam_path)
            if (known.num_layers, known.num_experts) != (store.num_layers, store.num_experts):
                raise ValueError(
                    f"moe_offload: {self.config.eam_path} was recorded with {known.num_layers} layers of "
                    f"{known.num_experts} experts, this model has {store.num_layers} of {store.num_experts}"
                )
        self.estimators.append(ShareEstimator(known, temperature=self.config.eam_temperature))
        if self.config.record_trace and pool == 0:
            self.recorder = TraceRecorder(store.num_layers, store.num_experts, layers[0].top_k)
        total = store.num_layers * store.num_experts
        if cache.holds_all:
            cache.preload()
        nbytes = store.layout.expert_nbytes
        logger.info(
            "moe_offload: %d layers x %d experts, %d slots (%.2f GiB) for %d experts (%.2f GiB), policy %s",
            store.num_layers,
            store.num_experts,
            num_slots,
            num_slots * nbytes / GIB,
            total,
            total * nbytes / GIB,
            self.config.policy,
        )
        return cache

    def stats(self) -> dict[str, int | float | str]:
        """Counters of all pools, summed, with the sizes of the pools."""
        self.take_over()
        report: dict[str, int | float | str] = {}
        for cache in self.caches:
            for name, value in cache.stats.items():
                report[name] = report.get(name, 0) + value  # type: ignore[operator]
        stores = [cache.store for cache in self.caches]
        report |= {
            "num_slots": sum(cache.num_slots for cache in self.caches),
            "num_layers": sum(store.num_layers for store in stores),
            "num_experts": max(store.num_experts for store in stores),
            "expert_nbytes": max(store.layout.expert_nbytes for store in stores),
            "policy": self.config.policy,
            "prefetch": "none",  # experts are fetched on demand so far
        }
        return report
