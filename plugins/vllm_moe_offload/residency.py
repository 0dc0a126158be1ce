"""Which expert is where, kept on the device so that a layer finds its experts without the host.

Experts are records of one size. A *row* names a record by its distance from the first slot, in records: rows
``0 .. num_slots - 1`` are slots on the device, any other row is the expert's own record in pinned host
memory. Kernels reach both from one base address, so an expert without a slot can be read where it lies.
Under expert parallelism an expert of another rank has the row REMOTE, which vLLM's kernel leaves out.

For each layer of a step :func:`plan_layer` notes which experts the router chose and gives missing ones the
slots that the host has queued as victims; :func:`pull_records` then copies their records into these slots,
each once. What gets no slot keeps its row and is read in place. :func:`foresee_layer` hands out slots ahead
of a layer's turn, to experts that a prediction names. All are kernels on a CUDA device
(``residency_kernels.py``) and plain torch elsewhere; the twins in this module define what they do.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

# The header of ``control``; the victims follow. The host writes all but JOBS.
TOKENS, TICK, AS_OF, QUEUE, STREAM, HEAD, JOBS = range(7)
HEADER = 8
# ``counters``
ACCESSES, MISSES, PULLS, AHEAD, AHEAD_USED = range(5)
NUM_COUNTERS = 6

NO_KEY = -1
REMOTE = -1


@dataclass(frozen=True)
class Residency:
    """Tables of one pool of slots; an expert's key is ``layer * num_experts + expert``.

    Attributes:
        slabs: uint8 ``[num_slots, record_nbytes]``, the slots.
        far: int64 ``[keys]``, row of each expert's record in host memory; REMOTE: another rank has it.
        report: int64, what the host reads back after a step: counters, ``row_of``, then the trace.
        counters: int64 ``[6]``: distinct experts that layers asked for, those of them without a slot, those
            of these that were given one, experts given one ahead of need, those of these that were then asked
            for; the last is spare.
        row_of: int64 ``[keys]``, where each expert is read.
        trace: int32 ``[max_tokens, layers, top_k]``, what the router chose in this step.
        last_used: int32 ``[keys]``, tick of the last step that used the expert.
        foreseen: int32 ``[keys]``, tick of the step for which the expert was predicted last, negative if that
            gave it a slot.
        key_of: int32 ``[num_slots]``, expert in each slot or -1.
        control: int32 ``[HEADER + num_slots]``. TOKENS: rows of the step that are tokens, the others are
            padding. TICK: its number, from 1. AS_OF: tick up to which the host knew the accesses when it
            ranked the victims. QUEUE, STREAM: victims that a small and a large batch may take. HEAD: the next
            one, from which on they are taken in turn. JOBS: copies of the layer.
        admit: uint8 ``[keys]``, whether an expert may take a slot of the queue when it is missing.
        picks: int32 ``[experts]``, victims of the layer.
        jobs: int64 ``[experts, 2]``, source and destination rows of the layer's copies.
        num_experts: experts of each layer.
    """

    slabs: Tensor
    far: Tensor
    report: Tensor
    counters: Tensor
    row_of: Tensor
    trace: Tensor
    last_used: Tensor
    foreseen: Tensor
    key_of: Tensor
    control: Tensor
    admit: Tensor
    picks: Tensor
    jobs: Tensor
    num_experts: int

    @classmethod
    def empty(cls, slabs: Tensor, far: Tensor, *, num_experts: int, top_k: int, max_tokens: int) -> Residency:
        """Tables for ``slabs`` that hold nothing yet.

        Args:
            slabs: uint8 ``[num_slots, record_nbytes]``.
            far: int64 ``[layers * num_experts]``.
            num_experts: experts of each layer.
            top_k: experts of each token.
            max_tokens: most tokens of a step.
        """
        device, keys, slots = slabs.device, len(far), len(slabs)
        layers = keys // num_experts
        words = -(-max_tokens * layers * top_k // 2)
        report = torch.zeros(NUM_COUNTERS + keys + words, dtype=torch.int64, device=device)
        row_of = report[NUM_COUNTERS : NUM_COUNTERS + keys]
        far = far.to(device)
        row_of.copy_(far)
        trace = report[NUM_COUNTERS + keys :].view(torch.int32)[: max_tokens * layers * top_k]

        def table(*shape: int, value: int = 0, dtype: torch.dtype = torch.int32) -> Tensor:
            return torch.full(shape, value, dtype=dtype, device=device)

        return cls(
            slabs=slabs,
            far=far,
            report=report,
            counters=report[:NUM_COUNTERS],
            row_of=row_of,
            trace=trace.view(max_tokens, layers, top_k),
            last_used=table(keys),
            foreseen=table(keys),
            key_of=table(slots, value=NO_KEY),
            control=table(HEADER + slots),
            admit=table(keys, value=1, dtype=torch.uint8),
            picks=table(num_experts),
            jobs=table(num_experts, 2, dtype=torch.int64),
            num_experts=num_experts,
        )

    @property
    def num_slots(self) -> int:
        """Slots on the device."""
        return len(self.slabs)

    @property
    def num_layers(self) -> int:
        """Layers of the pool."""
        return len(self.far) // self.num_experts

    def report_words(self, tokens: int) -> int:
        """Leading words of ``report`` that a step of ``tokens`` fills."""
        _, layers, top_k = self.trace.shape
        return NUM_COUNTERS + len(self.row_of) + -(-tokens * layers * top_k // 2)


def plan_layer(r: Residency, layer: int, topk_ids: Tensor, *, remap: bool, stream: bool) -> Tensor:
    """Note what a layer needs and hand out slots for what is missing.

    Args:
        r: the tables; all but ``far``, ``slabs`` and the host's part of ``control`` change.
        layer: its index in the pool.
        topk_ids: ``[T, k]`` expert ids, int32 or int64; rows from ``control[TOKENS]`` on are ignored.
        remap: return rows, with row 0 for padding; else the ids, with the first one for padding.
        stream: the batch uses most experts. Victims are then the first STREAM ones over and over, spared
            only while the layer itself needs them. Otherwise a victim keeps its slot if it was used after
            the host ranked it, and only admitted experts get one.

    Returns:
        int64 rows ``[T, k]``, or ids of the dtype of ``topk_ids``.
    """
    tokens_of_step, tick, as_of, queued, streamed = r.control[:HEAD].tolist()
    tokens = min(tokens_of_step, len(topk_ids), len(r.trace))
    ids = topk_ids[:tokens].long()
    experts, first = r.num_experts, layer * r.num_experts
    own = slice(first, first + experts)
    r.last_used[first + ids.reshape(-1)] = tick
    r.trace[:tokens, layer] = ids.int()
    rows = r.row_of[own]
    needed = (r.last_used[own] == tick) & (rows != REMOTE) & (tokens > 0)
    absent = needed & ((rows < 0) | (rows >= r.num_slots))
    wanted = absent if stream else absent & (r.admit[own] != 0)
    limit = streamed if stream else queued

    last_used = r.last_used.tolist()

    def is_free(key: int) -> bool:
        return (last_used[key] != tick or key // experts != layer) if stream else last_used[key] <= as_of

    given = _give_slots(r, first, wanted, limit, is_free)
    r.counters[PULLS] += given
    r.counters[ACCESSES] += int(needed.sum())
    r.counters[MISSES] += int(absent.sum())
    r.counters[AHEAD_USED] += int((needed & (r.foreseen[own] == -tick)).sum())

    if remap:
        out = torch.zeros(topk_ids.shape, dtype=torch.int64, device=topk_ids.device)
        out[:tokens] = r.row_of[first + ids]
        return out
    out = topk_ids.clone()
    out[tokens:] = topk_ids.flatten()[0]
    return out


def foresee_layer(r: Residency, layer: int, topk_ids: Tensor) -> None:
    """Hand out slots to absent experts that are predicted for a layer of this step whose turn is to come.

    Victims are those of small batches, but not what the prediction itself names.

    Args:
        r: the tables; ``last_used`` and ``trace`` stay as they are.
        layer: the coming layer.
        topk_ids: int64 ``[T, n]``, predicted ids; rows from ``control[TOKENS]`` on are ignored.
    """
    tokens, tick, as_of, queued = r.control[:STREAM].tolist()
    ids = topk_ids[:tokens].long()
    experts, first = r.num_experts, layer * r.num_experts
    own = slice(first, first + experts)
    r.foreseen[first + ids.reshape(-1)] = tick
    rows = r.row_of[own]
    absent = ((rows < 0) | (rows >= r.num_slots)) & (rows != REMOTE)
    wanted = (r.foreseen[own] == tick) & absent & (r.admit[own] != 0) & (tokens > 0)

    last_used, foreseen = r.last_used.tolist(), r.foreseen.tolist()

    def is_free(key: int) -> bool:
        return last_used[key] <= as_of and abs(foreseen[key]) != tick

    before = r.row_of[own].clone()
    r.counters[AHEAD] += _give_slots(r, first, wanted, queued, is_free)
    changed = wanted & (r.row_of[own] != before)
    r.foreseen[own] = torch.where(changed, -tick, r.foreseen[own])


def _give_slots(r: Residency, first: int, wanted: Tensor, limit: int, is_free: Callable[[int], bool]) -> int:
    """Slots of free victims, in turn, to the wanted experts of the layer with this first key; how many."""
    queue, key_of = r.control[HEADER:].tolist(), r.key_of.tolist()
    head, last = int(r.control[HEAD]), -1
    experts = wanted.nonzero().flatten().tolist()
    victims: list[int] = []
    for place in range(limit):
        if len(victims) == len(experts):
            break
        slot = queue[(head + place) % limit]
        if key_of[slot] == NO_KEY or is_free(key_of[slot]):
            victims.append(slot)
            last = place
    for job, (slot, expert) in enumerate(zip(victims, experts, strict=False)):
        if key_of[slot] != NO_KEY:
            r.row_of[key_of[slot]] = r.far[key_of[slot]]
        r.jobs[job, 0], r.jobs[job, 1] = r.far[first + expert], slot
        r.key_of[slot] = first + expert
        r.row_of[first + expert] = slot
    if last >= 0:
        r.control[HEAD] = (head + last + 1) % limit
    r.control[JOBS] = len(victims)
    return len(victims)


def pull_records(r: Residency) -> None:
    """Copy the planned records into their slots; ``r.slabs`` and the records must be on the CPU."""
    base, nbytes = r.slabs.data_ptr(), r.slabs.shape[1]
    for source, slot in r.jobs[: int(r.control[JOBS])].tolist():
        ctypes.memmove(base + slot * nbytes, base + source * nbytes, nbytes)
