"""``vllm-moe-offload``: is offload active, and what would a policy make of a recorded trace?"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line and return its exit code: 0, 1 for a finding of doctor, 2 for bad input."""
    parser = argparse.ArgumentParser(prog="vllm-moe-offload", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    doctor = commands.add_parser("doctor", help="say why offload would be inactive (exit code 1)")
    doctor.add_argument("--additional-config", help="JSON as given to vLLM; checked if given")
    doctor.add_argument("--model", help="model folder; checked if given")
    replay = commands.add_parser("replay", help="replay a recorded routing trace through eviction policies")
    replay.add_argument("trace", help=".npz written by RoutingTrace.save")
    replay.add_argument("--residency", type=float, nargs="+", default=[0.06, 0.12, 0.25, 0.5])
    replay.add_argument("--policy", nargs="+", default=["lru", "lfu", "least_stale", "eam", "belady"])
    replay.add_argument("--prefetch", default="none", choices=["none", "eam", "oracle"])
    replay.add_argument("--json", action="store_true", help="one JSON object a line instead of a table")
    trace = commands.add_parser("trace", help="describe a recorded routing trace")
    trace.add_argument("trace", help=".npz written by RoutingTrace.save")
    options = parser.parse_args(arguments)
    try:
        return {"doctor": _doctor, "replay": _replay, "trace": _trace}[options.command](options)
    except (OSError, ValueError) as error:
        print(f"vllm-moe-offload: {error}", file=sys.stderr)
        return 2


def _doctor(options: argparse.Namespace) -> int:
    from vllm_moe_offload.doctor import Problem, diagnose

    config = None
    if options.additional_config is not None:
        try:
            config = json.loads(options.additional_config)
        except ValueError as error:
            raise ValueError(f"--additional-config is not JSON: {error}") from error
    try:
        for line in diagnose(config, options.model):
            print(line)
    except Problem as problem:
        print(problem, file=sys.stderr)
        return 1
    return 0


def _replay(options: argparse.Namespace) -> int:
    from vllm_moe_offload.simulator import replay
    from vllm_moe_offload.trace import RoutingTrace

    trace = RoutingTrace.load(options.trace)
    rows = []
    for residency in options.residency:
        if not 0 < residency <= 1:
            raise ValueError(f"--residency must be in (0, 1], got {residency}")
        slots = max(round(residency * trace.num_layers * trace.num_experts), trace.top_k)
        for policy in options.policy:
            result = replay(trace, num_slots=slots, policy=policy, prefetch=options.prefetch)
            rows.append({"residency": residency, "slots": slots, "policy": policy, **result.as_dict()})
    if options.json:
        for row in rows:
            print(json.dumps(row))
        return 0
    from rich.console import Console
    from rich.table import Table

    names = ["residency", "slots", "policy", "accesses", "hits", "late", "misses", "hit_rate"]
    table = Table(*names)
    for row in rows:
        table.add_row(*(f"{row[name]:.3f}" if name == "hit_rate" else str(row[name]) for name in names))
    Console().print(table)
    return 0


def _trace(options: argparse.Namespace) -> int:
    from vllm_moe_offload.trace import RoutingTrace

    trace = RoutingTrace.load(options.trace)
    summary = {
        "tokens": len(trace.request),
        "requests": len(trace.request_ids or ()),
        "steps": len(set(trace.step.tolist())),
        "layers": trace.num_layers,
        "experts": trace.num_experts,
        "top_k": trace.top_k,
    }
    print(json.dumps(summary))
    return 0


if __name__ == "__main__":
    sys.exit(main())
