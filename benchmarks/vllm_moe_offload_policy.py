"""Hit rate of every eviction policy against residency, with Belady's bound, by replay.

    python benchmarks/vllm_moe_offload_policy.py [--out DIR] [--seeds 2] [--trace RECORDED.npz]

Traces: topic-local (requests of 8 latent topics, Dirichlet 0.08, 15 % noise: the paper's premise), uniform
(no structure), cyclic, and any recorded one. Several seeds; all policies replay the same traces.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.common import RESULTS, Headline, write_result
from vllm_moe_offload import RoutingTrace, replay

LAYERS, EXPERTS, TOP_K, REQUESTS, TOKENS = 8, 64, 6, 60, 16
POLICIES = ("lru", "lfu", "least_stale", "eam", "eam_reference", "belady")
RESIDENCIES = (0.06, 0.125, 0.25, 0.5)


def generated(kind: str, seed: int) -> RoutingTrace:
    """One request after the other, one token a step."""
    rng = np.random.default_rng(seed)
    taste = rng.dirichlet(np.full(EXPERTS, 0.08), size=(8, LAYERS))
    topics = rng.integers(8, size=REQUESTS).repeat(TOKENS)
    tokens = len(topics)
    if kind == "cyclic":
        base = np.arange(tokens)[:, None, None] * TOP_K + np.arange(TOP_K)
        ids = np.broadcast_to(base % EXPERTS, (tokens, LAYERS, TOP_K))
    else:
        noise = 0.15 if kind == "topic_local" else 1.0
        share = (1 - noise) * taste[topics] + noise / EXPERTS
        # Gumbel top-k draws without replacement by the shares.
        ids = np.argsort(-(np.log(share) + rng.gumbel(size=share.shape)), axis=2)[:, :, :TOP_K]
    return RoutingTrace(ids, np.arange(REQUESTS).repeat(TOKENS), np.arange(tokens), EXPERTS)


def headline(rows: Sequence[Mapping[str, Any]]) -> list[Headline]:
    """The hit rate of each policy at each residency; the interval spans the traces."""
    return [
        Headline(
            f"{row['trace']}, {row['residency']:.1%} resident: {row['policy']}",
            row["hit_rate"],
            "hit rate",
            min(row["hit_rate_samples"]),
            max(row["hit_rate_samples"]),
        )
        for row in rows
    ]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder of the result file")
    parser.add_argument("--trace", type=Path, help="recorded trace to replay besides the generated ones")
    parser.add_argument("--seeds", type=int, default=2)
    parser.add_argument("--kinds", nargs="*", default=["topic_local", "uniform", "cyclic"])
    parser.add_argument("--residency", type=float, nargs="+", default=list(RESIDENCIES))
    arguments = parser.parse_args()
    traces = {kind: [generated(kind, seed) for seed in range(arguments.seeds)] for kind in arguments.kinds}
    if arguments.trace:
        traces["recorded"] = [RoutingTrace.load(arguments.trace)]
    rows = []
    for kind, variants in traces.items():
        for residency in arguments.residency:
            for policy in POLICIES:
                start = time.perf_counter()
                rates = []
                for trace in variants:
                    slots = round(residency * trace.num_layers * trace.num_experts)
                    rates.append(replay(trace, num_slots=slots, policy=policy).hit_rate)
                rows.append(
                    {
                        "trace": kind,
                        "residency": residency,
                        "policy": policy,
                        "hit_rate": statistics.mean(rates),
                        "hit_rate_samples": rates,
                        "seconds": time.perf_counter() - start,
                    }
                )
                print(f"{kind} {residency} {policy}: {rows[-1]['hit_rate']:.3f}", flush=True)
    write_result(
        "vllm_moe_offload_policy",
        question="What share of expert requests does each eviction policy serve from its slots?",
        headline=headline(rows),
        samples={
            f"{row['trace']} {row['residency']} {row['policy']}": row["hit_rate_samples"] for row in rows
        },
        folder=arguments.out,
        sample_unit="hit rate of one trace",
        shape={"layers": LAYERS, "experts": EXPERTS, "top_k": TOP_K, "requests": REQUESTS, "tokens": TOKENS},
        rows=rows,
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
