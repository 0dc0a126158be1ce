"""Selectors: which trajectories a batch takes. The same classes serve as removers."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import TYPE_CHECKING, Literal

import numpy as np
import torch

from rl_replay_gear import loops
from rl_replay_gear.prefix import PrefixSumTree
from rl_replay_gear.randomness import CounterGenerator, Generator, uniforms

if TYPE_CHECKING:
    from rl_replay_gear.index import SlotIndex
    from rl_replay_gear.table import TrajectoryTable

_MAX_ROUNDS = 8


class Selector(ABC):
    """Draws slots of a table. A selector serves one table, which tells it of every change.

    ``select`` is given the uniform numbers it may use through ``generator`` and returns slots (int64 [B]) and
    the probability of each item in a first draw (float64 [B]).
    """

    index: SlotIndex
    _owner: int | None = None

    def attach(self, table: TrajectoryTable) -> None:
        """Serve ``table`` from now on; ValueError when the selector already serves another one."""
        if self._owner == id(table.index):
            return
        if self._owner is not None:
            raise ValueError(f"this {type(self).__name__} already serves another table; create a new one")
        self._owner = id(table.index)
        self.index = table.index
        self._attached()

    def serves(self, table: TrajectoryTable) -> bool:
        """Whether the selector is attached to ``table``."""
        return self._owner == id(table.index)

    def detach(self) -> None:
        """Serve no table, so that another one may be attached."""
        self._owner = None

    def _attached(self) -> None:  # noqa: B027 (most selectors keep nothing of their own)
        """Read what the table already holds."""

    @abstractmethod
    def select(self, batch_size: int, generator: Generator | None = None) -> tuple[np.ndarray, np.ndarray]:
        """Draw ``batch_size`` slots."""

    def evict(self, number: int) -> int:
        """As a remover: the slot that eviction ``number`` of the table takes."""
        return int(self.select(1, CounterGenerator(0, number))[0][0])

    @property
    def num_items(self) -> int:
        """Number of items among which is drawn."""
        return self.index.num_selectable

    def weights(self, probability: np.ndarray) -> np.ndarray | None:
        """Importance weights (float32) of the last draw's items, None where all are 1."""
        return None

    def inserted(self, slots: np.ndarray) -> None:  # noqa: B027
        """Slots have become selectable."""

    def removed(self, slots: np.ndarray) -> None:  # noqa: B027
        """Slots are no longer selectable."""

    def updated(self, slots: np.ndarray) -> None:  # noqa: B027
        """Priorities of slots have changed."""

    def state_dict(self) -> dict[str, object]:
        """JSON-able state beyond what the table holds."""
        return {}

    def load_state_dict(self, state: dict[str, object]) -> None:  # noqa: B027
        """Inverse of ``state_dict``."""


def _require(count: int, available: int) -> None:
    if count > available:
        raise ValueError(f"cannot select {count} distinct trajectories from a table of {available}")


