"""Triton kernels of :mod:`vllm_moe_offload.residency`, whose functions are their twins.

Fit for CUDA graphs: no shape depends on what the router chose, and nothing is read back.
"""

# Jitted functions take no annotations but constexpr, and every argument by position.
# ruff: noqa: ANN001, ANN202, PLR0917
# mypy: disallow-untyped-defs=False

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from vllm_moe_offload import residency
from vllm_moe_offload.residency import Residency

_TOKENS = tl.constexpr(residency.TOKENS)
_TICK = tl.constexpr(residency.TICK)
_AS_OF = tl.constexpr(residency.AS_OF)
_QUEUE = tl.constexpr(residency.QUEUE)
_STREAM = tl.constexpr(residency.STREAM)
_HEAD = tl.constexpr(residency.HEAD)
_JOBS = tl.constexpr(residency.JOBS)
_HEADER = tl.constexpr(residency.HEADER)
_REMOTE = tl.constexpr(residency.REMOTE)
_ACCESSES = tl.constexpr(residency.ACCESSES)
_MISSES = tl.constexpr(residency.MISSES)
_PULLS = tl.constexpr(residency.PULLS)
_AHEAD = tl.constexpr(residency.AHEAD)
_AHEAD_USED = tl.constexpr(residency.AHEAD_USED)

_PLAN_BLOCK = 1024  # ids at a time
_PROBE = 128  # victims at a time
_PULL_WORDS = 4096  # 16 KiB: four 16-byte loads of each of 256 threads in flight
_PULL_WARPS = 8
_PROGRAMS_PER_SM = 2


