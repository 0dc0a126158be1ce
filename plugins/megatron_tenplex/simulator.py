"""Plans for many ranks without processes: how much moves, where, and how long planning takes."""

from __future__ import annotations

import math
import time
from collections.abc import Iterator, Sequence
from typing import Any, Literal

from megatron_tenplex.layout import GPTShape, ParallelConfig, check_shape, gpt_layout
from megatron_tenplex.placement import assign_roles
from megatron_tenplex.planner import lower_bound, plan_reshard
from megatron_tenplex.topology import Topology


def changes(shape: GPTShape, ranks: int) -> Iterator[tuple[str, ParallelConfig, ParallelConfig]]:
    """(name, from, to) of the usual changes on up to ``ranks`` ranks, as far as they divide the model."""
    heads = math.gcd(shape.num_attention_heads, shape.num_query_groups or shape.num_attention_heads)
    tp = _dividing(min(8, ranks // 2), heads)
    pp = _dividing(max(1, min(16, ranks // (2 * tp))), shape.num_layers)
    rows = (
        ("grow", (tp, pp, ranks // (2 * tp * pp)), (tp, pp, ranks // (tp * pp))),
        ("shrink", (tp, pp, ranks // (tp * pp)), (tp, pp, ranks // (2 * tp * pp))),
        ("tp to pp", (tp, pp, ranks // (tp * pp)), (tp // 2, 2 * pp, ranks // (tp * pp))),
        ("pp to dp", (tp, 2 * pp, ranks // (2 * tp * pp)), (tp, pp, ranks // (tp * pp))),
    )
    for name, before, after in rows:
        layouts = []
        for t, p, d in (before, after):
            if min(t, p, d) < 1:
                break
            parallel = ParallelConfig(tp=t, pp=p, dp=d)
            try:
                check_shape(shape, parallel)
            except ValueError:
                break
            layouts.append(parallel)
        if len(layouts) == 2:
            yield name, layouts[0], layouts[1]


def _dividing(degree: int, size: int) -> int:
    """The largest ``degree / 2**n`` that divides ``size``."""
    while size % degree:
        degree //= 2
    return degree


def simulate(
    shape: GPTShape,
    rank_counts: Sequence[int],
    topology: Topology,
    precision: Literal["fp32", "bf16"] = "bf16",
) -> Iterator[dict[str, Any]]:
    """One row for each rank count and change; bytes exact, transfer predicted, planning in CPU seconds."""
    for ranks in rank_counts:
        if ranks < 2:
            raise ValueError(f"rank counts must be at least 2, got {ranks}")
        for name, before, after in changes(shape, ranks):
            source = gpt_layout(shape, before, precision=precision)
            target = gpt_layout(shape, after, precision=precision)
            started = time.process_time()
            placement = assign_roles(source, target, topology=topology)
            assigned = time.process_time()
            plan = plan_reshard(source, target, placement=placement, topology=topology)
            planned = time.process_time()
            plan.for_worker(0)
            own = time.process_time() - planned
            yield {
                "ranks": ranks,
                "change": name,
                "from": str(before),
                "to": str(after),
                "shards": sum(map(len, source.shards)) + sum(map(len, target.shards)),
                "moves": len(plan.moves),
                "remote_bytes": plan.remote_bytes,
                "minimum_bytes": lower_bound(source, target, placement=placement),
                "identity_bytes": lower_bound(source, target),
                "inter_host_bytes": plan.inter_host_bytes,
                "bottleneck_bytes": plan.bottleneck_bytes,
                "predicted_seconds": plan.predict(),
                "placement_seconds": assigned - started,
                "planning_seconds": planned - assigned,
                "own_part_seconds": own,
            }
