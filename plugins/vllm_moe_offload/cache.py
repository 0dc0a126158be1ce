"""Slots of device memory that hold experts, and the only place that changes which expert is where."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from tiered_memory import Copy, CopyEngine
from vllm_moe_offload.counters import CacheStats, count_moved
from vllm_moe_offload.policy import EvictionPolicy, make_policy
from vllm_moe_offload.store import ExpertStore

ABSENT = -1


class ExpertCache:
    """``num_slots`` expert slots on ``device``, shared by all layers of ``store``.

    Invariants:
        - A slot holds at most one expert and an expert has at most one slot.
        - A pinned slot (between ``ensure`` and ``release`` of its layer) and one whose copy is in flight are
          never given to another expert.
        - ``slot_of_expert`` names a slot only after its copy was waited for.

    Not thread-safe: the thread that runs the model owns it.

    Args:
        store: all experts.
        num_slots: slots.
        policy: name of the eviction policy, or the policy itself.
        device: where the slots are.
        copy_engine: carries the copies; by default an engine of ``device``.
        prefetch_budget: at most this share of the slots holds prefetched experts not used yet.
        contiguous: one array for each tensor instead of whole records with the record as expert stride.
            Default: on the CPU, whose kernels ignore that stride.
        debug_checks: fill freed slots with NaN and compare each copy with the store.
        count_traffic: add the copies to :func:`vllm_moe_offload.moved_bytes`; not for simulations.

    Attributes:
        views: name -> ``[num_slots, ...]``; row = slot.
        counters: what happened so far.
        share: predicted activation shares ``[layers, experts]`` for the policy, or None.
    """

    def __init__(
        self,
        store: ExpertStore,
        num_slots: int,
        *,
        policy: str | EvictionPolicy = "lru",
        device: torch.device | str = "cpu",
        copy_engine: CopyEngine | None = None,
        prefetch_budget: float = 0.25,
        contiguous: bool | None = None,
        debug_checks: bool = False,
        count_traffic: bool = True,
    ) -> None:
        if num_slots < 1:
            raise ValueError(f"expert cache: num_slots must be at least 1, got {num_slots}")
        self.store, self.num_slots, self.device = store, num_slots, torch.device(device)
        layers, experts = store.num_layers, store.num_experts
        self.policy = make_policy(policy, layers, experts) if isinstance(policy, str) else policy
        self.counters = CacheStats()
        self.share: npt.NDArray[np.float64] | None = None
        self._engine = CopyEngine(self.device) if copy_engine is None else copy_engine
        self._prefetch_limit = int(prefetch_budget * num_slots)
        self._debug_checks, self._count_traffic = debug_checks, count_traffic

        layout = store.layout
        self._contiguous = self.device.type == "cpu" if contiguous is None else contiguous
        # Zeros: profiling runs read slots before any expert is in them.
        if self._contiguous:
            self.views = {
                field.name: torch.zeros(num_slots, *field.shape, dtype=field.dtype, device=self.device)
                for field in layout.fields
            }
        else:
            self._slabs = torch.zeros(num_slots, layout.nbytes, dtype=torch.uint8, device=self.device)
            self.views = layout.views(self._slabs)

        self._slot_of = np.full(layers * experts, ABSENT, dtype=np.int32)  # also copies in flight
        self._key_of = np.full(num_slots, ABSENT, dtype=np.int64)
        self._pins = np.zeros(num_slots, dtype=np.int32)
        self._flying = np.zeros(num_slots, dtype=bool)
        self._unused = np.zeros(num_slots, dtype=bool)  # prefetched and not requested yet
        self._copy_of: dict[int, Copy] = {}
        self._free = list(range(num_slots - 1, -1, -1))
        self._pinned_by: dict[int, list[npt.NDArray[np.int32]]] = {}
        self._table_host = torch.full((layers, experts), ABSENT, dtype=torch.int32)
        self._visible = self._table_host.view(-1).numpy()  # the same memory
        self._table = self._table_host if self.device.type == "cpu" else self._table_host.to(self.device)
        self._stale_rows: set[int] = set()

    @property
    def holds_all(self) -> bool:
        """Whether every expert has a slot, so that nothing is ever evicted."""
        return self.num_slots >= self.store.num_layers * self.store.num_experts

    @property
    def stats(self) -> dict[str, int | float]:
        """The counters by name."""
        return self.counters.as_dict()

    @property
    def slot_of_expert(self) -> Tensor:
        """int32 ``[layers, experts]`` on the device: the expert's slot, -1 where it is absent."""
        for layer in sorted(self._stale_rows):
            self.table_row(layer)
        return self._table

    @property
    def in_flight(self) -> int:
        """Prefetches that have not arrived."""
        return sum(not self._arrived(slot) for slot in self._copy_of)

    def table_row(self, layer: int) -> Tensor:
        """Row ``layer`` of ``slot_of_expert``, up to date, without bringing the other rows up to date."""
        if layer in self._stale_rows and self._table is not self._table_host:
            # From pageable memory: CUDA stages the row before it returns, so the host may change it at once.
            self._table[layer].copy_(self._table_host[layer], non_blocking=True)
        self._stale_rows.discard(layer)
        return self._table[layer]

    def resident(self, layer: int) -> frozenset[int]:
        """Experts of ``layer`` whose bytes are in their slots."""
        first = layer * self.store.num_experts
        slots = self._slot_of[first : first + self.store.num_experts]
        return frozenset(
            int(expert) for expert in np.flatnonzero(slots != ABSENT) if self._arrived(int(slots[expert]))
        )

    def ensure(self, layer: int, expert_ids: Sequence[int] | npt.NDArray[np.integer]) -> Tensor:
        """Bring experts into slots and pin them until :meth:`release`.

        Work on the current stream waits for the copies; the host does not.

        Args:
            layer: the layer about to run.
            expert_ids: its experts, in any order, repetitions allowed; each counts as one access.

        Returns:
            int64 slots on the CPU, in the order of ``expert_ids``.

        Raises:
            ValueError: more distinct experts than slots.
            IndexError: no such layer or expert.
            Exception: a copy failed; its experts are absent again and nothing is pinned.
        """
        ids = np.asarray(expert_ids, dtype=np.int64)
        distinct = np.unique(ids)
        self._check(layer, distinct)
        if len(distinct) > self.num_slots:
            raise ValueError(
                f"layer {layer} needs {len(distinct)} experts at once, cache has {self.num_slots} slots"
            )
        self.policy.on_layer(layer, self.share)
        first = layer * self.store.num_experts
        keys = distinct + first
        slots = self._slot_of[keys]
        missing = slots == ABSENT
        held = slots[~missing]
        self._pins[held] += 1
        try:
            taken = self._take(int(missing.sum()))
            copies = self._copy_in(keys[missing], taken)
        except BaseException:
            self._pins[held] -= 1
            raise
        slots[missing] = taken
        self._pins[taken] += 1
        self._count(keys, slots, missing)
        self._pinned_by.setdefault(layer, []).append(slots)
        self._arrive(layer, slots, copies)
        return torch.from_numpy(self._slot_of[ids + first].astype(np.int64))

    def release(self, layer: int) -> None:
        """Unpin what ``ensure`` pinned for ``layer``."""
        for slots in self._pinned_by.pop(layer, ()):
            self._pins[slots] -= 1

    def prefetch(self, layer: int, expert: int) -> bool:
        """Start copying an expert ahead of need.

        Returns:
            False where no slot may be evicted for it or the budget of unused experts is spent; True
            otherwise, also where it is already there or on its way.
        """
        self._check(layer, np.asarray([expert]))
        key = layer * self.store.num_experts + expert
        if self._slot_of[key] != ABSENT:
            return True
        if int(self._unused.sum()) >= self._prefetch_limit:
            return False
        if not self._free and not self._candidates().any():
            return False
        (slot,) = self._take(1)
        (copy,) = self._copy_in(np.asarray([key]), np.asarray([slot], dtype=np.int32))
        self._copy_of[int(slot)] = copy
        self._flying[slot] = self._unused[slot] = True
        self.policy.on_prefetch(key)
        self.counters.prefetched += 1
        return True

    def clear(self) -> None:
        """Drop every expert that is not pinned."""
        for slot in [slot for slot in self._copy_of if not self._pins[slot]]:
            self._land(slot, self._copy_of[slot].synchronize)
        for slot in np.flatnonzero((self._key_of != ABSENT) & (self._pins == 0)):
            self._forget(int(slot))

    def preload(self) -> None:
        """Fill free slots with experts in order of key, without counting: for pools that hold all of them."""
        for key in np.flatnonzero(self._slot_of == ABSENT)[: len(self._free)]:
            slot = self._free.pop()
            layer, expert = divmod(int(key), self.store.num_experts)
            self._engine.submit(self._pairs(layer, expert, slot)).synchronize()
            self._map(int(key), slot)
            self._show(np.asarray([slot]))

    def close(self) -> None:
        """Finish what is in flight."""
        self._engine.close()

    def _check(self, layer: int, experts: npt.NDArray[np.int64]) -> None:
        if not 0 <= layer < self.store.num_layers:
            raise IndexError(f"expert cache: layer {layer} of {self.store.num_layers}")
        if len(experts) and not (experts.min() >= 0 and experts.max() < self.store.num_experts):
            raise IndexError(f"expert cache: expert {experts.max()} of {self.store.num_experts}")

    def _candidates(self) -> npt.NDArray[np.bool_]:
        return (self._pins == 0) & (self._key_of != ABSENT) & ~self._flying

    def _take(self, count: int) -> npt.NDArray[np.int32]:
        """``count`` empty slots: free ones first, then those of the policy's victims."""
        shortage = count - len(self._free)
        if shortage > 0:
            self._land_done()
            keys = self._key_of[self._candidates()]
            if shortage > len(keys):
                raise RuntimeError(
                    f"expert cache: {count} slots needed, {len(self._free) + len(keys)} of {self.num_slots} "
                    "are neither pinned nor being filled"
                )
            for key in self.policy.victims(keys, shortage):
                self._forget(int(self._slot_of[key]))
                self.counters.evictions += 1
                self.policy.on_evict(int(key))
        return np.asarray([self._free.pop() for _ in range(count)], dtype=np.int32)

    def _count(
        self, keys: npt.NDArray[np.int64], slots: npt.NDArray[np.int32], missing: npt.NDArray[np.bool_]
    ) -> None:
        counters = self.counters
        late = sum(not self._arrived(int(slot)) for slot in slots[self._flying[slots] & ~missing])
        counters.accesses += len(keys)
        counters.misses += int(missing.sum())
        counters.late += late
        counters.hits += len(keys) - int(missing.sum()) - late
        counters.prefetch_used += int(self._unused[slots].sum())
        self._unused[slots] = False
        self.policy.on_accesses(keys)

    def _copy_in(self, keys: npt.NDArray[np.int64], slots: npt.NDArray[np.int32]) -> list[Copy]:
        """Submit the copies of absent experts into empty slots and map them."""
        if not len(keys):
            return []
        after = torch.cuda.current_stream(self.device) if self.device.type == "cuda" else None
        copies = []
        try:
            for key, slot in zip(keys.tolist(), slots.tolist(), strict=True):
                layer, expert = divmod(key, self.store.num_experts)
                copies.append(self._engine.submit(self._pairs(layer, expert, slot), after=after))
                self.store.in_use(layer, expert, copies[-1])
        except BaseException:
            # What was submitted is ahead of whatever these slots get next.
            self._free += reversed(slots.tolist())
            raise
        for key, slot in zip(keys.tolist(), slots.tolist(), strict=True):
            self._map(key, slot)
        nbytes = len(keys) * self.store.layout.expert_nbytes
        self.counters.copies += len(keys)
        self.counters.bytes_host_to_device += nbytes
        if self._count_traffic:
            count_moved("dram->hbm", nbytes)
        return copies

    def _pairs(self, layer: int, expert: int, slot: int) -> list[tuple[Tensor, Tensor]]:
        record = self.store.record(layer, expert)
        if record is None:
            record = torch.empty(self.store.layout.nbytes, dtype=torch.uint8)
            self.store.read(layer, expert, record)
        if self._contiguous:
            source = self.store.layout.views(record)
            return [(self.views[name][slot], source[name]) for name in self.views]
        return [(self._slabs[slot], record)]

    def _arrive(self, layer: int, slots: npt.NDArray[np.int32], copies: list[Copy]) -> None:
        """Wait for a layer's own copies and its late ones; undo them if one failed."""
        started = time.perf_counter()
        flying = [int(slot) for slot in slots if self._flying[slot]]
        try:
            for slot in flying:
                self._land(slot, self._copy_of[slot].wait)
            for copy in copies:
                copy.wait()
        except BaseException:
            self.release(layer)
            for slot in slots.tolist():
                # A hit is unharmed; what this call copied, or still waits for, is undefined.
                if self._key_of[slot] != ABSENT and not self._shown(slot) and not self._pins[slot]:
                    self._forget(slot)
            raise
        self._show(slots)
        if self._debug_checks:
            self._compare(slots)
        self.counters.stall_seconds += time.perf_counter() - started

    def _arrived(self, slot: int) -> bool:
        """Whether the bytes of a mapped expert are in its slot; never blocks."""
        if not self._flying[slot]:
            return True
        try:
            return self._copy_of[slot].done
        except Exception:  # a failed copy never arrives; waiting for it raises
            return False

    def _land_done(self) -> None:
        for slot in [slot for slot in self._copy_of if self._arrived(slot)]:
            self._land(slot, self._copy_of[slot].wait)

    def _land(self, slot: int, wait: Callable[[], object]) -> None:
        """End a prefetched expert's flight by waiting for its copy; a failed one leaves the slot empty."""
        try:
            wait()
        except BaseException:
            self._forget(slot)
            raise
        self._flying[slot] = False
        del self._copy_of[slot]
        self._show(np.asarray([slot]))

    def _map(self, key: int, slot: int) -> None:
        self._slot_of[key], self._key_of[slot] = slot, key

    def _shown(self, slot: int) -> bool:
        return bool(self._visible[self._key_of[slot]] == slot)

    def _show(self, slots: npt.NDArray[np.integer]) -> None:
        """Let ``slot_of_expert`` name slots whose copies were waited for."""
        keys = self._key_of[slots]
        changed = self._visible[keys] != slots
        if changed.any():
            self._visible[keys] = slots
            self._stale_rows.update((keys[changed] // self.store.num_experts).tolist())

    def _forget(self, slot: int) -> None:
        key = int(self._key_of[slot])
        self._slot_of[key], self._key_of[slot] = ABSENT, ABSENT
        self._flying[slot] = self._unused[slot] = False
        self._copy_of.pop(slot, None)
        if self._visible[key] != ABSENT:
            self._visible[key] = ABSENT
            self._stale_rows.add(key // self.store.num_experts)
        self._free.append(slot)
        if self._debug_checks:
            for view in self.views.values():
                view[slot : slot + 1].flatten().view(torch.uint8).fill_(0xFF)

    def _compare(self, slots: npt.NDArray[np.int32]) -> None:
        expected = torch.empty(self.store.layout.nbytes, dtype=torch.uint8)
        for slot in slots.tolist():
            layer, expert = divmod(int(self._key_of[slot]), self.store.num_experts)
            self.store.read(layer, expert, expected)
            for name, view in self.store.layout.views(expected).items():
                found = self.views[name][slot : slot + 1].cpu().flatten().view(torch.uint8)
                if not torch.equal(found, view.flatten().view(torch.uint8)):
                    raise RuntimeError(
                        f"layer {layer}, expert {expert}: {name} in slot {slot} differs from the store"
                    )
