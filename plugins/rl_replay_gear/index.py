"""Slots: which trajectories are live, in which order they came, where they lie and what they weigh."""

from __future__ import annotations

import numpy as np

from rl_replay_gear import loops


class SlotIndex:
    """Metadata of at most ``capacity`` trajectories, as arrays over slots.

    Live slots form a doubly linked list in insertion order and a dense array for uniform draws; both change
    in O(1). A slot's generation is part of its handle and moves on when the slot is given back, so a handle
    names one trajectory for good (until 2**20 reuses of its slot).
    """

    def __init__(self, capacity: int, shard: int = 0) -> None:
        self.capacity = capacity
        self.shard = shard
        self.size = 0
        self.start = np.zeros(capacity, np.int64)
        self.length = np.zeros(capacity, np.int64)
        self.generation = np.zeros(capacity, np.int64)
        self.priority = np.zeros(capacity, np.float32)
        self.live = np.zeros(capacity, np.bool_)
        self.selectable = np.zeros(capacity, np.bool_)
        self.sequence = np.zeros(capacity, np.int64)
        self.times_sampled = np.zeros(capacity, np.int64)
        self.older = np.full(capacity, -1, np.int64)
        self.newer = np.full(capacity, -1, np.int64)
        self.oldest = -1
        self.newest = -1
        self.dense = np.zeros(capacity, np.int64)  # selectable slots in no particular order
        self.position = np.full(capacity, -1, np.int64)  # of a slot in `dense`
        self.num_selectable = 0
        self.num_steps = 0
        self.next_sequence = 0
        self._freed: list[int] = []
        self._fresh = 0
        self._max_priority: float | None = None  # None: to be found again
        self._at_max = 0

    @property
    def full(self) -> bool:
        """Whether no slot is free."""
        return self.size == self.capacity

    def insert(self, start: int, length: int, priority: float) -> int:
        """Take a free slot for a trajectory; the caller has made sure that there is one."""
        if self._freed:
            slot = self._freed.pop()
        else:
            slot = self._fresh
            self._fresh += 1
        self.start[slot] = start
        self.length[slot] = length
        self.priority[slot] = priority
        self.live[slot] = True
        self.selectable[slot] = True
        self.sequence[slot] = self.next_sequence
        self.next_sequence += 1
        self.times_sampled[slot] = 0
        self._link(slot)
        self.dense[self.num_selectable] = slot
        self.position[slot] = self.num_selectable
        self.num_selectable += 1
        self.num_steps += length
        self.size += 1
        self._priority_added(float(self.priority[slot]))
        return slot

    def retire(self, slot: int) -> None:
        """Take a live slot out of selection; its rows stay until ``remove``."""
        hole = self.position[slot]
        if hole < 0:
            return
        self.num_selectable -= 1
        last = self.dense[self.num_selectable]
        self.dense[hole] = last
        self.position[last] = hole
        self.position[slot] = -1
        self.selectable[slot] = False

    def remove(self, slot: int) -> None:
        """Give a slot back; handles to it are stale from now on."""
        self.retire(slot)
        older, newer = int(self.older[slot]), int(self.newer[slot])
        if older >= 0:
            self.newer[older] = newer
        else:
            self.oldest = newer
        if newer >= 0:
            self.older[newer] = older
        else:
            self.newest = older
        self.live[slot] = False
        self.generation[slot] = (self.generation[slot] + 1) & loops.GENERATION_MASK
        self.num_steps -= int(self.length[slot])
        self.size -= 1
        self._freed.append(slot)
        self._priority_dropped(float(self.priority[slot]))

    def ordered(self) -> np.ndarray:
        """Live slots from the oldest to the newest: int64 [size]."""
        slots = np.flatnonzero(self.live)
        return slots[np.argsort(self.sequence[slots], kind="stable")]

    def candidates(self) -> np.ndarray:
        """Selectable slots from the oldest to the newest: int64."""
        slots = self.dense[: self.num_selectable]
        return slots[np.argsort(self.sequence[slots], kind="stable")]

    def set_priorities(self, slots: np.ndarray, priorities: np.ndarray) -> None:
        """Write the priorities of unique live slots."""
        self.priority[slots] = priorities
        self._max_priority = None

    @property
    def max_priority(self) -> float:
        """Largest live priority, 1.0 when empty."""
        if self.size == 0:
            return 1.0
        if self._max_priority is None:
            live = self.priority[self.live]
            self._max_priority = float(live.max())
            self._at_max = int((live == live.max()).sum())
        return self._max_priority

    def handle(self, slot: int) -> int:
        """Handle of a slot; see ``handles``."""
        high = (self.shard << loops.GENERATION_BITS) | int(self.generation[slot])
        return (high << loops.SLOT_BITS) | slot

    def handles(self, slots: np.ndarray) -> np.ndarray:
        """Handles of slots: int64 = shard (12 bits) | generation (20) | slot (31)."""
        out = np.empty(len(slots), np.int64)
        loops.make_handles(slots, self.generation, self.shard, out)
        return out

    def locate(self, handles: np.ndarray) -> tuple[np.ndarray, int]:
        """Slots of handles, -1 where stale, and the number of stale ones."""
        slots = np.empty(len(handles), np.int64)
        stale = loops.locate(handles, self.shard, self.generation, self.live, slots)
        return slots, stale

    def _link(self, slot: int) -> None:
        self.older[slot] = self.newest
        self.newer[slot] = -1
        if self.newest >= 0:
            self.newer[self.newest] = slot
        else:
            self.oldest = slot
        self.newest = slot

    def _priority_added(self, priority: float) -> None:
        if self.size == 1:
            self._max_priority, self._at_max = priority, 1
        elif self._max_priority is not None:
            if priority > self._max_priority:
                self._max_priority, self._at_max = priority, 1
            elif priority == self._max_priority:
                self._at_max += 1

    def _priority_dropped(self, priority: float) -> None:
        if self._max_priority is not None and priority == self._max_priority:
            self._at_max -= 1
            if self._at_max == 0:
                self._max_priority = None

    def state(self) -> dict[str, np.ndarray]:
        """The arrays a saved table needs: everything about live slots, every generation, the free order."""
        ordered = self.ordered()
        return {
            "slot": ordered,
            "start": self.start[ordered],
            "length": self.length[ordered],
            "priority": self.priority[ordered],
            "sequence": self.sequence[ordered],
            "times_sampled": self.times_sampled[ordered],
            "selectable": self.selectable[ordered],
            "dense": self.dense[: self.num_selectable].copy(),
            "generation": self.generation[: self._fresh].copy(),
            "freed": np.array(self._freed, np.int64),
            "next_sequence": np.array([self.next_sequence], np.int64),
        }

    @classmethod
    def restore(cls, capacity: int, shard: int, state: dict[str, np.ndarray]) -> SlotIndex:
        """Inverse of ``state``."""
        index = cls(capacity, shard)
        slots = state["slot"]
        for name in ("start", "length", "priority", "sequence", "times_sampled", "selectable"):
            getattr(index, name)[slots] = state[name]
        index.live[slots] = True
        index.generation[: len(state["generation"])] = state["generation"]
        index._fresh = len(state["generation"])
        index._freed = state["freed"].tolist()
        index.size = len(slots)
        index.num_steps = int(state["length"].sum())
        index.next_sequence = int(state["next_sequence"][0])
        if len(slots):
            index.older[slots[1:]] = slots[:-1]
            index.newer[slots[:-1]] = slots[1:]
            index.oldest, index.newest = int(slots[0]), int(slots[-1])
        index.num_selectable = len(state["dense"])
        index.dense[: index.num_selectable] = state["dense"]
        index.position[state["dense"]] = np.arange(index.num_selectable)
        return index
