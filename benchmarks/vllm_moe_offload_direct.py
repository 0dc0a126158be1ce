"""Hits of the pool that the device manages, by policy, with a host that learns of a step one step late.

    python benchmarks/vllm_moe_offload_direct.py [--out DIR] [--steps 110] [--layers 6]

The engine's own pool (:class:`vllm_moe_offload.DirectCache`) on the CPU, with kernels in plain torch and
experts of a few bytes, fed with the traces of vllm_moe_offload_gpu.py. Counted over the second half of the
steps: hits, and how misses were served. `static` is the best fixed choice of experts for the whole trace.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks.common import RESULTS, Headline, write_result
from benchmarks.vllm_moe_offload_gpu import SHAPE, routing
from vllm_moe_offload import DirectCache, EAMCollection, HostExpertStore, SlabLayout
from vllm_moe_offload.shares import ShareEstimator

ARMS = {"lru": ("lru", 0.0), "lfu": ("lfu", 0.0), "eam": ("eam", 0.0), "eam, prefetch": ("eam", 0.25)}
COUNTERS = ("accesses", "hits", "misses", "copies", "in_place", "prefetched", "prefetch_used")


def replay(choices: np.ndarray, residency: float, policy: str, host_share: float) -> dict[str, int]:
    """Counters of the second half of ``choices`` ``[steps, layers, rows, top_k]``; every row is a request."""
    steps, layers, rows, top_k = choices.shape
    experts, requests = SHAPE.experts, {str(row): 1 for row in range(rows)}
    tensors = [{"w": torch.zeros(experts, 1)} for _ in range(layers)]
    slots = int(residency * layers * experts)
    slabs = torch.zeros(slots, SlabLayout.from_tensors(tensors[0]).nbytes, dtype=torch.uint8)
    store = HostExpertStore(tensors, pin_memory=False, aligned_to=slabs.data_ptr())
    cache = DirectCache(
        store, slabs, policy=policy, top_k=top_k, max_tokens=rows, host_slots=int(host_share * slots)
    )
    estimator = ShareEstimator(EAMCollection(layers, experts))
    half: dict[str, Any] = {}
    for step in range(steps):
        cache.begin_step(rows)
        for layer in range(layers):
            cache.serve(layer, torch.from_numpy(np.ascontiguousarray(choices[step, layer])), remap=False)
        cache.end_step(rows)
        held_back = cache._pending.pop()  # the step that still runs
        for report in cache.reports():
            estimator.observe_step(
                [(request, slice(row, row + 1)) for row, request in enumerate(requests)], report.chosen
            )
            cache.share = estimator.step_share(requests)
            cache.plan_ahead()
        cache._pending.append(held_back)
        if step == steps // 2:
            half = dict(cache.stats)
    return {name: int(cache.stats[name] - half[name]) for name in COUNTERS}


def static_hit_rate(choices: np.ndarray, residency: float) -> float:
    """Hits of the experts that the most steps need, had they the slots throughout."""
    steps, layers = choices.shape[:2]
    needed = np.zeros((steps, layers, SHAPE.experts), dtype=bool)
    for step in range(steps):
        for layer in range(layers):
            needed[step, layer, choices[step, layer].reshape(-1)] = True
    counts = needed.sum(axis=0).reshape(-1)
    kept = np.argsort(-counts)[: int(residency * len(counts))]
    return float(counts[kept].sum() / counts.sum())


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder of the result file")
    parser.add_argument("--steps", type=int, default=110)
    parser.add_argument("--layers", type=int, default=6)
    parser.add_argument("--residency", type=float, default=0.25)
    arguments = parser.parse_args()
    rows, headline = [], []
    for kind in ("topic_local", "uniform"):
        choices = routing(kind, arguments.layers)[: arguments.steps]
        for batch in (1, 8, 32):
            part = choices[:, :, :batch]
            where = f"{kind.replace('_', '-')}, batch {batch}"
            best = static_hit_rate(part, arguments.residency)
            headline.append(Headline(f"{where}: static", best, "hit rate"))
            for arm, (policy, host_share) in ARMS.items():
                found = replay(part, arguments.residency, policy, host_share)
                rate = found["hits"] / found["accesses"]
                served = f"of {found['misses']} misses {found['in_place']} in place"
                note = f"{served}, {found['prefetch_used']} of {found['prefetched']} prefetches used"
                headline.append(Headline(f"{where}: {arm}", rate, "hit rate", note=note))
                rows.append({"trace": kind, "batch": batch, "arm": arm, "hit_rate": rate, **found})
                print(f"{where}: {arm} {rate:.3f}, {note}", flush=True)
    write_result(
        "vllm_moe_offload_direct",
        question="What does the device's own pool hit with a host that lags, and how does it serve misses?",
        headline=headline,
        samples={},
        folder=arguments.out,
        residency=arguments.residency,
        layers=arguments.layers,
        steps=arguments.steps,
        rows=rows,
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
