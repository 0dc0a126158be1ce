"""Which expert loses its slot. An expert's key is ``layer * num_experts + expert``.

A policy keeps the history of accesses and ranks candidates; the cache decides who is a candidate.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

Keys = Sequence[int] | npt.NDArray[np.int64]

_SHARE_CLASSES = 9
# Class of each age in passes; the last one is that of all older ages.
_AGE_CLASS = np.searchsorted([2, 3, 4, 6, 10, 18, 34, 66], np.arange(67), side="right")
_AGE_CLASSES = int(_AGE_CLASS[-1]) + 1


class EvictionPolicy(ABC):
    """History of accesses plus a rank; the candidate of lowest rank is evicted, ties the oldest access.

    Subclasses rank; they may extend the hooks, which the cache calls in this order: ``on_layer`` before a
    layer is served, ``on_accesses`` with its distinct experts in ascending order, ``on_evict``.
    """

    name: str

    def __init__(self, num_layers: int, num_experts: int) -> None:
        self.num_layers, self.num_experts = num_layers, num_experts
        self.layer = 0
        self._now = 0
        self._last_access = np.full(num_layers * num_experts, -1, dtype=np.int64)

    def on_layer(self, layer: int, share: npt.NDArray[np.float64] | None) -> None:
        """``layer`` is about to be served.

        Args:
            layer: its index.
            share: predicted activation shares ``[layers, experts]`` of the step's requests, if there are any.
        """
        self.layer = layer

    def on_accesses(self, keys: npt.NDArray[np.int64]) -> None:
        """Distinct experts of one layer were requested, in this order."""
        self._last_access[keys] = np.arange(self._now, self._now + len(keys))
        self._now += len(keys)

    def on_step(self, used: npt.NDArray[np.bool_], share: npt.NDArray[np.float64] | None) -> None:
        """A whole pass over the layers, after the fact: ``on_layer`` and ``on_accesses`` of each in turn.

        Args:
            used: bool ``[layers, experts]``, what each layer used.
            share: as for :meth:`on_layer`.
        """
        for layer in range(self.num_layers):
            self.on_layer(layer, share)
            self.on_accesses(np.flatnonzero(used[layer]) + layer * self.num_experts)

    def on_prefetch(self, key: int) -> None:
        """The expert ``key`` was fetched ahead: as young as an access, but none."""
        self._last_access[key] = self._now
        self._now += 1

    def on_evict(self, key: int) -> None:  # noqa: B027 - a hook, most policies need none
        """The expert ``key`` lost its slot."""

    def victim(self, candidates: Keys) -> int:
        """The key among ``candidates`` to evict.

        Raises:
            ValueError: there is no candidate.
        """
        return int(self.victims(candidates, 1)[0])

    def victims(self, candidates: Keys, count: int) -> npt.NDArray[np.int64]:
        """The ``count`` keys that evicting one after the other would choose, first one first.

        Raises:
            ValueError: there are fewer candidates.
        """
        keys = np.asarray(candidates, dtype=np.int64)
        if not 1 <= count <= len(keys):
            raise ValueError(f"eviction: {count} victims asked for among {len(keys)} candidates")
        rank = self._rank(keys)
        age = self._last_access[keys]
        if count < len(keys):
            # Only the candidates at or below the count-th rank need sorting.
            kept = np.flatnonzero(rank <= np.partition(rank, count - 1)[count - 1])
            keys, rank, age = keys[kept], rank[kept], age[kept]
        return keys[np.lexsort((keys, age, rank))[:count]]

    def worth(self) -> npt.NDArray[np.float64] | npt.NDArray[np.int64] | None:
        """How much each key, resident or not, is worth a slot in the passes to come, where the policy knows.

        With it an expert is admitted only in place of one that is worth less; without (None) every missing
        one is.
        """
        return None

    @abstractmethod
    def _rank(self, keys: npt.NDArray[np.int64]) -> npt.NDArray[np.float64] | npt.NDArray[np.int64]:
        """Rank of each candidate; the lowest is evicted."""


class _ByHistory(EvictionPolicy):
    """A policy to which layers are only names of experts: a pass counts as one list of accesses."""

    def on_step(self, used: npt.NDArray[np.bool_], share: npt.NDArray[np.float64] | None) -> None:
        self.on_layer(self.num_layers - 1, share)
        self.on_accesses(np.flatnonzero(used))


class LeastRecentlyUsed(_ByHistory):
    """Evict the oldest access."""

    name = "lru"

    def _rank(self, keys: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
        return self._last_access[keys]


class LeastFrequentlyUsed(_ByHistory):
    """Evict the fewest accesses ever, counted also while absent."""

    name = "lfu"

    def __init__(self, num_layers: int, num_experts: int) -> None:
        super().__init__(num_layers, num_experts)
        self._accesses = np.zeros(num_layers * num_experts, dtype=np.int64)

    def on_accesses(self, keys: npt.NDArray[np.int64]) -> None:  # noqa: D102
        super().on_accesses(keys)
        self._accesses[keys] += 1

    def worth(self) -> npt.NDArray[np.int64]:  # noqa: D102
        return self._accesses

    def _rank(self, keys: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
        return self._accesses[keys]


class ActivationAware(EvictionPolicy):
    """Evict what is expected to be needed latest, by predicted activation and by recency.

    MoE-Infinity evicts the least product of predicted share and layer proximity. On real routing that loses
    to LRU, since consecutive tokens share experts beyond what their request's matrix says. Here experience
    weighs the two signals: for each class of (predicted share, passes since the last use) the policy counts
    how often experts were used in the next pass, which gives a probability ``p``. It ranks by the expected
    number of layers until the next use, ``ahead + L * (1 / p - 1)``, where ``ahead`` is the distance from the
    running layer to the expert's.
    """

    name = "eam"
    _PASSES_REMEMBERED = 256

    def __init__(self, num_layers: int, num_experts: int) -> None:
        super().__init__(num_layers, num_experts)
        self._share: npt.NDArray[np.float64] | None = None
        self._pass = 0
        self._last_pass = np.full(num_layers * num_experts, -_AGE_CLASS.size, dtype=np.int64)
        self._distinct = 1.0  # experts of a layer in a pass, running mean
        self._tried = np.zeros(_SHARE_CLASSES * _AGE_CLASSES)
        self._used = np.zeros(_SHARE_CLASSES * _AGE_CLASSES)
        self._running: tuple[npt.NDArray[np.int64], npt.NDArray[np.bool_]] | None = None

    def on_layer(self, layer: int, share: npt.NDArray[np.float64] | None) -> None:  # noqa: D102
        again = layer == self.layer and self.num_layers > 1  # a further wave of the layer that runs
        if self._running is None or not again:
            self._learn()
            self._pass += layer <= self.layer
            self._share = None if share is None else share.reshape(-1)
            first = layer * self.num_experts
            classes = self._classes(np.arange(first, first + self.num_experts), self._pass)[0]
            self._running = classes, np.zeros(self.num_experts, dtype=np.bool_)
        super().on_layer(layer, share)
        self._share = None if share is None else share.reshape(-1)

    def worth(self) -> npt.NDArray[np.float64] | None:  # noqa: D102
        # Over a whole pass every layer comes once, whatever its distance.
        return self._share

    def on_accesses(self, keys: npt.NDArray[np.int64]) -> None:  # noqa: D102
        super().on_accesses(keys)
        self._last_pass[keys] = self._pass
        if self._running is not None:
            self._running[1][keys - self.layer * self.num_experts] = True

    def on_step(self, used: npt.NDArray[np.bool_], share: npt.NDArray[np.float64] | None) -> None:  # noqa: D102
        layers, experts = used.shape
        counts = used.sum(axis=1).tolist()
        if layers == 1 or not all(counts):
            super().on_step(used, share)  # in a pass with gaps the layers' turns differ
            return
        self.on_layer(0, share)
        assert self._running is not None
        classes = np.empty(used.shape, dtype=np.int64)
        classes[0] = self._running[0]
        # A layer's classes are taken when its turn comes, with the mean that the layers before it left.
        distinct = np.empty(layers)
        for layer, count in enumerate(counts):
            distinct[layer] = self._distinct
            if layer < layers - 1:
                self._distinct += (count - self._distinct) / layers
        keys = np.arange(experts, layers * experts)
        classes[1:] = self._classes(keys, self._pass, distinct[1:].repeat(experts))[0].reshape(-1, experts)
        self._count(classes[:-1], used[:-1])
        EvictionPolicy.on_layer(self, layers - 1, share)
        keys = np.flatnonzero(used)
        EvictionPolicy.on_accesses(self, keys)
        self._last_pass[keys] = self._pass
        self._running = classes[-1], used[-1].copy()

    def _learn(self) -> None:
        """Learn from what the layer that just ran used."""
        if self._running is None or not self._running[1].any():
            return
        classes, used = self._running
        self._count(classes[None], used[None])
        self._distinct += (int(used.sum()) - self._distinct) / self.num_layers

    def _count(self, classes: npt.NDArray[np.int64], used: npt.NDArray[np.bool_]) -> None:
        """Count what layers ``[n, experts]`` used, by the classes that the experts were in before."""
        limit = self._PASSES_REMEMBERED * self.num_layers * self.num_experts
        # The layer with which the memory is full; what comes after it counts in full.
        full = max(int((limit - self._tried.sum()) // self.num_experts), 0) + 1
        for part in (slice(0, full), slice(full, None)):
            size = len(self._tried)
            self._tried += np.bincount(classes[part].reshape(-1), minlength=size)
            self._used += np.bincount(classes[part][used[part]], minlength=size)
            if self._tried.sum() > limit:
                self._tried /= 2
                self._used /= 2

    def _classes(
        self,
        keys: npt.NDArray[np.int64],
        due: int | npt.NDArray[np.int64],
        distinct: float | npt.NDArray[np.float64] | None = None,
    ) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.float64]]:
        """Class of each key in its pass ``due``, and the probability that the share alone suggests.

        Args:
            keys: the keys.
            due: the pass of each.
            distinct: expected experts of its layer; default: as known now.
        """
        distinct = self._distinct if distinct is None else distinct
        if self._share is None:
            probability = np.broadcast_to(np.minimum(distinct / self.num_experts, 1.0), keys.shape)
        else:
            probability = -np.expm1(-self._share[keys] * distinct)
        # The binary exponent: shares within a factor of two are one class.
        exponent = np.frexp(probability)[1]
        by_share = np.maximum(np.minimum(exponent, 0) + _SHARE_CLASSES - 1, 0)
        by_age = _AGE_CLASS[np.minimum(due - self._last_pass[keys], _AGE_CLASS.size - 1)]
        return by_share.astype(np.int64) * _AGE_CLASSES + by_age, probability

    def _rank(self, keys: npt.NDArray[np.int64]) -> npt.NDArray[np.float64]:
        ahead = keys // self.num_experts - self.layer
        later = ahead <= 0  # its turn in the running pass is over
        classes, suggested = self._classes(keys, self._pass + later)
        # Two pass's worth of trust in the prediction until there is experience.
        probability = (self._used[classes] + 2 * suggested) / (self._tried[classes] + 2)
        return -(ahead + self.num_layers * (later + 1 / np.maximum(probability, 1e-6)))


class ActivationAwareReference(_ByHistory):
    """As MoE-Infinity's code evicts: fewest accesses while resident, regardless of any prediction."""

    name = "eam_reference"

    def __init__(self, num_layers: int, num_experts: int) -> None:
        super().__init__(num_layers, num_experts)
        self._visits = np.zeros(num_layers * num_experts, dtype=np.int64)

    def on_accesses(self, keys: npt.NDArray[np.int64]) -> None:  # noqa: D102
        super().on_accesses(keys)
        self._visits[keys] += 1

    def on_evict(self, key: int) -> None:  # noqa: D102
        self._visits[key] = 0

    def _rank(self, keys: npt.NDArray[np.int64]) -> npt.NDArray[np.float64]:
        return self._visits[keys].astype(np.float64)


