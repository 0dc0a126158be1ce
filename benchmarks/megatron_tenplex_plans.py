"""Exact bytes of plans, and planning time for 8 to 1024 ranks; needs neither processes nor GPUs.

python benchmarks/megatron_tenplex_plans.py [--ranks N ...]
"""

from __future__ import annotations

import argparse
import math
import time
from pathlib import Path

from benchmarks.common import RESULTS, Headline, write_result
from megatron_tenplex import (
    GPTShape,
    ParallelConfig,
    Topology,
    assign_roles,
    gpt_layout,
    lower_bound,
    plan_reshard,
)
from megatron_tenplex.layout import PRESETS
from megatron_tenplex.simulator import simulate

SMALL = GPTShape(4, 64, 4, 128)
# (workers, (tp, pp) before, (tp, pp) after); data parallelism fills the workers.
ROWS = (
    (2, (2, 1), (1, 2)),
    (4, (2, 1), (1, 2)),
    (4, (2, 2), (2, 1)),
    (4, (1, 1), (2, 2)),
    (4, (1, 4), (4, 1)),
    (4, (2, 1), (1, 1)),
    (8, (2, 2), (4, 1)),
)


def layout(shape, workers, degrees, precision="fp32"):
    tp, pp = degrees
    return gpt_layout(shape, ParallelConfig(tp=tp, pp=pp, dp=workers // (tp * pp)), precision=precision)


def reference_rows():
    """Bytes of seven changes of a small GPT: identity, placed, and the paper code's busiest sender."""
    rows = []
    for workers, before, after in ROWS:
        source, target = layout(SMALL, workers, before), layout(SMALL, workers, after)
        identity = plan_reshard(source, target)
        placed = plan_reshard(source, target, placement=assign_roles(source, target))
        first = plan_reshard(source, target, source_policy="first")
        rows.append(
            {
                "workers": workers,
                "from": f"tp={before[0]},pp={before[1]}",
                "to": f"tp={after[0]},pp={after[1]}",
                "identity_bytes": identity.remote_bytes,
                "identity_bound": lower_bound(source, target),
                "placed_bytes": placed.remote_bytes,
                "placed_bound": lower_bound(source, target, placement=placed.placement),
                "most_sent": int(identity.sent_bytes.max()),
                "most_sent_first_holder": int(first.sent_bytes.max()),
            }
        )
    return rows


def relay_rows(shape, topology):
    """Bytes between hosts with and without passing on inside hosts, where replicas multiply."""
    source = gpt_layout(shape, ParallelConfig(tp=4, pp=1, dp=2))
    target = gpt_layout(shape, ParallelConfig(tp=2, pp=1, dp=16))
    plain, relay = (plan_reshard(source, target, topology=topology, relay=r) for r in (False, True))
    return {
        "plain": plain.inter_host_bytes,
        "relay": relay.inter_host_bytes,
        "from": "tp=4,dp=2",
        "to": "tp=2,dp=16",
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--ranks", type=int, nargs="+", default=[8, 16, 32, 64, 128, 256, 512, 1024])
    parser.add_argument("--out", type=Path, default=RESULTS)
    options = parser.parse_args()
    started = time.perf_counter()
    rows = reference_rows()
    exact = max(r[f"{kind}_bytes"] / r[f"{kind}_bound"] for r in rows for kind in ("identity", "placed"))
    mean = math.prod(r["placed_bytes"] / r["identity_bytes"] for r in rows) ** (1 / len(rows))
    topology = Topology(ranks_per_host=8)
    relay = relay_rows(PRESETS["gpt3-xl"], topology)
    simulated = []
    for row in simulate(PRESETS["gpt3-175b"], options.ranks, topology):
        simulated.append(row)
        print(row["ranks"], row["change"], f"{row['planning_seconds']:.2f} s", flush=True)
    largest = [row for row in simulated if row["ranks"] == max(options.ranks)]
    planning = [row["placement_seconds"] + row["planning_seconds"] for row in largest]
    own = [row["own_part_seconds"] for row in largest]
    write_result(
        "megatron_tenplex_plans",
        question="Do plans move the fewest bytes, and how long does planning take for many ranks?",
        headline=[
            Headline("planned bytes over the lower bound, worst of 14 plans", exact, "", target="1.000"),
            Headline("placed over identity, geometric mean of seven changes", mean, "", target="<= 0.68"),
            Headline(
                f"placement and plan of a 175 B model for {max(options.ranks)} ranks, slowest change",
                max(planning),
                "s",
                min(planning),
                max(planning),
                "<= 5",
                "CPU seconds of one process",
            ),
            Headline(
                f"one worker's part of that plan, {max(options.ranks)} ranks",
                max(own),
                "s",
                min(own),
                max(own),
                "<= 0.5",
            ),
            Headline(
                "relay: bytes between hosts over those without it",
                relay["relay"] / relay["plain"],
                "",
                note=f"gpt3-xl, {relay['from']} to {relay['to']}, 8 ranks a host",
            ),
        ],
        samples={"placement_and_planning_seconds": planning, "own_part_seconds": own},
        folder=options.out,
        rows=rows,
        relay=relay,
        simulated=simulated,
        total_seconds=time.perf_counter() - started,
    )


if __name__ == "__main__":
    main()
