"""What to fetch ahead, most urgent first, with few copies on the link so that a demand waits for few."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable

import numpy as np

from vllm_moe_offload.cache import ExpertCache
from vllm_moe_offload.predictor import Shares, prefetch_priority


class PrefetchQueue:
    """Queue in front of one :class:`ExpertCache`.

    Queued entries never reach the link before :meth:`pump`; a later prediction replaces all of them. With
    ``in_flight=1`` an expert on demand waits for at most one copy.

    Args:
        cache: where the experts go.
        in_flight: prefetches on the link at a time.
    """

    def __init__(self, cache: ExpertCache, *, in_flight: int = 1) -> None:
        self._cache, self._limit = cache, in_flight
        self._wanted: deque[tuple[int, int]] = deque()

    def __len__(self) -> int:
        return len(self._wanted)

    def replace(self, wanted: Iterable[tuple[int, int]]) -> None:
        """Queue ``(layer, expert)`` pairs, most urgent first, in place of what was queued."""
        self._wanted = deque(wanted)

    def pump(self) -> None:
        """Start copies while fewer than the limit are in flight; stop where the cache has no room."""
        while self._wanted and self._cache.in_flight < self._limit:
            if not self._cache.prefetch(*self._wanted[0]):
                return
            self._wanted.popleft()


def by_priority(share: Shares, layer: int, count: int) -> list[tuple[int, int]]:
    """The ``count`` experts of later layers with the highest prefetch priority, highest first.

    Args:
        share: predicted shares ``[layers, experts]``.
        layer: the layer that runs; its own experts are fetched on demand.
        count: entries wanted.
    """
    priority = prefetch_priority(share, layer)
    priority[: layer + 1] = 0
    flat = priority.reshape(-1)
    count = min(count, int((flat > 0).sum()))
    if count == 0:
        return []
    top = np.argpartition(-flat, count - 1)[:count]
    top = top[np.lexsort((top, -flat[top]))]
    return [divmod(int(key), share.shape[1]) for key in top]
