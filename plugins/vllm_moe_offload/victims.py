"""Which experts give up their slots next: the host's half of a pool that the device manages.

The device takes victims in the order given here and tells, a step or two later, what it used and where its
experts are. Nothing in this module touches the device.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from vllm_moe_offload.policy import EvictionPolicy
from vllm_moe_offload.residency import REMOTE

Keys = npt.NDArray[np.int64]
Worth = npt.NDArray[np.float64] | npt.NDArray[np.int64]

# Victims queued, in misses of the last step: a step finds those of the one or two before it used up.
_QUEUED_STEPS = 4


@dataclass(frozen=True)
class Plan:
    """What the device is told.

    Attributes:
        slots: int32, slots to give up, first one first.
        queued: so many of them may be taken by any batch, the rest by large ones only.
        admitted: uint8 ``[keys]``, whether a missing expert may take one.
    """

    slots: npt.NDArray[np.int32]
    queued: int
    admitted: npt.NDArray[np.uint8]


class VictimPlanner:
    """Learns from the reports of steps and plans for those to come.

    Args:
        policy: ranks the experts.
        num_slots: slots of the pool.
        own_slots: the first so many, which the device may give away.

    Attributes:
        rows: int64 ``[keys]``, where the device read each expert when the last known step ended; rows below
            ``num_slots`` are slots.
        accesses, misses: of that step.
    """

    def __init__(self, policy: EvictionPolicy, *, num_slots: int, own_slots: int) -> None:
        self.policy, self.num_slots, self.own_slots = policy, num_slots, own_slots
        self.rows: Keys = np.zeros(policy.num_layers * policy.num_experts, dtype=np.int64)
        self.accesses = self.misses = 0

    def first_plan(self) -> Plan:
        """Before anything is known: every slot, for every expert."""
        slots = np.arange(self.own_slots, dtype=np.int32)
        return Plan(slots, self.own_slots, np.ones(len(self.rows), dtype=np.uint8))

    def learn(
        self, chosen: npt.NDArray[np.integer], share: npt.NDArray[np.float64] | None
    ) -> npt.NDArray[np.bool_]:
        """Take note of a step.

        Args:
            chosen: ``[tokens, layers, top_k]``, what the router chose.
            share: predicted shares ``[layers, experts]``, if there are any.

        Returns:
            Which experts it used, ``[layers, experts]``.
        """
        layers, experts = self.policy.num_layers, self.policy.num_experts
        used = np.zeros((layers, experts), dtype=bool)
        used.reshape(-1)[chosen + np.arange(0, layers * experts, experts)[:, None]] = True
        self.policy.on_step(used, share)
        return used

    def plan(self, share: npt.NDArray[np.float64] | None) -> Plan:
        """Victims for the steps to come, with the shares predicted for them."""
        # Rows of host memory may be negative: as unsigned numbers they are beyond all slots.
        held = np.flatnonzero(self.rows.view(np.uint64) < self.own_slots)
        self.policy.on_layer(0, share)
        # While the slots hold what a step needs, every missing expert gets one, and recency counts. Beyond
        # that it would push out what the next step needs.
        worth = self.policy.worth() if self.accesses > len(held) else None
        if worth is not None:
            return self._trade(held, worth)
        count = min(len(held), max(_QUEUED_STEPS * self.misses, self.policy.num_experts))
        victims = self.policy.victims(held, count) if count else held
        slots = self.rows[victims].astype(np.int32)
        return Plan(slots, len(victims), np.ones(len(self.rows), dtype=np.uint8))

    def _trade(self, held: Keys, worth: Worth) -> Plan:
        """Victims, least worth first. As many are queued, and as many experts admitted, as gain by it."""
        absent = np.flatnonzero((self.rows.view(np.uint64) >= self.num_slots) & (self.rows != REMOTE))
        mine, theirs = worth[held], worth[absent]
        count = trades(mine, theirs)
        admitted = np.zeros(len(self.rows), dtype=np.uint8)
        admitted[absent[least(-theirs, count)]] = 1
        victims = held[least(mine, min(max(count, self.policy.num_experts), len(held)))]
        return Plan(self.rows[victims].astype(np.int32), count, admitted)


def trades(mine: Worth, theirs: Worth) -> int:
    """Swaps that gain: the most ``n`` whose ``n``-th best of ``theirs`` beats the ``n``-th worst of ``mine``.

    After them the best ``len(mine)`` of both are ``mine``; the least of those tells the number.
    """
    if not len(mine) or not len(theirs):
        return 0
    bar = np.partition(np.concatenate([mine, theirs]), len(theirs))[len(theirs)]
    return max(int((theirs > bar).sum()), int((mine < bar).sum()))


def least(values: Worth, count: int) -> npt.NDArray[np.intp]:
    """Indices of the ``count`` least values in ascending order, the first of equals first."""
    if count == 0:
        return np.zeros(0, dtype=np.intp)
    kept = np.flatnonzero(values <= np.partition(values, count - 1)[count - 1])
    return kept[np.argsort(values[kept], kind="stable")[:count]]
