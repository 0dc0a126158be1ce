"""From loaded layers to a pool: experts into a store, slots on the device, slots to the layers."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from vllm_moe_offload.cache import ExpertCache
from vllm_moe_offload.config import GIB, MoEOffloadConfig
from vllm_moe_offload.direct import DirectCache
from vllm_moe_offload.disk_store import DiskExpertStore, TieredExpertStore
from vllm_moe_offload.predictor import GatePredictor
from vllm_moe_offload.store import ExpertStore, HostExpertStore, SlabLayout

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
        release: makes the layer the framework's own again, where the device keeps all its experts.
        expert_map: under expert parallelism, for each expert of the model its index here, or -1.
        predictor: names the layer's experts ahead of its turn, where the options ask for it.
        following: the next layer, if it is of the same pool.
        pool: index of its pool; set by ``ModelOffload.take_over``. -1: all its experts are on the device.
        index: its place among the layers of its pool.
    """

    name: str
    num_experts: int
    top_k: int
    tensors: Callable[[], Mapping[str, Tensor]]
    replace: Callable[[Mapping[str, Tensor]], None]
    release: Callable[[], None]
    expert_map: tuple[int, ...] | None = None
    predictor: GatePredictor | None = None
    following: LayerHandle | None = None
    pool: int = -1
    index: int = -1


@dataclass
class PlainPool:
    """Layers of one shape whose experts are all on the device."""

    layout: SlabLayout
    num_layers: int
    num_experts: int


Group = tuple[SlabLayout, list[LayerHandle]]


def alike(layers: Sequence[LayerHandle]) -> list[Group]:
    """Layers that can share a pool: of one shape, and with the same experts on this rank."""
    groups: dict[tuple[SlabLayout, int, tuple[int, ...] | None], list[LayerHandle]] = {}
    for layer in layers:
        layout = SlabLayout.from_tensors(layer.tensors())
        groups.setdefault((layout, layer.num_experts, layer.expert_map), []).append(layer)
    return [(layout, group) for (layout, _, _), group in groups.items()]


def slots_of(config: MoEOffloadConfig, groups: Sequence[Group]) -> list[int]:
    """Slots of each group's pool, by the options.

    Raises:
        ValueError: they do not hold the experts of one token.
    """
    sizes = [layout.expert_nbytes * layers[0].num_experts * len(layers) for layout, layers in groups]
    slots = []
    for (layout, layers), size in zip(groups, sizes, strict=True):
        part = config
        if config.cache_size is not None and len(groups) > 1:
            # Each group gets the share of the budget that it has of the experts.
            part = MoEOffloadConfig(cache_size=max(int(config.cache_size * (size / sum(sizes))), 1))
        top_k = max(layer.top_k for layer in layers)
        slots.append(part.num_slots(len(layers), layers[0].num_experts, top_k, layout.expert_nbytes))
    return slots


def keep_all(layout: SlabLayout, layers: Sequence[LayerHandle], device: torch.device) -> PlainPool:
    """Give every expert of the layers a place on the device; the layers are vLLM's own again."""
    for layer in layers:
        layer.replace({name: tensor.to(device) for name, tensor in layer.tensors().items()})
        layer.release()
    pool = PlainPool(layout, len(layers), layers[0].num_experts)
    total = pool.num_layers * pool.num_experts
    logger.info(
        "moe_offload: %d layers x %d experts, all %d (%.2f GiB) have a slot: plain vLLM",
        pool.num_layers,
        pool.num_experts,
        total,
        total * layout.expert_nbytes / GIB,
    )
    return pool


@dataclass(frozen=True)
class PoolMaker:
    """Makes one pool of slots.

    Attributes:
        config: the options.
        device: where the model runs.
        direct: whether the device manages the pool.
        max_tokens: most tokens of a step.
        model_id: names the model; files of experts are tied to it.
        rank, num_ranks: each rank has its own part of the experts, hence a file of its own.
        index: pools before this one.
    """

    config: MoEOffloadConfig
    device: torch.device
    direct: bool
    max_tokens: int
    model_id: str
    rank: int
    num_ranks: int
    index: int

    def make(self, layers: list[LayerHandle], num_slots: int) -> ExpertCache | DirectCache:
        """Move the experts of the layers into a store and give the layers slots.

        Raises:
            MemoryError: the host or the device lacks the memory.
        """
        layout = SlabLayout.from_tensors(layers[0].tensors())
        slabs = None
        if self.direct:
            slabs = torch.empty(num_slots, layout.nbytes, dtype=torch.uint8, device=self.device)
        store: ExpertStore
        if self.config.disk_path is None:
            store = self._host_store(layers, slabs)
        else:
            store = self._disk_store(layers, self.config.disk_path)
        cache = self._cache(store, num_slots, slabs, layers)
        for layer in layers:
            layer.replace(cache.views)
        total = store.num_layers * store.num_experts
        logger.info(
            "moe_offload: %d layers x %d experts, %d slots (%.2f GiB) for %d experts (%.2f GiB), policy %s, "
            "misses served by the %s",
            store.num_layers,
            store.num_experts,
            num_slots,
            num_slots * layout.expert_nbytes / GIB,
            total,
            total * layout.expert_nbytes / GIB,
            self.config.policy,
            "device" if self.direct else "host",
        )
        return cache

    def _take(self, layers: list[LayerHandle]) -> Iterator[Mapping[str, Tensor]]:
        """The tensors of each layer; its own copy goes before the next is asked for."""
        for index, layer in enumerate(layers):
            tensors = layer.tensors()
            yield tensors
            layer.replace({name: tensor.new_empty(0) for name, tensor in tensors.items()})
            layer.pool, layer.index = self.index, index

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
        name = f"{disk_path}.{self.index}" if self.index else disk_path
        path = Path(name if self.num_ranks == 1 else f"{name}.rank{self.rank}")
        if path.exists():
            disk = DiskExpertStore.open(path, model_id=self.model_id)
            for layer, tensors in enumerate(self._take(layers)):
                disk.check(layer, tensors)
        else:
            disk = DiskExpertStore.create(path, self._take(layers), model_id=self.model_id)
        assert self.config.host_memory is not None
        return TieredExpertStore(disk, self.config.host_memory)

    def _cache(
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
                host_slots=int(self.config.prefetch_budget * num_slots)
                if "eam" in self.config.prefetch
                else 0,
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
