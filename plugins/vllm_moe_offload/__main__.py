"""``vllm-moe-offload``: is offload active, what would a policy make of a recorded trace, how does it run?"""

from __future__ import annotations

import argparse
import json
import math
import sys
import time
from collections import deque
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from vllm_moe_offload.config import POLICIES

if TYPE_CHECKING:
    from rich.table import Table


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
    replay.add_argument(
        "--policy",
        nargs="+",
        default=["lru", "lfu", "least_stale", "eam", "belady"],
        choices=[*POLICIES, "belady"],
        metavar="POLICY",
        help=f"of {', '.join(POLICIES)} and belady, the bound of all; default: most of them",
    )
    replay.add_argument("--prefetch", default="none", choices=["none", "eam", "oracle"])
    replay.add_argument("--json", action="store_true", help="one JSON object a line instead of a table")
    trace = commands.add_parser("trace", help="describe a recorded routing trace, or watch running engines")
    trace.add_argument("trace", nargs="?", help=".npz written by RoutingTrace.save")
    trace.add_argument("--live", action="store_true", help="show this user's running engines instead")
    trace.add_argument("--seconds", type=float, help="with --live: stop after so long")
    trace.add_argument("--json", action="store_true", help="one JSON object instead of text")
    options = parser.parse_args(arguments)
    try:
        return {"doctor": _doctor, "replay": _replay, "trace": _trace}[options.command](options)
    except OSError as error:
        where = f"cannot read {error.filename}: " if error.filename else ""
        print(f"vllm-moe-offload: {where}{error.strerror or error}", file=sys.stderr)
        return 2
    except ValueError as error:
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
    from vllm_moe_offload.trace import RoutingTrace, kept_experts

    if options.live == (options.trace is not None):
        raise ValueError("trace: give a recorded trace, or --live")
    if options.seconds is not None and not options.seconds >= 0:
        raise ValueError(f"trace: --seconds must be 0 or more, got {options.seconds}")
    if options.live:
        return _watch(options.seconds)
    trace = RoutingTrace.load(options.trace)
    summary: dict[str, Any] = {
        "tokens": len(trace.request),
        "requests": len(trace.request_ids or ()),
        "steps": len(set(trace.step.tolist())),
        "layers": trace.num_layers,
        "experts": trace.num_experts,
        "top_k": trace.top_k,
        "kept_from_token_to_token": kept_experts(trace),
    }
    if options.json:
        print(json.dumps(summary))
        return 0
    for name, value in summary.items():
        shown = f"{value:.3f}" if isinstance(value, float) else "-" if value is None else f"{value:,}"
        print(f"{name.replace('_', ' '):<26}{shown:>12}")
    return 0


def _watch(seconds: float | None) -> int:
    """A table of the running engines, renewed twice a second, with rates over the last two seconds."""
    from rich.live import Live

    from vllm_moe_offload.live import read_live

    end = math.inf if seconds is None else time.monotonic() + seconds
    history: deque[list[dict[str, Any]]] = deque(maxlen=4)
    with Live(refresh_per_second=4) as screen:
        while True:
            history.append(read_live())
            screen.update(_live_table(history[0], history[-1]))
            if time.monotonic() >= end:
                return 0 if history[-1] else 1
            try:
                time.sleep(0.5)
            except KeyboardInterrupt:
                return 0


def _live_table(before: Sequence[Mapping[str, Any]], now: Sequence[Mapping[str, Any]]) -> Table:
    """One row a worker; ``before`` and ``now`` are two readings of :func:`read_live`."""
    from rich.table import Table

    columns = ("model", "rank", "slots", "requests", "hit rate", "recent", "misses/s", "in place/s", "GB/s")
    table = Table(*columns, title="vllm_moe_offload" if now else "no engine with moe_offload is running")
    old = {(report["pid"], report["rank"]): report for report in before}
    for report in now:
        past = old.get((report["pid"], report["rank"]), report)
        seconds = max(report["time"] - past["time"], 1e-9)

        def grown(name: str, report: Any = report, past: Any = past) -> float:
            return report[name] - past[name]

        accesses = grown("accesses")
        read = (grown("copies") + grown("in_place")) * report["expert_nbytes"]
        table.add_row(
            str(report["model"]),
            str(report["rank"]),
            str(report["num_slots"]),
            str(report["live_requests"]),
            f"{report['hits'] / report['accesses']:.3f}" if report["accesses"] else "-",
            f"{grown('hits') / accesses:.3f}" if accesses else "-",
            f"{(grown('misses') / seconds):.0f}",
            f"{(grown('in_place') / seconds):.0f}",
            f"{read / seconds / 1e9:.2f}",
        )
    return table


if __name__ == "__main__":
    sys.exit(main())