class LeastStale(EvictionPolicy):
    """Evict what was not used in the running pass over the layers, stalest first; then the layer just passed.

    After SpecMD: within one pass an expert of an earlier layer is needed again last, so that among experts
    equally stale (by passes) those of layers already passed go before those still to come.
    """

    name = "least_stale"

    def __init__(self, num_layers: int, num_experts: int) -> None:
        super().__init__(num_layers, num_experts)
        self._pass = 0
        self._last_pass = np.full(num_layers * num_experts, -1, dtype=np.int64)

    def on_layer(self, layer: int, share: npt.NDArray[np.float64] | None) -> None:  # noqa: D102
        self._pass += layer < self.layer or (layer == self.layer and self.num_layers == 1)
        super().on_layer(layer, share)

    def on_accesses(self, keys: npt.NDArray[np.int64]) -> None:  # noqa: D102
        super().on_accesses(keys)
        self._last_pass[keys] = self._pass

    def _rank(self, keys: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
        ahead = (keys // self.num_experts - self.layer) % self.num_layers
        passed = keys // self.num_experts < self.layer
        # An expert of a layer still to come was last due in the previous pass.
        staleness = self._pass - self._last_pass[keys] - ~passed
        return -staleness * self.num_layers - ahead


_POLICIES: dict[str, type[EvictionPolicy]] = {
    policy.name: policy
    for policy in (
        LeastRecentlyUsed,
        LeastFrequentlyUsed,
        LeastStale,
        ActivationAware,
        ActivationAwareReference,
    )
}


def make_policy(name: str, num_layers: int, num_experts: int) -> EvictionPolicy:
    """A fresh policy by name.

    Raises:
        ValueError: unknown name.
    """
    if name not in _POLICIES:
        raise ValueError(f"moe_offload: policy must be one of {', '.join(sorted(_POLICIES))}; got {name!r}")
    return _POLICIES[name](num_layers, num_experts)
