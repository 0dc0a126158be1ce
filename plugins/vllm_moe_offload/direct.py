"""The pool of slots that the device manages itself: no step waits for the host.

Division of work, in time:

    host    upload(n)      launch step n ........ learn from report(n - 1), rank victims for n + 1
    device            [ layer 0: plan, pull, experts | layer 1: ... ]  report(n)

The device decides at each layer, from its own tables, what is missing and which of the queued victims makes
room (:mod:`vllm_moe_offload.residency`). The host sees what happened one or two steps later, feeds its
eviction policy with it, and queues the next victims. All that both sides touch is copied on the stream that
runs the model, between two steps, so that neither ever sees the other half way.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from tiered_memory import CopyEngine
from vllm_moe_offload import residency
from vllm_moe_offload.counters import CacheStats, count_moved
from vllm_moe_offload.policy import EvictionPolicy, make_policy
from vllm_moe_offload.promote import Promoter
from vllm_moe_offload.residency import HEADER, NUM_COUNTERS, Residency
from vllm_moe_offload.store import HostExpertStore
from vllm_moe_offload.victims import Plan, VictimPlanner

_IN_FLIGHT = 4  # steps launched whose reports were not read yet
# From this many choices for each expert on, nearly all experts are needed and each by several blocks of
# tokens: reading them in place would cost the link several times.
_STREAM_CHOICES = 8


@dataclass
class StepReport:
    """What a step did.

    Attributes:
        tick: its number, from 1.
        chosen: int32 ``[tokens, layers, top_k]``, what the router chose.
        note: what the caller gave to :meth:`DirectCache.end_step`.
    """

    tick: int
    chosen: npt.NDArray[np.int32]
    note: Any


class DirectCache:
    """``num_slots`` expert slots whose contents the device changes while it runs the layers.

    Invariants:
        - ``slot_of_expert`` (the device's table) names for every expert a place that holds its bytes: a slot
          or its record in host memory.
        - Each slot has one owner. The device's are overwritten only by a layer that does not read them, after
          all layers that did; the host's only while no table names them (:class:`Promoter`).
        - Tables change only on the stream that runs the model.

    Not thread-safe: the thread that launches the model's steps owns it.

    Args:
        store: all experts, page-locked where ``device`` is a GPU, and placed at a whole number of records
            from ``slabs``.
        slabs: uint8 ``[num_slots, record_nbytes]`` on the device.
        policy: name of the eviction policy, or the policy itself.
        top_k: experts of each token.
        max_tokens: most tokens of a step.
        host_slots: slots, of all, that are filled by prediction instead of by the device.
        copy_engine: carries the copies into these; by default an engine of the device.
        kernels: module with ``plan_layer`` and ``pull_records``; default: Triton on a GPU, else torch.
        expert_map: under expert parallelism, for each expert of the model its index in ``store``, or -1 where
            another rank has it. Ids, tables and shares are of the model's experts then.

    Attributes:
        num_experts: experts of a layer, those of other ranks included.
        views: name -> ``[num_slots, ...]``; row = slot; the leading stride is the record.
        counters: what happened up to the last step learned from.
        share: predicted activation shares ``[layers, experts]`` for the policy, or None.

    Raises:
        ValueError: records and slots are not a whole number of records apart.
    """

    def __init__(
        self,
        store: HostExpertStore,
        slabs: Tensor,
        *,
        policy: str | EvictionPolicy = "lru",
        top_k: int,
        max_tokens: int,
        host_slots: int = 0,
        copy_engine: CopyEngine | None = None,
        kernels: Any = None,
        expert_map: Sequence[int] | None = None,
    ) -> None:
        self.store, self.num_slots, self.device = store, len(slabs), slabs.device
        self._local = np.arange(store.num_experts) if expert_map is None else np.asarray(expert_map)
        self.num_experts = len(self._local)
        layers, experts = store.num_layers, self.num_experts
        rule = make_policy(policy, layers, experts) if isinstance(policy, str) else policy
        self._planner = VictimPlanner(rule, num_slots=self.num_slots, own_slots=self.num_slots - host_slots)
        self.counters = CacheStats()
        self.share: npt.NDArray[np.float64] | None = None
        self.views = store.layout.views(slabs)
        far = far_rows(store, slabs, self._local)
        self._r = Residency.empty(slabs, far, num_experts=experts, top_k=top_k, max_tokens=max_tokens)
        self._kernels = kernels or _kernels_of(self.device)
        self._on_gpu = self.device.type == "cuda"
        self._side = torch.cuda.Stream(self.device) if self._on_gpu else None
        # In turn, so that none is written to while the device may still read or fill it.
        control, report = HEADER + self.num_slots, len(self._r.report)
        self._uploads = deque(
            (self._host_array(control, torch.int32), self._host_array(layers * experts, torch.uint8))
            for _ in range(_IN_FLIGHT + 1)
        )
        self._buffers = deque(self._host_array(report, torch.int64) for _ in range(_IN_FLIGHT + 1))
        self._pending: deque[tuple[StepReport, Tensor, torch.cuda.Event | None]] = deque()
        self._tick = 0  # of the last step begun
        self._learned = self._known = 0  # of the last step learned from, and when the victims were ranked
        self._counted = np.zeros(NUM_COUNTERS, dtype=np.int64)
        self._plan: Plan | None = self._planner.first_plan()  # None: the device has it already
        self._fill()
        self._promoter = None
        if host_slots:
            engine = copy_engine or CopyEngine(self.device)
            self._promoter = Promoter(self._r, self.record, host_slots, engine)

    @property
    def policy(self) -> EvictionPolicy:
        """The eviction policy; another one may take its place between steps."""
        return self._planner.policy

    @policy.setter
    def policy(self, policy: EvictionPolicy) -> None:
        self._planner.policy = policy

    @property
    def holds_all(self) -> bool:
        """Whether every expert has a slot."""
        return self.num_slots >= self.store.num_layers * self.store.num_experts

    @property
    def stats(self) -> dict[str, int | float]:
        """The counters by name."""
        return self.counters.as_dict()

    @property
    def slot_of_expert(self) -> Tensor:
        """int32 ``[layers, experts]`` on the device: the expert's slot, -1 where it has none."""
        rows = self._r.row_of.view(self.store.num_layers, self.num_experts)
        return torch.where((rows >= 0) & (rows < self.num_slots), rows, -1).int()

    def row_table(self, layer: int) -> Tensor:
        """int64 ``[experts]`` on the device: the row that each expert of ``layer`` is read from."""
        experts = self.num_experts
        return self._r.row_of[layer * experts : (layer + 1) * experts]

    def record(self, key: int) -> Tensor:
        """The record of an expert of this rank in host memory."""
        layer, expert = divmod(key, self.num_experts)
        return self.store.record(layer, int(self._local[expert]))

    def resident(self, layer: int) -> frozenset[int]:
        """Experts of ``layer`` that have a slot now; waits for the device."""
        return frozenset((self.slot_of_expert[layer] >= 0).nonzero().flatten().tolist())

    def serve(self, layer: int, topk_ids: Tensor, *, remap: bool) -> Tensor:
        """Bring in what a layer misses, as far as there are victims; enqueued on the current stream.

        Args:
            layer: the layer about to run.
            topk_ids: ``[T, k]`` expert ids, contiguous; only the tokens of the running step count.
            remap: return rows instead of ids.

        Returns:
            int64 rows ``[T, k]``, or ids, where padding rows name something harmless.
        """
        stream = topk_ids.numel() >= _STREAM_CHOICES * self.num_experts
        out = self._kernels.plan_layer(self._r, layer, topk_ids, remap=remap, stream=stream)
        self._kernels.pull_records(self._r)
        return out

    def foresee(self, layer: int, topk_ids: Tensor) -> None:
        """Bring in what a prediction names for a later layer of this step, beside all until :meth:`join`.

        Where the batch uses most experts nothing is done: demand brings them in anyway.

        Args:
            layer: the layer, not the one that runs.
            topk_ids: int64 ``[T, n]``, contiguous, on the device; to be kept until :meth:`join`.
        """
        if topk_ids.numel() >= _STREAM_CHOICES * self.num_experts:
            return
        if self._side is None:
            self._foresee(layer, topk_ids)
            return
        # After the running layer's own copies, whose list of jobs is used again.
        self._side.wait_stream(torch.cuda.current_stream(self.device))
        with torch.cuda.stream(self._side):
            self._foresee(layer, topk_ids)

    def join(self) -> None:
        """What follows on the current stream runs after what :meth:`foresee` began.

        To be called before the layer ends: its graph may end with it.
        """
        if self._side is not None:
            torch.cuda.current_stream(self.device).wait_stream(self._side)

    def _foresee(self, layer: int, topk_ids: Tensor) -> None:
        self._kernels.foresee_layer(self._r, layer, topk_ids)
        self._kernels.pull_records(self._r)

    def begin_step(self, num_tokens: int) -> None:
        """Before a step is launched: tell the device how many rows are tokens, and its next victims."""
        self._tick += 1
        if self._promoter is not None:
            self._promote(self._promoter)
        self._uploads.rotate(1)
        message, admit = self._uploads[0]
        header = message[:HEADER].numpy()
        header[residency.TOKENS], header[residency.TICK] = num_tokens, self._tick
        plan, self._plan = self._plan, None
        if plan is None:
            size = residency.AS_OF  # the victims stay, and so does what else the header says of them
        else:
            header[residency.AS_OF], header[residency.HEAD] = self._known, 0
            header[residency.QUEUE] = plan.queued
            header[residency.STREAM] = min(len(plan.slots), self.num_experts)
            size = HEADER + len(plan.slots)
            message[HEADER:size].numpy()[:] = plan.slots
            admit.numpy()[:] = plan.admitted
            self._r.admit.copy_(admit, non_blocking=True)
        self._r.control[:size].copy_(message[:size], non_blocking=True)

    def end_step(self, num_tokens: int, note: Any = None) -> None:
        """After a step was launched: have its report sent to the host."""
        words = self._r.report_words(num_tokens)
        self._buffers.rotate(1)
        buffer = self._buffers[0][:words]
        buffer.copy_(self._r.report[:words], non_blocking=True)
        event = None
        if self._on_gpu:
            event = torch.cuda.Event()
            event.record(torch.cuda.current_stream(self.device))
        _, layers, top_k = self._r.trace.shape
        first = NUM_COUNTERS + len(self._r.row_of)
        choices = buffer[first:].view(torch.int32)[: num_tokens * layers * top_k]
        chosen = choices.view(-1, layers, top_k).numpy()
        self._pending.append((StepReport(self._tick, chosen, note), buffer, event))

    def reports(self, *, wait: bool = False) -> Iterator[StepReport]:
        """Learn from the steps that are complete, oldest first; ``wait`` for all that were launched.

        Must be called after every step, or the reports of old ones are overwritten.
        """
        while self._pending:
            report, buffer, event = self._pending[0]
            if event is not None:
                if not (wait or len(self._pending) >= _IN_FLIGHT or event.query()):
                    return
                event.synchronize()
            self._pending.popleft()
            self._learn(report, buffer.numpy())
            yield report

    def plan_ahead(self) -> None:
        """Queue victims for the steps to come, by the policy and what it knows now, and choose prefetches."""
        plan = self._planner.plan(self.share)
        self._known = self._learned
        if self._promoter is not None and self.share is not None:
            self._promoter.plan(self.share, self._planner.rows, self._learned)
            # Else the device would often be first to bring in the same experts.
            plan.admitted[self._promoter.claimed] = 0
        self._plan = plan

    def verify(self) -> None:
        """Compare every slot with the store; waits for the device.

        Raises:
            RuntimeError: a slot holds other bytes than its expert's.
        """
        for slot, key in enumerate(self._r.key_of.tolist()):
            if key == residency.NO_KEY:
                continue
            if not torch.equal(self._r.slabs[slot].cpu(), self.record(key)):
                layer, expert = divmod(key, self.num_experts)
                raise RuntimeError(f"layer {layer}, expert {expert}: slot {slot} differs from the store")

    def close(self) -> None:
        """Wait for what was launched."""
        for _ in self.reports(wait=True):
            pass
        if self._promoter is not None:
            self._promoter.close()

    def _promote(self, promoter: Promoter) -> None:
        before = promoter.copies
        promoter.before_step(self._tick)
        started = promoter.copies - before
        nbytes = started * self.store.layout.expert_nbytes
        self.counters.prefetched += started
        self.counters.copies += started
        self.counters.bytes_host_to_device += nbytes
        count_moved("dram->hbm", nbytes)

    def _host_array(self, length: int, dtype: torch.dtype) -> Tensor:
        return torch.zeros(length, dtype=dtype, pin_memory=self._on_gpu)

    def _fill(self) -> None:
        """Give each layer its share of the slots to begin with."""
        layers, experts = self.store.num_layers, self.num_experts
        slots = torch.arange(self.num_slots, device=self.device)
        own = torch.from_numpy(np.flatnonzero(self._local >= 0)).to(self.device)
        keys = slots % layers * experts + own[slots // layers]
        self._r.key_of.copy_(keys)
        self._r.row_of[keys] = slots
        for part in torch.split(slots, experts):
            self._r.jobs[: len(part), 0] = self._r.far[keys[part]]
            self._r.jobs[: len(part), 1] = part
            self._r.control[residency.JOBS] = len(part)
            self._kernels.pull_records(self._r)
        self._planner.rows = self._r.row_of.cpu().numpy().copy()

    def _learn(self, report: StepReport, words: npt.NDArray[np.int64]) -> None:
        new = words[:NUM_COUNTERS] - self._counted
        self._counted = words[:NUM_COUNTERS].copy()
        planner = self._planner
        planner.rows = words[NUM_COUNTERS : NUM_COUNTERS + len(planner.rows)].copy()
        accesses, misses, pulls, ahead, ahead_used = new[:5].tolist()
        counters = self.counters
        counters.accesses += accesses
        counters.hits += accesses - misses
        counters.misses += misses
        counters.evictions += pulls + ahead
        counters.copies += pulls + ahead
        counters.prefetched += ahead
        counters.prefetch_used += ahead_used
        counters.in_place += misses - pulls
        counters.bytes_host_to_device += (pulls + ahead) * self.store.layout.expert_nbytes
        count_moved("dram->hbm", (misses + ahead) * self.store.layout.expert_nbytes)
        planner.accesses, planner.misses = accesses, misses
        used = planner.learn(report.chosen, self.share)
        if self._promoter is not None:
            before = self._promoter.used
            self._promoter.saw(used.reshape(-1), planner.rows)
            counters.prefetch_used += self._promoter.used - before
        self._learned = report.tick


def far_rows(store: HostExpertStore, slabs: Tensor, local: npt.NDArray[np.integer]) -> Tensor:
    """Row of each expert's record in host memory, counted from the first slot; int64 ``[keys]``.

    Args:
        store: the records.
        slabs: the slots.
        local: ``[experts]``, index in ``store`` of each expert of the model, or -1: REMOTE.

    Raises:
        ValueError: records and slots are not a whole number of records apart, or one stands where REMOTE is.
    """
    place = torch.from_numpy(np.asarray(local, dtype=np.int64))
    nbytes, rows = store.layout.nbytes, []
    for layer in range(store.num_layers):
        row, rest = divmod(store.record(layer, 0).data_ptr() - slabs.data_ptr(), nbytes)
        if rest:
            raise ValueError(
                f"moe_offload: the records of layer {layer} are {rest} bytes more than a whole number of "
                f"records ({nbytes} bytes each) away from the slots"
            )
        if row <= residency.REMOTE < row + store.num_experts:
            raise ValueError(f"moe_offload: a record of layer {layer} ends where the slots begin")
        rows.append(torch.where(place >= 0, place + row, residency.REMOTE))
    return torch.cat(rows)


def _kernels_of(device: torch.device) -> Any:
    if device.type != "cuda":
        return residency
    from vllm_moe_offload import residency_kernels

    return residency_kernels
