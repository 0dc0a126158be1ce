"""The host serves a layer's misses: copies, then vLLM's kernel, in waves where the experts do not fit."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from vllm_moe_offload.cache import ExpertCache
from vllm_moe_offload.kernels import remap_expert_ids
from vllm_moe_offload.pools import LayerHandle
from vllm_moe_offload.runtime import ModelOffload


class CopyServing:
    """What a layer does at each forward pass when its pool is an :class:`ExpertCache`.

    Attributes:
        _apply: the kernel on ``(x, topk_weights, topk_ids, row_of_expert=None)``: on rows, or on ids where
            ``row_of_expert`` ``[experts]`` says which rows they are, -1 for those to leave out.
        _plain_tiles: makes a context of ``x`` in which the kernel works as it would with all experts.
        _kernel: the kernel; where ``_has_tiles``, its ``moe_sum`` adds up the experts of a token.
        _has_tiles: whether results depend on the number of rows.
    """

    offload: ModelOffload
    local_num_experts: int
    global_num_experts: int
    _handle: LayerHandle
    _apply: Callable[..., Tensor]
    _plain_tiles: Callable[[Tensor], AbstractContextManager[None]]
    _kernel: Any
    _has_tiles: Any

    def serve(self, x: Tensor, topk_weights: Tensor, topk_ids: Tensor) -> Tensor:
        """Run the layer: experts into slots, then vLLM's kernel, in waves if they do not fit at once."""
        offload = self.offload
        cache = offload.caches[self._handle.pool]
        assert isinstance(cache, ExpertCache)
        if offload.step is None:
            # Profiling: the output is not used, only its cost counts.
            return self._apply(x, topk_weights, topk_ids % min(cache.num_slots, self.local_num_experts))
        rows = min(offload.step.num_tokens, topk_ids.shape[0])
        if rows < topk_ids.shape[0]:
            # Padding rows hold leftovers: they must not cause copies.
            topk_ids = topk_ids.clone()
            topk_ids[rows:] = topk_ids[0]
        chosen = topk_ids[:rows].cpu().numpy()
        layer = self._handle.index
        needed = np.unique(chosen)
        offload.before_layer(self._handle)
        if len(needed) <= cache.num_slots:
            with _resident(cache, layer, needed):
                self._fetch_ahead(x[:rows], cache)
                output = self._run(x, topk_weights, topk_ids, cache.table_row(layer))
        elif self._has_tiles:
            output = self._run_expert_waves(x, topk_weights, topk_ids, needed, cache)
        else:
            output = self._run_token_waves(x, topk_weights, topk_ids, chosen, cache)
        offload.after_layer(self._handle, chosen)
        return output

    def _fetch_ahead(self, x: Tensor, cache: ExpertCache) -> None:
        """Start copies of what the next layer's gate names, behind those of the layer that runs."""
        following = self._handle.following
        if following is None or following.predictor is None:
            return
        for expert in np.unique(following.predictor.predict(x).cpu().numpy()):
            if not cache.prefetch(following.index, int(expert)):
                return

    def _run(self, x: Tensor, topk_weights: Tensor, topk_ids: Tensor, slot_of_expert: Tensor) -> Tensor:
        """vLLM's kernel on slots, by the path and with the tiles it would choose for the full weights."""
        if not self._has_tiles:
            return self._apply(x, topk_weights, remap_expert_ids(topk_ids, slot_of_expert).to(topk_ids.dtype))
        with self._plain_tiles(x):
            # The rule of vLLM's _prepare_expert_assignment for batches too small to be sorted by expert.
            if topk_ids.numel() * 4 <= self.global_num_experts:
                slots = remap_expert_ids(topk_ids, slot_of_expert).to(topk_ids.dtype)
                return self._apply(x, topk_weights, slots)
            return self._apply(x, topk_weights, topk_ids, slot_of_expert)

    def _run_token_waves(
        self,
        x: Tensor,
        topk_weights: Tensor,
        topk_ids: Tensor,
        chosen: npt.NDArray[np.integer],
        cache: ExpertCache,
    ) -> Tensor:
        """Consecutive tokens whose experts fit together: exact where a token's result is its own affair."""
        layer = self._handle.index
        output = torch.empty_like(x)
        waves = list(token_waves(chosen, cache.num_slots))
        cache.counters.waves += len(waves) - 1
        for wave in waves:
            with _resident(cache, layer, np.unique(chosen[wave])):
                output[wave] = self._run(x[wave], topk_weights[wave], topk_ids[wave], cache.table_row(layer))
        return output

    def _run_expert_waves(
        self,
        x: Tensor,
        topk_weights: Tensor,
        topk_ids: Tensor,
        needed: npt.NDArray[np.integer],
        cache: ExpertCache,
    ) -> Tensor:
        """All tokens, some experts at a time; the sum over a token's experts is taken once, at the end.

        The number of tokens, on which the kernel's tiles depend, stays that of the batch, and each missing
        expert is copied once.
        """
        layer = self._handle.index
        waves = expert_waves(needed, cache.resident(layer), cache.num_slots)
        cache.counters.waves += len(waves) - 1
        kernel = self._kernel
        reduce = kernel.moe_sum
        terms: Tensor | None = None
        slot_of_expert = torch.empty_like(cache.table_row(layer))

        def collect(part: Tensor, output: Tensor) -> None:
            nonlocal terms
            ours = (slot_of_expert[topk_ids.long()] >= 0).unsqueeze(-1)
            terms = part.clone() if terms is None else torch.where(ours, part, terms)
            reduce(terms, output)

        kernel.moe_sum = collect
        try:
            with self._plain_tiles(x):
                for wave in waves:
                    with _resident(cache, layer, wave):
                        slot_of_expert.fill_(-1)
                        index = torch.from_numpy(wave).to(slot_of_expert.device)
                        slot_of_expert[index] = cache.table_row(layer)[index]
                        output = self._apply(x, topk_weights, topk_ids, slot_of_expert)
        finally:
            del kernel.moe_sum
        return output


@contextmanager
def _resident(cache: ExpertCache, layer: int, experts: npt.NDArray[np.integer]) -> Iterator[None]:
    cache.ensure(layer, experts)
    try:
        yield
    finally:
        cache.release(layer)


def token_waves(chosen: npt.NDArray[np.integer], num_slots: int) -> Iterator[slice]:
    """Split token rows into consecutive runs whose distinct experts fit into the slots.

    Args:
        chosen: ``[tokens, top_k]`` expert ids, ``top_k <= num_slots``.
        num_slots: slots.
    """
    start, union = 0, set[int]()
    for row, experts in enumerate(chosen.tolist()):
        grown = union.union(experts)
        if len(grown) > num_slots:
            yield slice(start, row)
            start, grown = row, set(experts)
        union = grown
    yield slice(start, len(chosen))


def expert_waves(
    needed: npt.NDArray[np.integer], resident: Sequence[int] | frozenset[int], num_slots: int
) -> list[npt.NDArray[np.integer]]:
    """Split the experts a layer needs into waves of at most ``num_slots``, residents first.

    Then no resident is evicted before it was used, so that each missing expert moves exactly once.
    """
    here = np.isin(needed, list(resident))
    order = np.concatenate([needed[here], needed[~here]])
    return [order[start : start + num_slots] for start in range(0, len(order), num_slots)]
