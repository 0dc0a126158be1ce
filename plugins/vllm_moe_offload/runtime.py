"""What one engine's layers share: options, pools of slots, the current step. No framework in here.

Layers announce themselves while the model is built (``announce``), hand over their experts once these are
loaded (``take_over``), and then ask their pool for experts at every forward pass (``caches``).
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

from vllm_moe_offload.cache import ExpertCache
from vllm_moe_offload.config import GIB, MoEOffloadConfig
from vllm_moe_offload.store import HostExpertStore, SlabLayout

logger = logging.getLogger("vllm.moe_offload")


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
    """

    num_tokens: int


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
    """

    config: MoEOffloadConfig
    device: torch.device
    contiguous: bool
    layers: list[LayerHandle] = field(default_factory=list)
    caches: list[ExpertCache] = field(default_factory=list)
    step: Step | None = None

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
        total = store.num_layers * store.num_experts
        if num_slots == total:
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
            "prefetch": self.config.prefetch,
        }
        return report