# Layers and batch sizes vary: one compilation must do for all of them.
@triton.jit(do_not_specialize=["num_ids", "layer"])
def _plan_kernel(
    ids_ptr,
    out_ptr,
    control_ptr,
    counters_ptr,
    row_of_ptr,
    far_ptr,
    last_used_ptr,
    foreseen_ptr,
    key_of_ptr,
    trace_ptr,
    admit_ptr,
    picks_ptr,
    jobs_ptr,
    num_ids,
    layer,
    num_experts,
    num_slots,
    max_tokens,
    top_k,
    token_stride,
    REMAP: tl.constexpr,
    STREAMS: tl.constexpr,
    FORESEE: tl.constexpr,
    EXPERTS: tl.constexpr,
    BLOCK: tl.constexpr,
    PROBE: tl.constexpr,
):
    """One program. Barriers stand where it reads what other threads of it wrote.

    FORESEE: the ids are predicted. They are noted as such, and nothing counts as used.
    """
    tokens = tl.minimum(tl.load(control_ptr + _TOKENS), max_tokens)
    tick = tl.load(control_ptr + _TICK)
    valid = tl.minimum(tokens * top_k, num_ids)
    first = layer * num_experts
    for start in range(0, num_ids, BLOCK):
        at = start + tl.arange(0, BLOCK)
        mask = at < valid
        ids = tl.load(ids_ptr + at, mask=mask, other=0).to(tl.int32)
        if FORESEE:
            tl.store(foreseen_ptr + first + ids, tick, mask=mask)
        else:
            tl.store(last_used_ptr + first + ids, tick, mask=mask)
            place = (at // top_k).to(tl.int64) * token_stride + layer * top_k + at % top_k
            tl.store(trace_ptr + place, ids, mask=mask)
    tl.debug_barrier()

    expert = tl.arange(0, EXPERTS)
    inside = expert < num_experts
    foreseen = tl.load(foreseen_ptr + first + expert, mask=inside, other=0)
    used = foreseen
    if not FORESEE:
        used = tl.load(last_used_ptr + first + expert, mask=inside, other=-1)
    rows = tl.load(row_of_ptr + first + expert, mask=inside, other=0)
    needed = inside & (used == tl.where(valid > 0, tick, -2)) & (rows != _REMOTE)
    absent = needed & ((rows < 0) | (rows >= num_slots))
    missing = tl.sum(absent.to(tl.int32), axis=0)
    wants = absent
    if not STREAMS:
        wants = absent & (tl.load(admit_ptr + first + expert, mask=inside, other=0) != 0)
    wanted = tl.sum(wants.to(tl.int32), axis=0)
    taken = wanted * 0
    if wanted > 0:
        as_of = tl.load(control_ptr + _AS_OF)
        head = tl.load(control_ptr + _HEAD)
        if STREAMS:
            limit = tl.load(control_ptr + _STREAM)
        else:
            limit = tl.load(control_ptr + _QUEUE)
        scanned = wanted * 0
        end = wanted * 0 - 1
        while (taken < wanted) & (scanned < limit):
            at = scanned + tl.arange(0, PROBE)
            queued = at < limit
            slot = tl.load(control_ptr + _HEADER + (head + at) % limit, mask=queued, other=0)
            key = tl.load(key_of_ptr + slot, mask=queued, other=-1)
            last = tl.load(last_used_ptr + key, mask=queued & (key >= 0), other=-1)
            if STREAMS:
                free = queued & ((last != tick) | (key // num_experts != layer))
            else:
                free = queued & (last <= as_of)
            if FORESEE:
                named = tl.load(foreseen_ptr + key, mask=queued & (key >= 0), other=0)
                free = free & ((named != tick) & (named != -tick))
            order = taken + tl.cumsum(free.to(tl.int32), axis=0) - 1
            picked = free & (order < wanted)
            tl.store(picks_ptr + order, slot, mask=picked)
            end = tl.maximum(end, tl.max(tl.where(picked, at, -1), axis=0))
            taken += tl.sum(picked.to(tl.int32), axis=0)
            scanned += PROBE
        tl.debug_barrier()
        rank = tl.cumsum(wants.to(tl.int32), axis=0) - 1
        pulled = wants & (rank < taken)
        slot = tl.load(picks_ptr + rank, mask=pulled, other=0)
        old = tl.load(key_of_ptr + slot, mask=pulled, other=-1)
        tl.debug_barrier()
        leaves = pulled & (old >= 0)
        tl.store(row_of_ptr + old, tl.load(far_ptr + old, mask=leaves, other=0), mask=leaves)
        tl.store(key_of_ptr + slot, first + expert, mask=pulled)
        tl.store(row_of_ptr + first + expert, slot.to(tl.int64), mask=pulled)
        tl.store(jobs_ptr + rank * 2, rows, mask=pulled)
        tl.store(jobs_ptr + rank * 2 + 1, slot.to(tl.int64), mask=pulled)
        if FORESEE:
            tl.store(foreseen_ptr + first + expert, -tick, mask=pulled)
        if end >= 0:
            tl.store(control_ptr + _HEAD, (head + end + 1) % limit)
        tl.debug_barrier()
    tl.store(control_ptr + _JOBS, taken)
    if FORESEE:
        tl.store(counters_ptr + _AHEAD, tl.load(counters_ptr + _AHEAD) + taken)
        return
    accesses = tl.sum(needed.to(tl.int64), axis=0)
    ahead = tl.sum((needed & (foreseen == -tick)).to(tl.int64), axis=0)
    tl.store(counters_ptr + _ACCESSES, tl.load(counters_ptr + _ACCESSES) + accesses)
    tl.store(counters_ptr + _MISSES, tl.load(counters_ptr + _MISSES) + missing)
    tl.store(counters_ptr + _PULLS, tl.load(counters_ptr + _PULLS) + taken)
    tl.store(counters_ptr + _AHEAD_USED, tl.load(counters_ptr + _AHEAD_USED) + ahead)

    padding = tl.load(ids_ptr)
    for start in range(0, num_ids, BLOCK):
        at = start + tl.arange(0, BLOCK)
        ids = tl.load(ids_ptr + at, mask=at < valid, other=0)
        if REMAP:
            row = tl.load(row_of_ptr + first + ids, mask=at < valid, other=0)
            tl.store(out_ptr + at, row, mask=at < num_ids)
        else:
            tl.store(out_ptr + at, tl.where(at < valid, ids, padding), mask=at < num_ids)


@triton.jit
def _pull_kernel(base_ptr, control_ptr, jobs_ptr, words, BLOCK: tl.constexpr):
    """All programs share all copies, block by block. ``base_ptr``: the first slot, as 32-bit words."""
    blocks = tl.cdiv(words, BLOCK)
    total = tl.load(control_ptr + _JOBS) * blocks
    for block in range(tl.program_id(0), total, tl.num_programs(0)):
        job = block // blocks
        source = tl.load(jobs_ptr + job * 2)
        slot = tl.load(jobs_ptr + job * 2 + 1)
        at = (block % blocks) * BLOCK + tl.arange(0, BLOCK)
        mask = at < words
        record = tl.load(base_ptr + source * words + at, mask=mask)
        tl.store(base_ptr + slot * words + at, record, mask=mask)


def plan_layer(r: Residency, layer: int, topk_ids: Tensor, *, remap: bool, stream: bool) -> Tensor:
    """As :func:`vllm_moe_offload.residency.plan_layer`; ``topk_ids`` must be contiguous."""
    out = torch.empty_like(topk_ids, dtype=torch.int64 if remap else topk_ids.dtype)
    _plan(r, layer, topk_ids, out, remap=remap, stream=stream, foresee=False)
    return out


def foresee_layer(r: Residency, layer: int, topk_ids: Tensor) -> None:
    """As :func:`vllm_moe_offload.residency.foresee_layer`; ``topk_ids`` must be contiguous."""
    _plan(r, layer, topk_ids, topk_ids, remap=False, stream=False, foresee=True)


def _plan(
    r: Residency, layer: int, topk_ids: Tensor, out: Tensor, *, remap: bool, stream: bool, foresee: bool
) -> None:
    if not topk_ids.is_contiguous():
        raise ValueError("moe_offload: topk_ids must be contiguous")
    max_tokens, layers, top_k = r.trace.shape
    _plan_kernel[(1,)](
        topk_ids,
        out,
        r.control,
        r.counters,
        r.row_of,
        r.far,
        r.last_used,
        r.foreseen,
        r.key_of,
        r.trace,
        r.admit,
        r.picks,
        r.jobs,
        topk_ids.numel(),
        layer,
        r.num_experts,
        r.num_slots,
        max_tokens,
        topk_ids.shape[1],
        layers * top_k,
        REMAP=remap,
        STREAMS=stream,
        FORESEE=foresee,
        EXPERTS=triton.next_power_of_2(r.num_experts),
        BLOCK=_PLAN_BLOCK,
        PROBE=_PROBE,
        num_warps=4,
    )


def pull_records(r: Residency) -> None:
    """As :func:`vllm_moe_offload.residency.pull_records`, on any memory that the device reaches."""
    if r.slabs.is_cuda:
        programs = _PROGRAMS_PER_SM * torch.cuda.get_device_properties(r.slabs.device).multi_processor_count
    else:
        programs = 3  # the interpreter runs them one after the other
    _pull_kernel[(programs,)](
        r.slabs.view(torch.int32),
        r.control,
        r.jobs,
        r.slabs.shape[1] // 4,
        BLOCK=_PULL_WORDS,
        num_warps=_PULL_WARPS,
    )