class Drawn(Selector):
    """Selectors that draw from a law, with or without replacement."""

    replacement: bool
    stratified: bool = False
    _seen: np.ndarray | None = None  # the last draw that took each slot
    _stamp = 0

    @abstractmethod
    def draw(self, u: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Slots at the quantiles ``u`` and the probability of each."""

    @abstractmethod
    def slot_probability(self, slots: np.ndarray) -> np.ndarray:
        """Probability of each slot in a first draw; sums to 1 over all selectable slots."""

    def item_probability(self, slots: np.ndarray) -> np.ndarray:
        """Probability of the item drawn: the trajectory, or one of its steps."""
        return self.slot_probability(slots)

    @abstractmethod
    def mass(self) -> tuple[float, int, float]:
        """Total weight, number of items and smallest positive weight of an item (inf if none)."""

    def global_weights(
        self, num_items: int, smallest: float
    ) -> Callable[[torch.Tensor], torch.Tensor | None]:
        """Importance weights when this table is one shard of ``num_items`` items, given their
        probabilities.
        """
        return lambda _: None

    def points(self, count: int, generator: Generator | None = None) -> np.ndarray:
        """``count`` quantiles for ``draw``: independent, or one in each of ``count`` equal strata."""
        u = uniforms(generator, count)
        if not self.stratified:
            return u
        # In random order, so that every position of a batch (and every rank) has the same law.
        stratum = np.argsort(uniforms(generator, count), kind="stable")
        return np.minimum((stratum + u) / count, 1.0 - 2.0**-53)

    def select(self, batch_size: int, generator: Generator | None = None) -> tuple[np.ndarray, np.ndarray]:
        """Independent or stratified draws, or successive sampling when ``replacement`` is False."""
        if self.replacement:
            return self.draw(self.points(batch_size, generator))
        slots = self._successive(batch_size, lambda count: uniforms(generator, count))
        return slots, self.item_probability(slots)

    def _successive(self, count: int, source: Callable[[int], np.ndarray]) -> np.ndarray:
        """Draws with repeats skipped; race keys decide when that would take too many rounds."""
        _require(count, self.index.num_selectable)
        if self._seen is None:
            self._seen = np.zeros(self.index.capacity, np.int64)
        self._stamp += 1
        out = np.empty(count, np.int64)
        filled = 0
        for _ in range(_MAX_ROUNDS):
            drawn, _ = self.draw(source(2 * (count - filled)))
            filled = loops.first_occurrences(drawn, self._seen, self._stamp, out, filled)
            if filled == count:
                return out
        # Given what was taken, the rest of successive sampling is a race of exponential clocks.
        candidates = self.index.candidates()
        rates = self.slot_probability(candidates)
        _require(count, int((rates > 0).sum()))
        free = (self._seen[candidates] != self._stamp) & (rates > 0)
        rest = candidates[free]
        keys = -np.log1p(-source(len(rest))) / rates[free]
        out[filled:] = rest[np.argsort(keys, kind="stable")[: count - filled]]
        return out


class Uniform(Drawn):
    """Every trajectory (or step) with the same probability.

    Args:
        over: ``"steps"`` draws a trajectory in proportion to its length.
        replacement: False draws distinct trajectories, by successive sampling.
        stratified: A batch takes one item from each of B equal parts of the law, so that it resembles the
            table more closely; every position of the batch still has the law.
    """

    def __init__(
        self,
        *,
        over: Literal["trajectories", "steps"] = "trajectories",
        replacement: bool = True,
        stratified: bool = False,
    ) -> None:
        self.over = _checked_over(over)
        self.replacement, self.stratified = _checked_manner(replacement, stratified)
        self._by_length = _LengthWeights() if over == "steps" else None

    def _attached(self) -> None:
        if self._by_length is not None:
            self._by_length.attach_index(self.index)

    @property
    def num_items(self) -> int:
        """Selectable trajectories, or their steps."""
        return self._by_length.num_items if self._by_length is not None else self.index.num_selectable

    def mass(self) -> tuple[float, int, float]:
        """See ``Drawn.mass``."""
        return float(self.num_items), self.num_items, 1.0

    def draw(self, u: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """See ``Drawn.draw``."""
        if self._by_length is not None:
            slots, _ = self._by_length.draw(u)
            return slots, np.full(len(u), 1.0 / self._by_length.num_items)
        count = self.index.num_selectable
        return self.index.dense[(u * count).astype(np.int64)], np.full(len(u), 1.0 / count)

    def slot_probability(self, slots: np.ndarray) -> np.ndarray:
        """See ``Drawn.slot_probability``."""
        if self._by_length is not None:
            return self.index.length[slots] / self._by_length.num_items
        return np.full(len(slots), 1.0 / self.index.num_selectable)

    def item_probability(self, slots: np.ndarray) -> np.ndarray:
        """See ``Drawn.item_probability``."""
        return np.full(len(slots), 1.0 / self.num_items)

    def inserted(self, slots: np.ndarray) -> None:
        """See ``Selector.inserted``."""
        if self._by_length is not None:
            self._by_length.set(slots, self.index.length[slots].astype(np.float64))

    def removed(self, slots: np.ndarray) -> None:
        """See ``Selector.removed``."""
        if self._by_length is not None:
            self._by_length.set(slots, np.zeros(len(slots)))


class _LengthWeights:
    """A tree whose leaves are trajectory lengths."""

    def attach_index(self, index: SlotIndex) -> None:
        self.tree = PrefixSumTree(index.capacity)
        slots = index.dense[: index.num_selectable].copy()
        self.set(slots, index.length[slots].astype(np.float64))

    def set(self, slots: np.ndarray, weights: np.ndarray) -> None:
        self.tree.update_array(slots, weights)

    def draw(self, u: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        slots, weight = self.tree.draw(torch.from_numpy(u))
        return slots.numpy(), weight.numpy()

    @property
    def num_items(self) -> int:
        return int(self.tree.total)


class Prioritized(Drawn):
    """``P(i) = p_i^alpha / sum_k p_k^alpha``, ``w_i = (N P(i))^-beta / max_j w_j`` (Schaul et al. 2016, eqs.
    1-2).

    Args:
        alpha: Exponent of the priority.
        beta: Exponent of the importance weight; may be changed between draws.
        over: ``"steps"``: every step of a trajectory has the trajectory's priority, so a trajectory is drawn
            in proportion to ``n p^alpha`` and ``P`` is the probability of the step.
        replacement: False draws distinct trajectories, by successive sampling.
        stratified: As in ``Uniform``.
        normalize: ``max_j w_j`` over the ``"table"``, over the ``"batch"``, or None for raw weights.
        device: Where the tree of priorities lies and draws are made; a GPU pays from some 10^7 trajectories
            on. The same items are drawn, except within rounding of a boundary.
    """

    def __init__(
        self,
        alpha: float = 0.6,
        beta: float = 0.4,
        *,
        over: Literal["trajectories", "steps"] = "trajectories",
        replacement: bool = True,
        stratified: bool = False,
        normalize: Literal["table", "batch"] | None = "table",
        device: torch.device | str = "cpu",
    ) -> None:
        if not alpha >= 0 or not beta >= 0:
            raise ValueError(f"alpha and beta must be >= 0, got {alpha} and {beta}")
        if normalize not in ("table", "batch", None):
            raise ValueError(f"normalize must be 'table', 'batch' or None, got {normalize!r}")
        self.alpha, self.beta = alpha, beta
        self.over = _checked_over(over)
        self.replacement, self.stratified = _checked_manner(replacement, stratified)
        self.normalize = normalize
        self.device = torch.device(device)

    def _attached(self) -> None:
        self.tree = PrefixSumTree(self.index.capacity, device=self.device)
        self._by_length = _LengthWeights() if self.over == "steps" else None
        if self._by_length is not None:
            self._by_length.attach_index(self.index)
        self.updated(self.index.dense[: self.index.num_selectable].copy())

    @property
    def num_items(self) -> int:
        """Selectable trajectories, or their steps."""
        return self._by_length.num_items if self._by_length is not None else self.index.num_selectable

    def draw(self, u: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """See ``Drawn.draw``; ValueError("no trajectory has positive weight") when all priorities are 0."""
        total = self.tree.total
        if not total > 0:
            raise ValueError("no trajectory has positive weight")
        slots, weight = self.tree.draw(torch.from_numpy(u))
        drawn = slots.cpu().numpy()
        probability = weight.cpu().numpy() / total
        if self.over == "steps":
            probability /= self.index.length[drawn]
        return drawn, probability

    def slot_probability(self, slots: np.ndarray) -> np.ndarray:
        """See ``Drawn.slot_probability``."""
        total = self.tree.total
        if not total > 0:
            raise ValueError("no trajectory has positive weight")
        return self.tree.weight(torch.from_numpy(slots).to(self.device)).cpu().numpy() / total

    def item_probability(self, slots: np.ndarray) -> np.ndarray:
        """See ``Drawn.item_probability``."""
        probability = self.slot_probability(slots)
        return probability / self.index.length[slots] if self.over == "steps" else probability

    def weights(self, probability: np.ndarray) -> np.ndarray:
        """``w_i`` of items drawn with ``probability``: float32 [B].

        With ``normalize="table"`` over steps the smallest probability is that of a step, found by a pass over
        the live trajectories.
        """
        smallest = self.smallest_probability() if self.normalize == "table" else 0.0
        return self._weights(probability, self.num_items, smallest)

    def _weights(self, probability: np.ndarray, num_items: int, smallest: float) -> np.ndarray:
        weights = (num_items * probability) ** -self.beta
        if self.normalize == "batch":
            weights /= weights.max()
        elif self.normalize == "table":
            weights /= (num_items * smallest) ** -self.beta
        return weights.astype(np.float32)

    def global_weights(
        self, num_items: int, smallest: float
    ) -> Callable[[torch.Tensor], torch.Tensor | None]:
        """See ``Drawn.global_weights``."""
        return lambda p: torch.from_numpy(self._weights(p.numpy(), num_items, smallest))

    def mass(self) -> tuple[float, int, float]:
        """See ``Drawn.mass``."""
        total = self.tree.total
        smallest = self.smallest_probability() * total if total > 0 else float("inf")
        return total, self.num_items, smallest

    def weight(self, probability: torch.Tensor) -> torch.Tensor:
        """``weights`` on tensors."""
        return torch.from_numpy(self.weights(probability.double().numpy()))

    def smallest_probability(self) -> float:
        """Smallest positive probability of an item in the table."""
        if self.over == "trajectories":
            return self.tree.minimum / self.tree.total
        slots = self.index.dense[: self.index.num_selectable]
        probability = self.item_probability(slots)
        return float(probability[probability > 0].min())

    def inserted(self, slots: np.ndarray) -> None:
        """See ``Selector.inserted``."""
        if self._by_length is not None:
            self._by_length.set(slots, self.index.length[slots].astype(np.float64))
        self.updated(slots)

    def removed(self, slots: np.ndarray) -> None:
        """See ``Selector.removed``."""
        zeros = np.zeros(len(slots))
        self._set(slots, zeros)
        if self._by_length is not None:
            self._by_length.set(slots, zeros)

    def updated(self, slots: np.ndarray) -> None:
        """See ``Selector.updated``."""
        weights = np.empty(len(slots), np.float64)
        loops.priority_weights(
            slots, self.index.priority, self.alpha, self.index.length, self.over == "steps", weights
        )
        self._set(slots, weights)

    def _set(self, slots: np.ndarray, weights: np.ndarray) -> None:
        if self.device.type == "cpu":
            self.tree.update_array(slots, weights)
        else:
            index, weight = torch.from_numpy(slots), torch.from_numpy(weights)
            self.tree.update(index.to(self.device), weight.to(self.device))


def _checked_over(over: str) -> str:
    if over not in ("trajectories", "steps"):
        raise ValueError(f"over must be 'trajectories' or 'steps', got {over!r}")
    return over


def _checked_manner(replacement: bool, stratified: bool) -> tuple[bool, bool]:
    if stratified and not replacement:
        raise ValueError("stratified draws are with replacement; leave one of the two out")
    return replacement, stratified


class _Ranked(Selector):
    """Deterministic selectors: the first ``batch_size`` of an order."""

    @abstractmethod
    def ranked(self, count: int) -> np.ndarray:
        """The first ``count`` selectable slots; fewer if there are fewer."""

    def select(self, batch_size: int, generator: Generator | None = None) -> tuple[np.ndarray, np.ndarray]:
        """The first ``batch_size`` slots, each with probability 1."""
        _require(batch_size, self.index.num_selectable)
        return self.ranked(batch_size), np.ones(batch_size)


class TopK(_Ranked):
    """The largest (or smallest) priorities, ties to the older. One pass over the priorities a call."""

    def __init__(self, *, largest: bool = True) -> None:
        self.largest = largest

    def ranked(self, count: int) -> np.ndarray:
        """See ``_Ranked.ranked``."""
        index = self.index
        slots = index.dense[: index.num_selectable]
        keys = -index.priority[slots] if self.largest else index.priority[slots]
        if count < len(slots):
            bound = np.partition(keys, count - 1)[count - 1]
            kept = keys <= bound
            slots, keys = slots[kept], keys[kept]
        return slots[np.lexsort((index.sequence[slots], keys))[:count]]


class TopShare(Selector):
    """Any of the best ``share`` of the trajectories by priority, all alike: e.g. those of highest return.

    Of ``n`` trajectories ``ceil(share * n)`` are drawn from, with replacement; ties go to the older. One pass
    over the priorities a call.
    """

    def __init__(self, share: float, *, largest: bool = True) -> None:
        if not 0 < share <= 1:
            raise ValueError(f"share must be above 0 and at most 1, got {share}")
        self.share, self.largest = share, largest
        self._best = TopK(largest=largest)

    def _attached(self) -> None:
        self._best.index = self.index

    def select(self, batch_size: int, generator: Generator | None = None) -> tuple[np.ndarray, np.ndarray]:
        """``batch_size`` independent draws."""
        count = math.ceil(self.share * self.index.num_selectable)
        best = self._best.ranked(count)
        return best[(uniforms(generator, batch_size) * count).astype(np.int64)], np.full(
            batch_size, 1.0 / count
        )


class Fifo(_Ranked):
    """The oldest trajectories."""

    def ranked(self, count: int) -> np.ndarray:
        """See ``_Ranked.ranked``."""
        return _walk(self.index, self.index.oldest, self.index.newer, count)

    def evict(self, number: int) -> int:
        """See ``Selector.evict``."""
        oldest = self.index.oldest
        return oldest if oldest >= 0 and self.index.selectable[oldest] else super().evict(number)


class Lifo(_Ranked):
    """The newest trajectories."""

    def ranked(self, count: int) -> np.ndarray:
        """See ``_Ranked.ranked``."""
        return _walk(self.index, self.index.newest, self.index.older, count)


def _walk(index: SlotIndex, slot: int, following: np.ndarray, count: int) -> np.ndarray:
    out: list[int] = []
    while slot >= 0 and len(out) < count:
        if index.selectable[slot]:
            out.append(slot)
        slot = int(following[slot])
    return np.array(out, np.int64)


class Shuffle(Selector):
    """Epochs: every trajectory once, in random order, then again in another order.

    A trajectory written during an epoch joins the next one; one removed is skipped.
    """

    def __init__(self) -> None:
        self._remaining: list[int] = []  # handles, the next one last

    def select(self, batch_size: int, generator: Generator | None = None) -> tuple[np.ndarray, np.ndarray]:
        """The next ``batch_size`` trajectories of the epoch, going over into the next epoch where it ends."""
        out: list[int] = []
        count = self.index.num_selectable
        _require(min(batch_size, 1), count)
        while len(out) < batch_size:
            if not self._remaining:
                slots = self.index.candidates()
                order = np.argsort(uniforms(generator, count), kind="stable")
                self._remaining = self.index.handles(slots[order]).tolist()
            slot = int(self.index.locate(np.array([self._remaining.pop()], np.int64))[0][0])
            if slot >= 0 and self.index.selectable[slot]:
                out.append(slot)
        return np.array(out, np.int64), np.full(batch_size, 1.0 / count)

    def state_dict(self) -> dict[str, object]:
        """The rest of the epoch, as handles."""
        return {"remaining": list(self._remaining)}

    def load_state_dict(self, state: dict[str, object]) -> None:
        """Inverse of ``state_dict``."""
        self._remaining = list(state["remaining"])  # type: ignore[call-overload]
